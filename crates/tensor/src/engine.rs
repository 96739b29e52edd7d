//! Which face of the ops computes: chosen at run time, a value even where it is not compiled in.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `cpu`: fused forward and hand-written backward on slices. `reference`: plain candle formulas differentiated by candle: the definition, slow.
/// `torch`: libtorch (needs a build with the feature `torch`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    #[default]
    Cpu,
    Reference,
    Torch,
}

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("engine = \"torch\" is not in this build; use engine = \"cpu\" (or \"reference\")")]
    TorchMissing,
}

impl Engine {
    /// An error where this build cannot run the engine.
    pub fn check(self) -> Result<(), EngineError> {
        match self {
            Engine::Cpu | Engine::Reference => Ok(()),
            Engine::Torch => Err(EngineError::TorchMissing),
        }
    }
}
