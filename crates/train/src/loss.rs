//! The loss of a forward pass: cross-entropy plus the auxiliary losses of routers and head mixtures, each reported by name and layer.

use crate::run::Losses;
use model::transformer::{Output, Transformer};
use moe_router::node;
use tensor::ops::combine::weighted_sum;
use tensor::ops::cross_entropy::{Targets, smoothed};
use tensor::{Real, Tape, Value};

/// An auxiliary loss of one layer, unscaled.
#[derive(Clone, Debug, PartialEq)]
pub struct Auxiliary {
    pub name: &'static str,
    pub layer: usize,
    pub value: f64,
}

pub struct Loss<T: Real> {
    /// What is differentiated: share · cross-entropy (with label smoothing) + share_tokens · Σ coefficient · mean over layers.
    pub total: Value<T>,
    /// Mean cross-entropy of this pass in nats, weighted by the loss weights; plain whatever the label smoothing.
    pub cross_entropy: f64,
    /// Cross-entropy of every row, nats.
    pub losses_n: Vec<f64>,
    pub auxiliary: Vec<Auxiliary>,
}

/// Parts of a batch that this pass stands for (both 1 without accumulation): of the loss weights, and of the tokens.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    pub weights: f64,
    pub tokens: f64,
}

impl Share {
    pub const WHOLE: Share = Share { weights: 1.0, tokens: 1.0 };
}

/// Total = CE + Σ coefficient · (mean over the layers that have the term). Terms with coefficient 0 are measured and not differentiated.
pub fn loss<'a, T: Real>(
    tape: &mut Tape<'a, T>,
    model: &Transformer,
    output: &Output<T>,
    targets: &Targets,
    coefficients: &Losses,
    share: Share,
) -> Loss<T> {
    let smoothing = coefficients.label_smoothing;
    let (entropy, losses_n) = smoothed(tape, &output.hidden_nd, model.output, targets, smoothing);
    let mut terms: Vec<(Value<T>, f64)> = vec![(entropy.clone(), share.weights)];
    let mut auxiliary = Vec::new();
    let mut term = |name, layer, value: Value<T>, coefficient: f64, layers: usize| {
        auxiliary.push(Auxiliary { name, layer, value: value.scalar().to_f64() });
        terms.push((value, coefficient * share.tokens / layers as f64));
    };
    for trace in &output.experts {
        let layers = output.experts.len();
        term(
            "balance",
            trace.layer,
            node::balance_loss(tape, &trace.scores_ne, &trace.routing),
            coefficients.balance,
            layers,
        );
        term("entropy", trace.layer, node::entropy_loss(tape, &trace.scores_ne), coefficients.entropy, layers);
        if let Some(gates) = &trace.gates {
            term("budget", trace.layer, gates.clone(), coefficients.budget, layers);
        }
        term("z", trace.layer, node::z_loss(tape, &trace.scores_ne), coefficients.z, layers);
    }
    for trace in &output.heads {
        let value = node::head_balance_loss(tape, &trace.routed_nh, &trace.selection);
        term("heads", trace.layer, value, coefficients.heads, output.heads.len());
    }
    for trace in &output.depths {
        let value = node::depth_loss(tape, &trace.scores_n1, &trace.target);
        term("depths", trace.layer, value, coefficients.depths, output.depths.len());
    }
    let cross_entropy = match smoothing > 0.0 {
        true => weighted_mean(&losses_n, &targets.weights_n),
        false => entropy.scalar().to_f64(),
    };
    let terms: Vec<(&Value<T>, f64)> = terms.iter().map(|(value, c)| (value, *c)).collect();
    Loss { total: weighted_sum(tape, &terms), cross_entropy, losses_n, auxiliary }
}

/// Σ w·l / Σ w; 0 where nothing has weight. A row of weight 0 has no target and no say, whatever its loss.
fn weighted_mean(losses_n: &[f64], weights_n: &[f64]) -> f64 {
    let total: f64 = weights_n.iter().sum();
    let weighted = losses_n.iter().zip(weights_n).filter(|(_, w)| **w > 0.0).map(|(l, w)| l * w / total);
    weighted.sum()
}

