//! What an operand is made of: f32, or numbers that were rounded to bf16 before. How vectors of it become elements of a packed operand.

use crate::kernels::bf16::Bf16;
#[cfg(target_arch = "x86_64")]
use crate::kernels::turn::{interleaved, mixed, pairs};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// A number of an operand.
///
/// # Safety
/// Of the unsafe functions: all that they read is there, and the machine has AVX2 (`eight`), AVX-512F (`sixteen`), AVX512-BF16 (`couples`), or that and
/// AVX512-BW (`beside`).
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub trait Number: Copy {
    fn to_f32(self) -> f32;
    /// Eight numbers as f32.
    #[cfg(target_arch = "x86_64")]
    unsafe fn eight(from: *const Self) -> __m256;
    /// The bits of sixteen numbers as f32.
    #[cfg(target_arch = "x86_64")]
    unsafe fn sixteen(from: *const Self) -> __m512i;
    /// Sixteen pairs of neighbours.
    #[cfg(target_arch = "x86_64")]
    unsafe fn couples(from: *const Self) -> __m512i;
    /// Sixteen pairs of a number of one row and the one below it.
    #[cfg(target_arch = "x86_64")]
    unsafe fn beside(row: *const Self, below: *const Self) -> __m512i;
}

impl Number for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn eight(from: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(from) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn sixteen(from: *const f32) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn couples(from: *const f32) -> __m512i {
        unsafe { pairs(_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16))) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn beside(row: *const f32, below: *const f32) -> __m512i {
        unsafe { mixed(_mm512_loadu_ps(row), _mm512_loadu_ps(below)) }
    }
}

impl Number for Bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        Bf16::to_f32(self)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn eight(from: *const Bf16) -> __m256 {
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())))) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn sixteen(from: *const Bf16) -> __m512i {
        unsafe { _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()))) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn couples(from: *const Bf16) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn beside(row: *const Bf16, below: *const Bf16) -> __m512i {
        unsafe {
            let row = _mm512_castsi256_si512(_mm256_loadu_si256(row.cast()));
            interleaved(_mm512_inserti64x4::<1>(row, _mm256_loadu_si256(below.cast())))
        }
    }
}
