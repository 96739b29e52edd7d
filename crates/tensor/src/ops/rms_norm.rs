//! y = g∘x / √(mean x² + ε), row by row (Zhang & Sennrich 2019). x [n, d], g [d].
//! dx = g∘dy/r − x·Σ(g∘dy∘x)/(d r³); dg = Σ_t dy∘x/r.

use crate::kernels::parallel;
use crate::kernels::simd::{self, Kernel, filled, total};
use crate::profile::Cost;
use crate::tape::add;
use crate::{Engine, Param, Real, Tape, Value};

/// Rows of a task, and of a partial sum of the gain's gradient. Fixed: it decides the order of summation.
const ROWS: usize = 32;

/// Running sums of a row: enough of them to hide the latency of an addition.
const SUMS: usize = 32;

/// Below this many numbers one thread is faster than waking the pool.
const SMALL: usize = 1 << 13;

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

fn cpu<'a, T: Real>(tape: &mut Tape<'a, T>, x: &Value<T>, gain: Param, epsilon: T) -> Value<T> {
    let (n, d) = (x.rows(), x.width());
    let g_d = &tape.param(&gain)[..d];
    let mut y_nd = tape.arena().take(n * d);
    let mut inverse_n = tape.arena().take(n);
    let tasks = y_nd.chunks_mut(ROWS * d).zip(inverse_n.chunks_mut(ROWS)).zip(x.data().chunks(ROWS * d));
    each(n * d, tasks.map(|((y, inverse), x)| Forward { x, g_d, epsilon, y, inverse }).collect());
    let y = tape.output(y_nd, n, d, x.needs_grad() || gain.trainable);
    if y.needs_grad() {
        let (x, y) = (x.clone(), y.slot());
        tape.record(move |grads| {
            let Some(dy_nd) = grads.take(y) else { return };
            let arena = grads.arena().clone();
            let mut partials = arena.zeros(n.div_ceil(ROWS) * d);
            let mut run = |dx_nd: &mut [T], accumulate: bool| {
                let rows = x.data().chunks(ROWS * d).zip(dy_nd.chunks(ROWS * d)).zip(inverse_n.chunks(ROWS));
                let tasks = rows.zip(dx_nd.chunks_mut(ROWS * d)).zip(partials.chunks_mut(d));
                let task = |((((x, dy), inverse), dx), dg)| Backward { x, g_d, dy, inverse, dx, dg, accumulate };
                each(n * d, tasks.map(task).collect());
            };
            match x.needs_grad() {
                true => grads.write(x.slot(), run),
                false => run(&mut arena.take(n * d), false),
            }
            if let Some(dg_d) = grads.param(&gain) {
                partials.chunks(d).for_each(|partial| add(&mut dg_d[..d], partial));
            }
        });
    }
    y
}

/// Runs the tasks over `numbers` numbers, side by side if there is enough to do.
fn each<K: Kernel<Output = ()> + Send>(numbers: usize, tasks: Vec<K>) {
    parallel::each(numbers >= SMALL, tasks, simd::dispatch);
}

/// Some rows forward; keeps 1/r of each.
struct Forward<'s, T> {
    x: &'s [T],
    g_d: &'s [T],
    epsilon: T,
    y: &'s mut [T],
    inverse: &'s mut [T],
}

impl<T: Real> Kernel for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let d = self.g_d.len();
        for ((x, y), inverse) in self.x.chunks_exact(d).zip(self.y.chunks_exact_mut(d)).zip(self.inverse) {
            let (lanes, rest) = x.as_chunks::<SUMS>();
            let mut sums = [T::ZERO; SUMS];
            for x in lanes {
                let mut next = sums;
                for l in 0..SUMS {
                    next[l] += x[l] * x[l];
                }
                sums = next;
            }
            if !rest.is_empty() {
                let x = filled::<T, SUMS>(rest);
                for l in 0..SUMS {
                    sums[l] += x[l] * x[l];
                }
            }
            let scale = T::ONE / (total(sums) / T::from_f64(d as f64) + self.epsilon).sqrt();
            // Number by number: of a loop over chunks the compiler makes gathers and scatters across them.
            for ((y, x), g) in y.iter_mut().zip(x).zip(self.g_d) {
                *y = *g * *x * scale;
            }
            *inverse = scale;
        }
    }
}

