//! Routing and experts under libtorch: the policies of `moe_router` on rows of a tensor, then SwiGLU experts as grouped products. The host learns
//! the number of assignments (one small read a layer); counts and ids stay on the device.

use super::Coefficients;
use super::heads::{balance, best};
use moe_router::{Policy, balance::Balance};
use tensor::Param;
use tensor::torch::{Graph, Kind, Result, Tensor, to_vec};

pub(super) struct Routed {
    pub scores_ne: Tensor,
    p_ne: Tensor,
    pub chosen_ne: Tensor,
    renormalize: bool,
}

impl Routed {
    pub fn new(graph: &mut Graph<'_>, policy: &Policy, x: &Tensor, router: Param) -> Result<Self> {
        let scores_ne = graph.exact_linear(x, router)?;
        let p_ne = scores_ne.f_softmax(-1, graph.flat().kind)?;
        let (chosen_ne, renormalize) = match policy {
            Policy::TopP(top_p) => {
                let p = p_ne.f_detach()?;
                (prefix(&p, &liked(&p, &top_p.balance)?, top_p.threshold())?, top_p.renormalize)
            }
            Policy::TopK(top_k) => {
                let p = p_ne.f_detach()?;
                (best(&liked(&p, &top_k.balance)?, top_k.k as i64)?, top_k.renormalize)
            }
            Policy::ExpertChoice(_) | Policy::LearnedP(_) | Policy::Forced(_) | Policy::Overruled(_) => {
                return Err(tensor::torch::Error::Torch("this model.router.kind is not in the torch engine".into()));
            }
        };
        Ok(Routed { scores_ne, p_ne, chosen_ne, renormalize })
    }

    /// (name, coefficient, value) of the losses on the scores.
    pub fn losses(&self, c: &Coefficients) -> Result<[(&'static str, f64, Tensor); 3]> {
        let kind = self.p_ne.f_kind()?;
        let log_p = self.scores_ne.f_log_softmax(-1, kind)?;
        let entropy = log_p.f_exp()?.f_mul(&log_p)?.f_sum_dim_intlist(-1i64, false, kind)?.f_mean(kind)?.f_neg()?;
        let z = self.scores_ne.f_logsumexp(-1i64, false)?.f_square()?.f_mean(kind)?;
        let balance = balance(&self.p_ne, &self.chosen_ne)?;
        Ok([("balance", c.balance, balance), ("entropy", c.entropy, entropy), ("z", c.z, z)])
    }

    /// y_t = Σ w W_down,e (silu(G_e x_t) * (U_e x_t)) over the experts e of token t. a assignments, sorted by expert and then by token.
    pub fn experts(&self, graph: &mut Graph<'_>, x: &Tensor, gate_up: Param, down: Param) -> Result<Tensor> {
        let product = graph.flat().product();
        let n = x.size()[0];
        let by_expert = self.chosen_ne.f_transpose(0, 1)?.f_reshape([-1])?;
        let places_a = by_expert.f_nonzero()?.f_squeeze_dim(1)?;
        let tokens_a = places_a.f_remainder(n)?;
        let ends_e = self.chosen_ne.f_sum_dim_intlist(0i64, false, Kind::Int64)?.f_cumsum(0, Kind::Int64)?;
        let mut weights_ne = self.p_ne.shallow_clone();
        if self.renormalize {
            let kept = weights_ne.f_mul(&self.chosen_ne.f_to_kind(weights_ne.f_kind()?)?)?;
            weights_ne = weights_ne.f_div(&kept.f_sum_dim_intlist(-1i64, true, kept.f_kind()?)?)?;
        }
        let weights_a = weights_ne.f_transpose(0, 1)?.f_reshape([-1])?.f_index_select(0, &places_a)?;
        let rows = x.f_to_kind(product)?.f_index_select(0, &tokens_a)?;
        let pre = grouped(&rows, &graph.product(gate_up)?, &ends_e)?;
        let g = down.width as i64;
        let hidden = pre.f_narrow(1, 0, g)?.f_silu()?.f_mul(&pre.f_narrow(1, g, g)?)?;
        let y = grouped(&hidden, &graph.product(down)?, &ends_e)?;
        let y = y.f_to_kind(x.f_kind()?)?.f_mul(&weights_a.f_unsqueeze(1)?)?;
        x.f_detach()?.f_zeros_like()?.f_index_add(0, &tokens_a, &y)
    }
}

/// What the experts are sorted by: probability plus bias (`moe_router::balance`), in f64 where there are biases.
fn liked(p_ne: &Tensor, balance: &Balance) -> Result<Tensor> {
    let biases_e = balance.biases_e();
    if biases_e.is_empty() {
        return Ok(p_ne.shallow_clone());
    }
    p_ne.f_to_kind(Kind::Double)?.f_add(&Tensor::f_from_slice(&biases_e)?.f_to_device(p_ne.device())?)
}

/// The shortest prefix of the experts sorted by `liked_ne` whose probabilities' sum (in f64) strictly exceeds p, as a mask; all if none does or
/// p = 1. Among equals the lower index comes first.
fn prefix(p_ne: &Tensor, liked_ne: &Tensor, p: f64) -> Result<Tensor> {
    let none = p_ne.f_zeros_like()?.f_to_kind(Kind::Bool)?;
    if p >= 1.0 {
        return none.f_logical_not();
    }
    let order = liked_ne.f_argsort_stable(true, -1, true)?;
    let sorted = p_ne.f_gather(-1, &order, false)?;
    let e = sorted.size()[1];
    let sums = sorted.f_cumsum(-1, Kind::Double)?;
    let before = Tensor::f_cat(&[sums.f_narrow(1, 0, 1)?.f_zeros_like()?, sums.f_narrow(1, 0, e - 1)?], 1)?;
    none.f_scatter(-1, &order, &before.f_le(p)?)
}

/// Rows [a, k] of each expert times its weight [e, m, k] transposed -> [a, m]; `ends_e` are the ends of the experts' rows.
fn grouped(rows: &Tensor, weight: &Tensor, ends_e: &Tensor) -> Result<Tensor> {
    let (kind, size) = (rows.f_kind()?, weight.size());
    let step = match kind {
        Kind::BFloat16 => 8,
        _ => 4, // grouped products want rows that start on 16 bytes
    };
    let weight = weight.f_transpose(1, 2)?;
    if kind != Kind::Double && size[1] % step == 0 && size[2] % step == 0 && rows.size()[0] > 0 {
        return rows.f_internal_grouped_mm(&weight, Some(&ends_e.f_to_kind(Kind::Int)?), None::<&Tensor>, None);
    }
    let ends: Vec<i64> = to_vec(ends_e)?;
    let mut parts = Vec::new();
    for (e, end) in ends.iter().enumerate() {
        let start = if e == 0 { 0 } else { ends[e - 1] };
        parts.push(rows.f_narrow(0, start, end - start)?.f_mm(&weight.f_select(0, e as i64)?)?);
    }
    Tensor::f_cat(&parts, 0)
}
