//! Dense SwiGLU (Shazeer 2020) as one op: y = W_down (silu(W_gate x) * W_up x), silu(a) = a σ(a), without biases.
//! x [n, d], gate and up [f, d], down [d, f], y [n, d]. The rows between the products are shared with the experts.

use crate::kernels::gemm::{Matrix, Packed, Product, Side, To, grouped};
use crate::kernels::parallel;
use crate::kernels::simd::{self, Kernel, LANES, sigmoid, total};
use crate::profile::Cost;
use crate::{Engine, Param, Precision, Real, Tape, Value, kept};

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
        _ => cpu(tape, x, gate, up, down),
    }
}

/// A task takes a block of rows through products and activation while they are in its cache.
fn cpu<'a, T: Real>(tape: &mut Tape<'a, T>, x: &Value<T>, gate: Param, up: Param, down: Param) -> Value<T> {
    let (n, d, f, precision) = (x.rows(), gate.width, gate.rows, tape.precision());
    let (block, pool) = (parallel::block(n), parallel::pays(n * d * f));
    let weights = [(gate, f, d), (up, f, d), (down, d, f)]
        .map(|(p, rows, cols)| Matrix::new(&tape.param(&p)[..p.len()], rows, cols));
    // Gate and up pre-activations side by side, as the experts keep them.
    let keep = Keep::new::<T>(precision, f);
    let (mut kept_n, mut y_nd) = (tape.arena().take(n * keep.width()), tape.arena().take(n * d));
    let sides = weights.map(|w| Side { matrix: w.t(), precision, rows: n });
    let packed = Packed::new(tape.arena(), sides.to_vec(), pool);
    let tasks = kept_n.chunks_mut(block * keep.width()).zip(y_nd.chunks_mut(block * d));
    parallel::each(pool, tasks.zip(x.data().chunks(block * d)).collect(), |((kept, y), x)| {
        let x = Matrix::new(x, x.len() / d, d);
        keep.through(kept, |pre, hidden| {
            packed.multiply_all(&mut [To { sides: 0..2, dst: pre }], x, false);
            activate_block(pre, hidden, f);
            packed.multiply(2, y, Matrix::new(hidden, hidden.len() / f, f), false);
        });
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
            let mut hidden_nf = arena.take(n * f);
            let mut room = keep.narrow.then(|| arena.take(n * 2 * f));
            let (kept_n, pre_n2f) = match &mut room {
                Some(room) => (&kept_n[..], &mut room[..]),
                None => (&[][..], &mut kept_n[..]),
            };
            let sides = weights.map(|w| Side { matrix: w, precision, rows: n });
            let packed = Packed::new(&arena, sides.to_vec(), pool);
            let mut back = |dx_nd: &mut [T], accumulate: bool| {
                let rows = pre_n2f.chunks_mut(block * 2 * f).zip(hidden_nf.chunks_mut(block * f));
                let mut dx = dx_nd.chunks_mut(block * d);
                let tasks = rows.zip(dy_nd.chunks(block * d)).enumerate().map(|rows| (rows, dx.next()));
                parallel::each(pool, tasks.collect(), |((b, ((pre, hidden), dy)), dx)| {
                    let rows = dy.len() / d;
                    let pairs = keep.narrow.then(|| &kept_n[b * block * f..][..rows * f]);
                    packed.multiply(2, hidden, Matrix::new(dy, rows, d), false);
                    kept::with(|rooms: &mut Rooms<T>| {
                        activate_backward_block((pairs, pre), hidden, f, |_| T::ONE, grown(&mut rooms.weights, rows));
                    });
                    if let Some(dx) = dx {
                        for half in 0..2 {
                            let dpre = Matrix::strided(&pre[half * f..], rows, f, 2 * f);
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
            let dpre = |half: usize| Matrix::strided(&pre_n2f[half * f..], n, f, 2 * f).t();
            let sides = [(dpre(0), x), (dpre(1), x), (dy.t(), Matrix::new(&hidden_nf, n, f))];
            let params = [&gate, &up, &down];
            let products = grads.params(&params).into_iter().zip(params).zip(sides);
            let products = products.filter_map(|((dw, p), (a, b))| Some(Product { dst: &mut dw?[..p.len()], a, b }));
            grouped(precision, products.collect(), true);
        });
    }
    y
}

/// How pre-activations [b, 2f] wait for the way back: as they are, or, where products round their operands, as pairs of bf16 [b, f].
#[derive(Clone, Copy)]
pub(crate) struct Keep {
    pub narrow: bool,
    f: usize,
}

impl Keep {
    pub(crate) fn new<T: Real>(precision: Precision, f: usize) -> Self {
        Keep { narrow: precision.rounds::<T>(), f }
    }

    /// Numbers of a row that waits.
    pub(crate) fn width(self) -> usize {
        if self.narrow { self.f } else { 2 * self.f }
    }

    /// Runs `body`, which fills the pre-activations of a block and uses them, and keeps them. Beside them it gets room for hidden rows, which stay in
    /// the caches of their thread: they are recomputed from the pre-activations on the way back.
    pub(crate) fn through<T: Real>(self, kept: &mut [T], body: impl FnOnce(&mut [T], &mut [T])) {
        kept::with(|rooms: &mut Rooms<T>| {
            let hidden = grown(&mut rooms.hidden, kept.len() / self.width() * self.f);
            if !self.narrow {
                return body(kept, hidden);
            }
            let pre = grown(&mut rooms.pre, 2 * kept.len());
            body(pre, hidden);
            for (kept, pre) in kept.chunks_exact_mut(self.f).zip(pre.chunks_exact(2 * self.f)) {
                simd::pair(kept, &pre[..self.f], &pre[self.f..]);
            }
        });
    }
}

/// Working memory of a thread.
#[derive(Default)]
struct Rooms<T> {
    pre: Vec<T>,
    hidden: Vec<T>,
    /// Gradients of weights that nobody asks for.
    weights: Vec<T>,
}

/// `len` numbers of any content.
fn grown<T: Real>(room: &mut Vec<T>, len: usize) -> &mut [T] {
    if room.len() < len {
        room.resize(len, T::ZERO);
    }
    &mut room[..len]
}

/// hidden = silu(a) * u for rows [a | u] of width 2f, on this thread.
pub(crate) fn activate_block<T: Real>(pre_b2f: &[T], hidden_bf: &mut [T], f: usize) {
    for (pre_2f, hidden_f) in pre_b2f.chunks_exact(2 * f).zip(hidden_bf.chunks_exact_mut(f)) {
        simd::dispatch(Activate { pre_2f, hidden_f });
    }
}

struct Activate<'s, T> {
    pre_2f: &'s [T],
    hidden_f: &'s mut [T],
}

impl<T: Real> Kernel for Activate<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let (a, u) = self.pre_2f.split_at(self.hidden_f.len());
        for ((h, a), u) in self.hidden_f.iter_mut().zip(a).zip(u) {
            *h = *a * sigmoid(*a) * *u;
        }
    }
}

/// The backward of `activate_block` for hidden rows that enter the output times `weight(row)`. In: pre-activations, as they are or as the pairs that
/// were kept of them, and in `hidden_bf` the gradient of the unweighted output carried to the hidden rows. Out: `pre_b2f` holds its own gradient, `hidden_bf` weight · silu(a) * u (what the gradient of
/// W_down is made of), `dweight_b` the gradient of the weights. One σ per number.
pub(crate) fn activate_backward_block<T: Real>(
    (pairs_bf, pre_b2f): (Option<&[T]>, &mut [T]),
    hidden_bf: &mut [T],
    f: usize,
    weight: impl Fn(usize) -> T,
    dweight_b: &mut [T],
) {
    let rows = pre_b2f.chunks_exact_mut(2 * f).zip(hidden_bf.chunks_exact_mut(f)).zip(dweight_b).enumerate();
    rows.for_each(|(i, ((pre_2f, hidden_f), dweight))| {
        if let Some(pairs) = pairs_bf {
            let (a, u) = pre_2f.split_at_mut(f);
            simd::unpair(&pairs[i * f..(i + 1) * f], a, u);
        }
        *dweight = simd::dispatch(ActivateBackward { pre_2f, hidden_f, weight: weight(i) });
    });
}

struct ActivateBackward<'s, T> {
    pre_2f: &'s mut [T],
    hidden_f: &'s mut [T],
    weight: T,
}

