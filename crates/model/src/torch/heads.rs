//! The mixture of heads under libtorch (formulas: `moe_router::heads`). Every head is computed and the gates of those not chosen are zero: a batched
//! product over heads cannot leave single (token, head) pairs out without gathering rows, which costs more than it saves at 4 of 6 heads.

use crate::transformer::Heads;
use tensor::torch::{Graph, Kind, Result, Tensor};

pub(super) struct Gates {
    /// [n, h], shared heads first.
    pub gates_nh: Tensor,
    /// The balance loss of the routed heads.
    pub balance: Tensor,
}

pub(super) fn gates(graph: &mut Graph<'_>, heads: &Heads, x: &Tensor) -> Result<Gates> {
    let kind = graph.flat().kind;
    let scores_nr = graph.exact_linear(x, heads.routed)?;
    let chosen = best(&scores_nr.f_detach()?, heads.active as i64)?;
    let kept = scores_nr.f_masked_fill(&chosen.f_logical_not()?, f64::NEG_INFINITY)?.f_softmax(-1, kind)?;
    let mut routed = kept.f_mul_scalar(heads.active as f64)?;
    if let (Some(shared), Some(split)) = (heads.shared, heads.split) {
        let alpha = graph.exact_linear(x, split)?.f_softmax(-1, kind)?.f_mul_scalar(2.0)?;
        let part = |i: i64| alpha.f_narrow(-1, i, 1);
        let gates = graph.exact_linear(x, shared)?.f_softmax(-1, kind)?.f_mul_scalar(shared.rows as f64)?;
        routed = Tensor::f_cat(&[gates.f_mul(&part(0)?)?, routed.f_mul(&part(1)?)?], -1)?;
    }
    Ok(Gates { gates_nh: routed, balance: balance(&scores_nr.f_softmax(-1, kind)?, &chosen)? })
}

/// The `k` largest of each row as a mask, the lower index first among equals.
pub(super) fn best(scores: &Tensor, k: i64) -> Result<Tensor> {
    let order = scores.f_argsort_stable(true, -1, true)?.f_narrow(-1, 0, k)?;
    scores.f_zeros_like()?.f_to_kind(Kind::Bool)?.f_scatter_value(-1, &order, 1i64)
}

/// N Σ f_i Q_i, f = share of the rows that chose i (constant), Q = mean probability.
pub(super) fn balance(p: &Tensor, chosen: &Tensor) -> Result<Tensor> {
    let kind = p.f_kind()?;
    let f = chosen.f_to_kind(kind)?.f_mean_dim(0i64, false, kind)?;
    f.f_mul(&p.f_mean_dim(0i64, false, kind)?)?.f_sum(kind)?.f_mul_scalar(p.size()[1])
}

/// o [n, h·w] times gates [n, h], head by head.
pub(super) fn scale(o: &Tensor, gates_nh: &Tensor) -> Result<Tensor> {
    let (size, shape) = (o.size(), gates_nh.size());
    let gates = gates_nh.f_to_kind(o.f_kind()?)?.f_unsqueeze(2)?;
    o.f_reshape([shape[0], shape[1], -1])?.f_mul(&gates)?.f_reshape(&size)
}
