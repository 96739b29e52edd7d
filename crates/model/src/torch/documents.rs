//! Ragged documents for operations that want a rectangle: rows are copied into [b, t] by an index and back. Rows beyond the end of a document hold
//! its last token again; no real query sees them, for they come later, and their own results are dropped.

use crate::transformer::Documents;
use tensor::torch::{Device, Flat, Kind, Result, Tensor, integers};

pub(super) struct Ragged {
    /// Documents with at least one token, and the length of the longest.
    pub b: i64,
    pub t: i64,
    /// Position of every token in its document.
    pub positions_n: Tensor,
    /// Which document every token belongs to.
    document_n: Tensor,
    /// Row of the batch for every place of the rectangle, and place for every row; none where all documents are equally long.
    places: Option<(Tensor, Tensor)>,
}

impl Ragged {
    pub fn new(documents: &Documents, flat: &Flat) -> Result<Self> {
        let spans: Vec<(usize, usize)> =
            documents.offsets_b1.windows(2).map(|w| (w[0], w[1])).filter(|(start, end)| start < end).collect();
        let (b, t) = (spans.len(), spans.iter().map(|(start, end)| end - start).max().unwrap_or(0));
        let n = documents.tokens_n.len();
        let places = if b * t == n {
            None
        } else {
            let rows = spans.iter().flat_map(|&(start, end)| (0..t).map(move |i| (start + i).min(end - 1) as i64));
            let back = spans
                .iter()
                .enumerate()
                .flat_map(|(d, (start, end))| (0..end - start).map(move |i| (d * t + i) as i64));
            Some((integers(rows, flat.device)?, integers(back, flat.device)?))
        };
        let document = spans.iter().enumerate().flat_map(|(d, (start, end))| (*start..*end).map(move |_| d as i64));
        Ok(Ragged {
            b: b as i64,
            t: t as i64,
            positions_n: integers(documents.positions().into_iter().map(i64::from), flat.device)?,
            document_n: integers(document, flat.device)?,
            places,
        })
    }

    /// [n, w] -> [b, t, w].
    pub fn rectangle(&self, x: &Tensor) -> Result<Tensor> {
        let x = match &self.places {
            Some((rows, _)) => x.f_index_select(0, rows)?,
            None => x.shallow_clone(),
        };
        x.f_reshape([self.b, self.t, -1])
    }

    /// A gradient [n, w] -> [b, t, w], zero in the rows that no token has.
    pub fn rectangle_back(&self, dy: &Tensor) -> Result<Tensor> {
        let dy = match &self.places {
            Some((_, back)) => {
                let empty = Tensor::f_zeros([self.b * self.t, dy.size()[1]], (dy.f_kind()?, dy.device()))?;
                empty.f_index_copy(0, back, dy)?
            }
            None => dy.shallow_clone(),
        };
        dy.f_reshape([self.b, self.t, -1])
    }

    /// [b, t, w] -> [n, w].
    pub fn rows(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.f_reshape([self.b * self.t, -1])?;
        match &self.places {
            Some((_, back)) => x.f_index_select(0, back),
            None => Ok(x),
        }
    }

    /// Σ over documents of the Frobenius norm of their rows.
    pub fn norms(&self, gradient: &Tensor) -> Result<Tensor> {
        let squares_n = gradient.f_square()?.f_sum_dim_intlist(-1i64, false, Kind::Double)?;
        let sums = Tensor::f_zeros([self.b], (Kind::Double, squares_n.device()))?;
        sums.f_index_add(0, &self.document_n, &squares_n)?.f_sqrt()?.f_sum(Kind::Double)
    }

    pub fn shallow_clone(&self) -> Self {
        let places = self.places.as_ref().map(|(rows, back)| (rows.shallow_clone(), back.shallow_clone()));
        Ragged {
            positions_n: self.positions_n.shallow_clone(),
            document_n: self.document_n.shallow_clone(),
            places,
            ..*self
        }
    }
}

/// 0 where a query sees a key and -∞ elsewhere, [c, keys]: c queries in order, keys from the last query's own backwards; `window` keys are seen.
pub(super) fn hidden(c: i64, keys: i64, window: Option<usize>, kind: Kind, device: Device) -> Result<Tensor> {
    // Distance from query row r to key column s, which lies c - 1 - s after the first query.
    let (rows, columns) = (Tensor::f_arange(c, (Kind::Int64, device))?, Tensor::f_arange(keys, (Kind::Int64, device))?);
    let distance = rows.f_unsqueeze(1)?.f_add(&columns.f_unsqueeze(0)?)?.f_sub_scalar(c - 1)?;
    let mut outside = distance.f_lt(0)?;
    if let Some(window) = window {
        outside = outside.f_logical_or(&distance.f_ge(window as i64)?)?;
    }
    Tensor::f_zeros([c, keys], (kind, device))?.f_masked_fill(&outside, f64::NEG_INFINITY)
}
