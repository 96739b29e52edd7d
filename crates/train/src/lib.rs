//! Documents in, metric rows out: configuration, data, the training loop, checkpoints, evaluation.
#![forbid(unsafe_code)]

mod auto_clip;
pub mod bench;
pub mod checkpoint;
pub mod clip;
pub mod data;
pub mod dataset;
pub mod directory;
mod early;
mod ema;
pub mod epoch;
pub mod error;
pub mod estimate;
pub mod evaluate;
pub mod files;
pub mod flops;
mod guard;
pub mod inspect;
pub mod layers;
pub mod learner;
pub mod lock;
pub mod loss;
pub mod metrics;
mod monitor;
mod noise;
pub mod optimizers;
mod origin;
pub mod record;
pub mod reproduce;
pub mod routing;
pub mod run;
mod sam;
pub mod schedule;
pub mod steps;
#[cfg(feature = "torch")]
mod torch;
pub mod trained;
pub mod trainer;
pub mod untrusted;

pub use error::TrainError;
pub use trainer::Trainer;
