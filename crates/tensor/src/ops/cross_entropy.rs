//! Cross-entropy fused with the output projection, in chunks of rows: Σ w_t (lse_t − logit_t[target_t]) / Σ w_t with logits = x Wᵀ.
//! No [n, v] array is kept: while recording, a chunk's logits are turned into gradients of x and W at once and dropped (the loss is
//! linear in its upstream gradient, which enters later as one factor). With label smoothing s (Szegedy 2016, arXiv 1512.00567) the targets are
//! (1 − s)·onehot + s/v, so that a row's objective is its cross-entropy + s·(logit[target] − mean of its logits).

use crate::kernels::gemm::{Matrix, Packed, Side, matmul};
use crate::kernels::parallel;
use crate::kernels::simd::{self, Kernel, exp};
use crate::profile::{Cost, Work};
use crate::{Buffer, Engine, Param, Real, Tape, Value};
use candle_core::{D, Device, Tensor};
use std::sync::Arc;

/// Logits that live at one time, in numbers.
const CHUNK: usize = 1 << 19;

/// Rows of a chunk at least: fewer would read W too often.
const LEAST: usize = 256;

/// Running sums of a row.
const SUMS: usize = 16;

/// What is predicted: targets and loss weights by row.
#[derive(Clone, Debug)]
pub struct Targets {
    pub ids_n: Arc<[u32]>,
    /// Weights w_t >= 0; a row of weight 0 has no target.
    pub weights_n: Arc<[f64]>,
}

/// The mean loss as a [1, 1] value and the loss of every row (nats). `weight` is [v, d]. Zero total weight gives loss 0.
pub fn cross_entropy<'a, T: Real>(
    tape: &mut Tape<'a, T>,
    x: &Value<T>,
    weight: Param,
    targets: &Targets,
) -> (Value<T>, Vec<f64>) {
    smoothed(tape, x, weight, targets, 0.0)
}

