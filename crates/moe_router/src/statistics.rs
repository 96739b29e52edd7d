//! What a router does, over many batches: exact integer counts and f64 sums in the order of the calls. Definitions: E experts, T tokens,
//! n_e assignments of expert e; load_e = n_e / Σ n, u_e = E load_e (1 fair, 0 unused).

use crate::{Routing, losses, softmax};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tensor::Random;
use tensor::Real;
use tensor::random::Purpose;

/// Tokens kept for the mutual information; the first of the accumulation, later ones only count in the rest.
const SAMPLE: usize = 1 << 18;

/// Bytes that a layer's sample takes at the end of so many tokens with so many experts each, with the gaps that its growth leaves in the heap.
pub fn sample_bytes(tokens: f64, experts: f64) -> f64 {
    const GAPS: f64 = 1.4;
    let token = (size_of::<u32>() + size_of::<usize>()) as f64 + experts * size_of::<u32>() as f64;
    GAPS * tokens.min(SAMPLE as f64) * token
}

/// Shuffles whose mean is the baseline of the mutual information.
const SHUFFLES: u64 = 4;

/// An expert below this u_e in an evaluation counts as dead.
const DEAD: f64 = 0.1;

/// Accumulates over batches of one layer. Assignments to ids that compute nothing count nowhere.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Statistics {
    num_experts: usize,
    tokens: u64,
    /// Tokens with 0, 1, 2, … experts.
    histogram: Vec<u64>,
    counts_e: Vec<u64>,
    entropy_sum: f64,
    importance_sums_e: Vec<f64>,
    /// Token ids and experts of the sample, row after row.
    sample_tokens: Vec<u32>,
    sample_offsets: Vec<usize>,
    sample_experts: Vec<u32>,
}

/// The figures of one layer. Without any token all means are 0.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    pub tokens: u64,
    /// Mean number of experts per token, its population standard deviation, nearest-rank percentiles and maximum.
    pub experts_per_token: f64,
    pub experts_std: f64,
    pub experts_p50: u64,
    pub experts_p95: u64,
    pub experts_max: u64,
    /// Tokens with 0, 1, 2, … experts.
    pub histogram: Vec<u64>,
    /// Share of the assignments per expert.
    pub load: Vec<f64>,
    /// u_e = E · load_e.
    pub utilisation: Vec<f64>,
    /// max u.
    pub load_imbalance: f64,
    /// max u - 1.
    pub max_vio: f64,
    /// Standard deviation of u.
    pub load_cv: f64,
    /// Mean entropy of the router's distribution, nats.
    pub router_entropy: f64,
    /// Mean probability per expert.
    pub importance: Vec<f64>,
    /// Experts with u_e below 0.1.
    pub dead_experts: u64,
    /// Experts without a single token.
    pub unused_experts: u64,
    /// Mutual information between token id and assigned expert in nats, less its mean after shuffling the tokens: about 0 for a router that does
    /// not look at its input.
    pub information: f64,
}

impl Statistics {
    pub fn new(num_experts: usize) -> Self {
        Statistics {
            num_experts,
            tokens: 0,
            histogram: vec![0; num_experts + 1],
            counts_e: vec![0; num_experts],
            entropy_sum: 0.0,
            importance_sums_e: vec![0.0; num_experts],
            sample_tokens: Vec::new(),
            sample_offsets: vec![0],
            sample_experts: Vec::new(),
        }
    }

    /// Whether this, read from a file, is an accumulation over `num_experts` experts that `add` and `report` can go on with.
    pub fn fits(&self, num_experts: usize) -> bool {
        let lengths = [self.counts_e.len(), self.importance_sums_e.len(), self.histogram.len().wrapping_sub(1)];
        let offsets = &self.sample_offsets;
        let counts = self.counts_e.iter().chain(&self.histogram).chain([&self.tokens]);
        self.num_experts == num_experts
            && lengths.iter().all(|length| *length == num_experts)
            && counts.into_iter().all(|count| *count < 1 << 48) // sums and squares of them stay numbers
            && self.histogram.iter().sum::<u64>() == self.tokens
            && self.sample_tokens.len() <= SAMPLE
            && offsets.len() == self.sample_tokens.len() + 1
            && offsets.is_sorted()
            && offsets.first() == Some(&0)
            && offsets.last() == Some(&self.sample_experts.len())
            && self.sample_experts.iter().all(|id| (*id as usize) < num_experts)
    }

