//! The coarse ops, one file each: what it computes, its faces (plain candle reference; fused CPU forward and backward), its gradient check.

pub mod linear;
