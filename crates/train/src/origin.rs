//! Where numbers stopped being finite: looked for after a fault only, by walking the batch forward once more.

use crate::clip::first_non_finite;
use crate::data::Batch;
use crate::learner::Learner;
use model::transformer::{Context, Documents};
use moe_router::Mode;
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use tensor::{Arena, Tape, Value};

/// The parameter, or the flat layer whose input is the first that is not finite when `batch` is walked forward; none if all of it is finite.
pub fn origin(learner: &Learner, batch: &Batch) -> Option<String> {
    if let Some(found) = first_non_finite(&learner.layers, &learner.params) {
        return Some(format!("parameter {} (flat layer {}) is not finite", found.parameter, found.layer));
    }
    let weights = learner.weights();
    let arena = Arena::default();
    let first = learner.pool.install(|| {
        let first = Cell::new(None);
        let mut tape = Tape::new(weights.engine, weights.params, &arena).with_precision(weights.precision);
        let documents = Documents::new(batch.tokens_n.clone(), batch.offsets_b1.clone());
        let watch = Rc::new(|_: &mut Tape<'_, f32>, layer: usize, value: &Value<f32>, _: &Arc<[usize]>| {
            if first.get().is_none() && value.data().iter().any(|x| !x.is_finite()) {
                first.set(Some(layer));
            }
        });
        let (transformer, policies) = (weights.transformer, weights.policies);
        transformer.forward(&mut tape, &documents, policies, Mode::Train, Context::Documents, watch);
        first.get()
    });
    first.map(|layer| format!("the input of flat layer {layer} is the first that is not finite"))
}
