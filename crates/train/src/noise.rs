//! The gradient noise scale B = tr Σ / |G|² (McCandlish 2018, arXiv 1812.06162): about the number of documents in a batch from which on a larger
//! one hardly helps. Σ is the covariance of the gradient of one document, G the gradient of all; both are told apart by the squared norms of the
//! gradients of two batch sizes, here the whole batch and its accumulated parts.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// How much of the running means stays at each measurement.
const DECAY: f64 = 0.99;

/// Numbers summed in one go; fixed, for it decides the order of summation.
const BLOCK: usize = 4096;

/// Squared gradient norms of one batch. E|g|² = |G|² + tr Σ / documents, so parts of different sizes enter by the mean of 1 / documents.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// Mean over the parts of |g_part|².
    pub parts: f64,
    /// Mean over the parts of 1 / documents.
    pub per_part: f64,
    /// |g|² of the whole batch, before clipping.
    pub whole: f64,
    /// 1 / documents of the whole batch.
    pub per_whole: f64,
}

/// Running means of both estimates; part of every checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NoiseScale {
    /// |G|².
    signal: f64,
    /// tr Σ.
    noise: f64,
}

impl NoiseScale {
    /// Takes a batch into the means. Either estimate of one batch may be negative: they are without bias, their ratio is not.
    pub fn add(&mut self, sample: &Sample) {
        let noise = (sample.parts - sample.whole) / (sample.per_part - sample.per_whole);
        let signal = sample.whole - noise * sample.per_whole;
        if noise.is_finite() && signal.is_finite() {
            self.noise += (1.0 - DECAY) * (noise - self.noise);
            self.signal += (1.0 - DECAY) * (signal - self.signal);
        }
    }

    /// tr Σ / |G|² in documents; none where nothing of |G|² can be told from noise.
    pub fn scale(&self) -> Option<f64> {
        (self.signal > 0.0).then(|| self.noise.max(0.0) / self.signal)
    }

    /// Whether this, read from a file, can be gone on with.
    pub fn fits(&self) -> bool {
        self.signal.is_finite() && self.noise.is_finite()
    }
}

/// |a - b|² in f64, the same for any number of threads.
pub fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    let block = |(a, b): (&[f32], &[f32])| -> f64 {
        a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
    };
    a.par_chunks(BLOCK).zip(b.par_chunks(BLOCK)).map(block).collect::<Vec<f64>>().into_iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::learner::small;
    use tensor::random::{Purpose, Random};

    const WIDTH: usize = 400;

    /// Gradients G + Σ^½ ξ of documents with |G|² and tr Σ known; their means in parts of these sizes and as a whole.
    fn estimate(sizes: &[usize], steps: u64) -> (f64, f64) {
        let random = Random::new(5, Purpose::Test);
        let deviation = |j: usize| if j < WIDTH / 2 { 3.0 } else { 1.0 };
        let gradient = |j: usize| 0.3 * (j as f64 * 0.7).sin();
        let (signal, noise) = (0..WIDTH).fold((0.0, 0.0), |(signal, noise), j| {
            (signal + gradient(j) * gradient(j), noise + deviation(j) * deviation(j))
        });
        let total: usize = sizes.iter().sum();
        let mut scale = NoiseScale::default();
        for step in 0..steps {
            let mut sample = Sample { per_whole: 1.0 / total as f64, ..Sample::default() };
            let mut whole = vec![0.0; WIDTH];
            for (part, size) in sizes.iter().enumerate() {
                // The mean of `size` documents is normal with a variance of 1 / size.
                let index = |j: usize| (part * WIDTH + j) as u64;
                let of = |j: usize| gradient(j) + deviation(j) * random.normal(step, index(j)) / (*size as f64).sqrt();
                let mean: Vec<f64> = (0..WIDTH).map(of).collect();
                sample.parts += mean.iter().map(|g| g * g).sum::<f64>() / sizes.len() as f64;
                sample.per_part += 1.0 / *size as f64 / sizes.len() as f64;
                whole.iter_mut().zip(&mean).for_each(|(w, g)| *w += g * *size as f64 / total as f64);
            }
            sample.whole = whole.iter().map(|g| g * g).sum();
            scale.add(&sample);
        }
        (scale.scale().unwrap(), noise / signal)
    }

    #[test]
    fn the_noise_scale_of_gaussian_gradients_is_found_within_five_percent() {
        for sizes in [&[64, 64][..], &[200, 100, 100], &[32; 8]] {
            let (found, known) = estimate(sizes, 2000);
            assert!(known > 50.0 && (found / known - 1.0).abs() < 0.05, "{sizes:?}: {found}, known {known}");
        }
    }

    #[test]
    fn the_parts_of_an_update_are_measured_one_by_one_and_nothing_else_changes() {
        let (mut learner, settings, batch) = small::learner(&["train.accumulate=3", "train.noise_scale=1"]);
        let found = small::look(&mut learner, &settings, &batch);
        let sample = found.noise.unwrap();
        let grads = learner.grads.clone();
        let (mut quiet, plain, _) = small::learner(&["train.accumulate=3"]);
        assert!(small::look(&mut quiet, &plain, &batch).noise.is_none());
        assert!(quiet.grads == grads, "measuring must not change the gradient");
        let parts = batch.split(3);
        let (mut squares, mut inverse) = (0.0, 0.0);
        for part in &parts {
            squares += small::look(&mut quiet, &plain, part).grad_norm.powi(2) / 3.0;
            inverse += 1.0 / part.documents.len() as f64 / 3.0;
        }
        assert!((sample.parts / squares - 1.0).abs() < 1e-5, "{} {squares}", sample.parts);
        assert!((sample.whole / found.grad_norm.powi(2) - 1.0).abs() < 1e-12);
        assert!((sample.per_part - inverse).abs() < 1e-15 && sample.per_whole == 0.25);
        // A batch that cannot be parted has nothing to compare.
        assert!(small::look(&mut learner, &settings, &parts[0].slice(0..1)).noise.is_none());
    }

    #[test]
    fn equal_parts_have_no_noise_and_pure_noise_has_no_scale() {
        let mut still = NoiseScale::default();
        still.add(&Sample { parts: 4.0, per_part: 0.5, whole: 4.0, per_whole: 0.25 });
        assert_eq!(still.scale(), Some(0.0));
        let mut noise = NoiseScale::default();
        noise.add(&Sample { parts: 4.0, per_part: 0.5, whole: 1.9, per_whole: 0.25 });
        assert_eq!(noise.scale(), None);
        // One part is the whole: nothing can be told, and nothing is taken in.
        noise.add(&Sample { parts: 4.0, per_part: 0.25, whole: 4.0, per_whole: 0.25 });
        assert!(noise.fits() && noise == serde_json::from_str(&serde_json::to_string(&noise).unwrap()).unwrap());
        let (a, b): (Vec<f32>, Vec<f32>) = (0..10_000).map(|i| (i as f32, i as f32 - 0.5)).unzip();
        assert_eq!(squared_distance(&a, &b), 2500.0);
    }
}
