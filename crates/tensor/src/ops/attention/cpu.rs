//! Streaming forward and backward. A work item is a run of query rows of one document; inside it the query heads that share a key/value head are
//! stacked (row = position · group + head), so that a tile of a few rows meets the same keys. A tile keeps its scores, nothing larger; backward
//! computes them again, in the very same order and therefore to the same bits, from the saved maximum and sum of each row.

use super::{Attention, Position};
use crate::kernels::simd::{self, Kernel, LANES, Left, ROWS, exp, narrow, padded, product, sigmoid, widen};
use crate::tape::add;
use crate::{Buffer, Param, Real, Tape, Value};
use rayon::prelude::*;
use std::ops::Range;
use std::rc::Rc;

/// Stacked rows of a tile.
const TILE: usize = 8;

/// Long documents are cut into at most `CHUNKS` items of at least `CHUNK` positions: fixed, because it decides the order of summation.
const CHUNK: usize = 64;
const CHUNKS: usize = 8;

/// Pairs of query and key, counted per head, below which one thread is faster than waking the pool.
const SMALL: usize = 8192;

pub(super) fn attention<'a, T: Real>(
    tape: &mut Tape<'a, T>,
    [q, k, v]: [&Value<T>; 3],
    offsets_b1: &Rc<[usize]>,
    spec: Attention,
    table: &'a [T],
) -> Value<T> {
    let (n, width) = (q.rows(), q.width());
    let param = match spec.position {
        Position::Cope { table } if table.trainable => Some(table),
        _ => None,
    };
    let mut out = tape.arena().take(n * width);
    let mut stats = tape.arena().take(n * spec.heads * 2);
    let items = items(offsets_b1);
    let plan = Plan::new([q.data(), k.data(), v.data()], width, &items, spec, table);
    let parts = split(&items, &mut out, width).into_iter().zip(split(&items, &mut stats, spec.heads * 2));
    let work: Vec<_> = items.iter().zip(parts).collect();
    each(&plan, work, Scratch::new, |scratch, (item, (out, stats))| {
        simd::dispatch(Forward { plan: &plan, item, scratch, out, stats });
    });
    drop(plan);
    let needs = q.needs_grad() || k.needs_grad() || v.needs_grad() || param.is_some();
    let y = tape.output(out, n, width, needs);
    if y.needs_grad() {
        let (inputs, y) = ([q.clone(), k.clone(), v.clone()], y.slot());
        tape.record(move |grads| {
            let Some(upstream) = grads.take(y) else { return };
            let [q, k, v] = &inputs;
            let plan = Plan::new([q.data(), k.data(), v.data()], width, &items, spec, table);
            let arena = grads.arena();
            let mut d = [arena.take(q.data().len()), arena.zeros(k.data().len()), arena.zeros(v.data().len())];
            let d_table = backward(&plan, &items, &upstream, &stats, &mut d);
            drop(plan);
            for (input, gradient) in inputs.iter().zip(d) {
                grads.give(input.slot(), gradient);
            }
            if let Some(sum) = param.and_then(|param: Param| grads.param(&param)) {
                add(sum, &d_table);
            }
        });
    }
    y
}

pub(super) fn decode<T: Real>(q: &[T], k: &[T], v: &[T], m: usize, t: usize, spec: Attention, table: &[T]) -> Vec<T> {
    let items = [Item { keys_at: 0, queries_at: 0, rows: t - m..t }];
    let mut out = vec![T::ZERO; q.len()];
    let mut stats = vec![T::ZERO; m * spec.heads * 2];
    let plan = Plan::new([q, k, v], q.len() / m, &items, spec, table);
    let (item, mut scratch) = (&items[0], Scratch::new());
    simd::dispatch(Forward { plan: &plan, item, scratch: &mut scratch, out: &mut out, stats: &mut stats });
    out
}

