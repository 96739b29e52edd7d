//! The loops of attention over tiles: sixteen query rows side by side, one in each lane, keys one after the other. What is a lane's own (maximum,
//! sum, running position) is then a vector, and no loop adds across a vector. Every function is compiled for each instruction set, with fused
//! multiply-add where there is one, and picks its version when called.
#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)] // arrays of lanes side by side

pub mod narrow;
pub mod scattered;
#[cfg(target_arch = "x86_64")]
mod strips;
#[cfg(target_arch = "x86_64")]
mod wide;

use crate::Real;
use crate::isa::{self, Isa};
use crate::kernels::simd::{same, same_mut};
use std::any::TypeId;
use std::hint::black_box;

/// Query rows of a tile.
pub const LANES: usize = 16;

/// Numbers in a piece of a padded row.
pub const PIECE: usize = 8;

/// One number for each row of a tile.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lanes<T>(pub [T; LANES]);

/// A piece of a row that is padded with zeros.
#[repr(C, align(32))]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Piece<T>(pub [T; PIECE]);

impl<T: Copy> Lanes<T> {
    pub const fn all(x: T) -> Self {
        Lanes([x; LANES])
    }
}

impl<T: Copy> Piece<T> {
    pub const fn all(x: T) -> Self {
        Piece([x; PIECE])
    }
}

/// The numbers of rows made of pieces.
pub fn flat<T>(pieces: &[Piece<T>]) -> &[T] {
    assert!(size_of::<Piece<T>>() == PIECE * size_of::<T>());
    // SAFETY: a piece is an array of numbers without padding, by the assertion and repr(C).
    unsafe { std::slice::from_raw_parts(pieces.as_ptr().cast(), pieces.len() * PIECE) }
}

/// The numbers of rows made of pieces.
pub fn flat_mut<T>(pieces: &mut [Piece<T>]) -> &mut [T] {
    assert!(size_of::<Piece<T>>() == PIECE * size_of::<T>());
    // SAFETY: as in `flat`; the borrow is exclusive.
    unsafe { std::slice::from_raw_parts_mut(pieces.as_mut_ptr().cast(), pieces.len() * PIECE) }
}

/// Where a pair of query row and key lies in the CoPE table.
#[derive(Clone, Copy, Debug)]
pub struct Place<T> {
    /// σ(score): how far the key moves the position; 0 where the row does not see it.
    pub gate: Lanes<T>,
    /// Row of the table below the position, and how far above it; (P, 0) once the position is clamped.
    pub below: Lanes<u32>,
    pub fraction: Lanes<T>,
    /// Change of the bias per position; 0 where clamped.
    pub slope: Lanes<T>,
}

impl<T: Real> Place<T> {
    pub const ORIGIN: Self = Place {
        gate: Lanes::all(T::ZERO),
        below: Lanes::all(0),
        fraction: Lanes::all(T::ZERO),
        slope: Lanes::all(T::ZERO),
    };
}

/// What backward knows of a tile's rows: the maximum of the scores, 1 / Σ exp(score - maximum), the gate of the head, and gate · Σ w d for
/// weights w and their upstream gradient d.
#[derive(Clone, Copy, Debug)]
pub struct Rows<T> {
    pub max: Lanes<T>,
    pub inverse: Lanes<T>,
    pub gate: Lanes<T>,
    pub mean: Lanes<T>,
}

/// The left side of a product: number (i, k) lies at i·row + k·col.
#[derive(Clone, Copy, Debug)]
pub struct Left<'a, T> {
    pub data: &'a [T],
    pub row: usize,
    pub col: usize,
}

/// Rows of a product that are summed together: 12 sums, two vectors of b and one broadcast fill the 16 registers of AVX2.
const TALL: usize = 6;

/// a · b + c, in one rounding where the machine can.
trait Fuse {
    /// Whether sixteen f32 fit one register, so that more rows are needed to keep the multipliers busy.
    const WIDE: bool;
    fn fma<T: Real>(a: T, b: T, c: T) -> T;
}

struct Fused<const WIDE: bool>;
struct Split;

