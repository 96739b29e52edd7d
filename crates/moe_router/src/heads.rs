//! Gates of the mixture of heads (Jin et al. 2024, arXiv 2410.11842; scale factors of the authors' code, SkyworkAI/MoH). Heads 0..shared are
//! always on: gate = α1 · shared · softmax(shared scores). Of the routed heads the `active` likeliest are on: gate = α2 · active · softmax over
//! the chosen. [α1, α2] = 2 · softmax(split scores); without shared heads α2 = 1. All gates are exactly 1 where all scores are 0 and all heads
//! active.

use crate::{Assignments, Routing, softmax};
use std::sync::Arc;
use tensor::Real;

/// Score rows of n tokens. `shared_ns` and `split_n2` are empty where there is no shared head.
#[derive(Clone, Copy, Debug)]
pub struct HeadScores<'a, T> {
    pub shared_ns: &'a [T],
    pub routed_nr: &'a [T],
    pub split_n2: &'a [T],
    pub shared: usize,
    pub routed: usize,
}

/// Gradients of the three arrays of `HeadScores`, to be added to.
pub struct HeadGradients<'a, T> {
    pub shared_ns: &'a mut [T],
    pub routed_nr: &'a mut [T],
    pub split_n2: &'a mut [T],
}

/// Which routed heads every token uses (ids count from the first routed head), and the number of shared heads before them. The balance loss and
/// the statistics of experts apply to `routing` with the routed scores.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    pub shared: usize,
    pub routing: Routing,
}

impl Selection {
    pub fn num_heads(&self) -> usize {
        self.shared + self.routing.num_experts
    }

    /// Whether head h of token t is on, [n, h].
    pub fn mask_nh(&self) -> Vec<bool> {
        let (n, h) = (self.routing.num_tokens(), self.num_heads());
        let mut mask = vec![false; n * h];
        for t in 0..n {
            mask[t * h..t * h + self.shared].fill(true);
            self.routing.row(t).iter().for_each(|&id| mask[t * h + self.shared + id as usize] = true);
        }
        mask
    }
}

impl<T: Real> HeadScores<'_, T> {
    fn num_tokens(&self) -> usize {
        self.routed_nr.len() / self.routed.max(1)
    }

    /// [α1, α2] of a token.
    fn split(&self, t: usize) -> [T; 2] {
        let mut alpha = [T::ONE; 2];
        if self.shared > 0 {
            scaled_softmax(self.split_n2[t * 2..t * 2 + 2].iter().copied(), 2.0, &mut alpha);
        }
        alpha
    }

    /// Shared part of a token's gates before α1.
    fn shared(&self, t: usize, out_s: &mut [T]) {
        let scores = self.shared_ns[t * self.shared..(t + 1) * self.shared].iter();
        scaled_softmax(scores.copied(), self.shared as f64, out_s);
    }

    /// Gates of the chosen routed heads of a token before α2, in the order of `ids`.
    fn chosen(&self, t: usize, ids: &[u32], out: &mut [T]) {
        let scores_r = &self.routed_nr[t * self.routed..(t + 1) * self.routed];
        scaled_softmax(ids.iter().map(|&id| scores_r[id as usize]), ids.len() as f64, out);
    }
}

/// out = scale · softmax(scores), computed as scale · exp / Σ exp, so that equal scores of `scale` entries give exactly 1.
fn scaled_softmax<T: Real>(scores: impl Iterator<Item = T> + Clone, scale: f64, out: &mut [T]) {
    let top = softmax::largest(scores.clone());
    out.iter_mut().zip(scores).for_each(|(o, s)| *o = (s - top).exp());
    let sum: T = out.iter().copied().sum();
    out.iter_mut().for_each(|o| *o = *o * T::from_f64(scale) / sum);
}

/// For gates = α · g with g = scale · softmax(scores): hands dscores of every entry to `add` and returns dα.
fn scaled_softmax_backward<T: Real>(
    g: &[T],
    alpha: T,
    scale: f64,
    dgates: impl Fn(usize) -> T,
    mut add: impl FnMut(usize, T),
) -> T {
    let dalpha: T = g.iter().enumerate().map(|(i, g)| *g * dgates(i)).sum();
    let mean = dalpha / T::from_f64(scale);
    g.iter().enumerate().for_each(|(i, g)| add(i, alpha * *g * (dgates(i) - mean)));
    dalpha
}

/// Gates [n, shared + routed] and the choice of `active` routed heads per token (ties: the lower index).
pub fn gates<T: Real>(scores: &HeadScores<'_, T>, active: usize) -> (Vec<T>, Selection) {
    let (n, shared, routed) = (scores.num_tokens(), scores.shared, scores.routed);
    let active = active.min(routed);
    let h = shared + routed;
    let mut gates_nh = vec![T::ZERO; n * h];
    let mut expert_ids_a = Vec::with_capacity(n * active);
    let (mut order, mut chosen) = (Vec::with_capacity(routed), vec![T::ZERO; active]);
    for (t, gates_h) in gates_nh.chunks_mut(h.max(1)).enumerate() {
        let alpha = scores.split(t);
        if shared > 0 {
            scores.shared(t, &mut gates_h[..shared]);
            gates_h[..shared].iter_mut().for_each(|gate| *gate *= alpha[0]);
        }
        softmax::rank(&scores.routed_nr[t * routed..(t + 1) * routed], &mut order);
        let ids = &order[..active];
        scores.chosen(t, ids, &mut chosen);
        ids.iter().zip(&chosen).for_each(|(&id, g)| gates_h[shared + id as usize] = alpha[1] * *g);
        expert_ids_a.extend_from_slice(ids);
    }
    let row_offsets_n1 = (0..=n).map(|t| t * active).collect();
    let assignments = Assignments { row_offsets_n1, expert_ids_a, num_experts: routed };
    (gates_nh, Selection { shared, routing: Routing { assignments: Arc::new(assignments), num_ids: routed } })
}