/// Query positions `rows` of a document whose first key is row `keys_at` of k and v; the query of position rows.start is row `queries_at` of q.
#[derive(Debug)]
struct Item {
    keys_at: usize,
    queries_at: usize,
    rows: Range<usize>,
}

fn items(offsets_b1: &[usize]) -> Vec<Item> {
    let mut items = Vec::with_capacity(offsets_b1.len());
    for bounds in offsets_b1.windows(2) {
        let (keys_at, t) = (bounds[0], bounds[1] - bounds[0]);
        let chunk = t.div_ceil(t.div_ceil(CHUNK).clamp(1, CHUNKS)).max(1);
        items.extend((0..t).step_by(chunk).map(|start| {
            let rows = start..(start + chunk).min(t);
            Item { keys_at, queries_at: keys_at + start, rows }
        }));
    }
    items
}

/// The rows of each item, which lie one after the other.
fn split<'s, T>(items: &[Item], mut data: &'s mut [T], width: usize) -> Vec<&'s mut [T]> {
    let mut parts = Vec::with_capacity(items.len());
    for item in items {
        let (part, rest) = data.split_at_mut(item.rows.len() * width);
        parts.push(part);
        data = rest;
    }
    parts
}

/// Runs `f` on every piece of work, each thread with its own scratch, and returns the results in order.
fn each<T: Real, W: Send, S, R: Send>(
    plan: &Plan<'_, T>,
    work: Vec<W>,
    scratch: impl Fn() -> S + Sync + Send,
    f: impl Fn(&mut S, W) -> R + Sync + Send,
) -> Vec<R> {
    if plan.pairs < SMALL || work.len() < 2 {
        let mut scratch = scratch();
        work.into_iter().map(|work| f(&mut scratch, work)).collect()
    } else {
        work.into_par_iter().with_max_len(1).map_init(scratch, f).collect()
    }
}

/// What all items share.
struct Plan<'s, T: Real> {
    q: &'s [T],
    k: &'s [T],
    v: &'s [T],
    spec: Attention,
    /// Query heads of one key/value head.
    group: usize,
    /// Width of a head, and the same padded with zeros.
    dh: usize,
    wide: usize,
    scale: T,
    rope: Option<Rope<T>>,
    cope: Option<Cope<T>>,
    pairs: usize,
}

impl<'s, T: Real> Plan<'s, T> {
    fn new([q, k, v]: [&'s [T]; 3], width: usize, items: &[Item], spec: Attention, table: &[T]) -> Self {
        let dh = width / spec.heads;
        let longest = items.iter().map(|item| item.rows.end).max().unwrap_or(0);
        let pairs = items.iter().map(|item| item.rows.clone().map(|i| i + 1 - spec.first_key(i)).sum::<usize>());
        let (rope, cope) = match spec.position {
            Position::None => (None, None),
            Position::Rope { base } => (Some(Rope::new(base, dh, longest)), None),
            Position::Cope { .. } => {
                let keys = spec.window.map_or(longest, |w| w.min(longest));
                (None, Some(Cope::new(table, dh, keys)))
            }
        };
        Plan {
            q,
            k,
            v,
            spec,
            group: spec.heads / spec.kv_heads,
            dh,
            wide: padded(dh),
            scale: T::from_f64(1.0 / (dh as f64).sqrt()),
            rope,
            cope,
            pairs: pairs.sum::<usize>() * spec.heads,
        }
    }
}

/// Cosines and sines of the angles position · base^(-2d/dh), [positions, dh/2].
struct Rope<T> {
    half: usize,
    cos: Vec<T>,
    sin: Vec<T>,
}

impl<T: Real> Rope<T> {
    fn new(base: f64, dh: usize, positions: usize) -> Self {
        /// Positions between two exact evaluations; those between are turned by one angle each (in f64).
        const EXACT: usize = 32;
        let half = dh / 2;
        let angles: Vec<f64> = (0..half).map(|d| base.powf(-(d as f64) / half as f64)).collect();
        let steps: Vec<(f64, f64)> = angles.iter().map(|a| a.sin_cos()).collect();
        let mut now = vec![(0.0, 1.0); half];
        let (mut cos, mut sin) = (Vec::with_capacity(positions * half), Vec::with_capacity(positions * half));
        for t in 0..positions {
            for ((now, angle), (s, c)) in now.iter_mut().zip(&angles).zip(&steps) {
                *now = match t % EXACT {
                    0 => (t as f64 * angle).sin_cos(),
                    _ => (now.0 * c + now.1 * s, now.1 * c - now.0 * s),
                };
                sin.push(narrow(now.0));
                cos.push(narrow(now.1));
            }
        }
        Rope { half, cos, sin }
    }

