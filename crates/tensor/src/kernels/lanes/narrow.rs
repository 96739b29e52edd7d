//! Products of tiles on bf16: numbers rounded, two neighbours along the depth side by side in one element, sums in f32. By AVX512-BF16, whose
//! instructions take denormals as zero; the loops beside them say what they compute and serve where they are called without it.
#![allow(unsafe_code)]

use super::{LANES, Lanes, Left, PIECE, Piece};
use crate::isa::{self, Isa};
use crate::kernels::bf16::{apart, pair};
use crate::kernels::simd::{same, same_mut};
use crate::{Precision, Real};

/// Pairs of neighbouring lanes.
pub type Couples = [u32; LANES / 2];

/// Whether products of T in a precision are best taken on pairs here.
pub fn pays<T: Real>(precision: Precision) -> bool {
    precision.rounds::<T>() && there()
}

fn there() -> bool {
    isa::current() >= Isa::Avx512Bf16
}

/// Rows of `width` numbers that lie `stride` apart.
#[derive(Clone, Copy)]
pub struct Grid<'a, T> {
    pub data: &'a [T],
    pub rows: usize,
    pub width: usize,
    pub stride: usize,
}

impl<'a, T: Real> Grid<'a, T> {
    fn of_f32(self) -> Grid<'a, f32> {
        let Grid { data, rows, width, stride } = self;
        assert!(rows == 0 || (rows - 1) * stride + width <= data.len(), "rows out of bounds");
        Grid { data: same(data), rows, width, stride }
    }
}

impl<'a, T> Grid<'a, T> {
    pub fn row(&self, i: usize) -> &'a [T] {
        &self.data[i * self.stride..][..self.width]
    }
}

/// The neighbours along each row; after an odd number comes zero.
pub fn along<T: Real>(to: &mut Vec<u32>, from: Grid<'_, T>) {
    let (from, half) = (from.of_f32(), from.width.div_ceil(2));
    to.resize(from.rows * half, 0);
    #[cfg(target_arch = "x86_64")]
    if there() {
        // SAFETY: the machine has AVX512-BF16; `of_f32` checked the rows, and there is room for their pairs.
        return unsafe { x86::along(to, from) };
    }
    for i in 0..from.rows {
        for (to, pair_of) in to[i * half..].iter_mut().zip(from.row(i).chunks(2)) {
            *to = pair(pair_of[0], pair_of.get(1).copied().unwrap_or(0.0));
        }
    }
}

/// Each row's numbers beside those of the next, two rows after two; after an odd number of rows comes zero.
pub fn down<T: Real>(to: &mut Vec<u32>, from: Grid<'_, T>) {
    let (from, width) = (from.of_f32(), from.width);
    to.resize(from.rows.div_ceil(2) * width, 0);
    #[cfg(target_arch = "x86_64")]
    if there() {
        // SAFETY: as in `along`.
        return unsafe { x86::down(to, from) };
    }
    for i in (0..from.rows).step_by(2) {
        let second = (i + 1 < from.rows).then(|| from.row(i + 1));
        for (c, (to, first)) in to[i / 2 * width..].iter_mut().zip(from.row(i)).enumerate() {
            *to = pair(*first, second.map_or(0.0, |second| second[c]));
        }
    }
}

/// Neighbours along the columns; after an odd number comes zero.
pub fn columns<T: Real>(to: &mut Vec<Lanes<u32>>, from: &[Lanes<T>]) {
    let from = same::<_, Lanes<f32>>(from);
    to.resize(from.len().div_ceil(2), Lanes::all(0));
    #[cfg(target_arch = "x86_64")]
    if there() {
        // SAFETY: the machine has AVX512-BF16.
        return unsafe { x86::columns(to, from) };
    }
    for (to, from) in to.iter_mut().zip(from.chunks(2)) {
        let second = from.get(1).map_or([0.0; LANES], |second| second.0);
        *to = Lanes(std::array::from_fn(|l| pair(from[0].0[l], second[l])));
    }
}

/// Neighbouring lanes.
pub fn couples<T: Real>(to: &mut Vec<Couples>, from: &[Lanes<T>]) {
    let from = same::<_, Lanes<f32>>(from);
    to.resize(from.len(), [0; LANES / 2]);
    #[cfg(target_arch = "x86_64")]
    if there() {
        // SAFETY: the machine has AVX512-BF16.
        return unsafe { x86::couples(to, from) };
    }
    for (to, from) in to.iter_mut().zip(from) {
        *to = std::array::from_fn(|i| pair(from.0[2 * i], from.0[2 * i + 1]));
    }
}

