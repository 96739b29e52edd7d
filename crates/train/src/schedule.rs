//! The learning-rate schedule: a pure function of the 0-based position, so that a resumed run goes on exactly where it stopped.

use std::f64::consts::PI;

/// What follows the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Half a cosine from 1 down to `min_ratio`, which then holds.
    Cosine,
    Constant,
}

/// Linear warm-up (t + 1) / W, then `shape` up to `total`. Positions are optimizer steps in the text phase and epochs in
/// the facts and chat phases, where all steps of an epoch share a rate; both use the same formula.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    pub shape: Shape,
    /// Positions of the warm-up; 0 starts at the full rate.
    pub warmup: u64,
    /// Positions of the phase.
    pub total: u64,
    /// Floor of the cosine as a share of the peak.
    pub min_ratio: f64,
}

impl Schedule {
    /// Share of the peak rate at position `t`. A warm-up as long as the run or longer keeps its slope, so such a run ends before the peak.
    pub fn factor(&self, t: u64) -> f64 {
        if t < self.warmup {
            return (t + 1) as f64 / self.warmup as f64;
        }
        if self.shape == Shape::Constant || self.total <= self.warmup {
            return 1.0;
        }
        let done = (t.min(self.total) - self.warmup) as f64 / (self.total - self.warmup) as f64;
        self.min_ratio + 0.5 * (1.0 - self.min_ratio) * (1.0 + (PI * done).cos())
    }

    /// The learning rate at position `t` for the peak `learning_rate`.
    pub fn rate(&self, learning_rate: f64, t: u64) -> f64 {
        learning_rate * self.factor(t)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BASELINE: Schedule = Schedule { shape: Shape::Cosine, warmup: 15, total: 100, min_ratio: 0.1 };

    #[test]
    fn golden_factors_of_the_baseline() {
        for (epoch, factor) in [
            (0, 0.066667),
            (14, 1.0),
            (15, 1.0),
            (36, 0.871125),
            (57, 0.558316),
            (99, 0.100307),
            (100, 0.1),
            (1000, 0.1),
        ] {
            assert!((BASELINE.factor(epoch) - factor).abs() < 1e-6, "epoch {epoch}: {}", BASELINE.factor(epoch));
        }
        assert!((BASELINE.rate(1e-4, 0) - 1e-4 / 15.0).abs() < 1e-18);
    }

    #[test]
    fn closed_form_at_the_corners() {
        let steps = Schedule { shape: Shape::Cosine, warmup: 100, total: 2000, min_ratio: 0.1 };
        for (t, factor) in [(0, 0.01), (99, 1.0), (100, 1.0), (1050, 0.55), (2000, 0.1)] {
            assert!((steps.factor(t) - factor).abs() < 1e-12);
        }
        let plain = Schedule { shape: Shape::Constant, warmup: 0, total: 10, min_ratio: 0.1 };
        assert!((0..30).all(|t| plain.factor(t) == 1.0));
        assert_eq!(Schedule { warmup: 4, ..plain }.factor(1), 0.5);
        assert_eq!(Schedule { shape: Shape::Cosine, ..plain }.factor(0), 1.0);
    }

    #[test]
    fn a_warm_up_longer_than_the_run_keeps_its_slope() {
        let short = Schedule { total: 10, ..BASELINE };
        assert!((0..10).all(|t| short.factor(t) == BASELINE.factor(t)));
        assert_eq!(Schedule { total: 15, ..BASELINE }.factor(20), 1.0);
        assert_eq!(Schedule { total: 0, warmup: 0, ..BASELINE }.factor(0), 1.0);
    }

    proptest! {
        #[test]
        fn it_is_continuous_and_stays_in_bounds(warmup in 0u64..50, total in 1u64..500, floor in 0.0f64..1.0) {
            let schedule = Schedule { shape: Shape::Cosine, warmup, total, min_ratio: floor };
            // Steepest places: 1 / W in the warm-up, (1 - r) pi / 2 / (T - W) in the cosine.
            let steepest = (1.0 / warmup.max(1) as f64).max(PI / 2.0 / (total.saturating_sub(warmup)).max(1) as f64);
            for t in 0..600 {
                let (here, next) = (schedule.factor(t), schedule.factor(t + 1));
                prop_assert!((next - here).abs() <= steepest + 1e-12);
                prop_assert!(here > 0.0 || floor < 1e-12);
                prop_assert!(here <= 1.0 + 1e-12);
                prop_assert!(t < warmup || here >= floor - 1e-12);
            }
        }
    }
}
