//! Right sides that are packed once and then multiplied by many blocks of rows, each on one thread: the weights of a layer.

use super::blocks::{self, Method, Out, Right};
use super::{Matrix, Threads, job, matmul_strided};
use crate::{Arena, Buffer, Precision, Real, isa};
use std::any::TypeId;
use std::ops::Range;

/// Packed numbers at most, 32 MiB: weights beyond are packed by each block of rows for itself.
const ROOM: usize = 1 << 23;

/// Numbers of a cache line, on which packed panels start.
const LINE: usize = 16;

/// A right side [k, n] for `rows` rows of products in all, and how its products multiply.
#[derive(Clone, Copy)]
pub struct Side<'a, T> {
    pub matrix: Matrix<'a, T>,
    pub precision: Precision,
    pub rows: usize,
}

/// Right sides ready for use by any thread.
pub struct Packed<'a, T: Real> {
    sides: Vec<Side<'a, T>>,
    /// Of each side that was packed, its place among them.
    places: Vec<Option<usize>>,
    rights: Vec<Right<'a>>,
    room: Buffer<T>,
    start: usize,
}

impl<'a, T: Real> Packed<'a, T> {
    /// Packs the sides, on the current thread pool where `pool` says so. Few rows or f64 need none of it.
    pub fn new(arena: &Arena<T>, sides: Vec<Side<'a, T>>, pool: bool) -> Self {
        let (mut rights, mut total) = (Vec::<Right<'_>>::new(), 0);
        let mut place = |side: &Side<'a, T>| {
            let (method, b) = (Method::of(isa::current(), side.precision), side.matrix);
            let enough = TypeId::of::<T>() == TypeId::of::<f32>() && side.rows > 2 * method.tile.rows;
            let job = if enough { job(&mut [], b.cols, Matrix::new(&[], 0, b.rows), b) } else { None }?;
            let right = Right::new(method, job.b, (b.rows, b.cols), side.rows, total);
            if total + right.len() > ROOM {
                return None;
            }
            total += right.len();
            rights.push(right);
            Some(rights.len() - 1)
        };
        let places = sides.iter().map(&mut place).collect();
        let mut room = arena.take(total + LINE);
        let start = room.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        // SAFETY: there are packed sides only where T is f32; the room has `total` numbers behind `start`.
        let to = unsafe { std::slice::from_raw_parts_mut(room.as_mut_ptr().cast::<u32>().add(start), total) };
        blocks::pack(&rights, to, if pool { rayon::current_num_threads() } else { 1 });
        Packed { sides, places, rights, room, start }
    }

    /// dst [m, n] = a [m, k] · side, or += when `accumulate`, on this thread.
    pub fn multiply(&self, side: usize, dst: &mut [T], a: Matrix<'_, T>, accumulate: bool) {
        self.multiply_all(&mut [To { sides: side..side + 1, dst }], a, accumulate);
    }

    /// The products of one left side with some of the sides: it is packed once for all that multiply alike.
    pub fn multiply_all(&self, to: &mut [To<'_, T>], a: Matrix<'_, T>, accumulate: bool) {
        let stride = |sides: &Range<usize>| self.sides[sides.clone()].iter().map(|side| side.matrix.cols).sum();
        let mut left = None;
        for To { sides, dst } in to.iter_mut() {
            let (stride, mut column) = (stride(sides), 0);
            for i in sides.clone() {
                let Side { matrix: b, precision, .. } = self.sides[i];
                let start = column.min(dst.len());
                let dst = &mut dst[start..];
                match self.places[i].and_then(|_| job(dst, stride, a, b)) {
                    Some(job) => left = Some(job.a),
                    None => matmul_strided(precision, dst, stride, a, b, accumulate, Threads::One),
                }
                column += b.cols;
            }
        }
        let Some(left) = left else { return };
        // SAFETY: as in `new`.
        let room = unsafe {
            std::slice::from_raw_parts(self.room.as_ptr().cast::<u32>().add(self.start), self.room.len() - LINE)
        };
        for precision in [Precision::F32, Precision::Bf16] {
            let mut alike = Vec::with_capacity(to.len());
            for To { sides, dst } in to.iter_mut() {
                let (stride, mut column, dst) = (stride(sides), 0, dst.as_mut_ptr().cast::<f32>());
                for i in sides.clone() {
                    let Side { matrix, precision: own, .. } = self.sides[i];
                    if let Some(right) = self.places[i].filter(|_| own == precision) {
                        let right = &self.rights[right];
                        alike.push(Out { dst: dst.wrapping_add(column), stride, right, panels: right.all() });
                    }
                    column += matrix.cols;
                }
            }
            // SAFETY: sides are packed only where T is f32. `job` checked above that each dst, mutably borrowed, holds its rows and columns and the
            // operands theirs; sides of one dst have columns of their own.
            unsafe { blocks::multiply(left, a.rows, &alike, room, accumulate) };
        }
    }
}

/// Where the products with some sides go: side by side into dst, whose rows are as wide as all of them.
pub struct To<'s, T> {
    pub sides: Range<usize>,
    pub dst: &'s mut [T],
}
