//! Mixture-of-depths (Raposo 2024, arXiv 2404.02258): which tokens a routed block takes. The best of a document are the ceil(c·T) tokens with the
//! highest scores: training that takes them looks at later tokens. Evaluation and decoding take every token whose score says so itself: σ(r) > ½; training
//! may do so too. The binary cross-entropy of σ(r) against "is one of the best" teaches the scores to say the same.

use std::sync::Arc;
use tensor::Real;
use tensor::kernels::parallel;

/// The tokens that a block takes out of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// Their rows, rising.
    pub rows_m: Arc<[u32]>,
    /// Where each document starts among them; the last entry is m.
    pub offsets_b1: Arc<[usize]>,
    /// Tokens of the batch.
    pub n: usize,
}

/// How many of `tokens` a share `capacity` is: at least one of any.
pub fn taken(capacity: f64, tokens: usize) -> usize {
    // 0.1 · 30 is a little more than 3.
    ((capacity * tokens as f64 - 1e-9).ceil().max(0.0) as usize).clamp(usize::from(tokens > 0), tokens)
}

/// The ceil(c·T) best of every document, the lower index first where scores are equal; a NaN is worse than any number.
pub fn best<T: Real>(scores_n: &[T], offsets_b1: &[usize], capacity: f64) -> Selection {
    let key = |t: usize| if scores_n[t].to_f64().is_nan() { f64::NEG_INFINITY } else { scores_n[t].to_f64() };
    let document = |b: &[usize]| {
        let mut order: Vec<usize> = (b[0]..b[1]).collect();
        order.sort_by(|&i, &j| key(j).total_cmp(&key(i))); // stable
        order.truncate(taken(capacity, b[1] - b[0]));
        order.sort_unstable();
        order
    };
    Selection::new(scores_n.len(), offsets_b1.windows(2).map(document))
}

/// Every token with σ(r) > ½.
pub fn causal<T: Real>(scores_n: &[T], offsets_b1: &[usize]) -> Selection {
    let document = |b: &[usize]| (b[0]..b[1]).filter(|&t| scores_n[t] > T::ZERO).collect::<Vec<usize>>();
    Selection::new(scores_n.len(), offsets_b1.windows(2).map(document))
}

impl Selection {
    fn new(n: usize, documents: impl Iterator<Item = Vec<usize>>) -> Self {
        let (mut rows, mut offsets) = (Vec::new(), vec![0]);
        for document in documents {
            rows.extend(document.into_iter().map(|t| t as u32));
            offsets.push(rows.len());
        }
        Selection { rows_m: rows.into(), offsets_b1: offsets.into(), n }
    }

    /// The row of token t among the taken ones.
    pub fn row(&self, t: usize) -> Option<usize> {
        self.rows_m.binary_search(&(t as u32)).ok()
    }

    /// Share of the tokens that are taken.
    pub fn share(&self) -> f64 {
        self.rows_m.len() as f64 / self.n.max(1) as f64
    }

    /// Share of the tokens that the causal rule would take, and share for which it says the same as this selection.
    pub fn foretold<T: Real>(&self, scores_n: &[T]) -> (f64, f64) {
        let (mut taken, mut agreed) = (0usize, 0usize);
        for (t, score) in scores_n.iter().enumerate() {
            taken += usize::from(*score > T::ZERO);
            agreed += usize::from((*score > T::ZERO) == self.row(t).is_some());
        }
        let n = self.n.max(1) as f64;
        (taken as f64 / n, agreed as f64 / n)
    }
}

/// Mean over tokens of -ln σ(r) for those of the selection and -ln(1 - σ(r)) for the others.
pub fn loss<T: Real>(scores_n: &[T], selection: &Selection) -> f64 {
    let term = |t: usize| {
        let r = scores_n[t].to_f64();
        r.max(0.0) + (-r.abs()).exp().ln_1p() - if selection.row(t).is_some() { r } else { 0.0 }
    };
    parallel::sum(scores_n.len(), term) / scores_n.len().max(1) as f64
}

/// dscores += upstream · (σ(r) - taken) / n.
pub fn loss_backward<T: Real>(scores_n: &[T], selection: &Selection, upstream: T, dscores_n: &mut [T]) {
    let scale = upstream.to_f64() / scores_n.len().max(1) as f64;
    for (t, (r, d)) in scores_n.iter().zip(dscores_n).enumerate() {
        let target = if selection.row(t).is_some() { 1.0 } else { 0.0 };
        *d += T::from_f64(scale * (1.0 / (1.0 + (-r.to_f64()).exp()) - target));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_of_every_document_are_taken_the_lower_index_first() {
        assert_eq!([(0.5, 3), (0.1, 30), (0.125, 1), (1.0, 7), (0.3, 0)].map(|(c, t)| taken(c, t)), [2, 3, 1, 7, 0]);
        let scores = [0.1, 0.9, 0.9, 0.9, -1.0, f64::NAN, -3.0];
        let selection = best(&scores, &[0, 4, 4, 7], 0.5);
        assert_eq!(&selection.rows_m[..], &[1, 2, 4, 6]);
        assert_eq!(&selection.offsets_b1[..], &[0, 2, 2, 4]);
        assert_eq!((selection.row(2), selection.row(3), selection.share()), (Some(1), None, 4.0 / 7.0));
        let causal = causal(&scores, &[0, 4, 4, 7]);
        assert_eq!((&causal.rows_m[..], &causal.offsets_b1[..]), (&[0, 1, 2, 3][..], &[0, 4, 4, 4][..]));
        assert_eq!(selection.foretold(&scores), (4.0 / 7.0, 3.0 / 7.0));
    }

    #[test]
    fn the_loss_is_the_cross_entropy_and_finite_for_large_scores() {
        let scores = [0.0, 2.0, -1.0, 800.0];
        let selection = best(&scores, &[0, 4], 0.5);
        assert_eq!(&selection.rows_m[..], &[1, 3]);
        let expected = (2f64.ln() + (1.0 + (-2f64).exp()).ln() + (1.0 + (-1f64).exp()).ln()) / 4.0;
        assert!((loss(&scores, &selection) - expected).abs() < 1e-12);
        let mut gradient = [0.0; 4];
        loss_backward(&scores, &selection, 1.0, &mut gradient);
        assert!(gradient[1] < 0.0 && gradient[0] == 0.125 && gradient[3] == 0.0, "{gradient:?}");
    }
}
