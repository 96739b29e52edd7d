//! The backward pass: items compute scores again, in the order of the forward pass and therefore to the same bits; the gradients of keys and values
//! that several items of a document share are summed in the order of the items.

use super::operand::Rows as Keys;
use super::plan::{Item, Plan, each, split};
use super::tile::{Scratch, Span, Tile, Walk, keys};
use crate::kernels::lanes::scattered::{Positions, Scattered};
use crate::kernels::lanes::{self, LANES, Lanes, PIECE, Piece, Place, Rows};
use crate::kernels::simd::{self, Kernel, soon_all};
use crate::tape::add;
use crate::{Arena, Buffer, Real};
use std::ops::Range;

/// What an item gives to gradients that items share.
struct Partial<T: Real> {
    /// Numbers of k and v before those of the first key that it sees.
    at: usize,
    /// Gradients of keys and values [keys, kv_heads·dh], where other items of the document have some too.
    keys: Option<[Buffer<T>; 2]>,
    /// Of the table rows it reached.
    d_table: Vec<T>,
}

/// The gradients of keys and values of an item that has its document for itself.
type Own<'s, T> = Option<[&'s mut [T]; 2]>;

/// A document whose keys several items see: its first number in k, its items, and the gradients of its keys and values.
type Shared<'s, T> = (usize, Range<usize>, [&'s mut [T]; 2]);

/// Sets d = [dq, dk, dv, dgates] for y and its upstream gradient and returns the gradient of the table [P+1, dh], or nothing without one.
pub(super) fn backward<T: Real>(
    plan: &Plan<'_, T>,
    items: &[Item],
    arena: &Arena<T>,
    [y, upstream, stats]: [&[T]; 3],
    [dq, dk, dv, d_gates]: &mut [Buffer<T>; 4],
) -> Vec<T> {
    let heads = plan.spec.heads;
    let gate_width = if plan.gates.is_some() { heads } else { 0 };
    let (own, shared) = documents(items, plan.spec.kv_heads * plan.dh, [dk, dv]);
    let parts = split(items, dq, heads * plan.dh).into_iter().zip(split(items, d_gates, gate_width));
    let work: Vec<_> = items.iter().zip(parts).zip(own).collect();
    let partials = each(plan, work, |scratch, ((item, (dq, d_gates)), own)| {
        Job { plan, item, y, upstream, stats }.run(arena, scratch, (dq, d_gates), own)
    });
    let mut d_table = vec![T::ZERO; plan.cope.as_ref().map_or(0, |cope| (cope.last + 1) * plan.dh)];
    for partial in &partials {
        let rows = d_table.chunks_exact_mut(plan.dh).zip(partial.d_table.chunks_exact(plan.wide * PIECE));
        rows.for_each(|(sum, row)| add(sum, row));
    }
    d_table.iter_mut().for_each(|d| *d *= T::ONE / plan.scale);
    join(plan, &partials, shared);
    d_table
}

/// The gradients of keys and values of each item that has its document for itself, and the documents of the other items.
fn documents<'s, T>(
    items: &[Item],
    width: usize,
    [mut dk, mut dv]: [&'s mut [T]; 2],
) -> (Vec<Own<'s, T>>, Vec<Shared<'s, T>>) {
    let (mut own, mut shared) = (Vec::with_capacity(items.len()), Vec::new());
    for group in items.chunk_by(|a, b| a.keys_at == b.keys_at) {
        let len = group[group.len() - 1].rows.end * width;
        let ((k, k_rest), (v, v_rest)) = (dk.split_at_mut(len), dv.split_at_mut(len));
        match group {
            [_] => own.push(Some([k, v])),
            [first, ..] => {
                shared.push((first.keys_at * width, own.len()..own.len() + group.len(), [k, v]));
                own.extend(group.iter().map(|_| None));
            }
            [] => {}
        }
        (dk, dv) = (k_rest, v_rest);
    }
    (own, shared)
}

/// Sets the gradients of keys that several items see to the sums of what these found, in the order of the items.
fn join<T: Real>(plan: &Plan<'_, T>, partials: &[Partial<T>], shared: Vec<Shared<'_, T>>) {
    each(plan, shared, |_, (start, items, sums)| {
        for (i, sum) in sums.into_iter().enumerate() {
            sum.fill(T::ZERO);
            for Partial { at, keys, .. } in &partials[items.clone()] {
                let keys = &keys.as_ref().expect("the items of a shared document have their own sums")[i];
                add(&mut sum[at - start..][..keys.len()], keys);
            }
        }
    });
}

