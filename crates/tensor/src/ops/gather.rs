//! Some rows of an array, and the way back: `gather` takes them out, `scatter` adds multiples of rows to them. Together they run a layer on a part
//! of the tokens only.

use crate::kernels::parallel;
use crate::profile::Cost;
use crate::tape::add;
use crate::{Engine, Real, Tape, Value};
use candle_core::{Device, Result, Tensor};
use std::sync::Arc;

/// Panics unless the rows rise strictly and lie in 0..n.
fn check(rows_m: &[u32], n: usize) {
    assert!(
        rows_m.is_sorted_by(|a, b| a < b) && rows_m.last().is_none_or(|&last| (last as usize) < n),
        "gather: rows must rise and lie inside the array"
    );
}

fn indices(rows_m: &[u32]) -> Result<Tensor> {
    Tensor::from_slice(rows_m, rows_m.len(), &Device::Cpu)
}

/// x [n, d] -> its rows `rows_m` [m, d], which rise strictly.
pub fn gather<'a, T: Real>(tape: &mut Tape<'a, T>, x: &Value<T>, rows_m: &Arc<[u32]>) -> Value<T> {
    let (m, d) = (rows_m.len(), x.width());
    check(rows_m, x.rows());
    let _span = tape.span("gather", Cost::new::<T>(0, 2 * m * d));
    if tape.engine() == Engine::Reference {
        return tape.reference(&[x], &[], |t| Ok(vec![t[0].index_select(&indices(rows_m)?, 0)?])).remove(0);
    }
    let mut y_md = tape.arena().take(m * d);
    parallel::rows(&mut y_md, d, |i, y_d| y_d.copy_from_slice(&x.data()[rows_m[i] as usize * d..][..d]));
    let y = tape.output(y_md, m, d, x.needs_grad());
    if y.needs_grad() {
        let (rows_m, x, y) = (rows_m.clone(), x.slot(), y.slot());
        tape.record(move |grads| {
            let Some(dy_md) = grads.take(y) else { return };
            grads.add(x, |dx_nd| {
                let rows = rows_m.iter().zip(dy_md.chunks_exact(d));
                rows.for_each(|(&row, dy_d)| add(&mut dx_nd[row as usize * d..][..d], dy_d));
            });
        });
    }
    y
}

