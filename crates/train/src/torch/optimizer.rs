//! Optimizer steps on a device, over the flat buffers: the formulas of `optimizers`, with one constant per matrix and formula. On the CPU a matrix is
//! stepped in pieces that stay in the cache; on a GPU all of them at once, for there launches cost: every matrix begins on a boundary of 16 numbers,
//! so a constant is spread over rows of 16.

use crate::optimizers::{Kind, Matrix, Optimizer, lars};
use std::ops::Range;
use tensor::Layout;
use tensor::torch::{Device, Kind as Number, Result, Tensor, integers, to_vec};

const ROW: usize = 16;

/// Numbers stepped at once on the CPU, and rows of 16 on a GPU (which bounds what the step needs beside the buffers).
const PIECE: usize = 1 << 16;
const ROWS: i64 = 1 << 22;

/// Where the matrices lie in the flat buffer.
pub(super) struct Segments {
    matrices: Vec<Range<usize>>,
    /// The matrix of every row of 16, where rows are spread.
    rows: Option<Tensor>,
    device: Device,
}

pub(super) struct Buffers<'b> {
    pub values: &'b Tensor,
    pub grads: &'b Tensor,
    pub moments: &'b [Tensor],
}

/// What the formulas multiply by, one number per matrix.
#[derive(Default)]
struct Constants {
    columns: [Vec<f32>; 6],
}

/// The part of the buffers that a formula works on, and its constants, of a shape that broadcasts.
struct Piece {
    w: Tensor,
    g: Tensor,
    moments: Vec<Tensor>,
    constants: [Tensor; 6],
}

impl Segments {
    pub fn new(layout: &Layout, device: Device, spread: bool) -> Result<Self> {
        let matrices: Vec<_> = layout.iter().flat_map(|(_, p)| (0..p.count).map(move |i| p.range(i))).collect();
        let mut rows = vec![0i64; layout.len() / ROW];
        for (i, range) in matrices.iter().enumerate() {
            rows[range.start / ROW..range.end.div_ceil(ROW)].fill(i as i64);
        }
        let rows = if spread { Some(integers(rows, device)?) } else { None };
        Ok(Segments { matrices, rows, device })
    }

    /// Σ x² of every matrix, f64 [m]. The padding is zero and adds nothing.
    pub fn squares(&self, x: &Tensor) -> Result<Tensor> {
        match &self.rows {
            Some(rows) => {
                let sums = Tensor::f_zeros([self.matrices.len() as i64], (Number::Double, self.device))?;
                self.add_squares(sums, x, rows)
            }
            None => {
                let sum = |range: &Range<usize>| {
                    let mut sum = 0.0;
                    for piece in pieces(range) {
                        let x = narrow(x, &piece)?;
                        sum += x.f_dot(&x)?.f_double_value(&[])?;
                    }
                    Ok(sum)
                };
                let sums = self.matrices.iter().map(sum).collect::<Result<Vec<f64>>>()?;
                Tensor::f_from_slice(&sums)
            }
        }
    }

    /// sums[rows] += Σ x² of each row of 16.
    fn add_squares(&self, mut sums: Tensor, x: &Tensor, rows: &Tensor) -> Result<Tensor> {
        let count = rows.size()[0];
        let x = x.f_reshape([-1, ROW as i64])?;
        for start in (0..count).step_by(ROWS as usize) {
            let part = |x: &Tensor| x.f_narrow(0, start, ROWS.min(count - start));
            let squares = part(&x)?.f_square()?.f_sum_dim_intlist(-1i64, false, Number::Double)?;
            let _ = sums.f_index_add_(0, &part(rows)?, &squares)?;
        }
        Ok(sums)
    }

    /// One step of the matrices that move, the gradient multiplied by `factor`. `squares` are those of (gradient after clipping, weights). Returns
    /// ‖Δw‖² of every matrix.
    pub fn step(
        &self,
        optimizer: &Optimizer,
        matrices: &mut [Matrix],
        squares: &[(f64, f64)],
        factor: f64,
        buffers: Buffers<'_>,
    ) -> Result<Vec<f64>> {
        let settings = optimizer.settings();
        if optimizer.kind() == Kind::Lars {
            for (matrix, (gradient, weight)) in matrices.iter_mut().zip(squares) {
                matrix.rate *= lars::trust_ratio(settings, matrix, weight.sqrt(), gradient.sqrt());
            }
        }
        let mut constants = Constants::default();
        matrices.iter().for_each(|matrix| constants.push(optimizer, matrix));
        let formula = |piece: &mut Piece| {
            let mut g = piece.g.f_mul_scalar(factor)?;
            let [l2, ..] = &piece.constants;
            let _ = g.f_addcmul_(&piece.w, l2)?;
            let difference = match optimizer.kind() {
                Kind::Adam | Kind::AdamW => adam(piece, g, settings.eps)?,
                Kind::Sgd | Kind::Lars => momentum(piece, g)?,
                Kind::Lion | Kind::Muon => return Err(refused(optimizer.kind())),
            };
            let _ = piece.w.f_sub_(&difference)?;
            Ok::<Tensor, tensor::torch::Error>(difference)
        };
        match &self.rows {
            Some(rows) => self.step_rows(rows, &constants, &buffers, formula),
            None => self.step_matrices(matrices, &constants, &buffers, formula),
        }
    }