/// `super::product`, where an element of both sides is a pair along the depth.
pub fn product<T: Real>(dst: &mut [Lanes<T>], a: Left<'_, u32>, b: &[Lanes<u32>], accumulate: bool) {
    let (dst, depth) = (same_mut::<_, Lanes<f32>>(dst), b.len());
    if dst.is_empty() {
        return;
    }
    assert!(depth == 0 || (dst.len() - 1) * a.row + (depth - 1) * a.col < a.data.len(), "product out of bounds");
    #[cfg(target_arch = "x86_64")]
    if there() {
        // SAFETY: the machine has AVX512-BF16; the assertion bounds every element of a.
        return unsafe { x86::product(dst, (a.data.as_ptr(), a.row, a.col), b, accumulate) };
    }
    for (i, dst) in dst.iter_mut().enumerate() {
        let mut sum = if accumulate { dst.0 } else { [0.0; LANES] };
        for (k, b) in b.iter().enumerate() {
            let x = apart(a.data[i * a.row + k * a.col]);
            sum = std::array::from_fn(|l| {
                let y = apart(b.0[l]);
                sum[l] + x[0] * y[0] + x[1] * y[1]
            });
        }
        dst.0 = sum;
    }
}

/// `super::outer`, where an element of both sides is a pair of lanes: b [lanes / 2, wide] pieces.
pub fn outer<T: Real>(dst: &mut [Piece<T>], a: &[Couples], b: &[u32], wide: usize) {
    let width = wide * PIECE;
    let dst = super::flat_mut(dst);
    assert!(dst.len() == a.len() * width && b.len() == LANES / 2 * width, "outer product out of bounds");
    let dst = same_mut::<T, f32>(dst);
    #[cfg(target_arch = "x86_64")]
    if there() {
        // SAFETY: the machine has AVX512-BF16; the assertion bounds both sides.
        return unsafe { x86::outer(dst, a, b, width) };
    }
    for (dst, a) in dst.chunks_exact_mut(width).zip(a) {
        for (x, b) in a.iter().zip(b.chunks_exact(width)) {
            let x = apart(*x);
            dst.iter_mut().zip(b).for_each(|(d, b)| *d += x[0] * apart(*b)[0] + x[1] * apart(*b)[1]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Couples, Grid, LANES, Lanes};
    use crate::kernels::turn::{mixed, pairs};
    use std::arch::x86_64::*;
    use std::mem::transmute;

    /// The first `count` of sixteen numbers or elements.
    fn first(count: usize) -> __mmask16 {
        if count < LANES { (1 << count) - 1 } else { !0 }
    }

    /// # Safety
    /// The machine has the set; the rows are there, and room for their pairs.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub unsafe fn along(to: &mut [u32], from: Grid<'_, f32>) {
        let half = from.width.div_ceil(2);
        for at in (0..half).step_by(LANES) {
            let numbers = from.width - 2 * at;
            let (low, high, pair) = (first(numbers), first(numbers.saturating_sub(LANES)), first(half - at));
            for i in 0..from.rows {
                // SAFETY: the caller's; no number or element beyond the row is touched.
                unsafe {
                    let row = from.data.as_ptr().add(i * from.stride + 2 * at);
                    let (x, y) =
                        (_mm512_maskz_loadu_ps(low, row), _mm512_maskz_loadu_ps(high, row.wrapping_add(LANES)));
                    _mm512_mask_storeu_epi32(to.as_mut_ptr().add(i * half + at).cast(), pair, pairs(x, y));
                }
            }
        }
    }

    /// # Safety
    /// As for `along`.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub unsafe fn down(to: &mut [u32], from: Grid<'_, f32>) {
        for at in (0..from.width).step_by(LANES) {
            let mask = first(from.width - at);
            for i in (0..from.rows).step_by(2) {
                let below = if i + 1 < from.rows { mask } else { 0 };
                // SAFETY: as in `along`.
                unsafe {
                    let row = from.data.as_ptr().add(i * from.stride + at);
                    let second = _mm512_maskz_loadu_ps(below, row.wrapping_add(from.stride));
                    let x = mixed(_mm512_maskz_loadu_ps(mask, row), second);
                    _mm512_mask_storeu_epi32(to.as_mut_ptr().add(i / 2 * from.width + at).cast(), mask, x);
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub unsafe fn columns(to: &mut [Lanes<u32>], from: &[Lanes<f32>]) {
        for (to, from) in to.iter_mut().zip(from.chunks(2)) {
            // SAFETY: sixteen numbers each.
            unsafe {
                let first = _mm512_loadu_ps(from[0].0.as_ptr());
                let second = from.get(1).map_or(_mm512_setzero_ps(), |second| _mm512_loadu_ps(second.0.as_ptr()));
                _mm512_storeu_si512(to.0.as_mut_ptr().cast(), mixed(first, second));
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub unsafe fn couples(to: &mut [Couples], from: &[Lanes<f32>]) {
        for (to, from) in to.iter_mut().zip(from) {
            // SAFETY: sixteen numbers, eight elements.
            unsafe {
                let x = _mm512_cvtneps_pbh(_mm512_loadu_ps(from.0.as_ptr()));
                _mm256_storeu_si256(to.as_mut_ptr().cast(), transmute::<__m256bh, __m256i>(x));
            }
        }
    }

    type Vector = __m512i;

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn load(mask: __mmask16, from: *const u32) -> Vector {
        // SAFETY: the caller's, for the elements of the mask.
        unsafe { _mm512_maskz_loadu_epi32(mask, from.cast()) }
    }

    /// sum + both products of a pair with those of sixteen.
    #[target_feature(enable = "avx512f,avx512bf16")]
    #[inline]
    fn step(sum: __m512, x: u32, y: Vector) -> __m512 {
        // SAFETY: 512 bits of pairs each.
        unsafe {
            let x = transmute::<__m512i, __m512bh>(_mm512_set1_epi32(x as i32));
            _mm512_dpbf16_ps(sum, x, transmute::<__m512i, __m512bh>(y))
        }
    }

    super::super::strips::products!("avx512f,avx512bf16", u32, LANES / 2);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;
    use crate::kernels::bf16::round;

    fn numbers(seed: u64, len: usize) -> Vec<f32> {
        check::normals(seed, len, 1.0).into_iter().map(|x| x as f32).collect()
    }

    fn rounded(x: f32) -> f64 {
        f64::from(f32::from_bits(round(x)))
    }

    #[test]
    fn products_are_those_of_the_rounded_numbers_at_any_size() {
        for (keys, width) in [(1, 1), (3, 5), (16, 16), (17, 33), (31, 64), (64, 40)] {
            let rows = numbers(1, keys * width);
            let lanes = |seed, n: usize| -> Vec<Lanes<f32>> {
                numbers(seed, n * LANES).chunks_exact(LANES).map(|x| Lanes(x.try_into().unwrap())).collect()
            };
            let (q, w) = (lanes(2, width), lanes(3, keys));
            let (mut by_row, mut by_column, mut pairs) = (Vec::new(), Vec::new(), Vec::new());
            // Some numbers between the rows, which no pair may hold.
            let mut spread = vec![f32::NAN; keys * (width + 3)];
            spread
                .chunks_exact_mut(width + 3)
                .zip(rows.chunks_exact(width))
                .for_each(|(to, row)| to[..width].copy_from_slice(row));
            let grid = Grid { data: &spread[..], rows: keys, width, stride: width + 3 };
            along(&mut by_row, grid);
            down(&mut by_column, grid);
            let half = width.div_ceil(2);
            assert_eq!((by_row.len(), by_column.len()), (keys * half, keys.div_ceil(2) * width));
            let close =
                |found: f32, expected: f64| assert!((f64::from(found) - expected).abs() < 1e-4, "{keys} {width}");
            columns(&mut pairs, &q);
            let mut scores = vec![Lanes::all(0.5f32); keys];
            product(&mut scores, Left { data: &by_row, row: half, col: 1 }, &pairs, false);
            columns(&mut pairs, &w);
            let mut sums = vec![Lanes::all(0.5f32); width];
            product(&mut sums, Left { data: &by_column, row: 1, col: width }, &pairs, true);
            let row = |j: usize, d: usize| rounded(rows[j * width + d]);
            for l in 0..LANES {
                for j in 0..keys {
                    close(scores[j].0[l], (0..width).map(|d| row(j, d) * rounded(q[d].0[l])).sum());
                }
                for d in 0..width {
                    close(sums[d].0[l], 0.5 + (0..keys).map(|j| row(j, d) * rounded(w[j].0[l])).sum::<f64>());
                }
            }
        }
    }

    #[test]
    fn outer_products_are_those_of_the_rounded_numbers_at_any_width() {
        for (keys, wide) in [(1, 1), (5, 2), (16, 3), (37, 8)] {
            let width = wide * PIECE;
            let a: Vec<Lanes<f32>> =
                numbers(4, keys * LANES).chunks_exact(LANES).map(|x| Lanes(x.try_into().unwrap())).collect();
            let b = numbers(5, LANES * width);
            let (mut pairs, mut by_lane) = (Vec::new(), Vec::new());
            down(&mut pairs, Grid { data: &b[..], rows: LANES, width, stride: width });
            couples(&mut by_lane, &a);
            let mut dst = vec![Piece::all(0.25f32); keys * wide];
            outer(&mut dst, &by_lane, &pairs, wide);
            for (at, found) in super::super::flat(&dst).iter().enumerate() {
                let products = (0..LANES).map(|l| rounded(a[at / width].0[l]) * rounded(b[l * width + at % width]));
                assert!((f64::from(*found) - 0.25 - products.sum::<f64>()).abs() < 1e-4, "{keys} {wide}");
            }
        }
    }
}