/// Some rows backward: dx (written, or added to), and dg added to their partial sum.
struct Backward<'s, T> {
    x: &'s [T],
    g_d: &'s [T],
    dy: &'s [T],
    inverse: &'s [T],
    dx: &'s mut [T],
    dg: &'s mut [T],
    accumulate: bool,
}

impl<T: Real> Kernel for Backward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let d = self.g_d.len();
        let rows = self.x.chunks_exact(d).zip(self.dy.chunks_exact(d)).zip(self.dx.chunks_exact_mut(d));
        for (((x, dy), dx), inverse) in rows.zip(self.inverse) {
            let ((xs, x_rest), (dys, dy_rest)) = (x.as_chunks::<SUMS>(), dy.as_chunks::<SUMS>());
            let (gs, g_rest) = self.g_d.as_chunks::<SUMS>();
            let product = |mut sums: [T; SUMS], x: &[T; SUMS], dy: &[T; SUMS], g: &[T; SUMS]| {
                for l in 0..SUMS {
                    sums[l] += g[l] * dy[l] * x[l];
                }
                sums
            };
            let mut sums = [T::ZERO; SUMS];
            for ((x, dy), g) in xs.iter().zip(dys).zip(gs) {
                sums = product(sums, x, dy, g);
            }
            if !x_rest.is_empty() {
                sums = product(sums, &filled(x_rest), &filled(dy_rest), &filled(g_rest));
            }
            let shrink = total(sums) * *inverse * *inverse * *inverse / T::from_f64(d as f64);
            if !self.accumulate {
                dx.fill(T::ZERO);
            }
            for ((((dx, dg), x), dy), g) in dx.iter_mut().zip(self.dg.iter_mut()).zip(x).zip(dy).zip(self.g_d) {
                let scaled = *dy * *inverse;
                *dx += *g * scaled - *x * shrink;
                *dg += scaled * *x;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Layout, check};
    use proptest::prelude::*;

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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn any_shape_and_magnitude_agrees_with_the_reference(n in 0usize..80, d in 1usize..150, exponent in -3i32..4, seed in 0u64..1000) {
            let layout = Layout::new([("g".into(), vec![d], true)]);
            let gain = layout.get("g").unwrap();
            let params = check::normals(seed, layout.len(), 1.0);
            let inputs = [check::Input::random(seed + 1, n, d, 10f64.powi(exponent))];
            // The input enters twice, so that its gradient is added to as well as written.
            fn op<T: Real>(gain: Param) -> impl for<'a> Fn(&mut Tape<'a, T>, &[Value<T>]) -> Vec<Value<T>> {
                move |tape, x| vec![rms_norm(tape, &x[0], gain, 1e-6), rms_norm(tape, &x[0], gain, 1e-5)]
            }
            prop_assert!(check::parity::<f64>(&inputs, &params, op(gain)) < 1e-12);
            prop_assert!(check::parity::<f32>(&inputs, &params, op(gain)) < 1e-5);
        }
    }

    #[test]
    fn bytes_do_not_depend_on_the_number_of_threads() {
        let layout = Layout::new([("g".into(), vec![33], true)]);
        let gain = layout.get("g").unwrap();
        let params = check::normals(1, layout.len(), 1.0);
        let inputs = [check::Input::random(2, 700, 33, 1.0)];
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let op = |tape: &mut Tape<'_, f32>, x: &[Value<f32>]| vec![rms_norm(tape, &x[0], gain, 1e-6)];
            pool.install(|| check::analytic::<f32>(Engine::Cpu, &inputs, &params, op))
        };
        assert!([2, 3, 8].into_iter().all(|threads| run(threads) == run(1)));
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
