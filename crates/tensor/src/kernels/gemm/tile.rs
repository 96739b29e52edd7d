//! The inner tiles: R rows by C vectors of dst, all of k in registers. The code is one; an instruction set adds its vector and nothing else. A
//! 4-byte element of the operands is an f32, or a pair of bf16 along k.

#[cfg(target_arch = "x86_64")]
use super::amx;
use crate::isa::Isa;

/// What a tile multiplies: `k` elements of R rows of `a` (element (r, l) at r·a_row + l·a_k, one of these being 1) and of NR columns of `b` (row l at l·b_k), into dst
/// (rows `stride` apart), or added to it.
#[derive(Clone, Copy)]
pub struct Strip {
    pub k: usize,
    pub a: *const f32,
    pub a_row: usize,
    pub a_k: usize,
    pub b: *const f32,
    pub b_k: usize,
    pub dst: *mut f32,
    pub stride: usize,
    pub add: bool,
}

/// How an instruction set multiplies.
#[derive(Clone, Copy)]
pub struct Tile {
    /// Rows and columns of a tile.
    pub rows: usize,
    pub cols: usize,
    /// Elements are pairs of bf16, else f32.
    pub pairs: bool,
    /// Elements of k must come in multiples of it, and rows of `a` with their elements side by side.
    pub unit: usize,
    /// # Safety
    /// The instruction set is there, every element that `Strip` names is readable, dst is writable, and no other thread touches it.
    pub run: unsafe fn(Strip),
    /// The same for the first half of the columns, where there is one: of a side as narrow as a router's little else is used.
    pub half: Option<unsafe fn(Strip)>,
    /// Before the first and after the last tile of a thread.
    pub enter: fn(),
    pub leave: fn(),
}

/// A vector of f32 sums.
trait Lanes {
    const N: usize;
    type V: Copy;
    unsafe fn zero() -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn splat(from: *const f32) -> Self::V;
    /// sum + a · b, element by element.
    unsafe fn fma(a: Self::V, b: Self::V, sum: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
}

/// # Safety
/// As `Tile::run` says for R rows and C·N columns.
#[inline(always)]
unsafe fn tile<L: Lanes, const R: usize, const C: usize>(s: Strip) {
    // Two loops, so that no address hangs on a sum over the rows: as many additions in a row cost as much as the products.
    unsafe {
        if s.a_row == 1 {
            strip::<L, R, C>(s, |r, l| s.a.add(l * s.a_k + r));
        } else {
            debug_assert!(s.a_k == 1);
            let rows: [*const f32; R] = std::array::from_fn(|r| s.a.add(r * s.a_row));
            strip::<L, R, C>(s, |r, l| rows[r].add(l));
        }
    }
}

/// # Safety
/// As for `tile`; `left` says where element (r, l) of the left side is.
#[inline(always)]
unsafe fn strip<L: Lanes, const R: usize, const C: usize>(s: Strip, left: impl Fn(usize, usize) -> *const f32) {
    unsafe {
        let mut sums = [[L::zero(); C]; R];
        let mut b = s.b;
        for l in 0..s.k {
            let mut right = [L::zero(); C];
            for c in 0..C {
                right[c] = L::load(b.add(c * L::N));
            }
            for r in 0..R {
                let left = L::splat(left(r, l));
                for c in 0..C {
                    sums[r][c] = L::fma(left, right[c], sums[r][c]);
                }
            }
            b = b.add(s.b_k);
        }
        for r in 0..R {
            for c in 0..C {
                let to = s.dst.add(r * s.stride + c * L::N);
                L::store(to, if s.add { L::add(L::load(to), sums[r][c]) } else { sums[r][c] });
            }
        }
    }
}

/// The tile for f32 elements.
pub fn f32_tile(isa: Isa) -> Tile {
    let plain = Tile { rows: 4, cols: 8, pairs: false, unit: 1, run: portable, half: None, enter: || (), leave: || () };
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => {
            Tile { rows: 8, cols: 32, run: x86::avx512, half: Some(x86::avx512_half), ..plain }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => Tile { rows: 6, cols: 16, run: x86::avx2, half: Some(x86::avx2_half), ..plain },
        _ => plain,
    }
}

/// The tile for bf16 operands: on pairs where there is an instruction for them, else on f32 numbers that were rounded before.
pub fn bf16_tile(isa: Isa) -> Tile {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => amx::TILE,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 => {
            let (run, half) = (x86::avx512_bf16, Some(x86::avx512_bf16_half as unsafe fn(Strip)));
            Tile { pairs: true, run, half, ..f32_tile(Isa::Avx512) }
        }
        _ => f32_tile(isa),
    }
}