/// The same with label smoothing from 0 to below 1. The value is smoothed, the losses of the rows are the plain ones.
pub fn smoothed<'a, T: Real>(
    tape: &mut Tape<'a, T>,
    x: &Value<T>,
    weight: Param,
    targets: &Targets,
    smoothing: f64,
) -> (Value<T>, Vec<f64>) {
    let (n, d, v) = (x.rows(), x.width(), weight.rows);
    assert!(targets.ids_n.len() == n && targets.weights_n.len() == n, "cross_entropy: one target and weight per row");
    assert!(targets.ids_n.iter().all(|id| (*id as usize) < v), "cross_entropy: target outside the vocabulary");
    let _span = tape.span("cross_entropy", cost::<T>(n, d, v, tape.recording()));
    let total: f64 = targets.weights_n.iter().sum();
    let share_n: Vec<f64> = targets.weights_n.iter().map(|w| if total > 0.0 { w / total } else { 0.0 }).collect();
    if tape.engine() == Engine::Reference {
        return reference(tape, x, weight, targets, &share_n, smoothing);
    }
    let needs = tape.recording() && (x.needs_grad() || weight.trainable);
    let precision = tape.precision();
    let w_vd = &tape.param(&weight)[..v * d];
    let mut losses_n = vec![RowLoss::default(); n];
    let mut dx_nd: Option<Buffer<T>> = (needs && x.needs_grad()).then(|| tape.arena().take(n * d));
    let mut dw_vd: Option<Buffer<T>> = (needs && weight.trainable && n > 0).then(|| tape.arena().take(v * d));
    let rows = (CHUNK / v).max(LEAST).min(n);
    let mut logits = tape.arena().take(rows * v);
    let side = |matrix| Side { matrix, precision, rows: n };
    let w = Matrix::new(w_vd, v, d);
    let packed = Packed::new(tape.arena(), if needs { vec![side(w.t()), side(w)] } else { vec![side(w.t())] }, true);
    for start in (0..n).step_by(rows.max(1)) {
        let c = rows.min(n - start);
        let block = parallel::block(c);
        let (x_cd, logits_cv) = (&x.data()[start * d..(start + c) * d], &mut logits[..c * v]);
        let dx_cd = dx_nd.as_mut().map_or(&mut [][..], |dx_nd| &mut dx_nd[start * d..(start + c) * d]);
        let blocks = losses_n[start..start + c].chunks_mut(block).zip(logits_cv.chunks_mut(block * v));
        let mut dx_blocks = dx_cd.chunks_mut(block * d);
        let blocks = blocks.zip(x_cd.chunks(block * d)).map(|part| (part, dx_blocks.next()));
        parallel::each(true, blocks.enumerate().collect(), |(b, (((losses, logits_bv), x_bd), dx_bd))| {
            let rows = losses.len();
            packed.multiply(0, logits_bv, Matrix::new(x_bd, rows, d), false);
            for (i, (loss, row_v)) in losses.iter_mut().zip(logits_bv.chunks_mut(v)).enumerate() {
                let t = start + b * block + i;
                let (target, share) = (targets.ids_n[t] as usize, T::from_f64(share_n[t]));
                let share = needs.then_some(share);
                *loss = simd::dispatch(Row { row_v, target, share, smoothing: T::from_f64(smoothing) });
            }
            if let Some(dx_bd) = dx_bd {
                packed.multiply(1, dx_bd, Matrix::new(logits_bv, rows, v), false);
            }
        });
        if let Some(dw_vd) = &mut dw_vd {
            let (dlogits, x_cd) = (Matrix::new(&logits[..c * v], c, v), Matrix::new(x_cd, c, d));
            matmul(precision, dw_vd, dlogits.t(), x_cd, start > 0);
        }
    }
    let mean: f64 = losses_n.iter().zip(&share_n).map(|(l, s)| if *s == 0.0 { 0.0 } else { l.objective * s }).sum();
    let mut out = tape.arena().take(1);
    out[0] = T::from_f64(mean);
    let loss = tape.output(out, 1, 1, needs);
    if loss.needs_grad() {
        let (x, slot) = (x.slot(), loss.slot());
        tape.record(move |grads| {
            let Some(upstream) = grads.take(slot) else { return };
            if let (Some(from), Some(to)) = (dw_vd, grads.param(&weight)) {
                to.iter_mut().zip(from.iter()).for_each(|(t, f)| *t += *f * upstream[0]);
            }
            if let Some(mut dx_nd) = dx_nd {
                if upstream[0] != T::ONE {
                    dx_nd.iter_mut().for_each(|d| *d *= upstream[0]);
                }
                grads.give(x, dx_nd);
            }
        });
    }
    (loss, losses_n.into_iter().map(|loss| loss.plain).collect())
}

/// Cross-entropy of a row, and what of it is minimised: the same without smoothing.
#[derive(Clone, Copy, Default)]
struct RowLoss {
    plain: f64,
    objective: f64,
}

/// While recording all products are forward's; backward scales the gradients of x and W.
fn cost<T>(n: usize, d: usize, v: usize, recording: bool) -> Cost {
    let product = Cost::product::<T>(n, d, v).forward;
    let times = if recording { 3 } else { 1 };
    let forward = Work { flops: times * product.flops, bytes: times * product.bytes };
    Cost { forward, backward: Work { flops: 0, bytes: (2 * n * d + 3 * d * v) * size_of::<T>() } }
}

/// The loss lse(logits) − logits[target] of one row, stable for any finite logits, and the smoothed one. With a share the logits become
/// share·(softmax − (1 − smoothing)·onehot − smoothing/v).
struct Row<'s, T> {
    row_v: &'s mut [T],
    target: usize,
    share: Option<T>,
    smoothing: T,
}

