//! The inner loops: matrix products, SIMD helpers, use of the thread pool. All `unsafe` of the crate lives here.

pub mod bf16;
pub mod crew;
pub mod gemm;
pub mod isa;
pub mod lanes;
pub mod memory;
pub mod parallel;
pub mod peak;
pub mod silu;
pub mod simd;
#[cfg(target_arch = "x86_64")]
mod turn;
