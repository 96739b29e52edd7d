//! Adam (Kingma and Ba 1412.6980) and AdamW (Loshchilov and Hutter 1711.05101):
//! m ← β1 m + (1−β1) g; v ← β2 v + (1−β2) g²; w ← (1−γλ) w − γ m̂ / (√v̂ + ε). Adam adds λw to g instead of shrinking w.

use super::{Matrix, Moved, Settings, flush, update};

/// Largest gradient taken at its face value: the square of a larger one would overflow the second moment.
const LARGEST: f32 = 1e19;

#[derive(Clone, Copy)]
pub(super) struct Constants {
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    eps: f32,
    /// γ / (1 − β1^t)
    step: f32,
    /// 1 / √(1 − β2^t)
    correction: f32,
    /// γλ (AdamW); not 1 − γλ, of which f32 would lose most digits
    shrink: f32,
    /// λ (Adam)
    l2: f32,
}

impl Constants {
    pub(super) fn new(settings: &Settings, decoupled: bool, matrix: &Matrix) -> Self {
        let decay = if matrix.decays { settings.weight_decay } else { 0.0 };
        let left = |beta: f64| 1.0 - beta.powf(matrix.steps as f64);
        Self {
            beta1: settings.beta1 as f32,
            rest1: (1.0 - settings.beta1) as f32,
            beta2: settings.beta2 as f32,
            rest2: (1.0 - settings.beta2) as f32,
            eps: settings.eps as f32,
            step: (matrix.rate / left(settings.beta1)) as f32,
            correction: (1.0 / left(settings.beta2).sqrt()) as f32,
            shrink: if decoupled { (matrix.rate * decay) as f32 } else { 0.0 },
            l2: if decoupled { 0.0 } else { decay as f32 },
        }
    }
}

pub(super) fn step(
    settings: &Settings,
    decoupled: bool,
    matrices: &[Matrix],
    params: &mut [f32],
    grads: &[f32],
    moments: &mut [(String, Vec<f32>)],
) -> Vec<Moved> {
    update(matrices, |matrix| Constants::new(settings, decoupled, matrix), params, grads, moments, kernel)
}

#[inline(always)]
pub(super) fn kernel(c: Constants, params: &mut [f32], grads: &[f32], first: &mut [f32], second: &mut [f32]) {
    for (((w, &g), m), v) in params.iter_mut().zip(grads).zip(first).zip(second) {
        let g = (g + c.l2 * *w).clamp(-LARGEST, LARGEST);
        *m = flush(c.beta1 * *m + c.rest1 * g);
        *v = flush(c.beta2 * *v + c.rest2 * (g * g));
        *w -= c.shrink * *w + c.step * (*m / (v.sqrt() * c.correction + c.eps));
    }
}