    /// Rotates the head x [dh] to `position`, or back when `back`.
    #[inline(always)]
    fn turn(&self, x: &mut [T], position: usize, back: bool) {
        let range = position * self.half..(position + 1) * self.half;
        let (low, high) = x[..2 * self.half].split_at_mut(self.half);
        let angles = self.cos[range.clone()].iter().zip(&self.sin[range]);
        for ((a, b), (cos, sin)) in low.iter_mut().zip(high).zip(angles) {
            let sin = if back { -*sin } else { *sin };
            (*a, *b) = (*a * *cos - *b * sin, *b * *cos + *a * sin);
        }
    }
}

/// The rows of the CoPE table that positions can reach, padded, by row and by column.
struct Cope<T> {
    /// P, the largest position.
    last: usize,
    /// The most keys a query has.
    keys: usize,
    /// [stride, wide] and [dh, stride].
    rows: Vec<T>,
    cols: Vec<T>,
    stride: usize,
}

impl<T: Real> Cope<T> {
    fn new(table: &[T], dh: usize, keys: usize) -> Self {
        let last = table.len() / dh - 1;
        let (reach, wide) = (last.min(keys + 1) + 1, padded(dh));
        let stride = padded(reach);
        let (mut rows, mut cols) = (vec![T::ZERO; stride * wide], vec![T::ZERO; dh * stride]);
        for (n, row) in table.chunks_exact(dh).take(reach).enumerate() {
            rows[n * wide..n * wide + dh].copy_from_slice(row);
            row.iter().enumerate().for_each(|(d, x)| cols[d * stride + n] = *x);
        }
        Cope { last, keys, rows, cols, stride }
    }

