//! The learning-rate range test (Smith 2015, arXiv 1506.01186): from fresh parameters, updates whose rate rises by a constant factor, until the
//! loss leaves its minimum. Rules of thumb read different rates off that curve; they are candidates here, each is trained with for as many updates,
//! and the best one is suggested. In memory only: nothing is written.

use super::control::batch_at;
use super::{Position, prepare};
use crate::dataset::{Dataset, PhaseData};
use crate::epoch::Epoch;
use crate::error::TrainError;
use crate::learner::{Learner, StepError};
use crate::run::{Run, Train};
use serde::Serialize;
use serde_json::{Map, Value, json};

/// Rates of the first and the last update, and how many there are.
const LOW: f64 = 1e-7;
const HIGH: f64 = 1.0;
const UPDATES: u64 = 100;

/// The test ends where the smoothed loss is this many times its minimum.
const ENOUGH: f64 = 5.0;

/// How much of the running mean of the losses stays; the mean is corrected for its start.
const MEMORY: f64 = 0.9;

/// Candidates are these shares of the rate with the lowest loss, and the rate of the steepest fall.
const SHARES: [f64; 2] = [0.1, 0.01];

/// Stretches of `UPDATES` at most: the rise, every candidate, the run's own rate.
const STRETCHES: u64 = SHARES.len() as u64 + 3;

/// One update: its rate, the loss of its batch before it, and the running mean of such losses.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Point {
    pub learning_rate: f64,
    pub loss: f64,
    pub smoothed: f64,
}

/// Running mean of losses, corrected for its start.
#[derive(Clone, Copy, Default)]
struct Smooth {
    sum: f64,
    weight: f64,
}

impl Smooth {
    fn add(&mut self, loss: f64) -> f64 {
        self.sum = MEMORY * self.sum + (1.0 - MEMORY) * loss;
        self.weight = MEMORY * self.weight + (1.0 - MEMORY);
        self.sum / self.weight
    }
}

/// The rate of update `index`, from 0.
fn rate(index: u64) -> f64 {
    LOW * (HIGH / LOW).powf(index as f64 / (UPDATES - 1) as f64)
}

/// The index of the lowest smoothed loss; none for a curve that never fell.
fn lowest(points: &[Point]) -> Option<usize> {
    let best = (0..points.len()).min_by(|&a, &b| points[a].smoothed.total_cmp(&points[b].smoothed))?;
    (best > 0).then_some(best)
}

/// Rates worth trying, none for a curve that never fell.
pub fn candidates(points: &[Point]) -> Vec<f64> {
    let shares = lowest(points).into_iter().flat_map(|best| SHARES.map(|share| share * points[best].learning_rate));
    shares.chain(steepest(points)).collect()
}

/// The rate at which the smoothed loss falls fastest with the logarithm of the rate, up to its minimum.
pub fn steepest(points: &[Point]) -> Option<f64> {
    let slope = |i: usize| (points[i + 1].smoothed - points[i - 1].smoothed) / 2.0;
    let inner = 1..lowest(points)?;
    inner.min_by(|&a, &b| slope(a).total_cmp(&slope(b))).map(|i| points[i].learning_rate)
}

/// What is being done.
enum Stage {
    Rise,
    /// As many updates again at the constant rate of a probe.
    Probe(usize),
    Over,
}

/// A range test on the first phase of a run, update by update.
pub struct LrFind {
    run: Run,
    dataset: Dataset,
    learner: Learner,
    settings: Train,
    stage: Stage,
    /// Updates made in the stage.
    made: u64,
    smooth: Smooth,
    points: Vec<Point>,
    ended: String,
    /// The candidates, and last the run's own rate.
    probes: Vec<Probe>,
}

/// A constant rate, and the smoothed loss after `UPDATES` with it: none where they diverged.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Probe {
    pub learning_rate: f64,
    pub loss: Option<f64>,
}

impl LrFind {
    /// Checks the run and reads its data.
    pub fn new(run: Run) -> Result<Self, TrainError> {
        let (dataset, learner) = prepare(&run)?;
        let settings = run.phase(dataset.phases[0].name);
        Ok(LrFind {
            run,
            dataset,
            learner,
            settings,
            stage: Stage::Rise,
            made: 0,
            smooth: Smooth::default(),
            points: Vec::new(),
            ended: format!("the rate reached {HIGH}"),
            probes: Vec::new(),
        })
    }

