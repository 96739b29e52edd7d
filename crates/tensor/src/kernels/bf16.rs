//! bf16 as bits: alone in the upper half of four bytes, two side by side, or as numbers of two bytes.
#![allow(unsafe_code)]

use crate::Real;
#[cfg(target_arch = "x86_64")]
use crate::isa::{self, Isa};
use crate::kernels::simd::{self, Kernel};

/// The bits of the nearest bf16 in the upper half, ties to even; NaN stays NaN.
#[inline(always)]
pub fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let nan = if x.is_nan() { u32::MAX } else { 0 }; // masks, not branches: this is vectorised
    (rounded & !nan | (bits | 0x0040_0000) & nan) & 0xffff_0000
}

/// Two numbers as bf16, the first in the lower half.
#[inline(always)]
pub fn pair(first: f32, second: f32) -> u32 {
    round(first) >> 16 | round(second)
}

/// The two numbers of a pair.
#[inline(always)]
pub fn apart(pair: u32) -> [f32; 2] {
    [f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000)]
}

/// A number rounded to bf16 as it lies in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Bf16(u16);

impl Bf16 {
    #[inline(always)]
    pub fn new(x: f32) -> Self {
        Bf16((round(x) >> 16) as u16)
    }

    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
}

/// The memory of numbers as that of numbers of bf16.
pub fn halves_mut<T: Real>(x: &mut [T]) -> &mut [Bf16] {
    // SAFETY: T is f32 or f64 (`Real` is closed), whose memory is any bits and aligned to more than two bytes; the borrow is exclusive.
    unsafe { std::slice::from_raw_parts_mut(x.as_mut_ptr().cast(), size_of_val(x) / size_of::<Bf16>()) }
}

/// Rounds a row of T, which is f32. By AVX512-BF16 where it is there, which takes denormals as zero, as its products do.
pub fn narrowed<T: Real>(from: &[T], to: &mut [Bf16]) {
    assert_eq!(from.len(), to.len());
    let from: &[f32] = simd::same(from);
    #[cfg(target_arch = "x86_64")]
    if isa::current() >= Isa::Avx512Bf16 {
        // SAFETY: the machine has it; both rows are of one length.
        return unsafe { x86::narrowed(from, to) };
    }
    simd::dispatch(Narrow { from, to });
}

struct Narrow<'s> {
    from: &'s [f32],
    to: &'s mut [Bf16],
}

impl Kernel for Narrow<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.to.iter_mut().zip(self.from).for_each(|(to, x)| *to = Bf16::new(*x));
    }
}

/// A row of bf16 as numbers of T, which is f32.
pub fn widened<T: Real>(from: &[Bf16], to: &mut [T]) {
    assert_eq!(from.len(), to.len());
    simd::dispatch(Widen { from, to: simd::same_mut(to) });
}

struct Widen<'s> {
    from: &'s [Bf16],
    to: &'s mut [f32],
}

impl Kernel for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.to.iter_mut().zip(self.from).for_each(|(to, x)| *to = x.to_f32());
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Bf16;
    use std::arch::x86_64::*;
    use std::mem::transmute;

    /// # Safety
    /// The machine has AVX512-BF16; `to` is as long as `from`.
    #[target_feature(enable = "avx512f,avx512bf16,avx512vl,avx512bw")]
    pub unsafe fn narrowed(from: &[f32], to: &mut [Bf16]) {
        let (lanes, rest) = from.as_chunks::<16>();
        let (to, to_rest) = to.as_chunks_mut::<16>();
        // SAFETY: sixteen numbers on both sides, the rest by a mask of its length.
        unsafe {
            for (x, to) in lanes.iter().zip(to) {
                let x = transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(x.as_ptr())));
                _mm256_storeu_si256(to.as_mut_ptr().cast(), x);
            }
            let mask = (1 << rest.len()) - 1;
            let x = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, rest.as_ptr()));
            _mm256_mask_storeu_epi16(to_rest.as_mut_ptr().cast(), mask, transmute::<__m256bh, __m256i>(x));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_comes_back_rounded_to_the_nearest_and_nan_stays_nan() {
        let mut row = vec![1.0f32, -3.3, 1e30, f32::NAN, 0.0, -0.0, f32::INFINITY, 0.1, 1e-30, f32::MAX, f32::MIN];
        row.extend((0..40).map(|i| 1.0 + i as f32 / 512.0)); // ties among them
        for len in 0..row.len() {
            let (mut narrow, mut wide) = (vec![Bf16::default(); len], vec![0.0f32; len]);
            narrowed(&row[..len], &mut narrow);
            widened(&narrow, &mut wide);
            for (x, y) in row.iter().zip(wide) {
                assert!(y.to_bits() == round(*x) || x.is_nan() && y.is_nan(), "{x} {y}");
            }
        }
    }

    #[test]
    fn memory_of_numbers_holds_twice_as_many() {
        let mut room = [0.0f32; 3];
        halves_mut(&mut room).iter_mut().enumerate().for_each(|(i, x)| *x = Bf16::new(i as f32));
        assert_eq!(halves_mut(&mut room).len(), 6);
        assert_eq!(halves_mut(&mut room)[5].to_f32(), 5.0);
        assert_eq!(halves_mut(&mut [0.0f64; 2]).len(), 8);
    }
}
