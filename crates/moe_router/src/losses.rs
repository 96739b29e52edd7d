//! Auxiliary losses of the router, each a value in f64 and its gradient with respect to the scores. All are means over the n tokens, 0 for n = 0,
//! and finite for any finite scores.

use crate::Routing;
use crate::softmax::{self, Exponentials};
use tensor::Real;
use tensor::kernels::parallel;

/// N Σ_i f_i Q_i: f = share of the tokens that chose id i (constant), Q = mean probability, N ids. At balance it is the mean number of experts per
/// token, not 1.
pub fn balance<T: Real>(scores_ne: &[T], routing: &Routing) -> f64 {
    let (e, n) = (routing.num_ids, routing.num_tokens());
    let (factors_e, all) = (balance_factors(routing), Exponentials::new(scores_ne, e));
    let row = |t: usize| {
        let mass = all.row(t).iter().zip(&factors_e).map(|(m, f)| m.to_f64() * f).sum::<f64>();
        mass / all.sum_n[t].to_f64()
    };
    parallel::sum(n, row) / n.max(1) as f64
}

/// dscores += upstream · dL/dscores; dL/dP_ti = N f_i / n.
pub fn balance_backward<T: Real>(scores_ne: &[T], routing: &Routing, upstream: T, dscores_ne: &mut [T]) {
    let (e, n) = (routing.num_ids, routing.num_tokens());
    let scale = upstream.to_f64() / n.max(1) as f64;
    let dp_e: Vec<T> = balance_factors(routing).into_iter().map(|f| T::from_f64(f * scale)).collect();
    let p_ne = softmax::probabilities(scores_ne, e);
    parallel::rows(dscores_ne, e, |t, dscores| softmax::backward(&p_ne[t * e..(t + 1) * e], |i| dp_e[i], dscores));
}

/// N f_i.
fn balance_factors(routing: &Routing) -> Vec<f64> {
    let scale = routing.num_ids as f64 / routing.num_tokens().max(1) as f64;
    routing.counts().into_iter().map(|count| count as f64 * scale).collect()
}

/// Mean entropy of the rows in nats (the dynamic loss of Huang et al. 2024).
pub fn entropy<T: Real>(scores_ne: &[T], num_ids: usize) -> f64 {
    let n = scores_ne.len() / num_ids.max(1);
    let all = Exponentials::new(scores_ne, num_ids);
    let row = |t: usize| row_entropy(&scores_ne[t * num_ids..(t + 1) * num_ids], &all, t).to_f64();
    parallel::sum(n, row) / n.max(1) as f64
}

/// H = ln Σ exp(h - top) - Σ P (h - top) of row t; probabilities that are 0 add nothing.
fn row_entropy<T: Real>(scores_e: &[T], all: &Exponentials<T>, t: usize) -> T {
    let (top, sum) = (all.top_n[t], all.sum_n[t]);
    let term = |(s, m): (&T, &T)| if *m == T::ZERO { T::ZERO } else { *m * (*s - top) };
    let weighted: T = scores_e.iter().zip(all.row(t)).map(term).sum();
    sum.ln() - weighted / sum
}

/// dscores += upstream · dL/dscores; dH/dh_j = -P_j (ln P_j + H).
pub fn entropy_backward<T: Real>(scores_ne: &[T], num_ids: usize, upstream: T, dscores_ne: &mut [T]) {
    let n = scores_ne.len() / num_ids.max(1);
    let scale = upstream / T::from_f64(n.max(1) as f64);
    let all = Exponentials::new(scores_ne, num_ids);
    parallel::rows(dscores_ne, num_ids, |t, dscores| {
        let scores_e = &scores_ne[t * num_ids..(t + 1) * num_ids];
        let (top, sum, entropy) = (all.top_n[t], all.sum_n[t], row_entropy(scores_e, &all, t));
        let log = sum.ln();
        for ((d, s), m) in dscores.iter_mut().zip(scores_e).zip(all.row(t)) {
            if *m != T::ZERO {
                *d -= scale * (*m / sum) * (*s - top - log + entropy);
            }
        }
    });
}

/// Mean of lse², lse = ln Σ exp(h) (ST-MoE); without its coefficient.
pub fn z<T: Real>(scores_ne: &[T], num_ids: usize) -> f64 {
    let n = scores_ne.len() / num_ids.max(1);
    let all = Exponentials::new(scores_ne, num_ids);
    parallel::sum(n, |t| all.log_sum(t).to_f64().powi(2)) / n.max(1) as f64
}

