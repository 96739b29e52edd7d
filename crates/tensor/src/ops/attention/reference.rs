//! The definition: plain candle formulas, document by document and head by head. Slow and simple.

use super::{Attention, Mixture, Position, Reach};
use crate::{Real, Tape, Value};
use candle_core::{D, Device, Result, Tensor};
use std::sync::Arc;

pub(super) fn attention<'a, T: Real>(
    tape: &mut Tape<'a, T>,
    [q, k, v]: [&Value<T>; 3],
    offsets_b1: &Arc<[usize]>,
    (spec, reach): (Attention, Reach),
    mixture: Option<Mixture<'_, T>>,
) -> (Value<T>, Vec<T>) {
    let tables = match spec.position {
        Position::Cope { table } => vec![table],
        _ => Vec::new(),
    };
    let mut values = vec![q, k, v];
    values.extend(mixture.as_ref().map(|mixture| mixture.gates_nh));
    let mut outputs = tape.reference(&values, &tables, |x| {
        let table = x.get(values.len());
        let dh = x[0].dim(1)? / spec.heads;
        let (mut documents, mut entropies) = (Vec::new(), Vec::new());
        for bounds in offsets_b1.windows(2).filter(|b| b[0] < b[1]) {
            let (start, t) = (bounds[0], bounds[1] - bounds[0]);
            let (mut heads, mut entropies_th) = (Vec::new(), Vec::new());
            for h in 0..spec.heads {
                let part = |x: &Tensor, h: usize| x.narrow(0, start, t)?.narrow(1, h * dh, dh)?.contiguous();
                let g = h / (spec.heads / spec.kv_heads);
                let parts = [part(&x[0], h)?, part(&x[1], g)?, part(&x[2], g)?];
                let (y, entropy) = head(parts, table, spec.position, |i| reach.first(start + i, i))?;
                heads.push(y);
                entropies_th.push(entropy);
            }
            documents.push(Tensor::cat(&heads, 1)?);
            entropies.push(Tensor::cat(&entropies_th, 1)?);
        }
        // An empty batch returns its (empty) queries.
        let y = if documents.is_empty() { x[0].clone() } else { Tensor::cat(&documents, 0)? };
        let y = match &mixture {
            Some(mixture) => scale(&y, &x[3], mixture, spec)?,
            None => y,
        };
        let measured = reach.windows_n.is_some() && !entropies.is_empty();
        Ok(if measured { vec![y, Tensor::cat(&entropies, 0)?.detach()] } else { vec![y] })
    });
    let y = outputs.remove(0);
    (y, outputs.pop().map_or(Vec::new(), |entropies| entropies.data().to_vec()))
}

/// Every head's output times its gate, or zero where the head does not serve the token.
fn scale<T: Real>(y: &Tensor, gates_nh: &Tensor, mixture: &Mixture<'_, T>, spec: Attention) -> Result<Tensor> {
    let (n, width) = y.dims2()?;
    let choice = mixture.choice();
    let served_nh = constant(y, n, spec.heads, |t, h| if choice.serves(h, t) { 1.0 } else { 0.0 })?;
    let gates = gates_nh.mul(&served_nh)?.unsqueeze(2)?;
    y.reshape((n, spec.heads, width / spec.heads))?.broadcast_mul(&gates)?.reshape((n, width))
}

/// A constant [rows, cols] in the float type of `like`.
fn constant(like: &Tensor, rows: usize, cols: usize, f: impl Fn(usize, usize) -> f64) -> Result<Tensor> {
    let data: Vec<f64> = (0..rows * cols).map(|x| f(x / cols, x % cols)).collect();
    Tensor::from_vec(data, (rows, cols), &Device::Cpu)?.to_dtype(like.dtype())
}

