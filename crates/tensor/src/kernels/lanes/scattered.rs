//! Rows of heads that lie anywhere in an array, scaled and rotated as they are copied, in f32 by AVX-512 where there is one: to the same bits as by the
//! loops beside it.
#![allow(unsafe_code)]

use super::LANES;
use crate::Real;
use crate::isa::{self, Isa};
use crate::kernels::simd::{self, Kernel, soon_all};
use std::any::TypeId;

/// `count` rows of `width` numbers, an even number if they are rotated; row i starts at number `start(i)`.
#[derive(Clone, Copy)]
pub struct Scattered<'s, T, F> {
    pub data: &'s [T],
    pub start: F,
    pub count: usize,
    pub width: usize,
    pub factor: T,
    /// Whether and how far rows are rotated, after they were scaled.
    pub turn: Option<Turn<'s, T>>,
    /// How far behind a row lies the one that will be read after all of these, if it is to be asked for.
    pub ahead: Option<usize>,
}

/// Row i is rotated to the i-th of the positions, or back from it: cosines and sines are [positions, width / 2].
#[derive(Clone, Copy)]
pub struct Turn<'s, T> {
    pub cos: &'s [T],
    pub sin: &'s [T],
    pub positions: Positions<'s>,
    pub back: bool,
}

#[derive(Clone, Copy)]
pub enum Positions<'s> {
    From(usize),
    Of(&'s [usize; LANES]),
}

impl<'s, T: Real> Turn<'s, T> {
    /// Cosines and sines of row i.
    #[inline(always)]
    pub(super) fn angles(&self, i: usize, half: usize) -> (&'s [T], &'s [T]) {
        let position = match self.positions {
            Positions::From(first) => first + i,
            Positions::Of(positions) => positions[i],
        };
        let at = position * half..(position + 1) * half;
        (&self.cos[at.clone()], &self.sin[at])
    }
}

impl<'s, T: Real, F: Fn(usize) -> usize> Scattered<'s, T, F> {
    /// Rows with nothing done to them.
    pub fn plain(data: &'s [T], (count, width): (usize, usize), start: F) -> Self {
        Scattered { data, start, count, width, factor: T::ONE, turn: None, ahead: None }
    }

    /// Copies row i to numbers to(i) and following of `data`.
    pub fn copy(self, data: &mut [T], to: impl Fn(usize) -> usize) {
        debug_assert!(self.turn.is_none() || self.width.is_multiple_of(2), "halves of an odd row");
        let copy = Copy { rows: self, data, to };
        #[cfg(target_arch = "x86_64")]
        if isa::current() >= Isa::Avx512 && TypeId::of::<T>() == TypeId::of::<f32>() {
            // SAFETY: the machine has AVX-512 and T is f32.
            return unsafe { x86::copy(copy) };
        }
        simd::dispatch(copy);
    }

    /// Row i as it lies there.
    #[inline(always)]
    pub(super) fn row(&self, i: usize, width: usize) -> &'s [T] {
        let start = (self.start)(i);
        let row = &self.data[start..start + width];
        if let Some(ahead) = self.ahead {
            soon_all(row.as_ptr(), ahead, width);
        }
        row
    }
}

struct Copy<'s, 'd, T, F, G> {
    rows: Scattered<'s, T, F>,
    data: &'d mut [T],
    to: G,
}

impl<T: Real, F: Fn(usize) -> usize, G: Fn(usize) -> usize> Copy<'_, '_, T, F, G> {
    #[inline(always)]
    fn to(&mut self, i: usize, width: usize) -> &mut [T] {
        let to = (self.to)(i);
        &mut self.data[to..to + width]
    }
}

impl<T: Real, F: Fn(usize) -> usize, G: Fn(usize) -> usize> Kernel for Copy<'_, '_, T, F, G> {
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        let (width, factor, turn) = (self.rows.width, self.rows.factor, self.rows.turn);
        let half = width / 2;
        for i in 0..self.rows.count {
            let (from, to) = (self.rows.row(i, width), self.to(i, width));
            let Some(turn) = turn else {
                to.iter_mut().zip(from).for_each(|(to, from)| *to = *from * factor);
                continue;
            };
            let ((low, high), (x, y)) = (to.split_at_mut(half), from.split_at(half));
            let (cos, sin) = turn.angles(i, half);
            let rows = low.iter_mut().zip(high).zip(x.iter().zip(y)).zip(cos.iter().zip(sin));
            for (((low, high), (x, y)), (cos, sin)) in rows {
                let (x, y, sin) = (*x * factor, *y * factor, if turn.back { -*sin } else { *sin });
                (*low, *high) = (x * *cos - y * sin, y * *cos + x * sin);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Copy, LANES};
    use crate::Real;
    use crate::kernels::turn::first;
    use std::arch::x86_64::*;

    /// # Safety
    /// The machine has AVX-512F and T is f32.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn copy<T: Real, F: Fn(usize) -> usize, G: Fn(usize) -> usize>(rows: Copy<'_, '_, T, F, G>) {
        let width = rows.rows.width;
        let part = if rows.rows.turn.is_some() { width / 2 } else { width };
        // SAFETY: the caller's.
        unsafe {
            match width {
                32 => each::<T, F, G, true, 32>(rows),
                64 => each::<T, F, G, true, 64>(rows),
                _ if part.is_multiple_of(LANES) => each::<T, F, G, true, 0>(rows),
                _ => each::<T, F, G, false, 0>(rows),
            }
        }
    }

