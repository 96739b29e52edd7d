//! y = g∘x / √(mean x² + ε), row by row (Zhang & Sennrich 2019). x [n, d], g [d].
//! dx = g∘dy/r − x·Σ(g∘dy∘x)/(d r³); dg = Σ_t dy∘x/r.

use crate::kernels::parallel;
use crate::profile::Cost;
use crate::{Engine, Param, Real, Tape, Value};

pub fn rms_norm<'a, T: Real>(tape: &mut Tape<'a, T>, x: &Value<T>, gain: Param, epsilon: f64) -> Value<T> {
    assert_eq!(x.width(), gain.width, "rms_norm: input width differs from the gain's");
    let _span = tape.span("rms_norm", Cost::new::<T>(0, 2 * x.data().len()));
    match tape.engine() {
        Engine::Reference => tape
            .reference(&[x], &[gain], |t| {
                let mean = (t[0].sqr()?.sum_keepdim(1)? / t[0].dim(1)? as f64)?;
                let r = (mean + epsilon)?.sqrt()?;
                Ok(vec![t[0].broadcast_div(&r)?.broadcast_mul(&t[1])?])
            })
            .remove(0),
        _ => cpu(tape, x, gain, T::from_f64(epsilon)),
    }
}

fn inverse_rms<T: Real>(x_d: &[T], epsilon: T) -> T {
    let square: T = x_d.iter().map(|x| *x * *x).sum();
    T::ONE / (square / T::from_f64(x_d.len() as f64) + epsilon).sqrt()
}

fn cpu<'a, T: Real>(tape: &mut Tape<'a, T>, x: &Value<T>, gain: Param, epsilon: T) -> Value<T> {
    let (n, d) = (x.rows(), x.width());
    let g_d = &tape.param(&gain)[..d];
    let mut y_nd = tape.arena().take(n * d);
    parallel::rows(&mut y_nd, d, |i, y_d| {
        let x_d = &x.data()[i * d..(i + 1) * d];
        let inverse = inverse_rms(x_d, epsilon);
        for ((y, x), g) in y_d.iter_mut().zip(x_d).zip(g_d) {
            *y = *g * *x * inverse;
        }
    });
    let y = tape.output(y_nd, n, d, x.needs_grad() || gain.trainable);
    if y.needs_grad() {
        let (x, y) = (x.clone(), y.slot());
        tape.record(move |grads| {
            let Some(dy_nd) = grads.take(y) else { return };
            let mut inverse_n = grads.arena().take(n);
            parallel::rows(&mut inverse_n, 1, |i, r| r[0] = inverse_rms(&x.data()[i * d..(i + 1) * d], epsilon));
            if let Some(dg_d) = grads.param(&gain) {
                parallel::reduce_rows(&mut dg_d[..d], n, |i, sum| {
                    for ((s, x), dy) in sum.iter_mut().zip(&x.data()[i * d..]).zip(&dy_nd[i * d..(i + 1) * d]) {
                        *s += *dy * *x * inverse_n[i];
                    }
                });
            }
            grads.add(x.slot(), |dx_nd| {
                parallel::rows(dx_nd, d, |i, dx_d| {
                    let (x_d, dy_d, inverse) =
                        (&x.data()[i * d..(i + 1) * d], &dy_nd[i * d..(i + 1) * d], inverse_n[i]);
                    let dot: T = x_d.iter().zip(dy_d).zip(g_d).map(|((x, dy), g)| *g * *dy * *x).sum();
                    let shrink = dot * inverse * inverse * inverse / T::from_f64(d as f64);
                    for (((dx, x), dy), g) in dx_d.iter_mut().zip(x_d).zip(dy_d).zip(g_d) {
                        *dx += *g * *dy * inverse - *x * shrink;
                    }
                });
            });
        });
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Layout, check};

    #[test]
    fn gradients_agree_with_differences_and_with_the_reference() {
        for (n, d, scale) in [(0, 4, 1.0), (1, 1, 1.0), (3, 5, 1.0), (4, 8, 0.1), (2, 3, 30.0)] {
            let layout = Layout::new([("g".into(), vec![d], true)]);
            let gain = layout.get("g").unwrap();
            let params = check::normals(1, layout.len(), 1.0);
            let inputs = [check::Input::random(2, n, d, scale)];
            let op = |tape: &mut Tape<'_, f64>, x: &[Value<f64>]| vec![rms_norm(tape, &x[0], gain, 1e-6)];
            let worst = check::worst(Engine::Cpu, &inputs, &params, op);
            assert!(worst < 1e-7, "{n} {d} {scale}: {worst}");
            assert!(check::parity::<f64>(&inputs, &params, op) < 1e-12);
            assert!(check::parity::<f32>(&inputs, &params, |tape, x| vec![rms_norm(tape, &x[0], gain, 1e-6)]) < 1e-5);
        }
    }

    #[test]
    fn a_row_of_zeros_stays_finite() {
        let layout = Layout::new([("g".into(), vec![4], true)]);
        let gain = layout.get("g").unwrap();
        let inputs = [check::Input { data: vec![0.0; 8], rows: 2, width: 4 }];
        let (value, gradients) = check::analytic::<f32>(Engine::Cpu, &inputs, &vec![1.0; layout.len()], |tape, x| {
            vec![rms_norm(tape, &x[0], gain, 1e-6)]
        });
        assert!(value == 0.0 && gradients.iter().flatten().all(|g| g.is_finite()));
    }
}
