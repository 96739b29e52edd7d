//! y = x Wᵀ, without bias. x [n, d], W [f, d], y [n, f]; also several weights at once that read the same x.

use crate::kernels::gemm::{Matrix, Packed, Product, Side, To, grouped_over_rows};
use crate::kernels::parallel;
use crate::profile::{Cost, Work};
use crate::{Engine, Param, Precision, Real, Tape, Value};

/// Panics if the widths differ: shapes are fixed by the model's configuration, which is validated before.
pub fn linear<'a, T: Real>(tape: &mut Tape<'a, T>, x: &Value<T>, weight: Param) -> Value<T> {
    let precision = tape.precision();
    linears(tape, x, &[(weight, precision)]).remove(0)
}

/// x W_iᵀ for several weights, each with how its products multiply, as one piece of work forward and one backward. Routers take f32 in every
/// precision: their choices should not hang on rounding (Fedus 2021, section 2.4).
pub fn linears<'a, T: Real>(tape: &mut Tape<'a, T>, x: &Value<T>, weights: &[(Param, Precision)]) -> Vec<Value<T>> {
    assert!(
        weights.iter().all(|(weight, _)| x.width() == weight.width),
        "linear: input width differs from the weight's"
    );
    let _span = tape.span("linear", cost::<T>(x, weights));
    match tape.engine() {
        Engine::Reference => weights
            .iter()
            .map(|(weight, _)| tape.reference(&[x], &[*weight], |t| Ok(vec![t[0].matmul(&t[1].t()?)?])).remove(0))
            .collect(),
        _ => cpu(tape, x, weights),
    }
}

fn cost<T: Real>(x: &Value<T>, weights: &[(Param, Precision)]) -> Cost {
    let mut sum = Cost::default();
    let add = |sum: &mut Work, part: Work| (sum.flops, sum.bytes) = (sum.flops + part.flops, sum.bytes + part.bytes);
    for (weight, _) in weights {
        let part = Cost::product::<T>(x.rows(), weight.width, weight.rows);
        add(&mut sum.forward, part.forward);
        add(&mut sum.backward, part.backward);
    }
    sum
}

fn cpu<'a, T: Real>(tape: &mut Tape<'a, T>, x: &Value<T>, weights: &[(Param, Precision)]) -> Vec<Value<T>> {
    let (n, d) = (x.rows(), x.width());
    let block = parallel::block(n);
    let weights: Vec<Weight<'a, T>> = weights
        .iter()
        .map(|&(param, precision)| Weight { param, data: &tape.param(&param)[..param.len()], precision })
        .collect();
    let pool = parallel::pays(n * d * weights.iter().map(|weight| weight.param.rows).sum::<usize>());
    let mut outputs: Vec<_> = weights.iter().map(|weight| tape.arena().take(n * weight.param.rows)).collect();
    let mut rows: Vec<_> =
        outputs.iter_mut().zip(&weights).map(|(y, weight)| y.chunks_mut(block * weight.param.rows)).collect();
    let tasks = x.data().chunks(block * d).map(|x| (x, rows.iter_mut().filter_map(Iterator::next).collect::<Vec<_>>()));
    let packed = Packed::new(tape.arena(), weights.iter().map(|weight| weight.side(n, true)).collect(), pool);
    parallel::each(pool, tasks.collect(), |(x, rows)| {
        let mut to: Vec<_> = rows.into_iter().enumerate().map(|(i, dst)| To { sides: i..i + 1, dst }).collect();
        packed.multiply_all(&mut to, Matrix::new(x, x.len() / d, d), false);
    });
    drop((rows, packed));
    let outputs = outputs.into_iter().zip(&weights);
    let outputs: Vec<Value<T>> = outputs
        .map(|(y, weight)| tape.output(y, n, weight.param.rows, x.needs_grad() || weight.param.trainable))
        .collect();
    if outputs.iter().any(Value::needs_grad) {
        let (x, slots) = (x.clone(), outputs.iter().map(Value::slot).collect::<Vec<_>>());
        tape.record(move |grads| {
            let upstream = weights.iter().zip(&slots).filter_map(|(weight, slot)| Some((weight, grads.take(*slot)?)));
            let upstream: Vec<_> = upstream.collect();
            if upstream.is_empty() {
                return;
            }
            let params: Vec<&Param> = upstream.iter().map(|(weight, _)| &weight.param).collect();
            let mut regions = grads.params(&params);
            for precision in [Precision::F32, Precision::Bf16] {
                let alike = upstream.iter().zip(&mut regions).filter(|((weight, _), _)| weight.precision == precision);
                let products = alike.filter_map(|((weight, dy_nf), region)| {
                    let (dy, x) = (Matrix::new(dy_nf, n, weight.param.rows), Matrix::new(x.data(), n, d));
                    Some(Product { dst: &mut region.as_deref_mut()?[..weight.param.len()], a: dy.t(), b: x })
                });
                grouped_over_rows(precision, products.collect(), true);
            }
            let arena = grads.arena().clone();
            grads.write(x.slot(), |dx_nd, accumulate| {
                let sides = upstream.iter().map(|(weight, _)| weight.side(n, false)).collect();
                let packed = Packed::new(&arena, sides, pool);
                let tasks = dx_nd.chunks_mut(block * d).enumerate().collect();
                parallel::each(pool, tasks, |(b, dx): (usize, &mut [T])| {
                    let rows = dx.len() / d;
                    for (i, (weight, dy_nf)) in upstream.iter().enumerate() {
                        let f = weight.param.rows;
                        let dy = Matrix::new(&dy_nf[b * block * f..][..rows * f], rows, f);
                        packed.multiply(i, dx, dy, accumulate || i > 0);
                    }
                });
            });
        });
    }
    outputs
}