/// Adds the gradients of the three score arrays, the choice held constant.
pub fn gates_backward<T: Real>(
    scores: &HeadScores<'_, T>,
    selection: &Selection,
    dgates_nh: &[T],
    gradients: &mut HeadGradients<'_, T>,
) {
    let (shared, routed, h) = (scores.shared, scores.routed, selection.num_heads());
    let mut shared_s = vec![T::ZERO; shared];
    let mut chosen = Vec::new();
    for (t, dgates_h) in dgates_nh.chunks(h.max(1)).enumerate() {
        let (alpha, ids) = (scores.split(t), selection.routing.row(t));
        chosen.resize(ids.len(), T::ZERO);
        scores.chosen(t, ids, &mut chosen);
        let drouted = &mut gradients.routed_nr[t * routed..(t + 1) * routed];
        let dchosen = |i: usize| dgates_h[shared + ids[i] as usize];
        let add = |i: usize, d: T| drouted[ids[i] as usize] += d;
        let dalpha2 = scaled_softmax_backward(&chosen, alpha[1], ids.len() as f64, dchosen, add);
        if shared > 0 {
            scores.shared(t, &mut shared_s);
            let dshared = &mut gradients.shared_ns[t * shared..(t + 1) * shared];
            let add = |i: usize, d: T| dshared[i] += d;
            let dalpha1 = scaled_softmax_backward(&shared_s, alpha[0], shared as f64, |i| dgates_h[i], add);
            let dsplit = &mut gradients.split_n2[t * 2..t * 2 + 2];
            let dalpha = [dalpha1, dalpha2];
            scaled_softmax_backward(&alpha, T::ONE, 2.0, |i| dalpha[i], |i, d| dsplit[i] += d);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::check::normals;

    fn scores<'a>(shared_ns: &'a [f32], routed_nr: &'a [f32], split_n2: &'a [f32], n: usize) -> HeadScores<'a, f32> {
        let (shared, routed) = (shared_ns.len() / n, routed_nr.len() / n);
        HeadScores { shared_ns, routed_nr, split_n2, shared, routed }
    }

    #[test]
    fn zero_scores_and_all_heads_active_give_exactly_one() {
        for (shared, routed) in [(2, 6), (0, 8), (1, 7), (3, 5), (4, 12), (7, 9)] {
            let (s, r, a) = (vec![0.0; 2 * shared], vec![0.0; 2 * routed], vec![0.0; 4]);
            let (gates, selection) = gates(&scores(&s, &r, if shared > 0 { &a } else { &[] }, 2), routed);
            assert!(gates.iter().all(|g| *g == 1.0), "{shared} + {routed}: {gates:?}");
            assert!(selection.mask_nh().iter().all(|on| *on));
        }
    }

    #[test]
    fn gates_follow_the_definition() {
        let (shared, routed, split) = ([0.3f32, -0.2], [0.5f32, 1.5, 1.5, -1.0], [0.4f32, 0.1]);
        let (gates, selection) = gates(&scores(&shared, &routed, &split, 1), 2);
        let alpha = 1.0 / (1.0 + (-0.3f64).exp());
        let first = 1.0 / (1.0 + (-0.5f64).exp());
        let expected =
            [4.0 * alpha * first, 4.0 * alpha * (1.0 - first), 0.0, 2.0 * (1.0 - alpha), 2.0 * (1.0 - alpha), 0.0];
        assert!(gates.iter().zip(expected).all(|(g, e)| (f64::from(*g) - e).abs() < 1e-6), "{gates:?} {expected:?}");
        assert_eq!(selection.routing.expert_ids_a, [1, 2]);
        assert_eq!(selection.mask_nh(), [true, true, false, true, true, false]);
    }

    #[test]
    fn ties_nan_and_no_tokens_do_no_harm() {
        let (_, selection) = gates(&scores(&[], &[1.0, 1.0, 1.0], &[], 1), 2);
        assert_eq!(selection.routing.expert_ids_a, [0, 1]);
        assert!(gates(&scores(&[], &[f32::NAN, 1.0], &[], 1), 1).0.iter().any(|g| g.is_nan()));
        let none = HeadScores::<f32> { shared_ns: &[], routed_nr: &[], split_n2: &[], shared: 2, routed: 6 };
        let (gates, selection) = gates(&none, 4);
        assert_eq!((gates.len(), selection.routing.num_tokens()), (0, 0));
    }

    #[test]
    fn an_inactive_head_gets_exactly_no_gradient() {
        let routed: Vec<f32> = normals(1, 12, 1.0).iter().map(|x| *x as f32).collect();
        let scores = scores(&[], &routed, &[], 2);
        let (_, selection) = gates(&scores, 3);
        let mut drouted = [0.0; 12];
        let mut gradients = HeadGradients { shared_ns: &mut [], routed_nr: &mut drouted, split_n2: &mut [] };
        gates_backward(
            &scores,
            &selection,
            &[1.0, 2.0, -1.0, 0.5, 4.0, 0.1, 1.0, 1.5, 2.5, 3.5, 0.0, 9.0],
            &mut gradients,
        );
        assert!(drouted.iter().zip(selection.mask_nh()).all(|(d, on)| (*d != 0.0) == on));
    }
}
