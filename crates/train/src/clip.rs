//! Clipping of the gradient by its global norm, and the search for the place where a gradient stopped being finite.

use crate::layers::{FlatLayers, sum_squares};
use tensor::kernels::parallel;

/// What [`clip`] found and did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clipped {
    /// Global norm before clipping.
    pub norm: f64,
    /// What every gradient was multiplied by; 1 means that nothing was touched.
    pub factor: f64,
}

/// A gradient that holds NaN or infinity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the gradient of {parameter} (flat layer {layer}) is not finite, {affected} parameter(s) in all; the step was not applied"
)]
pub struct NonFinite {
    /// The parameter nearest to the output: the walk back meets it first, everything below inherits the fault.
    pub parameter: String,
    pub layer: usize,
    /// How many parameters hold a number that is not finite.
    pub affected: usize,
}

/// Multiplies the gradient by min(1, `max_norm` / ‖g‖), where `norms` are those of its flat layers ([`FlatLayers::param_norms`]).
/// `max_norm` = infinity never clips. A gradient that is not finite is left as it is and named: the step must not be taken.
pub fn clip(layers: &FlatLayers, grads: &mut [f32], norms: &[f64], max_norm: f64) -> Result<Clipped, NonFinite> {
    let squares: f64 = norms.iter().map(|norm| norm * norm).sum();
    if !squares.is_finite() {
        return Err(first_non_finite(layers, grads).expect("a sum of f32 squares in f64 is finite if all of them are"));
    }
    let norm = squares.sqrt();
    let factor = (max_norm / norm).min(1.0); // min ignores the NaN of 0 / 0
    if factor < 1.0 {
        parallel::each(true, grads.chunks_mut(1 << 14).collect(), |chunk: &mut [f32]| {
            chunk.iter_mut().for_each(|g| *g = (f64::from(*g) * factor) as f32);
        });
    }
    Ok(Clipped { norm, factor })
}

/// Where a buffer of the layout stops being finite, seen from the output; none if every number is finite.
pub fn first_non_finite(layers: &FlatLayers, buffer: &[f32]) -> Option<NonFinite> {
    let bad: Vec<(&str, usize)> = layers
        .parameters()
        .filter(|(_, param, _)| (0..param.count).any(|i| !sum_squares(&buffer[param.range(i)]).is_finite()))
        .map(|(name, _, layer)| (name, layer))
        .collect();
    let &(parameter, layer) = bad.iter().rev().max_by_key(|(_, layer)| *layer)?; // the last maximum: first in name order
    Some(NonFinite { parameter: parameter.to_owned(), layer, affected: bad.len() })
}

#[cfg(test)]
mod tests {
    use super::{Clipped, FlatLayers, NonFinite, first_non_finite};
    use proptest::prelude::*;
    use tensor::Layout;

    fn layers() -> FlatLayers {
        let layout = Layout::new([
            ("lm_head.weight".to_owned(), vec![3, 2], true),
            ("model.embed_tokens.weight".to_owned(), vec![3, 2], true),
            ("model.layers.0.mlp.experts.down_proj".to_owned(), vec![2, 3, 5], true),
            ("model.layers.0.mlp.gate.weight".to_owned(), vec![2, 3], true),
            ("model.norm.weight".to_owned(), vec![7], true),
        ]);
        FlatLayers::new(&layout, 1).unwrap()
    }

    /// A gradient with `value(i)` at the i-th number and zero padding.
    fn gradient(layers: &FlatLayers, value: impl Fn(usize) -> f32) -> Vec<f32> {
        let mut grads = vec![0.0; layers.layout().len()];
        for (_, param) in layers.layout().iter() {
            (0..param.count).flat_map(|i| param.range(i)).for_each(|i| grads[i] = value(i));
        }
        grads
    }

    fn clip(layers: &FlatLayers, grads: &mut [f32], max_norm: f64) -> Result<Clipped, NonFinite> {
        let norms = layers.param_norms(grads);
        super::clip(layers, grads, &norms, max_norm)
    }

    #[test]
    fn below_the_limit_nothing_is_touched() {
        let layers = layers();
        let mut grads = gradient(&layers, |i| i as f32 * 1e-3);
        let before = grads.clone();
        let clipped = clip(&layers, &mut grads, 100.0).unwrap();
        let plain = before.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        assert_eq!((clipped.factor, &grads), (1.0, &before));
        assert!((clipped.norm / plain - 1.0).abs() < 1e-14);
        assert_eq!(clip(&layers, &mut grads, f64::INFINITY).unwrap().factor, 1.0);
        grads.fill(0.0);
        assert_eq!(clip(&layers, &mut grads, 1.0).unwrap(), Clipped { norm: 0.0, factor: 1.0 });
    }

    #[test]
    fn the_place_where_non_finite_numbers_begin_is_named_and_nothing_is_changed() {
        let layers = layers();
        let experts = layers.layout().get("model.layers.0.mlp.experts.down_proj").unwrap();
        let embedding = layers.layout().get("model.embed_tokens.weight").unwrap();
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut grads = gradient(&layers, |_| 1e4);
            grads[experts.range(1).end - 1] = value;
            grads[embedding.offset] = value;
            let before: Vec<u32> = grads.iter().map(|g| g.to_bits()).collect();
            let found = clip(&layers, &mut grads, 1.0).unwrap_err();
            assert_eq!(found.parameter, "model.layers.0.mlp.experts.down_proj");
            assert_eq!((found.layer, found.affected), (3, 2));
            assert!(found.to_string().contains("model.layers.0.mlp.experts.down_proj"));
            assert_eq!(before, grads.iter().map(|g| g.to_bits()).collect::<Vec<_>>());
        }
        assert_eq!(first_non_finite(&layers, &gradient(&layers, |_| f32::MAX)), None);
    }

    proptest! {
        #[test]
        fn clipping_is_exact_at_every_magnitude(exponent in -30i32..30, limit in 1e-3f64..1e3) {
            let layers = layers();
            let mut grads = gradient(&layers, |i| (i as f32 + 0.7).sin() * 10f32.powi(exponent));
            let before = grads.clone();
            let clipped = clip(&layers, &mut grads, limit).unwrap();
            prop_assert!(clipped.norm.is_finite());
            for (&after, &before) in grads.iter().zip(&before) {
                prop_assert_eq!(after, (f64::from(before) * clipped.factor) as f32);
            }
            let norm = layers.param_norms(&grads).iter().map(|n| n * n).sum::<f64>().sqrt();
            prop_assert!(norm <= limit * (1.0 + 1e-6));
        }
    }
}
