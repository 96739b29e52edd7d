//! Scores in, assignments and weights out: routing policies (one file each), gates of the mixture of heads, auxiliary losses and statistics.
//! Pure functions on score rows, generic over f32 and f64, with their gradients; `node` enters them on the tape. Ties break by the lower index
//! everywhere; a NaN score gives NaN weights, never a panic.

#![forbid(unsafe_code)]

pub mod balance;
pub mod budget;
pub mod config;
pub mod depths;
pub mod expert_choice;
pub mod forced;
pub mod heads;
pub mod learned_p;
pub mod losses;
pub mod node;
pub mod overruled;
pub mod policy;
pub mod softmax;
pub mod statistics;
pub mod top_k;
pub mod top_p;

pub use config::{Config, Experts, Threshold};
pub use policy::{Control, ControlError, Mode, Observation, Policy};
pub use statistics::{CollapseAlarm, Report, Statistics};

use std::ops::Deref;
use std::sync::Arc;
use tensor::Real;
pub use tensor::ops::experts::Assignments;

/// All a policy may look at: score rows of n tokens, and what surrounds them.
#[derive(Clone, Copy, Debug)]
pub struct RouterInput<'a, T> {
    /// Scores before the softmax, [n, num_ids].
    pub scores_ne: &'a [T],
    /// Width of a score row.
    pub num_ids: usize,
    /// Document starts, the last entry is n.
    pub offsets_b1: &'a [usize],
    /// Token ids, [n].
    pub tokens_n: &'a [u32],
    /// Place of the first row in its document: above 0 where a document goes on whose beginning is cached.
    pub start: usize,
    /// Index of the block.
    pub layer: usize,
    /// Scores of the sparse layer below, [n, num_ids].
    pub below_ne: Option<&'a [T]>,
    /// Input of the router, [n, d].
    pub hidden_nd: Option<&'a [T]>,
    /// What a learned threshold is made of: w·x + b, [n].
    pub threshold_logits_n: Option<&'a [T]>,
}

impl<'a, T: Real> RouterInput<'a, T> {
    /// The documents of a batch, still without scores.
    pub fn new(offsets_b1: &'a [usize], tokens_n: &'a [u32], layer: usize) -> Self {
        RouterInput {
            scores_ne: &[],
            num_ids: 0,
            offsets_b1,
            tokens_n,
            start: 0,
            layer,
            below_ne: None,
            hidden_nd: None,
            threshold_logits_n: None,
        }
    }

    pub fn with_scores(self, scores_ne: &'a [T], num_ids: usize) -> Self {
        RouterInput { scores_ne, num_ids, ..self }
    }

    pub fn starting_at(self, start: usize) -> Self {
        RouterInput { start, ..self }
    }

    pub fn with_thresholds(self, logits_n: &'a [T]) -> Self {
        RouterInput { threshold_logits_n: Some(logits_n), ..self }
    }

    pub fn num_tokens(&self) -> usize {
        self.scores_ne.len() / self.num_ids.max(1)
    }
}

/// Which ids every token takes. Ids below `num_experts` are experts, ids from there to `num_ids` compute nothing (losses still see them).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Routing {
    pub assignments: Arc<Assignments>,
    /// Width of the score rows.
    pub num_ids: usize,
}

impl Deref for Routing {
    type Target = Assignments;

    fn deref(&self) -> &Assignments {
        &self.assignments
    }
}

impl Routing {
    /// Mean number of experts (not ids that compute nothing) per token; 0 without tokens.
    pub fn active_per_token(&self) -> f64 {
        let active = self.expert_ids_a.iter().filter(|id| (**id as usize) < self.num_experts).count();
        active as f64 / self.num_tokens().max(1) as f64
    }

    /// Assignments of every id, also those that compute nothing.
    pub fn counts(&self) -> Vec<u64> {
        let mut counts = vec![0; self.num_ids];
        self.expert_ids_a.iter().for_each(|&id| counts[id as usize] += 1);
        counts
    }
}

/// Builds rows with `choose(token, probabilities, row)`; the weights are the probabilities of the chosen, divided by their sum if `renormalize`.
fn assign<T: Real>(
    input: &RouterInput<'_, T>,
    num_experts: usize,
    renormalize: bool,
    mut choose: impl FnMut(usize, &[T], &mut Vec<u32>),
) -> (Routing, Vec<T>) {
    let n = input.num_tokens();
    let p_ne = softmax::probabilities(input.scores_ne, input.num_ids);
    let mut row_offsets_n1 = Vec::with_capacity(n + 1);
    row_offsets_n1.push(0);
    let (mut expert_ids_a, mut weights_a) = (Vec::new(), Vec::new());
    for (t, p_e) in p_ne.chunks(input.num_ids.max(1)).enumerate() {
        let start = expert_ids_a.len();
        choose(t, p_e, &mut expert_ids_a);
        let chosen = expert_ids_a[start..].iter().map(|&id| p_e[id as usize]);
        let mass = if renormalize { chosen.clone().sum() } else { T::ONE };
        weights_a.extend(chosen.map(|p| p / mass));
        row_offsets_n1.push(expert_ids_a.len());
    }
    let assignments = Assignments { row_offsets_n1, expert_ids_a, num_experts };
    (Routing { assignments: Arc::new(assignments), num_ids: input.num_ids }, weights_a)
}

/// The backward of `assign`, the choice held constant: dscores += P ∘ (dP - Σ P dP), which couples all scores of a row.
fn assign_backward<T: Real>(
    scores_ne: &[T],
    routing: &Routing,
    renormalize: bool,
    dweights_a: &[T],
    dscores_ne: &mut [T],
) {
    let e = routing.num_ids;
    let p_ne = softmax::probabilities(scores_ne, e);
    let assignments = &*routing.assignments;
    tensor::kernels::parallel::rows(dscores_ne, e, |t, dscores| {
        let p_e = &p_ne[t * e..(t + 1) * e];
        let (ids, dw) = (assignments.row(t), &dweights_a[assignments.span(t)]);
        let chosen = || ids.iter().map(|&id| p_e[id as usize]).zip(dw);
        let (mut mass, mut shift) = (T::ONE, T::ZERO);
        if renormalize {
            mass = chosen().map(|(p, _)| p).sum();
            shift = chosen().map(|(p, dw)| p / mass * *dw).sum();
        }
        let inner: T = chosen().map(|(p, dw)| p * ((*dw - shift) / mass)).sum();
        dscores.iter_mut().zip(p_e).for_each(|(d, p)| *d -= *p * inner);
        for (&id, (p, dw)) in ids.iter().zip(chosen()) {
            dscores[id as usize] += p * ((*dw - shift) / mass);
        }
    });
}
