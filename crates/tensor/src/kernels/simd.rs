//! Small vector loops for ops that work on rows and tiles: exponential, sigmoid, sums in lanes, products of small padded matrices. Written so
//! that the compiler vectorises them; compiled again for AVX2 and for AVX-512 and chosen at run time. All give the same bits: no loop
//! contracts a product and a sum, and every sum has its order written out.
#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)] // arrays of lanes side by side

use crate::Real;
use crate::isa::{self, Isa};
use std::any::TypeId;

/// Numbers a padded row is a multiple of.
pub const LANES: usize = 8;

/// Rows a product of small matrices computes at once; its left rows are padded to a multiple of it.
pub const ROWS: usize = 4;

/// A piece of work to be compiled for several instruction sets. `run` and all it calls must be `#[inline(always)]`.
pub trait Kernel {
    type Output;
    fn run(self) -> Self::Output;
}

/// Runs `kernel` with the best instruction set of this machine.
pub fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if isa::current() >= Isa::Avx512 {
            // SAFETY: the machine has these parts of AVX-512.
            return unsafe { run_avx512(kernel) };
        }
        if isa::current() >= Isa::Avx2 {
            // SAFETY: the machine has AVX2.
            return unsafe { run_avx2(kernel) };
        }
    }
    kernel.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

/// `len` up to the next multiple of `LANES`.
#[inline(always)]
pub const fn padded(len: usize) -> usize {
    len.next_multiple_of(LANES)
}

/// eˣ. In f32 a polynomial within 2 units in the last place that vectorises (Cephes' expf): 0 below the smallest normal number, held at the
/// largest finite power above. NaN stays NaN.
#[inline(always)]
pub fn exp<T: Real>(x: T) -> T {
    if TypeId::of::<T>() == TypeId::of::<f32>() {
        // SAFETY: T is f32.
        unsafe { std::mem::transmute_copy(&exp_f32(std::mem::transmute_copy(&x))) }
    } else {
        x.exp()
    }
}

#[inline(always)]
fn exp_f32(x: f32) -> f32 {
    const LOW: f32 = -87.336_54;
    const HIGH: f32 = 88.376_26;
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it leaves the nearest integer in the low bits
    // Comparisons, not min and max: those would turn NaN into a number.
    let held = if x > HIGH { HIGH } else { x };
    let held = if held < LOW { LOW } else { held };
    let shifted = held * std::f32::consts::LOG2_E + ROUND;
    let k = shifted - ROUND;
    let r = held - k * 0.693_359_4 + k * 2.121_944_4e-4;
    let mut y = 1.987_569_1e-4;
    y = y * r + 1.398_199_9e-3;
    y = y * r + 8.333_452e-3;
    y = y * r + 4.166_579_6e-2;
    y = y * r + 1.666_666_5e-1;
    y = y * r + 0.5;
    y = y * r * r + r + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < LOW { 0.0 } else { y * power }
}

/// 1 / (1 + e⁻ˣ).
#[inline(always)]
pub fn sigmoid<T: Real>(x: T) -> T {
    T::ONE / (T::ONE + exp(-x))
}

/// x as f64.
#[inline(always)]
pub fn widen<T: Real>(x: T) -> f64 {
    if TypeId::of::<T>() == TypeId::of::<f32>() {
        // SAFETY: T is f32.
        f64::from(unsafe { std::mem::transmute_copy::<T, f32>(&x) })
    } else {
        x.to_f64()
    }
}

/// x rounded to T.
#[inline(always)]
pub fn narrow<T: Real>(x: f64) -> T {
    if TypeId::of::<T>() == TypeId::of::<f32>() {
        // SAFETY: T is f32.
        unsafe { std::mem::transmute_copy(&(x as f32)) }
    } else {
        T::from_f64(x)
    }
}

