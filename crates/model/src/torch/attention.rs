//! Causal attention under libtorch. RoPE and none go through `scaled_dot_product_attention`. CoPE's bias depends on the query, so its scores are
//! explicit: in tiles of documents and queries, and where all tiles together would be large each is computed again on the way back, so that no
//! more than one tile of size queries x keys exists at a time. In a tile the keys run backwards from the last query's own: a position, the sum of
//! the gates from a key to the query, is then a plain running sum.

use super::documents::{Ragged, hidden};
use crate::transformer::{Block, Transformer};
use tensor::Param;
use tensor::ops::attention::Position;
use tensor::torch::{Device, Flat, Graph, Kind, Result, Tensor, leaf};

/// Queries of a tile, and scores over all documents and heads: on the CPU a tile's arrays should stay in the cache.
fn tile(device: Device) -> (i64, i64) {
    if device == Device::Cpu { (64, 1 << 20) } else { (512, 1 << 26) }
}

pub(super) struct Attention {
    position: Position,
    window: Option<usize>,
    heads: i64,
    kv_heads: i64,
    /// Width of a head.
    width: i64,
    documents: Ragged,
}

/// Queries [b, kv, r, t, w], or keys or values [b, kv, t, w] with time running backwards.
struct Grouped {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Attention {
    pub fn new(model: &Transformer, block: &Block, documents: &Ragged) -> Result<Self> {
        let (heads, kv_heads) = (model.config.num_heads as i64, model.config.num_kv_heads as i64);
        let width = block.query.rows as i64 / heads;
        let (position, window) = (block.spec.position, block.spec.window);
        Ok(Attention { position, window, heads, kv_heads, width, documents: documents.shallow_clone() })
    }

    /// Whether the scores of the whole batch are too large to be kept for the way back.
    pub fn must_recompute(&self, device: Device) -> bool {
        let scores = self.documents.b * self.heads * self.documents.t * self.documents.t;
        matches!(self.position, Position::Cope { .. }) && scores > tile(device).1
    }

    /// q [n, heads·w], k and v [n, kv_heads·w] -> [n, heads·w], all of it in the graph.
    pub fn forward(&mut self, graph: &mut Graph<'_>, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        match self.position {
            Position::Cope { table } => {
                let grouped = self.grouped(q, k, v)?;
                let table = graph.product(table)?.f_squeeze_dim(0)?;
                let y = self.tile(&grouped.q, &grouped.k, &grouped.v, &table, graph.flat().kind)?;
                self.ungrouped(&y)
            }
            Position::Rope { base } => {
                let (q, k) = (self.rotate(q, self.heads, base)?, self.rotate(k, self.kv_heads, base)?);
                self.scaled_dot_product(&q, &k, v)
            }
            Position::None => self.scaled_dot_product(q, k, v),
        }
    }

    /// The same for CoPE outside of any graph, and what its backward needs.
    pub fn recomputed(self, flat: &Flat, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Recomputed)> {
        let Position::Cope { table } = self.position else {
            return Err(tensor::torch::Error::Torch("only CoPE is recomputed".into()));
        };
        let inputs = [q, k, v].map(Tensor::shallow_clone);
        let grouped = self.grouped(&q.f_detach()?, &k.f_detach()?, &v.f_detach()?)?;
        let rows = Flat::matrix(flat.products(), &table)?;
        let y = grouped.q.f_zeros_like()?;
        for place in self.tiles(flat.device) {
            let [q, k, v] = place.cut(&grouped)?;
            place.queries(&y)?.f_copy_(&self.tile(&q, &k, &v, &rows, flat.kind)?)?;
        }
        let attended = self.ungrouped(&y)?;
        Ok((attended, Recomputed { attention: self, table, inputs, grouped }))
    }

