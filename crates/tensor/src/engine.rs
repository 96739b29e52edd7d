//! Which face of the ops computes: chosen at run time, a value even where it is not compiled in.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `cpu`: fused forward and hand-written backward on slices. `reference`: plain candle formulas differentiated by candle: the definition, slow.
/// `torch`: libtorch on CPU or CUDA (needs a build with the feature `torch`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    #[default]
    Cpu,
    Reference,
    Torch,
}

/// Why an engine or its device cannot be had here. `key` is the configuration key at fault, `message` says what it must be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {message}")]
pub struct EngineError {
    pub key: &'static str,
    pub message: String,
}

impl Engine {
    /// An error where this build on this machine cannot run the engine on `device`: "cpu", or "cuda" and "cuda:N" for `torch`.
    pub fn check(self, device: &str) -> Result<(), EngineError> {
        match self {
            Engine::Cpu | Engine::Reference if device == "cpu" => Ok(()),
            Engine::Cpu | Engine::Reference => Err(EngineError {
                key: "device",
                message: "must be \"cpu\"; other devices need engine = \"torch\"".into(),
            }),
            #[cfg(feature = "torch")]
            Engine::Torch => crate::torch::device(device).map(drop),
            #[cfg(not(feature = "torch"))]
            Engine::Torch => Err(EngineError {
                key: "engine",
                message: "\"torch\" is not in this build; use engine = \"cpu\", or build with: make build-torch".into(),
            }),
        }
    }
}
