//! Rows of a table by id: ids [n], table [v, d] -> [n, d]. The gradient adds rows in token order.

use crate::kernels::parallel;
use crate::profile::Cost;
use crate::{Engine, Param, Real, Tape, Value, tape::add};
use candle_core::{Device, Tensor};
use std::sync::Arc;

/// Table rows that a task adds up.
const ROWS: usize = 8;

/// Numbers below which one thread is faster.
const SMALL: usize = 1 << 14;

/// Panics if an id lies outside the table: batches are checked against the vocabulary where they are made.
pub fn embedding<'a, T: Real>(tape: &mut Tape<'a, T>, ids_n: &Arc<[u32]>, table: Param) -> Value<T> {
    let (n, d) = (ids_n.len(), table.width);
    assert!(ids_n.iter().all(|id| (*id as usize) < table.rows), "embedding: id outside the table");
    let _span = tape.span("embedding", Cost::new::<T>(0, 2 * n * d));
    if tape.engine() == Engine::Reference {
        let ids = ids_n.clone();
        return tape
            .reference(&[], &[table], |t| {
                Ok(vec![t[0].index_select(&Tensor::from_slice(&ids, ids.len(), &Device::Cpu)?, 0)?])
            })
            .remove(0);
    }
    let table_vd = tape.param(&table);
    let mut y_nd = tape.arena().take(n * d);
    parallel::rows(&mut y_nd, d, |t, y_d| y_d.copy_from_slice(&table_vd[ids_n[t] as usize * d..][..d]));
    let y = tape.output(y_nd, n, d, table.trainable);
    if y.needs_grad() {
        let (ids_n, y) = (ids_n.clone(), y.slot());
        tape.record(move |grads| {
            let Some(dy_nd) = grads.take(y) else { return };
            let Some(dtable_vd) = grads.param(&table) else { return };
            // The tokens of an id in their order, so that the sum never depends on the threads.
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by_key(|&t| ids_n[t]);
            let (mut rest, mut at): (&mut [T], usize) = (dtable_vd, 0);
            let mut rows = Vec::new();
            for tokens in order.chunk_by(|&a, &b| ids_n[a] == ids_n[b]) {
                let id = ids_n[tokens[0]] as usize;
                let (row_d, tail) = std::mem::take(&mut rest).split_at_mut((id - at) * d).1.split_at_mut(d);
                rows.push((row_d, tokens));
                (rest, at) = (tail, id + 1);
            }
            parallel::each(n * d >= SMALL, rows.chunks_mut(ROWS).collect(), |rows| {
                for (row_d, tokens) in rows {
                    tokens.iter().for_each(|&t| add(row_d, &dy_nd[t * d..(t + 1) * d]));
                }
            });
        });
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::generated;
    use crate::{Layout, check};
    use proptest::prelude::*;

    fn apart<T: Real>(ids: &Arc<[u32]>, d: usize, magnitude: f64, seed: u64) -> f64 {
        let layout = Layout::new([("t".into(), vec![90, d], true)]);
        let (table, params) = (layout.get("t").unwrap(), check::normals(seed, layout.len(), magnitude));
        check::apart::<T>(&[], &params, &[1.0, magnitude], |tape, _| vec![embedding(tape, ids, table)])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn any_ids_agree_with_the_reference(
            ids in prop_oneof![prop::collection::vec(0u32..90, 0..200), prop::collection::vec(7u32..9, 0..200)],
            d in prop_oneof![4 => generated::width(), 1 => 80..300usize],
            magnitude in generated::magnitude(),
            seed in 0u64..1000,
        ) {
            let ids: Arc<[u32]> = ids.into();
            let (wide, narrow) = (apart::<f64>(&ids, d, magnitude, seed), apart::<f32>(&ids, d, magnitude, seed));
            prop_assert!(wide < 1e-13 && narrow < 1e-5, "{} {}", wide, narrow);
        }
    }

    #[test]
    fn gradients_agree_with_differences_and_with_the_reference() {
        for (ids, rows) in
            [(vec![], 2), (vec![1], 2), (vec![2, 0, 2, 2], 4), ((0..50).map(|i| i * 7 % 9).collect(), 150)]
        {
            let ids: Arc<[u32]> = ids.into();
            let layout = Layout::new([("t".into(), vec![rows, 3], true)]);
            let table = layout.get("t").unwrap();
            let params = check::normals(1, layout.len(), 1.0);
            let op = |tape: &mut Tape<'_, f64>, _: &[Value<f64>]| vec![embedding(tape, &ids, table)];
            assert!(check::worst(Engine::Cpu, &[], &params, op) < 1e-8);
            if !ids.is_empty() {
                assert!(check::parity::<f64>(&[], &params, op) < 1e-13);
            }
        }
    }
}
