//! Streaming forward and backward. A work item is a run of query rows of one document; inside it the query heads that share a key/value head are
//! stacked (row = position · group + head). Eight stacked rows make a tile: each is one lane of the vectors, keys follow one another, so that
//! every loop over keys serves eight rows. A tile keeps its own scores, nothing larger; backward computes them again, in the very same order and
//! therefore to the same bits, from the saved maximum and sum of each row.

#![allow(clippy::needless_range_loop)] // lanes of several arrays side by side

use super::{Attention, Position};
use crate::kernels::simd::{self, Kernel, LANES, Left, ROWS, exp, narrow, padded, product, sigmoid, widen};
use crate::tape::add;
use crate::{Buffer, Param, Real, Tape, Value};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Long documents are cut into at most `CHUNKS` items of at least `CHUNK` positions: fixed, because it decides the order of summation.
const CHUNK: usize = 64;
const CHUNKS: usize = 8;

/// Pairs of query and key, counted per head, below which one thread is faster than waking the pool.
const SMALL: usize = 2048;

pub(super) fn attention<'a, T: Real>(
    tape: &mut Tape<'a, T>,
    [q, k, v]: [&Value<T>; 3],
    offsets_b1: &Arc<[usize]>,
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
    let threads = rayon::current_num_threads();
    if plan.pairs < SMALL || work.len() < 2 || threads == 1 {
        let mut scratch = scratch();
        work.into_iter().map(|work| f(&mut scratch, work)).collect()
    } else {
        // A few pieces a thread: enough to even out long and short documents, and the scratch is not made anew for every item.
        let piece = (work.len() / (4 * threads)).max(1);
        work.into_par_iter().with_min_len(piece).map_init(scratch, f).collect()
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
            Position::Cope { .. } => (None, Some(Cope::new(table, dh))),
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

/// The CoPE table, [rows, wide]: padded with zeros, with at least one row behind the last.
struct Cope<T> {
    /// P, the largest position.
    last: usize,
    table: Vec<T>,
}

impl<T: Real> Cope<T> {
    fn new(table: &[T], dh: usize) -> Self {
        let (last, wide) = (table.len() / dh - 1, padded(dh));
        let mut rows = vec![T::ZERO; (last + 2).next_multiple_of(ROWS) * wide];
        for (to, row) in rows.chunks_exact_mut(wide).zip(table.chunks_exact(dh)) {
            to[..dh].copy_from_slice(row);
        }
        Cope { last, table: rows }
    }
}

/// Eight numbers, one for each stacked row of a tile.
type Lanes<T> = [T; LANES];

/// Working memory of a thread: packed operands of one item and key/value head, and one tile of scores.
struct Scratch<T> {
    /// Stacked queries and their upstream gradients [rows, wide].
    q: Vec<T>,
    d_out: Vec<T>,
    /// Keys and values [keys, wide], and the gradients of keys, values and table rows.
    k: Vec<T>,
    v: Vec<T>,
    dk: Vec<T>,
    dv: Vec<T>,
    d_table: Vec<T>,
    tile: Tile<T>,
}

/// One tile; [keys, LANES] unless noted.
struct Tile<T> {
    /// Queries and upstream gradients by column [dh, LANES].
    q: Vec<Lanes<T>>,
    d_out: Vec<Lanes<T>>,
    /// Scores, then weights.
    s: Vec<Lanes<T>>,
    gate: Vec<Lanes<T>>,
    /// Upstream gradient of the weights, then gradient of the scaled products.
    d: Vec<Lanes<T>>,
    /// Where in the table a pair lies: row below, fraction above it, and the step of z there (0 where the position is clamped).
    below: Vec<Lanes<u32>>,
    fraction: Vec<Lanes<T>>,
    slope: Vec<Lanes<T>>,
    /// q · table and its gradient [rows read, LANES].
    z: Vec<Lanes<T>>,
    dz: Vec<Lanes<T>>,
    /// Result, or gradient of the queries [LANES, wide].
    out: Vec<T>,
}

impl<T> Scratch<T> {
    fn new() -> Self {
        let [q, d_out, k, v, dk, dv, d_table] = [(); 7].map(|()| Vec::new());
        let [s, gate, d, fraction, slope, z, dz] = [(); 7].map(|()| Vec::new());
        let (columns, d_columns) = (Vec::new(), Vec::new());
        let (below, out) = (Vec::new(), Vec::new());
        let tile = Tile { q: columns, d_out: d_columns, s, gate, d, below, fraction, slope, z, dz, out };
        Scratch { q, d_out, k, v, dk, dv, d_table, tile }
    }
}

#[inline(always)]
fn zeros<T: Copy>(x: &mut Vec<T>, len: usize, zero: T) {
    x.clear();
    x.resize(len, zero);
}

/// Makes `x` exactly `len` long; what is in it does not matter.
#[inline(always)]
fn sized<T: Copy>(x: &mut Vec<T>, len: usize, fill: T) {
    x.resize(len, fill);
}

/// Positions first..first + len, the keys of an item. They are packed with `ROWS` rows of zeros behind them.
#[derive(Clone, Copy)]
struct Keys {
    first: usize,
    len: usize,
}

impl Keys {
    #[inline(always)]
    fn new<T: Real>(plan: &Plan<'_, T>, item: &Item) -> Self {
        let first = plan.spec.first_key(item.rows.start);
        Keys { first, len: item.rows.end - first }
    }
}

/// `total` padded rows, zero but for what the heads of the first `rows` will overwrite.
#[inline(always)]
fn blank<T: Real>(to: &mut Vec<T>, rows: usize, total: usize, plan: &Plan<'_, T>) {
    to.resize(total * plan.wide, T::ZERO);
    let kept = if plan.wide == plan.dh { rows } else { 0 };
    to[kept * plan.wide..].fill(T::ZERO);
}

/// Copies keys or values of one head into padded rows.
#[inline(always)]
fn pack<T: Real>(
    plan: &Plan<'_, T>,
    (from, item, kv): (&[T], &Item, usize),
    keys: Keys,
    rope: Option<&Rope<T>>,
    to: &mut Vec<T>,
) {
    blank(to, keys.len, keys.len + ROWS, plan);
    let from = &from[(item.keys_at + keys.first) * plan.spec.kv_heads * plan.dh..];
    let rows = from.chunks(plan.spec.kv_heads * plan.dh).take(keys.len);
    for (j, (row, from)) in to.chunks_exact_mut(plan.wide).zip(rows).enumerate() {
        simd::copy(row, &from[kv * plan.dh..(kv + 1) * plan.dh]);
        if let Some(rope) = rope {
            rope.turn(row, keys.first + j, false);
        }
    }
}

/// Copies the queries (or their upstream gradients) of a group, rows `first`.. of `from`, into stacked padded rows.
#[inline(always)]
fn stack<T: Real>(plan: &Plan<'_, T>, (from, item, kv): (&[T], &Item, usize), rope: Option<&Rope<T>>, to: &mut Vec<T>) {
    let rows = item.rows.len() * plan.group;
    blank(to, rows, rows.next_multiple_of(LANES), plan);
    let width = plan.spec.heads * plan.dh;
    let from = &from[item.queries_at * width..];
    let positions = item.rows.clone().zip(from.chunks(width));
    for ((i, from), rows) in positions.zip(to.chunks_exact_mut(plan.group * plan.wide)) {
        let heads = from[kv * plan.group * plan.dh..].chunks_exact(plan.dh);
        for (row, head) in rows.chunks_exact_mut(plan.wide).zip(heads) {
            simd::copy(row, head);
            if let Some(rope) = rope {
                rope.turn(row, i, false);
            }
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
}

impl Span {
    #[inline(always)]
    fn all<T: Real>(plan: &Plan<'_, T>, item: &Item, keys: Keys) -> impl Iterator<Item = Span> {
        let (spec, group, start) = (plan.spec, plan.group, item.rows.start);
        let rows = item.rows.len() * group;
        (0..rows).step_by(LANES).map(move |at| {
            let live = LANES.min(rows - at);
            let base = spec.first_key(start + at / group) - keys.first;
            let len = start + (at + live - 1) / group + 1 - keys.first - base;
            Span { at, live, base, len }
        })
    }

    /// Keys up to a multiple of what a product computes at once.
    #[inline(always)]
    fn padded(&self) -> usize {
        self.len.next_multiple_of(ROWS)
    }

    /// The keys that each lane sees, from the first to before the last. Lanes without a row see what the last row sees: their numbers are zero
    /// or never read.
    #[inline(always)]
    fn visible<T: Real>(&self, plan: &Plan<'_, T>, item: &Item, keys: Keys) -> (Lanes<i32>, Lanes<i32>) {
        let (mut from, mut to) = ([0; LANES], [0; LANES]);
        let origin = keys.first + self.base;
        for l in 0..LANES {
            let i = item.rows.start + (self.at + l.min(self.live - 1)) / plan.group;
            from[l] = (plan.spec.first_key(i) - origin) as i32;
            to[l] = (i + 1 - origin) as i32;
        }
        (from, to)
    }
}

/// The rows of a tile by column [dh, LANES].
#[inline(always)]
fn columns<T: Real>(rows: &[T], plan: &Plan<'_, T>, to: &mut Vec<Lanes<T>>) {
    sized(to, plan.dh, [T::ZERO; LANES]);
    let rows = &rows[..LANES * plan.wide];
    for (d, to) in to.iter_mut().enumerate() {
        let mut column = [T::ZERO; LANES];
        for l in 0..LANES {
            column[l] = rows[l * plan.wide + d];
        }
        *to = column;
    }
}

/// Packed rows (keys, values or table) times the columns of a tile: dst [m, LANES].
#[inline(always)]
fn meet<T: Real>(dst: &mut Vec<Lanes<T>>, m: usize, rows: &[T], plan: &Plan<'_, T>, columns: &[Lanes<T>]) {
    sized(dst, m, [T::ZERO; LANES]);
    let left = Left { data: rows, row: plan.wide, col: 1 };
    product(dst.as_flattened_mut(), LANES, (m, plan.dh, LANES), left, (columns.as_flattened(), LANES), false);
}

/// Scores of a tile, -∞ where a row does not see the key. With CoPE also the gates, z, and (if `KEEP`) the place in the table of every pair.
/// Keys before the returned one are clamped in every row.
#[inline(always)]
fn scores<T: Real, const KEEP: bool>(
    plan: &Plan<'_, T>,
    item: &Item,
    keys: Keys,
    span: Span,
    (q, k): (&[T], &[T]),
    tile: &mut Tile<T>,
) -> usize {
    columns(&q[span.at * plan.wide..], plan, &mut tile.q);
    meet(&mut tile.s, span.padded(), &k[span.base * plan.wide..], plan, &tile.q);
    for s in tile.s.as_flattened_mut() {
        *s *= plan.scale;
    }
    let (from, to) = span.visible(plan, item, keys);
    let mut stop = 0;
    if let Some(cope) = &plan.cope {
        sized(&mut tile.gate, span.padded(), [T::ZERO; LANES]);
        for (g, s) in tile.gate.as_flattened_mut().iter_mut().zip(tile.s.as_flattened()) {
            *g = sigmoid(*s);
        }
        stop = places(cope.last, span.len, (from, to), tile);
        meet(&mut tile.z, touched(&tile.below, stop), &cope.table, plan, &tile.q);
        bias::<T, KEEP>(cope.last, stop, tile);
    }
    for (j, s) in (0i32..).zip(&mut tile.s) {
        let mut x = *s;
        for l in 0..LANES {
            x[l] = if (from[l] <= j) & (j < to[l]) { x[l] } else { -T::INFINITY };
        }
        *s = x;
    }
    stop
}

/// Finds where in the table each pair of a tile lies (a clamped one on row P, with fraction 0), from the nearest key outward, and sets the gates of keys that a row does not see to zero.
/// Positions are summed in f64. Keys before the returned one are clamped in every row; for them nothing is set.
#[inline(always)]
fn places<T: Real>(last: usize, len: usize, (from, to): (Lanes<i32>, Lanes<i32>), tile: &mut Tile<T>) -> usize {
    sized(&mut tile.below, len, [0; LANES]);
    sized(&mut tile.fraction, len, [T::ZERO; LANES]);
    let bound = last as f64;
    let mut position = [0.0f64; LANES];
    let gates = tile.gate[..len].iter_mut().zip(&mut tile.below).zip(&mut tile.fraction);
    for (j, ((gate, below), fraction)) in gates.enumerate().rev() {
        let mut all = true;
        for p in &position {
            all &= *p >= bound;
        }
        if all {
            return j + 1;
        }
        let (mut g, mut p, j) = (*gate, position, j as i32);
        for l in 0..LANES {
            g[l] = if (from[l] <= j) & (j < to[l]) { g[l] } else { T::ZERO };
        }
        for l in 0..LANES {
            p[l] += widen(g[l]);
        }
        let (mut n, mut f) = ([0; LANES], [T::ZERO; LANES]);
        for l in 0..LANES {
            // What is not a number counts as clamped; its score is not a number either way.
            let held = if p[l] < bound { p[l] } else { bound };
            let whole = simd::floor(held);
            n[l] = simd::index(whole);
            f[l] = narrow(held - whole);
        }
        (*gate, *below, *fraction, position) = (g, n, f, p);
    }
    0
}

/// Rows of the table that a tile reads: positions grow outward, so the farthest pair decides; the row above it is read too.
#[inline(always)]
fn touched(below: &[Lanes<u32>], stop: usize) -> usize {
    let farthest = below[stop].iter().fold(0, |most, n| most.max(*n)) as usize;
    (farthest + 2).next_multiple_of(ROWS)
}

/// Adds the CoPE bias to the scores of a tile.
#[inline(always)]
fn bias<T: Real, const KEEP: bool>(last: usize, stop: usize, tile: &mut Tile<T>) {
    for s in &mut tile.s[..stop] {
        let (mut x, z) = (*s, tile.z[last]);
        for l in 0..LANES {
            x[l] += z[l];
        }
        *s = x;
    }
    let rim = last as u32;
    if KEEP {
        sized(&mut tile.slope, tile.below.len(), [T::ZERO; LANES]);
    }
    for (j, (n, f)) in tile.below.iter().zip(&tile.fraction).enumerate().skip(stop) {
        let (low, high) = simd::gather(&tile.z, n);
        let (mut s, mut slope) = (tile.s[j], [T::ZERO; LANES]);
        for l in 0..LANES {
            s[l] += (T::ONE - f[l]) * low[l] + f[l] * high[l];
            slope[l] = if n[l] < rim { high[l] - low[l] } else { T::ZERO };
        }
        tile.s[j] = s;
        if KEEP {
            tile.slope[j] = slope;
        }
    }
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
        let (dh, wide, rope) = (plan.dh, plan.wide, plan.rope.as_ref());
        let keys = Keys::new(plan, item);
        let Scratch { q, k, v, tile, .. } = scratch;
        for kv in 0..plan.spec.kv_heads {
            stack(plan, (plan.q, item, kv), rope, q);
            pack(plan, (plan.k, item, kv), keys, rope, k);
            pack(plan, (plan.v, item, kv), keys, None, v);
            for span in Span::all(plan, item, keys) {
                scores::<T, false>(plan, item, keys, span, (q, k), tile);
                let (max, inverse) = softmax(&mut tile.s);
                sized(&mut tile.out, LANES * wide, T::ZERO);
                let left = Left { data: tile.s.as_flattened(), row: 1, col: LANES };
                product(&mut tile.out, wide, (LANES, span.len, wide), left, (&v[span.base * wide..], wide), false);
                for (l, row) in tile.out.chunks_exact(wide).take(span.live).enumerate() {
                    let at = place(plan, kv, span.at + l);
                    stats[2 * at] = max[l];
                    stats[2 * at + 1] = inverse[l];
                    simd::copy(&mut out[at * dh..(at + 1) * dh], &row[..dh]);
                }
            }
        }
    }
}

/// Turns the scores of each lane into weights; returns their maximum and 1 / Σ exp(score - maximum).
#[inline(always)]
fn softmax<T: Real>(s: &mut [Lanes<T>]) -> (Lanes<T>, Lanes<T>) {
    let (mut max, mut sum) = ([-T::INFINITY; LANES], [T::ZERO; LANES]);
    for s in s.iter() {
        let (s, mut m) = (*s, max);
        for l in 0..LANES {
            m[l] = if s[l] > m[l] { s[l] } else { m[l] };
        }
        max = m;
    }
    exponentials(s, max);
    for s in s.iter() {
        let (s, mut next) = (*s, sum);
        for l in 0..LANES {
            next[l] += s[l];
        }
        sum = next;
    }
    let mut inverse = [T::ZERO; LANES];
    for l in 0..LANES {
        inverse[l] = T::ONE / sum[l];
    }
    for s in s.iter_mut() {
        let mut w = *s;
        for l in 0..LANES {
            w[l] *= inverse[l];
        }
        *s = w;
    }
    (max, inverse)
}

/// exp(s - max) for each lane.
#[inline(always)]
fn exponentials<T: Real>(s: &mut [Lanes<T>], max: Lanes<T>) {
    for s in s.iter_mut() {
        let mut x = *s;
        for l in 0..LANES {
            x[l] -= max[l];
        }
        *s = x;
    }
    for x in s.as_flattened_mut() {
        *x = exp(*x);
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
        for (sum, row) in d_table.chunks_exact_mut(plan.dh).zip(partial.d_table.chunks_exact(plan.wide)) {
            add(sum, row);
        }
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
        let Backward { plan, item, scratch, upstream, stats, dq } = self;
        let (dh, wide, rope, kv_heads) = (plan.dh, plan.wide, plan.rope.as_ref(), plan.spec.kv_heads);
        let keys = Keys::new(plan, item);
        let stats = &stats[item.queries_at * plan.spec.heads * 2..];
        let mut partial = Partial {
            keys_at: (item.keys_at + keys.first) * kv_heads * dh,
            dk: vec![T::ZERO; keys.len * kv_heads * dh],
            dv: vec![T::ZERO; keys.len * kv_heads * dh],
            d_table: Vec::new(),
        };
        scratch.d_table.clear();
        for kv in 0..kv_heads {
            stack(plan, (plan.q, item, kv), rope, &mut scratch.q);
            stack(plan, (upstream, item, kv), None, &mut scratch.d_out);
            pack(plan, (plan.k, item, kv), keys, rope, &mut scratch.k);
            pack(plan, (plan.v, item, kv), keys, None, &mut scratch.v);
            zeros(&mut scratch.dk, (keys.len + ROWS) * wide, T::ZERO);
            zeros(&mut scratch.dv, (keys.len + ROWS) * wide, T::ZERO);
            for span in Span::all(plan, item, keys) {
                let (mut max, mut inverse) = ([T::ZERO; LANES], [T::ZERO; LANES]);
                for l in 0..span.live {
                    let at = 2 * place(plan, kv, span.at + l);
                    (max[l], inverse[l]) = (stats[at], stats[at + 1]);
                }
                span_gradients(plan, item, keys, span, (max, inverse), scratch);
                for (l, row) in scratch.tile.out.chunks_exact_mut(wide).take(span.live).enumerate() {
                    if let Some(rope) = rope {
                        rope.turn(row, item.rows.start + (span.at + l) / plan.group, true);
                    }
                    let at = place(plan, kv, span.at + l) * dh;
                    simd::copy(&mut dq[at..at + dh], &row[..dh]);
                }
            }
            let (dk, dv) = (scratch.dk.chunks_exact_mut(wide), scratch.dv.chunks_exact(wide));
            for (j, (dk, dv)) in dk.zip(dv).take(keys.len).enumerate() {
                if let Some(rope) = rope {
                    rope.turn(dk, keys.first + j, true);
                }
                let at = (j * kv_heads + kv) * dh;
                simd::copy(&mut partial.dk[at..at + dh], &dk[..dh]);
                simd::copy(&mut partial.dv[at..at + dh], &dv[..dh]);
            }
        }
        partial.d_table.extend_from_slice(&scratch.d_table);
        partial
    }
}

/// Adds what the rows of a tile give to dk, dv and d_table (packed, not rotated back), and leaves their dq in tile.out.
#[inline(always)]
fn span_gradients<T: Real>(
    plan: &Plan<'_, T>,
    item: &Item,
    keys: Keys,
    span: Span,
    (max, inverse): (Lanes<T>, Lanes<T>),
    scratch: &mut Scratch<T>,
) {
    let wide = plan.wide;
    let Scratch { q, d_out, k, v, dk, dv, d_table, tile } = scratch;
    let stop = scores::<T, true>(plan, item, keys, span, (q, k), tile);
    let (q, d_out, at) = (&q[span.at * wide..], &d_out[span.at * wide..], span.base * wide);
    columns(d_out, plan, &mut tile.d_out);
    meet(&mut tile.d, span.padded(), &v[at..], plan, &tile.d_out);
    unsoftmax(&mut tile.s, &mut tile.d, max, inverse);
    if let Some(cope) = &plan.cope {
        unbias(cope.last, (stop, span.len), tile);
    }
    for d in tile.d.as_flattened_mut() {
        *d *= plan.scale;
    }
    // dq = duᵀ·k (+ dzᵀ·table), dk += du·q, dv += w·d_out, d_table += dz·q, where row j of du, w and dz belongs to key j or table row j.
    sized(&mut tile.out, LANES * wide, T::ZERO);
    let turned = |data| Left { data, row: 1, col: LANES };
    let upright = |data| Left { data, row: LANES, col: 1 };
    let (du, w) = (tile.d.as_flattened(), tile.s.as_flattened());
    product(&mut tile.out, wide, (LANES, span.len, wide), turned(du), (&k[at..], wide), false);
    product(&mut dk[at..], wide, (span.padded(), LANES, wide), upright(du), (q, wide), true);
    product(&mut dv[at..], wide, (span.padded(), LANES, wide), upright(w), (d_out, wide), true);
    if let Some(cope) = &plan.cope {
        let dz = tile.dz.as_flattened();
        if d_table.len() < tile.dz.len() * wide {
            d_table.resize(tile.dz.len() * wide, T::ZERO);
        }
        product(&mut tile.out, wide, (LANES, tile.dz.len(), wide), turned(dz), (&cope.table, wide), true);
        product(d_table, wide, (tile.dz.len(), LANES, wide), upright(dz), (q, wide), true);
    }
}

/// Scores become weights w, the gradient d of the weights that of the scores: w (d - Σ w d), for each lane.
#[inline(always)]
fn unsoftmax<T: Real>(s: &mut [Lanes<T>], d: &mut [Lanes<T>], max: Lanes<T>, inverse: Lanes<T>) {
    exponentials(s, max);
    let mut mean = [T::ZERO; LANES];
    for (s, d) in s.iter_mut().zip(d.iter()) {
        let (mut w, d, mut sum) = (*s, *d, mean);
        for l in 0..LANES {
            w[l] *= inverse[l];
        }
        for l in 0..LANES {
            sum[l] += w[l] * d[l];
        }
        (*s, mean) = (w, sum);
    }
    for (w, d) in s.iter().zip(d) {
        let (w, mut x) = (*w, *d);
        for l in 0..LANES {
            x[l] = w[l] * (x[l] - mean[l]);
        }
        *d = x;
    }
}

/// Backward of `bias`: tile.d holds the gradient of the scores and becomes that of the scaled products; tile.dz is set. From the farthest key
/// inward, because a gate moves the positions of all keys at or beyond its own: dg_t = Σ_{j≤t} dp_j.
#[inline(always)]
fn unbias<T: Real>(last: usize, (stop, len): (usize, usize), tile: &mut Tile<T>) {
    zeros(&mut tile.dz, tile.z.len(), [T::ZERO; LANES]);
    for d in &tile.d[..stop] {
        for l in 0..LANES {
            tile.dz[last][l] += d[l];
        }
    }
    let mut beyond = [0.0f64; LANES];
    for j in stop..len {
        let (mut d, g, f, slope) = (tile.d[j], tile.gate[j], tile.fraction[j], tile.slope[j]);
        let (mut low, mut high) = ([T::ZERO; LANES], [T::ZERO; LANES]);
        for l in 0..LANES {
            low[l] = (T::ONE - f[l]) * d[l];
            high[l] = f[l] * d[l];
        }
        simd::scatter(&mut tile.dz, &tile.below[j], &low, &high);
        for l in 0..LANES {
            beyond[l] += widen(d[l] * slope[l]);
        }
        for l in 0..LANES {
            d[l] += narrow::<T>(beyond[l]) * (g[l] * (T::ONE - g[l]));
        }
        tile.d[j] = d;
    }
}
