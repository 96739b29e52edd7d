//! How matrix products multiply. Parameters, gradients, every sum and what flows between ops stay f32 either way.

use crate::Real;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::any::TypeId;

/// `f32`: products of f32 numbers. `bf16`: the operands of a product are rounded to bf16, products are summed and returned in f32; what SwiGLU keeps for
/// the way back is rounded too. Routers take f32 either way, attention where the machine has no instruction for pairs of bf16.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    #[default]
    F32,
    Bf16,
}

impl Precision {
    /// Whether products of T round their operands.
    pub(crate) fn rounds<T: Real>(self) -> bool {
        self == Precision::Bf16 && TypeId::of::<T>() == TypeId::of::<f32>()
    }
}