/// dscores += upstream · dL/dscores; dL/dh_j = 2 lse P_j / n.
pub fn z_backward<T: Real>(scores_ne: &[T], num_ids: usize, upstream: T, dscores_ne: &mut [T]) {
    let n = scores_ne.len() / num_ids.max(1);
    let scale = upstream * T::from_f64(2.0 / n.max(1) as f64);
    let all = Exponentials::new(scores_ne, num_ids);
    parallel::rows(dscores_ne, num_ids, |t, dscores| {
        let factor = scale * all.log_sum(t) / all.sum_n[t];
        dscores.iter_mut().zip(all.row(t)).for_each(|(d, m)| *d += factor * *m);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Assignments;
    use std::sync::Arc;

    fn one_expert_each(ids: &[u32], num_experts: usize) -> Routing {
        let assignments =
            Assignments { row_offsets_n1: (0..=ids.len()).collect(), expert_ids_a: ids.to_vec(), num_experts };
        Routing { assignments: Arc::new(assignments), num_ids: num_experts }
    }

    #[test]
    fn balance_has_its_known_values() {
        let all_to_first = one_expert_each(&[0, 0, 0], 4);
        assert_eq!(balance(&[0.0f64; 12], &all_to_first), 1.0, "blind to collapse where P is uniform");
        let scores: Vec<f64> = [0.97f64, 0.01, 0.01, 0.01].repeat(3).iter().map(|p| p.ln()).collect();
        assert!((balance(&scores, &all_to_first) - 3.88).abs() < 1e-12);
        let two = Assignments { row_offsets_n1: vec![0, 2, 4], expert_ids_a: vec![0, 1, 2, 3], num_experts: 4 };
        let two = Routing { assignments: Arc::new(two), num_ids: 4 };
        assert_eq!(balance(&[0.0f64; 8], &two), 2.0, "the mean number of experts at balance");
    }

    #[test]
    fn z_is_the_squared_log_sum() {
        for a in [-3.0, 0.0, 2.5] {
            let expected = (a + 8f64.ln()).powi(2);
            assert!((z(&[a; 24], 8) - expected).abs() < 1e-12 * (1.0 + expected));
        }
    }

    #[test]
    fn entropy_spans_zero_to_ln_n() {
        assert!((entropy(&[1.5f64; 10], 5) - 5f64.ln()).abs() < 1e-14);
        assert_eq!(entropy(&[0.0f32, 1e4, -1e4], 3), 0.0);
        let (half, never) = (0.5f64.ln(), f64::NEG_INFINITY);
        assert!((entropy(&[half, never, half, never, 0.0, never], 3) - 2f64.ln() / 2.0).abs() < 1e-15);
    }

    #[test]
    fn extreme_scores_and_no_tokens_stay_finite() {
        let scores = [1e4f32, -1e4, 0.0, 1e4, 1e4, 1e4, -1e4, -1e4, -1e4];
        let routing = one_expert_each(&[0, 1, 2], 3);
        for sign in [1.0, -1.0] {
            let scores = scores.map(|s| s * sign);
            assert!([balance(&scores, &routing), entropy(&scores, 3), z(&scores, 3)].iter().all(|x| x.is_finite()));
            let mut dscores = [0.0f32; 9];
            balance_backward(&scores, &routing, 1.0, &mut dscores);
            entropy_backward(&scores, 3, 1.0, &mut dscores);
            z_backward(&scores, 3, 1.0, &mut dscores);
            assert!(dscores.iter().all(|d| d.is_finite()) && dscores.iter().any(|d| *d != 0.0));
        }
        let none = one_expert_each(&[], 3);
        assert_eq!((balance::<f32>(&[], &none), entropy::<f32>(&[], 3), z::<f32>(&[], 3)), (0.0, 0.0, 0.0));
    }

    #[test]
    fn permuting_ids_leaves_values_unchanged() {
        let scores = tensor::check::normals(1, 60, 1.0);
        let ids: Vec<u32> = (0..12).map(|t| t * t % 5).collect();
        let moved: Vec<f64> = (0..60).map(|x| scores[x / 5 * 5 + (x % 5 + 3) % 5]).collect();
        let moved_ids: Vec<u32> = ids.iter().map(|id| (id + 2) % 5).collect();
        let pairs = [
            (balance(&scores, &one_expert_each(&ids, 5)), balance(&moved, &one_expert_each(&moved_ids, 5))),
            (entropy(&scores, 5), entropy(&moved, 5)),
            (z(&scores, 5), z(&moved, 5)),
        ];
        assert!(pairs.iter().all(|(a, b)| (a - b).abs() < 1e-13));
    }
}
