//! What tiles multiply, as numbers or, where that is faster and the precision allows it, as pairs of bf16 made once for many products.

use super::rotary::Rope;
use crate::Real;
use crate::kernels::lanes::narrow::{self, Couples, Grid};
use crate::kernels::lanes::{self, Lanes, Left, PIECE, Piece};
use crate::kernels::simd::copy;
use std::ops::Range;

/// Rows [n, width] that meet columns: keys, values, the CoPE table.
#[derive(Default)]
pub(super) struct Rows<T> {
    /// The numbers, where products take them as they are.
    plain: Vec<T>,
    width: usize,
    /// Where they are wanted, pairs along the rows [n, half], and down the columns [n / 2, width].
    along: Vec<u32>,
    down: Vec<u32>,
    pairs: [bool; 2],
}

impl<T: Real> Rows<T> {
    pub(super) fn new(plain: Vec<T>, width: usize, narrow: bool) -> Self {
        let mut rows = Rows::default();
        rows.read(Grid { data: &plain, rows: plain.len() / width, width, stride: width }, [narrow; 2], None);
        rows
    }

    /// Takes rows, rotated to the positions from one on where there is a rope, with whether pairs along the rows, for `meet`, and down the
    /// columns, for `gather`, are wanted: then no others are kept.
    pub(super) fn read(&mut self, from: Grid<'_, T>, pairs: [bool; 2], rope: Option<(&Rope<T>, usize)>) {
        (self.width, self.pairs) = (from.width, pairs);
        let mut from = from;
        if rope.is_some() || pairs == [false; 2] {
            self.plain.resize(from.rows * from.width, T::ZERO);
            let rows = self.plain.chunks_exact_mut(from.width.max(1));
            rows.enumerate().for_each(|(i, to)| copy(to, from.row(i)));
            if let Some((rope, first)) = rope {
                rope.turn(&mut self.plain, from.width, |i| first + i, false);
            }
            from = Grid { data: &self.plain, stride: from.width, ..from };
        }
        if pairs[0] {
            narrow::along(&mut self.along, from);
        }
        if pairs[1] {
            narrow::down(&mut self.down, from);
        }
    }

    /// dst = some of the rows · columns.
    pub(super) fn meet(&self, rows: Range<usize>, dst: &mut [Lanes<T>], columns: &Columns<T>) {
        if self.pairs[0] {
            let half = self.width.div_ceil(2);
            let left = Left { data: &self.along[rows.start * half..rows.end * half], row: half, col: 1 };
            narrow::product(dst, left, &columns.pairs, false);
        } else {
            let data = &self.plain[rows.start * self.width..rows.end * self.width];
            lanes::product(dst, Left { data, row: self.width, col: 1 }, &columns.plain, false);
        }
    }

    /// dst [width] += rowsᵀ · weights, one of these for each of some rows from an even one on.
    pub(super) fn gather(&self, first: usize, dst: &mut [Lanes<T>], weights: &[Lanes<T>], room: &mut Room) {
        if self.pairs[1] {
            assert!(first.is_multiple_of(2), "rows in pairs");
            narrow::columns(&mut room.pairs, weights);
            let left = Left { data: &self.down[first / 2 * self.width..], row: 1, col: self.width };
            narrow::product(dst, left, &room.pairs, true);
        } else {
            lanes::product(
                dst,
                Left { data: &self.plain[first * self.width..], row: 1, col: self.width },
                weights,
                true,
            );
        }
    }
}

/// Pairs of weights for one product.
#[derive(Default)]
pub(super) struct Room {
    pairs: Vec<Lanes<u32>>,
    couples: Vec<Couples>,
}

/// Columns [depth] of a tile: queries and upstream gradients.
#[derive(Default)]
pub(super) struct Columns<T> {
    pub plain: Vec<Lanes<T>>,
    pairs: Vec<Lanes<u32>>,
}

impl<T: Real> Columns<T> {
    /// The columns of padded rows [lanes, wide].
    pub(super) fn turn(&mut self, rows: &[Piece<T>], (depth, wide): (usize, usize), narrow: bool) {
        self.plain.resize(depth, Lanes::all(T::ZERO));
        lanes::columns(&mut self.plain, rows, wide);
        if narrow {
            narrow::columns(&mut self.pairs, &self.plain);
        }
    }
}

/// The same by row: padded rows [lanes, wide].
#[derive(Default)]
pub(super) struct Lines<T> {
    pub plain: Vec<Piece<T>>,
    pairs: Vec<u32>,
}

impl<T: Real> Lines<T> {
    /// To be called when `plain` has changed.
    pub(super) fn set(&mut self, wide: usize, narrow: bool) {
        if narrow {
            let (data, width) = (lanes::flat(&self.plain), wide * PIECE);
            narrow::down(&mut self.pairs, Grid { data, rows: lanes::LANES, width, stride: width });
        } else {
            self.pairs.clear();
        }
    }

    /// dst [rows, wide] += weights [rows, lanes] · these.
    pub(super) fn spread(&self, dst: &mut [Piece<T>], weights: &[Lanes<T>], wide: usize, room: &mut Room) {
        if !self.pairs.is_empty() {
            narrow::couples(&mut room.couples, weights);
            narrow::outer(dst, &room.couples, &self.pairs, wide);
        } else {
            lanes::outer(dst, weights, &self.plain, wide);
        }
    }
}
