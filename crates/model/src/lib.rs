//! The transformer on one page, its configuration, and generation.
#![forbid(unsafe_code)]

mod block;
pub mod config;
pub mod generate;
mod input;
#[cfg(feature = "torch")]
pub mod torch;
pub mod transformer;

pub use config::Model;
pub use transformer::{Context, Documents, Output, Transformer};
