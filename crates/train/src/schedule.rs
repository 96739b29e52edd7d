//! The learning-rate schedule: a pure function of the 0-based position, so that a resumed run goes on exactly where it stopped.

use std::f64::consts::PI;

/// What follows the warm-up. Each goes from 1 down to `min_ratio`, which then holds, unless it says otherwise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    /// Half a cosine.
    Cosine,
    /// 1 to the end.
    Constant,
    /// (1 - x)^power; power 1 is a straight line.
    Polynomial { power: f64 },
    /// 1, and 1 - sqrt(x) over the last `decay` of the way (warm-up, stable, decay; Hägele 2024, arXiv 2405.18392).
    Stable { decay: f64 },
    /// Half cosines of `first`, `first * growth`, ... positions, each from 1 again (SGDR, Loshchilov 2017, arXiv 1608.03983).
    Restarts { first: u64, growth: u64 },
    /// From 1/25 up to 1 over 30 % of the phase and down to 1/250,000, both along half a cosine; without warm-up or floor (Smith 2018).
    OneCycle,
}

/// How the warm-up rises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rise {
    /// (t + 1) / W.
    Linear,
    /// From a hundredth by a constant factor: 0.01^(1 - (t + 1) / W).
    Exponential,
}

/// Warm-up over W positions, then `shape` up to `total`. Positions are optimizer steps in the text phase and epochs in the facts and chat phases,
/// where all steps of an epoch share a rate; both use the same formula.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    pub shape: Shape,
    pub rise: Rise,
    /// Positions of the warm-up; 0 starts at the full rate.
    pub warmup: u64,
    /// Positions of the phase.
    pub total: u64,
    /// Where the shape ends, as a share of the peak.
    pub min_ratio: f64,
}

/// From 1 to 0 along half a cosine.
fn half_cosine(x: f64) -> f64 {
    0.5 * (1.0 + (PI * x).cos())
}

impl Schedule {
    /// Share of the peak rate at position `t`. A warm-up as long as the run or longer keeps its slope, so such a run ends before the peak.
    pub fn factor(&self, t: u64) -> f64 {
        if self.shape == Shape::OneCycle {
            return self.one_cycle(t);
        }
        if t < self.warmup {
            let done = (t + 1) as f64 / self.warmup as f64;
            return match self.rise {
                Rise::Linear => done,
                Rise::Exponential => 0.01f64.powf(1.0 - done),
            };
        }
        if self.total <= self.warmup {
            return 1.0;
        }
        let x = (t.min(self.total) - self.warmup) as f64 / (self.total - self.warmup) as f64;
        let left = match self.shape {
            Shape::Constant | Shape::OneCycle => return 1.0,
            Shape::Cosine => half_cosine(x),
            Shape::Polynomial { power } => (1.0 - x).powf(power),
            Shape::Stable { decay } => 1.0 - ((x - (1.0 - decay)).max(0.0) / decay).sqrt(),
            Shape::Restarts { first, growth } => half_cosine(share_of_cycle(t - self.warmup, first, growth)),
        };
        self.min_ratio + (1.0 - self.min_ratio) * left
    }

    fn one_cycle(&self, t: u64) -> f64 {
        let x = t.min(self.total) as f64 / self.total.max(1) as f64;
        let between = |high: f64, low: f64, x: f64| low + (high - low) * half_cosine(x);
        if x < 0.3 { between(1.0 / 25.0, 1.0, x / 0.3) } else { between(1.0, 1.0 / 250_000.0, (x - 0.3) / 0.7) }
    }

    /// The learning rate at position `t` for the peak `learning_rate`.
    pub fn rate(&self, learning_rate: f64, t: u64) -> f64 {
        learning_rate * self.factor(t)
    }
}

/// How much of its cycle position `t` has behind it, in [0, 1).
fn share_of_cycle(mut t: u64, first: u64, growth: u64) -> f64 {
    let mut length = first.max(1);
    if growth <= 1 {
        t %= length;
    }
    while t >= length {
        t -= length;
        length = length.saturating_mul(growth);
    }
    t as f64 / length as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BASELINE: Schedule =
        Schedule { shape: Shape::Cosine, rise: Rise::Linear, warmup: 15, total: 100, min_ratio: 0.1 };

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
        let steps = Schedule { warmup: 100, total: 2000, ..BASELINE };
        for (t, factor) in [(0, 0.01), (99, 1.0), (100, 1.0), (1050, 0.55), (2000, 0.1)] {
            assert!((steps.factor(t) - factor).abs() < 1e-12);
        }
        let plain = Schedule { shape: Shape::Constant, warmup: 0, total: 10, ..BASELINE };
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

    #[test]
    fn closed_form_of_the_other_shapes() {
        let with = |shape| Schedule { shape, warmup: 10, total: 110, ..BASELINE };
        let cases: [(Shape, &[(u64, f64)]); 5] = [
            (Shape::Polynomial { power: 1.0 }, &[(9, 1.0), (10, 1.0), (60, 0.55), (110, 0.1), (999, 0.1)]),
            (Shape::Polynomial { power: 2.0 }, &[(10, 1.0), (60, 0.325), (110, 0.1)]),
            (Shape::Stable { decay: 0.2 }, &[(10, 1.0), (90, 1.0), (95, 0.55), (110, 0.1)]),
            (
                Shape::Restarts { first: 10, growth: 2 },
                &[(10, 1.0), (15, 0.55), (20, 1.0), (30, 0.55), (40, 1.0), (80, 1.0)],
            ),
            (
                Shape::Restarts { first: 10, growth: 1 },
                &[(10, 1.0), (15, 0.55), (20, 1.0), (25, 0.55), (1_000_010, 1.0)],
            ),
        ];
        for (shape, points) in cases {
            for &(t, factor) in points {
                assert!((with(shape).factor(t) - factor).abs() < 1e-9, "{shape:?} at {t}: {}", with(shape).factor(t));
            }
        }
        let cycle = Schedule { shape: Shape::OneCycle, ..BASELINE };
        for (t, factor) in [(0, 0.04), (15, 0.52), (30, 1.0), (65, 0.500002), (100, 4e-6), (500, 4e-6)] {
            assert!((cycle.factor(t) - factor).abs() < 1e-12, "one cycle at {t}: {}", cycle.factor(t));
        }
    }

    #[test]
    fn an_exponential_warm_up_grows_by_a_constant_factor_to_the_peak() {
        let schedule = Schedule { rise: Rise::Exponential, warmup: 20, ..BASELINE };
        let ratio = schedule.factor(1) / schedule.factor(0);
        assert!((1..19).all(|t| (schedule.factor(t + 1) / schedule.factor(t) - ratio).abs() < 1e-12));
        assert!((schedule.factor(19) - 1.0).abs() < 1e-12 && (schedule.factor(0) / ratio - 0.01).abs() < 1e-12);
    }

    proptest! {
        #[test]
        fn it_is_continuous_and_stays_in_bounds(warmup in 0u64..50, total in 1u64..500, floor in 0.0f64..1.0) {
            let schedule = Schedule { warmup, total, min_ratio: floor, ..BASELINE };
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