    /// Adds a batch: scores [n, num_ids] with their routing and token ids [n].
    pub fn add<T: Real>(&mut self, scores_ne: &[T], routing: &Routing, tokens_n: &[u32]) {
        let (e, n) = (routing.num_ids, routing.num_tokens());
        assert_eq!(tokens_n.len(), n, "statistics: the routing is for another number of tokens");
        self.tokens += n as u64;
        self.entropy_sum += losses::entropy(scores_ne, e) * n as f64;
        let p_ne = softmax::probabilities(scores_ne, e);
        for (t, token) in tokens_n.iter().enumerate() {
            let p_e = &p_ne[t * e..(t + 1) * e];
            self.importance_sums_e.iter_mut().zip(p_e).for_each(|(sum, p)| *sum += p.to_f64());
            let experts = || routing.row(t).iter().filter(|id| (**id as usize) < self.num_experts);
            self.histogram[experts().count()] += 1;
            if self.sample_tokens.len() < SAMPLE {
                self.sample_tokens.push(*token);
                self.sample_experts.extend(experts());
                self.sample_offsets.push(self.sample_experts.len());
            }
            for &id in experts() {
                self.counts_e[id as usize] += 1;
            }
        }
    }

    /// Adds what another accumulator saw after this one.
    pub fn merge(&mut self, other: &Statistics) {
        self.tokens += other.tokens;
        self.entropy_sum += other.entropy_sum;
        self.histogram.iter_mut().zip(&other.histogram).for_each(|(a, b)| *a += b);
        self.counts_e.iter_mut().zip(&other.counts_e).for_each(|(a, b)| *a += b);
        self.importance_sums_e.iter_mut().zip(&other.importance_sums_e).for_each(|(a, b)| *a += b);
        let room = SAMPLE - self.sample_tokens.len();
        for (token, span) in other.sample_tokens.iter().zip(other.sample_offsets.windows(2)).take(room) {
            self.sample_tokens.push(*token);
            self.sample_experts.extend_from_slice(&other.sample_experts[span[0]..span[1]]);
            self.sample_offsets.push(self.sample_experts.len());
        }
    }

    /// The figures; `seed` keys the shuffles of the baseline.
    pub fn report(&self, seed: u64) -> Report {
        let tokens = self.tokens.max(1) as f64;
        let total: u64 = self.counts_e.iter().sum();
        let load: Vec<f64> = self.counts_e.iter().map(|c| *c as f64 / total.max(1) as f64).collect();
        let e = self.num_experts as f64;
        let utilisation: Vec<f64> = load.iter().map(|share| e * share).collect();
        let load_imbalance = utilisation.iter().fold(0.0, |m: f64, u| m.max(*u));
        let mean_u = utilisation.iter().sum::<f64>() / e;
        Report {
            tokens: self.tokens,
            experts_per_token: total as f64 / tokens,
            experts_std: self.experts_std(),
            experts_p50: self.percentile(50),
            experts_p95: self.percentile(95),
            experts_max: self.histogram.iter().rposition(|count| *count > 0).unwrap_or(0) as u64,
            histogram: self.histogram.clone(),
            load_imbalance,
            max_vio: load_imbalance - 1.0,
            load_cv: (utilisation.iter().map(|u| (u - mean_u).powi(2)).sum::<f64>() / e).sqrt(),
            router_entropy: self.entropy_sum / tokens,
            importance: self.importance_sums_e.iter().map(|sum| sum / tokens).collect(),
            dead_experts: utilisation.iter().filter(|u| **u < DEAD).count() as u64,
            unused_experts: self.counts_e.iter().filter(|count| **count == 0).count() as u64,
            information: self.information(seed),
            load,
            utilisation,
        }
    }