/// One head of one document: q, k, v [t, dh] -> [t, dh], and the entropies of its weights [t, 1].
fn head(
    [q, k, v]: [Tensor; 3],
    table: Option<&Tensor>,
    position: Position,
    first: impl Fn(usize) -> usize,
) -> Result<(Tensor, Tensor)> {
    let (t, dh) = q.dims2()?;
    let visible = |i: usize, j: usize| if first(i) <= j && j <= i { 1.0 } else { 0.0 };
    let mask_tt = constant(&q, t, t, visible)?;
    let (q, k) = match position {
        Position::Rope { base } => (rotate(&q, base)?, rotate(&k, base)?),
        _ => (q, k),
    };
    let u_tt = (q.matmul(&k.t()?)? * (1.0 / (dh as f64).sqrt()))?;
    let s_tt = match table {
        Some(table) => (&u_tt + cope(&q, &u_tt, &mask_tt, table)?)?,
        None => u_tt,
    };
    let hidden = constant(&q, t, t, |_, _| f64::NEG_INFINITY)?;
    let s_tt = mask_tt.ne(0.0)?.where_cond(&s_tt, &hidden)?;
    let e_tt = s_tt.broadcast_sub(&s_tt.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let w_tt = e_tt.broadcast_div(&e_tt.sum_keepdim(D::Minus1)?)?;
    let entropy = (&w_tt * (&w_tt + 1e-30)?.log()?)?.sum_keepdim(D::Minus1)?.neg()?;
    Ok((w_tt.matmul(&v)?, entropy))
}

/// x·cos + rotate_half(x)·sin.
fn rotate(x: &Tensor, base: f64) -> Result<Tensor> {
    let (t, dh) = x.dims2()?;
    let half = dh / 2;
    let angle = |i: usize, d: usize| i as f64 * base.powf(-((d % half) as f64) / half as f64);
    let (low, high) = (x.narrow(1, 0, half)?, x.narrow(1, half, half)?);
    let turned = Tensor::cat(&[&high.neg()?, &low], 1)?;
    let (cos, sin) = (constant(x, t, dh, |i, d| angle(i, d).cos())?, constant(x, t, dh, |i, d| angle(i, d).sin())?);
    (x * cos)? + (turned * sin)?
}

/// The CoPE bias b [t, t]. Which rows of the table a pair falls between, and whether its position is clamped, is constant.
fn cope(q: &Tensor, u_tt: &Tensor, mask_tt: &Tensor, table: &Tensor) -> Result<Tensor> {
    let t = q.dim(0)?;
    let rows = table.dim(0)?;
    let last = (rows - 1) as f64;
    // σ(u) = (1 + tanh(u/2)) / 2: no overflow in the derivative.
    let gate_tt = (((u_tt * 0.5)?.tanh()? + 1.0)? * 0.5)?.mul(mask_tt)?;
    let from_j = constant(q, t, t, |t, j| if t >= j { 1.0 } else { 0.0 })?;
    let sum_tt = gate_tt.matmul(&from_j)?;
    let position: Vec<Vec<f64>> = sum_tt.detach().to_dtype(candle_core::DType::F64)?.to_vec2()?;
    let free_tt = constant(q, t, t, |i, j| if position[i][j] < last { 1.0 } else { 0.0 })?;
    let below = |i: usize, j: usize| position[i][j].min(last).floor().min(last - 1.0);
    let p_tt = ((&sum_tt * &free_tt)? + ((1.0 - &free_tt)? * last)?)?;
    let f_tt = (p_tt - constant(q, t, t, below)?)?;
    let z_tp = q.matmul(&table.t()?)?.reshape((t, rows, 1))?;
    let pick = |step: f64| -> Result<Tensor> {
        let hot = constant(q, t * t, rows, |x, n| if below(x / t, x % t) + step == n as f64 { 1.0 } else { 0.0 })?;
        hot.reshape((t, t, rows))?.matmul(&z_tp)?.reshape((t, t))
    };
    ((1.0 - &f_tt)? * pick(0.0)?)? + (f_tt * pick(1.0)?)?
}