    /// One update; false when the test is over.
    pub fn advance(&mut self) -> Result<bool, TrainError> {
        match self.stage {
            Stage::Rise => self.rise()?,
            Stage::Probe(index) => self.probe(index)?,
            Stage::Over => return Ok(false),
        }
        Ok(true)
    }

    /// Updates made of all there are at most.
    pub fn progress(&self) -> (u64, u64) {
        let made = match self.stage {
            Stage::Rise => self.made,
            Stage::Probe(index) => UPDATES * (1 + index as u64) + self.made,
            Stage::Over => STRETCHES * UPDATES,
        };
        (made, STRETCHES * UPDATES)
    }

    pub fn points(&self) -> &[Point] {
        &self.points
    }

    fn rise(&mut self) -> Result<(), TrainError> {
        let learning_rate = rate(self.made);
        let lowest = self.points.iter().map(|point| point.smoothed).fold(f64::INFINITY, f64::min);
        match self.update(learning_rate)? {
            Ok(loss) => {
                let smoothed = self.smooth.add(loss);
                self.points.push(Point { learning_rate, loss, smoothed });
                if smoothed > ENOUGH * lowest {
                    self.ended = format!("the loss rose to {ENOUGH} times its minimum at {learning_rate:.3e}");
                } else if self.made < UPDATES {
                    return Ok(());
                }
            }
            Err(reason) => self.ended = format!("the run diverged at {learning_rate:.3e}: {reason}"),
        }
        let rates = candidates(&self.points);
        if rates.is_empty() {
            self.stage = Stage::Over;
            return Ok(());
        }
        let rates = rates.into_iter().chain([self.settings.peak_rate()]);
        self.probes = rates.map(|learning_rate| Probe { learning_rate, loss: None }).collect();
        self.begin(0)
    }

    fn probe(&mut self, index: usize) -> Result<(), TrainError> {
        let loss = self.update(self.probes[index].learning_rate)?.ok();
        self.probes[index].loss = loss.map(|loss| self.smooth.add(loss));
        if loss.is_some() && self.made < UPDATES {
            return Ok(());
        }
        if index + 1 == self.probes.len() {
            self.stage = Stage::Over;
            return Ok(());
        }
        self.begin(index + 1)
    }

    /// From fresh parameters and the first batch again.
    fn begin(&mut self, probe: usize) -> Result<(), TrainError> {
        self.learner = Learner::new(&self.run, self.learner.model.vocab_size, &self.settings)?;
        (self.stage, self.made, self.smooth) = (Stage::Probe(probe), 0, Smooth::default());
        Ok(())
    }

    /// One update at `rate`: the loss of its batch before it, or why it was not made.
    fn update(&mut self, rate: f64) -> Result<Result<f64, String>, TrainError> {
        let data = &self.dataset.phases[0].data;
        let at = match data {
            PhaseData::Documents { order, .. } => {
                let (epoch, batch) = order.position(self.made);
                Position { epoch, batch: batch as u64, ..Position::default() }
            }
            PhaseData::Text(_) => Position { phase_step: self.made, ..Position::default() },
        };
        self.made += 1;
        let mut epoch = Epoch::new(&self.learner.policies);
        match self.learner.update(&batch_at(data, &at, 1), &self.settings, rate, &mut epoch, None) {
            Ok(update) => Ok(Ok(update.cross_entropy)),
            Err(StepError::Fault(fault)) => Ok(Err(fault.reason)),
            Err(error @ StepError::Device(_)) => Err(error.into()),
        }
    }

    /// The candidate with the lowest loss, and the run's own rate; none before the end, and where the loss never fell.
    fn judged(&self) -> Option<(Probe, Probe)> {
        let (own, candidates) = self.probes.split_last()?;
        let loss = |probe: &&Probe| probe.loss.unwrap_or(f64::INFINITY);
        Some((*candidates.iter().min_by(|a, b| loss(a).total_cmp(&loss(b)))?, *own))
    }

