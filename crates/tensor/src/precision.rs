//! How matrix products multiply. Parameters, activations, gradients and every sum stay f32 either way.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `f32`: products of f32 numbers. `bf16`: the operands of a product are rounded to bf16, products are summed and returned in f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    #[default]
    F32,
    Bf16,
}