impl<T: Real> Kernel for Row<'_, T> {
    type Output = RowLoss;

    #[inline(always)]
    fn run(self) -> RowLoss {
        let (row_v, target, smoothing) = (self.row_v, self.target, self.smoothing);
        let smooths = smoothing > T::ZERO;
        let v = T::from_f64(row_v.len() as f64);
        let mut tops = [-T::INFINITY; SUMS];
        for lanes in row_v.chunks(SUMS) {
            tops.iter_mut().zip(lanes).for_each(|(top, x)| *top = if *x > *top { *x } else { *top });
        }
        let top = tops.into_iter().fold(-T::INFINITY, |top, x| Real::max(top, x));
        let at_target = row_v[target];
        let mut mean = T::ZERO;
        if smooths {
            let mut sums = [T::ZERO; SUMS];
            for lanes in row_v.chunks(SUMS) {
                sums.iter_mut().zip(lanes).for_each(|(sum, x)| *sum += *x - top);
            }
            mean = top + sums.into_iter().sum::<T>() / v;
        }
        // Running sums in a fixed order, so that the additions vectorise the same way on every machine.
        let mut sums = [T::ZERO; SUMS];
        for lanes in row_v.chunks_mut(SUMS) {
            for (sum, x) in sums.iter_mut().zip(lanes) {
                *x = exp(*x - top);
                *sum += *x;
            }
        }
        let sum: T = sums.into_iter().sum();
        if let Some(share) = self.share {
            let scale = share / sum;
            row_v.iter_mut().for_each(|x| *x *= scale);
            if smooths {
                let spread = share * smoothing / v;
                row_v.iter_mut().for_each(|x| *x -= spread);
            }
            row_v[target] -= share - share * smoothing;
        }
        let plain = (top + sum.ln() - at_target).to_f64();
        let objective = if smooths { plain + (smoothing * (at_target - mean)).to_f64() } else { plain };
        RowLoss { plain, objective }
    }
}

