//! The forward pass of an item.

use super::plan::{Item, Plan};
use super::tile::{Scratch, Span, Walk, keys};
use crate::Real;
use crate::kernels::lanes::{self, LANES, Lanes, Place};

/// Fills out [rows, heads·dh] and stats [rows, heads, 2]: the maximum of a row's scores and 1 / Σ exp(score - maximum). Heads that a token did
/// not choose are zero in `out`; their stats are never read. Where the plan measures them, entropies [rows, heads] are those of the weights.
pub(super) fn forward<T: Real>(
    plan: &Plan<'_, T>,
    item: &Item,
    scratch: &mut Scratch<T>,
    [out, stats, entropies]: [&mut [T]; 3],
) {
    if plan.gates.is_some() {
        out.fill(T::ZERO);
    }
    let keys = keys(plan, item);
    for kv in 0..plan.spec.kv_heads {
        plan.rows(item, kv, &mut scratch.rows);
        if scratch.rows.is_empty() {
            continue;
        }
        scratch.pack(plan, item, keys.clone(), kv, false);
        let rows = std::mem::take(&mut scratch.rows);
        for rows in rows.chunks(LANES) {
            let span = Span::new(plan, item, rows);
            let (max, sum, turn) = tile(plan, item, keys.start, &span, scratch);
            let mut factors = Lanes::all(T::ZERO);
            for (l, &row) in rows.iter().enumerate() {
                let row = row as usize;
                let inverse = T::ONE / sum.0[l];
                (stats[2 * row], stats[2 * row + 1]) = (max.0[l], inverse);
                if plan.measures() {
                    entropies[row] = sum.0[l].ln() - turn.0[l] * inverse;
                }
                factors.0[l] = plan.gates.map_or(inverse, |g| g[item.queries_at * plan.spec.heads + row] * inverse);
            }
            scratch.tile.unload(plan, &span, &factors, out);
        }
        scratch.rows = rows;
    }
}

/// Leaves Σ exp(score - maximum) v of each row in tile.out; returns maximum, sum and, where it is wanted, Σ exp(score - maximum) (score - maximum).
fn tile<T: Real>(
    plan: &Plan<'_, T>,
    item: &Item,
    first: usize,
    span: &Span<'_>,
    scratch: &mut Scratch<T>,
) -> (Lanes<T>, Lanes<T>, Lanes<T>) {
    let (cope, tile) = (plan.cope.as_ref(), &mut scratch.tile);
    tile.load(plan, item, span, false);
    tile.out.clear();
    tile.out.resize(plan.dh, Lanes::all(T::ZERO));
    let (mut max, mut sum, mut turn) = (Lanes::all(-T::INFINITY), Lanes::all(T::ZERO), Lanes::all(T::ZERO));
    let mut walk = Walk::new();
    for block in span.blocks().rev() {
        let at = 0..block.len();
        let k = (&scratch.k, first);
        if tile.s.len() < at.end {
            tile.s.resize(at.end, Lanes::all(T::ZERO));
        }
        match cope {
            Some(cope) if !walk.done(cope) => {
                if tile.places.len() < at.end {
                    tile.places.resize(at.end, Place::ORIGIN);
                }
                tile.meet_places(span, &block, k, at.clone(), (cope, &mut walk));
            }
            _ => tile.meet_plain(span, &block, k, at.clone(), cope),
        }
        let before = (max, sum);
        if plan.measures() {
            tile.d.clear();
            tile.d.extend_from_slice(&tile.s[at.clone()]);
        }
        lanes::soften(&mut tile.s[at.clone()], &mut max, &mut sum, &mut tile.out);
        if plan.measures() {
            lanes::disorder(&tile.d, &tile.s[at.clone()], &before.0, &before.1, &max, &mut turn);
        }
        scratch.v.gather(block.start - first, &mut tile.out, &tile.s[at], &mut tile.room);
    }
    (max, sum, turn)
}
