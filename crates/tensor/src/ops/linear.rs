//! y = x Wᵀ, without bias. x [n, d], W [f, d], y [n, f].

use crate::kernels::gemm::{Matrix, matmul};
use crate::profile::Cost;
use crate::{Engine, Param, Precision, Real, Tape, Value};

/// Panics if the widths differ: shapes are fixed by the model's configuration, which is validated before.
pub fn linear<'a, T: Real>(tape: &mut Tape<'a, T>, x: &Value<T>, weight: Param) -> Value<T> {
    let precision = tape.precision();
    multiply(tape, x, weight, precision)
}

/// The same with f32 products in every precision: for routers, whose choices should not hang on rounding (Fedus 2021, section 2.4).
pub fn linear_f32<'a, T: Real>(tape: &mut Tape<'a, T>, x: &Value<T>, weight: Param) -> Value<T> {
    multiply(tape, x, weight, Precision::F32)
}

fn multiply<'a, T: Real>(tape: &mut Tape<'a, T>, x: &Value<T>, weight: Param, precision: Precision) -> Value<T> {
    assert_eq!(x.width(), weight.width, "linear: input width differs from the weight's");
    let _span = tape.span("linear", Cost::product::<T>(x.rows(), weight.width, weight.rows));
    match tape.engine() {
        Engine::Reference => tape.reference(&[x], &[weight], |t| Ok(vec![t[0].matmul(&t[1].t()?)?])).remove(0),
        _ => cpu(tape, x, weight, precision),
    }
}

fn cpu<'a, T: Real>(tape: &mut Tape<'a, T>, x: &Value<T>, weight: Param, precision: Precision) -> Value<T> {
    let (n, d, f) = (x.rows(), weight.width, weight.rows);
    let w_fd = &tape.param(&weight)[..weight.len()];
    let mut y_nf = tape.arena().take(n * f);
    matmul(precision, &mut y_nf, Matrix::new(x.data(), n, d), Matrix::new(w_fd, f, d).t(), false);
    let y = tape.output(y_nf, n, f, x.needs_grad() || weight.trainable);
    if y.needs_grad() {
        let (x, y) = (x.clone(), y.slot());
        tape.record(move |grads| {
            let Some(dy_nf) = grads.take(y) else { return };
            let dy = Matrix::new(&dy_nf, n, f);
            if let Some(dw_fd) = grads.param(&weight) {
                matmul(precision, &mut dw_fd[..f * d], dy.t(), Matrix::new(x.data(), n, d), true);
            }
            grads
                .write(x.slot(), |dx_nd, accumulate| matmul(precision, dx_nd, dy, Matrix::new(w_fd, f, d), accumulate));
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
        for (n, d, f) in [(1, 1, 1), (0, 3, 2), (5, 3, 7), (17, 33, 16)] {
            let layout = Layout::new([("w".into(), vec![f, d], true)]);
            let weight = layout.get("w").unwrap();
            let params = check::normals(1, layout.len(), 1.0);
            let inputs = [check::Input::random(2, n, d, 1.0)];
            if n < 10 {
                let worst = check::worst(Engine::Cpu, &inputs, &params, |tape, x| vec![linear(tape, &x[0], weight)]);
                assert!(worst < 1e-8, "{n} {d} {f}: {worst}");
            }
            assert!(check::parity::<f64>(&inputs, &params, |tape, x| vec![linear(tape, &x[0], weight)]) < 1e-13);
            assert!(check::parity::<f32>(&inputs, &params, |tape, x| vec![linear(tape, &x[0], weight)]) < 1e-5);
        }
    }

    #[test]
    fn a_frozen_weight_gets_no_gradient() {
        let layout = Layout::new([("w".into(), vec![2, 3], false)]);
        let weight = layout.get("w").unwrap();
        let inputs = [check::Input::random(2, 4, 3, 1.0)];
        let (_, gradients) =
            check::analytic::<f64>(Engine::Cpu, &inputs, &check::normals(1, layout.len(), 1.0), |tape, x| {
                vec![linear(tape, &x[0], weight)]
            });
        assert!(gradients[1].iter().all(|g| *g == 0.0) && gradients[0].iter().any(|g| *g != 0.0));
    }
}