impl<const WIDE: bool> Fuse for Fused<WIDE> {
    const WIDE: bool = WIDE;
    #[inline(always)]
    fn fma<T: Real>(a: T, b: T, c: T) -> T {
        a.mul_add(b, c)
    }
}

impl Fuse for Split {
    const WIDE: bool = false;
    #[inline(always)]
    fn fma<T: Real>(a: T, b: T, c: T) -> T {
        a * b + c
    }
}

/// Defines functions generic over T: Real, compiled for each instruction set; F: Fuse inside is the set's multiply-add.
macro_rules! kernels {
    ($($(#[$meta:meta])* pub fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {$(
        $(#[$meta])*
        pub fn $name<T: Real>($($arg: $type),*) {
            #[inline(always)]
            fn body<T: Real, F: Fuse>($($arg: $type),*) $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512<T: Real>($($arg: $type),*) {
                    body::<T, Fused<true>>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2<T: Real>($($arg: $type),*) {
                    body::<T, Fused<false>>($($arg),*)
                }
                if isa::current() >= Isa::Avx512 {
                    // SAFETY: the machine has these parts of AVX-512.
                    return unsafe { avx512($($arg),*) };
                }
                if isa::current() >= Isa::Avx2 {
                    // SAFETY: the machine has AVX2 and FMA.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body::<T, Split>($($arg),*)
        }
    )*};
}

kernels! {
    /// dst [m] = a [m, k] · b [k], or += when `accumulate`; each number is summed over k in order.
    pub fn product(dst: &mut [Lanes<T>], a: Left<'_, T>, b: &[Lanes<T>], accumulate: bool) {
        let (m, depth) = (dst.len(), b.len());
        if m == 0 {
            return;
        }
        assert!(depth == 0 || (m - 1) * a.row + (depth - 1) * a.col < a.data.len(), "product out of bounds");
        #[cfg(target_arch = "x86_64")]
        if F::WIDE && TypeId::of::<T>() == TypeId::of::<f32>() {
            // SAFETY: T is f32, the code around is compiled for AVX-512; the assertion bounds every number of a.
            return unsafe { wide::product(same_mut(dst), (a.data.as_ptr().cast(), a.row, a.col), same(b), accumulate) };
        }
        let strides = (a.row, a.col);
        let mut i = 0;
        // SAFETY: the assertion bounds every (row, column) of a; the strips i..i + M lie inside dst.
        unsafe {
            let at = |i: usize| a.data.as_ptr().wrapping_add(i * a.row);
            while i + TALL <= m {
                strip::<T, F, TALL>(dst.as_mut_ptr().add(i), (at(i), strides), b, accumulate);
                i += TALL;
            }
            let dst = dst.as_mut_ptr().add(i);
            match m - i {
                5 => strip::<T, F, 5>(dst, (at(i), strides), b, accumulate),
                4 => strip::<T, F, 4>(dst, (at(i), strides), b, accumulate),
                3 => strip::<T, F, 3>(dst, (at(i), strides), b, accumulate),
                2 => strip::<T, F, 2>(dst, (at(i), strides), b, accumulate),
                1 => strip::<T, F, 1>(dst, (at(i), strides), b, accumulate),
                _ => {}
            }
        }
    }

    /// dst [m, wide] += a [m, lanes] · b [lanes, wide], rows of `wide` pieces.
    pub fn outer(dst: &mut [Piece<T>], a: &[Lanes<T>], b: &[Piece<T>], wide: usize) {
        let m = a.len();
        assert!(dst.len() == m * wide && b.len() == LANES * wide, "outer product out of bounds");
        #[cfg(target_arch = "x86_64")]
        if F::WIDE && TypeId::of::<T>() == TypeId::of::<f32>() {
            let (dst, a, b) = (same_mut(flat_mut(dst)), same::<_, Lanes<f32>>(a), same(flat(b)));
            // SAFETY: T is f32, the code around is compiled for AVX-512; lanes are an array of numbers; the assertion bounds both sides.
            return unsafe { wide::outer(dst, std::slice::from_raw_parts(a.as_ptr().cast(), a.len()), b, wide * PIECE) };
        }
        // SAFETY: the rows and pieces of every column lie inside dst, a and b, by the loop bounds and the assertion.
        unsafe {
            let (dst, b) = (dst.as_mut_ptr(), b.as_ptr());
            (0..wide).for_each(|j| column::<T, F>(a, (dst.wrapping_add(j), b.wrapping_add(j), wide)));
        }
    }

    /// to [width] = the columns of rows [lanes, wide], the first `width` of each.
    pub fn columns(to: &mut [Lanes<T>], rows: &[Piece<T>], wide: usize) {
        let rows = flat(rows);
        let stride = wide * PIECE;
        assert!(to.len() <= stride && rows.len() == LANES * stride, "columns out of bounds");
        let mut d = 0;
        #[cfg(target_arch = "x86_64")]
        if F::WIDE && TypeId::of::<T>() == TypeId::of::<f32>() {
            while d + LANES <= to.len() {
                // SAFETY: T is f32, the code around is compiled for AVX-512; sixteen numbers of each row and sixteen columns are there.
                unsafe { wide::turn((rows.as_ptr().add(d).cast(), stride), (to.as_mut_ptr().add(d).cast(), LANES)) };
                d += LANES;
            }
        }
        for (d, to) in to.iter_mut().enumerate().skip(d) {
            for l in 0..LANES {
                to.0[l] = rows[l * stride + d];
            }
        }
    }

    /// The way back: the first numbers of rows [lanes, wide] = the columns, each lane times its factor where there are factors.
    pub fn lines(rows: &mut [Piece<T>], columns: &mut [Lanes<T>], factors: Option<&Lanes<T>>, wide: usize) {
        let rows = flat_mut(rows);
        let stride = wide * PIECE;
        assert!(columns.len() <= stride && rows.len() == LANES * stride, "lines out of bounds");
        if let Some(factors) = factors {
            let factors = *factors;
            for column in columns.iter_mut() {
                let column = alone(column);
                for l in 0..LANES {
                    column.0[l] *= factors.0[l];
                }
            }
        }
        let mut d = 0;
        #[cfg(target_arch = "x86_64")]
        if F::WIDE && TypeId::of::<T>() == TypeId::of::<f32>() {
            while d + LANES <= columns.len() {
                // SAFETY: as for `columns`.
                unsafe { wide::turn((columns.as_ptr().add(d).cast(), LANES), (rows.as_mut_ptr().add(d).cast(), stride)) };
                d += LANES;
            }
        }
        for (d, column) in columns.iter().enumerate().skip(d) {
            for l in 0..LANES {
                rows[l * stride + d] = column.0[l];
            }
        }
    }

    /// Each of the rows [lanes, wide] times its factor.
    pub fn scale(rows: &mut [Piece<T>], factors: &Lanes<T>, wide: usize) {
        assert!(rows.len() == LANES * wide, "rows of another tile");
        for (row, factor) in rows.chunks_exact_mut(wide).zip(factors.0) {
            for piece in row {
                for x in &mut piece.0 {
                    *x *= factor;
                }
            }
        }
    }

    /// Sets scores of keys first..first + s.len() to -∞ in every lane that does not see them: it sees from..to.
    pub fn hide(s: &mut [Lanes<T>], first: i32, from: &Lanes<i32>, to: &Lanes<i32>) {
        let (from, to) = (*from, *to);
        for (j, s) in (first..).zip(s) {
            let s = alone(s);
            let mut x = *s;
            for l in 0..LANES {
                x.0[l] = if (from.0[l] <= j) & (j < to.0[l]) { x.0[l] } else { -T::INFINITY };
            }
            *s = x;
        }
    }

    /// Adds a number of its own to each lane.
    pub fn shift(s: &mut [Lanes<T>], by: &Lanes<T>) {
        let by = *by;
        for s in s {
            let s = alone(s);
            let mut x = *s;
            for l in 0..LANES {
                x.0[l] += by.0[l];
            }
            *s = x;
        }
    }

    /// A step of the streaming softmax: scores become exp(score - maximum), where the maximum is that of all scores so far; `sum` and `out`, which
    /// belong to the maximum before, are brought to the new one and the sum takes in the new terms. A block that a lane does not see (all
    /// -∞) changes nothing in it, to the bit.
    pub fn soften(s: &mut [Lanes<T>], max: &mut Lanes<T>, sum: &mut Lanes<T>, out: &mut [Lanes<T>]) {
        let mut top = *max;
        for s in s.iter() {
            let (s, mut t) = (*s, top);
            for l in 0..LANES {
                t.0[l] = if s.0[l] > t.0[l] { s.0[l] } else { t.0[l] };
            }
            top = t;
        }
        let (mut base, mut fade) = (top, *max);
        for l in 0..LANES {
            base.0[l] = if top.0[l] == -T::INFINITY { T::ZERO } else { top.0[l] };
        }
        for l in 0..LANES {
            fade.0[l] = exp::<T, F>(fade.0[l] - base.0[l]);
        }
        let mut total = Lanes::all(T::ZERO);
        for s in s.iter_mut() {
            let s = alone(s);
            let (mut x, mut t) = (*s, total);
            for l in 0..LANES {
                x.0[l] = exp::<T, F>(x.0[l] - base.0[l]);
            }
            for l in 0..LANES {
                t.0[l] += x.0[l];
            }
            (*s, total) = (x, t);
        }
        for l in 0..LANES {
            sum.0[l] = F::fma(sum.0[l], fade.0[l], total.0[l]);
        }
        *max = top;
        for out in out {
            let out = alone(out);
            let mut x = *out;
            for l in 0..LANES {
                x.0[l] *= fade.0[l];
            }
            *out = x;
        }
    }

    /// What the entropy of a streaming softmax needs beside its sum: `turn` is Σ exp(score - maximum) (score - maximum) over all keys so far. `s` are the
    /// scores of a block and `e` what `soften` made of them; (max, sum) is what it found and `top` the maximum it left.
    pub fn disorder(
        s: &[Lanes<T>],
        e: &[Lanes<T>],
        max: &Lanes<T>,
        sum: &Lanes<T>,
        top: &Lanes<T>,
        turn: &mut Lanes<T>,
    ) {
        let mut total = Lanes::all(T::ZERO);
        for (s, e) in s.iter().zip(e) {
            let (s, e, mut t) = (*s, *e, total);
            for l in 0..LANES {
                let term = e.0[l] * (s.0[l] - top.0[l]);
                t.0[l] += if e.0[l] > T::ZERO { term } else { T::ZERO }; // a hidden score is -∞
            }
            total = t;
        }
        for l in 0..LANES {
            let step = max.0[l] - top.0[l];
            let fade = exp::<T, F>(step);
            let moved = fade * F::fma(sum.0[l], step, turn.0[l]);
            turn.0[l] = total.0[l] + if fade > T::ZERO { moved } else { T::ZERO };
        }
    }

    /// Backward of the softmax: scores become weights w, the gradients d of the weights those of the scores, w (gate d - mean). Adds Σ w d, the
    /// gradient of the gate, to `pull`.
    pub fn harden(s: &mut [Lanes<T>], d: &mut [Lanes<T>], rows: &Rows<T>, pull: &mut Lanes<T>) {
        let rows = *rows;
        let mut sum = *pull;
        for (s, d) in s.iter_mut().zip(d) {
            let s = alone(s);
            let (mut w, mut x, mut p) = (*s, *d, sum);
            for l in 0..LANES {
                w.0[l] = exp::<T, F>(w.0[l] - rows.max.0[l]) * rows.inverse.0[l];
            }
            for l in 0..LANES {
                p.0[l] = F::fma(w.0[l], x.0[l], p.0[l]);
            }
            for l in 0..LANES {
                x.0[l] = w.0[l] * F::fma(rows.gate.0[l], x.0[l], -rows.mean.0[l]);
            }
            (*s, *d, sum) = (w, x, p);
        }
        *pull = sum;
    }

    /// Gates and positions of a block of CoPE scores, from the last key, which is the nearest, to the first. `walk` holds where the keys
    /// nearer than the block ended and is moved on. Whole and fractional part are summed apart, so that long sums of small gates stay exact.
    pub fn advance(s: &[Lanes<T>], last: u32, walk: &mut Place<T>, places: &mut [Place<T>]) {
        let (mut below, mut fraction) = (walk.below, walk.fraction);
        for (s, place) in s.iter().zip(places).rev() {
            let mut g = *s;
            for l in 0..LANES {
                g.0[l] = sigmoid::<T, F>(g.0[l]);
            }
            // What the next key waits for is short: positions run on beyond the last row, and only what is noted is clamped.
            let (mut n, mut f) = (below, fraction);
            for l in 0..LANES {
                let whole = f.0[l] + g.0[l];
                let rest = whole - T::ONE;
                n.0[l] += u32::from(rest >= T::ZERO);
                f.0[l] = if rest >= T::ZERO { rest } else { whole };
            }
            (below, fraction) = (n, f);
            for l in 0..LANES {
                f.0[l] = if n.0[l] < last { f.0[l] } else { T::ZERO };
                n.0[l] = if n.0[l] < last { n.0[l] } else { last };
            }
            (place.gate, place.below, place.fraction) = (g, n, f);
        }
        for l in 0..LANES {
            fraction.0[l] = if below.0[l] < last { fraction.0[l] } else { T::ZERO };
            below.0[l] = if below.0[l] < last { below.0[l] } else { last };
        }
        (walk.below, walk.fraction) = (below, fraction);
    }

    /// Adds to the scores the bias of their places, and notes its slope. `z` holds for each row of the table (bias, step to the next row).
    pub fn bias(s: &mut [Lanes<T>], places: &mut [Place<T>], z: &[Lanes<[T; 2]>]) {
        assert!(places.iter().all(|place| within(&place.below, z.len())), "bias out of bounds");
        for (s, place) in s.iter_mut().zip(places) {
            let s = alone(s);
            let mut x = *s;
            // SAFETY: every row was compared with the length.
            let (low, step) = unsafe { pick::<T, F>(z, &place.below) };
            for l in 0..LANES {
                x.0[l] += F::fma(place.fraction.0[l], step.0[l], low.0[l]);
            }
            place.slope = step;
            *s = x;
        }
    }

    /// z = for each row of the table (bias, step to the next row; 0 at the last), as far as z reaches.
    pub fn steps(z: &mut [Lanes<[T; 2]>], rows: &[Lanes<T>]) {
        assert!(z.len() <= rows.len(), "steps out of bounds");
        for (n, z) in z.iter_mut().enumerate() {
            let (low, mut step) = (rows[n], rows[(n + 1).min(rows.len() - 1)]);
            for l in 0..LANES {
                step.0[l] -= low.0[l];
            }
            put::<T, F>(alone(z), &low, &step);
        }
    }

    /// Backward of `steps`: adds to the gradients of the rows.
    pub fn spread(d_rows: &mut [Lanes<T>], dz: &[Lanes<[T; 2]>]) {
        assert!(dz.len() <= d_rows.len(), "spread out of bounds");
        let last = d_rows.len() - 1;
        for n in 0..dz.len() {
            let (pairs, mut low) = (dz[n], d_rows[n]);
            for l in 0..LANES {
                low.0[l] += pairs.0[l][0] - pairs.0[l][1];
            }
            d_rows[n] = low;
            if n < last {
                let mut high = d_rows[n + 1];
                for l in 0..LANES {
                    high.0[l] += pairs.0[l][1];
                }
                d_rows[n + 1] = high;
            }
        }
    }

    /// Backward of `bias` and `advance`, from the farthest key inward, because a gate moves the positions of all keys at or beyond its own:
    /// d holds the gradients of the scores and becomes that of the products. `beyond` is the sum of position gradients so far; `dz` takes
    /// for each row of the table (Σ d, Σ fraction · d).
    pub fn retreat(d: &mut [Lanes<T>], places: &[Place<T>], beyond: &mut Lanes<T>, dz: &mut [Lanes<[T; 2]>]) {
        assert!(places.iter().all(|place| within(&place.below, dz.len())), "retreat out of bounds");
        let mut sum = *beyond;
        for (d, place) in d.iter_mut().zip(places) {
            let (mut x, mut part, mut b) = (*d, *d, sum);
            for l in 0..LANES {
                part.0[l] *= place.fraction.0[l];
            }
            for l in 0..LANES {
                // SAFETY: every row was compared with the length.
                let row = unsafe { &mut dz.get_unchecked_mut(place.below.0[l] as usize).0[l] };
                row[0] += x.0[l];
                row[1] += part.0[l];
            }
            for l in 0..LANES {
                b.0[l] = F::fma(x.0[l], place.slope.0[l], b.0[l]);
            }
            for l in 0..LANES {
                let g = place.gate.0[l];
                x.0[l] = F::fma(b.0[l], F::fma(-g, g, g), x.0[l]);
            }
            (*d, sum) = (x, b);
        }
        *beyond = sum;
    }
}

/// M rows of a product.
///
/// # Safety
/// dst must have M rows, and a (i, k) must lie inside its slice for i < M, k < b.len().
#[inline(always)]
unsafe fn strip<T: Real, F: Fuse, const M: usize>(
    dst: *mut Lanes<T>,
    (a, (row, col)): (*const T, (usize, usize)),
    b: &[Lanes<T>],
    accumulate: bool,
) {
    let mut sum = [[T::ZERO; LANES]; M];
    if accumulate {
        for i in 0..M {
            sum[i] = unsafe { (*dst.add(i)).0 };
        }
    }
    for (k, b) in b.iter().enumerate() {
        for i in 0..M {
            let x = unsafe { *a.add(i * row + k * col) };
            let mut next = sum[i];
            for l in 0..LANES {
                next[l] = F::fma(x, b.0[l], next[l]);
            }
            sum[i] = next;
        }
    }
    for i in 0..M {
        unsafe { (*dst.add(i)).0 = sum[i] };
    }
}

/// All rows of an outer product, one piece wide: dst and b are given by where the column starts and the pieces of a row.
///
/// # Safety
/// As for `patch`, for as many rows as a has.
#[inline(always)]
unsafe fn column<T: Real, F: Fuse>(a: &[Lanes<T>], (dst, b, wide): (*mut Piece<T>, *const Piece<T>, usize)) {
    // SAFETY: the caller's.
    unsafe {
        let at = |i: usize| (dst.wrapping_add(i * wide), a.as_ptr().wrapping_add(i), b, wide);
        let mut i = 0;
        while i + TALL <= a.len() {
            patch::<T, F, TALL>(at(i));
            i += TALL;
        }
        match a.len() - i {
            5 => patch::<T, F, 5>(at(i)),
            4 => patch::<T, F, 4>(at(i)),
            3 => patch::<T, F, 3>(at(i)),
            2 => patch::<T, F, 2>(at(i)),
            1 => patch::<T, F, 1>(at(i)),
            _ => {}
        }
    }
}

/// M rows of an outer product, one piece wide.
///
/// # Safety
/// dst must have M rows `wide` pieces apart, a M numbers, b `LANES` rows `wide` pieces apart.
#[inline(always)]
unsafe fn patch<T: Real, F: Fuse, const M: usize>(
    (dst, a, b, wide): (*mut Piece<T>, *const Lanes<T>, *const Piece<T>, usize),
) {
    let mut sum = [[T::ZERO; PIECE]; M];
    // SAFETY: the caller's.
    unsafe {
        for i in 0..M {
            sum[i] = (*dst.add(i * wide)).0;
        }
        for k in 0..LANES {
            let b = (*b.add(k * wide)).0;
            for i in 0..M {
                let x = (*a.add(i)).0[k];
                let mut next = sum[i];
                for l in 0..PIECE {
                    next[l] = F::fma(x, b[l], next[l]);
                }
                sum[i] = next;
            }
        }
        for i in 0..M {
            (*dst.add(i * wide)).0 = sum[i];
        }
    }
}

/// Keeps a loop over keys from being vectorised across them, which takes whole structures apart: the lanes of one key fill the registers already.
#[inline(always)]
fn alone<T>(x: &mut T) -> &mut T {
    black_box(x)
}

/// Of each lane l the pair in row n[l].
///
/// # Safety
/// Every n[l] is a row of z.
#[inline(always)]
unsafe fn pick<T: Real, F: Fuse>(z: &[Lanes<[T; 2]>], n: &Lanes<u32>) -> (Lanes<T>, Lanes<T>) {
    #[cfg(target_arch = "x86_64")]
    if F::WIDE && TypeId::of::<T>() == TypeId::of::<f32>() {
        // SAFETY: T is f32, the code around is compiled for AVX-512, and the rows are there.
        return unsafe { std::mem::transmute_copy(&wide::pick(z.as_ptr().cast(), &n.0)) };
    }
    let (mut first, mut second) = (Lanes::all(T::ZERO), Lanes::all(T::ZERO));
    for l in 0..LANES {
        // SAFETY: the caller's.
        [first.0[l], second.0[l]] = unsafe { z.get_unchecked(n.0[l] as usize).0[l] };
    }
    (first, second)
}

/// Puts two rows of lanes together as pairs.
#[inline(always)]
fn put<T: Real, F: Fuse>(to: &mut Lanes<[T; 2]>, first: &Lanes<T>, second: &Lanes<T>) {
    #[cfg(target_arch = "x86_64")]
    if F::WIDE && TypeId::of::<T>() == TypeId::of::<f32>() {
        // SAFETY: T is f32 and the code around is compiled for AVX-512.
        return unsafe { wide::put((&raw mut *to).cast(), (&raw const *first).cast(), (&raw const *second).cast()) };
    }
    for l in 0..LANES {
        to.0[l] = [first.0[l], second.0[l]];
    }
}

#[inline(always)]
fn within(n: &Lanes<u32>, rows: usize) -> bool {
    let mut inside = true;
    for l in 0..LANES {
        inside &= (n.0[l] as usize) < rows;
    }
    inside
}

/// eˣ for x ≤ 0. In f32 a polynomial within 2 units in the last place that vectorises (Cephes' expf), 0 below the smallest normal number.
/// NaN stays NaN.
#[inline(always)]
fn exp<T: Real, F: Fuse>(x: T) -> T {
    if TypeId::of::<T>() == TypeId::of::<f32>() {
        // SAFETY: T is f32.
        unsafe { std::mem::transmute_copy(&exp_f32::<F>(std::mem::transmute_copy(&x))) }
    } else {
        x.exp()
    }
}

#[inline(always)]
fn exp_f32<F: Fuse>(x: f32) -> f32 {
    const LOW: f32 = -87.336_54;
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it leaves the nearest integer in the low bits
    let held = if x < LOW { LOW } else { x }; // a comparison, not max: that would turn NaN into a number
    let shifted = F::fma(held, std::f32::consts::LOG2_E, ROUND);
    let k = shifted - ROUND;
    let r = F::fma(k, 2.121_944_4e-4, F::fma(k, -0.693_359_4, held));
    let mut y = 1.987_569_1e-4;
    y = F::fma(y, r, 1.398_199_9e-3);
    y = F::fma(y, r, 8.333_452e-3);
    y = F::fma(y, r, 4.166_579_6e-2);
    y = F::fma(y, r, 1.666_666_5e-1);
    y = F::fma(y, r, 0.5);
    y = F::fma(y * r, r, r) + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < LOW { 0.0 } else { y * power }
}

/// 1 / (1 + e⁻ˣ); exactly 0 at -∞.
#[inline(always)]
fn sigmoid<T: Real, F: Fuse>(x: T) -> T {
    let positive = x >= T::ZERO;
    let e = exp::<T, F>(-x.abs()); // one exponential: of a choice between two the compiler computes both
    (if positive { T::ONE } else { e }) / (T::ONE + e)
}
