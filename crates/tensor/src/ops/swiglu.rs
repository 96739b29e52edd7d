//! Dense SwiGLU (Shazeer 2020) as one op: y = W_down (silu(W_gate x) * W_up x), silu(a) = a σ(a), without biases.
//! x [n, d], gate and up [f, d], down [d, f], y [n, d].

use crate::kept::grown;
use crate::kernels::bf16::Bf16;
use crate::kernels::gemm::{Matrix, Packed, Product, Side, To, grouped_over_rows};
use crate::kernels::parallel;
use crate::ops::hidden::Stored;
use crate::profile::Cost;
use crate::{Engine, Param, Real, Tape, Value, kept};

/// Panics if the shapes differ: they are fixed by the model's configuration, which is validated before.
pub fn swiglu<'a, T: Real>(tape: &mut Tape<'a, T>, x: &Value<T>, gate: Param, up: Param, down: Param) -> Value<T> {
    assert!(x.width() == gate.width && x.width() == up.width && x.width() == down.rows, "swiglu: widths differ");
    assert!(gate.rows == up.rows && gate.rows == down.width, "swiglu: intermediate sizes differ");
    let (weights, rows) = (3 * gate.len(), x.rows() * (2 * x.width() + 3 * gate.rows));
    let _span = tape.span("swiglu", Cost::new::<T>(2 * x.rows() * weights, weights + rows));
    match tape.engine() {
        Engine::Reference => {
            let formula = |t: &[candle_core::Tensor]| {
                let hidden = (t[0].matmul(&t[1].t()?)?.silu()? * t[0].matmul(&t[2].t()?)?)?;
                Ok(vec![hidden.matmul(&t[3].t()?)?])
            };
            tape.reference(&[x], &[gate, up, down], formula).remove(0)
        }
        _ if tape.precision().rounds::<T>() => cpu::<T, Bf16>(tape, x, gate, up, down),
        _ => cpu::<T, T>(tape, x, gate, up, down),
    }
}

/// A task takes a block of rows through products and activation while they are in its cache.
fn cpu<'a, T: Real, S: Stored<T>>(
    tape: &mut Tape<'a, T>,
    x: &Value<T>,
    gate: Param,
    up: Param,
    down: Param,
) -> Value<T> {
    let (n, d, f, precision) = (x.rows(), gate.width, gate.rows, tape.precision());
    let (block, pool) = (parallel::block(n), parallel::pays(n * d * f));
    let weights = [(gate, f, d), (up, f, d), (down, d, f)]
        .map(|(p, rows, cols)| Matrix::new(&tape.param(&p)[..p.len()], rows, cols));
    let (mut pre_n2f, mut y_nd) = (tape.arena().take(S::room(n * 2 * f)), tape.arena().take(n * d));
    let sides = weights.map(|w| Side { matrix: w.t(), precision, rows: n });
    let packed = Packed::new(tape.arena(), sides.to_vec(), pool);
    let tasks = S::of_mut(&mut pre_n2f, n * 2 * f).chunks_mut(block * 2 * f).zip(y_nd.chunks_mut(block * d));
    parallel::each(pool, tasks.zip(x.data().chunks(block * d)).collect(), |((pre, y), x)| {
        let x = Matrix::new(x, x.len() / d, d);
        let fill = |pre: &mut [T]| packed.multiply_all(&mut [To { sides: 0..2, dst: pre }], x, false);
        S::forward(pre, f, fill, |hidden| packed.multiply(2, y, hidden, false));
    });
    drop(packed);
    let needs_grad = x.needs_grad() || gate.trainable || up.trainable || down.trainable;
    let y = tape.output(y_nd, n, d, needs_grad);
    if y.needs_grad() {
        let (x, y) = (x.clone(), y.slot());
        tape.record(move |grads| {
            let Some(dy_nd) = grads.take(y) else { return };
            if n == 0 {
                return;
            }
            let arena = grads.arena().clone();
            let mut hidden_nf = arena.take(S::room(n * f));
            let (pre_n2f, hidden_nf) = (S::of_mut(&mut pre_n2f, n * 2 * f), S::of_mut(&mut hidden_nf, n * f));
            let sides = weights.map(|w| Side { matrix: w, precision, rows: n });
            let packed = Packed::new(&arena, sides.to_vec(), pool);
            let mut back = |dx_nd: &mut [T], accumulate: bool| {
                let rows = pre_n2f.chunks_mut(block * 2 * f).zip(hidden_nf.chunks_mut(block * f));
                let mut dx = dx_nd.chunks_mut(block * d);
                let tasks = rows.zip(dy_nd.chunks(block * d)).map(|rows| (rows, dx.next()));
                parallel::each(pool, tasks.collect(), |(((pre, hidden), dy), dx)| {
                    let rows = dy.len() / d;
                    let fill = |to: &mut [T]| packed.multiply(2, to, Matrix::new(dy, rows, d), false);
                    kept::with(|Unasked(weights): &mut Unasked<T>| {
                        S::backward((&mut *pre, hidden), f, fill, |_| T::ONE, grown(weights, rows));
                    });
                    if let Some(dx) = dx {
                        for half in 0..2 {
                            let dpre = S::matrix(&pre[half * f..], (rows, f), 2 * f);
                            packed.multiply(half, dx, dpre, accumulate || half > 0);
                        }
                    }
                });
            };
            match x.needs_grad() {
                true => grads.write(x.slot(), back),
                false => back(&mut [], false),
            }
            drop(packed);
            let (dy, x) = (Matrix::new(&dy_nd, n, d), Matrix::new(x.data(), n, d));
            let dpre = |half: usize| S::matrix(&pre_n2f[half * f..], (n, f), 2 * f).t();
            let sides = [(dpre(0), x), (dpre(1), x), (dy.t(), S::matrix(hidden_nf, (n, f), f))];
            let params = [&gate, &up, &down];
            let products = grads.params(&params).into_iter().zip(params).zip(sides);
            let products = products.filter_map(|((dw, p), (a, b))| Some(Product { dst: &mut dw?[..p.len()], a, b }));
            grouped_over_rows(precision, products.collect(), true);
        });
    }
    y
}

