//! Rotary positions: cosines and sines for every position of the longest document.

use crate::kernels::lanes::scattered::{Positions, Turn};
use crate::kernels::simd::narrow;
use crate::{Real, kept};
use std::sync::Arc;

/// Cosines and sines of the angles position · base^(-2d/dh), [positions, dh/2].
pub(super) struct Rope<T> {
    base: f64,
    half: usize,
    cos: Vec<T>,
    sin: Vec<T>,
}

impl<T: Real> Rope<T> {
    /// For at least so many positions, up to a power of two, so that a document that grows seldom asks for another. A thread keeps the last one: all layers
    /// ask for the same.
    pub(super) fn of(base: f64, dh: usize, positions: usize) -> Arc<Self> {
        kept::with(|Last(last): &mut Last<T>| {
            let fits =
                |rope: &&Arc<Self>| (rope.base, rope.half) == (base, dh / 2) && rope.cos.len() >= positions * rope.half;
            match last.as_ref().filter(fits) {
                Some(rope) => rope.clone(),
                None => last.insert(Arc::new(Rope::new(base, dh, positions.next_power_of_two()))).clone(),
            }
        })
    }

    fn new(base: f64, dh: usize, positions: usize) -> Self {
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
        Rope { base, half, cos, sin }
    }

    /// To positions, or back from them.
    pub(super) fn turn<'s>(&'s self, positions: Positions<'s>, back: bool) -> Turn<'s, T> {
        Turn { cos: &self.cos, sin: &self.sin, positions, back }
    }
}

/// What a thread keeps.
#[derive(Default)]
struct Last<T>(Option<Arc<Rope<T>>>);