    fn step_rows(
        &self,
        rows: &Tensor,
        constants: &Constants,
        buffers: &Buffers<'_>,
        formula: impl Fn(&mut Piece) -> Result<Tensor>,
    ) -> Result<Vec<f64>> {
        let columns = constants.columns.iter().map(|column| Tensor::f_from_slice(column)?.f_to_device(self.device));
        let columns = columns.collect::<Result<Vec<Tensor>>>()?;
        let mut sums = Tensor::f_zeros([self.matrices.len() as i64], (Number::Double, self.device))?;
        let count = rows.size()[0];
        for start in (0..count).step_by(ROWS as usize) {
            let length = ROWS.min(count - start);
            let ids = rows.f_narrow(0, start, length)?;
            let part = |x: &Tensor| x.f_reshape([-1, ROW as i64])?.f_narrow(0, start, length);
            let spread = |i: usize| columns[i].f_index_select(0, &ids)?.f_unsqueeze(1);
            let mut piece = Piece {
                w: part(buffers.values)?,
                g: part(buffers.grads)?,
                moments: buffers.moments.iter().map(part).collect::<Result<_>>()?,
                constants: [spread(0)?, spread(1)?, spread(2)?, spread(3)?, spread(4)?, spread(5)?],
            };
            let difference = formula(&mut piece)?;
            sums = self.add_squares(sums, &difference, &ids)?;
        }
        to_vec(&sums)
    }

    fn step_matrices(
        &self,
        matrices: &[Matrix],
        constants: &Constants,
        buffers: &Buffers<'_>,
        formula: impl Fn(&mut Piece) -> Result<Tensor>,
    ) -> Result<Vec<f64>> {
        let mut sums = vec![0.0; matrices.len()];
        for (i, matrix) in matrices.iter().enumerate().filter(|(_, matrix)| matrix.moves) {
            let constant = |c: usize| Tensor::f_from_slice(&constants.columns[c][i..=i])?.f_reshape([] as [i64; 0]);
            for range in pieces(&matrix.range) {
                let mut piece = Piece {
                    w: narrow(buffers.values, &range)?,
                    g: narrow(buffers.grads, &range)?,
                    moments: buffers.moments.iter().map(|m| narrow(m, &range)).collect::<Result<_>>()?,
                    constants: [constant(0)?, constant(1)?, constant(2)?, constant(3)?, constant(4)?, constant(5)?],
                };
                let difference = formula(&mut piece)?;
                sums[i] += difference.f_dot(&difference)?.f_double_value(&[])?;
            }
        }
        Ok(sums)
    }
}

fn pieces(range: &Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.clone().step_by(PIECE).map(move |start| start..end.min(start + PIECE))
}

/// A configuration is refused before it comes to this.
fn refused(kind: Kind) -> tensor::torch::Error {
    tensor::torch::Error::Torch(format!("{kind:?} is not in the torch engine"))
}

fn narrow(x: &Tensor, range: &Range<usize>) -> Result<Tensor> {
    x.f_narrow(0, range.start as i64, range.len() as i64)
}

impl Constants {
    /// The first is L2 decay. Adam: 1 - β1, 1 - β2, 1/√(1 - β2^t), γ/(1 - β1^t), γλ. SGD and LARS: μ, what the gradient and what the velocity is
    /// multiplied by. A matrix that does not move keeps weights and moments.
    fn push(&mut self, optimizer: &Optimizer, matrix: &Matrix) {
        let settings = optimizer.settings();
        let decay = if matrix.decays { settings.weight_decay } else { 0.0 };
        let on = if matrix.moves { 1.0 } else { 0.0 };
        let rate = matrix.rate * on;
        let (kind, left) = (optimizer.kind(), |beta: f64| 1.0 - beta.powf(matrix.steps.max(1) as f64));
        let keep = if matrix.moves { settings.momentum } else { 1.0 };
        let values = match kind {
            Kind::Adam | Kind::AdamW => {
                let decoupled = kind == Kind::AdamW;
                [
                    if decoupled { 0.0 } else { decay },
                    (1.0 - settings.beta1) * on,
                    (1.0 - settings.beta2) * on,
                    1.0 / left(settings.beta2).sqrt(),
                    rate / left(settings.beta1),
                    if decoupled { rate * decay } else { 0.0 },
                ]
            }
            Kind::Sgd => [decay, keep, on, rate, 0.0, 0.0],
            Kind::Lars => [decay, keep, rate, on, 0.0, 0.0],
            Kind::Lion | Kind::Muon => [0.0; 6], // refused before a step
        };
        self.columns.iter_mut().zip(values).for_each(|(column, value)| column.push(value as f32));
    }
}

/// Moves the moments of Adam and returns what the weights lose.
fn adam(piece: &mut Piece, mut g: Tensor, eps: f64) -> Result<Tensor> {
    let [_, rest1, rest2, correction, step, shrink] = &piece.constants;
    let [m, v] = &mut piece.moments[..] else { unreachable!("Adam has two moments") };
    let _ = m.f_lerp_tensor_(&g, rest1)?;
    let _ = g.f_square_()?;
    let _ = v.f_lerp_tensor_(&g, rest2)?;
    let mut divisor = v.f_sqrt()?;
    let _ = divisor.f_mul_(correction)?.f_add_scalar_(eps)?;
    let mut difference = m.f_div(&divisor)?;
    let _ = difference.f_mul_(step)?;
    difference.f_addcmul_(&piece.w, shrink)
}

/// Moves the velocity of SGD or LARS and returns what the weights lose.
fn momentum(piece: &mut Piece, mut g: Tensor) -> Result<Tensor> {
    let [_, keep, gradient, velocity, ..] = &piece.constants;
    let _ = g.f_mul_(gradient)?;
    match piece.moments.first_mut() {
        Some(v) => {
            let _ = v.f_mul_(keep)?.f_add_(&g)?;
            v.f_mul(velocity)
        }
        None => g.f_mul(velocity),
    }
}
