//! silu(a) * u and its way back for a row [a | u] of width 2f, silu(a) = a σ(a): in T, or with rows that are stored as bf16.
#![allow(unsafe_code)]

use crate::Real;
#[cfg(target_arch = "x86_64")]
use crate::isa::{self, Isa};
use crate::kernels::bf16::{Bf16, narrowed, widened};
use crate::kernels::simd::{self, Kernel, LANES, sigmoid, total};

/// hidden = silu(a) * u.
pub fn forward<T: Real>(pre_2f: &[T], hidden_f: &mut [T]) {
    simd::dispatch(Forward { pre_2f, hidden_f });
}

/// The way back of `weight · hidden`. In: pre-activations and the gradient carried to `hidden`. Out: the gradient of the pre-activations, and
/// weight · hidden. Returns the gradient of the weight.
pub fn backward<T: Real>(pre_2f: &mut [T], hidden_f: &mut [T], weight: T) -> T {
    simd::dispatch(Backward { pre_2f, hidden_f, weight })
}

/// `forward`, and both rows rounded. T is f32; `room_f` is for any use.
pub fn forward_rounded<T: Real>(from_2f: &[T], pre_2f: &mut [Bf16], hidden_f: &mut [Bf16], room_f: &mut [T]) {
    assert!(from_2f.len() == 2 * hidden_f.len() && pre_2f.len() == 2 * hidden_f.len(), "rows of another width");
    #[cfg(target_arch = "x86_64")]
    if isa::current() >= Isa::Avx512Bf16 {
        // SAFETY: the machine has the set; the assertion bounds all rows.
        return unsafe { x86::forward(simd::same(from_2f), pre_2f, hidden_f) };
    }
    forward(from_2f, room_f);
    narrowed(from_2f, pre_2f);
    narrowed(room_f, hidden_f);
}

/// `backward` with rounded rows: of the pre-activations before and after, and of weight · hidden. T is f32; `room_2f` is for any use, and `carried_f`
/// may be too, afterwards.
pub fn backward_rounded<T: Real>(
    pre_2f: &mut [Bf16],
    carried_f: &mut [T],
    hidden_f: &mut [Bf16],
    weight: T,
    room_2f: &mut [T],
) -> T {
    assert!(carried_f.len() == hidden_f.len() && pre_2f.len() == 2 * hidden_f.len(), "rows of another width");
    #[cfg(target_arch = "x86_64")]
    if isa::current() >= Isa::Avx512Bf16 {
        let weight: &[f32] = simd::same(std::slice::from_ref(&weight));
        // SAFETY: as in `forward_rounded`.
        let sum = unsafe { x86::backward(pre_2f, simd::same(carried_f), hidden_f, weight[0]) };
        return T::from_f64(sum.into());
    }
    widened(pre_2f, room_2f);
    let sum = backward(room_2f, carried_f, weight);
    narrowed(room_2f, pre_2f);
    narrowed(carried_f, hidden_f);
    sum
}

struct Forward<'s, T> {
    pre_2f: &'s [T],
    hidden_f: &'s mut [T],
}

impl<T: Real> Kernel for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let (a, u) = self.pre_2f.split_at(self.hidden_f.len());
        for ((h, a), u) in self.hidden_f.iter_mut().zip(a).zip(u) {
            *h = *a * sigmoid(*a) * *u;
        }
    }
}

struct Backward<'s, T> {
    pre_2f: &'s mut [T],
    hidden_f: &'s mut [T],
    weight: T,
}

