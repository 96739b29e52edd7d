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

    /// Rotates heads, whose rows lie `stride` apart, to the positions `at` says, or back when `back`.
    pub(super) fn turn(&self, rows: &mut [T], stride: usize, at: impl Fn(usize) -> usize, back: bool) {
        simd::dispatch(Turn { rope: self, rows, stride, at, back });
    }
}

struct Turn<'s, T, F> {
    rope: &'s Rope<T>,
    rows: &'s mut [T],
    stride: usize,
    at: F,
    back: bool,
}

impl<T: Real, F: Fn(usize) -> usize> Kernel for Turn<'_, T, F> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let half = self.rope.half;
        for (i, row) in self.rows.chunks_mut(self.stride).enumerate() {
            let start = (self.at)(i) * half;
            let (cos, sin) = (&self.rope.cos[start..start + half], &self.rope.sin[start..start + half]);
            let (low, high) = row[..2 * half].split_at_mut(half);
            for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                let sin = if self.back { -*sin } else { *sin };
                (*a, *b) = (*a * *cos - *b * sin, *b * *cos + *a * sin);
            }
        }
    }
}
