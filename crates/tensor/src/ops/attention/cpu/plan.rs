//! How the work is cut, and what all its pieces share.

use super::super::{Attention, Choice, Position, Reach};
use super::operand::Rows;
use super::rotary::Rope;
use super::tile::Scratch;
use crate::kernels::lanes::{self, PIECE};
use crate::kernels::parallel;
use crate::{Precision, Real, kept};
use std::ops::Range;
use std::sync::Arc;

/// A batch is cut into about `ITEMS` pieces of equal work, but no document into pieces below `ROWS` positions. Fixed, whatever the number of
/// threads, because it decides the order in which gradients of keys are summed.
const ITEMS: usize = 16;
const ROWS: usize = 64;

/// Pairs of query and key, counted per head, below which one thread is faster than waking the pool.
const SMALL: usize = 8192;

/// Query positions `rows` of a document whose first key is row `keys_at` of k and v; the query of position rows.start is row `queries_at` of q.
#[derive(Debug)]
pub(super) struct Item {
    pub keys_at: usize,
    pub queries_at: usize,
    pub rows: Range<usize>,
}

/// Pairs that the first `i` positions see.
fn pairs_before(i: usize, spec: Attention) -> usize {
    let full = spec.window.map_or(i, |w| w.min(i)); // these see all keys before them
    full * (full + 1) / 2 + (i - full) * spec.window.unwrap_or(0)
}

pub(super) fn items(offsets_b1: &[usize], spec: Attention) -> Vec<Item> {
    let lengths = || offsets_b1.windows(2).map(|bounds| bounds[1] - bounds[0]);
    let total: usize = lengths().map(|t| pairs_before(t, spec)).sum();
    let mut items = Vec::with_capacity(offsets_b1.len());
    for (keys_at, t) in offsets_b1.iter().zip(lengths()) {
        let pairs = pairs_before(t, spec);
        let parts = (pairs * ITEMS).div_ceil(total.max(1)).clamp(1, (t / ROWS).max(1));
        let mut start = 0;
        for part in 1..=parts {
            let wanted = (pairs as u128 * part as u128 / parts as u128) as usize;
            let end = start + partition_point(t - start, |i| pairs_before(start + i, spec) < wanted);
            if end > start {
                items.push(Item { keys_at: *keys_at, queries_at: keys_at + start, rows: start..end });
            }
            start = end;
        }
    }
    items
}

/// Numbers that a step holds for attention on the way back beside the gradients themselves, for `documents` documents of `length` tokens: of every
/// item that shares its document the gradients of the keys and values it sees, each `kv_width` wide, and what threads keep of every step on: rows of a
/// head `dh` wide, with their pairs, and the scores of a tile. An estimate for the size of a batch, which may be absurd: nothing is allocated.
pub fn numbers_of_backward(
    [documents, length]: [f64; 2],
    window: Option<usize>,
    [kv_width, dh]: [usize; 2],
    threads: usize,
) -> [f64; 2] {
    let parts = (ITEMS as f64 / documents).ceil().min((length / ROWS as f64).floor()).max(1.0);
    let seen = window.map_or(length, |w| length.min(w as f64));
    // Items of equal work: without a window their ends lie as the square roots of their numbers, with one evenly.
    let ends: f64 = (1..=parts as usize).map(|part| (part as f64 / parts).sqrt()).sum();
    let keys = if parts > 1.0 { (ends * length).min(length + (parts - 1.0) * seen) } else { 0.0 };
    let tile = 8 * lanes::LANES;
    let scratch = threads as f64 * length * (6 * dh.next_multiple_of(PIECE) + tile) as f64;
    [2.0 * documents * keys * kv_width as f64, scratch]
}

/// The first i in 0..len for which `before` does not hold, or len.
fn partition_point(len: usize, before: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, len);
    while low < high {
        let middle = low.midpoint(high);
        if before(middle) { low = middle + 1 } else { high = middle }
    }
    low
}

/// The rows of each item, which lie one after the other.
pub(super) fn split<'s, T>(items: &[Item], mut data: &'s mut [T], width: usize) -> Vec<&'s mut [T]> {
    let mut parts = Vec::with_capacity(items.len());
    for item in items {
        let (part, rest) = data.split_at_mut(item.rows.len() * width);
        parts.push(part);
        data = rest;
    }
    parts
}

/// Runs `f` on every piece of work and returns the results in order.
pub(super) fn each<T: Real, W: Send, R: Send>(
    plan: &Plan<'_, T>,
    work: Vec<W>,
    f: impl Fn(&mut Scratch<T>, W) -> R + Sync + Send,
) -> Vec<R> {
    parallel::map(plan.pairs >= SMALL, work, |work| kept::with(|scratch| f(scratch, work)))
}

