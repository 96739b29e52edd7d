//! Products of tiles on bf16: numbers rounded, two neighbours along the depth side by side in one element, sums in f32. By AVX512-BF16, whose
//! instructions take denormals as zero; the loops beside them say what they compute and serve where they are called without it.
#![allow(unsafe_code)]

use super::scattered::Scattered;
use super::{LANES, Lanes, Left, PIECE, Piece};
use crate::isa::{self, Isa};
use crate::kernels::bf16::{apart, pair};
use crate::kernels::simd::{same, same_mut};
use crate::{Precision, Real, kept};
use std::any::TypeId;

/// Pairs of neighbouring lanes.
pub type Couples = [u32; LANES / 2];

/// Whether products of T in a precision are best taken on pairs here.
pub fn pays<T: Real>(precision: Precision) -> bool {
    precision.rounds::<T>() && there()
}

fn there() -> bool {
    isa::current() >= Isa::Avx512Bf16
}

/// Where pairs down the columns go, two rows after two, [rows / 2, width]: rows are filled up with zeros to `width`, in the same piece. Rows may be multiplied
/// by factors first.
pub struct Down<'a, T> {
    pub to: &'a mut Vec<u32>,
    pub width: usize,
    pub factors: Option<&'a Lanes<T>>,
}

/// The neighbours along each row [rows, half], and each row's numbers beside those of the next. After an odd number comes zero.
pub fn pairs<T: Real, F: Fn(usize) -> usize>(
    rows: Scattered<'_, T, F>,
    mut along: Option<&mut Vec<u32>>,
    mut down: Option<Down<'_, T>>,
) {
    let (count, width) = (rows.count, rows.width);
    let half = width.div_ceil(2);
    if let Some(along) = &mut along {
        along.resize(count * half, 0);
    }
    if let Some(down) = &mut down {
        let fits = down.width >= width && down.width <= width.next_multiple_of(PIECE);
        assert!(
            fits && (down.factors.is_none() || count <= LANES),
            "rows of pairs of another width, or factors for more than a tile"
        );
        down.to.resize(count.div_ceil(2) * down.width, 0);
    }
    let whole = rows.turn.is_none() || width == 2 * LANES || width.is_multiple_of(4 * LANES);
    #[cfg(target_arch = "x86_64")]
    if there() && whole && TypeId::of::<T>() == TypeId::of::<f32>() {
        // SAFETY: the machine has AVX512-BF16, T is f32 and there is room for all pairs.
        return unsafe { x86::pairs(&rows, along.map(|to| &mut to[..]), down) };
    }
    kept::with(|Copied(copy): &mut Copied<T>| {
        let copy = kept::grown(copy, count * width);
        rows.copy(copy, |i| i * width);
        let copy = Scattered::plain(copy, (count, width), |i| i * width);
        #[cfg(target_arch = "x86_64")]
        if there() && TypeId::of::<T>() == TypeId::of::<f32>() {
            // SAFETY: as above.
            return unsafe { x86::pairs(&copy, along.map(|to| &mut to[..]), down) };
        }
        let row = |i: usize| if i < count { same::<T, f32>(copy.row(i, width)) } else { &[] };
        let number = |row: &[f32], d: usize| row.get(d).copied().unwrap_or(0.0);
        if let Some(along) = along {
            for (i, to) in along.chunks_exact_mut(half.max(1)).enumerate() {
                to.iter_mut()
                    .enumerate()
                    .for_each(|(d, to)| *to = pair(number(row(i), 2 * d), number(row(i), 2 * d + 1)));
            }
        }
        if let Some(Down { to, width, factors }) = down {
            let factors = factors.map(|factors| same::<T, f32>(&factors.0));
            let factor = |i: usize| factors.and_then(|factors| factors.get(i)).copied().unwrap_or(1.0);
            for (i, to) in to.chunks_exact_mut(width.max(1)).enumerate() {
                let (first, second) = (2 * i, 2 * i + 1);
                for (d, to) in to.iter_mut().enumerate() {
                    *to = pair(number(row(first), d) * factor(first), number(row(second), d) * factor(second));
                }
            }
        }
    });
}

/// Rows in order, where pairs cannot be made of them as they lie.
#[derive(Default)]
struct Copied<T>(Vec<T>);