/// Σ y d of rows `dh` wide, in sixteen running sums each.
struct Means<'s, T> {
    y: &'s [T],
    d: &'s [T],
    rows: &'s [u32],
    ahead: usize,
    dh: usize,
    /// [lanes, lanes]
    sums: &'s mut [T],
}

impl<T: Real> Kernel for Means<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (sums, row) in self.sums.as_chunks_mut::<LANES>().0.iter_mut().zip(self.rows) {
            let at = *row as usize * self.dh;
            soon_all(self.y.as_ptr(), at + self.ahead, self.dh); // of d the tile does
            let ((y, y_rest), (d, d_rest)) =
                (self.y[at..at + self.dh].as_chunks::<LANES>(), self.d[at..at + self.dh].as_chunks::<LANES>());
            let mut row = [T::ZERO; LANES];
            for (y, d) in y.iter().zip(d) {
                (0..LANES).for_each(|l| row[l] += y[l] * d[l]);
            }
            row.iter_mut().zip(y_rest).zip(d_rest).for_each(|((sum, y), d)| *sum += *y * *d);
            *sums = row;
        }
    }
}

/// An item, with what it reads: the output, its upstream gradient and the statistics of all items.
struct Job<'s, T: Real> {
    plan: &'s Plan<'s, T>,
    item: &'s Item,
    y: &'s [T],
    upstream: &'s [T],
    stats: &'s [T],
}