/// What all items share.
pub(super) struct Plan<'s, T: Real> {
    pub q: &'s [T],
    pub k: &'s [T],
    pub v: &'s [T],
    pub spec: Attention,
    reach: &'s Reach,
    /// Gates [n, heads] and the choice of heads, where there is a mixture.
    pub gates: Option<&'s [T]>,
    choice: Option<Choice>,
    /// Query heads of one key/value head.
    pub group: usize,
    /// Width of a head, and the pieces of a padded row.
    pub dh: usize,
    pub wide: usize,
    /// Queries are scaled where they are read, by 1/√dh.
    pub scale: T,
    pub rope: Option<Arc<Rope<T>>>,
    pub cope: Option<Cope<T>>,
    /// Whether tiles multiply pairs of bf16.
    pub narrow: bool,
    pairs: usize,
}

impl<'s, T: Real> Plan<'s, T> {
    pub(super) fn new(
        [q, k, v]: [&'s [T]; 3],
        width: usize,
        items: &[Item],
        (spec, reach): (Attention, &'s Reach),
        table: &[T],
        precision: Precision,
    ) -> Plan<'s, T> {
        let narrow = lanes::narrow::pays::<T>(precision);
        let dh = width / spec.heads;
        let longest = items.iter().map(|item| item.rows.end).max().unwrap_or(0);
        let pairs = items.iter().map(|item| pairs_before(item.rows.end, spec) - pairs_before(item.rows.start, spec));
        let root = T::from_f64((dh as f64).sqrt());
        let (rope, cope) = match spec.position {
            Position::None => (None, None),
            Position::Rope { base } => (Some(Rope::of(base, dh, longest)), None),
            Position::Cope { .. } => {
                let last = table.len() / dh - 1;
                let table: Vec<T> = table.iter().map(|e| *e * root).collect();
                (None, Some(Cope { last, table: Rows::new(&table, dh, narrow) }))
            }
        };
        Plan {
            q,
            k,
            v,
            spec,
            reach,
            gates: None,
            choice: None,
            group: spec.heads / spec.kv_heads,
            dh,
            wide: dh.div_ceil(PIECE),
            scale: T::ONE / root,
            rope,
            cope,
            narrow,
            pairs: pairs.sum::<usize>() * spec.heads,
        }
    }

    /// Sets gates and choice of a mixture of heads.
    pub(super) fn mix(&mut self, gates: Option<&'s [T]>, choice: Option<Choice>) {
        (self.gates, self.choice) = (gates, choice);
    }

    /// The first key that the i-th query of an item sees.
    pub(super) fn first_key(&self, item: &Item, i: usize) -> usize {
        self.reach.first(item.queries_at + i, item.rows.start + i)
    }

    /// From a row of key/value head `kv` to the row that will be read after it, where each head's part is `width` numbers and an item has `rows` of
    /// them: beside it, or at the same place of the next item.
    pub(super) fn ahead(&self, width: usize, kv: usize, rows: usize) -> usize {
        if kv + 1 < self.spec.kv_heads { width } else { rows * self.spec.kv_heads * width - kv * width }
    }

    /// Whether rows have windows of their own.
    pub(super) fn own_windows(&self) -> bool {
        self.reach.windows_n.is_some()
    }

    /// Whether the entropy of each row's weights is wanted: other windows follow from it.
    pub(super) fn measures(&self) -> bool {
        self.own_windows()
    }

    /// The query rows of an item that use key/value head `kv`, by position: their places in [rows, heads].
    pub(super) fn rows(&self, item: &Item, kv: usize, to: &mut Vec<u32>) {
        to.clear();
        let heads = kv * self.group..(kv + 1) * self.group;
        for i in 0..item.rows.len() {
            let places = heads.clone().map(|h| (i * self.spec.heads + h) as u32);
            match &self.choice {
                None => to.extend(places),
                Some(choice) => {
                    let served = heads.clone().map(|h| choice.serves(h, item.queries_at + i));
                    to.extend(places.zip(served).filter_map(|(place, served)| served.then_some(place)));
                }
            }
        }
    }
}

/// The CoPE table [P+1, dh] times √dh, because it meets scaled queries.
pub(super) struct Cope<T> {
    /// P, the largest position.
    pub last: usize,
    pub table: Rows<T>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_counts_the_keys_that_items_see() {
        for (documents, length, window) in
            [(1, 4096, None), (1, 1024, None), (3, 300, None), (40, 20, None), (1, 4096, Some(256)), (2, 500, Some(9))]
        {
            let offsets: Vec<usize> = (0..=documents).map(|i| i * length).collect();
            let spec = Attention { heads: 1, kv_heads: 1, window, position: Position::None };
            let first = |row: usize| window.map_or(0, |w| (row + 1).saturating_sub(w));
            let items = items(&offsets, spec);
            let shared = items.chunk_by(|a, b| a.keys_at == b.keys_at).filter(|group| group.len() > 1).flatten();
            let keys: usize = shared.map(|item| item.rows.end - first(item.rows.start)).sum();
            let told = numbers_of_backward([documents as f64, length as f64], window, [1, 8], 0)[0] / 2.0;
            let off = (told - keys as f64).abs();
            assert!(off <= 0.1 * keys as f64, "{documents} of {length}, {window:?}: {told} for {keys}");
        }
        assert!(numbers_of_backward([1.0, 1e18], None, [1, 8], 2).iter().all(|numbers| *numbers > 1e18));
    }
}