    /// Population standard deviation of the experts per token, its square exact in integers: 0 where all tokens agree.
    fn experts_std(&self) -> f64 {
        let moment = |power: u32| -> u128 {
            self.histogram.iter().enumerate().map(|(k, count)| (k as u128).pow(power) * u128::from(*count)).sum()
        };
        let (n, sum, squares) = (moment(0), moment(1), moment(2));
        if n == 0 { 0.0 } else { ((n * squares - sum * sum) as f64).sqrt() / n as f64 }
    }

    /// Smallest number of experts that at least `percent` of the tokens do not exceed.
    fn percentile(&self, percent: u64) -> u64 {
        let wanted = (self.tokens * percent).div_ceil(100);
        let mut seen = 0;
        let found = self.histogram.iter().position(|count| {
            seen += count;
            seen >= wanted
        });
        found.unwrap_or(0) as u64
    }

    fn information(&self, seed: u64) -> f64 {
        // Ids are numbered without gaps: the table has a row per id that occurs.
        let mut rows: BTreeMap<u32, usize> = self.sample_tokens.iter().map(|token| (*token, 0)).collect();
        rows.values_mut().enumerate().for_each(|(row, place)| *place = row);
        let tokens: Vec<usize> = self.sample_tokens.iter().map(|token| rows[token]).collect();
        let random = Random::new(seed, Purpose::Shuffle);
        let measured = self.plug_in(rows.len(), |t| tokens[t]);
        let baselines = (0..SHUFFLES).map(|step| {
            let order = random.permutation(step, tokens.len());
            self.plug_in(rows.len(), |t| tokens[order[t]])
        });
        measured - baselines.sum::<f64>() / SHUFFLES as f64
    }

    /// Σ p(v, e) ln(p(v, e) / (p(v) p(e))) over the assignments of the sample, the token in place t having id `token(t)` below `ids`.
    fn plug_in(&self, ids: usize, token: impl Fn(usize) -> usize) -> f64 {
        let e = self.num_experts;
        let (mut joint, mut by_token, mut by_expert) = (vec![0u64; ids * e], vec![0u64; ids], vec![0u64; e]);
        for (t, span) in self.sample_offsets.windows(2).enumerate() {
            for expert in self.sample_experts[span[0]..span[1]].iter().map(|id| *id as usize) {
                joint[token(t) * e + expert] += 1;
                by_token[token(t)] += 1;
                by_expert[expert] += 1;
            }
        }
        let total = self.sample_experts.len() as f64;
        let cell = |(x, count): (usize, &u64)| {
            let fair = by_token[x / e] as f64 * by_expert[x % e] as f64;
            *count as f64 / total * (*count as f64 * total / fair).ln()
        };
        joint.iter().enumerate().filter(|(_, count)| **count > 0).map(cell).sum()
    }
}

/// Raises once when one expert has more than `share` of the load for `epochs` epochs in a row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CollapseAlarm {
    pub share: f64,
    pub epochs: u32,
    run: u32,
}

impl CollapseAlarm {
    pub fn new(share: f64, epochs: u32) -> Self {
        CollapseAlarm { share, epochs, run: 0 }
    }

    /// Takes the load shares of an epoch; true in the epoch that completes the run. A healthy epoch arms it again.
    pub fn observe(&mut self, load: &[f64]) -> bool {
        if load.iter().any(|share| *share > self.share) {
            self.run = self.run.saturating_add(1);
        } else {
            self.run = 0;
        }
        self.run == self.epochs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Assignments, Mode, Policy, RouterInput};
    use std::sync::Arc;
    use tensor::check::normals;

    fn routing(rows: &[&[u32]], num_experts: usize, num_ids: usize) -> Routing {
        let mut row_offsets_n1 = vec![0];
        rows.iter().for_each(|row| row_offsets_n1.push(row_offsets_n1[row_offsets_n1.len() - 1] + row.len()));
        let assignments = Assignments { row_offsets_n1, expert_ids_a: rows.concat(), num_experts };
        Routing { assignments: Arc::new(assignments), num_ids }
    }

