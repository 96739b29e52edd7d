//! What tiles multiply, as numbers or, where that is faster and the precision allows it, as pairs of bf16 made once for many products.

use crate::Real;
use crate::kernels::lanes::narrow::{self, Couples, Down};
use crate::kernels::lanes::scattered::Scattered;
use crate::kernels::lanes::{self, LANES, Lanes, Left, PIECE, Piece};
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
    pub(super) fn new(plain: &[T], width: usize, narrow: bool) -> Self {
        let mut rows = Rows::default();
        rows.read(Scattered::plain(plain, (plain.len() / width, width), |i| i * width), [narrow; 2]);
        rows
    }

    /// Takes rows, with whether pairs along the rows, for `meet`, and down the columns, for `gather`, are wanted: then no numbers are kept.
    pub(super) fn read<F: Fn(usize) -> usize>(&mut self, from: Scattered<'_, T, F>, pairs: [bool; 2]) {
        let width = from.width;
        (self.width, self.pairs) = (width, pairs);
        if pairs == [false; 2] {
            self.plain.resize(from.count * width, T::ZERO);
            return from.copy(&mut self.plain, |i| i * width);
        }
        let down = Down { to: &mut self.down, width, factors: None };
        narrow::pairs(from, pairs[0].then_some(&mut self.along), pairs[1].then_some(down));
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

/// Columns [depth] of a tile.
#[derive(Default)]
pub(super) struct Columns<T> {
    plain: Vec<Lanes<T>>,
    pairs: Vec<Lanes<u32>>,
}

/// The rows of a tile, padded with zeros: [lanes, wide].
#[derive(Default)]
pub(super) struct Lines<T> {
    plain: Vec<Piece<T>>,
    pairs: Vec<u32>,
}

/// The queries of a tile, or upstream gradients, by column and by row.
#[derive(Default)]
pub(super) struct Sides<T> {
    pub columns: Columns<T>,
    pub lines: Lines<T>,
    along: Vec<u32>,
}

impl<T: Real> Sides<T> {
    /// Takes up to sixteen rows; behind the last come zeros. If they are wanted as lines of `wide` pieces too, these are multiplied by factors if
    /// there are any.
    pub(super) fn read<F: Fn(usize) -> usize>(
        &mut self,
        rows: Scattered<'_, T, F>,
        (wide, narrow): (usize, bool),
        lines: Option<Option<&Lanes<T>>>,
    ) {
        let (columns, to, width) = (&mut self.columns, &mut self.lines, wide * PIECE);
        if narrow {
            let down = lines.map(|factors| Down { to: &mut to.pairs, width, factors });
            let half = rows.width.div_ceil(2);
            narrow::pairs(rows, Some(&mut self.along), down);
            self.along.resize(LANES * half, 0);
            to.pairs.resize(if lines.is_some() { LANES / 2 * width } else { 0 }, 0);
            return narrow::turned(&mut columns.pairs, &self.along);
        }
        to.pairs.clear();
        to.plain.resize(LANES * wide, Piece::all(T::ZERO));
        columns.plain.resize(rows.width, Lanes::all(T::ZERO));
        if rows.count < LANES || rows.width < width {
            to.plain.fill(Piece::all(T::ZERO));
        }
        rows.copy(lanes::flat_mut(&mut to.plain), |l| l * width);
        lanes::columns(&mut columns.plain, &to.plain, wide);
        if let Some(factors) = lines.flatten() {
            lanes::scale(&mut to.plain, factors, wide);
        }
    }
}

impl<T: Real> Lines<T> {
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