/// x [n, d] with factor_m1[i] · y_md[i] added to row rows_m[i]; the other rows are those of x, to the bit.
pub fn scatter<'a, T: Real>(
    tape: &mut Tape<'a, T>,
    x: &Value<T>,
    y: &Value<T>,
    factor: &Value<T>,
    rows_m: &Arc<[u32]>,
) -> Value<T> {
    let (m, d) = (rows_m.len(), x.width());
    check(rows_m, x.rows());
    assert!((y.rows(), y.width()) == (m, d), "scatter: one row of y for each row to add to");
    assert!((factor.rows(), factor.width()) == (m, 1), "scatter: one factor for each row to add to");
    let _span = tape.span("scatter", Cost::new::<T>(0, 2 * x.data().len() + 3 * m * d));
    if tape.engine() == Engine::Reference {
        let formula = |t: &[Tensor]| Ok(vec![t[0].index_add(&indices(rows_m)?, &t[1].broadcast_mul(&t[2])?, 0)?]);
        return tape.reference(&[x, y, factor], &[], formula).remove(0);
    }
    let mut z_nd = tape.arena().copy(x.data());
    for (i, &row) in rows_m.iter().enumerate() {
        let r = factor.data()[i];
        let z_d = &mut z_nd[row as usize * d..][..d];
        z_d.iter_mut().zip(&y.data()[i * d..]).for_each(|(z, y)| *z += r * *y);
    }
    let z = tape.output(z_nd, x.rows(), d, x.needs_grad() || y.needs_grad() || factor.needs_grad());
    if z.needs_grad() {
        let (rows_m, x, y, factor, z) = (rows_m.clone(), x.slot(), y.clone(), factor.clone(), z.slot());
        tape.record(move |grads| {
            let Some(dz_nd) = grads.take(z) else { return };
            let dz = |i: usize| &dz_nd[rows_m[i] as usize * d..][..d];
            grads.add(factor.slot(), |dr_m| {
                for (i, dr) in dr_m.iter_mut().enumerate() {
                    *dr += y.data()[i * d..].iter().zip(dz(i)).map(|(y, dz)| *y * *dz).sum();
                }
            });
            grads.add(y.slot(), |dy_md| {
                parallel::rows(dy_md, d, |i, dy_d| {
                    let r = factor.data()[i];
                    dy_d.iter_mut().zip(dz(i)).for_each(|(dy, dz)| *dy += r * *dz);
                });
            });
            grads.give(x, dz_nd);
        });
    }
    z
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{self, Input, generated};
    use proptest::prelude::*;

    const ROWS: [&[u32]; 4] = [&[], &[3], &[0, 2, 5], &[0, 1, 2, 3, 4, 5]];

    #[test]
    fn gradients_agree_with_differences_and_with_the_reference() {
        for rows in ROWS {
            let rows: Arc<[u32]> = rows.into();
            let m = rows.len();
            let inputs = [Input::random(1, 6, 4, 1.0), Input::random(2, m, 4, 1.0), Input::random(3, m, 1, 1.0)];
            let op = |tape: &mut Tape<'_, f64>, v: &[Value<f64>]| {
                let taken = gather(tape, &v[0], &rows);
                let sum = scatter(tape, &v[0], &v[1], &v[2], &rows);
                // v[0] is used three times: its gradient accumulates.
                vec![scatter(tape, &sum, &taken, &v[2], &rows), taken]
            };
            assert!(check::worst(Engine::Cpu, &inputs, &[], op) < 1e-8, "{rows:?}");
            if m > 0 {
                assert!(check::parity::<f64>(&inputs, &[], op) < 1e-13, "{rows:?}");
            }
        }
    }

    fn apart<T: Real>(taken: &[bool], d: usize, magnitude: f64, seed: u64) -> f64 {
        let rows: Arc<[u32]> = (0u32..).zip(taken).filter(|(_, taken)| **taken).map(|(t, _)| t).collect();
        let (n, m) = (taken.len(), rows.len());
        let inputs = [(n, d, magnitude), (m, d, magnitude), (m, 1, 1.0)];
        let inputs = inputs.map(|(rows, width, scale)| Input::random(seed + width as u64, rows, width, scale));
        let typical = [1.0, 1.0, magnitude * (d as f64).sqrt(), 1.0, magnitude, magnitude];
        check::apart::<T>(&inputs, &[], &typical, |tape, v| {
            let some = gather(tape, &v[0], &rows);
            let sum = scatter(tape, &v[0], &v[1], &v[2], &rows);
            vec![scatter(tape, &sum, &some, &v[2], &rows), some]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn any_rows_and_magnitude_agree_with_the_reference(
            taken in generated::rows().prop_flat_map(|n| prop::collection::vec(any::<bool>(), n)),
            d in prop_oneof![4 => generated::width(), 1 => 80..300usize],
            magnitude in generated::magnitude(),
            seed in 0u64..1000,
        ) {
            let (wide, narrow) = (apart::<f64>(&taken, d, magnitude, seed), apart::<f32>(&taken, d, magnitude, seed));
            prop_assert!(wide < 1e-13 && narrow < 1e-4, "{} {}", wide, narrow);
        }
    }

    #[test]
    fn rows_that_are_not_named_keep_their_bits_and_all_rows_are_all() {
        let arena = crate::Arena::default();
        let mut tape = Tape::<f32>::inference(Engine::Cpu, &[], &arena);
        let numbers = |seed, len| check::normals(seed, len, 1.0).into_iter().map(|x| x as f32).collect::<Vec<f32>>();
        let x = tape.constant(&numbers(1, 24), 6, 4);
        let y = tape.constant(&numbers(2, 12), 3, 4);
        let factor = tape.constant(&numbers(3, 3), 3, 1);
        let rows: Arc<[u32]> = [1, 2, 5].into();
        let z = scatter(&mut tape, &x, &y, &factor, &rows);
        for t in 0..6 {
            let same = z.data()[t * 4..(t + 1) * 4] == x.data()[t * 4..(t + 1) * 4];
            assert_eq!(same, !rows.contains(&(t as u32)));
        }
        let all: Arc<[u32]> = (0..6).collect();
        assert_eq!(gather(&mut tape, &x, &all).data(), x.data());
    }
}
