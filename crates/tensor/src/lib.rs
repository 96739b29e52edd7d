//! Arrays on candle-core, the gradient tape, the coarse ops of the model and their kernels. Knows nothing of language models.
//!
//! Shape legend used in names: n tokens, d width, h heads, k key/value heads, e experts, a assignments (token-expert pairs), v vocabulary.

#![deny(unsafe_code)] // allowed in kernels alone

pub mod arena;
pub mod check;
pub mod engine;
mod kept;
pub mod kernels;
pub mod ops;
pub mod params;
pub mod precision;
pub mod profile;
pub mod random;
pub mod real;
pub mod tape;
#[cfg(feature = "torch")]
pub mod torch;

pub use arena::{Arena, Buffer};
pub use engine::{Engine, EngineError};
pub use kernels::isa;
pub use params::{Layout, Param};
pub use precision::Precision;
pub use random::Random;
pub use real::Real;
pub use tape::{Gradients, Tape, Value};
