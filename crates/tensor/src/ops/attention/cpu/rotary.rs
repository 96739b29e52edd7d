//! Rotary positions: cosines and sines for every position of the longest document.

use crate::Real;
use crate::kernels::simd::{self, Kernel, narrow};

/// Cosines and sines of the angles position · base^(-2d/dh), [positions, dh/2].
pub(super) struct Rope<T> {
    half: usize,
    cos: Vec<T>,
    sin: Vec<T>,
}

impl<T: Real> Rope<T> {
    pub(super) fn new(base: f64, dh: usize, positions: usize) -> Self {
        /// Positions between two exact evaluations; those between are turned by one angle each (in f64).
        const EXACT: usize = 32;
        let half = dh / 2;
        let angles: Vec<f64> = (0..half).map(|d| base.powf(-(d as f64) / half as f64)).collect();
        let steps: Vec<(f64, f64)> = angles.iter().map(|a| a.sin_cos()).collect();
        let mut now = vec![(0.0, 1.0); half];
        let (mut cos, mut sin) = (Vec::with_capacity(positions * half), Vec::with_capacity(positions * half));
        for t in 0..positions {
            for ((now, angle), (s, c)) in now.iter_mut().zip(&angles).zip(&steps) {
                *now = match t % EXACT {
                    0 => (t as f64 * angle).sin_cos(),
                    _ => (now.0 * c + now.1 * s, now.1 * c - now.0 * s),
                };
                sin.push(narrow(now.0));
                cos.push(narrow(now.1));
            }
        }
        Rope { half, cos, sin }
    }

    /// Rotates the head x [dh] to `position`, or back when `back`.
    pub(super) fn turn(&self, x: &mut [T], position: usize, back: bool) {
        let range = position * self.half..(position + 1) * self.half;
        let (low, high) = x[..2 * self.half].split_at_mut(self.half);
        simd::dispatch(Turn { low, high, cos: &self.cos[range.clone()], sin: &self.sin[range], back });
    }
}

struct Turn<'s, T> {
    low: &'s mut [T],
    high: &'s mut [T],
    cos: &'s [T],
    sin: &'s [T],
    back: bool,
}

impl<T: Real> Kernel for Turn<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let angles = self.cos.iter().zip(self.sin);
        for ((a, b), (cos, sin)) in self.low.iter_mut().zip(self.high).zip(angles) {
            let sin = if self.back { -*sin } else { *sin };
            (*a, *b) = (*a * *cos - *b * sin, *b * *cos + *a * sin);
        }
    }
}
