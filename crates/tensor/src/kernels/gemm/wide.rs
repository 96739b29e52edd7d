//! What `pack` does most, by vectors of sixteen elements (AVX-512), for panels of 8, 16 or 32 columns. bf16 is rounded by the instruction, which
//! takes denormals as zero, as those that multiply it do.

use super::number::Number;
use super::pack::Element;
use crate::isa::Isa;
use crate::kernels::simd::soon;
use crate::kernels::turn::{transposed, turned_quarters};
use std::arch::x86_64::*;

/// Elements of a vector.
pub const LANES: usize = 16;

/// Whether elements of panels `width` wide can be packed here with an instruction set.
pub fn serves(isa: Isa, element: Element, width: usize) -> bool {
    let least = match element {
        Element::Plain => Isa::Avx512,
        Element::Pair => Isa::Avx512Bf16,
        Element::Rounded => return false, // for sets without the instruction
    };
    isa >= least && matches!(width, 8 | 16 | 32)
}

/// Row e of `rows` becomes element e of every column; a null column gives zeros. `next` are the columns that will be wanted after these.
///
/// # Safety
/// The set serves the element and W. `rows` are a multiple of 16, and a column has all their numbers or is null.
pub unsafe fn turn<S: Number, const W: usize>(
    columns: &[*const S; W],
    next: &[*const S; W],
    element: Element,
    rows: &mut [[u32; W]],
) {
    // SAFETY: the caller's.
    unsafe {
        match element {
            Element::Pair => turn_pairs(columns, next, rows),
            _ => turn_plain(columns, next, rows),
        }
    }
}

/// Numbers p·W.. of row e, or of rows 2e and 2e + 1 for pairs, become element e of panel p; panels are `stride` apart in `to`. `row` says where a row
/// is, also for some rows beyond the last, which are asked for.
///
/// # Safety
/// The set serves the element and W. The rows are readable and the panels writable; panels of 8 are two or more.
pub unsafe fn copy<S: Number, const W: usize>(
    row: impl Fn(usize) -> *const S,
    element: Element,
    (to, stride): (*mut u32, usize),
    (rows, panels): (usize, usize),
) {
    // SAFETY: the caller's.
    unsafe {
        match element {
            Element::Pair => copy_pairs::<S, W>(row, (to, stride), (rows, panels)),
            _ => copy_plain::<S, W>(row, (to, stride), (rows, panels)),
        }
    }
}

/// The pairs of numbers that lie side by side.
///
/// # Safety
/// The machine has AVX512-BF16. `to` is a multiple of 16, and the numbers of all its pairs are readable.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub unsafe fn lay<S: Number>(from: *const S, to: &mut [u32]) {
    for (i, to) in to.chunks_exact_mut(LANES).enumerate() {
        // SAFETY: the caller's: thirty-two numbers each.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), S::couples(from.add(2 * i * LANES))) }
    }
}

