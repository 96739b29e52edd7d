//! LARS (You, Gitman, Ginsburg 1708.03888) in the paper's form, one norm segment per tensor and per expert:
//! λ = η ‖w‖ / (‖g‖ + β‖w‖ + ε); v ← μ v + γ λ (g + β w); w ← w − v. λ stands inside the momentum and is taken from the clipped gradient.
//! λ is 1 where a norm is zero and for the parameters without decay, which then follow plain momentum at the rate γ.

use super::{Matrix, Moved, Settings, flush, update};
use crate::layers::sum_squares;
use rayon::prelude::*;

#[derive(Clone, Copy)]
struct Constants {
    /// γ λ
    rate: f32,
    momentum: f32,
    decay: f32,
}

pub(super) fn step(
    settings: &Settings,
    matrices: &mut [Matrix],
    params: &mut [f32],
    grads: &[f32],
    moments: &mut [(String, Vec<f32>)],
) -> Vec<Moved> {
    matrices.par_iter_mut().for_each(|matrix| matrix.rate *= ratio(settings, matrix, params, grads));
    let constants = |matrix: &Matrix| Constants {
        rate: matrix.rate as f32,
        momentum: settings.momentum as f32,
        decay: if matrix.decays { settings.weight_decay as f32 } else { 0.0 },
    };
    update(matrices, constants, params, grads, moments, kernel)
}

/// λ of one norm segment.
fn ratio(settings: &Settings, matrix: &Matrix, params: &[f32], grads: &[f32]) -> f64 {
    if !matrix.decays || !matrix.moves {
        return 1.0;
    }
    let weight = sum_squares(&params[matrix.range.clone()]).sqrt();
    let gradient = sum_squares(&grads[matrix.range.clone()]).sqrt();
    trust_ratio(settings, matrix, weight, gradient)
}

/// λ from the norms of weights and gradient.
pub(crate) fn trust_ratio(settings: &Settings, matrix: &Matrix, weight: f64, gradient: f64) -> f64 {
    if !matrix.decays || !matrix.moves || weight == 0.0 || gradient == 0.0 {
        return 1.0;
    }
    settings.trust * weight / (gradient + settings.weight_decay * weight + settings.eps)
}

#[inline(always)]
fn kernel(c: Constants, params: &mut [f32], grads: &[f32], velocity: &mut [f32], _: &mut [f32]) {
    for ((w, &g), v) in params.iter_mut().zip(grads).zip(velocity) {
        *v = flush(c.momentum * *v + c.rate * (g + c.decay * *w));
        *w -= *v;
    }
}