    /// Rows of the table, padded, that queries with up to `keys` keys can touch: a position is at most `keys`, and the row above it is read too.
    #[inline(always)]
    fn reach(&self, keys: usize) -> usize {
        padded(self.last.min(keys.min(self.keys) + 1) + 1)
    }
}

/// Working memory of a thread: packed operands of one item and key/value head, and one tile of scores.
struct Scratch<T> {
    /// Stacked queries [rows, wide].
    q: Vec<T>,
    /// Keys [keys, wide] and [dh, keys]; values likewise.
    k: Vec<T>,
    k_cols: Vec<T>,
    v: Vec<T>,
    v_cols: Vec<T>,
    /// Upstream gradient, stacked; gradients of packed q (a tile), k, v and table.
    d_out: Vec<T>,
    dq: Vec<T>,
    dk: Vec<T>,
    dv: Vec<T>,
    d_table: Vec<T>,
    tile: Tile<T>,
}

/// One tile of `TILE` stacked rows; [TILE, cols] unless noted.
struct Tile<T> {
    /// Scores, then weights.
    s: Vec<T>,
    gate: Vec<T>,
    /// Upstream gradient of the weights, then gradient of the scaled products.
    d: Vec<T>,
    /// Where in the table a pair lies: row below and fraction above it.
    below: Vec<u32>,
    fraction: Vec<T>,
    /// q · table and its gradient [TILE, reach].
    z: Vec<T>,
    dz: Vec<T>,
    /// [TILE, wide].
    out: Vec<T>,
}

impl<T> Scratch<T> {
    fn new() -> Self {
        let [q, k, k_cols, v, v_cols, d_out, dq, dk, dv, d_table] = [(); 10].map(|()| Vec::new());
        let [s, gate, d, fraction, z, dz, out] = [(); 7].map(|()| Vec::new());
        let tile = Tile { s, gate, d, below: Vec::new(), fraction, z, dz, out };
        Scratch { q, k, k_cols, v, v_cols, d_out, dq, dk, dv, d_table, tile }
    }
}

#[inline(always)]
fn zeros<T: Real>(x: &mut Vec<T>, len: usize) {
    x.clear();
    x.resize(len, T::ZERO);
}

/// Grows `x` to at least `len`; what is in it does not matter.
#[inline(always)]
fn room<T: Copy>(x: &mut Vec<T>, len: usize, fill: T) {
    if x.len() < len {
        x.resize(len, fill);
    }
}

/// The keys of an item: packed rows 0..keys stand for positions first..rows.end, `stride` leaves room to read a padded row from anywhere.
#[derive(Clone, Copy)]
struct Keys {
    first: usize,
    len: usize,
    stride: usize,
}

impl Keys {
    #[inline(always)]
    fn new<T: Real>(plan: &Plan<'_, T>, item: &Item) -> Self {
        let first = plan.spec.first_key(item.rows.start);
        let len = item.rows.end - first;
        Keys { first, len, stride: padded(len + LANES - 1) }
    }
}

/// Copies keys or values of one head into padded rows, columns, or both.
#[inline(always)]
fn pack<T: Real>(
    plan: &Plan<'_, T>,
    (from, item, kv): (&[T], &Item, usize),
    keys: Keys,
    rope: Option<&Rope<T>>,
    rows: &mut Vec<T>,
    cols: &mut Vec<T>,
) {
    let width = plan.spec.kv_heads * plan.dh;
    zeros(rows, keys.stride * plan.wide);
    zeros(cols, plan.dh * keys.stride);
    for (j, row) in rows.chunks_exact_mut(plan.wide).take(keys.len).enumerate() {
        let at = (item.keys_at + keys.first + j) * width + kv * plan.dh;
        row[..plan.dh].copy_from_slice(&from[at..at + plan.dh]);
        if let Some(rope) = rope {
            rope.turn(row, keys.first + j, false);
        }
        for (col, x) in cols.chunks_exact_mut(keys.stride).zip(row.iter()) {
            col[j] = *x;
        }
    }
}

/// Copies the queries (or their upstream gradients) of a group into stacked padded rows.
#[inline(always)]
fn stack<T: Real>(
    plan: &Plan<'_, T>,
    (from, first_row): (&[T], usize),
    rows: &Range<usize>,
    kv: usize,
    rope: Option<&Rope<T>>,
    to: &mut Vec<T>,
) {
    zeros(to, (rows.len() * plan.group).next_multiple_of(TILE) * plan.wide);
    let width = plan.spec.heads * plan.dh;
    for (r, row) in to.chunks_exact_mut(plan.wide).take(rows.len() * plan.group).enumerate() {
        let (i, h) = (r / plan.group, kv * plan.group + r % plan.group);
        let at = (first_row + i) * width + h * plan.dh;
        row[..plan.dh].copy_from_slice(&from[at..at + plan.dh]);
        if let Some(rope) = rope {
            rope.turn(row, rows.start + i, false);
        }
    }
}

/// Stacked rows at..at+live of an item and the packed keys base..base+len that any of them sees.
#[derive(Clone, Copy)]
struct Span {
    at: usize,
    live: usize,
    base: usize,
    len: usize,
    cols: usize,
}

impl Span {
    #[inline(always)]
    fn all<T: Real>(plan: &Plan<'_, T>, item: &Item, keys: Keys) -> impl Iterator<Item = Span> {
        let (spec, group, start) = (plan.spec, plan.group, item.rows.start);
        let rows = item.rows.len() * group;
        (0..rows).step_by(TILE).map(move |at| {
            let live = TILE.min(rows - at);
            let base = spec.first_key(start + at / group) - keys.first;
            let len = start + (at + live - 1) / group + 1 - keys.first - base;
            Span { at, live, base, len, cols: padded(len) }
        })
    }

