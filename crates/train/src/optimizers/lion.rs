//! Lion (Chen et al. 2023, arXiv 2302.06675): u = sign(β1 m + (1−β1) g); w ← w − γ (u + λ w); m ← β2 m + (1−β2) g. Every number moves by the rate,
//! so a rate some 3 to 10 times smaller than Adam's, and β2 = 0.99, are usual.

use super::{Matrix, Moved, Settings, flush, update};

#[derive(Clone, Copy)]
struct Constants {
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    rate: f32,
    /// γλ
    shrink: f32,
}

pub(super) fn step(
    settings: &Settings,
    matrices: &[Matrix],
    params: &mut [f32],
    grads: &[f32],
    moments: &mut [(String, Vec<f32>)],
) -> Vec<Moved> {
    let constants = |matrix: &Matrix| Constants {
        beta1: settings.beta1 as f32,
        rest1: (1.0 - settings.beta1) as f32,
        beta2: settings.beta2 as f32,
        rest2: (1.0 - settings.beta2) as f32,
        rate: matrix.rate as f32,
        shrink: if matrix.decays { (matrix.rate * settings.weight_decay) as f32 } else { 0.0 },
    };
    update(matrices, constants, params, grads, moments, kernel)
}

#[inline(always)]
fn kernel(c: Constants, params: &mut [f32], grads: &[f32], mean: &mut [f32], _: &mut [f32]) {
    for ((w, &g), m) in params.iter_mut().zip(grads).zip(mean) {
        let u = c.beta1 * *m + c.rest1 * g;
        let sign = f32::from(u > 0.0) - f32::from(u < 0.0);
        *w -= c.shrink * *w + c.rate * sign;
        *m = flush(c.beta2 * *m + c.rest2 * g);
    }
}
