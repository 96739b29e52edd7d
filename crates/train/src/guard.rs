//! Faults of numbers: what counts as one, and the memory of healthy updates that a jump is measured against.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Healthy updates remembered, how many of them say what the level is now (the loss falls fast at first), and how many there must be before a
/// jump can be told from noise.
const LENGTH: usize = 128;
const RECENT: usize = 9;
const FIRST: usize = 8;

/// A jump is a value 10 times the median of the recent updates, or one twice the median of all that are remembered and 10 deviations (scaled
/// median absolute deviation of the logarithms) above it.
const FACTOR: f64 = 10.0;
const LEAST_FACTOR: f64 = 2.0;
const DEVIATIONS: f64 = 10.0;

/// Deviation added, so that a window without noise does not make every ripple a jump.
const LEAST_DEVIATION: f64 = 0.01;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// NaN, infinity, or beyond the limits of a run that has diverged.
    NonFinite,
    /// Finite, but far above the updates before.
    Spike,
}

/// Why an update was not taken.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    pub kind: Kind,
    pub reason: String,
    /// The parameters have been changed already: only an earlier checkpoint helps.
    pub applied: bool,
}

impl Fault {
    pub fn non_finite(reason: String) -> Self {
        Fault { kind: Kind::NonFinite, reason, applied: false }
    }
}

/// Loss and gradient norm of the last healthy updates; part of every checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Guard {
    loss: Window,
    grad_norm: Window,
}

impl Guard {
    /// What jumps in an update with this loss and gradient norm, in words.
    pub fn judge(&self, loss: f64, grad_norm: f64) -> Option<String> {
        let jump = |name: &str, window: &Window, value: f64| {
            let median = window.jump(value)?;
            Some(format!("the {name} {value:.4} is {:.1} times the median of the updates before", value / median))
        };
        jump("loss", &self.loss, loss).or_else(|| jump("gradient norm", &self.grad_norm, grad_norm))
    }

    /// Whether this, read from a file, is a memory that `judge` and `accept` can go on with.
    pub fn fits(&self) -> bool {
        [&self.loss, &self.grad_norm].into_iter().all(Window::fits)
    }

    /// Remembers a healthy update.
    pub fn accept(&mut self, loss: f64, grad_norm: f64) {
        self.loss.push(loss);
        self.grad_norm.push(grad_norm);
    }
}

/// Logarithms of the last positive finite values.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Window {
    logs: VecDeque<f64>,
}

impl Window {
    /// The median that `value` jumps above, if it does.
    fn jump(&self, value: f64) -> Option<f64> {
        if self.logs.len() < FIRST || value.is_nan() || value <= 0.0 {
            return None;
        }
        let value = value.ln();
        let recent = median(self.logs.iter().rev().take(RECENT).copied());
        if value - recent >= FACTOR.ln() {
            return Some(recent.exp());
        }
        let middle = median(self.logs.iter().copied());
        let deviation = 1.4826 * median(self.logs.iter().map(|log| (log - middle).abs())) + LEAST_DEVIATION;
        let above = value - middle;
        (above >= LEAST_FACTOR.ln() && above >= DEVIATIONS * deviation).then(|| middle.exp())
    }

    /// The median of all that is remembered, once there is enough of it.
    pub fn median(&self) -> Option<f64> {
        (self.logs.len() >= FIRST).then(|| median(self.logs.iter().copied()).exp())
    }

    /// Whether this, read from a file, can be gone on with.
    pub fn fits(&self) -> bool {
        self.logs.len() <= LENGTH
    }

    pub fn push(&mut self, value: f64) {
        if value.is_finite() && value > 0.0 {
            self.logs.push_back(value.ln());
            if self.logs.len() > LENGTH {
                self.logs.pop_front();
            }
        }
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::random::{Purpose, Random};

    /// Standard normal numbers.
    fn noise(count: usize) -> Vec<f64> {
        let random = Random::new(7, Purpose::DataOrder);
        (0..count).map(|i| random.normal(0, i as u64)).collect()
    }

    #[test]
    fn a_jump_of_ten_is_seen_at_once_and_noise_is_not_a_jump() {
        for spread in [0.0, 0.05, 0.3, 0.5] {
            let (mut guard, mut alarms, mut last) = (Guard::default(), 0, Vec::new());
            for (step, z) in noise(30_000).into_iter().enumerate() {
                // A loss that falls to a third within 60 updates, then slowly.
                let level = 1.0 + 5.0 * (-(step as f64) / 3000.0).exp() + 12.0 * (-(step as f64) / 60.0).exp();
                let loss = level * (spread * z).exp();
                alarms += u32::from(guard.judge(loss, loss).is_some());
                guard.accept(loss, loss);
                last.push(loss);
                if step > FIRST && (step % 1000 == 10 || step < 100) {
                    let recent = median(last[last.len() - RECENT..].iter().copied());
                    // Ten times what it was; and, however noisy that is, ten times the level beneath the noise.
                    for jump in [10.001 * recent, 12.0 * (2.0 * spread).exp() * level, 1000.0 * level, f64::INFINITY] {
                        assert!(guard.judge(jump, loss).is_some(), "loss {jump} at step {step}, spread {spread}");
                        assert!(guard.judge(loss, jump).is_some(), "gradient {jump} at step {step}, spread {spread}");
                    }
                    assert_eq!(guard.judge(1.9 * recent.min(loss), loss), None, "less than twice is no jump");
                }
            }
            assert!(alarms <= 3, "{alarms} false alarms in 30,000 steps of spread {spread}");
        }
    }

    #[test]
    fn what_is_no_positive_number_stays_out_of_the_window() {
        let mut guard = Guard::default();
        (0..FIRST).for_each(|_| guard.accept(1.0, 1.0));
        let before = guard.clone();
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -1.0] {
            guard.accept(value, value);
            assert_eq!(guard, before);
        }
        let text = serde_json::to_string(&guard).unwrap();
        assert_eq!(serde_json::from_str::<Guard>(&text).unwrap(), guard);
        (0..3 * LENGTH).for_each(|_| guard.accept(2.0, 2.0));
        assert_eq!(guard.loss.logs.len(), LENGTH);
    }
}
