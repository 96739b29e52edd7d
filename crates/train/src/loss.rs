//! The loss of a forward pass: cross-entropy plus the auxiliary losses of routers and head mixtures, each reported by name and layer.

use crate::run::Losses;
use model::transformer::{Output, Transformer};
use moe_router::node;
use tensor::ops::combine::weighted_sum;
use tensor::ops::cross_entropy::{Targets, cross_entropy};
use tensor::{Real, Tape, Value};

/// An auxiliary loss of one layer, unscaled.
#[derive(Clone, Debug, PartialEq)]
pub struct Auxiliary {
    pub name: &'static str,
    pub layer: usize,
    pub value: f64,
}

pub struct Loss<T: Real> {
    /// What is differentiated: share · cross-entropy + share_tokens · Σ coefficient · mean over layers.
    pub total: Value<T>,
    /// Mean cross-entropy of this pass in nats, weighted by the loss weights.
    pub cross_entropy: f64,
    /// Cross-entropy of every row, nats.
    pub losses_n: Vec<f64>,
    pub auxiliary: Vec<Auxiliary>,
}

/// Parts of a batch that this pass stands for (both 1 without accumulation): of the loss weights, and of the tokens.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    pub weights: f64,
    pub tokens: f64,
}

impl Share {
    pub const WHOLE: Share = Share { weights: 1.0, tokens: 1.0 };
}

/// Total = CE + Σ coefficient · (mean over the layers that have the term). Terms with coefficient 0 are measured and not differentiated.
pub fn loss<'a, T: Real>(
    tape: &mut Tape<'a, T>,
    model: &Transformer,
    output: &Output<T>,
    targets: &Targets,
    coefficients: &Losses,
    share: Share,
) -> Loss<T> {
    let (entropy, losses_n) = cross_entropy(tape, &output.hidden_nd, model.output, targets);
    let mut terms: Vec<(Value<T>, f64)> = vec![(entropy.clone(), share.weights)];
    let mut auxiliary = Vec::new();
    let mut term = |name, layer, value: Value<T>, coefficient: f64, layers: usize| {
        auxiliary.push(Auxiliary { name, layer, value: value.scalar().to_f64() });
        terms.push((value, coefficient * share.tokens / layers as f64));
    };
    for trace in &output.experts {
        let layers = output.experts.len();
        term(
            "balance",
            trace.layer,
            node::balance_loss(tape, &trace.scores_ne, &trace.routing),
            coefficients.balance,
            layers,
        );
        term("entropy", trace.layer, node::entropy_loss(tape, &trace.scores_ne), coefficients.entropy, layers);
        if let Some(gates) = &trace.gates {
            term("budget", trace.layer, gates.clone(), coefficients.budget, layers);
        }
        term("z", trace.layer, node::z_loss(tape, &trace.scores_ne), coefficients.z, layers);
    }
    for trace in &output.heads {
        let value = node::head_balance_loss(tape, &trace.routed_nh, &trace.selection);
        term("heads", trace.layer, value, coefficients.heads, output.heads.len());
    }
    let terms: Vec<(&Value<T>, f64)> = terms.iter().map(|(value, c)| (value, *c)).collect();
    Loss { total: weighted_sum(tape, &terms), cross_entropy: entropy.scalar().to_f64(), losses_n, auxiliary }
}

/// Mean over layers of each auxiliary loss that exists, in the order balance, entropy, budget, z, heads.
pub fn means(auxiliary: &[Auxiliary]) -> Vec<(&'static str, f64)> {
    ["balance", "entropy", "budget", "z", "heads"]
        .into_iter()
        .filter_map(|name| {
            let values: Vec<f64> = auxiliary.iter().filter(|a| a.name == name).map(|a| a.value).collect();
            (!values.is_empty()).then(|| (name, values.iter().sum::<f64>() / values.len() as f64))
        })
        .collect()
}