    /// Softmax(q·k + CoPE bias) v of queries [g, kv, r, c, w] and backward keys and values [g, kv, s, w], the first key that of the last query.
    fn tile(&self, q: &Tensor, k: &Tensor, v: &Tensor, table: &Tensor, kind: Kind) -> Result<Tensor> {
        let size = q.size();
        let (groups, r, c, s) = (size[0] * size[1], size[2], size[3], k.size()[2]);
        let last = table.size()[0] - 1;
        let flat = |x: &Tensor| x.f_reshape([groups, -1, self.width]);
        let (q, k, v) = (flat(q)?, flat(k)?, flat(v)?);
        let mask = hidden(c, s, self.window, kind, q.device())?;
        let scaled = q.f_mul_scalar(1.0 / (self.width as f64).sqrt())?;
        let u = scaled.f_bmm(&k.f_transpose(1, 2)?)?.f_to_kind(kind)?.f_reshape([groups, r, c, s])?.f_add(&mask)?;
        let sums = u.f_sigmoid()?.f_cumsum(-1, kind)?.f_clamp_max(last)?;
        let below = sums.f_detach()?.f_floor()?.f_clamp_max(last - 1)?;
        let index = below.f_to_kind(Kind::Int64)?;
        let z = q.f_matmul(&table.f_transpose(0, 1)?)?.f_to_kind(kind)?.f_reshape([groups, r, c, last + 1])?;
        let rise = z.f_narrow(-1, 1, last)?.f_sub(&z.f_narrow(-1, 0, last)?)?;
        let bias =
            z.f_gather(-1, &index, false)?.f_addcmul(&sums.f_sub(&below)?, &rise.f_gather(-1, &index, false)?)?;
        let p = u.f_add(&bias)?.f_softmax(-1, kind)?.f_to_kind(v.f_kind()?)?;
        p.f_reshape([groups, r * c, s])?.f_bmm(&v)?.f_reshape(&size)
    }

    fn scaled_dot_product(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let q = self.split(q, self.heads)?;
        // Every query head gets its own view of keys and values: the CPU's kernel knows no groups.
        let repeat = self.heads / self.kv_heads;
        let each = |x: &Tensor| match repeat {
            1 => self.split(x, self.kv_heads),
            _ => self.split(x, self.kv_heads)?.f_repeat_interleave_self_int(repeat, 1, None),
        };
        let (k, v) = (each(k)?, each(v)?);
        let attend = |q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>| {
            Tensor::f_scaled_dot_product_attention(q, k, v, mask, 0.0, mask.is_none(), None, false)
        };
        let t = self.documents.t;
        let y = match self.window.filter(|&window| (window as i64) < t) {
            None => attend(&q, &k, &v, None)?,
            Some(window) => {
                let mut parts = Vec::new();
                for (start, end, first) in spans(t, tile(q.device()).0, Some(window)) {
                    let (c, s) = (end - start, end - first);
                    let mask = hidden(c, s, Some(window), q.f_kind()?, q.device())?.f_flip([1])?;
                    let cut = |x: &Tensor| x.f_narrow(2, first, s);
                    parts.push(attend(&q.f_narrow(2, start, c)?, &cut(&k)?, &cut(&v)?, Some(&mask))?);
                }
                Tensor::f_cat(&parts, 2)?
            }
        };
        self.documents.rows(&y.f_transpose(1, 2)?.f_contiguous()?)
    }

    /// [n, heads·w] -> [b, heads, t, w].
    fn split(&self, x: &Tensor, heads: i64) -> Result<Tensor> {
        let size = [self.documents.b, self.documents.t, heads, self.width];
        self.documents.rectangle(x)?.f_reshape(size)?.f_transpose(1, 2)
    }

    /// x·cos + rotate_half(x)·sin by the position in the document.
    fn rotate(&self, x: &Tensor, heads: i64, base: f64) -> Result<Tensor> {
        let (half, kind, device) = (self.width / 2, x.f_kind()?, x.device());
        let frequencies: Vec<f64> = (0..half).map(|i| base.powf(-(i as f64) / half as f64)).collect();
        let frequencies = Tensor::f_from_slice(&frequencies)?.f_to_device(device)?;
        let positions = self.documents.positions_n.f_to_kind(Kind::Double)?;
        let angles = positions.f_unsqueeze(1)?.f_mul(&frequencies.f_unsqueeze(0)?)?.f_unsqueeze(1)?;
        let (cos, sin) = (angles.f_cos()?.f_to_kind(kind)?, angles.f_sin()?.f_to_kind(kind)?);
        let size = x.size();
        let x = x.f_reshape([-1, heads, self.width])?;
        let (low, high) = (x.f_narrow(2, 0, half)?, x.f_narrow(2, half, half)?);
        let turned_low = low.f_mul(&cos)?.f_sub(&high.f_mul(&sin)?)?;
        let turned_high = high.f_mul(&cos)?.f_add(&low.f_mul(&sin)?)?;
        Tensor::f_cat(&[turned_low, turned_high], 2)?.f_reshape(&size)
    }

