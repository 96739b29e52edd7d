//! A tile: up to sixteen query rows that share a key/value head, the keys they see, and their scores.

use super::operand::{Columns, Room, Rows, Sides};
use super::plan::{Cope, Item, Plan};
use super::rotary::Rope;
use crate::Real;
use crate::kernels::lanes::scattered::{Positions, Scattered, Turn};
use crate::kernels::lanes::{self, LANES, Lanes, PIECE, Piece, Place};
use std::ops::Range;

/// Keys of a block: a block of scores, keys and values fits the first cache.
const BLOCK: usize = 64;

/// Working memory of a thread: the operands of one item and key/value head, and one tile.
#[derive(Default)]
pub(super) struct Scratch<T> {
    /// Query rows of the item, as places in [rows, heads].
    pub rows: Vec<u32>,
    /// Keys and values [keys, dh], and their gradients [keys, wide pieces].
    pub k: Rows<T>,
    pub v: Rows<T>,
    pub dk: Vec<Piece<T>>,
    pub dv: Vec<Piece<T>>,
    /// Gradient of the CoPE table [rows, wide pieces].
    pub d_table: Vec<Piece<T>>,
    pub tile: Tile<T>,
}

#[derive(Default)]
pub(super) struct Tile<T> {
    /// Scaled queries and upstream gradients; by row the latter are multiplied by the gates.
    pub q: Sides<T>,
    pub d_out: Sides<T>,
    /// Result, or gradient of the queries [dh], and the same by row.
    pub out: Vec<Lanes<T>>,
    out_rows: Vec<Piece<T>>,
    /// Scores of a block, or of all keys that contextual positions reach, then weights.
    pub s: Vec<Lanes<T>>,
    /// Gradients of the weights of a block, then of the scores, then of the products.
    pub d: Vec<Lanes<T>>,
    /// Places in the CoPE table, like `s`.
    pub places: Vec<Place<T>>,
    pub table: Bias<T>,
    pub room: Room,
}

/// q · table for a tile, computed as far as positions reach.
#[derive(Default)]
pub(super) struct Bias<T> {
    /// [rows], and for each row (bias, step to the next row; 0 at the last).
    rows: Vec<Lanes<T>>,
    pub z: Vec<Lanes<[T; 2]>>,
    /// Gradients: (Σ d, Σ fraction · d), then of the rows.
    pub dz: Vec<Lanes<[T; 2]>>,
    pub d_rows: Vec<Lanes<T>>,
}

impl<T: Real> Scratch<T> {
    /// Reads keys and values of head `kv` that the item sees, for the way forward or `back`.
    pub(super) fn pack(&mut self, plan: &Plan<'_, T>, item: &Item, keys: Range<usize>, kv: usize, back: bool) {
        let (width, stride, narrow) = (plan.dh, plan.spec.kv_heads * plan.dh, plan.narrow);
        let first = (item.keys_at + keys.start) * stride + kv * width;
        let rows = |data, turn| Scattered {
            ahead: Some(plan.ahead(width, kv, keys.len())),
            turn,
            ..Scattered::plain(data, (keys.len(), width), |i| first + i * stride)
        };
        let turn = plan.rope.as_ref().map(|rope| rope.turn(Positions::From(keys.start), false));
        self.k.read(rows(plan.k, turn), [narrow, narrow && back]);
        self.v.read(rows(plan.v, None), [narrow && back, narrow && !back]);
    }
}

/// The keys that an item sees, by position in the document, from an even one on, because keys are multiplied in pairs.
pub(super) fn keys<T: Real>(plan: &Plan<'_, T>, item: &Item) -> Range<usize> {
    // Without windows of their own no row looks farther back than the first.
    let rows = if plan.own_windows() { item.rows.len() } else { item.rows.len().min(1) };
    let first = (0..rows).map(|i| plan.first_key(item, i)).min();
    even(first.unwrap_or(item.rows.start))..item.rows.end
}

fn even(position: usize) -> usize {
    position / 2 * 2
}

/// The rows of a tile and the keys they see. Lanes behind the last row repeat it and have no upstream gradient.
pub(super) struct Span<'s> {
    pub rows: &'s [u32],
    /// From a row to the one of the next key/value head, or of the next item, which will be read after it.
    pub ahead: usize,
    /// Position of each lane's row, and the keys from..to that it sees.
    pub positions: [usize; LANES],
    from: Lanes<i32>,
    to: Lanes<i32>,
    /// Keys that any row sees, from an even one on, and those that all rows see.
    any: Range<usize>,
    all: Range<usize>,
}