/// A weight [f, d] and how its products multiply.
struct Weight<'a, T> {
    param: Param,
    data: &'a [T],
    precision: Precision,
}

impl<'a, T: Real> Weight<'a, T> {
    /// W, or Wᵀ when `transpose`, as the right side of products of `rows` rows.
    fn side(&self, rows: usize, transpose: bool) -> Side<'a, T> {
        let w = Matrix::new(self.data, self.param.rows, self.param.width);
        Side { matrix: if transpose { w.t() } else { w }, precision: self.precision, rows }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::generated;
    use crate::{Layout, check};
    use proptest::prelude::*;

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
    fn several_weights_at_once_agree_with_differences_and_with_the_reference() {
        for (n, d, rows) in [(0, 3, [2, 1]), (5, 3, [7, 2]), (300, 33, [160, 6])] {
            let layout = Layout::new([("a".into(), vec![rows[0], d], true), ("b".into(), vec![rows[1], d], true)]);
            let weights = ["a", "b"].map(|name| (layout.get(name).unwrap(), Precision::F32));
            let params = check::normals(1, layout.len(), 1.0);
            let inputs = [check::Input::random(2, n, d, 1.0)];
            if n < 10 {
                let worst = check::worst(Engine::Cpu, &inputs, &params, |tape, x| linears(tape, &x[0], &weights));
                assert!(worst < 1e-8, "{n} {d} {rows:?}: {worst}");
            }
            assert!(check::parity::<f64>(&inputs, &params, |tape, x| linears(tape, &x[0], &weights)) < 1e-12);
            assert!(check::parity::<f32>(&inputs, &params, |tape, x| linears(tape, &x[0], &weights)) < 1e-4);
        }
    }

    fn apart<T: Real>((n, d, f): (usize, usize, usize), others: &[usize], magnitude: f64, seed: u64) -> f64 {
        let heights: Vec<usize> = [&[f], others].concat();
        let layout = Layout::new(heights.iter().enumerate().map(|(i, f)| (format!("w{i}"), vec![*f, d], true)));
        let weights: Vec<_> =
            (0..heights.len()).map(|i| (layout.get(&format!("w{i}")).unwrap(), Precision::F32)).collect();
        let params = check::normals(seed, layout.len(), 1.0);
        let inputs = [check::Input::random(seed + 1, n, d, magnitude)];
        let mut typical = vec![magnitude; 2 + weights.len() + 1];
        (typical[0], typical[1]) = (1.0, magnitude * (n.max(1) as f64).sqrt());
        // The input enters twice, so that its gradient is added to as well as written.
        check::apart::<T>(&inputs, &params, &typical, |tape, x| {
            [linears(tape, &x[0], &weights), vec![linear(tape, &x[0], weights[0].0)]].concat()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn any_shapes_and_magnitude_agree_with_the_reference(
            shape in generated::shape((1000, 70)),
            others in prop::collection::vec(1usize..20, 0..3),
            magnitude in generated::magnitude(),
            seed in 0u64..1000,
        ) {
            let wide = apart::<f64>(shape, &others, magnitude, seed);
            let narrow = apart::<f32>(shape, &others, magnitude, seed);
            prop_assert!(wide < 1e-12 && narrow < 1e-5, "{} {}", wide, narrow);
        }
    }

    #[test]
    fn bytes_do_not_depend_on_the_number_of_threads() {
        let layout = Layout::new([("a".into(), vec![96, 64], true), ("b".into(), vec![10, 64], true)]);
        let weights = ["a", "b"].map(|name| (layout.get(name).unwrap(), Precision::F32));
        let (params, inputs) = (check::normals(1, layout.len(), 1.0), [check::Input::random(2, 700, 64, 1.0)]);
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let op = |tape: &mut Tape<'_, f32>, x: &[Value<f32>]| linears(tape, &x[0], &weights);
            let (value, gradients) = pool.install(|| check::analytic::<f32>(Engine::Cpu, &inputs, &params, op));
            (value.to_bits(), gradients.into_iter().flatten().map(f64::to_bits).collect::<Vec<_>>())
        };
        let one = run(1);
        assert!([2, 3, 8].into_iter().all(|threads| run(threads) == one));
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
