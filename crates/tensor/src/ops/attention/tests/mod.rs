//! What the tests of attention share: a case, its numbers, and what the op makes of them.

mod agreement;
mod heads;
mod properties;
mod windows;

use super::*;
use crate::check::{self, Input};
use crate::random::{Purpose, Random};
use crate::{Arena, Layout, Param};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    None,
    Rope,
    Cope(usize),
}

/// A mixture of heads; every token takes each routed head with probability `share`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Mix {
    shared: usize,
    share: f64,
}

#[derive(Clone, Debug)]
struct Case {
    lengths: Vec<usize>,
    heads: usize,
    kv_heads: usize,
    dh: usize,
    window: Option<usize>,
    kind: Kind,
    mix: Option<Mix>,
}

/// The numbers of a case: q, k, v, gates where there is a mixture, and the CoPE table.
struct Numbers {
    inputs: Vec<Input>,
    table: Vec<f64>,
}

impl Case {
    fn new(lengths: &[usize], (heads, kv_heads, dh): (usize, usize, usize), window: Option<usize>, kind: Kind) -> Self {
        Case { lengths: lengths.to_vec(), heads, kv_heads, dh, window, kind, mix: None }
    }

    fn mixed(self, shared: usize, share: f64) -> Self {
        Case { mix: Some(Mix { shared, share }), ..self }
    }

    fn choice(&self) -> Option<Choice> {
        let Mix { shared, share } = self.mix?;
        let random = Random::new(self.heads as u64, Purpose::Test);
        let mut routed =
            Assignments { row_offsets_n1: vec![0], expert_ids_a: Vec::new(), num_experts: self.heads - shared };
        for t in 0..self.rows() as u64 {
            let ids = (0..routed.num_experts as u32).filter(|e| random.uniform(t, u64::from(*e)) < share);
            routed.expert_ids_a.extend(ids);
            routed.row_offsets_n1.push(routed.expert_ids_a.len());
        }
        Some(Choice { shared, routed: Arc::new(routed) })
    }

    fn op<T: Real>(&self, tape: &mut Tape<'_, T>, x: &[Value<T>]) -> Value<T> {
        let mixture =
            self.choice().map(|choice| Mixture { gates_nh: &x[3], shared: choice.shared, routed: choice.routed });
        attention(tape, [&x[0], &x[1], &x[2]], &self.offsets(), self.spec(self.table(true).1), mixture)
    }

