#![forbid(unsafe_code)]
pub mod clip;
pub mod data;
pub mod layers;
pub mod optimizers;
pub mod schedule;