fn reference<'a, T: Real>(
    tape: &mut Tape<'a, T>,
    x: &Value<T>,
    weight: Param,
    targets: &Targets,
    share_n: &[f64],
    smoothing: f64,
) -> (Value<T>, Vec<f64>) {
    let n = x.rows();
    if n == 0 {
        return (tape.constant(&[T::ZERO], 1, 1), Vec::new());
    }
    let outputs = tape.reference(&[x], &[weight], |t| {
        let logits = t[0].matmul(&t[1].t()?)?;
        let top = logits.max_keepdim(D::Minus1)?.detach();
        let lse = (logits.broadcast_sub(&top)?.exp()?.sum_keepdim(1)?.log()? + top)?;
        let ids = Tensor::from_slice(&targets.ids_n, (n, 1), &Device::Cpu)?;
        let at_target = logits.gather(&ids, 1)?;
        let losses = (lse - &at_target)?;
        let share = Tensor::from_slice(share_n, (n, 1), &Device::Cpu)?.to_dtype(losses.dtype())?;
        let objective = match smoothing > 0.0 {
            true => (&losses + ((at_target - logits.mean_keepdim(1)?)? * smoothing)?)?,
            false => losses.clone(),
        };
        Ok(vec![(objective * share)?.sum_all()?.reshape((1, 1))?, losses.detach()])
    });
    let losses = outputs[1].data().iter().map(|l| l.to_f64()).collect();
    (outputs[0].clone(), losses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::generated;
    use crate::random::{Purpose, Random};
    use crate::{Layout, check};
    use proptest::prelude::*;

    fn case(n: usize, d: usize, v: usize, scale: f64) -> ([check::Input; 1], Vec<f64>, Param, Targets) {
        let layout = Layout::new([("w".into(), vec![v, d], true)]);
        let weights: Vec<f64> = (0..n).map(|i| [0.0, 1.0, 0.25][i % 3]).collect();
        let targets =
            Targets { ids_n: (0..n).map(|i| (i * 5 % v) as u32).collect::<Vec<_>>().into(), weights_n: weights.into() };
        let params = check::normals(1, layout.len(), scale);
        ([check::Input::random(2, n, d, scale)], params, layout.get("w").unwrap(), targets)
    }

    #[test]
    fn gradients_agree_with_differences_and_with_the_reference() {
        for (n, d, v) in [(0, 2, 3), (1, 2, 3), (2, 1, 1), (7, 4, 11), (40, 3, 5)] {
            let (inputs, params, weight, targets) = case(n, d, v, 1.0);
            let op = |tape: &mut Tape<'_, f64>, x: &[Value<f64>]| vec![cross_entropy(tape, &x[0], weight, &targets).0];
            let worst = check::worst(Engine::Cpu, &inputs, &params, op);
            assert!(worst < 1e-8, "{n} {d} {v}: {worst}");
            assert!(check::parity::<f64>(&inputs, &params, op) < 1e-12);
        }
    }

    #[test]
    fn many_chunks_equal_one_formula_and_row_losses_are_right() {
        let (inputs, params, weight, targets) = case(300, 2, 4000, 1.0);
        let op = |tape: &mut Tape<'_, f64>, x: &[Value<f64>]| vec![cross_entropy(tape, &x[0], weight, &targets).0];
        assert!(check::parity::<f64>(&inputs, &params, op) < 1e-12);
        let arena = crate::Arena::default();
        let mut tape = Tape::inference(Engine::Cpu, &params, &arena);
        let x = tape.constant(&inputs[0].data, 300, 2);
        let (loss, rows) = cross_entropy(&mut tape, &x, weight, &targets);
        let total: f64 = targets.weights_n.iter().sum();
        let mean: f64 = rows.iter().zip(targets.weights_n.iter()).map(|(l, w)| l * w / total).sum();
        assert!((loss.scalar() - mean).abs() < 1e-12);
    }

    #[test]
    fn smoothed_gradients_agree_with_differences_and_with_the_reference() {
        for (n, d, v) in [(0, 2, 3), (1, 2, 3), (2, 1, 1), (7, 4, 37), (40, 3, 5)] {
            for smoothing in [0.0, 0.1, 0.7] {
                let (inputs, params, weight, targets) = case(n, d, v, 1.0);
                let op = |tape: &mut Tape<'_, f64>, x: &[Value<f64>]| {
                    vec![smoothed(tape, &x[0], weight, &targets, smoothing).0]
                };
                let worst = check::worst(Engine::Cpu, &inputs, &params, op);
                assert!(worst < 1e-8, "{n} {d} {v} {smoothing}: {worst}");
                assert!(check::parity::<f64>(&inputs, &params, op) < 1e-12);
                assert!(
                    check::parity::<f32>(&inputs, &params, |tape, x| {
                        vec![smoothed(tape, &x[0], weight, &targets, smoothing).0]
                    }) < 1e-5
                );
            }
        }
    }

    /// Any targets, with weights of which about `share` are not zero.
    fn targets((n, v): (usize, usize), share: f64, seed: u64) -> Targets {
        let random = Random::new(seed, Purpose::Test);
        let weight = |t| if random.uniform(t, 1) < share { [0.25, 1.0, 3.0][random.below(t, 2, 3)] } else { 0.0 };
        Targets {
            ids_n: (0..n as u64).map(|t| random.below(t, 0, v) as u32).collect(),
            weights_n: (0..n as u64).map(weight).collect(),
        }
    }

    /// Loss, losses of the rows and gradients, for logits of about `size`.
    fn apart<T: Real>(
        (n, d, v): (usize, usize, usize),
        targets: &Targets,
        smoothing: f64,
        size: f64,
        seed: u64,
    ) -> f64 {
        let layout = Layout::new([("w".into(), vec![v, d], true)]);
        let magnitude = (size / (d as f64).sqrt()).sqrt();
        let (weight, params) = (layout.get("w").unwrap(), check::normals(seed, layout.len(), magnitude));
        let inputs = [check::Input::random(seed + 1, n, d, magnitude)];
        // A row's gradient is about its share of the loss, times a row of W or of x.
        let counted = targets.weights_n.iter().filter(|w| **w > 0.0).count().max(1) as f64;
        let typical = [magnitude / counted, magnitude / counted, 1.0 + size, 1.0 + size];
        check::apart::<T>(&inputs, &params, &typical, |tape, x| {
            let (loss, rows) = smoothed(tape, &x[0], weight, targets, smoothing);
            let rows: Vec<T> = rows.into_iter().map(T::from_f64).collect();
            vec![loss, tape.constant(&rows, n, 1)]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn any_shape_targets_and_smoothing_agree_with_the_reference(
            shape in prop_oneof![
                30 => (generated::rows(), generated::width(), prop_oneof![generated::width(), 40..600usize]),
                1 => (2 * LEAST..2 * LEAST + 30, 1..4usize, CHUNK / LEAST..CHUNK / LEAST + 40), // three chunks
            ],
            share in prop_oneof![Just(0.0), Just(0.3), Just(1.0)],
            smoothing in prop_oneof![Just(0.0), 0.0..0.9],
            size in generated::magnitude(),
            seed in 0u64..1000,
        ) {
            let targets = targets((shape.0, shape.2), share, seed);
            let wide = apart::<f64>(shape, &targets, smoothing, size, seed);
            let narrow = apart::<f32>(shape, &targets, smoothing, size, seed);
            prop_assert!(wide < 1e-12 && narrow < 1e-4, "{} {}", wide, narrow);
        }
    }

    #[test]
    fn bytes_do_not_depend_on_the_number_of_threads() {
        let (inputs, params, weight, targets) = case(600, 17, 2100, 1.0);
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let op = |tape: &mut Tape<'_, f32>, x: &[Value<f32>]| {
                let (loss, rows) = smoothed(tape, &x[0], weight, &targets, 0.1);
                let rows: Vec<f32> = rows.into_iter().map(|loss| loss as f32).collect();
                vec![loss, tape.constant(&rows, 600, 1)]
            };
            let (value, gradients) = pool.install(|| check::analytic::<f32>(Engine::Cpu, &inputs, &params, op));
            (value.to_bits(), gradients.into_iter().flatten().map(f64::to_bits).collect::<Vec<_>>())
        };
        let one = run(1);
        assert!([2, 3, 8].into_iter().all(|threads| run(threads) == one));
    }

    #[test]
    fn smoothing_is_the_cross_entropy_of_softened_targets_and_leaves_row_losses_plain() {
        let (n, d, v, s) = (9, 3, 50, 0.2);
        let (inputs, params, weight, targets) = case(n, d, v, 1.0);
        let arena = crate::Arena::default();
        let mut tape = Tape::inference(Engine::Cpu, &params, &arena);
        let x = tape.constant(&inputs[0].data, n, d);
        let (plain, rows) = cross_entropy(&mut tape, &x, weight, &targets);
        let (soft, same_rows) = smoothed(&mut tape, &x, weight, &targets, s);
        assert_eq!(rows, same_rows);
        assert_eq!(smoothed(&mut tape, &x, weight, &targets, 0.0).0.scalar(), plain.scalar());
        // Σ over the vocabulary of -q log p, told plainly.
        let total: f64 = targets.weights_n.iter().sum();
        let mut expected = 0.0;
        for t in 0..n {
            let logit = |c: usize| -> f64 {
                (0..d).map(|j| inputs[0].data[t * d + j] * params[weight.range(0)][c * d + j]).sum()
            };
            let lse = (0..v).map(|c| logit(c).exp()).sum::<f64>().ln();
            let q = |c: usize| s / v as f64 + if c == targets.ids_n[t] as usize { 1.0 - s } else { 0.0 };
            expected += targets.weights_n[t] / total * (0..v).map(|c| q(c) * (lse - logit(c))).sum::<f64>();
        }
        assert!((soft.scalar() - expected).abs() < 1e-12 && (soft.scalar() - plain.scalar()).abs() > 1e-3);
    }

    #[test]
    fn extreme_logits_stay_finite() {
        let (inputs, params, weight, targets) = case(6, 3, 5, 100.0);
        let (value, gradients) = check::analytic::<f32>(Engine::Cpu, &inputs, &params, |tape, x| {
            vec![cross_entropy(tape, &x[0], weight, &targets).0]
        });
        assert!(value.is_finite() && gradients.iter().flatten().all(|g| g.is_finite()));
    }
}
