#![forbid(unsafe_code)]
pub mod clip;
pub mod data;
mod files;
pub mod layers;
pub mod lock;
pub mod metrics;
pub mod optimizers;
pub mod record;
pub mod schedule;
