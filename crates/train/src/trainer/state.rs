//! state.json on its way in. It may come from anybody: what is used as an index, a length or a count must be in range.

use super::fault::SKIPS;
use super::{State, epoch_batches, phase_steps, total_steps};
use crate::dataset::Dataset;
use crate::epoch::Epoch;
use crate::run::Run;
use moe_router::Policy;
use serde_json::Value;

/// Larger counts are no run's: sums of them could leave 64 bits.
const MAX_COUNT: u64 = 1 << 48;

/// The state of a checkpoint whose control states were put into `policies`, fresh ones of the run.
pub(super) fn read(json: Value, run: &Run, dataset: &Dataset, policies: &mut [Policy]) -> Result<State, String> {
    let mut state: State = serde_json::from_value(json).map_err(|error| error.to_string())?;
    check(&state, run, dataset, policies)?;
    for (layer, (policy, control)) in policies.iter_mut().zip(state.controls.drain(..)).enumerate() {
        policy.restore(control, layer).map_err(|error| error.to_string())?;
    }
    Ok(state)
}

/// As a resume reads state.json; returns what the epoch had added up.
pub fn checked_state(json: Value, run: &Run, dataset: &Dataset, policies: &mut [Policy]) -> Result<Epoch, String> {
    read(json, run, dataset, policies).map(|state| state.epoch)
}

fn check(state: &State, run: &Run, dataset: &Dataset, policies: &[Policy]) -> Result<(), String> {
    let layers = 4 * run.model.num_layers + 3;
    let (at, memory, phases) = (&state.position, &state.memory, dataset.phases.len());
    let inside = |phase: usize| {
        let (batches, steps) = (epoch_batches(run, dataset, phase), phase_steps(run, dataset, phase));
        at.batch < batches && at.phase_step < steps && at.epoch <= steps / batches.max(1)
    };
    let ended = || (at.epoch, at.batch, at.phase_step) == (0, 0, 0);
    let total = total_steps(run, dataset);
    let placed = if at.phase < phases { inside(at.phase) } else { at.phase == phases && ended() };
    let counted = at.tokens <= MAX_COUNT && memory.averaged <= MAX_COUNT && at.flops.is_finite() && at.flops >= 0.0;
    if !placed || at.step > total || !counted {
        return Err("its position is outside the run".into());
    }
    let watched = memory.auto_clip.fits() && memory.noise.fits() && memory.monitor.fits(layers, 2 * MAX_COUNT);
    if !memory.guard.fits() || !watched || memory.early.waited() > MAX_COUNT || memory.skipped_in_a_row > SKIPS {
        return Err("its memory of losses and faults is none that a run can have".into());
    }
    match state.controls.len() == policies.len() && state.epoch.fits(policies) {
        true => Ok(()),
        false => Err("its routing statistics are of another model".into()),
    }
}