    /// Live rows up to a multiple of what a product computes at once.
    #[inline(always)]
    fn rows(&self) -> usize {
        self.live.next_multiple_of(ROWS)
    }

    /// The columns that row r of the tile sees.
    #[inline(always)]
    fn visible<T: Real>(&self, plan: &Plan<'_, T>, item: &Item, keys: Keys, r: usize) -> Range<usize> {
        let i = item.rows.start + (self.at + r) / plan.group;
        let origin = keys.first + self.base;
        plan.spec.first_key(i) - origin..i + 1 - origin
    }
}

/// Scores of a tile, -∞ where a row does not see the key. With CoPE also the gates, z, and (if `KEEP`) the place in the table of every pair.
/// Returns for each row how many of its visible keys, from the far end, are clamped.
#[inline(always)]
fn scores<T: Real, const KEEP: bool>(
    plan: &Plan<'_, T>,
    item: &Item,
    keys: Keys,
    span: Span,
    (q, k_cols): (&[T], &[T]),
    tile: &mut Tile<T>,
) -> [usize; TILE] {
    let (rows, cols) = (span.rows(), span.cols);
    room(&mut tile.s, TILE * cols, T::ZERO);
    let left = Left { data: &q[span.at * plan.wide..], row: plan.wide, col: 1 };
    product(&mut tile.s, cols, (rows, plan.dh, cols), left, (&k_cols[span.base..], keys.stride), false);
    let mut clamped = [0; TILE];
    let mut z_cols = 0;
    if let Some(cope) = &plan.cope {
        z_cols = cope.reach(span.len);
        room(&mut tile.gate, TILE * cols, T::ZERO);
        room(&mut tile.z, TILE * z_cols, T::ZERO);
        room(&mut tile.below, TILE * cols, 0);
        room(&mut tile.fraction, TILE * cols, T::ZERO);
        product(&mut tile.z, z_cols, (rows, plan.dh, z_cols), left, (&cope.cols, cope.stride), false);
    }
    for r in 0..span.live {
        let s = &mut tile.s[r * cols..(r + 1) * cols];
        s.iter_mut().for_each(|s| *s *= plan.scale);
        let seen = span.visible(plan, item, keys, r);
        if let Some(cope) = &plan.cope {
            let row = r * cols..(r + 1) * cols;
            let gate = &mut tile.gate[row.clone()];
            gate.iter_mut().zip(s.iter()).for_each(|(g, s)| *g = sigmoid(*s));
            let place = (&mut tile.below[row.clone()][seen.clone()], &mut tile.fraction[row][seen.clone()]);
            let z = &tile.z[r * z_cols..(r + 1) * z_cols];
            clamped[r] = bias::<T, KEEP>(&mut s[seen.clone()], &gate[seen.clone()], z, cope.last, place);
        }
        s[..seen.start].fill(-T::INFINITY);
        s[seen.end..].fill(-T::INFINITY);
    }
    clamped
}

/// Adds the CoPE bias to the scores of one row, from the token itself outward; the gates are summed in f64. Returns how many keys are clamped.
#[inline(always)]
fn bias<T: Real, const KEEP: bool>(
    s: &mut [T],
    gate: &[T],
    z: &[T],
    last: usize,
    (below, fraction): (&mut [u32], &mut [T]),
) -> usize {
    let mut position = 0.0f64;
    for j in (0..s.len()).rev() {
        position += widen(gate[j]);
        if position >= last as f64 {
            s[..=j].iter_mut().for_each(|s| *s += z[last]);
            return j + 1;
        }
        let n = position as usize;
        let f: T = narrow(position - n as f64);
        s[j] += (T::ONE - f) * z[n] + f * z[n + 1];
        if KEEP {
            below[j] = n as u32;
            fraction[j] = f;
        }
    }
    0
}

struct Forward<'s, T: Real> {
    plan: &'s Plan<'s, T>,
    item: &'s Item,
    scratch: &'s mut Scratch<T>,
    /// [rows, heads·dh], and [rows, heads, 2]: the maximum of a row's scores and 1 / Σ exp(score - maximum).
    out: &'s mut [T],
    stats: &'s mut [T],
}

