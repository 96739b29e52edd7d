//! The rows between the products of a SwiGLU: pre-activations [b, 2f], gate and up side by side, and hidden rows silu(a) * u [b, f], silu(a) = a σ(a).
//! They are stored as they are, or, where products round their operands, as bf16. Products round hidden rows and gradients anyway; the way back starts
//! from rounded pre-activations.

use crate::Real;
use crate::kept::{self, grown};
use crate::kernels::bf16::{Bf16, halves_mut};
use crate::kernels::gemm::Matrix;
use crate::kernels::silu;

/// How rows are stored.
pub(crate) trait Stored<T: Real>: Copy + Send + Sync + 'static {
    /// Numbers of T whose memory holds `len` of these.
    fn room(len: usize) -> usize;

    /// The first `len` of them in such memory.
    fn of_mut(room: &mut [T], len: usize) -> &mut [Self];

    /// Rows of `cols` numbers, `stride` apart.
    fn matrix(rows: &[Self], shape: (usize, usize), stride: usize) -> Matrix<'_, T>;

    /// Stores the pre-activations that `fill` makes, and gives their hidden rows to `after`. All but `pre_b2f` stays in the caches of this thread.
    fn forward(pre_b2f: &mut [Self], f: usize, fill: impl FnOnce(&mut [T]), after: impl FnOnce(Matrix<'_, T>));

    /// The backward for hidden rows that enter the output times `weight(row)`. `fill` makes the gradient of the unweighted output carried to the
    /// hidden rows. `rows` are the pre-activations, which become their own gradient, and room for hidden rows, which become weight · silu(a) * u (what
    /// the gradient of W_down is made of); `dweight_b` the gradient of the weights.
    fn backward(
        rows: (&mut [Self], &mut [Self]),
        f: usize,
        fill: impl FnOnce(&mut [T]),
        weight: impl Fn(usize) -> T,
        dweight_b: &mut [T],
    );
}

impl<T: Real> Stored<T> for T {
    fn room(len: usize) -> usize {
        len
    }

    fn of_mut(room: &mut [T], len: usize) -> &mut [T] {
        &mut room[..len]
    }

    fn matrix(rows: &[T], (n, cols): (usize, usize), stride: usize) -> Matrix<'_, T> {
        Matrix::strided(rows, n, cols, stride)
    }

    fn forward(pre_b2f: &mut [T], f: usize, fill: impl FnOnce(&mut [T]), after: impl FnOnce(Matrix<'_, T>)) {
        fill(pre_b2f);
        kept::with(|rooms: &mut Rooms<T>| {
            let hidden_bf = grown(&mut rooms.hidden, pre_b2f.len() / 2);
            for (pre_2f, hidden_f) in pre_b2f.chunks_exact(2 * f).zip(hidden_bf.chunks_exact_mut(f)) {
                silu::forward(pre_2f, hidden_f);
            }
            after(Matrix::new(hidden_bf, pre_b2f.len() / (2 * f), f));
        });
    }

    fn backward(
        (pre_b2f, hidden_bf): (&mut [T], &mut [T]),
        f: usize,
        fill: impl FnOnce(&mut [T]),
        weight: impl Fn(usize) -> T,
        dweight_b: &mut [T],
    ) {
        fill(hidden_bf);
        let rows = pre_b2f.chunks_exact_mut(2 * f).zip(hidden_bf.chunks_exact_mut(f)).zip(dweight_b).enumerate();
        for (i, ((pre_2f, hidden_f), dweight)) in rows {
            *dweight = silu::backward(pre_2f, hidden_f, weight(i));
        }
    }
}

impl<T: Real> Stored<T> for Bf16 {
    fn room(len: usize) -> usize {
        (len * size_of::<Bf16>()).div_ceil(size_of::<T>())
    }

    fn of_mut(room: &mut [T], len: usize) -> &mut [Bf16] {
        &mut halves_mut(room)[..len]
    }

    fn matrix(rows: &[Bf16], (n, cols): (usize, usize), stride: usize) -> Matrix<'_, T> {
        Matrix::narrow(rows, n, cols, stride)
    }

    fn forward(pre_b2f: &mut [Bf16], f: usize, fill: impl FnOnce(&mut [T]), after: impl FnOnce(Matrix<'_, T>)) {
        kept::with(|rooms: &mut Rooms<T>| {
            let wide_b2f = grown(&mut rooms.pre, pre_b2f.len());
            let (room_f, hidden_bf) = (grown(&mut rooms.hidden, f), grown(&mut rooms.narrow, pre_b2f.len() / 2));
            fill(wide_b2f);
            let rows = wide_b2f.chunks_exact(2 * f).zip(pre_b2f.chunks_exact_mut(2 * f));
            for ((wide_2f, pre_2f), hidden_f) in rows.zip(hidden_bf.chunks_exact_mut(f)) {
                silu::forward_rounded(wide_2f, pre_2f, hidden_f, room_f);
            }
            after(Matrix::narrow(hidden_bf, pre_b2f.len() / (2 * f), f, f));
        });
    }

    fn backward(
        (pre_b2f, hidden_bf): (&mut [Bf16], &mut [Bf16]),
        f: usize,
        fill: impl FnOnce(&mut [T]),
        weight: impl Fn(usize) -> T,
        dweight_b: &mut [T],
    ) {
        kept::with(|rooms: &mut Rooms<T>| {
            let (room_2f, carried_bf) = (grown(&mut rooms.pre, 2 * f), grown(&mut rooms.hidden, hidden_bf.len()));
            fill(carried_bf);
            let rows = pre_b2f.chunks_exact_mut(2 * f).zip(hidden_bf.chunks_exact_mut(f));
            let rows = rows.zip(carried_bf.chunks_exact_mut(f)).zip(dweight_b).enumerate();
            for (i, (((pre_2f, hidden_f), carried_f), dweight)) in rows {
                *dweight = silu::backward_rounded(pre_2f, carried_f, hidden_f, weight(i), room_2f);
            }
        });
    }
}

/// Working memory of a thread.
#[derive(Default)]
struct Rooms<T> {
    pre: Vec<T>,
    hidden: Vec<T>,
    narrow: Vec<Bf16>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Precision;
    use crate::check::normals;
    use crate::kernels::gemm::matmul;

    /// Hidden rows, their gradient of the pre-activations, the rows the weight of W_down sees, and the gradient of the weights.
    fn both_ways<S: Stored<f32>>(pre: &[f32], carried: &[f32], f: usize) -> [Vec<f32>; 4] {
        let rows = carried.len() / f;
        let (mut kept, mut room) = (vec![0.0; S::room(pre.len())], vec![0.0; S::room(carried.len())]);
        let (kept, room) = (S::of_mut(&mut kept, pre.len()), S::of_mut(&mut room, carried.len()));
        let numbers = |x: Matrix<'_, f32>, width: usize| {
            let mut to = vec![0.0; rows * width];
            let one: Vec<f32> = (0..width * width).map(|i| if i % (width + 1) == 0 { 1.0 } else { 0.0 }).collect();
            matmul(Precision::F32, &mut to, x, Matrix::new(&one, width, width), false);
            to
        };
        let mut hidden = Vec::new();
        S::forward(kept, f, |to| to.copy_from_slice(pre), |x| hidden = numbers(x, f));
        let mut dweights = vec![0.0; rows];
        let weight = |row: usize| 1.0 + row as f32;
        S::backward((&mut *kept, &mut *room), f, |to| to.copy_from_slice(carried), weight, &mut dweights);
        let shape = |width: usize| (rows, width);
        [
            hidden,
            numbers(S::matrix(kept, shape(2 * f), 2 * f), 2 * f),
            numbers(S::matrix(room, shape(f), f), f),
            dweights,
        ]
    }

    #[test]
    fn rows_of_any_width_are_the_same_in_either_kind_up_to_rounding() {
        for (rows, f) in [(1, 1), (3, 5), (2, 16), (5, 37), (4, 64)] {
            let draw = |seed, len| normals(seed, len, 1.0).into_iter().map(|x| x as f32).collect::<Vec<_>>();
            let (pre, carried) = (draw(1, rows * 2 * f), draw(2, rows * f));
            let (wide, narrow) = (both_ways::<f32>(&pre, &carried, f), both_ways::<Bf16>(&pre, &carried, f));
            for (wide, narrow) in wide.iter().zip(&narrow) {
                let most = wide.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                for (x, y) in wide.iter().zip(narrow) {
                    assert!((x - y).abs() <= 0.03 * most, "{rows} x {f}: {x} {y}");
                }
            }
        }
    }

    #[test]
    fn extreme_pre_activations_stay_finite() {
        for scale in [1e4f32, -1e4] {
            let expected = if scale > 0.0 { [scale, 1.0] } else { [0.0, 0.0] };
            let kinds = [both_ways::<f32>, both_ways::<Bf16>].map(|kind| kind(&[scale, 1.0], &[1.0], 1));
            for ([hidden, dpre, ..], part) in kinds.into_iter().zip([0.0, 0.004]) {
                assert!((hidden[0] - expected[0]).abs() <= part * expected[0] + 1e-30, "{hidden:?}");
                assert!((dpre[0] - expected[1]).abs() < 1e-30, "{dpre:?}");
            }
        }
    }
}
