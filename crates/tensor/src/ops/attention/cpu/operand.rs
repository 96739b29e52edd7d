//! What tiles multiply, as numbers or, where that is faster and the precision allows it, as pairs of bf16 made once for many products.

use crate::Real;
use crate::kernels::lanes::narrow::{self, Couples};
use crate::kernels::lanes::{self, Lanes, Left, PIECE, Piece};
use std::ops::Range;

/// Rows [n, width] that meet columns: keys, values, the CoPE table.
#[derive(Default)]
pub(super) struct Rows<T> {
    pub plain: Vec<T>,
    width: usize,
    /// Where they are wanted, pairs along the rows [n, half], and down the columns [n / 2, width].
    along: Vec<u32>,
    down: Vec<u32>,
}

impl<T: Real> Rows<T> {
    pub(super) fn new(plain: Vec<T>, width: usize, narrow: bool) -> Self {
        let mut rows = Rows { plain, width, along: Vec::new(), down: Vec::new() };
        rows.set(width, [narrow; 2]);
        rows
    }

    /// To be called when `plain` has changed, with whether pairs along the rows, for `meet`, and down the columns, for `gather`, are wanted.
    pub(super) fn set(&mut self, width: usize, [along, down]: [bool; 2]) {
        self.width = width;
        self.along.clear();
        self.down.clear();
        if along {
            self.plain.chunks_exact(width).for_each(|row| narrow::along(&mut self.along, row));
        }
        if down {
            narrow::down(&mut self.down, &self.plain, width);
        }
    }

    /// dst = some of the rows · columns.
    pub(super) fn meet(&self, rows: Range<usize>, dst: &mut [Lanes<T>], columns: &Columns<T>) {
        if !self.along.is_empty() {
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
        if !self.down.is_empty() {
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
        self.pairs.clear();
        if narrow {
            narrow::down(&mut self.pairs, lanes::flat(&self.plain), wide * PIECE);
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
