//! Causal attention over ragged documents with grouped queries, a window, three kinds of position and a mixture of heads, as one op. Nothing of
//! size T x T is kept: memory grows with the number of tokens. Products are f32, or of pairs of bf16 where the precision of the tape allows it and the
//! machine has them; sums, exponents and positions are f32. A number that is not finite makes rows that see it NaN, and may make those NaN that
//! share a tile or a pair of keys with them.

mod breadth;
mod cpu;
mod reference;
#[cfg(test)]
mod tests;

use crate::ops::experts::Assignments;
use crate::profile::Cost;
use crate::{Engine, Param, Precision, Real, Tape, Value};
use std::sync::Arc;

pub use cpu::numbers_of_backward;

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

/// A mixture of heads (Jin 2410.11842): the output of head h of token t is multiplied by `gates_nh`[t, h]. Heads 0..shared serve every token; head
/// shared + e serves the tokens whose row of `routed` holds e. For all other tokens its output is exactly zero, whatever the gate, and nothing
/// is computed, forward or backward; its keys and values still serve the tokens that chose it.
#[derive(Clone, Debug)]
pub struct Mixture<'v, T: Real> {
    pub gates_nh: &'v Value<T>,
    pub shared: usize,
    pub routed: Arc<Assignments>,
}

/// Which heads serve which tokens.
#[derive(Clone, Debug)]
struct Choice {
    shared: usize,
    routed: Arc<Assignments>,
}

impl Choice {
    fn serves(&self, head: usize, token: usize) -> bool {
        head < self.shared || self.routed.row(token).contains(&((head - self.shared) as u32))
    }
}

impl<T: Real> Mixture<'_, T> {
    fn choice(&self) -> Choice {
        Choice { shared: self.shared, routed: self.routed.clone() }
    }

    fn check(&self, n: usize, heads: usize) {
        assert!(
            self.shared + self.routed.num_experts == heads && self.routed.num_tokens() == n,
            "attention: the mixture of heads needs a choice for every token and all heads"
        );
        assert!((self.gates_nh.rows(), self.gates_nh.width()) == (n, heads), "attention: one gate per token and head");
    }
}

/// How far rows look back: as the shape says, or each as far as a window of its own.
#[derive(Clone, Debug)]
struct Reach {
    window: Option<usize>,
    windows_n: Option<Arc<[u32]>>,
}

impl Reach {
    /// Keys that row `row` of the queries sees at most.
    #[inline]
    fn window(&self, row: usize) -> Option<usize> {
        self.windows_n.as_ref().map_or(self.window, |windows_n| Some(windows_n[row] as usize))
    }

    /// The first key that row `row` of the queries, at `position` of its document, sees.
    #[inline]
    fn first(&self, row: usize, position: usize) -> usize {
        self.window(row).map_or(0, |w| (position + 1).saturating_sub(w))
    }

    fn check(&self, n: usize) {
        let good = self.windows_n.as_ref().is_none_or(|own| own.len() == n && own.iter().all(|&w| w > 0));
        assert!(good && self.window != Some(0), "attention: a window holds at least the token itself");
    }
}

impl Attention {
    fn reach(&self, windows_n: Option<&Arc<[u32]>>) -> Reach {
        Reach { window: self.window, windows_n: windows_n.cloned() }
    }

    /// Scores and mixed values of the pairs a window allows, and q·table for CoPE, in the heads that serve each token.
    fn cost<T: Real>(
        &self,
        offsets_b1: &[usize],
        reach: &Reach,
        mixture: Option<&Mixture<'_, T>>,
        (dh, table): (usize, usize),
    ) -> Cost {
        let heads = |t| mixture.map_or(self.heads, |mixture| mixture.shared + mixture.routed.row(t).len());
        let flops = |document: &[usize]| {
            let row = |t: usize| 4 * (t - document[0] + 1 - reach.first(t, t - document[0])) * dh + 2 * table;
            (document[0]..document[1]).map(|t| row(t) * heads(t)).sum::<usize>()
        };
        let n = offsets_b1.last().copied().unwrap_or(0);
        Cost::new::<T>(offsets_b1.windows(2).map(flops).sum(), 2 * n * (self.heads + self.kv_heads) * dh)
    }

    /// The width of a head; panics where shapes cannot fit, which the validated configuration of a model excludes.
    fn head_width(&self, q: usize, k: usize, v: usize, table: usize) -> usize {
        let dh = q / self.heads;
        assert!(
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads),
            "attention: heads must be shared evenly"
        );
        assert!(dh > 0 && q == self.heads * dh && k == self.kv_heads * dh && v == k, "attention: widths do not fit");
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
    [q, k, v]: [&Value<T>; 3],
    offsets_b1: &Arc<[usize]>,
    spec: Attention,
    mixture: Option<Mixture<'_, T>>,
) -> Value<T> {
    attend(tape, [q, k, v], offsets_b1, spec, mixture, None).0
}