impl<'s> Span<'s> {
    pub(super) fn new<T: Real>(plan: &Plan<'_, T>, item: &Item, rows: &'s [u32]) -> Self {
        debug_assert!(rows.is_sorted());
        let heads = plan.spec.heads;
        let mut query = rows[0] as usize / heads;
        let (mut positions, mut from, mut to) = ([0; LANES], Lanes([0; LANES]), Lanes([0; LANES]));
        let (mut farthest, mut nearest) = (usize::MAX, 0);
        for l in 0..LANES {
            let row = rows[l.min(rows.len() - 1)] as usize;
            while row >= (query + 1) * heads {
                query += 1; // rows are in order
            }
            let first = plan.first_key(item, query);
            (farthest, nearest) = (farthest.min(first), nearest.max(first));
            positions[l] = item.rows.start + query;
            (from.0[l], to.0[l]) = (first as i32, positions[l] as i32 + 1);
        }
        let (near, far) = (positions[LANES - 1], positions[0]);
        let head = rows[0] as usize % heads;
        Span {
            rows,
            ahead: plan.ahead(plan.group * plan.dh, head / plan.group, item.rows.len()),
            positions,
            from,
            to,
            any: even(farthest)..near + 1,
            all: nearest..far + 1,
        }
    }

    /// The rows in an array [rows, heads·dh].
    fn scattered<'t, T: Real>(
        &'t self,
        plan: &Plan<'_, T>,
        item: &Item,
        data: &'t [T],
    ) -> Scattered<'t, T, impl Fn(usize) -> usize + 't> {
        let (first, dh, rows) = (item.queries_at * plan.spec.heads * plan.dh, plan.dh, self.rows);
        let start = move |l: usize| first + rows[l.min(rows.len() - 1)] as usize * dh;
        Scattered { ahead: Some(self.ahead), ..Scattered::plain(data, (rows.len(), dh), start) }
    }

    /// To the positions of the rows, or back from them.
    fn turn<'t, T: Real>(&'t self, rope: &'t Rope<T>, back: bool) -> Turn<'t, T> {
        rope.turn(Positions::Of(&self.positions), back)
    }

    /// Blocks of keys from the farthest to the nearest. They are the same for every tile of the document, but for the keys that no row sees.
    pub(super) fn blocks(&self) -> impl DoubleEndedIterator<Item = Range<usize>> + use<> {
        let any = self.any.clone();
        (any.start / BLOCK..any.end.div_ceil(BLOCK))
            .map(move |b| (b * BLOCK).max(any.start)..((b + 1) * BLOCK).min(any.end))
    }

    /// Sets the scores of keys that a row does not see to -∞. Only keys outside `all` can be such.
    fn hide<T: Real>(&self, s: &mut [Lanes<T>], block: &Range<usize>) {
        let all = if self.all.is_empty() { block.end..block.end } else { self.all.clone() };
        for edge in [block.start..all.start.min(block.end), all.end.max(block.start)..block.end] {
            if !edge.is_empty() {
                let s = &mut s[edge.start - block.start..edge.end - block.start];
                lanes::hide(s, edge.start as i32, &self.from, &self.to);
            }
        }
    }

    /// Where `block` lies among the keys that the tile sees.
    pub(super) fn within(&self, block: &Range<usize>) -> Range<usize> {
        block.start - self.any.start..block.end - self.any.start
    }

    pub(super) fn len(&self) -> usize {
        self.any.len()
    }
}

/// How far contextual positions of a tile have come.
pub(super) struct Walk<T> {
    place: Place<T>,
}

impl<T: Real> Walk<T> {
    pub(super) fn new() -> Self {
        Walk { place: Place::ORIGIN }
    }

    /// Whether all rows are clamped, so that every key beyond has the bias of the last row of the table.
    pub(super) fn done(&self, cope: &Cope<T>) -> bool {
        self.place.below.0.iter().all(|n| *n as usize >= cope.last)
    }

    fn farthest(&self) -> usize {
        self.place.below.0.iter().fold(0, |most, n| most.max(*n as usize))
    }
}

impl<T: Real> Bias<T> {
    fn reset(&mut self) {
        self.rows.clear();
        self.z.clear();
    }

    /// Makes `z` reach table row `n`.
    fn reach(&mut self, n: usize, cope: &Cope<T>, q: &Columns<T>) {
        let known = self.rows.len();
        let wanted = (n + 2).min(cope.last + 1);
        if known < wanted {
            self.rows.resize(wanted, Lanes::all(T::ZERO));
            cope.table.meet(known..wanted, &mut self.rows[known..], q);
        }
        let ready = self.z.len();
        if ready <= n {
            self.z.resize(n + 1, Lanes::all([T::ZERO; 2]));
            lanes::steps(&mut self.z[ready..], &self.rows[ready..]);
        }
    }

    /// Zero gradients for the rows that `z` reaches.
    pub(super) fn start(&mut self) {
        self.dz.clear();
        self.dz.resize(self.z.len(), Lanes::all([T::ZERO; 2]));
    }

