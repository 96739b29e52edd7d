//! Matrix products on strided views whose bounds are checked here once. f32 (and bf16 operands with f32 sums) run on tiles of our own: `pack` lays
//! operands out (`wide` by AVX-512), `tile` and `amx` multiply, `blocks` cuts a list of products into work. f64, which only checks gradients, runs on the `gemm` crate.
//!
//! Why our own: the `gemm` crate has no bf16 operands with f32 results, no groups, takes another path for one row, and cannot be held to an instruction
//! set; gemmkit returns bf16 and has no groups; NumKong has no strides, transposes or accumulation. `examples/gemm.rs` times ours beside `gemm`.
//!
//! Every number of dst is one chain of multiply-adds over k (in runs of fixed length): its bits depend neither on threads nor on the sizes of the
//! product, so a row alone equals the row in a batch; `grouped_over_rows` adds two such chains where the sizes of all its products make that pay. NaN and infinities pass as arithmetic has them; bf16
//! rounds numbers above its largest to infinity, and its instructions (not the fallback) take denormals as zero.
#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)] // arrays of lanes side by side

#[cfg(target_arch = "x86_64")]
mod amx;
mod blocks;
mod number;
mod pack;
mod packed;
mod tile;
#[cfg(target_arch = "x86_64")]
mod wide;

#[cfg(test)]
mod tests;

#[cfg(target_arch = "x86_64")]
pub(super) use amx::chains as tile_chains;

pub use packed::{Packed, Side, To};

use crate::isa;
use crate::kernels::bf16::Bf16;
use crate::kernels::simd;
use crate::{Precision, Real, kept};
use blocks::{Job, Method};
use gemm::Parallelism;
use pack::{Operand, Source};
use rayon::prelude::*;
use std::any::TypeId;
use std::ops::Range;

#[derive(Clone, Copy)]
enum Numbers<'a, T> {
    Wide(&'a [T]),
    Narrow(&'a [Bf16]),
}

/// A read-only matrix made of lines of a slice, which are its rows, or its columns where it is turned.
#[derive(Clone, Copy)]
pub struct Matrix<'a, T> {
    data: Numbers<'a, T>,
    rows: usize,
    cols: usize,
    /// Numbers from one line of the slice to the next.
    stride: usize,
    turned: bool,
    /// Which line of the slice each line of the matrix is, where they do not lie one after the other.
    order: Option<&'a [u32]>,
}

impl<'a, T: Real> Matrix<'a, T> {
    /// [rows, cols] stored row after row.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Matrix::strided(data, rows, cols, cols)
    }

    /// Rows of `cols` numbers, `row_stride` apart.
    pub fn strided(data: &'a [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        Matrix::checked(Numbers::Wide(data), data.len(), (rows, cols), row_stride)
    }

    /// The same of numbers that were rounded to bf16.
    pub fn narrow(data: &'a [Bf16], rows: usize, cols: usize, row_stride: usize) -> Self {
        Matrix::checked(Numbers::Narrow(data), data.len(), (rows, cols), row_stride)
    }

    fn checked(data: Numbers<'a, T>, len: usize, (rows, cols): (usize, usize), stride: usize) -> Self {
        assert!(rows == 0 || cols == 0 || (rows - 1) * stride + cols <= len, "matrix view out of bounds");
        Matrix { data, rows, cols, stride, turned: false, order: None }
    }

    /// The rows of `cols` numbers that `order` names: they are gathered while they are packed.
    pub fn gathered(data: &'a [T], cols: usize, order: &'a [u32]) -> Self {
        let last = order.iter().max().map_or(0, |last| (*last as usize + 1) * cols);
        assert!(last <= data.len(), "gathered rows out of bounds");
        let data = Numbers::Wide(data);
        Matrix { data, rows: order.len(), cols, stride: cols, turned: false, order: Some(order) }
    }

    /// The transposed view.
    pub fn t(self) -> Self {
        Matrix { rows: self.cols, cols: self.rows, turned: !self.turned, ..self }
    }

    /// The columns of `range`: some lines of a turned matrix, parts of all lines of others.
    fn columns(self, range: Range<usize>) -> Self {
        let (order, before) = match (self.turned, self.order) {
            (true, Some(order)) => (Some(&order[range.clone()]), 0),
            (true, None) => (None, range.start * self.stride),
            (false, order) => (order, range.start),
        };
        let data = match self.data {
            Numbers::Wide(data) => Numbers::Wide(&data[before.min(data.len())..]),
            Numbers::Narrow(data) => Numbers::Narrow(&data[before.min(data.len())..]),
        };
        Matrix { data, cols: range.len(), order, ..self }
    }

    /// Where it starts, after its lines were put one after the other into `to` if they are not there already or are not of T.
    fn in_line(&mut self, to: &mut Vec<T>) -> *const T {
        let (width, lines) = if self.turned { (self.rows, self.cols) } else { (self.cols, self.rows) };
        let starts = (0..lines).map(|i| self.order.map_or(i, |order| order[i] as usize) * self.stride);
        match self.data {
            Numbers::Wide(data) if self.order.is_none() => return data.as_ptr(),
            Numbers::Wide(data) => starts.for_each(|at| to.extend_from_slice(&data[at..at + width])),
            Numbers::Narrow(data) => {
                starts.for_each(|at| to.extend(data[at..at + width].iter().map(|x| T::from_f64(x.to_f32().into()))))
            }
        }
        (self.stride, self.order) = (width, None);
        to.as_ptr()
    }

    /// From one row to the next, and from one column to the next.
    fn strides(&self) -> (isize, isize) {
        if self.turned { (1, self.stride as isize) } else { (self.stride as isize, 1) }
    }
}

