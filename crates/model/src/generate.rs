//! Continues a document token by token, with cached keys and values or by re-running the whole prefix.

use crate::transformer::{Context, Documents, LayerCache, Transformer, unwatched};
use moe_router::{Mode, Policy};
use tensor::ops::linear::linear;
use tensor::random::Purpose;
use tensor::{Arena, Engine, Precision, Random, Tape};

/// How the next token is chosen. Temperature 0 is greedy (lowest id on ties) and ignores the rest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    pub temperature: f64,
    /// Keep the smallest set of likeliest tokens whose mass reaches this (1 keeps all).
    pub top_p: f64,
    /// Keep this many likeliest tokens (0 keeps all).
    pub top_k: usize,
    pub seed: u64,
}

impl Sampling {
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };

    /// One clear sentence for the first value out of range.
    pub fn validate(&self) -> Result<(), String> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(format!("temperature = {}: must be a number >= 0; 0 is greedy", self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(format!("top_p = {}: must be in (0, 1]; 1 keeps every token", self.top_p));
        }
        Ok(())
    }
}

/// A model ready to compute: architecture, numbers, routing policies with their control state.
#[derive(Clone, Copy)]
pub struct Weights<'m> {
    pub transformer: &'m Transformer,
    pub params: &'m [f32],
    pub policies: &'m [Policy],
    pub engine: Engine,
    pub precision: Precision,
}

impl Weights<'_> {
    /// Logits [n, v] of every position of one document.
    pub fn logits(&self, tokens: &[u32]) -> Vec<f32> {
        self.run(tokens, Context::Documents, false)
    }

    /// Logits of the last position after `tokens` were appended to the cached document.
    pub fn step(&self, cache: &mut [LayerCache<f32>], tokens: &[u32]) -> Vec<f32> {
        self.run(tokens, Context::Cache(cache), true)
    }

    fn run(&self, tokens: &[u32], context: Context<'_, f32>, last_only: bool) -> Vec<f32> {
        let arena = Arena::default();
        let mut tape = Tape::inference(self.engine, self.params, &arena).with_precision(self.precision);
        let documents = Documents::new(tokens.to_vec(), vec![0, tokens.len()]);
        let model = self.transformer;
        let output = model.forward(&mut tape, &documents, self.policies, Mode::Evaluate, context, unwatched());
        let (n, d) = (output.hidden_nd.rows(), output.hidden_nd.width());
        let hidden = if last_only && n > 0 {
            tape.constant(&output.hidden_nd.data()[(n - 1) * d..], 1, d)
        } else {
            output.hidden_nd
        };
        linear(&mut tape, &hidden, model.output).data().to_vec()
    }

    /// At most `max_tokens` tokens after `prompt` (not empty), up to and including `stop`. Learned positions end the text at `position.max`.
    pub fn generate(
        &self,
        prompt: &[u32],
        max_tokens: usize,
        stop: Option<u32>,
        sampling: Sampling,
        cached: bool,
    ) -> Vec<u32> {
        let limit = self
            .transformer
            .config
            .max_positions()
            .map_or(max_tokens, |max| max.saturating_sub(prompt.len()).min(max_tokens));
        let mut text = prompt.to_vec();
        let mut cache = self.transformer.empty_cache();
        let mut fed = 0;
        while text.len() < prompt.len() + limit {
            let logits = if cached {
                let logits = self.step(&mut cache, &text[fed..]);
                fed = text.len();
                logits
            } else {
                let all = self.logits(&text);
                all[all.len() - self.transformer.vocab_size..].to_vec()
            };
            let next = choose(&logits, sampling, text.len() as u64);
            text.push(next);
            if Some(next) == stop {
                break;
            }
        }
        text.split_off(prompt.len())
    }
}

/// The next token: argmax, or a draw from the filtered softmax keyed by (seed, position).
fn choose(logits_v: &[f32], sampling: Sampling, position: u64) -> u32 {
    let mut order: Vec<usize> = (0..logits_v.len()).collect();
    order.sort_by(|a, b| logits_v[*b].total_cmp(&logits_v[*a])); // stable: lower id first on ties
    if sampling.temperature == 0.0 {
        return order[0] as u32;
    }
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k);
    }
    let top = f64::from(logits_v[order[0]]);
    let mass: Vec<f64> = order.iter().map(|i| ((f64::from(logits_v[*i]) - top) / sampling.temperature).exp()).collect();
    let total: f64 = mass.iter().sum();
    let mut kept = 0.0;
    let nucleus = mass.iter().take_while(|m| {
        let inside = kept < sampling.top_p * total;
        kept += **m;
        inside
    });
    let nucleus = nucleus.count().max(1);
    let inside: f64 = mass[..nucleus].iter().sum();
    let mut left = Random::new(sampling.seed, Purpose::Sampling).uniform(0, position) * inside;
    for (i, m) in order[..nucleus].iter().zip(&mass) {
        left -= m;
        if left < 0.0 {
            return *i as u32;
        }
    }
    order[nucleus - 1] as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampling_matches_its_distribution_and_its_filters() {
        let logits = [1.0f32, 3.0, 2.0, -1.0];
        assert_eq!(choose(&logits, Sampling::GREEDY, 0), 1);
        assert_eq!(choose(&[2.0, 2.0], Sampling::GREEDY, 0), 0);
        let draw = |sampling: Sampling| {
            let mut counts = [0usize; 4];
            (0..20_000).for_each(|i| counts[choose(&logits, sampling, i) as usize] += 1);
            counts.map(|c| c as f64 / 20_000.0)
        };
        let plain = Sampling { temperature: 1.0, top_p: 1.0, top_k: 0, seed: 4 };
        let total: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
        for (share, logit) in draw(plain).iter().zip(logits) {
            assert!((share - f64::from(logit).exp() / total).abs() < 0.015);
        }
        assert_eq!(draw(Sampling { top_k: 1, ..plain })[1], 1.0);
        let nucleus = draw(Sampling { top_p: 0.8, ..plain }); // 0.66 + 0.24 passes 0.8
        assert!(nucleus[0] == 0.0 && nucleus[3] == 0.0 && nucleus[2] > 0.2);
        assert!(draw(Sampling { temperature: 0.05, ..plain })[1] > 0.999);
    }
}
