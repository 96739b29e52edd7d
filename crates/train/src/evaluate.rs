//! Evaluation: losses without gradients, and greedy answers compared token for token.

use crate::data::{Batch, Document, Split, TextSource};
use crate::dataset::{Dataset, Question};
use crate::routing::Recording;
use model::generate::{Sampling, Weights};
use model::transformer::{Context, Documents, Output, unwatched};
use moe_router::Mode;
use rayon::prelude::*;
use serde_json::{Value, json};
use tensor::ops::cross_entropy::{Targets, cross_entropy};
use tensor::{Arena, Tape};

/// Tokens evaluated in one pass.
const PASS: usize = 2048;

/// Mean cross-entropy over documents: macro (mean over sequences of per-sequence means) and micro (per token), in nats. None without targets.
pub fn losses(weights: &Weights<'_>, documents: &[&Document]) -> Option<(f64, f64)> {
    let arena = Arena::default();
    let (mut sequences, mut macro_sum, mut targets, mut micro_sum) = (0usize, 0.0, 0usize, 0.0);
    for losses_t in passes(documents).flat_map(|part| row_losses(weights, part, &arena)) {
        if losses_t.is_empty() {
            continue;
        }
        let sum: f64 = losses_t.iter().sum();
        macro_sum += sum / losses_t.len() as f64;
        micro_sum += sum;
        sequences += 1;
        targets += losses_t.len();
    }
    (targets > 0).then(|| (macro_sum / sequences as f64, micro_sum / targets as f64))
}

/// Mean cross-entropy per token over windows of a text, in nats. None without windows.
pub fn window_loss(weights: &Weights<'_>, batches: impl Iterator<Item = Batch>) -> Option<f64> {
    let arena = Arena::default();
    let (mut sum, mut count) = (0.0, 0usize);
    for batch in batches {
        let losses_n = forward(weights, batch.tokens_n, batch.targets_n, batch.offsets_b1, &arena);
        sum += losses_n.iter().sum::<f64>();
        count += losses_n.len();
    }
    (count > 0).then(|| sum / count as f64)
}

/// Held-out loss of each length that a text run draws from, nats per token.
pub fn losses_by_length(weights: &Weights<'_>, text: &TextSource, batches: usize) -> Vec<(usize, f64)> {
    let loss = |length: usize| window_loss(weights, text.eval_batches_of(Split::Validation, length, batches));
    text.lengths().iter().filter_map(|length| Some((*length, loss(*length)?))).collect()
}

/// Share of the tokens that the routed blocks of a mixture of depths take by the causal rule, mean over those blocks. None without them.
pub fn capacity(weights: &Weights<'_>, documents: &[&Document]) -> Option<f64> {
    let arena = Arena::default();
    let (mut taken, mut given) = (0usize, 0usize);
    for document in documents.iter().filter(|_| weights.transformer.config.depths.on()) {
        let tokens = document.tokens[..document.tokens.len().saturating_sub(1)].to_vec();
        let mut tape = Tape::inference(weights.engine, weights.params, &arena).with_precision(weights.precision);
        let batch = Documents::new(tokens.clone(), vec![0, tokens.len()]);
        let (model, policies) = (weights.transformer, weights.policies);
        let output = model.forward(&mut tape, &batch, policies, Mode::Evaluate, Context::Documents, unwatched());
        taken += output.depths.iter().map(|trace| trace.selection.rows_m.len()).sum::<usize>();
        given += output.depths.iter().map(|trace| trace.selection.n).sum::<usize>();
    }
    (given > 0).then(|| taken as f64 / given as f64)
}

/// Cross-entropy of every target of every document.
fn row_losses(weights: &Weights<'_>, documents: &[&Document], arena: &Arena<f32>) -> Vec<Vec<f64>> {
    let inputs = |d: &&Document| d.tokens[..d.tokens.len().saturating_sub(1)].to_vec();
    let targets = |d: &&Document| d.tokens.get(1..).unwrap_or_default().to_vec();
    let tokens_n: Vec<u32> = documents.iter().flat_map(inputs).collect();
    let ids_n: Vec<u32> = documents.iter().flat_map(targets).collect();
    let mut offsets_b1 = vec![0];
    for d in documents {
        offsets_b1.push(offsets_b1[offsets_b1.len() - 1] + d.tokens.len().saturating_sub(1));
    }
    let losses_n = forward(weights, tokens_n, ids_n, offsets_b1.clone(), arena);
    offsets_b1.windows(2).map(|w| losses_n[w[0]..w[1]].to_vec()).collect()
}

/// Cross-entropy of every row of a batch, nothing recorded.
fn forward(
    weights: &Weights<'_>,
    tokens_n: Vec<u32>,
    ids_n: Vec<u32>,
    offsets_b1: Vec<usize>,
    arena: &Arena<f32>,
) -> Vec<f64> {
    let mut tape = Tape::inference(weights.engine, weights.params, arena).with_precision(weights.precision);
    let output = pass(weights, &mut tape, tokens_n, offsets_b1);
    let targets = Targets { weights_n: vec![1.0; ids_n.len()].into(), ids_n: ids_n.into() };
    cross_entropy(&mut tape, &output.hidden_nd, weights.transformer.output, &targets).1
}

fn pass<'a>(
    weights: &Weights<'a>,
    tape: &mut Tape<'a, f32>,
    tokens_n: Vec<u32>,
    offsets_b1: Vec<usize>,
) -> Output<f32> {
    let batch = Documents::new(tokens_n, offsets_b1);
    let context = Context::Documents;
    weights.transformer.forward(tape, &batch, weights.policies, Mode::Evaluate, context, unwatched())
}

