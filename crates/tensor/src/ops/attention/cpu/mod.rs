//! Streaming forward and backward. A work item is a run of query rows of one document; inside it the rows of the query heads that share a
//! key/value head, and that their tokens chose, are gathered into tiles of sixteen. A tile walks over the keys in blocks, from the nearest to the
//! farthest, and keeps the scores of one block; backward computes them again from the saved maximum and sum of each row. Blocks lie at
//! fixed positions of the document, so that a row's result does not depend on which rows share its tile.

mod backward;
mod forward;
mod operand;
mod plan;
mod rotary;
mod tile;

use super::{Attention, Mixture, Position, Reach};
use crate::tape::add;
use crate::{Param, Precision, Real, Tape, Value, kept};
use backward::backward;
use forward::forward;
pub use plan::numbers_of_backward;
use plan::{Item, Plan, each, items, split};
use std::sync::Arc;

pub(super) fn attention<'a, T: Real>(
    tape: &mut Tape<'a, T>,
    [q, k, v]: [&Value<T>; 3],
    offsets_b1: &Arc<[usize]>,
    (spec, reach): (Attention, Reach),
    mixture: Option<Mixture<'_, T>>,
    table: &'a [T],
) -> (Value<T>, Vec<T>) {
    let (n, width) = (q.rows(), q.width());
    let param = match spec.position {
        Position::Cope { table } if table.trainable => Some(table),
        _ => None,
    };
    let gates = mixture.as_ref().map(|mixture| mixture.gates_nh.clone());
    let choice = mixture.map(|mixture| mixture.choice());
    let mut out = tape.arena().take(n * width);
    let mut stats = tape.arena().take(n * spec.heads * 2);
    let items = items(offsets_b1, spec);
    let precision = tape.precision();
    let mut plan = Plan::new([q.data(), k.data(), v.data()], width, &items, (spec, &reach), table, precision);
    plan.mix(gates.as_ref().map(Value::data), choice.clone());
    let measured = if reach.windows_n.is_some() { spec.heads } else { 0 };
    let mut entropies = vec![T::ZERO; n * measured];
    let parts = split(&items, &mut out, width).into_iter().zip(split(&items, &mut stats, spec.heads * 2));
    let work: Vec<_> = items.iter().zip(parts).zip(split(&items, &mut entropies, measured)).collect();
    each(&plan, work, |scratch, ((item, (out, stats)), entropies)| {
        forward(&plan, item, scratch, [out, stats, entropies]);
    });
    drop(plan);
    let inputs = [Some(q.clone()), Some(k.clone()), Some(v.clone()), gates];
    let needs = inputs.iter().flatten().any(Value::needs_grad) || param.is_some();
    let y = tape.output(out, n, width, needs);
    if y.needs_grad() {
        let y_kept = y.clone();
        tape.record(move |grads| {
            let Some(upstream) = grads.take(y_kept.slot()) else { return };
            let data = |i: usize| inputs[i].as_ref().map_or(&[][..], Value::data);
            let mut plan = Plan::new([data(0), data(1), data(2)], width, &items, (spec, &reach), table, precision);
            plan.mix(inputs[3].as_ref().map(Value::data), choice);
            let arena = grads.arena();
            let mut d = [0, 1, 2, 3].map(|i| arena.take(data(i).len()));
            let d_table = backward(&plan, &items, arena, [y_kept.data(), &upstream, &stats], &mut d);
            drop(plan);
            for (input, gradient) in inputs.iter().zip(d) {
                if let Some(input) = input {
                    grads.give(input.slot(), gradient);
                }
            }
            if let Some(sum) = param.and_then(|param: Param| grads.param(&param)) {
                add(sum, &d_table);
            }
        });
    }
    (y, entropies)
}

pub(super) fn decode<T: Real>(
    [q, k, v]: [&[T]; 3],
    (m, t): (usize, usize),
    (spec, reach): (Attention, Reach),
    mixture: Option<Mixture<'_, T>>,
    table: &[T],
    precision: Precision,
) -> (Vec<T>, Vec<T>) {
    let items = [Item { keys_at: 0, queries_at: 0, rows: t - m..t }];
    let mut out = vec![T::ZERO; q.len()];
    let mut stats = vec![T::ZERO; m * spec.heads * 2];
    let mut entropies = vec![T::ZERO; if reach.windows_n.is_some() { m * spec.heads } else { 0 }];
    let mut plan = Plan::new([q, k, v], q.len() / m, &items, (spec, &reach), table, precision);
    plan.mix(mixture.as_ref().map(|mixture| mixture.gates_nh.data()), mixture.as_ref().map(Mixture::choice));
    kept::with(|scratch| forward(&plan, &items[0], scratch, [&mut out, &mut stats, &mut entropies]));
    (out, entropies)
}