    #[test]
    fn the_bytes_of_a_sample_are_those_of_its_vectors_until_it_is_full() {
        let bytes = sample_bytes(1000.0, 2.0);
        assert!((bytes / 1.4 - 1000.0 * (4.0 + 8.0 + 2.0 * 4.0)).abs() < 1.0);
        assert_eq!(sample_bytes(SAMPLE as f64, 1.0), sample_bytes(1e18, 1.0));
    }

    #[test]
    fn a_table_made_by_hand() {
        let mut statistics = Statistics::new(4);
        let rows: [&[u32]; 6] = [&[0], &[0, 1], &[0, 1, 2], &[0], &[], &[0]];
        statistics.add(&[0.0f64; 24], &routing(&rows, 4, 4), &[1, 1, 2, 2, 3, 3]);
        let report = statistics.report(1);
        assert_eq!((report.tokens, &report.histogram[..]), (6, &[1, 3, 1, 1, 0][..]));
        assert_eq!((report.experts_p50, report.experts_p95, report.experts_max), (1, 3, 3));
        assert_eq!(report.experts_per_token, 8.0 / 6.0);
        assert!((report.experts_std - (16.0 / 6.0 - 64.0 / 36.0f64).sqrt()).abs() < 1e-15);
        assert_eq!(report.load, [5.0 / 8.0, 2.0 / 8.0, 1.0 / 8.0, 0.0]);
        assert_eq!(report.utilisation, [2.5, 1.0, 0.5, 0.0]);
        assert_eq!((report.load_imbalance, report.max_vio), (2.5, 1.5));
        assert!((report.load_cv - ((1.5f64.powi(2) + 0.0 + 0.25 + 1.0) / 4.0).sqrt()).abs() < 1e-15);
        assert!((report.router_entropy - 4f64.ln()).abs() < 1e-15);
        assert_eq!(report.importance, [0.25; 4]);
        assert_eq!((report.dead_experts, report.unused_experts), (1, 1));
    }

    #[test]
    fn ids_that_compute_nothing_count_nowhere() {
        let mut statistics = Statistics::new(2);
        statistics.add(&[0.0f32; 9], &routing(&[&[0, 2], &[2], &[1, 0]], 2, 3), &[5, 6, 7]);
        let report = statistics.report(0);
        assert_eq!((report.experts_per_token, &report.histogram[..]), (1.0, &[1, 1, 1][..]));
        assert_eq!(report.load, [2.0 / 3.0, 1.0 / 3.0]);
    }

    #[test]
    fn nothing_seen_gives_finite_figures() {
        let report = Statistics::new(3).report(0);
        assert_eq!(
            (report.tokens, report.experts_per_token, report.experts_std, report.information),
            (0, 0.0, 0.0, 0.0)
        );
        assert_eq!((report.experts_p95, report.unused_experts, report.load_imbalance), (0, 3, 0.0));
    }

    /// A router that sends token v to expert v mod 4, and one that ignores its input.
    fn synthetic(n: usize, informative: bool) -> Statistics {
        let random = Random::new(3, Purpose::Test);
        let tokens: Vec<u32> = (0..n).map(|t| random.below(0, t as u64, 40) as u32).collect();
        let expert = |t: usize| if informative { tokens[t] % 4 } else { random.below(1, t as u64, 4) as u32 };
        let rows: Vec<[u32; 1]> = (0..n).map(|t| [expert(t)]).collect();
        let mut statistics = Statistics::new(4);
        let rows: Vec<&[u32]> = rows.iter().map(|row| &row[..]).collect();
        statistics.add(&vec![0.0f32; n * 4], &routing(&rows, 4, 4), &tokens);
        statistics
    }

    #[test]
    fn information_sees_a_router_that_reads_tokens_and_no_other() {
        let informative = synthetic(4000, true).report(1).information;
        assert!((informative - 4f64.ln()).abs() < 0.03, "{informative}");
        let chance = synthetic(4000, false);
        let plain = chance.plug_in(40, |t| chance.sample_tokens[t] as usize);
        let corrected = chance.report(1).information;
        assert!(plain > 0.01 && corrected.abs() < 0.005, "the bias {plain} is taken off: {corrected}");
    }

