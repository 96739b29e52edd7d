//! Sums of values: the residual `add`, and `weighted_sum` of scalars (the total loss).

use crate::kernels::parallel;
use crate::profile::{Cost, Work};
use crate::{Engine, Real, Tape, Value};

/// x + y, both [n, d].
pub fn add<'a, T: Real>(tape: &mut Tape<'a, T>, x: &Value<T>, y: &Value<T>) -> Value<T> {
    assert_eq!((x.rows(), x.width()), (y.rows(), y.width()), "add: shapes differ");
    let forward = Work { flops: 0, bytes: 3 * x.data().len() * size_of::<T>() };
    let _span = tape.span("add", Cost { forward, backward: Work::default() }); // gradients are passed on, not copied
    if tape.engine() == Engine::Reference {
        return tape.reference(&[x, y], &[], |t| Ok(vec![(&t[0] + &t[1])?])).remove(0);
    }
    let (n, d) = (x.rows(), x.width());
    let mut z_nd = tape.arena().take(n * d);
    parallel::rows(&mut z_nd, d, |i, z_d| {
        for ((z, x), y) in z_d.iter_mut().zip(&x.data()[i * d..]).zip(&y.data()[i * d..]) {
            *z = *x + *y;
        }
    });
    let z = tape.output(z_nd, n, d, x.needs_grad() || y.needs_grad());
    if z.needs_grad() {
        let (x, y, z) = (x.slot(), y.slot(), z.slot());
        tape.record(move |grads| {
            let Some(dz_nd) = grads.take(z) else { return };
            grads.give(y, dz_nd.clone()); // shared: no copy is made unless one side adds while the other is still in use
            grads.give(x, dz_nd);
        });
    }
    z
}

/// Σ c·s over [1, 1] values, as a [1, 1] value. A zero coefficient leaves its term out, of the gradient too.
pub fn weighted_sum<'a, T: Real>(tape: &mut Tape<'a, T>, terms: &[(&Value<T>, f64)]) -> Value<T> {
    let _span = tape.span("losses", Cost::default());
    let mut sum = tape.arena().zeros(1);
    for (value, coefficient) in terms.iter().filter(|(_, c)| *c != 0.0) {
        sum[0] += value.scalar() * T::from_f64(*coefficient);
    }
    let needs = terms.iter().any(|(value, c)| *c != 0.0 && value.needs_grad());
    let total = tape.output(sum, 1, 1, needs);
    if total.needs_grad() {
        let slots: Vec<_> = terms.iter().filter(|(_, c)| *c != 0.0).map(|(v, c)| (v.slot(), T::from_f64(*c))).collect();
        let total = total.slot();
        tape.record(move |grads| {
            let Some(upstream) = grads.take(total) else { return };
            for (slot, c) in slots {
                grads.add(slot, |d| d[0] += c * upstream[0]);
            }
        });
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{self, generated};
    use proptest::prelude::*;

    fn apart<T: Real>(n: usize, d: usize, magnitude: f64, seed: u64) -> f64 {
        let inputs = [magnitude, 1.0].map(|scale| check::Input::random(seed, n, d, scale));
        check::apart::<T>(&inputs, &[], &[1.0; 4], |tape, x| {
            let once = add(tape, &x[0], &x[1]);
            vec![add(tape, &once, &x[0])]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn any_shape_and_magnitude_agrees_with_the_reference(
            n in generated::rows(),
            d in prop_oneof![4 => generated::width(), 1 => 80..300usize],
            magnitude in generated::magnitude(),
            seed in 0u64..1000,
        ) {
            let (wide, narrow) = (apart::<f64>(n, d, magnitude, seed), apart::<f32>(n, d, magnitude, seed));
            prop_assert!(wide < 1e-13 && narrow < 1e-5, "{} {}", wide, narrow);
        }
    }

    #[test]
    fn gradients_agree_with_differences_and_with_the_reference() {
        let inputs = [check::Input::random(1, 3, 4, 1.0), check::Input::random(2, 3, 4, 1.0)];
        let op = |tape: &mut Tape<'_, f64>, x: &[Value<f64>]| {
            let once = add(tape, &x[0], &x[1]);
            vec![add(tape, &once, &x[0])] // x[0] is used twice: its gradient accumulates
        };
        assert!(check::worst(Engine::Cpu, &inputs, &[], op) < 1e-8);
        assert!(check::parity::<f64>(&inputs, &[], op) < 1e-13);
        let scalars = [check::Input::random(1, 1, 1, 1.0), check::Input::random(2, 1, 1, 1.0)];
        let op = |tape: &mut Tape<'_, f64>, x: &[Value<f64>]| {
            vec![weighted_sum(tape, &[(&x[0], 0.5), (&x[1], 0.0), (&x[0], 2.0)])]
        };
        assert!(check::worst(Engine::Cpu, &scalars, &[], op) < 1e-8);
    }
}