/// Running sums joined, halves onto halves; N is 16 or 32.
#[inline(always)]
pub fn total<T: Real, const N: usize>(sums: [T; N]) -> T {
    const { assert!(N == 16 || N == 32) }
    // Every step an array of its own, which the compiler keeps in a register.
    let mut first = [T::ZERO; 16];
    for i in 0..16 {
        first[i] = if N > 16 { sums[i] + sums[i + N - 16] } else { sums[i] };
    }
    let mut second = [T::ZERO; 8];
    for i in 0..8 {
        second[i] = first[i] + first[i + 8];
    }
    let mut third = [T::ZERO; 4];
    for i in 0..4 {
        third[i] = second[i] + second[i + 4];
    }
    (third[0] + third[2]) + (third[1] + third[3])
}

/// The numbers behind the last whole chunk of a row as one, filled up with zeros: sums over chunks then stay in registers.
#[inline(always)]
pub fn filled<T: Real, const N: usize>(rest: &[T]) -> [T; N] {
    let mut chunk = [T::ZERO; N];
    chunk[..rest.len()].copy_from_slice(rest);
    chunk
}

/// Asks for the cache line of number `at` behind `from`, which may not be there.
#[inline(always)]
pub fn soon<S>(from: *const S, at: usize) {
    // SAFETY: asking reads nothing and cannot fail, wherever it points.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(from.wrapping_add(at).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (from, at);
}

/// The same for a row of numbers.
#[inline(always)]
pub fn soon_all<S>(from: *const S, at: usize, numbers: usize) {
    (0..numbers).step_by(64 / size_of::<S>()).for_each(|i| soon(from, at + i));
}

/// Numbers of T, which is U, as what they are.
pub fn same<T: 'static, U: 'static>(x: &[T]) -> &[U] {
    assert!(TypeId::of::<T>() == TypeId::of::<U>());
    // SAFETY: T is U.
    unsafe { std::slice::from_raw_parts(x.as_ptr().cast(), x.len()) }
}

pub fn same_mut<T: 'static, U: 'static>(x: &mut [T]) -> &mut [U] {
    assert!(TypeId::of::<T>() == TypeId::of::<U>());
    // SAFETY: T is U; the borrow is exclusive.
    unsafe { std::slice::from_raw_parts_mut(x.as_mut_ptr().cast(), x.len()) }
}

/// The left side of a small product: number (i, k) lies at i·row + k·col.
#[derive(Clone, Copy)]
pub struct Left<'a, T> {
    pub data: &'a [T],
    pub row: usize,
    pub col: usize,
}

/// dst [m, n] (rows `stride` apart) = a [m, depth] · b [depth, n] (rows `b_stride` apart), or += when `accumulate`; summed over the depth in order.
/// m is a multiple of `ROWS` and n of `LANES`: the buffers are padded.
pub fn product<T: Real>(
    dst: &mut [T],
    stride: usize,
    shape: (usize, usize, usize),
    a: Left<'_, T>,
    b: (&[T], usize),
    accumulate: bool,
) {
    dispatch(Product { dst, stride, shape, a, b, accumulate });
}

struct Product<'a, T> {
    dst: &'a mut [T],
    stride: usize,
    shape: (usize, usize, usize),
    a: Left<'a, T>,
    b: (&'a [T], usize),
    accumulate: bool,
}