    #[test]
    fn a_dead_uniform_router_of_four_uses_exactly_two_experts_and_knows_nothing() {
        let policy = Policy::new(&serde_json::from_str(r#"{"kind":"top_p","p":0.4,"num_experts":4}"#).unwrap(), 0);
        let scores = [0.0f32; 400];
        let tokens: Vec<u32> = (0..100).map(|t| t * t % 17).collect();
        let (routing, _) =
            policy.unwrap().route(&RouterInput::new(&[0, 100], &tokens, 0).with_scores(&scores, 4), Mode::Train);
        let mut statistics = Statistics::new(4);
        statistics.add(&scores, &routing, &tokens);
        let report = statistics.report(7);
        assert_eq!((report.experts_per_token, report.experts_std), (2.0, 0.0));
        assert!(report.information.abs() < 1e-12);
        assert_eq!((report.load_imbalance, report.unused_experts), (2.0, 2));
    }

    /// Random rows, the same with expert ids moved by `shift`.
    fn shifted(shift: u32, from: usize, to: usize) -> Statistics {
        let scores = normals(4, 60 * 5, 1.0);
        let moved: Vec<f64> = (0..300).map(|x| scores[x / 5 * 5 + (x + 5 - shift as usize) % 5]).collect();
        let rows: Vec<Vec<u32>> =
            (0..60u32).map(|t| (0..t % 3).map(|i| (t * t % 4 + i + shift) % 5).collect()).collect();
        let tokens: Vec<u32> = (0..60).map(|t| t % 7).collect();
        let mut statistics = Statistics::new(5);
        let rows: Vec<&[u32]> = rows[from..to].iter().map(Vec::as_slice).collect();
        statistics.add(&moved[from * 5..to * 5], &routing(&rows, 5, 5), &tokens[from..to]);
        statistics
    }

    #[test]
    fn permuting_expert_ids_leaves_every_scalar_unchanged() {
        let (a, b) = (shifted(0, 0, 60).report(1), shifted(2, 0, 60).report(1));
        let scalars = |r: &Report| {
            [
                r.experts_per_token,
                r.experts_std,
                r.experts_p50 as f64,
                r.experts_p95 as f64,
                r.experts_max as f64,
                r.load_imbalance,
                r.max_vio,
                r.load_cv,
                r.router_entropy,
                r.dead_experts as f64,
                r.unused_experts as f64,
                r.information,
            ]
        };
        assert!(scalars(&a).iter().zip(scalars(&b)).all(|(a, b)| (a - b).abs() < 1e-12));
        let turned: Vec<f64> = (0..5).map(|e| a.importance[(e + 3) % 5]).collect();
        assert!(b.importance.iter().zip(turned).all(|(a, b)| (a - b).abs() < 1e-12));
        assert_ne!(a.load, b.load);
    }

    #[test]
    fn merging_batches_equals_one_batch() {
        let whole = shifted(1, 0, 60);
        let mut merged = shifted(1, 0, 23);
        merged.merge(&shifted(1, 23, 60));
        let (a, b) = (whole.report(5), merged.report(5));
        assert_eq!((&a.histogram, &a.load, a.information), (&b.histogram, &b.load, b.information));
        assert!((a.router_entropy - b.router_entropy).abs() < 1e-14);
        assert!(a.importance.iter().zip(&b.importance).all(|(a, b)| (a - b).abs() < 1e-14));
    }

    #[test]
    fn the_alarm_needs_a_run_and_rings_once() {
        let mut alarm = CollapseAlarm::new(0.5, 3);
        let (bad, good) = ([0.6, 0.4], [0.5, 0.5]);
        let rung: Vec<bool> =
            [bad, bad, good, bad, bad, bad, bad, good, bad, bad, bad].iter().map(|l| alarm.observe(l)).collect();
        let at: Vec<usize> = rung.iter().enumerate().filter(|(_, r)| **r).map(|(i, _)| i).collect();
        assert_eq!(at, [5, 10]);
        let text = serde_json::to_string(&alarm).unwrap();
        assert_eq!(serde_json::from_str::<CollapseAlarm>(&text).unwrap(), alarm);
    }
}
