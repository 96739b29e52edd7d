//! The coarse ops, one file each: what it computes, its faces (plain candle reference; fused CPU forward and backward), its gradient check.

pub mod attention;
pub mod combine;
pub mod cross_entropy;
pub mod embedding;
pub mod experts;
pub mod gather;
mod hidden;
pub mod linear;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
