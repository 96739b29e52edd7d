//! Elements of four bytes turned in registers (AVX-512), pairs of bf16 made of numbers, and the mask of what a row has left.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

/// The first `count` of sixteen lanes.
pub fn first(count: usize) -> __mmask16 {
    if count < 16 { (1 << count) - 1 } else { !0 }
}

/// Quarters of vectors taken in the order of four lanes.
macro_rules! quarters {
    ($a:expr, $b:expr, $order:literal) => {
        _mm512_shuffle_i32x4::<$order>($a, $b)
    };
}

/// Four by four elements turned in every quarter of four vectors.
#[target_feature(enable = "avx512f")]
#[inline]
pub fn turned_quarters(x: [__m512i; 4]) -> [__m512i; 4] {
    let low = [_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpacklo_epi32(x[2], x[3])];
    let high = [_mm512_unpackhi_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[2], x[3])];
    [
        _mm512_unpacklo_epi64(low[0], low[1]),
        _mm512_unpackhi_epi64(low[0], low[1]),
        _mm512_unpacklo_epi64(high[0], high[1]),
        _mm512_unpackhi_epi64(high[0], high[1]),
    ]
}

/// Sixteen by sixteen elements.
#[target_feature(enable = "avx512f")]
#[inline]
pub fn transposed(x: [__m512i; 16]) -> [__m512i; 16] {
    // Quarter q of y[g][i] is row 4q + i of columns 4g..4g + 4.
    let mut y = [[_mm512_setzero_si512(); 4]; 4];
    for g in 0..4 {
        y[g] = turned_quarters([x[4 * g], x[4 * g + 1], x[4 * g + 2], x[4 * g + 3]]); // `map` would not be compiled for AVX-512
    }
    let mut rows = [_mm512_setzero_si512(); 16];
    for i in 0..4 {
        let (a, b) = (quarters!(y[0][i], y[1][i], 0x88), quarters!(y[2][i], y[3][i], 0x88)); // quarters 0 and 2
        let (c, d) = (quarters!(y[0][i], y[1][i], 0xdd), quarters!(y[2][i], y[3][i], 0xdd)); // quarters 1 and 3
        rows[i] = quarters!(a, b, 0x88);
        rows[8 + i] = quarters!(a, b, 0xdd);
        rows[4 + i] = quarters!(c, d, 0x88);
        rows[12 + i] = quarters!(c, d, 0xdd);
    }
    rows
}

/// Sixteen pairs of neighbours from thirty-two numbers in their order.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
pub fn pairs(first: __m512, second: __m512) -> __m512i {
    // SAFETY: both are 512 bits of numbers.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first)) }
}

/// Sixteen pairs of a number of the first and one of the second.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
pub fn mixed(first: __m512, second: __m512) -> __m512i {
    interleaved(pairs(first, second))
}

/// Word i of the lower half beside word i of the upper half.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
pub fn interleaved(x: __m512i) -> __m512i {
    const ORDER: [u16; 32] = {
        let mut order = [0; 32];
        let mut i = 0;
        while i < 32 {
            order[i] = (i / 2 + i % 2 * 16) as u16;
            i += 1;
        }
        order
    };
    // SAFETY: 512 bits of numbers.
    _mm512_permutexvar_epi16(unsafe { std::mem::transmute::<[u16; 32], __m512i>(ORDER) }, x)
}