impl<T: Real> Job<'_, T> {
    /// Sets dq, d_gates and, of a document that the item has for itself, the gradients of its keys and values.
    fn run(
        &self,
        arena: &Arena<T>,
        scratch: &mut Scratch<T>,
        (dq, d_gates): (&mut [T], &mut [T]),
        mut own: Own<'_, T>,
    ) -> Partial<T> {
        let (plan, item) = (self.plan, self.item);
        let (dh, wide, width) = (plan.dh, plan.wide, plan.spec.kv_heads * plan.dh);
        let keys = keys(plan, item);
        let mut shared = None;
        let mut dkv: [&mut [T]; 2] = match &mut own {
            Some(own) => own.each_mut().map(|own| &mut **own),
            None => shared.insert([0, 1].map(|_| arena.take(keys.len() * width))).each_mut().map(|own| &mut **own),
        };
        scratch.d_table.clear();
        if plan.gates.is_some() {
            dq.fill(T::ZERO);
            d_gates.fill(T::ZERO);
        }
        for kv in 0..plan.spec.kv_heads {
            plan.rows(item, kv, &mut scratch.rows);
            scratch.pack(plan, item, keys.clone(), kv, true);
            for d in [&mut scratch.dk, &mut scratch.dv] {
                d.clear();
                d.resize(keys.len() * wide, Piece::all(T::ZERO));
            }
            let rows = std::mem::take(&mut scratch.rows);
            for rows in rows.chunks(LANES) {
                let span = Span::new(plan, item, rows);
                let pull = self.tile(&span, keys.start, scratch);
                scratch.tile.unload_back(plan, &span, dq);
                if plan.gates.is_some() {
                    rows.iter().zip(pull.0).for_each(|(&row, pull)| d_gates[row as usize] = pull);
                }
            }
            scratch.rows = rows;
            let [dk, dv] = &mut dkv;
            let turn = plan.rope.as_ref().map(|rope| rope.turn(Positions::From(keys.start), true));
            for (from, to, turn) in [(&scratch.dk, dk, turn), (&scratch.dv, dv, None)] {
                let rows = Scattered::plain(lanes::flat(from), (keys.len(), dh), |i| i * wide * PIECE);
                Scattered { turn, ..rows }.copy(to, |i| i * width + kv * dh);
            }
        }
        let at = (item.keys_at + keys.start) * width;
        Partial { at, keys: shared, d_table: lanes::flat(&scratch.d_table).to_vec() }
    }

    /// What backward knows of a tile's rows. Lanes behind the last row repeat it, without upstream gradient.
    fn rows(&self, span: &Span<'_>) -> Rows<T> {
        let (plan, heads) = (self.plan, self.plan.spec.heads);
        let zero = Lanes::all(T::ZERO);
        let mut rows = Rows { max: zero, inverse: zero, gate: Lanes::all(T::ONE), mean: zero };
        for l in 0..LANES {
            let at = self.item.queries_at * heads + span.rows[l.min(span.rows.len() - 1)] as usize;
            (rows.max.0[l], rows.inverse.0[l]) = (self.stats[2 * at], self.stats[2 * at + 1]);
            if l < span.rows.len() {
                rows.gate.0[l] = plan.gates.map_or(T::ONE, |gates| gates[at]);
            }
        }
        let at = self.item.queries_at * heads * plan.dh;
        let (y, d) = (&self.y[at..], &self.upstream[at..]);
        let (mut sums, mut columns) = ([Piece::all(T::ZERO); LANES / PIECE * LANES], [zero; LANES]);
        simd::dispatch(Means {
            y,
            d,
            rows: span.rows,
            ahead: span.ahead,
            dh: plan.dh,
            sums: lanes::flat_mut(&mut sums),
        });
        lanes::columns(&mut columns, &sums, LANES / PIECE);
        columns.iter().for_each(|column| (0..LANES).for_each(|l| rows.mean.0[l] += column.0[l]));
        rows
    }

    /// Adds what the rows of a tile give to dk, dv and d_table, leaves their dq in tile.out and returns the gradient of their gates.
    fn tile(&self, span: &Span<'_>, first: usize, scratch: &mut Scratch<T>) -> Lanes<T> {
        let (plan, item, wide) = (self.plan, self.item, self.plan.wide);
        let rows = self.rows(span);
        let Scratch { k, v, dk, dv, d_table, tile, .. } = scratch;
        tile.load(plan, item, span, true);
        tile.load_upstream(plan, item, span, self.upstream, &rows.gate);
        tile.out.clear();
        tile.out.resize(plan.dh, Lanes::all(T::ZERO));
        if tile.s.len() < span.len() {
            tile.s.resize(span.len(), Lanes::all(T::ZERO));
        }
        let (mut pull, mut beyond) = (Lanes::all(T::ZERO), Lanes::all(T::ZERO));
        let near = self.walk(span, (k, first), tile);
        tile.table.start();
        for block in span.blocks() {
            let (keys, at) = (block.start - first..block.end - first, span.within(&block));
            let placed = block.start >= near;
            if !placed {
                tile.meet_plain(span, &block, (k, first), at.clone(), plan.cope.as_ref());
            }
            tile.d.resize(block.len(), Lanes::all(T::ZERO));
            let (s, d) = (&mut tile.s[at.clone()], &mut tile.d[..]);
            v.meet(keys.clone(), d, &tile.d_out.columns);
            lanes::harden(s, d, &rows, &mut pull);
            if placed {
                lanes::retreat(d, &tile.places[at], &mut beyond, &mut tile.table.dz);
            } else if plan.cope.is_some() {
                tile.table.add_to_rim(d);
            }
            k.gather(keys.start, &mut tile.out, d, &mut tile.room);
            let range = keys.start * wide..keys.end * wide;
            tile.q.lines.spread(&mut dk[range.clone()], d, wide, &mut tile.room);
            tile.d_out.lines.spread(&mut dv[range], s, wide, &mut tile.room);
        }
        if let Some(cope) = &plan.cope {
            let dz = tile.table.finish();
            cope.table.gather(0, &mut tile.out, dz, &mut tile.room);
            if d_table.len() < dz.len() * wide {
                d_table.resize(dz.len() * wide, Piece::all(T::ZERO));
            }
            tile.q.lines.spread(&mut d_table[..dz.len() * wide], dz, wide, &mut tile.room);
        }
        pull
    }

    /// Scores and places of all keys that contextual positions reach; returns the first of them (or the end of the keys).
    fn walk(&self, span: &Span<'_>, k: (&Keys<T>, usize), tile: &mut Tile<T>) -> usize {
        let mut near = usize::MAX;
        let Some(cope) = &self.plan.cope else { return near };
        if tile.places.len() < span.len() {
            tile.places.resize(span.len(), Place::ORIGIN);
        }
        let mut walk = Walk::new();
        for block in span.blocks().rev() {
            if walk.done(cope) {
                break;
            }
            tile.meet_places(span, &block, k, span.within(&block), (cope, &mut walk));
            near = block.start;
        }
        near
    }
}