    fn offsets(&self) -> Arc<[usize]> {
        let ends = self.lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        });
        std::iter::once(0).chain(ends).collect()
    }

    fn rows(&self) -> usize {
        self.lengths.iter().sum()
    }

    fn table(&self, trainable: bool) -> (Layout, Option<Param>) {
        let shape = match self.kind {
            Kind::Cope(last) => vec![("table".into(), vec![last + 1, self.dh], trainable)],
            _ => vec![],
        };
        let layout = Layout::new(shape);
        let param = layout.get("table");
        (layout, param)
    }

    fn spec(&self, table: Option<Param>) -> Attention {
        let position = match self.kind {
            Kind::None => Position::None,
            Kind::Rope => Position::Rope { base: 100.0 },
            Kind::Cope(_) => Position::Cope { table: table.unwrap() },
        };
        Attention { heads: self.heads, kv_heads: self.kv_heads, window: self.window, position }
    }

    fn numbers(&self, seed: u64, scale: f64) -> Numbers {
        let (n, kv) = (self.rows(), self.kv_heads * self.dh);
        let mut inputs = vec![
            Input::random(3 * seed, n, self.heads * self.dh, scale),
            Input::random(3 * seed + 1, n, kv, scale),
            Input::random(3 * seed + 2, n, kv, 1.0),
        ];
        inputs.extend(self.mix.map(|_| Input::random(3 * seed + 5000, n, self.heads, 1.0)));
        let mut table = check::normals(seed + 7777, self.table(true).0.len(), 1.0);
        if let Some(param) = self.table(true).1 {
            table[param.len()..].fill(0.0); // the padding after the table
        }
        Numbers { inputs, table }
    }

    /// Numbers whose CoPE positions stay `distance` away from the integers, where the op has kinks.
    fn smooth_numbers(&self, distance: f64) -> Numbers {
        let smooth = |numbers: &Numbers| self.positions(numbers).iter().all(|p| (p - p.round()).abs() > distance);
        (0..).map(|seed| self.numbers(seed, 1.0)).find(smooth).unwrap()
    }

    /// All positions between 0.5 and P + 0.5.
    fn positions(&self, numbers: &Numbers) -> Vec<f64> {
        let Kind::Cope(last) = self.kind else { return Vec::new() };
        let (q, k) = (&numbers.inputs[0], &numbers.inputs[1]);
        let mut found = Vec::new();
        for (bounds, h) in self.offsets().windows(2).flat_map(|b| (0..self.heads).map(move |h| (b, h))) {
            for i in bounds[0]..bounds[1] {
                let mut position = 0.0;
                for j in (bounds[0]..=i).rev() {
                    let q = &q.data[i * q.width + h * self.dh..][..self.dh];
                    let k = &k.data[j * k.width + h / (self.heads / self.kv_heads) * self.dh..][..self.dh];
                    let u = q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (self.dh as f64).sqrt();
                    position += u.sigmoid();
                    found.push(position);
                }
            }
        }
        found.retain(|p| (0.5..last as f64 + 0.5).contains(p));
        found
    }

    fn worst(&self, numbers: &Numbers) -> f64 {
        check::worst(Engine::Cpu, &numbers.inputs, &numbers.table, |tape, x| vec![self.op(tape, x)])
    }

    fn parity<T: Real>(&self, numbers: &Numbers) -> f64 {
        let gradients = check::parity::<T>(&numbers.inputs, &numbers.table, |tape, x| vec![self.op(tape, x)]);
        let (a, b) = (self.forward::<T>(Engine::Cpu, numbers), self.forward::<T>(Engine::Reference, numbers));
        a.iter().zip(&b).fold(gradients, |worst, (a, b)| {
            let gap = (a - b).abs();
            if gap.is_nan() { f64::NAN } else { worst.max(gap) }
        })
    }

    fn forward<T: Real>(&self, engine: Engine, numbers: &Numbers) -> Vec<f64> {
        self.pass::<T>(engine, Precision::F32, numbers)
    }

    fn forward_in(&self, precision: Precision, numbers: &Numbers) -> Vec<f64> {
        self.pass::<f32>(Engine::Cpu, precision, numbers)
    }

    fn pass<T: Real>(&self, engine: Engine, precision: Precision, numbers: &Numbers) -> Vec<f64> {
        let cast = |x: &[f64]| x.iter().map(|x| T::from_f64(*x)).collect::<Vec<T>>();
        let (params, arena) = (cast(&numbers.table), Arena::default());
        let mut tape = Tape::inference(engine, &params, &arena).with_precision(precision);
        let x: Vec<_> = numbers.inputs.iter().map(|i| tape.constant(&cast(&i.data), i.rows, i.width)).collect();
        let y = self.op(&mut tape, &x);
        y.data().iter().map(|y| y.to_f64()).collect()
    }

    /// Gradients of q, k, v and the table for fixed random upstream gradients.
    fn gradients<T: Real>(&self, numbers: &Numbers) -> Vec<Vec<f64>> {
        check::analytic::<T>(Engine::Cpu, &numbers.inputs, &numbers.table, |tape, x| vec![self.op(tape, x)]).1
    }

    /// Gradients of q, k, v and the table of the sum of one output row.
    fn row_gradients(&self, numbers: &Numbers, row: usize) -> Vec<Vec<f64>> {
        check::analytic::<f64>(Engine::Cpu, &numbers.inputs, &numbers.table, |tape, x| {
            let y = self.op(tape, x);
            let width = y.width();
            let picked = tape.arena().copy(&y.data()[row * width..(row + 1) * width]);
            let picked = tape.output(picked, 1, width, true);
            let (from, to) = (picked.slot(), y.slot());
            tape.record(move |grads| {
                let Some(upstream) = grads.take(from) else { return };
                grads.add(to, |dst| dst[row * width..(row + 1) * width].copy_from_slice(&upstream));
            });
            vec![picked]
        })
        .1
    }
}

/// The sum of y, on the tape.
fn total<T: Real>(tape: &mut Tape<'_, T>, y: &Value<T>) -> Value<T> {
    let mut sum = tape.arena().zeros(1);
    sum[0] = y.data().iter().copied().sum();
    let sum = tape.output(sum, 1, 1, true);
    let (from, to) = (sum.slot(), y.slot());
    tape.record(move |grads| {
        let Some(upstream) = grads.take(from) else { return };
        grads.add(to, |dst| dst.fill(upstream[0]));
    });
    sum
}

fn bits(x: &[f64]) -> Vec<u64> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn gap(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |worst, (a, b)| if (a - b).is_nan() { f64::NAN } else { worst.max((a - b).abs()) })
}

const KINDS: [Kind; 6] = [Kind::None, Kind::Rope, Kind::Cope(1), Kind::Cope(2), Kind::Cope(3), Kind::Cope(20)];
