//! What attention's loops do by AVX-512 in ways of its own, for f32: products and outer products in strips of sixteen rows, pairs picked and put, rows turned.

use super::{LANES, Lanes};
use crate::kernels::turn::transposed;
use std::arch::x86_64::*;

/// `super::product`; number (i, k) of a lies at i·row + k·col.
///
/// # Safety
/// The machine has AVX-512F; a has its numbers for the rows of dst and the depth of b.
#[target_feature(enable = "avx512f")]
#[inline]
pub unsafe fn product(
    dst: &mut [Lanes<f32>],
    (a, row, col): (*const f32, usize, usize),
    b: &[Lanes<f32>],
    accumulate: bool,
) {
    let mut i = 0;
    macro_rules! strips {
        ($($m:literal)*) => {$(
            while dst.len() - i >= $m {
                // SAFETY: the caller's, for the rows i..i + M.
                unsafe { strip::<$m>(&mut dst[i..i + $m], (a.add(i * row), row, col), b, accumulate) };
                i += $m;
            }
        )*};
    }
    strips!(16 8 4 2 1);
}

/// M rows of a product.
///
/// # Safety
/// As for `product`.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn strip<const M: usize>(
    dst: &mut [Lanes<f32>],
    (a, row, col): (*const f32, usize, usize),
    b: &[Lanes<f32>],
    accumulate: bool,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut sums = [_mm512_setzero_ps(); M];
        if accumulate {
            sums.iter_mut().zip(&*dst).for_each(|(sum, dst)| *sum = _mm512_loadu_ps(dst.0.as_ptr()));
        }
        // Four rows to a pointer, so that the addresses of sixteen need few registers.
        let mut at: [*const f32; 4] = std::array::from_fn(|q| a.wrapping_add(4 * q * row));
        for b in b {
            let b = _mm512_loadu_ps(b.0.as_ptr());
            for i in 0..M {
                let x = _mm512_set1_ps(*at[i / 4].add(i % 4 * row));
                sums[i] = _mm512_fmadd_ps(x, b, sums[i]);
            }
            at = at.map(|at| at.wrapping_add(col));
        }
        dst.iter_mut().zip(sums).for_each(|(dst, sum)| _mm512_storeu_ps(dst.0.as_mut_ptr(), sum));
    }
}

/// `super::column` for sixteen numbers, where rows are `wide` numbers apart.
///
/// # Safety
/// The machine has AVX-512F; dst has a row for each of a, b `LANES` rows.
#[target_feature(enable = "avx512f")]
#[inline]
pub unsafe fn column(a: &[Lanes<f32>], (dst, b, wide): (*mut f32, *const f32, usize)) {
    let mut i = 0;
    macro_rules! patches {
        ($($m:literal)*) => {$(
            while a.len() - i >= $m {
                // SAFETY: the caller's, for the rows i..i + M.
                unsafe { patch::<$m>(&a[i..i + $m], (dst.add(i * wide), b, wide)) };
                i += $m;
            }
        )*};
    }
    patches!(16 8 4 2 1);
}

/// # Safety
/// As for `column`, for the M rows of a.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn patch<const M: usize>(a: &[Lanes<f32>], (dst, b, wide): (*mut f32, *const f32, usize)) {
    let a: &[Lanes<f32>; M] = a.try_into().expect("as many rows as the patch");
    // SAFETY: the caller's.
    unsafe {
        let mut sums: [__m512; M] = std::array::from_fn(|i| _mm512_loadu_ps(dst.add(i * wide)));
        for k in 0..LANES {
            let b = _mm512_loadu_ps(b.add(k * wide));
            for i in 0..M {
                sums[i] = _mm512_fmadd_ps(_mm512_set1_ps(a[i].0[k]), b, sums[i]);
            }
        }
        for i in 0..M {
            _mm512_storeu_ps(dst.add(i * wide), sums[i]);
        }
    }
}

/// # Safety
/// The machine has AVX-512F and every n[l] is a row of z.
#[target_feature(enable = "avx512f")]
#[inline]
pub unsafe fn pick(z: *const Lanes<[f32; 2]>, n: &[u32; LANES]) -> [Lanes<f32>; 2] {
    // SAFETY: an element of eight bytes for each lane, LANES of them a row.
    unsafe {
        let at = _mm512_slli_epi32::<4>(_mm512_loadu_si512(n.as_ptr().cast()));
        let at = _mm512_add_epi32(at, _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        let pairs = |at| _mm512_castpd_ps(_mm512_i32gather_pd::<8>(at, z.cast()));
        let (low, high) = (pairs(_mm512_castsi512_si256(at)), pairs(_mm512_extracti64x4_epi64::<1>(at)));
        let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        let odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        std::mem::transmute::<[__m512; 2], [Lanes<f32>; 2]>([
            _mm512_permutex2var_ps(low, even, high),
            _mm512_permutex2var_ps(low, odd, high),
        ])
    }
}

/// Turns sixteen by sixteen numbers, whose rows are so far apart on either side.
///
/// # Safety
/// The machine has AVX-512F; sixteen rows are readable and writable.
#[target_feature(enable = "avx512f")]
#[inline]
pub unsafe fn turn((from, from_stride): (*const f32, usize), (to, to_stride): (*mut f32, usize)) {
    // SAFETY: the caller's.
    unsafe {
        let rows = transposed(std::array::from_fn(|i| _mm512_loadu_si512(from.add(i * from_stride).cast())));
        rows.into_iter().enumerate().for_each(|(i, row)| _mm512_storeu_si512(to.add(i * to_stride).cast(), row));
    }
}

/// # Safety
/// The machine has AVX-512F.
#[target_feature(enable = "avx512f")]
#[inline]
pub unsafe fn put(to: *mut Lanes<[f32; 2]>, first: *const Lanes<f32>, second: *const Lanes<f32>) {
    // SAFETY: sixteen numbers on one side, as many pairs on the other.
    unsafe {
        let (a, b) = (_mm512_loadu_ps(first.cast()), _mm512_loadu_ps(second.cast()));
        let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        let high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        _mm512_storeu_ps(to.cast(), _mm512_permutex2var_ps(a, low, b));
        _mm512_storeu_ps(to.cast::<f32>().add(LANES), _mm512_permutex2var_ps(a, high, b));
    }
}
