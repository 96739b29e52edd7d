//! `moe-lab bench`: whole training steps on one fixed random batch at rate 0, so that every step does the same work; tokens per second, peak
//! memory, and the matrix products' share of what this machine can do.

mod case;
mod peak;
mod profile;

pub use case::Case;
pub use peak::product_flops;
pub use profile::Profile;

use crate::epoch::Epoch;
use crate::error::TrainError;
use crate::flops;
use crate::learner::Learner;
use crate::record;
use peak::Roof;
use serde_json::{Map, Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

/// Steps before the clock starts: buffers are made and pages touched in the first.
const WARM: usize = 3;
/// Steps that are timed at least, however long they take.
const LEAST: usize = 3;
/// Steps that a profile records.
const PROFILED: usize = 5;

/// What to time.
#[derive(Clone, Debug)]
pub struct Options {
    pub preset: String,
    /// "cope" or "rope".
    pub position: String,
    pub dense: bool,
    pub no_moh: bool,
    /// Changes to the preset's run, as for training: "model.hidden_size=512".
    pub sets: Vec<String>,
    /// Documents, tokens of each, vocabulary: the preset's where absent.
    pub batch: Option<usize>,
    pub seq: Option<usize>,
    pub vocab: Option<usize>,
    pub seconds: f64,
    /// Leave out what is measured beside the step (share of peak): the machine is not loaded before and after.
    pub no_peak: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            preset: "small".into(),
            position: "cope".into(),
            dense: false,
            no_moh: false,
            sets: Vec::new(),
            batch: None,
            seq: None,
            vocab: None,
            seconds: 5.0,
            no_peak: false,
        }
    }
}

/// Times the steps; with `profile` records some more of them, op by op.
pub fn bench(options: &Options, profile: bool) -> Result<(Map<String, Value>, Option<Profile>), TrainError> {
    if !(options.seconds.is_finite() && options.seconds >= 0.0) {
        return Err(TrainError::Usage(format!("--seconds {}: must be 0 or more", options.seconds)));
    }
    let case = Case::new(options)?;
    let memory = case.memory()?;
    let (batch, settings) = (case.batch(), case.run.train.clone());
    let mut learner = Learner::new(&case.run, case.vocab, &settings)?;
    case.initialise_routers(&mut learner);
    let mut experts = Vec::new();
    let mut step = |learner: &mut Learner| -> Result<f64, TrainError> {
        let mut epoch = Epoch::new(&learner.policies);
        let start = Instant::now();
        let update = learner.update(&batch, &settings, 0.0, &mut epoch, None)?;
        experts = update.experts_per_token.iter().map(|(_, mean)| *mean).collect();
        Ok(start.elapsed().as_secs_f64())
    };
    let began = Instant::now();
    for _ in 0..WARM {
        step(&mut learner)?;
    }
    let warm = began.elapsed().as_secs_f64();
    let mut times = Vec::new();
    let end = Instant::now() + Duration::from_secs_f64(options.seconds.min(1e6));
    while times.len() < LEAST || Instant::now() < end {
        times.push(step(&mut learner)?);
    }
    let peak_memory = record::peak_memory_bytes();
    times.sort_by(f64::total_cmp);
    let seconds = times[times.len() / 2];
    let recorded = if profile {
        tensor::profile::start();
        let began = Instant::now();
        // Inside the pool, so that one thread of it does all steps: the profile is of the spans of one thread.
        let pool = learner.pool.clone();
        pool.install(|| (0..PROFILED).try_for_each(|_| step(&mut learner).map(drop)))?;
        let wall = began.elapsed();
        Some(Profile::new(tensor::profile::stop(), PROFILED, wall))
    } else {
        None
    };
    let experts_per_token = (!experts.is_empty()).then(|| experts.iter().sum::<f64>() / experts.len() as f64);
    let flops = flops::step(&case.run.model, case.vocab, &batch.offsets_b1, experts_per_token.unwrap_or(0.0), None);
    let roof = (!options.no_peak).then(|| learner.pool.install(|| Roof::measure(&case.run)));
    let report = [
        ("preset", json!(options.preset)),
        ("pos", json!(options.position)),
        ("dense", json!(options.dense)),
        ("moh", json!(case.run.model.heads.routed > 0)),
        ("dtype", json!(case.run.dtype)),
        ("threads", json!(learner.pool.current_num_threads())),
        ("params", json!(learner.model.layout.count())),
        ("tokens_per_step", json!(batch.len())),
        ("steps", json!(times.len())),
        ("warm_seconds", json!(warm)),
        ("tokens_per_second", json!(batch.len() as f64 / seconds)),
        ("ms_per_step", json!(1e3 * seconds)),
        ("ms_per_step_best", json!(1e3 * times[0])),
        ("peak_memory_bytes", json!(peak_memory)),
        ("estimated_memory_bytes", json!(memory.peak() as u64)),
        ("experts_per_token", json!(experts_per_token)),
        ("matmul_flops_per_step", json!(flops)),
        ("matmul_gflops", json!(flops / seconds / 1e9)),
        ("peak_gflops", json!(roof.map(|roof| roof.flops / 1e9))),
        ("share_of_peak", json!(roof.map(|roof| flops / seconds / roof.flops))),
        ("copy_gbytes_per_second", json!(roof.map(|roof| roof.bytes / 1e9))),
        ("core_round_trip_ns", json!(roof.and_then(|roof| roof.round_trip).map(|seconds| 1e9 * seconds))),
    ];
    let report = report.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Ok((report, recorded.map(|profile| profile.against(roof))))
}

/// Writes the spans of `profile` as a Chrome trace (chrome://tracing, Perfetto).
pub fn write_trace(profile: &Profile, path: &Path) -> Result<(), TrainError> {
    std::fs::write(path, profile.trace())
        .map_err(|error| TrainError::Io(std::io::Error::new(error.kind(), format!("{}: {error}", path.display()))))
}
