//! Rules on gradient norms: each update is held against the running medians of the updates before, and what breaks a rule is an alert, to which
//! the next updates may respond (`[monitor]`).

use crate::guard::Window;
use crate::run;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;

/// What the rules remember; part of every checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Monitor {
    /// Norms of the whole gradient.
    global: Window,
    /// Norms by flat layer; empty before the first update, and where no rule looks at them.
    layers: Vec<Window>,
    /// The step up to which a rule says nothing more of a measure.
    quiet: BTreeMap<String, u64>,
    /// The step up to which updates respond.
    until: u64,
}

/// Norms before clipping and ‖Δw‖ / ‖w‖ of an update, by flat layer.
pub struct Measured<'m> {
    pub grad_norm: f64,
    pub param_norms: &'m [f64],
    pub ratios: &'m [f64],
}

/// A rule that was broken.
#[derive(Clone, Debug, PartialEq)]
pub struct Alert {
    /// The key of the rule in `[monitor]`.
    pub rule: &'static str,
    /// The column of the stream.
    pub measure: String,
    pub value: f64,
    /// What the value must not pass.
    pub bound: f64,
    /// The median that the bound was made of.
    pub median: Option<f64>,
}

impl fmt::Display for Alert {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Alert { rule, measure, value, bound, median } = self;
        let side = if value > bound { "above" } else { "below" };
        write!(f, "{rule}: {measure} = {value:.4e} is {side} {bound:.4e}")?;
        median.map_or(Ok(()), |median| write!(f, ", the running median being {median:.4e}"))
    }
}

impl Monitor {
    /// Holds the update that ended at `step` against the rules and takes it into the medians. Each rule speaks once of a measure, then not again
    /// for `cooldown` updates; any alert makes the next `cooldown` updates respond.
    pub fn observe(&mut self, rules: &run::Monitor, step: u64, update: &Measured<'_>) -> Vec<Alert> {
        let mut found = Vec::new();
        let mut check = |rule, measure: &str, value: f64, factor: f64, above: bool, window: &Window| {
            if factor == 0.0 || !value.is_finite() {
                return;
            }
            let Some(median) = window.median() else { return };
            let bound = if above { median * factor } else { median / factor };
            if (above && value > bound) || (!above && value < bound) {
                found.push(Alert { rule, measure: measure.to_owned(), value, bound, median: Some(median) });
            }
        };
        check("exploding", "train/grad_norm", update.grad_norm, rules.exploding, true, &self.global);
        check("vanishing", "train/grad_norm", update.grad_norm, rules.vanishing, false, &self.global);
        for (layer, (window, norm)) in self.layers.iter().zip(update.param_norms).enumerate() {
            let measure = format!("grad/layer_{layer:02}/param_norm");
            check("layer_exploding", &measure, *norm, rules.layer_exploding, true, window);
            check("layer_vanishing", &measure, *norm, rules.layer_vanishing, false, window);
        }
        for (layer, &value) in update.ratios.iter().enumerate() {
            let bound = rules.update_ratio;
            if bound > 0.0 && value.is_finite() && value > bound {
                let measure = format!("update/layer_{layer:02}/ratio");
                found.push(Alert { rule: "update_ratio", measure, value, bound, median: None });
            }
        }
        self.global.push(update.grad_norm);
        if rules.layer_exploding > 0.0 || rules.layer_vanishing > 0.0 {
            self.layers.resize(update.param_norms.len(), Window::default());
            self.layers.iter_mut().zip(update.param_norms).for_each(|(window, norm)| window.push(*norm));
        }
        self.quiet.retain(|_, until| *until > step);
        found.retain(|alert| match self.quiet.entry(format!("{} {}", alert.rule, alert.measure)) {
            Entry::Occupied(_) => false,
            Entry::Vacant(free) => {
                free.insert(step + rules.cooldown);
                true
            }
        });
        if !found.is_empty() {
            self.until = step + rules.cooldown;
        }
        found
    }

    /// Whether the update after `step` responds to an alert.
    pub fn responds(&self, step: u64) -> bool {
        step < self.until
    }

    /// The running median of the norm of the whole gradient, once it can be told.
    pub fn median(&self) -> Option<f64> {
        self.global.median()
    }

