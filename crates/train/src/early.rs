//! Early stopping: a phase ends when its held-out loss has not improved for a number of evaluations.

use serde::{Deserialize, Serialize};

/// What a phase knows of its held-out loss; part of every checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EarlyStop {
    best: Option<f64>,
    /// Evaluations since the best.
    waited: u64,
}

impl EarlyStop {
    /// Takes the loss of an evaluation; whether it is better than the best by more than `min_delta`. A loss that is not a number is no improvement.
    pub fn observe(&mut self, loss: f64, min_delta: f64) -> bool {
        let better = self.best.map_or(loss.is_finite(), |best| loss < best - min_delta);
        match better {
            true => (self.best, self.waited) = (Some(loss), 0),
            false => self.waited += 1,
        }
        better
    }

    /// Whether `patience` evaluations went by without improvement; never for 0.
    pub fn is_spent(&self, patience: u64) -> bool {
        patience > 0 && self.waited >= patience
    }

    /// Evaluations since the best.
    pub fn waited(&self) -> u64 {
        self.waited
    }

    pub fn best(&self) -> Option<f64> {
        self.best
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_stops_at_the_first_stretch_without_improvement(
            losses in prop::collection::vec(prop_oneof![9 => 0.0f64..10.0, 1 => Just(f64::NAN)], 1..60),
            patience in 1u64..6,
            min_delta in 0.0f64..0.5,
        ) {
            let mut state = EarlyStop::default();
            let mut stopped = None;
            for (at, &loss) in losses.iter().enumerate() {
                state.observe(loss, min_delta);
                // Saved and loaded at every evaluation: it makes no difference.
                state = serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();
                if state.is_spent(patience) {
                    stopped = Some(at);
                    break;
                }
            }
            // The definition, told plainly: the losses that were improvements, and the gaps between them.
            let (mut best, mut last, mut expected) = (f64::INFINITY, None::<usize>, None);
            for (at, &loss) in losses.iter().enumerate() {
                if loss < best - if best.is_finite() { min_delta } else { 0.0 } {
                    (best, last) = (loss, Some(at));
                } else if at as u64 + 1 - last.map_or(0, |last| last as u64 + 1) >= patience {
                    expected = Some(at);
                    break;
                }
            }
            prop_assert_eq!(stopped, expected);
            prop_assert!(!state.is_spent(0));
        }
    }
}
