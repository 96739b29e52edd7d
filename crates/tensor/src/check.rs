//! Gradient check: the tape's gradients of an op against central differences in f64, for every number of every input and parameter.

#[cfg(test)]
use crate::Precision;
use crate::random::{Purpose, Random};
use crate::{Arena, Engine, Real, Tape, Value};

/// A [rows, width] input of the op under test.
#[derive(Clone, Debug)]
pub struct Input {
    pub data: Vec<f64>,
    pub rows: usize,
    pub width: usize,
}

impl Input {
    /// Normal numbers times `scale`, a pure function of `seed`.
    pub fn random(seed: u64, rows: usize, width: usize, scale: f64) -> Self {
        Input { data: normals(seed, rows * width, scale), rows, width }
    }
}

/// `len` normal numbers times `scale`.
pub fn normals(seed: u64, len: usize, scale: f64) -> Vec<f64> {
    let random = Random::new(seed, Purpose::Test);
    (0..len as u64).map(|i| scale * random.normal(0, i)).collect()
}

/// Σ c·y over all outputs with fixed c, as a [1, 1] value on the tape.
fn project<'a, T: Real>(tape: &mut Tape<'a, T>, outputs: &[Value<T>]) -> Value<T> {
    let coefficients: Vec<Vec<T>> = (0u64..)
        .zip(outputs)
        .map(|(i, y)| normals(1000 + i, y.data().len(), 1.0).into_iter().map(T::from_f64).collect())
        .collect();
    let mut sum = tape.arena().zeros(1);
    for (c, y) in coefficients.iter().zip(outputs) {
        sum[0] += c.iter().zip(y.data()).map(|(c, y)| *c * *y).sum();
    }
    let needs = outputs.iter().any(|y| y.needs_grad());
    let total = tape.output(sum, 1, 1, needs);
    let (slot, slots): (_, Vec<_>) = (total.slot(), outputs.iter().map(|y| y.slot()).collect());
    if total.needs_grad() {
        tape.record(move |grads| {
            let Some(upstream) = grads.take(slot) else { return };
            for (c, slot) in coefficients.iter().zip(slots) {
                grads.add(slot, |dst| dst.iter_mut().zip(c).for_each(|(d, c)| *d += *c * upstream[0]));
            }
        });
    }
    total
}

/// The projected value of `op` and its gradients by the tape: per input, then the flat parameters.
pub fn analytic<T: Real>(
    engine: Engine,
    inputs: &[Input],
    params: &[f64],
    op: impl for<'a> Fn(&mut Tape<'a, T>, &[Value<T>]) -> Vec<Value<T>>,
) -> (f64, Vec<Vec<f64>>) {
    let (value, gradients, _) = evaluate(engine, inputs, params, op);
    (value, gradients)
}

/// The same, and the outputs themselves.
fn evaluate<T: Real>(
    engine: Engine,
    inputs: &[Input],
    params: &[f64],
    op: impl for<'a> Fn(&mut Tape<'a, T>, &[Value<T>]) -> Vec<Value<T>>,
) -> (f64, Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let cast = |x: &[f64]| x.iter().map(|x| T::from_f64(*x)).collect::<Vec<T>>();
    let params = cast(params);
    let arena = Arena::default();
    let mut tape = Tape::new(engine, &params, &arena);
    let leaves: Vec<Value<T>> = inputs.iter().map(|i| tape.leaf(&cast(&i.data), i.rows, i.width)).collect();
    let outputs = op(&mut tape, &leaves);
    let loss = project(&mut tape, &outputs);
    let found = outputs.iter().map(|y| y.data().iter().map(|y| y.to_f64()).collect()).collect();
    drop(outputs);
    let value = loss.scalar().to_f64();
    let mut flat = vec![T::ZERO; params.len()];
    let mut gradients: Vec<Vec<f64>> = {
        let grads = tape.backward(&loss, &mut flat);
        leaves.iter().map(|leaf| grads.of(leaf).iter().map(|g| g.to_f64()).collect()).collect()
    };
    gradients.push(flat.iter().map(|g| g.to_f64()).collect());
    (value, gradients, found)
}

/// The largest difference between the tape's gradients and central differences, relative to 1 + the largest gradient. Bar of the tests: 1e-7.
pub fn worst(
    engine: Engine,
    inputs: &[Input],
    params: &[f64],
    op: impl for<'a> Fn(&mut Tape<'a, f64>, &[Value<f64>]) -> Vec<Value<f64>>,
) -> f64 {
    const STEP: f64 = 1e-5;
    let (_, gradients) = analytic::<f64>(engine, inputs, params, &op);
    let value = |inputs: &[Input], params: &[f64]| analytic::<f64>(engine, inputs, params, &op).0;
    let scale = 1.0 + gradients.iter().flatten().fold(0.0f64, |m, g| m.max(g.abs()));
    let mut worst = 0.0f64;
    let mut compare = |found: f64, up: f64, down: f64| {
        let error = ((up - down) / (2.0 * STEP) - found).abs() / scale;
        worst = if error.is_nan() { f64::NAN } else { worst.max(error) };
    };
    for (i, gradient) in gradients[..inputs.len()].iter().enumerate() {
        for (j, &found) in gradient.iter().enumerate() {
            let at = |delta: f64| {
                let mut moved = inputs.to_vec();
                moved[i].data[j] += delta;
                value(&moved, params)
            };
            compare(found, at(STEP), at(-STEP));
        }
    }
    for (j, &found) in gradients[inputs.len()].iter().enumerate() {
        let at = |delta: f64| {
            let mut moved = params.to_vec();
            moved[j] += delta;
            value(inputs, &moved)
        };
        compare(found, at(STEP), at(-STEP));
    }
    worst
}

