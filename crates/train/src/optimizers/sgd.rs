//! Gradient descent with momentum: v ← μ v + g + λ w; w ← w − γ v. With μ = 0 there is no buffer.

use super::{Matrix, Moved, Settings, flush, update};

#[derive(Clone, Copy)]
struct Constants {
    rate: f32,
    momentum: f32,
    l2: f32,
}

pub(super) fn step(
    settings: &Settings,
    matrices: &[Matrix],
    params: &mut [f32],
    grads: &[f32],
    moments: &mut [(String, Vec<f32>)],
) -> Vec<Moved> {
    let constants = |matrix: &Matrix| Constants {
        rate: matrix.rate as f32,
        momentum: settings.momentum as f32,
        l2: if matrix.decays { settings.weight_decay as f32 } else { 0.0 },
    };
    if moments.is_empty() {
        update(matrices, constants, params, grads, moments, plain)
    } else {
        update(matrices, constants, params, grads, moments, with_momentum)
    }
}

#[inline(always)]
fn plain(c: Constants, params: &mut [f32], grads: &[f32], _: &mut [f32], _: &mut [f32]) {
    for (w, &g) in params.iter_mut().zip(grads) {
        *w -= c.rate * (g + c.l2 * *w);
    }
}

#[inline(always)]
fn with_momentum(c: Constants, params: &mut [f32], grads: &[f32], velocity: &mut [f32], _: &mut [f32]) {
    for ((w, &g), v) in params.iter_mut().zip(grads).zip(velocity) {
        *v = flush(c.momentum * *v + (g + c.l2 * *w));
        *w -= c.rate * *v;
    }
}
