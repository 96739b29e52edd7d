//! Matrix products through the `gemm` crate, on strided views whose bounds are checked here once.
#![allow(unsafe_code)]

use crate::Real;
use gemm::Parallelism;

/// A read-only strided matrix over a slice.
#[derive(Clone, Copy)]
pub struct Matrix<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// [rows, cols] stored row after row.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Matrix::strided(data, rows, cols, cols)
    }

    /// Rows of `cols` numbers, `row_stride` apart.
    pub fn strided(data: &'a [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || cols == 0 || (rows - 1) * row_stride + cols <= data.len(), "matrix view out of bounds");
        Matrix { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transposed view.
    pub fn t(self) -> Self {
        Matrix { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// Threads a product may use. Results do not depend on it (measured for the gemm crate; held by a test).
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    One,
    Pool,
}

/// dst [m, n] (rows `dst_stride` apart) = a [m, k] · b [k, n], or += when `accumulate`.
pub fn matmul_strided<T: Real>(
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
pub fn matmul<T: Real>(dst: &mut [T], a: Matrix<'_, T>, b: Matrix<'_, T>, accumulate: bool) {
    matmul_strided(dst, b.cols, a, b, accumulate, Threads::Pool);
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
            matmul(&mut found, Matrix::new(&a, m, k), Matrix::new(&b, k, n), false);
            let bt: Vec<f64> = (0..n * k).map(|x| b[(x % k.max(1)) * n + x / k.max(1)]).collect();
            let mut transposed = vec![1.0; m * n];
            matmul(&mut transposed, Matrix::new(&a, m, k), Matrix::new(&bt, n, k).t(), true);
            for i in 0..m * n {
                assert!((found[i] - expected[i]).abs() < 1e-12 && (transposed[i] - expected[i] - 1.0).abs() < 1e-12);
            }
        }
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
                pool.install(|| matmul(&mut dst, Matrix::new(&a, m, k), Matrix::new(&b, k, n), false));
                dst.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
            };
            let one = run(1);
            assert!([2, 3, 8].into_iter().all(|threads| run(threads) == one), "{m}x{k}x{n}");
        }
    }
}
