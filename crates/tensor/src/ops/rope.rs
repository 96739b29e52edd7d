//! Rotary embedding at given positions, for rows that are not a whole document. Attention itself rotates where rows are positions.

use crate::kernels::parallel;
use crate::kernels::simd::narrow;
use crate::profile::Cost;
use crate::{Engine, Real, Tape, Value};
use candle_core::{Device, Tensor};
use std::sync::Arc;

/// Turns every head of a row by its position, halves rotated as in Hugging Face's Llama (Su 2104.09864): x [n, heads·dh], dh even, positions [n].
pub fn rope<'a, T: Real>(
    tape: &mut Tape<'a, T>,
    x: &Value<T>,
    heads: usize,
    base: f64,
    positions_n: &Arc<[u32]>,
) -> Value<T> {
    let (n, width) = (x.rows(), x.width());
    assert!(width.is_multiple_of(2 * heads), "rope: heads must be even and fill a row");
    assert_eq!(positions_n.len(), n, "rope: one position for each row");
    let _span = tape.span("rope", Cost::new::<T>(0, 2 * n * width));
    let half = width / heads / 2;
    if tape.engine() == Engine::Reference {
        let positions_n = positions_n.clone();
        let formula = move |t: &[Tensor]| {
            let x = t[0].reshape((n, heads, 2 * half))?;
            let angle = |i: usize| f64::from(positions_n[i / half]) * base.powf(-((i % half) as f64) / half as f64);
            let table = |f: fn(f64) -> f64| {
                let data: Vec<f64> = (0..n * half).map(|i| f(angle(i))).collect();
                let half_nd = Tensor::from_vec(data, (n, 1, half), &Device::Cpu)?.to_dtype(x.dtype())?;
                Tensor::cat(&[&half_nd, &half_nd], 2)
            };
            let (low, high) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
            let turned = Tensor::cat(&[&high.neg()?, &low], 2)?;
            let y = (x.broadcast_mul(&table(f64::cos)?)? + turned.broadcast_mul(&table(f64::sin)?)?)?;
            Ok(vec![y.reshape((n, width))?])
        };
        return tape.reference(&[x], &[], formula).remove(0);
    }
    let angles: Vec<f64> = (0..half).map(|d| base.powf(-(d as f64) / half as f64)).collect();
    let turn = move |data: &mut [T], positions_n: &[u32], sign: f64| {
        parallel::rows(data, width, |t, row| {
            let position = f64::from(positions_n[t]);
            for (d, angle) in angles.iter().enumerate() {
                let (sin, cos) = (sign * position * angle).sin_cos();
                let (sin, cos): (T, T) = (narrow(sin), narrow(cos));
                for head in row.chunks_exact_mut(2 * half) {
                    (head[d], head[d + half]) =
                        (head[d] * cos - head[d + half] * sin, head[d + half] * cos + head[d] * sin);
                }
            }
        });
    };
    let mut y = tape.arena().copy(x.data());
    turn(&mut y, positions_n, 1.0);
    let y = tape.output(y, n, width, x.needs_grad());
    if y.needs_grad() {
        let (positions_n, x, y) = (positions_n.clone(), x.slot(), y.slot());
        tape.record(move |grads| {
            let Some(dy) = grads.take(y) else { return };
            let mut dx = grads.arena().copy(&dy);
            turn(&mut dx, &positions_n, -1.0);
            grads.give(x, dx);
        });
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{self, Input, generated};
    use crate::ops::attention::{Attention, Position, attention};
    use crate::random::{Purpose, Random};
    use proptest::prelude::*;

    #[test]
    fn gradients_agree_with_differences_and_with_the_reference() {
        for (rows, heads, width) in [(0, 1, 2), (1, 1, 2), (5, 3, 12), (40, 2, 64)] {
            let positions: Arc<[u32]> = (0..rows as u32).map(|i| i * i % 31).collect();
            let inputs = [Input::random(1, rows, width, 1.0)];
            let op = |tape: &mut Tape<'_, f64>, v: &[Value<f64>]| vec![rope(tape, &v[0], heads, 100.0, &positions)];
            if rows > 0 {
                assert!(check::parity::<f64>(&inputs, &[], op) < 1e-13, "{rows} {heads} {width}");
            }
            if rows < 40 {
                assert!(check::worst(Engine::Cpu, &inputs, &[], op) < 1e-8, "{rows} {heads} {width}");
            }
        }
    }

    fn apart<T: Real>(rows: usize, (heads, half): (usize, usize), base: f64, magnitude: f64, seed: u64) -> f64 {
        let random = Random::new(seed, Purpose::Test);
        let positions: Arc<[u32]> = (0..rows as u64).map(|t| random.below(t, 0, 1 << 17) as u32).collect();
        let inputs = [Input::random(seed, rows, 2 * heads * half, magnitude)];
        check::apart::<T>(&inputs, &[], &[1.0, 1.0, magnitude], |tape, v| {
            vec![rope(tape, &v[0], heads, base, &positions)]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn any_heads_positions_and_magnitude_agree_with_the_reference(
            rows in generated::rows(),
            heads in (1usize..7, generated::width()),
            base in 2.0..1e6,
            magnitude in generated::magnitude(),
            seed in 0u64..1000,
        ) {
            let wide = apart::<f64>(rows, heads, base, magnitude, seed);
            let narrow = apart::<f32>(rows, heads, base, magnitude, seed);
            prop_assert!(wide < 1e-13 && narrow < 1e-5, "{} {}", wide, narrow);
        }
    }

    #[test]
    fn at_the_positions_of_a_document_it_is_the_rotation_of_attention() {
        let offsets: Arc<[usize]> = [0, 4, 9].into();
        let positions: Arc<[u32]> = (0..4).chain(0..5).collect();
        let inputs = [Input::random(1, 9, 24, 1.0), Input::random(2, 9, 12, 1.0), Input::random(3, 9, 12, 1.0)];
        let spec = |position| Attention { heads: 4, kv_heads: 2, window: None, position };
        let run = |outside: bool| {
            check::analytic::<f64>(Engine::Cpu, &inputs, &[], |tape, v| {
                if !outside {
                    return vec![attention(
                        tape,
                        [&v[0], &v[1], &v[2]],
                        &offsets,
                        spec(Position::Rope { base: 50.0 }),
                        None,
                    )];
                }
                let (q, k) = (rope(tape, &v[0], 4, 50.0, &positions), rope(tape, &v[1], 2, 50.0, &positions));
                vec![attention(tape, [&q, &k, &v[2]], &offsets, spec(Position::None), None)]
            })
        };
        let ((a, da), (b, db)) = (run(false), run(true));
        assert!((a - b).abs() < 1e-12);
        da.iter().flatten().zip(db.iter().flatten()).for_each(|(a, b)| assert!((a - b).abs() < 1e-12));
    }
}
