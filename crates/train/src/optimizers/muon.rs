//! Muon (Jordan 2024) for hidden matrices, AdamW for all else (embeddings, output projection, norms, routers, CoPE tables). A hidden matrix W
//! [r, c], each expert one: M ← μ M + (1−μ) G; X = (1−μ) G + μ M, made nearly orthogonal by five Newton-Schulz steps on X / ‖X‖_F;
//! W ← (1−γλ) W − γ 0.2 √max(r, c) X. The last factor gives updates the size of AdamW's, so that one learning rate serves both (Liu et al. 2025,
//! arXiv 2502.16982).

use super::{Matrix, Moved, Settings, adam, flush, update};
use rayon::prelude::*;
use tensor::kernels::gemm::{self, Threads, matmul_strided};
use tensor::{Layout, Param, Precision};

/// Coefficients a, b, c of x ← a x + b x³ + c x⁵ on singular values.
const COEFFICIENTS: [f32; 3] = [3.4445, -4.7750, 2.0315];
const STEPS: usize = 5;

/// Size of an update relative to an orthogonal matrix of the larger side.
const SIZE: f64 = 0.2;

pub(super) fn step(
    settings: &Settings,
    layout: &Layout,
    matrices: &[Matrix],
    params: &mut [f32],
    grads: &[f32],
    moments: &mut [(String, Vec<f32>)],
) -> Vec<Moved> {
    let shapes: Vec<Option<Param>> = layout.iter().map(|(name, param)| is_hidden(name).then_some(param)).collect();
    let hidden = |matrix: &Matrix| shapes[matrix.parameter].filter(|_| matrix.moves);
    // The direction of every number: the gradient, and for hidden matrices the orthogonal X.
    let mut directions = grads.to_vec();
    let (mut rest, mut mean_rest, mut at) = (&mut directions[..], &mut moments[0].1[..], 0);
    let mut tasks = Vec::new();
    for matrix in matrices {
        let (_, from) = std::mem::take(&mut rest).split_at_mut(matrix.range.start - at);
        let (_, mean_from) = std::mem::take(&mut mean_rest).split_at_mut(matrix.range.start - at);
        let (piece, after) = from.split_at_mut(matrix.range.len());
        let (mean, mean_after) = mean_from.split_at_mut(matrix.range.len());
        (rest, mean_rest, at) = (after, mean_after, matrix.range.end);
        if let Some(param) = hidden(matrix) {
            tasks.push((piece, mean, param));
        }
    }
    let momentum = settings.momentum as f32;
    tasks.into_par_iter().for_each(|(direction, mean, param)| {
        let (rows, cols) = (param.rows, param.width);
        for (d, m) in direction.iter_mut().zip(mean) {
            *m = flush(momentum * *m + (1.0 - momentum) * *d);
            *d = (1.0 - momentum) * *d + momentum * *m;
        }
        orthogonalise(&mut direction[..rows * cols], rows, cols);
    });
    let constants = |matrix: &Matrix| match hidden(matrix) {
        Some(param) => Constants::Hidden {
            step: (matrix.rate * SIZE * (param.rows.max(param.width) as f64).sqrt()) as f32,
            shrink: if matrix.decays { (matrix.rate * settings.weight_decay) as f32 } else { 0.0 },
        },
        None => Constants::Adam(adam::Constants::new(settings, true, matrix)),
    };
    update(matrices, constants, params, &directions, moments, kernel)
}

/// The projections of attention and feed-forward layers, experts among them.
fn is_hidden(name: &str) -> bool {
    name.contains("_proj")
}

#[derive(Clone, Copy)]
enum Constants {
    Hidden { step: f32, shrink: f32 },
    Adam(adam::Constants),
}

#[inline(always)]
fn kernel(c: Constants, params: &mut [f32], directions: &[f32], first: &mut [f32], second: &mut [f32]) {
    match c {
        Constants::Adam(c) => adam::kernel(c, params, directions, first, second),
        Constants::Hidden { step, shrink } => {
            params.iter_mut().zip(directions).for_each(|(w, &d)| *w -= shrink * *w + step * d);
        }
    }
}