    /// Whether this, read from a file, is of a model with so many flat layers and can be gone on with.
    pub fn fits(&self, layers: usize, most: u64) -> bool {
        let windows = self.layers.is_empty() || self.layers.len() == layers;
        let quiet = self.quiet.len() <= 2 + 3 * layers && self.quiet.values().all(|until| *until <= most);
        windows && quiet && self.until <= most && self.layers.iter().chain([&self.global]).all(Window::fits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::random::{Purpose, Random};

    const LAYERS: usize = 3;

    /// 200 healthy updates with a little noise, and one in which `spoil` does something.
    fn stream(
        rules: &run::Monitor,
        at: u64,
        spoil: impl Fn(&mut f64, &mut [f64], &mut [f64]),
    ) -> (Vec<(u64, Alert)>, Monitor) {
        let random = Random::new(1, Purpose::Test);
        let mut monitor = Monitor::default();
        let mut alerts = Vec::new();
        for step in 1..=200 {
            let noise = |i: u64| (0.1 * random.normal(step, i)).exp();
            let mut grad_norm = 2.0 * noise(0);
            let mut norms: Vec<f64> = (1..=LAYERS as u64).map(|i| i as f64 * noise(i)).collect();
            let mut ratios: Vec<f64> = (11..=10 + LAYERS as u64).map(|i| 1e-3 * noise(i)).collect();
            if step == at {
                spoil(&mut grad_norm, &mut norms, &mut ratios);
            }
            let found = monitor.observe(rules, step, &Measured { grad_norm, param_norms: &norms, ratios: &ratios });
            alerts.extend(found.into_iter().map(|alert| (step, alert)));
            // Saved and loaded at every update: it makes no difference.
            monitor = serde_json::from_str(&serde_json::to_string(&monitor).unwrap()).unwrap();
            assert!(monitor.fits(LAYERS, 1000));
        }
        (alerts, monitor)
    }

    type Spoil = fn(&mut f64, &mut [f64], &mut [f64]);

    #[test]
    fn each_rule_speaks_of_its_own_fault_and_of_no_other() {
        let all = run::Monitor {
            exploding: 4.0,
            vanishing: 4.0,
            layer_exploding: 4.0,
            layer_vanishing: 4.0,
            update_ratio: 0.01,
            ..run::Monitor::default()
        };
        let faults: [(&str, &str, Spoil); 5] = [
            ("exploding", "train/grad_norm", |norm, _, _| *norm *= 6.0),
            ("vanishing", "train/grad_norm", |norm, _, _| *norm = 0.0),
            ("layer_exploding", "grad/layer_01/param_norm", |_, norms, _| norms[1] *= 6.0),
            ("layer_vanishing", "grad/layer_02/param_norm", |_, norms, _| norms[2] /= 6.0),
            ("update_ratio", "update/layer_00/ratio", |_, _, ratios| ratios[0] = 0.02),
        ];
        for (rule, measure, spoil) in faults {
            let (alerts, _) = stream(&all, 150, spoil);
            let told: Vec<_> = alerts.iter().map(|(step, alert)| (*step, alert.rule, alert.measure.as_str())).collect();
            assert_eq!(told, [(150, rule, measure)]);
            let words = alerts[0].1.to_string();
            assert!(words.starts_with(rule) && words.contains(measure), "{words}");
            // A rule that is off says nothing, and too few updates say nothing of what is usual.
            assert!(stream(&run::Monitor::default(), 150, spoil).0.is_empty());
            assert_eq!(stream(&all, 5, spoil).0.is_empty(), rule != "update_ratio");
        }
        assert!(stream(&all, 0, |_, _, _| {}).0.is_empty(), "a stream without fault");
    }

    #[test]
    fn an_alert_is_answered_for_the_cooldown_and_not_repeated_in_it() {
        let rules = run::Monitor { exploding: 4.0, cooldown: 10, ..run::Monitor::default() };
        let mut monitor = Monitor::default();
        let mut told = Vec::new();
        let mut responding = Vec::new();
        for step in 1..=60 {
            if monitor.responds(step - 1) {
                responding.push(step);
            }
            let grad_norm = if (30..35).contains(&step) || step == 41 { 100.0 } else { 1.0 };
            let update = Measured { grad_norm, param_norms: &[], ratios: &[] };
            told.extend(monitor.observe(&rules, step, &update).iter().map(|_| step));
        }
        assert_eq!(told, [30, 41]);
        assert_eq!(responding, (31..=40).chain(42..=51).collect::<Vec<u64>>());
    }

    #[test]
    fn a_new_level_becomes_the_usual_one() {
        let rules = run::Monitor { vanishing: 4.0, cooldown: 5, ..run::Monitor::default() };
        let mut monitor = Monitor::default();
        let told = (1..=400).filter(|&step| {
            let grad_norm = if step < 100 { 1.0 } else { 0.1 };
            !monitor.observe(&rules, step, &Measured { grad_norm, param_norms: &[], ratios: &[] }).is_empty()
        });
        let told: Vec<u64> = told.collect();
        assert!(told[0] == 100 && told[told.len() - 1] < 170, "{told:?}");
    }
}