/// Losses of every target of each text, nats.
pub fn token_losses(weights: &Weights<'_>, texts: &[Vec<u32>]) -> Vec<Vec<f64>> {
    let documents: Vec<Document> = texts.iter().map(|tokens| Document { tokens: tokens.clone() }).collect();
    let documents: Vec<&Document> = documents.iter().collect();
    let arena = Arena::default();
    passes(&documents).flat_map(|part| row_losses(weights, part, &arena)).collect()
}

/// Notes where the tokens of documents go.
pub fn record(weights: &Weights<'_>, documents: &[&Document], recording: &mut Recording) {
    let arena = Arena::default();
    for part in passes(documents) {
        let tokens_n: Vec<u32> = part.iter().flat_map(|document| document.inputs()).copied().collect();
        let mut offsets_b1 = vec![0];
        part.iter().for_each(|document| offsets_b1.push(offsets_b1[offsets_b1.len() - 1] + document.targets()));
        let mut tape = Tape::inference(weights.engine, weights.params, &arena).with_precision(weights.precision);
        let output = pass(weights, &mut tape, tokens_n.clone(), offsets_b1.clone());
        for (layer, trace) in output.experts.iter().enumerate() {
            recording.add(layer, &tokens_n, &offsets_b1, &trace.routing);
        }
    }
}

/// Documents in parts of about one pass.
fn passes<'d>(documents: &'d [&'d Document]) -> impl Iterator<Item = &'d [&'d Document]> {
    let mut rest = documents;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let mut tokens = 0;
        let fitting = rest.iter().take_while(|document| {
            tokens += document.tokens.len();
            tokens <= PASS
        });
        let (part, others) = rest.split_at(fitting.count().max(1));
        rest = others;
        Some(part)
    })
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Recitation {
    /// Answers equal to the expected one, token for token, the end mark included.
    pub exact: usize,
    pub total: usize,
    /// Mean over questions of the token F1 (bag of tokens) between given and expected answer.
    pub token_f1: f64,
    /// Answers that end with the end mark.
    pub ended: usize,
}

/// Recitation of the training questions, and of their held-out wordings where there are any.
pub fn questions(weights: &Weights<'_>, dataset: &Dataset, limit: usize) -> Vec<(&'static str, Value)> {
    let mut found = Vec::new();
    if !dataset.questions.is_empty() {
        let judged = recite(weights, &dataset.questions, dataset.stop(), limit);
        found.push(("eval/recite", json!(judged.exact)));
        found.push(("eval/recite_total", json!(judged.total)));
        found.push(("eval/token_f1", json!(judged.token_f1)));
        found.push(("eval/ended", json!(judged.ended)));
    }
    if let Some(set) = &dataset.paraphrase_set {
        let judged = recite(weights, &dataset.paraphrases, dataset.stop(), limit);
        let loss = losses(weights, &set.documents.iter().collect::<Vec<_>>());
        found.push(("eval/paraphrase_recite", json!(judged.exact)));
        found.push(("eval/paraphrase_total", json!(judged.total)));
        found.push(("eval/paraphrase_f1", json!(judged.token_f1)));
        found.extend(loss.map(|(mean, _)| ("eval/paraphrase_loss", json!(mean))));
    }
    found
}

/// Greedy answers of at most `limit` tokens to all questions.
pub fn recite(weights: &Weights<'_>, questions: &[Question], stop: Option<u32>, limit: usize) -> Recitation {
    let judged: Vec<(bool, f64, bool)> = questions
        .par_iter()
        .map(|q| {
            let given = weights.generate(&q.prompt, limit, stop, Sampling::GREEDY, true);
            (given == q.answer, token_f1(&given, &q.answer), given.last().copied() == stop && stop.is_some())
        })
        .collect();
    let total = judged.len();
    Recitation {
        exact: judged.iter().filter(|j| j.0).count(),
        total,
        token_f1: if total == 0 { 0.0 } else { judged.iter().map(|j| j.1).sum::<f64>() / total as f64 },
        ended: judged.iter().filter(|j| j.2).count(),
    }
}

/// Harmonic mean of precision and recall of the bag of tokens; 1 for two empty answers.
pub fn token_f1(given: &[u32], expected: &[u32]) -> f64 {
    if given.is_empty() && expected.is_empty() {
        return 1.0;
    }
    let (mut a, mut b) = (given.to_vec(), expected.to_vec());
    a.sort_unstable();
    b.sort_unstable();
    let (mut i, mut j, mut common) = (0, 0, 0);
    while i < a.len() && j < b.len() {
        match a[i].cmp(&b[j]) {
            std::cmp::Ordering::Less => i += 1,
            std::cmp::Ordering::Greater => j += 1,
            std::cmp::Ordering::Equal => (i, j, common) = (i + 1, j + 1, common + 1),
        }
    }
    2.0 * common as f64 / (a.len() + b.len()) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_f1_matches_hand_scored_answers() {
        assert_eq!(token_f1(&[1, 2, 3], &[3, 2, 1]), 1.0);
        assert_eq!(token_f1(&[1, 1], &[1, 2]), 0.5);
        assert_eq!(token_f1(&[], &[1]), 0.0);
        assert_eq!(token_f1(&[4, 5], &[1, 2]), 0.0);
        assert!((token_f1(&[1, 2, 3, 4], &[1, 2]) - 2.0 / 3.0).abs() < 1e-12);
    }
}