/// The largest difference between two engines' values and gradients in precision `T`, as `difference` has it.
pub fn parity<T: Real>(
    inputs: &[Input],
    params: &[f64],
    op: impl for<'a> Fn(&mut Tape<'a, T>, &[Value<T>]) -> Vec<Value<T>>,
) -> f64 {
    difference(analytic::<T>(Engine::Cpu, inputs, params, &op), analytic::<T>(Engine::Reference, inputs, params, &op))
}

/// The same between products of rounded operands and of the numbers as they are.
#[cfg(test)]
pub fn rounding(
    inputs: &[Input],
    params: &[f64],
    op: impl for<'a> Fn(&mut Tape<'a, f32>, &[Value<f32>]) -> Vec<Value<f32>>,
) -> f64 {
    let [narrow, plain] = [Precision::Bf16, Precision::F32].map(|precision| {
        analytic::<f32>(Engine::Cpu, inputs, params, |tape, x| {
            tape.set_precision(precision);
            op(tape, x)
        })
    });
    difference(narrow, plain)
}

/// The largest difference of a value and its gradients, relative to 1 + the largest gradient.
fn difference((value, gradients): (f64, Vec<Vec<f64>>), (expected, reference): (f64, Vec<Vec<f64>>)) -> f64 {
    let scale = 1.0 + reference.iter().flatten().fold(expected.abs(), |m, g| m.max(g.abs()));
    let pairs = gradients.iter().flatten().zip(reference.iter().flatten());
    pairs.fold(
        (value - expected).abs(),
        |worst, (a, b)| if (a - b).is_nan() { f64::NAN } else { worst.max((a - b).abs()) },
    ) / scale
}

/// The largest difference between the CPU face and the reference in any array: the gradients of the inputs, of the parameters, and the outputs. Each is
/// relative to the largest number of its array, so that small arrays are held as strictly as large ones, but to no less than a tenth of the `typical`
/// size of such numbers: in an array of one or two, terms may cancel by chance.
#[cfg(test)]
pub fn apart<T: Real>(
    inputs: &[Input],
    params: &[f64],
    typical: &[f64],
    op: impl for<'a> Fn(&mut Tape<'a, T>, &[Value<T>]) -> Vec<Value<T>>,
) -> f64 {
    let arrays = |engine| {
        let (_, gradients, outputs) = evaluate(engine, inputs, params, &op);
        [gradients, outputs].concat()
    };
    let (found, expected) = (arrays(Engine::Cpu), arrays(Engine::Reference));
    let lengths = |arrays: &[Vec<f64>]| arrays.iter().map(Vec::len).collect::<Vec<_>>();
    assert!(lengths(&found) == lengths(&expected) && found.len() == typical.len());
    let gap = |(a, b): (&f64, &f64)| if (a - b).is_nan() { f64::INFINITY } else { (a - b).abs() };
    let relative = |((found, expected), typical): ((&Vec<f64>, &Vec<f64>), &f64)| {
        let scale = expected.iter().fold(typical / 10.0, |m, x| m.max(x.abs()));
        found.iter().zip(expected).map(gap).fold(0.0, f64::max) / scale
    };
    found.iter().zip(&expected).zip(typical).map(relative).fold(0.0, f64::max)
}

/// Shapes and magnitudes that the parity tests of all ops draw.
#[cfg(test)]
pub mod generated {
    use proptest::prelude::*;

    /// None, one, or few rows: most cross no block of a fast face, some cross one.
    pub fn rows() -> impl Strategy<Value = usize> {
        prop_oneof![1 => Just(0), 1 => Just(1), 6 => 2..30usize, 2 => 30..110usize]
    }

    /// Widths of whole and broken lanes and tiles.
    pub fn width() -> impl Strategy<Value = usize> {
        prop_oneof![prop::sample::select(vec![1, 2, 3, 7, 16, 17, 31, 33]), 1..40usize]
    }

    /// Rows and two widths: one shape in ten has up to `most` of them, beyond the sizes from where a fast face cuts blocks and uses threads.
    pub fn shape(most: (usize, usize)) -> impl Strategy<Value = (usize, usize, usize)> {
        let (rows_of_many, wide) = (most.0 / 2..most.0, || most.1 / 2..most.1);
        prop_oneof![9 => (rows(), width(), width()), 1 => (rows_of_many, wide(), wide())]
    }

    /// The size of a case's inputs, from 1/1000 to 30.
    pub fn magnitude() -> impl Strategy<Value = f64> {
        (-3.0..1.48f64).prop_map(|exponent| 10f64.powf(exponent))
    }
}