/// Mean over layers of each auxiliary loss that exists, in the order balance, entropy, budget, z, heads, depths.
pub fn means(auxiliary: &[Auxiliary]) -> Vec<(&'static str, f64)> {
    ["balance", "entropy", "budget", "z", "heads", "depths"]
        .into_iter()
        .filter_map(|name| {
            let values: Vec<f64> = auxiliary.iter().filter(|a| a.name == name).map(|a| a.value).collect();
            (!values.is_empty()).then(|| (name, values.iter().sum::<f64>() / values.len() as f64))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::learner::small;
    use model::transformer::{Context, Documents, unwatched};
    use moe_router::Mode;
    use tensor::{Arena, Engine};

    /// Mean cross-entropy per token of `texts` as one batch, and its gradient.
    fn gradient(model: &Transformer, params: &[f64], texts: &[&[u32]]) -> (f64, Vec<f64>) {
        let (mut inputs, mut ids, mut offsets) = (Vec::new(), Vec::new(), vec![0]);
        for text in texts {
            inputs.extend_from_slice(&text[..text.len() - 1]);
            ids.extend_from_slice(&text[1..]);
            offsets.push(inputs.len());
        }
        let (arena, policies) = (Arena::default(), model.policies());
        let mut tape = Tape::new(Engine::Cpu, params, &arena);
        let documents = Documents::new(inputs, offsets);
        let context = Context::Documents;
        let output = model.forward(&mut tape, &documents, &policies, Mode::Train, context, unwatched());
        let targets = Targets { weights_n: vec![1.0; ids.len()].into(), ids_n: ids.into() };
        let none =
            Losses { balance: 0.0, entropy: 0.0, budget: 0.0, z: 0.0, heads: 0.0, depths: 0.0, label_smoothing: 0.0 };
        let found = loss(&mut tape, model, &output, &targets, &none, Share::WHOLE);
        drop(output);
        let mut flat = vec![0.0; params.len()];
        tape.backward(&found.total, &mut flat);
        (found.cross_entropy, flat)
    }

    /// Windows of several lengths in one batch: nothing leaks over an offset, and a token counts the same wherever it stands.
    #[test]
    fn the_gradient_of_mixed_lengths_is_the_token_weighted_sum_of_those_of_each() {
        let config = r#"{"hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
            "position": {"kind": "cope", "max": 5}, "heads": {"shared": 1, "routed": 3, "active": 2},
            "router": {"kind": "top_p", "p": 0.4, "num_experts": 4, "expert_hidden_size": 6}}"#;
        let model = Transformer::new(&serde_json::from_str(config).unwrap(), 11);
        let params: Vec<f64> = model.initialise(3).into_iter().map(f64::from).collect();
        let text: Vec<u32> = (0..60u32).map(|i| i * i % 11).collect();
        let (short, middle, long) = ([&text[..4], &text[5..9]], [&text[9..18]], [&text[20..37], &text[40..57]]);
        let whole = gradient(&model, &params, &[&short[..], &middle, &long].concat());
        let (mut mean, mut sum, tokens) = (0.0, vec![0.0; params.len()], [6.0, 8.0, 32.0]);
        for (texts, tokens) in [&short[..], &middle, &long].into_iter().zip(tokens) {
            let (loss, part) = gradient(&model, &params, texts);
            mean += loss * tokens / 46.0;
            sum.iter_mut().zip(&part).for_each(|(sum, g)| *sum += g * tokens / 46.0);
        }
        assert!((whole.0 - mean).abs() < 1e-12, "{} {mean}", whole.0);
        let norm = whole.1.iter().map(|g| g * g).sum::<f64>().sqrt();
        let apart = whole.1.iter().zip(&sum).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
        assert!(norm > 0.01 && apart < 1e-12 * norm, "{apart} of {norm}");
    }

    #[test]
    fn label_smoothing_changes_what_is_minimised_and_not_what_is_reported() {
        let (mut plain, settings, batch) = small::learner(&[]);
        let (mut smooth, _, _) = small::learner(&["losses.label_smoothing=0.2"]);
        let (told, softened) =
            (small::look(&mut plain, &settings, &batch), small::look(&mut smooth, &settings, &batch));
        assert!((told.cross_entropy - softened.cross_entropy).abs() < 1e-6);
        assert_eq!(told.document_losses, softened.document_losses);
        assert_eq!(told.total, told.cross_entropy, "no auxiliary loss here");
        assert!((softened.total - told.total).abs() > 1e-3 && plain.grads != smooth.grads);
    }
}
