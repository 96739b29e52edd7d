//! Rows of a table by id: ids [n], table [v, d] -> [n, d]. The gradient adds rows in token order.

use crate::profile::Cost;
use crate::{Engine, Param, Real, Tape, Value, tape::add};
use candle_core::{Device, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

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
    for (y_d, &id) in y_nd.chunks_mut(d).zip(ids_n.iter()) {
        y_d.copy_from_slice(&table_vd[id as usize * d..(id as usize + 1) * d]);
    }
    let y = tape.output(y_nd, n, d, table.trainable);
    if y.needs_grad() {
        let (ids_n, y) = (ids_n.clone(), y.slot());
        tape.record(move |grads| {
            let Some(dy_nd) = grads.take(y) else { return };
            let Some(dtable_vd) = grads.param(&table) else { return };
            // Every thread owns a range of table rows and scans all tokens in order, so the sum's order never depends on the threads.
            let rows = table.rows.div_ceil(8).max(64);
            dtable_vd[..table.len()].par_chunks_mut(rows * d).enumerate().for_each(|(b, part)| {
                let first = b * rows;
                for (dy_d, &id) in dy_nd.chunks(d).zip(ids_n.iter()) {
                    let id = id as usize;
                    if id >= first && (id - first) * d < part.len() {
                        add(&mut part[(id - first) * d..(id - first + 1) * d], dy_d);
                    }
                }
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
