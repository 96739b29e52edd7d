//! The bound of adaptive clipping: a percentile of the last gradient norms (AutoClip, Seetharaman 2020, arXiv 2007.14469), so that nobody need know
//! beforehand how long a usual gradient is. Norms are taken as they were before clipping: clipped ones would pull the bound down to zero.

use crate::run::Train;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Norms that a window may hold at most: they are sorted at every update.
pub const LONGEST: usize = 100_000;

/// Norms of the whole gradient in the last updates; part of every checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AutoClip {
    norms: VecDeque<f64>,
}

/// Norms from which on a percentile can be told: as many as leave one beyond it on either side.
pub fn least(percentile: f64) -> usize {
    (100.0 / percentile.min(100.0 - percentile) - 1e-6).ceil() as usize
}

impl AutoClip {
    /// The percentile of the norms, between two of them on a straight line; none before there are enough.
    pub fn bound(&self, percentile: f64) -> Option<f64> {
        if self.norms.len() < least(percentile) {
            return None;
        }
        let mut sorted: Vec<f64> = self.norms.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let rank = percentile / 100.0 * (sorted.len() - 1) as f64;
        let (below, above) = (sorted[rank.floor() as usize], sorted[rank.ceil() as usize]);
        Some(below + (above - below) * rank.fract())
    }

    /// The bound of a phase with these settings, where they ask for one.
    pub fn bound_of(&self, settings: &Train) -> Option<f64> {
        (settings.clip_percentile > 0.0).then(|| self.bound(settings.clip_percentile)).flatten()
    }

    /// Remembers the norm of an update that was made, before clipping, among the last `window`. A gradient of zero tells nothing.
    pub fn push(&mut self, norm: f64, window: usize) {
        if norm.is_finite() && norm > 0.0 {
            self.norms.push_back(norm);
        }
        while self.norms.len() > window {
            self.norms.pop_front();
        }
    }

    /// Whether this, read from a file, can be gone on with.
    pub fn fits(&self) -> bool {
        self.norms.len() <= LONGEST && self.norms.iter().all(|norm| norm.is_finite() && *norm > 0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::random::{Purpose, Random};

    /// Norms around 2, log-normal.
    fn noise(count: usize) -> Vec<f64> {
        let random = Random::new(3, Purpose::Test);
        (0..count).map(|i| 2.0 * (0.4 * random.normal(0, i as u64)).exp()).collect()
    }

    #[test]
    fn as_many_updates_are_clipped_as_the_percentile_says() {
        for (percentile, window) in [(95.0, 200), (90.0, 200), (50.0, 20), (10.0, 200)] {
            let (mut history, mut clipped, mut judged) = (AutoClip::default(), 0, 0);
            for norm in noise(20_000) {
                if let Some(bound) = history.bound(percentile) {
                    judged += 1;
                    clipped += u32::from(norm > bound);
                }
                history.push(norm, window);
            }
            let share = f64::from(clipped) / f64::from(judged);
            // A sample's percentile leaves 1 / (window + 1) more beyond it than the distribution's, at most.
            assert!((share - (1.0 - percentile / 100.0)).abs() < 0.01 + 1.0 / window as f64, "{percentile}: {share}");
            assert_eq!(judged as usize, 20_000 - least(percentile));
        }
    }

    #[test]
    fn a_spike_is_scaled_to_the_percentile_and_hardly_moves_it() {
        let mut history = AutoClip::default();
        noise(300).into_iter().for_each(|norm| history.push(norm, 200));
        let bound = history.bound(95.0).unwrap();
        let spike = 100.0 * 2.0;
        assert!(bound > 2.0 && bound < 8.0 && bound / spike < 0.04, "{bound}");
        history.push(spike, 200);
        // The norm itself is remembered, as it was; one of 200 shifts the percentile by half a rank or so.
        assert!(history.norms.contains(&spike));
        assert!((history.bound(95.0).unwrap() / bound - 1.0).abs() < 0.05);
    }

    #[test]
    fn constant_norms_are_left_as_they_are_and_the_state_survives_writing() {
        let mut history = AutoClip::default();
        for i in 0..50 {
            assert_eq!(history.bound(95.0), (i >= 20).then_some(0.1));
            history.push(0.1, 200);
        }
        for norm in [0.0, f64::NAN, f64::INFINITY] {
            history.push(norm, 200);
        }
        noise(300).into_iter().for_each(|norm| history.push(norm, 7));
        assert_eq!(history.norms.len(), 7);
        let text = serde_json::to_string(&history).unwrap();
        let read: AutoClip = serde_json::from_str(&text).unwrap();
        assert!(read == history && read.fits() && read.bound(50.0) == history.bound(50.0));
        assert_eq!((least(95.0), least(50.0), least(10.0), least(99.0)), (20, 2, 10, 100));
    }
}
