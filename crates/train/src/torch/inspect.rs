//! The loss with every gradient under libtorch, for an oracle.

use super::{Coefficients, Targets};
use crate::inspect::{LossAndGradients, named};
use crate::loss::{self, Auxiliary};
use crate::run::Run;
use model::transformer::{Documents, Transformer};
use tensor::torch::{Device, Flat, Kind, Result, to_vec};

/// As `inspect::loss_and_gradients`, on a device: `dtype` is "f32", "f64" or "bf16".
pub fn loss_and_gradients(
    run: &Run,
    model: &Transformer,
    params: &[f64],
    documents: &Documents,
    (ids_n, weights_n): (&[u32], &[f64]),
    dtype: &str,
    device: Device,
) -> Result<LossAndGradients> {
    let narrow: Vec<f32> = params.iter().map(|x| *x as f32).collect();
    let flat = match dtype {
        "f64" => Flat::new(params, device, false)?,
        _ => Flat::new(&narrow, device, dtype == "bf16")?,
    };
    let policies = model.policies();
    let total: f64 = weights_n.iter().sum();
    let shares_n: Vec<f64> = weights_n.iter().map(|w| w / total).collect();
    let (c, sparse, layers) = (&run.losses, policies.len().max(1) as f64, model.config.num_layers as f64);
    let coefficients = Coefficients {
        balance: c.balance / sparse,
        entropy: c.entropy / sparse,
        z: c.z / sparse,
        heads: c.heads / layers,
    };
    let targets = Targets { ids_n, shares_n: &shares_n };
    let found = model::torch::pass(model, &flat, &policies, documents, &targets, &coefficients)?;
    let output = Flat::matrix(flat.products(), &model.output)?.f_transpose(0, 1)?;
    let logits = found.hidden_nd.f_to_kind(flat.product())?.f_matmul(&output)?;
    let cross_entropy: f64 = found.losses_n.iter().zip(&shares_n).map(|(loss, share)| loss * share).sum();
    let weighted: f64 = found.auxiliary.iter().map(|(name, _, value)| value * coefficients.of(name)).sum();
    let auxiliary = found.auxiliary.into_iter().map(|(name, layer, value)| Auxiliary { name, layer, value });
    let chosen = |layer: &model::torch::RoutedLayer| (0..ids_n.len()).map(|t| layer.routing.row(t).to_vec()).collect();
    Ok(LossAndGradients {
        weights: named(model, &to_vec::<f64>(&flat.values.f_to_kind(Kind::Double)?)?),
        gradients: named(model, &to_vec::<f64>(&flat.grads.f_to_kind(Kind::Double)?)?),
        logits_nv: to_vec(&logits.f_to_kind(Kind::Double)?)?,
        cross_entropy,
        total: cross_entropy + weighted,
        losses: loss::means(&auxiliary.collect::<Vec<_>>()),
        experts: found.layers.iter().map(chosen).collect(),
    })
}
