//! Sharpness-aware minimisation (Foret 2021, arXiv 2010.01412): the update follows the gradient at w + ρ g / ‖g‖, the place nearby where the loss
//! is about highest, so that flat minima are preferred.

use moe_router::Routing;
use rayon::prelude::*;
use std::sync::Arc;

/// Numbers one task moves.
const CHUNK: usize = 1 << 14;

/// w ← w + step · g. The way back is a copy, not a subtraction, which would not meet the same numbers.
pub fn ascend(params: &mut [f32], grads: &[f32], step: f64) {
    params.par_chunks_mut(CHUNK).zip(grads.par_chunks(CHUNK)).for_each(|(params, grads)| {
        params.iter_mut().zip(grads).for_each(|(w, g)| *w = (f64::from(*w) + step * f64::from(*g)) as f32);
    });
}

/// Share of tokens, over all sparse layers, whose experts in the second pass are others than in the first; none without experts.
pub fn changed(first: &[Arc<Routing>], second: &[Arc<Routing>]) -> Option<f64> {
    let tokens: usize = first.iter().map(|routing| routing.num_tokens()).sum();
    let moved = |(a, b): (&Arc<Routing>, &Arc<Routing>)| {
        (0..a.num_tokens()).filter(|&t| t >= b.num_tokens() || a.row(t) != b.row(t)).count()
    };
    (tokens > 0).then(|| first.iter().zip(second).map(moved).sum::<usize>() as f64 / tokens as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::learner::small;

    #[test]
    fn on_a_quadratic_the_gradient_is_that_of_the_shifted_place() {
        // ½ h w² in one dimension: h (w + ρ sign w).
        for (h, w, rho) in [(2.0f64, 3.0f64, 0.05), (0.5, -4.0, 0.5), (7.0, 0.25, 0.0)] {
            let mut params = [w as f32];
            let grads = [(h * w) as f32];
            ascend(&mut params, &grads, rho / f64::from(grads[0]).abs());
            let found = h * f64::from(params[0]);
            assert!((found - h * (w + rho * w.signum())).abs() < 1e-6 * found.abs(), "{h} {w} {rho}: {found}");
        }
        // In many: w + ρ g / ‖g‖ is ρ away, along the gradient.
        let w: Vec<f32> = (0..40_000).map(|i| (i as f32 * 0.37).sin()).collect();
        let grads: Vec<f32> = w.iter().enumerate().map(|(i, w)| w * (1 + i % 3) as f32).collect();
        let norm = grads.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let mut params = w.clone();
        ascend(&mut params, &grads, 0.7 / norm);
        assert!((crate::noise::squared_distance(&params, &w).sqrt() - 0.7).abs() < 1e-4);
        let moved = params.iter().zip(&w).zip(&grads).filter(|(_, g)| g.abs() > 0.1);
        assert!(moved.into_iter().all(|((a, b), g)| (a - b) * g >= 0.0));
        let still = params.clone();
        ascend(&mut params, &grads, 0.0);
        assert_eq!(params, still);
    }

    #[test]
    fn an_update_takes_the_gradient_of_the_shifted_place_and_gives_the_parameters_back_to_the_bit() {
        for router in
            ["model.router={kind='dense'}", "model.router={kind='top_p', num_experts=4, expert_hidden_size=6}"]
        {
            let (mut plain, settings, batch) = small::learner(&[router, "train.accumulate=2"]);
            let start = plain.params.clone();
            let at_start = small::look(&mut plain, &settings, &batch);
            assert!(at_start.routing_changed.is_none() && at_start.grad_norm > 0.1);
            let mut shifted = small::learner(&[router, "train.accumulate=2"]).0;
            ascend(&mut shifted.params, &plain.grads, 0.3 / at_start.grad_norm);
            let there = small::look(&mut shifted, &settings, &batch);
            let (mut sharp, settings, _) = small::learner(&[router, "train.accumulate=2", "train.sam=0.3"]);
            let update = small::look(&mut sharp, &settings, &batch);
            assert!(sharp.grads == shifted.grads && sharp.grads != plain.grads, "{router}");
            assert_eq!(sharp.params, start);
            // Measured where the parameters are, but for the norms of the gradient that is used.
            assert_eq!((update.cross_entropy, update.total), (at_start.cross_entropy, at_start.total));
            assert_eq!(update.activation_norms, at_start.activation_norms);
            assert_eq!((update.grad_norm, &update.param_norms), (there.grad_norm, &there.param_norms));
            assert_eq!(update.routing_changed.is_some(), router.contains("top_p"));
            assert!(update.routing_changed.is_none_or(|share| (0.0..=1.0).contains(&share)));
        }
    }
}
