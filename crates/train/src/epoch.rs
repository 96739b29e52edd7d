//! What an epoch adds up: running losses, activation gradient at the embedding, routing by layer. Part of every checkpoint.

use crate::data::{Batch, Floor};
use crate::metrics::Row;
use moe_router::{CollapseAlarm, Policy, Routing, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::json;

/// One expert with more than this share of a layer's assignments for this many epochs raises the collapse alarm.
const COLLAPSE_SHARE: f64 = 0.9;
const COLLAPSE_EPOCHS: u32 = 3;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Epoch {
    sequences: u64,
    macro_sum: f64,
    targets: u64,
    micro_sum: f64,
    /// Variants of documents, and the sum of their losses.
    #[serde(default, skip_serializing_if = "none")]
    variants: (u64, f64),
    batches: u64,
    l0_min: f64,
    l0_sum: f64,
    l0_max: f64,
    /// Sums over batches of the mean window and the share of earlier keys that windows hide.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    windows: Option<[f64; 2]>,
    routing: Vec<Statistics>,
    alarms: Vec<CollapseAlarm>,
}

/// Mean and standard deviation over tokens of active experts, averaged over sparse layers.
pub struct Summary {
    pub mean: f64,
    pub std: f64,
    /// 5th and 95th percentile of the utilisation of all experts of all layers: 1 is fair, 0 unused.
    pub load_p5: f64,
    pub load_p95: f64,
}

fn none(variants: &(u64, f64)) -> bool {
    variants.0 == 0
}

impl Epoch {
    pub fn new(policies: &[Policy]) -> Self {
        Epoch {
            sequences: 0,
            macro_sum: 0.0,
            targets: 0,
            micro_sum: 0.0,
            variants: (0, 0.0),
            batches: 0,
            l0_min: f64::MAX,
            l0_sum: 0.0,
            l0_max: 0.0,
            windows: None,
            routing: policies.iter().map(|policy| Statistics::new(policy.num_experts())).collect(),
            alarms: policies.iter().map(|_| CollapseAlarm::new(COLLAPSE_SHARE, COLLAPSE_EPOCHS)).collect(),
        }
    }

    /// Whether this, read from a file, is an epoch of these policies.
    pub fn fits(&self, policies: &[Policy]) -> bool {
        let routing = self.routing.iter().zip(policies);
        self.routing.len() == policies.len()
            && self.alarms.len() == policies.len()
            && [self.sequences, self.targets, self.batches, self.variants.0].iter().all(|count| *count < 1 << 48)
            && routing.into_iter().all(|(layer, policy)| layer.fits(policy.num_experts()))
    }

    /// Takes over the alarm counts of the epoch before, after its `routing`.
    pub fn keep_alarms(&mut self, before: &Epoch) {
        self.alarms.clone_from(&before.alarms);
    }

    /// Adds a batch of a phase, of which the documents from `originals` on are variants: they count for themselves.
    pub fn add_batch(&mut self, batch: &Batch, document_losses: &[f64], micro_sum: f64, originals: usize, l0: f64) {
        if batch.documents.iter().all(|document| *document < originals) {
            return self.add(document_losses, micro_sum, batch.len(), l0);
        }
        let (mut losses, mut sum, mut targets) = (Vec::new(), 0.0, 0);
        for ((document, loss), rows) in batch.documents.iter().zip(document_losses).zip(batch.offsets_b1.windows(2)) {
            if *document < originals {
                losses.push(*loss);
                sum += loss * (rows[1] - rows[0]) as f64;
                targets += rows[1] - rows[0];
            } else {
                self.variants = (self.variants.0 + 1, self.variants.1 + loss);
            }
        }
        self.add(&losses, sum, targets, l0);
    }

    /// Adds a batch: the mean loss of each document, the summed loss and number of its targets, the activation gradient at the embedding.
    pub fn add(&mut self, document_losses: &[f64], micro_sum: f64, targets: usize, l0: f64) {
        self.sequences += document_losses.len() as u64;
        self.macro_sum += document_losses.iter().sum::<f64>();
        self.targets += targets as u64;
        self.micro_sum += micro_sum;
        self.batches += 1;
        self.l0_min = self.l0_min.min(l0);
        self.l0_sum += l0;
        self.l0_max = self.l0_max.max(l0);
    }

    /// Adds the windows of a batch that was added, where its tokens had their own.
    pub fn add_windows(&mut self, batch: Option<[f64; 2]>) {
        if let Some([mean, masked]) = batch {
            let [means, masks] = self.windows.unwrap_or_default();
            self.windows = Some([means + mean, masks + masked]);
        }
    }

    /// Mean over batches of the mean window and of the share of earlier keys that windows hide.
    pub fn windows(&self) -> Option<[f64; 2]> {
        self.windows.map(|sums| sums.map(|sum| sum / self.batches.max(1) as f64))
    }

    /// Notes the scores [n, e] and the routing of a sparse layer.
    pub fn observe(&mut self, layer: usize, scores_ne: &[f32], routing: &Routing, tokens_n: &[u32]) {
        self.routing[layer].add(scores_ne, routing, tokens_n);
    }

    /// Mean over sequences of per-sequence means, as they were when trained on: the roadmap's loss.
    pub fn macro_loss(&self) -> f64 {
        self.macro_sum / self.sequences.max(1) as f64
    }

    /// Mean over tokens.
    pub fn micro_loss(&self) -> f64 {
        self.micro_sum / self.targets.max(1) as f64
    }

    pub fn l0_mean(&self) -> f64 {
        self.l0_sum / self.batches.max(1) as f64
    }

    /// Mean over documents and their variants.
    pub fn augmented_loss(&self) -> f64 {
        (self.macro_sum + self.variants.1) / (self.sequences + self.variants.0).max(1) as f64
    }

    pub fn losses(&self, row: &mut Row, floor: Option<Floor>) {
        row.number("epoch/loss", self.macro_loss());
        row.number("epoch/loss_micro", self.micro_loss());
        if let Some(floor) = floor {
            row.number("epoch/floor", floor.macro_average);
            row.number("epoch/floor_micro", floor.micro_average);
            row.number("epoch/excess", self.macro_loss() - floor.macro_average);
        }
        row.number("epoch/l0_min", self.l0_min);
        row.number("epoch/l0_mean", self.l0_mean());
        row.number("epoch/l0_max", self.l0_max);
    }

    /// Writes the routing of every layer and its mean into `row`; returns messages of layers whose collapse alarm rises now.
    pub fn routing(&mut self, row: &mut Row, seed: u64) -> (Summary, Vec<String>) {
        let reports: Vec<_> = self.routing.iter().map(|layer| layer.report(seed)).collect();
        let mean =
            |f: &dyn Fn(&moe_router::Report) -> f64| reports.iter().map(f).sum::<f64>() / reports.len().max(1) as f64;
        let mut loads: Vec<f64> = reports.iter().flat_map(|report| report.utilisation.iter().copied()).collect();
        loads.sort_by(f64::total_cmp);
        let summary = Summary {
            mean: mean(&|r| r.experts_per_token),
            std: mean(&|r| r.experts_std),
            load_p5: percentile(&loads, 5),
            load_p95: percentile(&loads, 95),
        };
        row.number("moe/experts_per_token", summary.mean);
        row.number("moe/experts_std", summary.std);
        row.number("moe/router_entropy", mean(&|r| r.router_entropy));
        row.number("moe/load_imbalance", mean(&|r| r.load_imbalance));
        row.number("moe/load_p5", summary.load_p5);
        row.number("moe/load_p95", summary.load_p95);
        row.number("moe/information", mean(&|r| r.information));
        row.integer("moe/dead_experts", reports.iter().map(|r| r.dead_experts).sum());
        for (layer, report) in reports.iter().enumerate() {
            if let serde_json::Value::Object(fields) = json!(report) {
                for (name, value) in fields {
                    row.value(&format!("moe/layer_{layer:02}/{name}"), value);
                }
            }
        }
        let mut messages = Vec::new();
        for (layer, (alarm, report)) in self.alarms.iter_mut().zip(&reports).enumerate() {
            if alarm.observe(&report.load) {
                messages.push(format!(
                    "layer {layer}: one expert has had more than {COLLAPSE_SHARE} of the load for {COLLAPSE_EPOCHS} epochs; raise losses.balance"
                ));
            }
        }
        (summary, messages)
    }
}

/// Nearest rank: the smallest value that `percent` of the sorted ones do not exceed; 0 of none.
fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let values: Vec<f64> = (1..=40).map(f64::from).collect();
        assert_eq!([0, 5, 50, 95, 100].map(|p| percentile(&values, p)), [1.0, 2.0, 20.0, 38.0, 40.0]);
        assert_eq!((percentile(&[7.0], 5), percentile(&[], 95)), (7.0, 0.0));
    }

    #[test]
    fn variants_of_documents_count_apart() {
        let batch = |documents: &[usize]| Batch {
            offsets_b1: (0..=documents.len()).map(|i| i * i).collect(), // 1, 3, 5, … targets
            tokens_n: vec![0; documents.len().pow(2)],
            documents: documents.to_vec(),
            ..Batch::default()
        };
        let mut epoch = Epoch::new(&[]);
        epoch.add_batch(&batch(&[0, 1]), &[2.0, 1.0], 5.0, 3, 0.5);
        epoch.add_batch(&batch(&[2, 3, 4]), &[3.0, 9.0, 6.0], 60.0, 3, 0.5);
        assert_eq!((epoch.macro_loss(), epoch.micro_loss()), (2.0, 8.0 / 5.0));
        assert_eq!(epoch.augmented_loss(), 21.0 / 5.0);
        let text = serde_json::to_string(&epoch).unwrap();
        assert_eq!(serde_json::from_str::<Epoch>(&text).unwrap().augmented_loss(), 21.0 / 5.0);
        assert!(!serde_json::to_string(&Epoch::new(&[])).unwrap().contains("variants"));
    }
}