impl<T: Real> Kernel for Backward<'_, T> {
    type Output = T;

    #[inline(always)]
    fn run(self) -> T {
        let (a, u) = self.pre_2f.split_at_mut(self.hidden_f.len());
        // One sum per lane, joined in order: the additions vectorise and keep their order on every machine.
        let mut sums = [T::ZERO; 2 * LANES];
        let back = |sums: &mut [T; 2 * LANES], a: &mut [T], u: &mut [T], h: &mut [T]| {
            for (((sum, a), u), h) in sums.iter_mut().zip(a).zip(u).zip(h) {
                let sigmoid = sigmoid(*a);
                let silu = *a * sigmoid;
                let hidden = silu * *u;
                *sum += hidden * *h;
                let dhidden = self.weight * *h;
                *a = dhidden * *u * sigmoid * (T::ONE + *a - silu);
                *u = dhidden * silu;
                *h = self.weight * hidden;
            }
        };
        let ((a, a_rest), (u, u_rest)) = (a.as_chunks_mut(), u.as_chunks_mut());
        let (h, h_rest) = self.hidden_f.as_chunks_mut();
        for ((a, u), h) in a.iter_mut().zip(u).zip(h) {
            let (a, u, h): (&mut [T; 2 * LANES], &mut [T; 2 * LANES], &mut [T; 2 * LANES]) = (a, u, h);
            back(&mut sums, a, u, h);
        }
        back(&mut sums, a_rest, u_rest, h_rest);
        total(sums)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Bf16;
    use crate::kernels::turn::first;
    use std::arch::x86_64::*;
    use std::mem::transmute;

    const LANES: usize = 16;

    /// # Safety
    /// The machine has AVX512-BF16; `from` and `pre` are twice as long as `hidden`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub unsafe fn forward(from: &[f32], pre: &mut [Bf16], hidden: &mut [Bf16]) {
        let f = hidden.len();
        let (from, pre, hidden) = (from.as_ptr(), pre.as_mut_ptr(), hidden.as_mut_ptr());
        // SAFETY: columns i.. of every half lie inside it, up to the lanes of the mask.
        unsafe {
            for i in (0..f).step_by(LANES) {
                let lanes = first(f - i);
                let (a, u) = (_mm512_maskz_loadu_ps(lanes, from.add(i)), _mm512_maskz_loadu_ps(lanes, from.add(f + i)));
                let h = _mm512_mul_ps(_mm512_mul_ps(a, sigmoid(a)), u);
                store(pre.add(i), a, lanes);
                store(pre.add(f + i), u, lanes);
                store(hidden.add(i), h, lanes);
            }
        }
    }

    /// # Safety
    /// The machine has AVX512-BF16; `pre` is twice as long as `hidden`, which is as long as `carried`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub unsafe fn backward(pre: &mut [Bf16], carried: &[f32], hidden: &mut [Bf16], weight: f32) -> f32 {
        let f = hidden.len();
        let (carried, pre, hidden) = (carried.as_ptr(), pre.as_mut_ptr(), hidden.as_mut_ptr());
        let (one, weight, mut sum) = (_mm512_set1_ps(1.0), _mm512_set1_ps(weight), _mm512_setzero_ps());
        // SAFETY: as in `forward`.
        unsafe {
            for i in (0..f).step_by(LANES) {
                let lanes = first(f - i);
                let (a, u) = (load(pre.add(i), lanes), load(pre.add(f + i), lanes));
                let c = _mm512_maskz_loadu_ps(lanes, carried.add(i));
                let s = sigmoid(a);
                let silu = _mm512_mul_ps(a, s);
                let h = _mm512_mul_ps(silu, u);
                sum = _mm512_fmadd_ps(h, c, sum);
                let d = _mm512_mul_ps(weight, c);
                let slope = _mm512_mul_ps(s, _mm512_sub_ps(_mm512_add_ps(one, a), silu));
                store(pre.add(i), _mm512_mul_ps(_mm512_mul_ps(d, u), slope), lanes);
                store(pre.add(f + i), _mm512_mul_ps(d, silu), lanes);
                store(hidden.add(i), _mm512_mul_ps(weight, h), lanes);
            }
        }
        _mm512_reduce_add_ps(sum)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load(from: *const Bf16, lanes: __mmask16) -> __m512 {
        // SAFETY: the caller's, for the lanes of the mask.
        let x = match lanes {
            u16::MAX => unsafe { _mm256_loadu_si256(from.cast()) },
            _ => unsafe { _mm256_maskz_loadu_epi16(lanes, from.cast()) },
        };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)))
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    #[inline]
    unsafe fn store(to: *mut Bf16, x: __m512, lanes: __mmask16) {
        // SAFETY: 256 bits of bf16; the caller's, for the lanes of the mask.
        unsafe {
            let x = transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x));
            match lanes {
                u16::MAX => _mm256_storeu_si256(to.cast(), x),
                _ => _mm256_mask_storeu_epi16(to.cast(), lanes, x),
            }
        }
    }

    /// 1 / (1 + e⁻ˣ), to some units of the last place of f32: results are rounded to bf16.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn sigmoid(x: __m512) -> __m512 {
        let one = _mm512_set1_ps(1.0);
        let below = _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), x)));
        let y = _mm512_rcp14_ps(below);
        _mm512_fmadd_ps(_mm512_fnmadd_ps(below, y, one), y, y)
    }

    /// eˣ as `simd::exp`, with fused products. What is beyond f32 is held at its ends.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn exp(x: __m512) -> __m512 {
        // The second operand where one is NaN: NaN stays.
        let held = _mm512_max_ps(_mm512_set1_ps(-87.336_54), _mm512_min_ps(_mm512_set1_ps(88.376_26), x));
        let k = _mm512_roundscale_ps::<8>(_mm512_mul_ps(held, _mm512_set1_ps(std::f32::consts::LOG2_E)));
        let r = _mm512_fnmadd_ps(k, _mm512_set1_ps(0.693_359_4), held);
        let r = _mm512_fmadd_ps(k, _mm512_set1_ps(2.121_944_4e-4), r);
        let mut y = _mm512_set1_ps(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
        }
        let y = _mm512_fmadd_ps(_mm512_mul_ps(y, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0)));
        _mm512_scalef_ps(y, k)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::normals;

    fn row(seed: u64, len: usize) -> Vec<f32> {
        normals(seed, len, 3.0).into_iter().map(|x| x as f32).collect()
    }

    fn close(name: &str, rounded: &[Bf16], exact: &[f32]) {
        for (x, y) in rounded.iter().zip(exact) {
            let same = (x.to_f32() - y).abs() <= y.abs() / 240.0 + 1e-35;
            assert!(same || x.to_f32().is_nan() && y.is_nan(), "{name}: {} for {y}", x.to_f32());
        }
    }

    /// Both ways on rounded rows against f32 from the same numbers.
    fn agree(from_2f: &[f32], carried_f: &[f32]) {
        let f = carried_f.len();
        let (mut pre, mut hidden, mut room) =
            (vec![Bf16::default(); 2 * f], vec![Bf16::default(); f], vec![0.0; 2 * f]);
        forward_rounded(from_2f, &mut pre, &mut hidden, &mut room[..f]);
        let mut exact = vec![0.0f32; f];
        forward(from_2f, &mut exact);
        close("pre-activations", &pre, from_2f);
        close("hidden", &hidden, &exact);
        let mut wide: Vec<f32> = pre.iter().map(|x| x.to_f32()).collect();
        let (mut carried, weight) = (carried_f.to_vec(), 0.7);
        let sum = backward_rounded(&mut pre, &mut carried, &mut hidden, weight, &mut room);
        exact.copy_from_slice(carried_f);
        let expected = backward(&mut wide, &mut exact, weight);
        close("gradient", &pre, &wide);
        close("weighted", &hidden, &exact);
        let size: f32 = exact.iter().zip(carried_f).map(|(h, c)| (h * c / weight).abs()).sum();
        assert!((sum - expected).abs() <= 1e-5 * size || sum.is_nan() && expected.is_nan(), "{sum} for {expected}");
    }

    #[test]
    fn rounded_rows_of_any_width_agree_with_those_of_f32() {
        for f in [1, 2, 15, 16, 17, 33, 64, 352] {
            agree(&row(1, 2 * f), &row(2, f));
        }
    }

    #[test]
    fn extreme_numbers_agree_and_nan_stays() {
        for a in [0.0, -0.0, 80.0, -80.0, 1e4, -1e4, 1e30, 1e-30, f32::NAN] {
            for u in [1.0, -2.0, 1e-3] {
                agree(&[a, u], &[0.5]);
            }
        }
    }
}
