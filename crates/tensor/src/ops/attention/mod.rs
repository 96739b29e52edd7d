//! Causal attention over ragged documents with grouped queries, a window and three kinds of position, as one op. Nothing of size T x T is kept.

mod cpu;
mod reference;
#[cfg(test)]
mod tests;

use crate::profile::Cost;
use crate::{Engine, Param, Real, Tape, Value};
use std::sync::Arc;

/// What the scores know of positions. Learned positions are added to the embeddings: `None` here.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Position {
    None,
    /// Rotary embedding (Su 2104.09864) over the whole head width, halves rotated as in Hugging Face's Llama; positions start at 0 in each document.
    Rope {
        base: f64,
    },
    /// Contextual positions (CoPE, Golovneva 2405.18719): p_ij = min(Σ_{t=j..i} σ(u_it), P) with u = q·k/√dh, the bias interpolated between
    /// q·table[⌊p⌋] and q·table[⌊p⌋+1] and added to u. `table` [P+1, dh], P ≥ 1, is shared by the heads.
    Cope {
        table: Param,
    },
}

/// Shape of an attention: query head h uses key/value head h / (heads / kv_heads); with a window of w, token i sees the keys i-w < j ≤ i.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    pub heads: usize,
    pub kv_heads: usize,
    pub window: Option<usize>,
    pub position: Position,
}

impl Attention {
    /// The first key that position `i` sees.
    fn first_key(&self, i: usize) -> usize {
        self.window.map_or(0, |w| (i + 1).saturating_sub(w))
    }

    /// Scores and mixed values of the pairs a window allows, and q·table for CoPE.
    fn cost<T>(&self, offsets_b1: &[usize], dh: usize, table: usize) -> Cost {
        let lengths = offsets_b1.windows(2).map(|w| w[1] - w[0]);
        let pairs: usize = lengths.map(|t| (0..t).map(|i| i + 1 - self.first_key(i)).sum::<usize>()).sum();
        let n = offsets_b1.last().copied().unwrap_or(0);
        let flops = 4 * pairs * self.heads * dh + 2 * n * self.heads * table;
        Cost::new::<T>(flops, 2 * n * (self.heads + self.kv_heads) * dh)
    }

    /// The width of a head; panics where shapes cannot fit, which the validated configuration of a model excludes.
    fn head_width(&self, q: usize, k: usize, v: usize, table: usize) -> usize {
        let dh = q / self.heads;
        assert!(
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads),
            "attention: heads must be shared evenly"
        );
        assert!(dh > 0 && q == self.heads * dh && k == self.kv_heads * dh && v == k, "attention: widths do not fit");
        assert!(self.window != Some(0), "attention: a window holds at least the token itself");
        match self.position {
            Position::None => {}
            Position::Rope { .. } => assert!(dh.is_multiple_of(2), "attention: RoPE needs an even head width"),
            Position::Cope { .. } => assert!(
                table.is_multiple_of(dh) && table >= 2 * dh,
                "attention: the CoPE table is [P+1, head width] with P of at least 1"
            ),
        }
        dh
    }
}

/// q [n, heads·dh], k and v [n, kv_heads·dh] → [n, heads·dh]. Document b holds the rows offsets_b1[b]..offsets_b1[b+1]; the first offset is 0,
/// the last n; a document may be empty. Scores are scaled by 1/√dh. Panics if the shapes do not fit: they are fixed by the configuration.
pub fn attention<'a, T: Real>(
    tape: &mut Tape<'a, T>,
    q: &Value<T>,
    k: &Value<T>,
    v: &Value<T>,
    offsets_b1: &Arc<[usize]>,
    spec: Attention,
) -> Value<T> {
    let n = q.rows();
    assert!(k.rows() == n && v.rows() == n, "attention: q, k and v must have the same rows");
    assert!(
        offsets_b1.first() == Some(&0) && offsets_b1.last() == Some(&n) && offsets_b1.is_sorted(),
        "attention: document offsets must rise from 0 to the number of rows"
    );
    let table = match spec.position {
        Position::Cope { table } => &tape.param(&table)[..table.len()],
        _ => &[],
    };
    let dh = spec.head_width(q.width(), k.width(), v.width(), table.len());
    let _span = tape.span("attention", spec.cost::<T>(offsets_b1, dh, table.len()));
    match tape.engine() {
        Engine::Reference => reference::attention(tape, q, k, v, offsets_b1, spec),
        _ => cpu::attention(tape, [q, k, v], offsets_b1, spec, table),
    }
}

/// The last `m` rows of one document against its cache, for decoding: q [m, heads·dh] are the tokens at positions t-m..t, k and v
/// [t, kv_heads·dh] all tokens so far (not rotated: RoPE happens inside), `table` the numbers of the CoPE table (else empty). Returns [m, heads·dh].
/// With a window, keys that have left it may be dropped from the front of the cache (and t reduced): only differences of positions enter.
pub fn decode<T: Real>(q: &[T], k: &[T], v: &[T], m: usize, t: usize, spec: Attention, table: &[T]) -> Vec<T> {
    assert!(m <= t, "decode: more queries than tokens");
    if m == 0 {
        return Vec::new();
    }
    let dh = spec.head_width(q.len() / m, k.len() / t, v.len() / t, table.len());
    assert!(
        q.len() == m * spec.heads * dh && k.len() == t * spec.kv_heads * dh && v.len() == k.len(),
        "decode: q, k and v do not have m and t rows"
    );
    cpu::decode(q, k, v, m, t, spec, table)
}
