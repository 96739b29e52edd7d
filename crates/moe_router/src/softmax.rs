//! Softmax rows, their gradient, and ranking: what all policies and losses share.

use tensor::Real;
use tensor::kernels::parallel;
use tensor::kernels::simd::{self, Kernel, exp};

/// The largest number, NaN left out; -∞ where there is none.
pub fn largest<T: Real>(values: impl Iterator<Item = T>) -> T {
    values.fold(-T::INFINITY, Real::max)
}

/// Rows [n, width] of scores as exp(score - largest of the row), with the largest score and the sum of each row: what the softmax and every loss
/// are made of.
pub struct Exponentials<T> {
    width: usize,
    pub mass_ne: Vec<T>,
    pub top_n: Vec<T>,
    pub sum_n: Vec<T>,
}

impl<T: Real> Exponentials<T> {
    pub fn new(scores_ne: &[T], width: usize) -> Self {
        const ROWS: usize = 256; // rows a task takes
        let top_n: Vec<T> = scores_ne.chunks(width.max(1)).map(|scores_e| largest(scores_e.iter().copied())).collect();
        let mut mass_ne = vec![T::ZERO; scores_ne.len()];
        parallel::rows(&mut mass_ne, ROWS * width, |block, mass| {
            let (scores, tops) = (&scores_ne[block * ROWS * width..][..mass.len()], &top_n[block * ROWS..]);
            simd::dispatch(Shifted { scores, tops, width, mass });
        });
        let sum_n = mass_ne.chunks(width.max(1)).map(|mass_e| mass_e.iter().copied().sum()).collect();
        Exponentials { width, mass_ne, top_n, sum_n }
    }

    /// exp(score - largest) of row t.
    pub fn row(&self, t: usize) -> &[T] {
        &self.mass_ne[t * self.width..(t + 1) * self.width]
    }

    /// ln Σ exp(score) of row t.
    pub fn log_sum(&self, t: usize) -> T {
        self.top_n[t] + self.sum_n[t].ln()
    }
}

/// mass = exp(score - top of its row).
struct Shifted<'s, T> {
    scores: &'s [T],
    tops: &'s [T],
    width: usize,
    mass: &'s mut [T],
}

impl<T: Real> Kernel for Shifted<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for ((mass, scores), top) in
            self.mass.chunks_exact_mut(self.width).zip(self.scores.chunks_exact(self.width)).zip(self.tops)
        {
            for (m, s) in mass.iter_mut().zip(scores) {
                *m = *s - *top;
            }
        }
        for m in self.mass {
            *m = exp(*m);
        }
    }
}

/// Softmax of every row of [n, width].
pub fn probabilities<T: Real>(scores_ne: &[T], width: usize) -> Vec<T> {
    let Exponentials { mass_ne: mut p_ne, sum_n, .. } = Exponentials::new(scores_ne, width);
    for (p_e, sum) in p_ne.chunks_mut(width.max(1)).zip(sum_n) {
        p_e.iter_mut().for_each(|p| *p /= sum);
    }
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
        let scores = [1e4f32, -1e4, 1e4];
        assert_eq!(probabilities(&scores, 3), [0.5, 0.0, 0.5]);
        let all = Exponentials::new(&scores, 3);
        assert_eq!((all.top_n[0], all.sum_n[0], all.row(0)), (1e4, 2.0, &[1.0, 0.0, 1.0][..]));
        assert!(probabilities::<f32>(&[], 3).is_empty() && probabilities::<f32>(&[], 0).is_empty());
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