impl<T: Real> Kernel for Product<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        let ((m, depth, n), a, (b, b_stride)) = (self.shape, self.a, self.b);
        if m == 0 || n == 0 {
            return;
        }
        assert!(m.is_multiple_of(ROWS) && n.is_multiple_of(LANES) && (m - 1) * self.stride + n <= self.dst.len());
        assert!(depth == 0 || (m - 1) * a.row + (depth - 1) * a.col < a.data.len());
        assert!(depth == 0 || (depth - 1) * b_stride + n <= b.len());
        let mut j = 0;
        // SAFETY: the assertions above bound every (row, column) that the tiles i..i + R, j..j + C·LANES touch, for i + R ≤ m, j + C·LANES ≤ n.
        unsafe {
            while j + 2 * LANES <= n {
                let mut i = 0; // not an iterator: its adapters would be compiled apart, without AVX2
                while i < m {
                    self.tile::<ROWS, 2>(i, j);
                    i += ROWS;
                }
                j += 2 * LANES;
            }
            if j < n {
                let mut i = 0;
                while i + 2 * ROWS <= m {
                    self.tile::<{ 2 * ROWS }, 1>(i, j);
                    i += 2 * ROWS;
                }
                if i < m {
                    self.tile::<ROWS, 1>(i, j);
                }
            }
        }
    }
}

impl<T: Real> Product<'_, T> {
    /// # Safety
    /// Rows i..i + R and columns j..j + C·LANES must lie inside dst, a and b for their strides and the depth.
    #[inline(always)]
    unsafe fn tile<const R: usize, const C: usize>(&mut self, i: usize, j: usize) {
        let (a, (b, b_stride)) = (self.a, self.b);
        let mut sum = [[[T::ZERO; LANES]; R]; C];
        for k in 0..self.shape.1 {
            for (c, sum) in sum.iter_mut().enumerate() {
                let b: [T; LANES] = unsafe { *b.as_ptr().add(k * b_stride + j + c * LANES).cast() };
                for (r, sum) in sum.iter_mut().enumerate() {
                    let x = unsafe { *a.data.get_unchecked((i + r) * a.row + k * a.col) };
                    let mut next = *sum;
                    for l in 0..LANES {
                        next[l] += x * b[l];
                    }
                    *sum = next;
                }
            }
        }
        for (c, sum) in sum.iter().enumerate() {
            for (r, sum) in sum.iter().enumerate() {
                let at = (i + r) * self.stride + j + c * LANES;
                let d = unsafe { &mut *self.dst.as_mut_ptr().add(at).cast::<[T; LANES]>() };
                for l in 0..LANES {
                    d[l] = if self.accumulate { d[l] + sum[l] } else { sum[l] };
                }
            }
        }
    }
}

/// The largest whole number up to x, for 0 ≤ x < 2³¹; any number for other x. Without a conversion, so that it vectorises on every machine.
#[inline(always)]
pub fn floor(x: f64) -> f64 {
    let nearest = (x + ROUND) - ROUND;
    if nearest > x { nearest - 1.0 } else { nearest }
}

/// A whole number 0 ≤ x < 2³¹ as an index.
#[inline(always)]
pub fn index(x: f64) -> u32 {
    (x + ROUND).to_bits() as u32
}

/// 2⁵²: adding it leaves the nearest whole number in the low bits.
const ROUND: f64 = 4_503_599_627_370_496.0;

/// Whether rows n[l] and n[l] + 1 exist in every lane.
#[inline(always)]
fn within(n: &[u32; LANES], rows: usize) -> bool {
    let mut inside = true;
    for n in n {
        inside &= (*n as usize) < rows.saturating_sub(1);
    }
    inside
}

/// For each lane l the numbers at rows n[l] and n[l] + 1.
#[inline(always)]
pub fn gather<T: Real>(from: &[[T; LANES]], n: &[u32; LANES]) -> ([T; LANES], [T; LANES]) {
    assert!(within(n, from.len()), "gather out of bounds");
    let (mut low, mut high) = ([T::ZERO; LANES], [T::ZERO; LANES]);
    for l in 0..LANES {
        // SAFETY: every row was compared with the length.
        unsafe {
            low[l] = from.get_unchecked(n[l] as usize)[l];
            high[l] = from.get_unchecked(n[l] as usize + 1)[l];
        }
    }
    (low, high)
}

