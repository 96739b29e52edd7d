//! Matrix products on strided views whose bounds are checked here once: through the `gemm` crate, in bf16 on operands rounded before.
#![allow(unsafe_code)]

use crate::{Precision, Real};
use gemm::Parallelism;
use rayon::prelude::*;
use std::any::TypeId;

/// A read-only strided matrix over a slice.
#[derive(Clone, Copy)]
pub struct Matrix<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T: Real> Matrix<'a, T> {
    /// [rows, cols] stored row after row.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Matrix::strided(data, rows, cols, cols)
    }

    /// Rows of `cols` numbers, `row_stride` apart.
    pub fn strided(data: &'a [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || cols == 0 || (rows - 1) * row_stride + cols <= data.len(), "matrix view out of bounds");
        Matrix { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The same matrix with every number rounded to bf16 (nearest, ties to even), copied into `to`.
    fn rounded<'r>(self, to: &'r mut Vec<T>) -> Matrix<'r, T> {
        let by_rows = self.col_stride == 1;
        let (outer, inner) = if by_rows { (self.rows, self.cols) } else { (self.cols, self.rows) };
        let stride = if by_rows { self.row_stride } else { self.col_stride };
        to.reserve_exact(outer * inner);
        (0..outer).for_each(|i| to.extend(self.data[i * stride..i * stride + inner].iter().map(|x| round(*x))));
        let view = Matrix::new(&to[..], outer, inner);
        if by_rows { view } else { view.t() }
    }

    /// The transposed view.
    pub fn t(self) -> Self {
        Matrix { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// An f32 rounded to the nearest bf16, ties to even; other types as they are.
fn round<T: Real>(x: T) -> T {
    if TypeId::of::<T>() != TypeId::of::<f32>() {
        return x;
    }
    // SAFETY: T is f32.
    let bits: u32 = unsafe { std::mem::transmute_copy(&x) };
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000;
    let rounded = if bits & 0x7fff_ffff > 0x7f80_0000 { bits } else { rounded }; // NaN stays NaN
    // SAFETY: T is f32.
    unsafe { std::mem::transmute_copy(&rounded) }
}

/// Threads a product may use. Results do not depend on it (measured for the gemm crate; held by a test).
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    One,
    Pool,
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
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert_eq!(a.cols, b.rows, "inner sizes of a product differ");
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * dst_stride + n <= dst.len() && n <= dst_stride.max(n), "product does not fit its destination");
    if k == 0 {
        if !accumulate {
            (0..m).for_each(|i| dst[i * dst_stride..i * dst_stride + n].fill(T::ZERO));
        }
        return;
    }
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::Pool => Parallelism::Rayon(0),
    };
    let (mut rounded_a, mut rounded_b) = (Vec::new(), Vec::new());
    let (a, b) = match precision {
        Precision::Bf16 if TypeId::of::<T>() == TypeId::of::<f32>() => {
            (a.rounded(&mut rounded_a), b.rounded(&mut rounded_b))
        }
        _ => (a, b),
    };
    // SAFETY: `Matrix` proved on construction that every (row, col) of a and b lies inside its slice, the assertion above does so for dst, dst is
    // borrowed mutably (no overlap with a and b), and T is f32 or f64 (`Real` is closed).
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            dst_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            T::ONE,
            T::ONE,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// dst [m, n] = a · b, or += when `accumulate`, on the current thread pool.
pub fn matmul<T: Real>(precision: Precision, dst: &mut [T], a: Matrix<'_, T>, b: Matrix<'_, T>, accumulate: bool) {
    matmul_strided(precision, dst, b.cols, a, b, accumulate, Threads::Pool);
}

/// One product of a group: dst [m, n] = a [m, k] · b [k, n], rows of dst n apart.
pub struct Product<'a, T> {
    pub dst: &'a mut [T],
    pub a: Matrix<'a, T>,
    pub b: Matrix<'a, T>,
}