/// Gradients of weights that nobody asks for.
#[derive(Default)]
struct Unasked<T>(Vec<T>);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::generated;
    use crate::{Layout, Precision, check};
    use proptest::prelude::*;

    fn setup(d: usize, f: usize, trainable: bool) -> (Layout, [Param; 3], Vec<f64>) {
        let layout = Layout::new([
            ("gate".into(), vec![f, d], trainable),
            ("up".into(), vec![f, d], trainable),
            ("down".into(), vec![d, f], trainable),
        ]);
        let params = ["gate", "up", "down"].map(|name| layout.get(name).unwrap());
        let numbers = check::normals(1, layout.len(), 0.7);
        (layout, params, numbers)
    }

    #[test]
    fn gradients_agree_with_differences_and_with_the_reference() {
        for (n, d, f) in [(0, 3, 2), (1, 1, 1), (5, 3, 7), (70, 33, 130)] {
            let (_, [gate, up, down], params) = setup(d, f, true);
            let inputs = [check::Input::random(2, n, d, 1.0)];
            if n < 10 {
                let op = |tape: &mut Tape<'_, f64>, x: &[Value<f64>]| vec![swiglu(tape, &x[0], gate, up, down)];
                let worst = check::worst(Engine::Cpu, &inputs, &params, op);
                assert!(worst < 1e-7, "{n} {d} {f}: {worst}");
            }
            let wide = check::parity::<f64>(&inputs, &params, |tape, x| vec![swiglu(tape, &x[0], gate, up, down)]);
            let narrow = check::parity::<f32>(&inputs, &params, |tape, x| vec![swiglu(tape, &x[0], gate, up, down)]);
            assert!(wide < 1e-11 && narrow < 1e-4, "{n} {d} {f}: {wide} {narrow}");
        }
    }

    #[test]
    fn in_bf16_it_stays_within_the_rounding_of_its_operands() {
        for (n, d, f) in [(0, 3, 2), (1, 1, 1), (5, 3, 7), (70, 33, 130), (300, 64, 96)] {
            let (_, [gate, up, down], params) = setup(d, f, true);
            let inputs = [check::Input::random(2, n, d, 1.0)];
            let found = check::rounding(&inputs, &params, |tape, x| vec![swiglu(tape, &x[0], gate, up, down)]);
            assert!(found < 0.1, "{n} {d} {f}: {found}");
        }
    }

    /// With pre-activations of about `size`, whose products are squares of it.
    fn apart<T: Real>((n, d, f): (usize, usize, usize), size: f64, seed: u64) -> f64 {
        let (_, [gate, up, down], params) = setup(d, f, true);
        let inputs = [check::Input::random(seed, n, d, size / (d as f64).sqrt())];
        check::apart::<T>(&inputs, &params, &[size, size * size, size * size], |tape, x| {
            vec![swiglu(tape, &x[0], gate, up, down)]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn any_shape_and_magnitude_agrees_with_the_reference(
            shape in generated::shape((300, 100)),
            size in generated::magnitude(),
            seed in 0u64..1000,
        ) {
            let (wide, narrow) = (apart::<f64>(shape, size, seed), apart::<f32>(shape, size, seed));
            prop_assert!(wide < 1e-12 && narrow < 1e-4, "{} {}", wide, narrow);
        }
    }

    #[test]
    fn bytes_do_not_depend_on_the_number_of_threads() {
        let (_, [gate, up, down], params) = setup(64, 48, true);
        let inputs = [check::Input::random(2, 700, 64, 1.0)];
        let run = |precision: Precision, threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let op = |tape: &mut Tape<'_, f32>, x: &[Value<f32>]| {
                tape.set_precision(precision);
                vec![swiglu(tape, &x[0], gate, up, down)]
            };
            let (value, gradients) = pool.install(|| check::analytic::<f32>(Engine::Cpu, &inputs, &params, op));
            (value.to_bits(), gradients.into_iter().flatten().map(f64::to_bits).collect::<Vec<_>>())
        };
        for precision in [Precision::F32, Precision::Bf16] {
            let one = run(precision, 1);
            assert!([2, 3, 8].into_iter().all(|threads| run(precision, threads) == one), "{precision:?}");
        }
    }

    #[test]
    fn frozen_weights_get_no_gradient_and_the_input_does() {
        let (_, [gate, up, down], params) = setup(3, 4, false);
        let inputs = [check::Input::random(2, 5, 3, 1.0)];
        let op = |tape: &mut Tape<'_, f64>, x: &[Value<f64>]| vec![swiglu(tape, &x[0], gate, up, down)];
        assert!(
            check::worst(Engine::Cpu, &inputs, &params, op) > 1e-3,
            "differences see the weights, the tape must not"
        );
        let (_, gradients) = check::analytic::<f64>(Engine::Cpu, &inputs, &params, op);
        assert!(gradients[1].iter().all(|g| *g == 0.0) && gradients[0].iter().all(|g| *g != 0.0));
    }
}