/// Threads a product may use. Results do not depend on it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    One,
    Pool,
}

/// One product of a group: dst [m, n] = a [m, k] · b [k, n], rows of dst n apart.
pub struct Product<'a, T> {
    pub dst: &'a mut [T],
    pub a: Matrix<'a, T>,
    pub b: Matrix<'a, T>,
}

/// dst [m, n] (rows `dst_stride` apart) = a [m, k] · b [k, n], or += when `accumulate`.
pub fn matmul_strided<T: Real>(
    precision: Precision,
    dst: &mut [T],
    dst_stride: usize,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    accumulate: bool,
    threads: Threads,
) {
    let pool = threads == Threads::Pool;
    match job(dst, dst_stride, a, b) {
        Some(job) => run(Method::of(isa::current(), precision), &[job], accumulate, pool),
        None => wide(dst, dst_stride, a, b, accumulate, if pool { Parallelism::Rayon(0) } else { Parallelism::None }),
    }
}

/// dst [m, n] = a · b, or += when `accumulate`, on the current thread pool.
pub fn matmul<T: Real>(precision: Precision, dst: &mut [T], a: Matrix<'_, T>, b: Matrix<'_, T>, accumulate: bool) {
    matmul_strided(precision, dst, b.cols, a, b, accumulate, Threads::Pool);
}

/// All products of a group (the experts of a layer), or += when `accumulate`: one list of work for the thread pool, cut by arithmetic and not by
/// product, whatever the sizes.
pub fn grouped<T: Real>(precision: Precision, mut products: Vec<Product<'_, T>>, accumulate: bool) {
    let count = products.len();
    let jobs: Vec<Job<'_>> = products.iter_mut().filter_map(|p| job(p.dst, p.b.cols, p.a, p.b)).collect();
    if jobs.len() == count {
        run(Method::of(isa::current(), precision), &jobs, accumulate, true);
    } else {
        products.into_par_iter().for_each(|p| wide(p.dst, p.b.cols, p.a, p.b, accumulate, Parallelism::None));
    }
}

/// As `grouped`, for sums over many rows of two arrays, as gradients of weights are: both halves of the rows are summed apart, by threads that have
/// them in their caches, wherever `halved` says so.
pub fn grouped_over_rows<T: Real>(precision: Precision, mut products: Vec<Product<'_, T>>, accumulate: bool) {
    if TypeId::of::<T>() != TypeId::of::<f32>() || !halved(&products) {
        return grouped(precision, products, accumulate);
    }
    let numbers = products.iter().map(|p| p.a.rows * p.b.cols).sum();
    kept::with(|Second(room): &mut Second<T>| {
        let mut room = kept::grown(room, numbers);
        let [mut first, mut second] = [const { Vec::new() }; 2];
        for p in &mut products {
            let (k, n) = (p.a.cols, p.b.cols);
            // Even, so that no pair is torn.
            let middle = (k / 2).next_multiple_of(2);
            let (apart, rest) = room.split_at_mut(p.a.rows * n);
            room = rest;
            let part = |range: Range<usize>| (p.a.columns(range.clone()), p.b.t().columns(range).t());
            let ((a, b), (a_apart, b_apart)) = (part(0..middle), part(middle..k));
            first.extend(job(p.dst, n, a, b));
            second.extend(job(apart, n, a_apart, b_apart));
        }
        let method = Method::of(isa::current(), precision);
        // SAFETY: as in `run`; the second sums are parts of `room`, which is borrowed as long.
        unsafe { blocks::run_halves(method, [&first, &second], accumulate) };
    });
}