/// All products of a group (the experts of a layer), or += when `accumulate`: one list of work for the thread pool, whatever the sizes.
pub fn grouped<T: Real>(precision: Precision, products: Vec<Product<'_, T>>, accumulate: bool) {
    const SMALL: usize = 1 << 21; // multiplications
    let work: usize = products.iter().map(|p| p.a.rows * p.a.cols * p.b.cols).sum();
    let run = |p: Product<'_, T>, threads| {
        matmul_strided(precision, p.dst, p.b.cols, p.a, p.b, accumulate, threads);
    };
    if work < SMALL {
        products.into_iter().for_each(|p| run(p, Threads::One));
    } else {
        let threads = if products.len() < rayon::current_num_threads() { Threads::Pool } else { Threads::One };
        products.into_par_iter().for_each(|p| run(p, threads));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, Random};

    fn naive(a: &[f64], b: &[f64], m: usize, k: usize, n: usize) -> Vec<f64> {
        let dot = |i: usize, j: usize| (0..k).map(|l| a[i * k + l] * b[l * n + j]).sum();
        (0..m * n).map(|x| dot(x / n, x % n)).collect()
    }

    #[test]
    fn products_match_the_definition_for_ragged_shapes_and_transposes() {
        let random = Random::new(1, Purpose::Test);
        for (step, (m, k, n)) in
            [(0, 3, 4), (1, 1, 1), (1, 17, 5), (5, 0, 3), (33, 16, 15), (70, 129, 65)].into_iter().enumerate()
        {
            let fill = |offset: u64, len: usize| {
                (0..len as u64).map(|i| random.normal(step as u64, offset + i)).collect::<Vec<_>>()
            };
            let (a, b) = (fill(0, m * k), fill(1 << 20, k * n));
            let expected = naive(&a, &b, m, k, n);
            let mut found = vec![1.0; m * n];
            matmul(Precision::F32, &mut found, Matrix::new(&a, m, k), Matrix::new(&b, k, n), false);
            let bt: Vec<f64> = (0..n * k).map(|x| b[(x % k.max(1)) * n + x / k.max(1)]).collect();
            let mut transposed = vec![1.0; m * n];
            matmul(Precision::F32, &mut transposed, Matrix::new(&a, m, k), Matrix::new(&bt, n, k).t(), true);
            for i in 0..m * n {
                assert!((found[i] - expected[i]).abs() < 1e-12 && (transposed[i] - expected[i] - 1.0).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn bf16_rounds_the_operands_and_nothing_else() {
        // 1 + i/256 lies on a bf16 number for even i and halfway between two for odd i: the even one is nearest.
        for (i, even) in [(0u16, 0u16), (1, 0), (2, 2), (3, 4), (5, 4), (7, 8)] {
            assert_eq!(round(1.0 + f32::from(i) / 256.0), 1.0 + f32::from(even) / 256.0, "{i}");
            assert_eq!(round(-1.0 - f32::from(i) / 256.0 - 1e-6), -1.0 - f32::from(i + i % 2) / 256.0, "{i}");
        }
        assert!(round(f32::MAX).is_infinite() && round(f32::NAN).is_nan() && round(f32::NEG_INFINITY) < 0.0);
        let numbers = |seed, len| crate::check::normals(seed, len, 1.0).iter().map(|x| *x as f32).collect::<Vec<_>>();
        let (a, b) = (numbers(1, 7 * 5), numbers(2, 5 * 9));
        let (ra, rb): (Vec<f32>, Vec<f32>) =
            (a.iter().map(|x| round(*x)).collect(), b.iter().map(|x| round(*x)).collect());
        let [mut narrow, mut wide, mut expected] = [(); 3].map(|_| vec![0.0f32; 63]);
        matmul(Precision::Bf16, &mut narrow, Matrix::new(&a, 7, 5), Matrix::new(&b, 5, 9), false);
        matmul(Precision::F32, &mut wide, Matrix::new(&a, 7, 5), Matrix::new(&b, 5, 9), false);
        matmul(Precision::F32, &mut expected, Matrix::new(&ra, 7, 5), Matrix::new(&rb, 5, 9), false);
        assert_eq!(narrow, expected);
        assert_ne!(narrow, wide);
    }

    #[test]
    fn bytes_do_not_depend_on_the_number_of_threads() {
        let random = Random::new(2, Purpose::Test);
        for (m, k, n) in [(96, 128, 128), (512, 128, 600), (128, 512, 256), (1000, 80, 64), (257, 333, 129)] {
            let fill = |offset: u64, len: usize| {
                (0..len as u64).map(|i| random.normal(0, offset + i) as f32).collect::<Vec<_>>()
            };
            let (a, b) = (fill(0, m * k), fill(1 << 20, k * n));
            let run = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut dst = vec![0.0f32; m * n];
                pool.install(|| matmul(Precision::F32, &mut dst, Matrix::new(&a, m, k), Matrix::new(&b, k, n), false));
                dst.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
            };
            let one = run(1);
            assert!([2, 3, 8].into_iter().all(|threads| run(threads) == one), "{m}x{k}x{n}");
        }
    }
}