impl<T: Real> Kernel for ActivateBackward<'_, T> {
    /// Gradient of the weight.
    type Output = T;

    #[inline(always)]
    fn run(self) -> T {
        let (a, u) = self.pre_2f.split_at_mut(self.hidden_f.len());
        // One sum per lane, joined in order: the additions vectorise and keep their order on every machine.
        let mut sums = [T::ZERO; 2 * LANES];
        let back = |sums: &mut [T; 2 * LANES], a: &mut [T], u: &mut [T], h: &mut [T]| {
            for (((sum, a), u), h) in sums.iter_mut().zip(a).zip(u).zip(h) {
                let sigmoid = sigmoid(*a);
                let silu = *a * sigmoid;
                let hidden = silu * *u;
                *sum += hidden * *h;
                let dhidden = self.weight * *h;
                *a = dhidden * *u * sigmoid * (T::ONE + *a - silu);
                *u = dhidden * silu;
                *h = self.weight * hidden;
            }
        };
        let ((a, a_rest), (u, u_rest)) = (a.as_chunks_mut(), u.as_chunks_mut());
        let (h, h_rest) = self.hidden_f.as_chunks_mut();
        for ((a, u), h) in a.iter_mut().zip(u).zip(h) {
            let (a, u, h): (&mut [T; 2 * LANES], &mut [T; 2 * LANES], &mut [T; 2 * LANES]) = (a, u, h);
            back(&mut sums, a, u, h);
        }
        back(&mut sums, a_rest, u_rest, h_rest);
        total(sums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::generated;
    use crate::{Layout, check};
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
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let op = |tape: &mut Tape<'_, f32>, x: &[Value<f32>]| vec![swiglu(tape, &x[0], gate, up, down)];
            let (value, gradients) = pool.install(|| check::analytic::<f32>(Engine::Cpu, &inputs, &params, op));
            (value.to_bits(), gradients.into_iter().flatten().map(f64::to_bits).collect::<Vec<_>>())
        };
        let one = run(1);
        assert!([2, 3, 8].into_iter().all(|threads| run(threads) == one));
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

    #[test]
    fn extreme_pre_activations_stay_finite() {
        for scale in [1e4, -1e4] {
            let mut pre = vec![scale as f32, 1.0];
            let mut hidden = vec![0.0f32];
            activate_block(&pre, &mut hidden, 1);
            assert!((hidden[0] - if scale > 0.0 { scale as f32 } else { 0.0 }).abs() < 1e-30);
            let mut back = vec![1.0f32];
            activate_backward_block((None, &mut pre), &mut back, 1, |_| 1.0, &mut [0.0]);
            assert!((pre[0] - if scale > 0.0 { 1.0 } else { 0.0 }).abs() < 1e-30);
        }
    }
}