    /// Rows, or the halves of rotated ones, are WHOLE vectors, or else cut by masks: a load from what a masked store wrote must wait.
    ///
    /// # Safety
    /// As for `copy`.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn each<T: Real, F: Fn(usize) -> usize, G: Fn(usize) -> usize, const WHOLE: bool, const W: usize>(
        mut copy: Copy<'_, '_, T, F, G>,
    ) {
        let (width, turn) = (if W > 0 { W } else { copy.rows.width }, copy.rows.turn);
        let half = width / 2;
        // SAFETY: T is f32, and no number behind a row, or behind its half, is touched.
        unsafe {
            let factor = _mm512_set1_ps(std::mem::transmute_copy(&copy.rows.factor));
            let sign = _mm512_set1_epi32(if turn.is_some_and(|turn| turn.back) { i32::MIN } else { 0 });
            for i in 0..copy.rows.count {
                let (from, to) =
                    (copy.rows.row(i, width).as_ptr().cast::<f32>(), copy.to(i, width).as_mut_ptr().cast::<f32>());
                let Some(turn) = turn else {
                    for at in (0..width).step_by(LANES) {
                        let x = _mm512_mul_ps(load::<WHOLE>(from.add(at), width - at), factor);
                        store::<WHOLE>(to.add(at), x, width - at);
                    }
                    continue;
                };
                let (cos, sin) = turn.angles(i, half);
                let (cos, sin) = (cos.as_ptr().cast::<f32>(), sin.as_ptr().cast::<f32>());
                for at in (0..half).step_by(LANES) {
                    let left = half - at;
                    let x = _mm512_mul_ps(load::<WHOLE>(from.add(at), left), factor);
                    let y = _mm512_mul_ps(load::<WHOLE>(from.add(half + at), left), factor);
                    let (cos, sin) = (load::<WHOLE>(cos.add(at), left), load::<WHOLE>(sin.add(at), left));
                    let sin = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(sin), sign));
                    let low = _mm512_sub_ps(_mm512_mul_ps(x, cos), _mm512_mul_ps(y, sin));
                    let high = _mm512_add_ps(_mm512_mul_ps(y, cos), _mm512_mul_ps(x, sin));
                    store::<WHOLE>(to.add(at), low, left);
                    store::<WHOLE>(to.add(half + at), high, left);
                }
            }
        }
    }

    /// Sixteen numbers, or the first `left` of them.
    ///
    /// # Safety
    /// They can be read.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn load<const WHOLE: bool>(from: *const f32, left: usize) -> __m512 {
        // SAFETY: the caller's.
        unsafe { if WHOLE { _mm512_loadu_ps(from) } else { _mm512_maskz_loadu_ps(first(left), from) } }
    }

    /// # Safety
    /// They can be written.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn store<const WHOLE: bool>(to: *mut f32, x: __m512, left: usize) {
        // SAFETY: the caller's.
        unsafe { if WHOLE { _mm512_storeu_ps(to, x) } else { _mm512_mask_storeu_ps(to, first(left), x) } }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::check;

    fn numbers(seed: u64, len: usize) -> Vec<f32> {
        check::normals(seed, len, 1.0).into_iter().map(|x| x as f32).collect()
    }

    /// Calls `f` with rows of many widths, as they lie, scaled, and rotated to places and back.
    pub fn each(f: impl Fn(Scattered<'_, f32, &dyn Fn(usize) -> usize>)) {
        for width in [1, 6, 16, 24, 32, 40, 64, 96, 128, 160] {
            let (data, angles) = (numbers(1, 40 * (width + 5)), numbers(2, 20 * width));
            let (cos, sin) = angles.split_at(10 * width);
            let places = std::array::from_fn(|i| (i * 7) % 19);
            for (count, back) in [(0, false), (1, true), (5, false), (16, true)] {
                let start = |i: usize| (i * 11) % 39 * (width + 5) + i % 3;
                let rows = Scattered::plain(&data, (count, width), &start as &dyn Fn(usize) -> usize);
                f(rows);
                f(Scattered { factor: 0.3, ahead: Some(3 * width), ..rows });
                if width % 2 == 0 {
                    for positions in [Positions::From(3), Positions::Of(&places)] {
                        f(Scattered { factor: 0.7, turn: Some(Turn { cos, sin, positions, back }), ..rows });
                    }
                }
            }
        }
    }

    #[test]
    fn rows_are_copied_scaled_and_rotated_at_any_width_to_the_bits_of_the_loops() {
        each(|rows| {
            let (width, gap) = (rows.width, rows.width + 2);
            let mut copies = vec![f32::NAN; rows.count * gap];
            let mut by_loops = copies.clone();
            rows.copy(&mut copies, |i| i * gap);
            Kernel::run(Copy { rows, data: &mut by_loops, to: |i| i * gap });
            let bits = |all: &[f32]| all.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&copies), bits(&by_loops));
            for i in 0..rows.count {
                let (from, copy) = (&rows.data[(rows.start)(i)..][..width], &copies[i * gap..(i + 1) * gap]);
                assert!(copy[width..].iter().all(|x| x.is_nan()), "nothing is written behind a row");
                for d in 0..width {
                    let scaled = |d: usize| f64::from(from[d]) * f64::from(rows.factor);
                    let expected = rows.turn.map_or(scaled(d), |turn| {
                        let half = width / 2;
                        let (cos, sin) = turn.angles(i, half);
                        let sin = f64::from(sin[d % half]) * if (d < half) == turn.back { 1.0 } else { -1.0 };
                        scaled(d) * f64::from(cos[d % half]) + scaled((d + half) % width) * sin
                    });
                    assert!((f64::from(copy[d]) - expected).abs() < 1e-5, "width {width}, number {d}");
                }
            }
        });
    }
}