impl<T: Real> Kernel for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Forward { plan, item, scratch, out, stats } = self;
        let (dh, wide, heads) = (plan.dh, plan.wide, plan.spec.heads);
        let keys = Keys::new(plan, item);
        let Scratch { q, k, k_cols, v, v_cols, tile, .. } = scratch;
        for kv in 0..plan.spec.kv_heads {
            stack(plan, (plan.q, item.queries_at), &item.rows, kv, plan.rope.as_ref(), q);
            pack(plan, (plan.k, item, kv), keys, plan.rope.as_ref(), k, k_cols);
            pack(plan, (plan.v, item, kv), keys, None, v, v_cols);
            for span in Span::all(plan, item, keys) {
                let cols = span.cols;
                scores::<T, false>(plan, item, keys, span, (q, k_cols), tile);
                for r in 0..span.live {
                    let w = &mut tile.s[r * cols..(r + 1) * cols];
                    let max = simd::max(w);
                    w.iter_mut().for_each(|w| *w = exp(*w - max));
                    let inverse = T::ONE / simd::sum(w);
                    w.iter_mut().for_each(|w| *w *= inverse);
                    let at = place(plan, kv, span.at + r);
                    stats[2 * at] = max;
                    stats[2 * at + 1] = inverse;
                }
                tile.s[span.live * cols..span.rows() * cols].fill(T::ZERO);
                room(&mut tile.out, TILE * wide, T::ZERO);
                let left = Left { data: &tile.s, row: cols, col: 1 };
                let shape = (span.rows(), span.len, wide);
                product(&mut tile.out, wide, shape, left, (&v[span.base * wide..], wide), false);
                for r in 0..span.live {
                    let at = place(plan, kv, span.at + r) * dh;
                    out[at..at + dh].copy_from_slice(&tile.out[r * wide..r * wide + dh]);
                }
            }
        }
        debug_assert_eq!(stats.len(), item.rows.len() * heads * 2);
    }
}

/// Index of (row, head) in an item's [rows, heads] for a stacked row.
#[inline(always)]
fn place<T: Real>(plan: &Plan<'_, T>, kv: usize, r: usize) -> usize {
    r / plan.group * plan.spec.heads + kv * plan.group + r % plan.group
}

/// Gradients of an item with respect to keys and values (positions first..rows.end) and the table rows it reached.
struct Partial<T> {
    keys_at: usize,
    dk: Vec<T>,
    dv: Vec<T>,
    d_table: Vec<T>,
}

/// Sets d = [dq, dk, dv] (dk and dv are zeros before) and returns the gradient of the table [P+1, dh], or nothing without one.
fn backward<T: Real>(
    plan: &Plan<'_, T>,
    items: &[Item],
    upstream: &[T],
    stats: &[T],
    [dq, dk, dv]: &mut [Buffer<T>; 3],
) -> Vec<T> {
    let width = plan.spec.heads * plan.dh;
    let work: Vec<_> = items.iter().zip(split(items, dq, width)).collect();
    let partials = each(plan, work, Scratch::new, |scratch, (item, dq)| {
        simd::dispatch(Backward { plan, item, scratch, upstream, stats, dq })
    });
    let mut d_table = vec![T::ZERO; plan.cope.as_ref().map_or(0, |cope| (cope.last + 1) * plan.dh)];
    for partial in partials {
        let range = partial.keys_at..partial.keys_at + partial.dk.len();
        add(&mut dk[range.clone()], &partial.dk);
        add(&mut dv[range], &partial.dv);
        add(&mut d_table, &partial.d_table);
    }
    d_table
}