#[target_feature(enable = "avx512f")]
unsafe fn turn_plain<S: Number, const W: usize>(columns: &[*const S; W], next: &[*const S; W], rows: &mut [[u32; W]]) {
    // SAFETY: the caller's: sixteen numbers of each block.
    unsafe { blocks(columns, next, rows, 1, |from| S::sixteen(from)) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn turn_pairs<S: Number, const W: usize>(columns: &[*const S; W], next: &[*const S; W], rows: &mut [[u32; W]]) {
    // SAFETY: the caller's: thirty-two numbers of each block.
    unsafe { blocks(columns, next, rows, 2, |from| S::couples(from)) }
}

/// `load` makes sixteen elements of one column of the numbers at its place, `numbers` each.
///
/// # Safety
/// As for `turn`; `load` reads what a block has.
#[inline(always)]
unsafe fn blocks<S: Number, const W: usize>(
    columns: &[*const S; W],
    next: &[*const S; W],
    rows: &mut [[u32; W]],
    numbers: usize,
    load: impl Fn(*const S) -> __m512i,
) {
    for (b, rows) in rows.chunks_exact_mut(LANES).enumerate() {
        let to = rows.as_mut_ptr().cast::<u32>();
        let column = |c: usize| match columns[c].is_null() {
            true => unsafe { _mm512_setzero_si512() },
            false => {
                let lines = (0..LANES * numbers).step_by(64 / size_of::<S>());
                lines.for_each(|at| soon(next[c], b * LANES * numbers + at));
                // SAFETY: the column has the numbers of every block.
                load(unsafe { columns[c].add(b * LANES * numbers) })
            }
        };
        // SAFETY: sixteen rows of W elements; the set is there.
        unsafe {
            if W == 8 {
                turn_eight(std::array::from_fn(column), to);
            } else {
                for first in (0..W).step_by(LANES) {
                    let x = transposed(std::array::from_fn(|c| column(first + c)));
                    for (i, x) in x.into_iter().enumerate() {
                        _mm512_storeu_si512(to.add(i * W + first).cast(), x);
                    }
                }
            }
        }
    }
}

/// Sixteen elements of eight columns as rows of eight.
///
/// # Safety
/// The machine has AVX-512F, and `to` room for sixteen rows.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn turn_eight(x: [__m512i; 8], to: *mut u32) {
    let (low, high) = (turned_quarters([x[0], x[1], x[2], x[3]]), turned_quarters([x[4], x[5], x[6], x[7]]));
    // Two rows side by side: quarters 0 and 1, or 2 and 3, of both halves of a row.
    let near = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    let far = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for i in 0..4 {
        for (first, order) in [(i, near), (8 + i, far)] {
            let both = _mm512_permutex2var_epi64(low[i], order, high[i]);
            // SAFETY: rows `first` and `first` + 4 of sixteen.
            unsafe {
                _mm256_storeu_si256(to.add(first * 8).cast(), _mm512_castsi512_si256(both));
                _mm256_storeu_si256(to.add((first + 4) * 8).cast(), _mm512_extracti64x4_epi64::<1>(both));
            }
        }
    }
}

#[target_feature(enable = "avx512f")]
unsafe fn copy_plain<S: Number, const W: usize>(
    row: impl Fn(usize) -> *const S,
    to: (*mut u32, usize),
    size: (usize, usize),
) {
    let rows = |e: usize| [row(e), row(e + AHEAD)];
    // SAFETY: the caller's.
    unsafe {
        vectors::<S, W, 2>(to, size, rows, |[row, ahead], at| {
            soon(ahead, at);
            S::sixteen(row.add(at))
        })
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn copy_pairs<S: Number, const W: usize>(
    row: impl Fn(usize) -> *const S,
    to: (*mut u32, usize),
    size: (usize, usize),
) {
    let rows = |e: usize| [row(2 * e), row(2 * e + 1), row(2 * e + AHEAD), row(2 * e + 1 + AHEAD)];
    // SAFETY: the caller's.
    unsafe {
        vectors::<S, W, 4>(to, size, rows, |[row, below, ahead, beyond], at| {
            soon(ahead, at);
            soon(beyond, at);
            S::beside(row.add(at), below.add(at))
        })
    }
}

/// Rows that are asked for before they are needed: each lies in a page of its own, where the machine does not look ahead by itself.
const AHEAD: usize = 16;

/// Stores vectors of elements where their panels lie.
///
/// # Safety
/// As for `copy`; `load(lines(e), c)` makes element e of sixteen columns from c on.
#[inline(always)]
unsafe fn vectors<S, const W: usize, const L: usize>(
    (to, stride): (*mut u32, usize),
    (rows, panels): (usize, usize),
    lines: impl Fn(usize) -> [*const S; L],
    load: impl Fn([*const S; L], usize) -> __m512i,
) {
    for e in 0..rows {
        let lines = lines(e);
        let load = |at: usize| load(lines, at);
        // SAFETY: the caller's.
        unsafe {
            let to = to.add(e * W);
            if W == 8 {
                for p in (0..panels / 2 * 2).step_by(2) {
                    let x = load(p * W);
                    _mm256_storeu_si256(to.add(p * stride).cast(), _mm512_castsi512_si256(x));
                    _mm256_storeu_si256(to.add((p + 1) * stride).cast(), _mm512_extracti64x4_epi64::<1>(x));
                }
                if panels % 2 == 1 {
                    let x = load((panels - 2) * W); // with the one before it, which is there
                    _mm256_storeu_si256(to.add((panels - 1) * stride).cast(), _mm512_extracti64x4_epi64::<1>(x));
                }
            } else {
                for p in 0..panels {
                    for c in (0..W).step_by(LANES) {
                        _mm512_storeu_si512(to.add(p * stride + c).cast(), load(p * W + c));
                    }
                }
            }
        }
    }
}