    /// Adds gradients of scores whose positions are clamped.
    pub(super) fn add_to_rim(&mut self, d: &[Lanes<T>]) {
        let rim = self.dz.len() - 1;
        for d in d {
            for (sum, d) in self.dz[rim].0.iter_mut().zip(d.0) {
                sum[0] += d;
            }
        }
    }

    /// Gradients of q · table, as far as the rows were read.
    pub(super) fn finish(&mut self) -> &[Lanes<T>] {
        self.d_rows.clear();
        self.d_rows.resize(self.rows.len(), Lanes::all(T::ZERO));
        if !self.dz.is_empty() {
            lanes::spread(&mut self.d_rows, &self.dz);
        }
        &self.d_rows
    }

    /// q · last row of the table, once positions have reached it.
    fn rim(&self) -> &Lanes<T> {
        &self.rows[self.rows.len() - 1]
    }
}

impl<T: Real> Tile<T> {
    /// Reads the queries of a tile, for the way forward or `back`. Lanes behind the last row repeat it.
    pub(super) fn load(&mut self, plan: &Plan<'_, T>, item: &Item, span: &Span<'_>, back: bool) {
        let turn = plan.rope.as_ref().map(|rope| span.turn(rope, false));
        let rows = Scattered { count: LANES, factor: plan.scale, turn, ..span.scattered(plan, item, plan.q) };
        self.q.read(rows, (plan.wide, plan.narrow), back.then_some(None));
        self.table.reset();
    }

    /// Reads the upstream gradients of a tile; lanes behind the last row have none.
    pub(super) fn load_upstream(
        &mut self,
        plan: &Plan<'_, T>,
        item: &Item,
        span: &Span<'_>,
        upstream: &[T],
        gate: &Lanes<T>,
    ) {
        let factors = plan.gates.map(|_| gate);
        self.d_out.read(span.scattered(plan, item, upstream), (plan.wide, plan.narrow), Some(factors));
    }

    /// Copies each row of `out`, times its factor, to [rows, heads·dh].
    pub(super) fn unload(&mut self, plan: &Plan<'_, T>, span: &Span<'_>, factors: &Lanes<T>, to: &mut [T]) {
        self.turn_out(plan, Some(factors));
        self.rows_out(plan, span).copy(to, |l| span.rows[l] as usize * plan.dh);
    }

    /// Copies gradients of scaled and rotated queries as those of the queries.
    pub(super) fn unload_back(&mut self, plan: &Plan<'_, T>, span: &Span<'_>, to: &mut [T]) {
        self.turn_out(plan, None);
        let turn = plan.rope.as_ref().map(|rope| span.turn(rope, true));
        let rows = Scattered { turn, factor: plan.scale, ..self.rows_out(plan, span) };
        rows.copy(to, |l| span.rows[l] as usize * plan.dh);
    }

    fn turn_out(&mut self, plan: &Plan<'_, T>, factors: Option<&Lanes<T>>) {
        self.out_rows.resize(LANES * plan.wide, Piece::all(T::ZERO));
        lanes::lines(&mut self.out_rows, &mut self.out, factors, plan.wide);
    }

    fn rows_out(&self, plan: &Plan<'_, T>, span: &Span<'_>) -> Scattered<'_, T, impl Fn(usize) -> usize + use<T>> {
        let width = plan.wide * PIECE;
        Scattered::plain(lanes::flat(&self.out_rows), (span.rows.len(), plan.dh), move |l| l * width)
    }

    /// Scores of a block into s[at], -∞ where a row does not see the key. Row 0 of k is the key at position `first`.
    fn meet(&mut self, span: &Span<'_>, block: &Range<usize>, (k, first): (&Rows<T>, usize), at: Range<usize>) {
        let s = &mut self.s[at];
        k.meet(block.start - first..block.end - first, s, &self.q.columns);
        span.hide(s, block);
    }

    /// Scores of a block with the bias of contextual positions and their places, into s[at] and places[at].
    pub(super) fn meet_places(
        &mut self,
        span: &Span<'_>,
        block: &Range<usize>,
        k: (&Rows<T>, usize),
        at: Range<usize>,
        (cope, walk): (&Cope<T>, &mut Walk<T>),
    ) {
        self.meet(span, block, k, at.clone());
        let (s, places) = (&mut self.s[at.clone()], &mut self.places[at]);
        lanes::advance(s, cope.last as u32, &mut walk.place, places);
        self.table.reach(walk.farthest(), cope, &self.q.columns);
        lanes::bias(s, places, &self.table.z);
    }

    /// Scores of a block without positions, or beyond all of them, into s[at].
    pub(super) fn meet_plain(
        &mut self,
        span: &Span<'_>,
        block: &Range<usize>,
        k: (&Rows<T>, usize),
        at: Range<usize>,
        cope: Option<&Cope<T>>,
    ) {
        self.meet(span, block, k, at.clone());
        if cope.is_some() {
            lanes::shift(&mut self.s[at], self.table.rim());
        }
    }
}