/// As [`attention`], where row t sees the last windows_n[t] keys, at least itself; the shape's own window only tells the CPU face how much work to
/// expect. Also returns how broadly each row attended: the entropy of its weights as a share of the largest that its window allows, from 0 (one
/// key) to 1 (all keys alike), mean over the heads that serve it; a constant.
pub fn attention_within<'a, T: Real>(
    tape: &mut Tape<'a, T>,
    inputs: [&Value<T>; 3],
    offsets_b1: &Arc<[usize]>,
    spec: Attention,
    mixture: Option<Mixture<'_, T>>,
    windows_n: &Arc<[u32]>,
) -> (Value<T>, Vec<f64>) {
    let choice = mixture.as_ref().map(Mixture::choice);
    let (y, entropies_nh) = attend(tape, inputs, offsets_b1, spec, mixture, Some(windows_n));
    let positions = offsets_b1.windows(2).flat_map(|document| 0..document[1] - document[0]);
    (y, breadth::breadth(&entropies_nh, spec.heads, positions, windows_n, choice.as_ref()))
}

/// The output, and with windows of their own the entropies of the rows [n, heads].
fn attend<'a, T: Real>(
    tape: &mut Tape<'a, T>,
    [q, k, v]: [&Value<T>; 3],
    offsets_b1: &Arc<[usize]>,
    spec: Attention,
    mixture: Option<Mixture<'_, T>>,
    windows_n: Option<&Arc<[u32]>>,
) -> (Value<T>, Vec<T>) {
    let (n, reach) = (q.rows(), spec.reach(windows_n));
    reach.check(n);
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
    if let Some(mixture) = &mixture {
        mixture.check(n, spec.heads);
    }
    let _span = tape.span("attention", spec.cost::<T>(offsets_b1, &reach, mixture.as_ref(), (dh, table.len())));
    match tape.engine() {
        Engine::Reference => reference::attention(tape, [q, k, v], offsets_b1, (spec, reach), mixture),
        _ => cpu::attention(tape, [q, k, v], offsets_b1, (spec, reach), mixture, table),
    }
}

/// The last `m` rows of one document against its cache, for decoding: q [m, heads·dh] are the tokens at positions t-m..t, k and v
/// [t, kv_heads·dh] all tokens so far (not rotated: RoPE happens inside), `table` the numbers of the CoPE table (else empty), `mixture` that of the
/// m tokens. Returns [m, heads·dh]. With a window, keys that have left it may be dropped from the front of the cache (and t reduced): only
/// differences of positions enter (in bf16 up to its rounding).
pub fn decode<T: Real>(
    inputs: [&[T]; 3],
    (m, t): (usize, usize),
    spec: Attention,
    mixture: Option<Mixture<'_, T>>,
    table: &[T],
    precision: Precision,
) -> Vec<T> {
    decode_rows(inputs, (m, t), spec, mixture, (table, precision), None).0
}

/// As [`decode`] with windows of their own for the m rows and what [`attention_within`] returns beside the output; the cache holds every key.
pub fn decode_within<T: Real>(
    inputs: [&[T]; 3],
    (m, t): (usize, usize),
    spec: Attention,
    mixture: Option<Mixture<'_, T>>,
    (table, precision): (&[T], Precision),
    windows_m: &Arc<[u32]>,
) -> (Vec<T>, Vec<f64>) {
    let choice = mixture.as_ref().map(Mixture::choice);
    let (out, entropies_mh) = decode_rows(inputs, (m, t), spec, mixture, (table, precision), Some(windows_m));
    (out, breadth::breadth(&entropies_mh, spec.heads, t - m..t, windows_m, choice.as_ref()))
}

fn decode_rows<T: Real>(
    [q, k, v]: [&[T]; 3],
    (m, t): (usize, usize),
    spec: Attention,
    mixture: Option<Mixture<'_, T>>,
    (table, precision): (&[T], Precision),
    windows_m: Option<&Arc<[u32]>>,
) -> (Vec<T>, Vec<T>) {
    assert!(m <= t, "decode: more queries than tokens");
    let reach = spec.reach(windows_m);
    reach.check(m);
    if m == 0 {
        return (Vec::new(), Vec::new());
    }
    let dh = spec.head_width(q.len() / m, k.len() / t, v.len() / t, table.len());
    assert!(
        q.len() == m * spec.heads * dh && k.len() == t * spec.kv_heads * dh && v.len() == k.len(),
        "decode: q, k and v do not have m and t rows"
    );
    if let Some(mixture) = &mixture {
        mixture.check(m, spec.heads);
    }
    cpu::decode([q, k, v], (m, t), (spec, reach), mixture, table, precision)
}