/// Five Newton-Schulz steps on x [rows, cols] / ‖x‖_F in place: singular values that are not tiny end between 0.68 and 1.2. Zero stays zero.
fn orthogonalise(x: &mut [f32], rows: usize, cols: usize) {
    let norm = crate::layers::sum_squares(x).sqrt();
    if norm == 0.0 {
        return;
    }
    x.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
    // Gram matrices of the smaller side; of the transpose where there are more rows.
    let side = rows.min(cols);
    let [a, b, c] = COEFFICIENTS;
    let (mut gram, mut square) = (vec![0.0f32; side * side], vec![0.0f32; side * side]);
    let mut product = vec![0.0f32; rows * cols];
    let multiply = |dst: &mut [f32], width: usize, left: gemm::Matrix<'_, f32>, right: gemm::Matrix<'_, f32>| {
        matmul_strided(Precision::F32, dst, width, left, right, false, Threads::One);
    };
    for _ in 0..STEPS {
        let matrix = gemm::Matrix::new(x, rows, cols);
        match rows <= cols {
            true => multiply(&mut gram, side, matrix, matrix.t()),
            false => multiply(&mut gram, side, matrix.t(), matrix),
        }
        let gram_matrix = gemm::Matrix::new(&gram, side, side);
        multiply(&mut square, side, gram_matrix, gram_matrix);
        gram.iter_mut().zip(&square).for_each(|(g, s)| *g = b * *g + c * s);
        let polynomial = gemm::Matrix::new(&gram, side, side);
        match rows <= cols {
            true => multiply(&mut product, cols, polynomial, matrix),
            false => multiply(&mut product, cols, matrix, polynomial),
        }
        x.iter_mut().zip(&product).for_each(|(x, p)| *x = a * *x + p);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::check::normals;

    fn random(seed: u64, rows: usize, cols: usize) -> Vec<f32> {
        normals(seed, rows * cols, 1.0).iter().map(|x| *x as f32).collect()
    }

    /// xᵀx (or xxᵀ) of the smaller side, in f64.
    fn gram(x: &[f32], rows: usize, cols: usize) -> Vec<Vec<f64>> {
        let side = rows.min(cols);
        let at = |i: usize, k: usize| f64::from(if rows <= cols { x[i * cols + k] } else { x[k * cols + i] });
        let entry = |i, j| (0..rows.max(cols)).map(|k| at(i, k) * at(j, k)).sum();
        (0..side).map(|i| (0..side).map(|j| entry(i, j)).collect()).collect()
    }

    /// Largest eigenvalue of a symmetric matrix with eigenvalues of 0 or more, by iteration.
    fn largest(matrix: &[Vec<f64>]) -> f64 {
        let mut vector: Vec<f64> = (0..matrix.len()).map(|i| 1.0 + (i as f64).sin()).collect();
        let mut size = 0.0;
        for _ in 0..500 {
            let next: Vec<f64> = matrix.iter().map(|row| row.iter().zip(&vector).map(|(a, b)| a * b).sum()).collect();
            size = next.iter().map(|x| x * x).sum::<f64>().sqrt();
            vector = next.iter().map(|x| x / size).collect();
        }
        size
    }

    #[test]
    fn singular_values_of_a_long_matrix_end_near_one() {
        for (rows, cols) in [(64, 256), (256, 64), (1, 40), (40, 1)] {
            let mut x = random(1, rows, cols);
            orthogonalise(&mut x, rows, cols);
            let gram = gram(&x, rows, cols);
            let top = largest(&gram);
            let flipped: Vec<Vec<f64>> = (0..gram.len())
                .map(|i| (0..gram.len()).map(|j| f64::from(u8::from(i == j)) * top - gram[i][j]).collect())
                .collect();
            let bottom = top - if gram.len() == 1 { 0.0 } else { largest(&flipped) };
            assert!(bottom.sqrt() > 0.67 && top.sqrt() < 1.15, "{rows}x{cols}: {} to {}", bottom.sqrt(), top.sqrt());
        }
    }

    #[test]
    fn the_scale_of_the_gradient_does_not_matter_and_zero_stays_zero() {
        let (mut x, mut scaled) = (random(2, 24, 48), random(2, 24, 48));
        scaled.iter_mut().for_each(|x| *x *= 1024.0);
        orthogonalise(&mut x, 24, 48);
        orthogonalise(&mut scaled, 24, 48);
        assert!(x.iter().zip(&scaled).all(|(a, b)| (a - b).abs() < 1e-5));
        let mut zero = vec![0.0; 12];
        orthogonalise(&mut zero, 3, 4);
        assert_eq!(zero, [0.0; 12]);
    }
}