/// The pairs along sixteen rows by column: a row in each lane.
pub fn turned(to: &mut Vec<Lanes<u32>>, rows: &[u32]) {
    let half = rows.len() / LANES;
    assert!(rows.len() == LANES * half, "sixteen rows");
    to.resize(half, Lanes::all(0));
    #[cfg(target_arch = "x86_64")]
    if there() {
        // SAFETY: the machine has AVX512-BF16.
        return unsafe { x86::turned(to, rows) };
    }
    for (d, to) in to.iter_mut().enumerate() {
        *to = Lanes(std::array::from_fn(|l| rows[l * half + d]));
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
    use super::{Couples, Down, LANES, Lanes, Scattered};
    use crate::Real;
    use crate::kernels::turn::{first, mixed, pairs as pairs_of, transposed};
    use std::arch::x86_64::*;
    use std::mem::transmute;

    /// # Safety
    /// The machine has the set, T is f32, there is room for all pairs, and rows that are rotated are two vectors, or their halves whole pairs.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub unsafe fn pairs<T: Real, F: Fn(usize) -> usize>(
        rows: &Scattered<'_, T, F>,
        along: Option<&mut [u32]>,
        down: Option<Down<'_, T>>,
    ) {
        let whole = rows.width.is_multiple_of(2 * LANES) && down.as_ref().is_none_or(|down| down.width == rows.width);
        // SAFETY: the caller's.
        unsafe {
            match (rows.turn.is_some(), rows.width) {
                (true, 32) if whole => two_by_two::<T, F, true, true, 32>(rows, along, down),
                (true, 64) if whole => two_by_two::<T, F, true, true, 64>(rows, along, down),
                (false, 32) if whole => two_by_two::<T, F, false, true, 32>(rows, along, down),
                (false, 64) if whole => two_by_two::<T, F, false, true, 64>(rows, along, down),
                (true, _) => two_by_two::<T, F, true, true, 0>(rows, along, down),
                (false, _) if whole => two_by_two::<T, F, false, true, 0>(rows, along, down),
                (false, _) => two_by_two::<T, F, false, false, 0>(rows, along, down),
            }
        }
    }

    /// Whether rows TURN, and are WHOLE pairs of vectors: else masks are needed, and a load from what a masked store wrote must wait.
    ///
    /// # Safety
    /// As for `pairs`.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    #[inline]
    unsafe fn two_by_two<T: Real, F: Fn(usize) -> usize, const TURN: bool, const WHOLE: bool, const W: usize>(
        rows: &Scattered<'_, T, F>,
        mut along: Option<&mut [u32]>,
        mut down: Option<Down<'_, T>>,
    ) {
        let (count, width) = (rows.count, if W > 0 { W } else { rows.width });
        let half = width.div_ceil(2);
        // SAFETY: the caller's; masks leave out what lies behind a row.
        unsafe {
            let sign = if rows.turn.is_some_and(|turn| turn.back) { i32::MIN } else { 0 };
            let factor = _mm512_set1_ps(std::mem::transmute_copy(&rows.factor));
            let change = Change { width, factor, sign: _mm512_set1_epi32(sign) };
            for i in (0..count).step_by(2) {
                let first_row = Row::new::<TURN>(rows, i, width);
                let second_row = (i + 1 < count).then(|| Row::new::<TURN>(rows, i + 1, width));
                let factors = down.as_ref().and_then(|down| down.factors).map(|factors| {
                    let factor = |i: usize| _mm512_set1_ps(*factors.0.as_ptr().cast::<f32>().add(i));
                    [factor(i), factor(i + 1)]
                });
                for at in (0..width).step_by(2 * LANES) {
                    let mut x = change.numbers::<TURN, WHOLE>(&first_row, at);
                    let mut y = [_mm512_setzero_ps(); 2];
                    if let Some(row) = &second_row {
                        y = change.numbers::<TURN, WHOLE>(row, at);
                    }
                    if let Some(along) = &mut along {
                        let to = along.as_mut_ptr().add(i * half + at / 2);
                        store::<WHOLE>(to, pairs_of(x[0], x[1]), half - at / 2);
                        if second_row.is_some() {
                            store::<WHOLE>(to.add(half), pairs_of(y[0], y[1]), half - at / 2);
                        }
                    }
                    if let Some(Down { to, width, .. }) = &mut down {
                        if let Some(factors) = factors {
                            for part in 0..2 {
                                x[part] = _mm512_mul_ps(x[part], factors[0]);
                                y[part] = _mm512_mul_ps(y[part], factors[1]);
                            }
                        }
                        let (to, left) = (to.as_mut_ptr().add(i / 2 * *width + at), *width - at);
                        store::<WHOLE>(to, mixed(x[0], y[0]), left);
                        if left > LANES {
                            store::<WHOLE>(to.add(LANES), mixed(x[1], y[1]), left - LANES);
                        }
                    }
                }
            }
        }
    }

    /// Where a row lies, and the cosines and sines of its position.
    struct Row {
        data: *const f32,
        cos: *const f32,
        sin: *const f32,
    }

    impl Row {
        #[inline(always)]
        fn new<const TURN: bool>(
            rows: &Scattered<'_, impl Real, impl Fn(usize) -> usize>,
            i: usize,
            width: usize,
        ) -> Row {
            let data = rows.row(i, width);
            let (cos, sin) = match rows.turn {
                Some(turn) if TURN => turn.angles(i, width / 2),
                _ => (data, data),
            };
            Row { data: data.as_ptr().cast(), cos: cos.as_ptr().cast(), sin: sin.as_ptr().cast() }
        }
    }

    /// What is done to rows of `width` numbers.
    #[derive(Clone, Copy)]
    struct Change {
        width: usize,
        factor: __m512,
        /// The sign of sines.
        sign: __m512i,
    }

    impl Change {
        /// Thirty-two numbers of a row from the one at `at` on; zeros behind the last.
        ///
        /// # Safety
        /// The number at `at` exists, rows are f32, and WHOLE if they TURN.
        #[target_feature(enable = "avx512f")]
        #[inline]
        unsafe fn numbers<const TURN: bool, const WHOLE: bool>(&self, row: &Row, at: usize) -> [__m512; 2] {
            // SAFETY: the caller's.
            unsafe {
                if !TURN {
                    let left = self.width - at;
                    let mut second = _mm512_setzero_ps();
                    if left > LANES {
                        second = self.part::<WHOLE>(row, at + LANES, left - LANES);
                    }
                    return [self.part::<WHOLE>(row, at, left), second];
                }
                let half = self.width / 2;
                if half == LANES {
                    return self.rotated(row, 0, half);
                }
                // Both lie in one half.
                let low = at % half;
                let [first, second] = [self.rotated(row, low, half), self.rotated(row, low + LANES, half)];
                if at < half { [first[0], second[0]] } else { [first[1], second[1]] }
            }
        }

        /// What sixteen numbers of the lower half and those of the upper half become.
        #[target_feature(enable = "avx512f")]
        #[inline]
        unsafe fn rotated(&self, row: &Row, at: usize, half: usize) -> [__m512; 2] {
            // SAFETY: as for `numbers`.
            unsafe {
                let (x, y) = (self.part::<true>(row, at, LANES), self.part::<true>(row, half + at, LANES));
                let cos = _mm512_loadu_ps(row.cos.add(at));
                let sin = _mm512_xor_si512(_mm512_loadu_si512(row.sin.add(at).cast()), self.sign);
                let sin = _mm512_castsi512_ps(sin);
                [
                    _mm512_sub_ps(_mm512_mul_ps(x, cos), _mm512_mul_ps(y, sin)),
                    _mm512_add_ps(_mm512_mul_ps(y, cos), _mm512_mul_ps(x, sin)),
                ]
            }
        }

        /// Sixteen numbers as they lie there, or the first `left` of them, times the factor.
        #[target_feature(enable = "avx512f")]
        #[inline]
        unsafe fn part<const WHOLE: bool>(&self, row: &Row, at: usize, left: usize) -> __m512 {
            // SAFETY: as for `numbers`.
            let x = unsafe {
                let from = row.data.add(at);
                if WHOLE { _mm512_loadu_ps(from) } else { _mm512_maskz_loadu_ps(first(left), from) }
            };
            _mm512_mul_ps(x, self.factor)
        }
    }

    /// # Safety
    /// There is room for sixteen elements, or for `left`.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn store<const WHOLE: bool>(to: *mut u32, x: __m512i, left: usize) {
        // SAFETY: the caller's.
        unsafe {
            if WHOLE { _mm512_storeu_si512(to.cast(), x) } else { _mm512_mask_storeu_epi32(to.cast(), first(left), x) }
        }
    }

    #[target_feature(enable = "avx512f")]
    pub unsafe fn turned(to: &mut [Lanes<u32>], rows: &[u32]) {
        let half = rows.len() / LANES;
        for (block, to) in to.chunks_mut(LANES).enumerate() {
            let (at, mask) = (block * LANES, first(to.len()));
            let mut x = [_mm512_setzero_si512(); LANES];
            for l in 0..LANES {
                // SAFETY: sixteen rows, the elements of the mask.
                x[l] = unsafe { _mm512_maskz_loadu_epi32(mask, rows.as_ptr().add(l * half + at).cast()) };
            }
            for (to, x) in to.iter_mut().zip(transposed(x)) {
                // SAFETY: sixteen elements.
                unsafe { _mm512_storeu_si512(to.0.as_mut_ptr().cast(), x) };
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
            _mm512_dpbf16_ps(sum, transmute::<__m512i, __m512bh>(y), x) // x last: only there can it be read from memory
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
            let grid = Scattered::plain(&spread[..], (keys, width), |i| i * (width + 3));
            let down = Down { to: &mut by_column, width, factors: None };
            super::pairs(grid, Some(&mut by_row), Some(down));
            let half = width.div_ceil(2);
            assert_eq!((by_row.len(), by_column.len()), (keys * half, keys.div_ceil(2) * width));
            let close =
                |found: f32, expected: f64| assert!((f64::from(found) - expected).abs() < 1e-4, "{keys} {width}");
            columns(&mut pairs, &q);
            let lines: Vec<f32> = (0..LANES * width).map(|i| q[i % width].0[i / width]).collect();
            let (mut along, mut from_rows) = (Vec::new(), Vec::new());
            super::pairs(Scattered::plain(&lines, (LANES, width), |l| l * width), Some(&mut along), None);
            turned(&mut from_rows, &along);
            assert_eq!(from_rows, pairs, "{width}");
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
            let down = Down { to: &mut pairs, width, factors: None };
            super::pairs(Scattered::plain(&b[..], (LANES, width), |i| i * width), None, Some(down));
            couples(&mut by_lane, &a);
            let mut dst = vec![Piece::all(0.25f32); keys * wide];
            outer(&mut dst, &by_lane, &pairs, wide);
            for (at, found) in super::super::flat(&dst).iter().enumerate() {
                let products = (0..LANES).map(|l| rounded(a[at / width].0[l]) * rounded(b[l * width + at % width]));
                assert!((f64::from(*found) - 0.25 - products.sum::<f64>()).abs() < 1e-4, "{keys} {wide}");
            }
        }
    }

    #[test]
    fn pairs_of_rows_are_those_of_their_copies() {
        super::super::scattered::tests::each(|rows| {
            let (count, width) = (rows.count, rows.width);
            let mut copies = vec![0.0; count * width];
            rows.copy(&mut copies, |i| i * width);
            let number = |i: usize, d: usize| if i < count && d < width { copies[i * width + d] } else { 0.0 };
            let padded = width.next_multiple_of(PIECE);
            let factors = Lanes(std::array::from_fn(|l| 0.5 + l as f32));
            for factors in [None, Some(&factors)] {
                let (mut along, mut down) = (vec![7; 3], vec![7; 3]);
                super::pairs(rows, Some(&mut along), Some(Down { to: &mut down, width: padded, factors }));
                let half = width.div_ceil(2);
                let expected = (0..count * half).map(|at| (at / half, at % half * 2));
                assert!(
                    along.iter().copied().eq(expected.map(|(i, d)| pair(number(i, d), number(i, d + 1)))),
                    "{width}"
                );
                let number = |i: usize, d: usize| number(i, d) * factors.map_or(1.0, |factors| factors.0[i % LANES]);
                let expected = (0..count.div_ceil(2) * padded).map(|at| (at / padded * 2, at % padded));
                assert!(
                    down.iter().copied().eq(expected.map(|(i, d)| pair(number(i, d), number(i + 1, d)))),
                    "{width}"
                );
            }
        });
    }
}