struct Backward<'s, T: Real> {
    plan: &'s Plan<'s, T>,
    item: &'s Item,
    scratch: &'s mut Scratch<T>,
    /// [n, heads·dh] and [n, heads, 2], of all items.
    upstream: &'s [T],
    stats: &'s [T],
    /// [rows, heads·dh] of this item.
    dq: &'s mut [T],
}

impl<T: Real> Kernel for Backward<'_, T> {
    type Output = Partial<T>;

    #[inline(always)]
    fn run(self) -> Partial<T> {
        let Backward { plan, item, scratch, upstream, stats, dq: dq_out } = self;
        let (dh, wide, heads, kv_heads) = (plan.dh, plan.wide, plan.spec.heads, plan.spec.kv_heads);
        let keys = Keys::new(plan, item);
        let rope = plan.rope.as_ref();
        let stats = &stats[item.queries_at * heads * 2..];
        let reached = plan.cope.as_ref().map_or(0, |cope| cope.stride);
        let mut partial = Partial {
            keys_at: (item.keys_at + keys.first) * kv_heads * dh,
            dk: vec![T::ZERO; keys.len * kv_heads * dh],
            dv: vec![T::ZERO; keys.len * kv_heads * dh],
            d_table: Vec::new(),
        };
        let Scratch { q, k, k_cols, v, v_cols, d_out, dq, dk, dv, d_table, tile } = scratch;
        zeros(d_table, reached * wide);
        for kv in 0..kv_heads {
            stack(plan, (plan.q, item.queries_at), &item.rows, kv, rope, q);
            stack(plan, (upstream, item.queries_at), &item.rows, kv, None, d_out);
            pack(plan, (plan.k, item, kv), keys, rope, k, k_cols);
            pack(plan, (plan.v, item, kv), keys, None, v, v_cols);
            zeros(dk, keys.stride * wide);
            zeros(dv, keys.stride * wide);
            room(dq, TILE * wide, T::ZERO);
            for span in Span::all(plan, item, keys) {
                let (rows, cols) = (span.rows(), span.cols);
                let clamped = scores::<T, true>(plan, item, keys, span, (q, k_cols), tile);
                room(&mut tile.d, TILE * cols, T::ZERO);
                let q_left = &q[span.at * wide..];
                let d_left = &d_out[span.at * wide..];
                let left = Left { data: d_left, row: wide, col: 1 };
                let v_right = (&v_cols[span.base..], keys.stride);
                product(&mut tile.d, cols, (rows, dh, cols), left, v_right, false);
                let z_cols = plan.cope.as_ref().map_or(0, |cope| cope.reach(span.len));
                zeros(&mut tile.dz, TILE * z_cols);
                for r in 0..span.live {
                    let row = r * cols..(r + 1) * cols;
                    let (w, d) = (&mut tile.s[row.clone()], &mut tile.d[row.clone()]);
                    let at = place(plan, kv, span.at + r);
                    let (max, inverse) = (stats[2 * at], stats[2 * at + 1]);
                    w.iter_mut().for_each(|w| *w = exp(*w - max) * inverse);
                    let mean = simd::dot(w, d);
                    d.iter_mut().zip(w.iter()).for_each(|(d, w)| *d = *w * (*d - mean));
                    if let Some(cope) = &plan.cope {
                        let seen = span.visible(plan, item, keys, r);
                        let (z, dz) =
                            (&tile.z[r * z_cols..(r + 1) * z_cols], &mut tile.dz[r * z_cols..(r + 1) * z_cols]);
                        let place = (&tile.below[row.clone()][seen.clone()], &tile.fraction[row.clone()][seen.clone()]);
                        unbias(&mut d[seen.clone()], &tile.gate[row][seen], (z, dz), cope.last, place, clamped[r]);
                    }
                    d.iter_mut().for_each(|d| *d *= plan.scale);
                }
                tile.s[span.live * cols..rows * cols].fill(T::ZERO);
                tile.d[span.live * cols..rows * cols].fill(T::ZERO);
                // dq = du·k (+ dz·table); dk += duᵀ·q; dv += wᵀ·d_out; d_table += dzᵀ·q.
                let du = Left { data: &tile.d, row: cols, col: 1 };
                product(dq, wide, (rows, span.len, wide), du, (&k[span.base * wide..], wide), false);
                let turned = |data| Left { data, row: 1, col: cols };
                let at = span.base * wide;
                product(&mut dk[at..], wide, (cols, span.live, wide), turned(&tile.d), (q_left, wide), true);
                product(&mut dv[at..], wide, (cols, span.live, wide), turned(&tile.s), (d_left, wide), true);
                if let Some(cope) = &plan.cope {
                    let dz = Left { data: &tile.dz, row: z_cols, col: 1 };
                    product(dq, wide, (rows, z_cols, wide), dz, (&cope.rows, wide), true);
                    let dz = Left { data: &tile.dz, row: 1, col: z_cols };
                    product(d_table, wide, (z_cols, span.live, wide), dz, (q_left, wide), true);
                }
                for (r, row) in dq.chunks_exact_mut(wide).take(span.live).enumerate() {
                    if let Some(rope) = rope {
                        rope.turn(row, item.rows.start + (span.at + r) / plan.group, true);
                    }
                    let at = place(plan, kv, span.at + r) * dh;
                    dq_out[at..at + dh].copy_from_slice(&row[..dh]);
                }
            }
            for j in 0..keys.len {
                let (from, to) = (j * wide, (j * kv_heads + kv) * dh);
                if let Some(rope) = rope {
                    rope.turn(&mut dk[from..from + wide], keys.first + j, true);
                }
                partial.dk[to..to + dh].copy_from_slice(&dk[from..from + dh]);
                partial.dv[to..to + dh].copy_from_slice(&dv[from..from + dh]);
            }
        }
        partial.d_table.extend(d_table.chunks_exact(wide).take(table_rows(plan)).flat_map(|row| &row[..dh]));
        partial
    }
}