    /// What was found: every point, every probe, the suggestion, and whether it beats the run's own rate over as many updates.
    pub fn report(&self) -> Map<String, Value> {
        let judged = self.judged().filter(|(best, _)| best.loss.is_some());
        let better = judged.is_some_and(|(best, own)| own.loss.is_none_or(|own| best.loss < Some(own)));
        let lowest = lowest(&self.points).map(|best| self.points[best]);
        let words = match judged {
            None => "no rate learns: no suggestion; look at the model and its data".to_owned(),
            Some(_) if better => format!("after {UPDATES} updates the suggestion is better than the run's own rate"),
            Some(_) => format!("after {UPDATES} updates the suggestion is no better than the run's own rate"),
        };
        Map::from_iter([
            ("name".to_owned(), json!(self.run.name)),
            ("phase".to_owned(), json!(self.dataset.phases[0].name)),
            ("points".to_owned(), json!(self.points)),
            ("ended".to_owned(), json!(self.ended)),
            ("lowest_loss".to_owned(), json!(lowest.map(|point| point.smoothed))),
            ("lowest_rate".to_owned(), json!(lowest.map(|point| point.learning_rate))),
            ("steepest_rate".to_owned(), json!(steepest(&self.points))),
            ("probes".to_owned(), json!(self.probes)),
            ("suggestion".to_owned(), json!(judged.map(|(best, _)| best.learning_rate))),
            ("own_rate".to_owned(), json!(self.settings.peak_rate())),
            ("updates_compared".to_owned(), json!(UPDATES)),
            ("loss_at_suggestion".to_owned(), json!(judged.and_then(|(best, _)| best.loss))),
            ("loss_at_own_rate".to_owned(), json!(judged.and_then(|(_, own)| own.loss))),
            ("better".to_owned(), json!(better)),
            ("verdict".to_owned(), json!(words)),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trainer::tests::run;
    use tempfile::TempDir;

    fn curve(losses: impl Fn(f64) -> f64) -> Vec<Point> {
        (0..UPDATES)
            .map(|i| (rate(i), losses(rate(i))))
            .map(|(x, y)| Point { learning_rate: x, loss: y, smoothed: y })
            .collect()
    }

    #[test]
    fn rates_rise_by_a_constant_factor_from_low_to_high() {
        assert_eq!((rate(0), UPDATES), (1e-7, 100));
        assert!((rate(99) - 1.0).abs() < 1e-12);
        let factor = rate(1) / rate(0);
        assert!((0..99).all(|i| (rate(i + 1) / rate(i) / factor - 1.0).abs() < 1e-12));
    }

    #[test]
    fn candidates_are_shares_of_the_lowest_rate_and_the_steepest_one() {
        // A valley in the logarithm of the rate around 1e-2, steepest before it at 1e-3: slope of -exp(-x²/2) is largest at x = ±1.
        let valley = curve(|rate| 5.0 - (-(rate.log10() + 2.0).powi(2) / 2.0).exp());
        let found: Vec<f64> = candidates(&valley).iter().map(|rate| rate.log10()).collect();
        for (found, expected) in found.iter().zip([-3.0, -4.0, -3.0]) {
            assert!((found - expected).abs() < 0.08, "{found:?} {expected}");
        }
        assert_eq!(found.len(), 3);
        assert!(candidates(&curve(|rate| 1.0 + rate)).is_empty() && candidates(&[]).is_empty());
    }

    #[test]
    fn a_range_test_ends_beyond_its_minimum_and_judges_its_own_suggestion() {
        let folder = TempDir::new().unwrap();
        let before = std::fs::read_dir(folder.path()).unwrap().count();
        let tiny = run(folder.path(), &["train.optimizer=sgd", "train.lr_scale=none", "train.learning_rate=1e-7"]);
        let mut find = LrFind::new(tiny).unwrap();
        while find.advance().unwrap() {
            let (made, all) = find.progress();
            assert!(made <= all);
        }
        let report = find.report();
        let points = find.points();
        assert!(points.len() > 30 && points.len() as u64 <= UPDATES);
        assert!(points.iter().enumerate().all(|(i, point)| point.learning_rate == rate(i as u64)));
        let (own, tried) = find.probes.split_last().unwrap();
        assert!(own.learning_rate == 1e-7 && tried.len() >= 2);
        let best = tried.iter().filter_map(|probe| probe.loss).fold(f64::INFINITY, f64::min);
        assert_eq!(report["loss_at_suggestion"].as_f64(), Some(best));
        assert!(report["suggestion"].as_f64().unwrap() > 1e-5, "{report:?}");
        assert_eq!(report["better"], true, "a rate of 1e-7 learns nothing: {report:?}");
        assert!(report["loss_at_suggestion"].as_f64() < report["loss_at_own_rate"].as_f64());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), before + 2, "the two data files and no more");
    }
}
