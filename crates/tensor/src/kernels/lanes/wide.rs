//! What attention's loops do by AVX-512 in ways of its own, for f32: products, pairs picked and put, rows turned.

use super::{LANES, Lanes};
use crate::kernels::turn::transposed;
use std::arch::x86_64::*;

type Vector = __m512;

#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn load(mask: __mmask16, from: *const f32) -> Vector {
    // SAFETY: the caller's, for the numbers of the mask.
    unsafe { _mm512_maskz_loadu_ps(mask, from) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn step(sum: __m512, x: f32, y: Vector) -> __m512 {
    _mm512_fmadd_ps(_mm512_set1_ps(x), y, sum)
}

super::strips::products!("avx512f", f32, LANES);

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