/// Rows of the table that are packed.
#[inline(always)]
fn table_rows<T: Real>(plan: &Plan<'_, T>) -> usize {
    plan.cope.as_ref().map_or(0, |cope| cope.stride.min(cope.last + 1))
}

/// Backward of `bias` for one row: d holds the gradient of the scores and becomes that of the scaled products. From the farthest key inward,
/// because a gate moves the positions of all keys at or beyond its own: dg_t = Σ_{j≤t} dp_j.
#[inline(always)]
fn unbias<T: Real>(
    d: &mut [T],
    gate: &[T],
    (z, dz): (&[T], &mut [T]),
    last: usize,
    (below, fraction): (&[u32], &[T]),
    clamped: usize,
) {
    if clamped > 0 {
        dz[last] += d[..clamped].iter().copied().sum();
    }
    let mut beyond = 0.0f64;
    let active = d[clamped..].iter_mut().zip(&gate[clamped..]).zip(below[clamped..].iter().zip(&fraction[clamped..]));
    for ((d, g), (n, f)) in active {
        let n = *n as usize;
        let (low, high) = (z[n], z[n + 1]);
        dz[n] += (T::ONE - *f) * *d;
        dz[n + 1] += *f * *d;
        beyond += widen(*d * (high - low));
        *d += narrow::<T>(beyond) * (*g * (T::ONE - *g));
    }
}
