//! Softmax rows, their gradient, and ranking: what all policies and losses share.

use tensor::Real;
use tensor::kernels::parallel;
use tensor::kernels::simd::exp;

/// The largest number, NaN left out; -∞ where there is none.
pub fn largest<T: Real>(values: impl Iterator<Item = T>) -> T {
    values.fold(-T::INFINITY, Real::max)
}

/// Largest score and Σ exp(score - largest) of a row.
pub fn log_sum<T: Real>(scores_e: &[T]) -> (T, T) {
    let top = largest(scores_e.iter().copied());
    (top, scores_e.iter().map(|s| exp(*s - top)).sum())
}

/// Softmax of one row.
pub fn softmax<T: Real>(scores_e: &[T], p_e: &mut [T]) {
    let top = largest(scores_e.iter().copied());
    let mut sum = T::ZERO;
    for (p, s) in p_e.iter_mut().zip(scores_e) {
        *p = exp(*s - top);
        sum += *p;
    }
    p_e.iter_mut().for_each(|p| *p /= sum);
}

/// Softmax of every row of [n, width].
pub fn probabilities<T: Real>(scores_ne: &[T], width: usize) -> Vec<T> {
    let mut p_ne = vec![T::ZERO; scores_ne.len()];
    parallel::rows(&mut p_ne, width, |t, p_e| softmax(&scores_ne[t * width..(t + 1) * width], p_e));
    p_ne
}

/// dscores += P ∘ (dP - Σ P dP).
pub fn backward<T: Real>(p_e: &[T], dp_e: impl Fn(usize) -> T, dscores_e: &mut [T]) {
    let inner: T = p_e.iter().enumerate().map(|(i, p)| *p * dp_e(i)).sum();
    for (i, (d, p)) in dscores_e.iter_mut().zip(p_e).enumerate() {
        *d += *p * (dp_e(i) - inner);
    }
}

/// Indices by falling value, the lower index first where values are equal; NaN sorts first, without a panic.
pub fn rank<T: Real>(values: &[T], order: &mut Vec<u32>) {
    order.clear();
    order.extend(0..values.len() as u32);
    order.sort_by(|a, b| values[*b as usize].total_order(&values[*a as usize]));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extreme_scores_give_a_distribution() {
        let mut p = [0.0f32; 3];
        softmax(&[1e4, -1e4, 1e4], &mut p);
        assert_eq!(p, [0.5, 0.0, 0.5]);
        assert_eq!(log_sum(&[1e4f32, -1e4, 1e4]), (1e4, 2.0));
    }

    #[test]
    fn ranking_is_stable_and_survives_nan() {
        let mut order = Vec::new();
        rank(&[0.2, 0.5, 0.2, 0.5], &mut order);
        assert_eq!(order, [1, 3, 0, 2]);
        rank(&[0.2, f64::NAN, 0.3], &mut order);
        assert_eq!(order, [1, 2, 0]);
    }
}