    fn grouped(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Grouped> {
        let (b, t, r) = (self.documents.b, self.documents.t, self.heads / self.kv_heads);
        let q = self.documents.rectangle(q)?.f_reshape([b, t, self.kv_heads, r, self.width])?;
        let backwards = |x: &Tensor| self.split(x, self.kv_heads)?.f_flip([2]);
        Ok(Grouped { q: q.f_permute([0, 2, 3, 1, 4])?.f_contiguous()?, k: backwards(k)?, v: backwards(v)? })
    }

    /// [b, kv, r, t, w] -> [n, heads·w].
    fn ungrouped(&self, y: &Tensor) -> Result<Tensor> {
        self.documents.rows(&y.f_permute([0, 3, 1, 2, 4])?.f_contiguous()?)
    }

    fn tiles(&self, device: Device) -> Vec<Tile> {
        let (queries, scores) = tile(device);
        let (b, t) = (self.documents.b, self.documents.t);
        let mut tiles = Vec::new();
        for (start, end, first) in spans(t, queries, self.window) {
            let together = (scores / (self.heads * (end - start) * (end - first))).clamp(1, b);
            for document in (0..b).step_by(together as usize) {
                let documents = together.min(b - document);
                tiles.push(Tile {
                    document,
                    documents,
                    start,
                    queries: end - start,
                    newest: t - end,
                    keys: end - first,
                });
            }
        }
        tiles
    }
}

/// (first query, end of the queries, first key that any of them sees).
fn spans(t: i64, queries: i64, window: Option<usize>) -> impl Iterator<Item = (i64, i64, i64)> {
    (0..t).step_by(queries as usize).map(move |start| {
        let first = window.map_or(0, |window| (start + 1 - window as i64).max(0));
        (start, (start + queries).min(t), first)
    })
}

/// Some queries of some documents, and the keys they see; `newest` counts from the end of time.
struct Tile {
    document: i64,
    documents: i64,
    start: i64,
    queries: i64,
    newest: i64,
    keys: i64,
}

impl Tile {
    fn queries(&self, q: &Tensor) -> Result<Tensor> {
        q.f_narrow(0, self.document, self.documents)?.f_narrow(3, self.start, self.queries)
    }

    fn keys(&self, k: &Tensor) -> Result<Tensor> {
        k.f_narrow(0, self.document, self.documents)?.f_narrow(2, self.newest, self.keys)
    }

    fn cut(&self, grouped: &Grouped) -> Result<[Tensor; 3]> {
        Ok([self.queries(&grouped.q)?, self.keys(&grouped.k)?, self.keys(&grouped.v)?])
    }
}

/// CoPE attention whose tiles are computed again on the way back.
pub(super) struct Recomputed {
    attention: Attention,
    table: Param,
    /// q, k and v in the graph below.
    pub inputs: [Tensor; 3],
    grouped: Grouped,
}

impl Recomputed {
    /// Gradients of q, k and v; that of the table is added to the flat gradient.
    pub fn backward(&self, flat: &Flat, dy: &Tensor) -> Result<[Tensor; 3]> {
        let attention = &self.attention;
        let (b, t, r) = (attention.documents.b, attention.documents.t, attention.heads / attention.kv_heads);
        let dy = attention.documents.rectangle_back(dy)?.f_reshape([b, t, attention.kv_heads, r, attention.width])?;
        let dy = dy.f_permute([0, 2, 3, 1, 4])?;
        let dq = self.grouped.q.f_zeros_like()?;
        let (dk, dv) = (self.grouped.k.f_zeros_like()?, self.grouped.v.f_zeros_like()?);
        for place in attention.tiles(flat.device) {
            let mut graph = Graph::new(flat);
            let table = graph.product(self.table)?.f_squeeze_dim(0)?;
            let [q, k, v] = place.cut(&self.grouped)?.map(|x| leaf(&x));
            let (q, k, v) = (q?, k?, v?);
            let y = attention.tile(&q, &k, &v, &table, flat.kind)?;
            let found = graph.backward(&[(&y, &place.queries(&dy)?)], &[], &[&q, &k, &v])?;
            place.queries(&dq)?.f_copy_(&found[0])?;
            let _ = place.keys(&dk)?.f_add_(&found[1])?;
            let _ = place.keys(&dv)?.f_add_(&found[2])?;
        }
        let backwards = |x: &Tensor| {
            let x = x.f_flip([2])?.f_transpose(1, 2)?.f_contiguous()?;
            attention.documents.rows(&x)
        };
        Ok([attention.ungrouped(&dq)?, backwards(&dk)?, backwards(&dv)?])
    }
}