/// Adds for each lane l low[l] to row n[l] and high[l] to row n[l] + 1.
#[inline(always)]
pub fn scatter<T: Real>(to: &mut [[T; LANES]], n: &[u32; LANES], low: &[T; LANES], high: &[T; LANES]) {
    assert!(within(n, to.len()), "scatter out of bounds");
    for l in 0..LANES {
        // SAFETY: every row was compared with the length.
        unsafe {
            to.get_unchecked_mut(n[l] as usize)[l] += low[l];
            to.get_unchecked_mut(n[l] as usize + 1)[l] += high[l];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_accurate_and_safe_at_the_ends() {
        for i in -870_000..=880_000 {
            let x = i as f32 * 1e-4;
            let expected = f64::from(x).exp();
            assert!(((f64::from(exp(x)) - expected) / expected).abs() < 2.0 * f64::from(f32::EPSILON), "{x}");
        }
        assert_eq!(exp(0.0f32), 1.0);
        assert_eq!((exp(-1e4f32), exp(f32::NEG_INFINITY)), (0.0, 0.0));
        assert!(exp(1e4f32).is_finite() && exp(f32::NAN).is_nan());
        assert_eq!((sigmoid(-1e4f32), sigmoid(1e4f32), sigmoid(0.0f32)), (sigmoid(-90.0f32), 1.0, 0.5));
        assert_eq!(exp(1.25f64), 1.25f64.exp());
    }

    struct Products<'a>(&'a [f32], &'a [f32]);

    impl Kernel for Products<'_> {
        type Output = Vec<u32>;
        #[inline(always)]
        fn run(self) -> Vec<u32> {
            let mut dst = vec![0.5f32; 8 * 40];
            let left = Left { data: self.0, row: 7, col: 1 };
            product(&mut dst, 40, (8, 7, 40), left, (self.1, 40), true);
            dst.extend(self.1.iter().map(|x| sigmoid(*x)));
            dst.iter().map(|x| x.to_bits()).collect()
        }
    }

    #[test]
    fn whole_numbers_below_are_exact() {
        for whole in [0u32, 1, 2, 63, 64, 4095, 2_147_483_646] {
            let x = f64::from(whole);
            for x in [x, x + 0.25, x + 0.5, x + 0.75, (x + 1.0).next_down()] {
                assert_eq!((floor(x), index(floor(x))), (f64::from(whole), whole), "{x}");
            }
        }
    }

    #[test]
    fn gather_and_scatter_touch_a_row_and_the_next_in_each_lane() {
        let rows: Vec<[f64; LANES]> = (0..4).map(|n| std::array::from_fn(|l| (10 * n + l) as f64)).collect();
        let n = [0, 2, 1, 0, 2, 2, 1, 0];
        let (low, high) = gather(&rows, &n);
        assert_eq!((low[1], high[1], low[3], high[6]), (21.0, 31.0, 3.0, 26.0));
        let mut sums = vec![[0.0; LANES]; 4];
        scatter(&mut sums, &n, &[1.0; LANES], &[2.0; LANES]);
        assert_eq!(
            [sums[0][1], sums[1][1], sums[2][1], sums[3][1], sums[0][0], sums[1][0]],
            [0.0, 0.0, 1.0, 2.0, 1.0, 2.0]
        );
        assert!(std::panic::catch_unwind(|| gather(&rows, &[3; LANES])).is_err());
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits_and_the_right_product() {
        let fill = |seed, len| crate::check::normals(seed, len, 1.0).iter().map(|x| *x as f32).collect::<Vec<_>>();
        let (a, b) = (fill(1, 56), fill(2, 280));
        let found = dispatch(Products(&a, &b));
        assert_eq!(found, Products(&a, &b).run());
        for x in 0..8 * 40 {
            let expected: f32 = (0..7).map(|k| a[x / 40 * 7 + k] * b[k * 40 + x % 40]).sum::<f32>() + 0.5;
            assert!((f32::from_bits(found[x]) - expected).abs() < 1e-5);
        }
    }
}