/// Sums of the second halves of rows.
#[derive(Default)]
struct Second<T>(Vec<T>);

/// Whether there are so many more rows than sums that a second array of these pays, and few enough for caches. Threads have no say: it decides the
/// order of summation.
fn halved<T: Real>(products: &[Product<'_, T>]) -> bool {
    const MOST: usize = 1 << 21;
    const NARROWEST: usize = 32; // what is packed is as wide as a tile
    let total = |size: fn(&Product<'_, T>) -> usize| products.iter().map(size).sum::<usize>();
    let (sums, right) = (total(|p| p.a.rows * p.b.cols), total(|p| p.a.cols * p.b.cols.next_multiple_of(NARROWEST)));
    let read = total(|p| p.a.cols * (p.a.rows + p.b.cols));
    sums > 0 && 4 * sums <= read && sums.max(right) <= MOST && products.iter().all(|p| p.a.cols >= 256)
}

/// The product as work for tiles if T is f32. The caller keeps dst borrowed until it is done.
fn job<'a, T: Real>(dst: &mut [T], stride: usize, a: Matrix<'a, T>, b: Matrix<'a, T>) -> Option<Job<'a>> {
    let (m, n, k) = check(dst, stride, a, b);
    let operand = |Matrix { data, stride, order, .. }: Matrix<'a, T>, along_k| match data {
        Numbers::Wide(data) => Operand::Wide(Source { data: simd::same(data), stride, along_k, order }),
        Numbers::Narrow(data) => Operand::Narrow(Source { data, stride, along_k, order }),
    };
    (TypeId::of::<T>() == TypeId::of::<f32>()).then(|| Job {
        dst: dst.as_mut_ptr().cast(),
        stride,
        m,
        n,
        k,
        a: operand(a, !a.turned),
        b: operand(b, b.turned),
    })
}

fn run(method: Method, jobs: &[Job<'_>], accumulate: bool, pool: bool) {
    // SAFETY: `job` checked that dst holds its rows and columns and the operands theirs; dst was borrowed mutably; the set is the process's.
    unsafe { blocks::run(method, jobs, accumulate, pool) }
}

/// The sizes m, n, k of a product that fits.
fn check<T: Real>(dst: &[T], stride: usize, a: Matrix<'_, T>, b: Matrix<'_, T>) -> (usize, usize, usize) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert_eq!(a.cols, b.rows, "inner sizes of a product differ");
    let fits = m == 0 || n == 0 || ((m - 1) * stride + n <= dst.len() && n <= stride);
    assert!(fits, "product does not fit its destination");
    (m, n, k)
}

/// The same in f64.
fn wide<T: Real>(
    dst: &mut [T],
    stride: usize,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    accumulate: bool,
    threads: Parallelism,
) {
    let (m, n, k) = check(dst, stride, a, b);
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !accumulate {
            (0..m).for_each(|i| dst[i * stride..i * stride + n].fill(T::ZERO));
        }
        return;
    }
    let (mut a, mut b, mut a_lines, mut b_lines) = (a, b, Vec::new(), Vec::new());
    let (a_data, b_data) = (a.in_line(&mut a_lines), b.in_line(&mut b_lines));
    // SAFETY: `Matrix` proved on construction that every (row, col) of a and b lies inside its slice, or `in_line` put all of them into lines that
    // live as long as this call; `check` does so for dst, dst is borrowed mutably (no overlap with a and b), and T is f32 or f64 (`Real` is closed).
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            stride as isize,
            accumulate,
            a_data,
            a.strides().1,
            a.strides().0,
            b_data,
            b.strides().1,
            b.strides().0,
            T::ONE,
            T::ONE,
            false,
            false,
            false,
            threads,
        );
    }
}
