//! Cross-entropy fused with the output projection, in chunks of rows: no [n, v] array is kept, a chunk's logits become gradients at once.

use super::Targets;
use tensor::Param;
use tensor::torch::{Device, Flat, Kind, Result, Tensor, integers};

/// Logits in a chunk.
fn chunk(device: Device) -> i64 {
    if device == Device::Cpu { 1 << 20 } else { 1 << 26 }
}

/// The loss of every row [n], and the gradient of Σ share · loss for `hidden_nd`; that for the weight is added to the flat gradient.
pub(super) fn cross_entropy(
    flat: &Flat,
    hidden_nd: &Tensor,
    output: Param,
    targets: &Targets<'_>,
) -> Result<(Tensor, Tensor)> {
    let n = hidden_nd.size()[0];
    let ids_n1 = integers(targets.ids_n.iter().map(|&id| id.into()), flat.device)?.f_unsqueeze(1)?;
    let shares_n1 =
        Tensor::f_from_slice(targets.shares_n)?.f_to_kind(flat.kind)?.f_to_device(flat.device)?.f_unsqueeze(1)?;
    let w_vd = Flat::matrix(flat.products(), &output)?;
    let mut dw_vd = Flat::matrix(&flat.grads, &output)?;
    let (mut losses, mut gradients) = (Vec::new(), Vec::new());
    let rows = (chunk(flat.device) / output.rows as i64).clamp(64, n.max(64));
    for start in (0..n).step_by(rows as usize) {
        let part = |x: &Tensor| x.f_narrow(0, start, rows.min(n - start));
        let (x, ids, shares) = (part(hidden_nd)?.f_to_kind(flat.product())?, part(&ids_n1)?, part(&shares_n1)?);
        let mut logits = x.f_mm(&w_vd.f_transpose(0, 1)?)?.f_to_kind(flat.kind)?;
        let lse = logits.f_logsumexp(-1i64, true)?;
        losses.push(lse.f_sub(&logits.f_gather(1, &ids, false)?)?);
        // share · (softmax - one at the target), in place.
        let _ = logits.f_sub_(&lse)?.f_exp_()?.f_mul_(&shares)?;
        let _ = logits.f_scatter_add_(1, &ids, &shares.f_neg()?)?;
        let dlogits = logits.f_to_kind(flat.product())?;
        gradients.push(dlogits.f_mm(&w_vd)?.f_to_kind(flat.kind)?);
        if flat.product() == Kind::BFloat16 {
            let _ = dw_vd.f_add_(&dlogits.f_transpose(0, 1)?.f_mm(&x)?)?;
        } else {
            let _ = dw_vd.f_addmm_(&dlogits.f_transpose(0, 1)?, &x)?;
        }
    }
    Ok((Tensor::f_cat(&losses, 0)?.f_squeeze_dim(1)?, Tensor::f_cat(&gradients, 0)?))
}