unsafe fn portable(s: Strip) {
    // SAFETY: as for the caller.
    unsafe { tile::<Plain, 4, 1>(s) }
}

struct Plain;

impl Lanes for Plain {
    const N: usize = 8;
    type V = [f32; 8];
    #[inline(always)]
    unsafe fn zero() -> Self::V {
        [0.0; 8]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        unsafe { from.cast::<Self::V>().read() }
    }
    #[inline(always)]
    unsafe fn splat(from: *const f32) -> Self::V {
        [unsafe { *from }; 8]
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, sum: Self::V) -> Self::V {
        std::array::from_fn(|l| a[l] * b[l] + sum[l])
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|l| a[l] + b[l])
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: Self::V) {
        unsafe { to.cast::<Self::V>().write(v) }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Lanes, Strip, tile};
    use std::arch::x86_64::*;
    use std::mem::transmute;

    macro_rules! lanes {
        ($name:ident, $n:literal, $v:ty, $zero:ident, $load:ident, $set:ident, $add:ident, $store:ident, $fma:expr) => {
            struct $name;
            impl Lanes for $name {
                const N: usize = $n;
                type V = $v;
                #[inline(always)]
                unsafe fn zero() -> $v {
                    unsafe { $zero() }
                }
                #[inline(always)]
                unsafe fn load(from: *const f32) -> $v {
                    unsafe { $load(from) }
                }
                #[inline(always)]
                unsafe fn splat(from: *const f32) -> $v {
                    unsafe { $set(*from) }
                }
                #[inline(always)]
                unsafe fn fma(a: $v, b: $v, sum: $v) -> $v {
                    unsafe { $fma(a, b, sum) }
                }
                #[inline(always)]
                unsafe fn add(a: $v, b: $v) -> $v {
                    unsafe { $add(a, b) }
                }
                #[inline(always)]
                unsafe fn store(to: *mut f32, v: $v) {
                    unsafe { $store(to, v) }
                }
            }
        };
    }
    lanes!(
        Avx2,
        8,
        __m256,
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_set1_ps,
        _mm256_add_ps,
        _mm256_storeu_ps,
        |a, b, sum| _mm256_fmadd_ps(a, b, sum)
    );
    lanes!(
        Avx512,
        16,
        __m512,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_set1_ps,
        _mm512_add_ps,
        _mm512_storeu_ps,
        |a, b, sum| _mm512_fmadd_ps(a, b, sum)
    );
    lanes!(
        Avx512Bf16,
        16,
        __m512,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_set1_ps,
        _mm512_add_ps,
        _mm512_storeu_ps,
        |a, b, sum| _mm512_dpbf16_ps(sum, transmute::<__m512, __m512bh>(a), transmute::<__m512, __m512bh>(b))
    );

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2(s: Strip) {
        // SAFETY: as for the caller.
        unsafe { tile::<Avx2, 6, 2>(s) }
    }

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2_half(s: Strip) {
        // SAFETY: as for the caller.
        unsafe { tile::<Avx2, 6, 1>(s) }
    }

    #[target_feature(enable = "avx512f")]
    pub unsafe fn avx512(s: Strip) {
        // SAFETY: as for the caller.
        unsafe { tile::<Avx512, 8, 2>(s) }
    }

    #[target_feature(enable = "avx512f")]
    pub unsafe fn avx512_half(s: Strip) {
        // SAFETY: as for the caller.
        unsafe { tile::<Avx512, 8, 1>(s) }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn avx512_bf16(s: Strip) {
        // SAFETY: as for the caller.
        unsafe { tile::<Avx512Bf16, 8, 2>(s) }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn avx512_bf16_half(s: Strip) {
        // SAFETY: as for the caller.
        unsafe { tile::<Avx512Bf16, 8, 1>(s) }
    }
}
