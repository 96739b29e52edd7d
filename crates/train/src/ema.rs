//! The exponential moving average of the parameters (Polyak averaging), evaluated beside them.

use rayon::prelude::*;

/// Numbers one task updates.
const CHUNK: usize = 1 << 14;

/// d_t = min(d, (1 + t) / (10 + t)) after t = `updates`, with d = `most`: what the first, untrained parameters leave in the mean is soon forgotten,
/// however long its memory.
pub fn decay(most: f64, updates: u64) -> f64 {
    let t = updates as f64;
    most.min((1.0 + t) / (10.0 + t))
}

/// mean ← mean + (1 - decay) · (w - mean), number by number.
pub fn track(mean: &mut [f32], params: &[f32], decay: f64) {
    let share = (1.0 - decay) as f32;
    mean.par_chunks_mut(CHUNK).zip(params.par_chunks(CHUNK)).for_each(|(mean, params)| {
        mean.iter_mut().zip(params).for_each(|(mean, w)| *mean += share * (w - *mean));
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_the_weighted_mean_of_all_steps_whatever_the_threads(
            decay in 0.0f64..0.9999,
            steps in prop::collection::vec(prop::collection::vec(-10.0f32..10.0, 5), 1..30),
        ) {
            let mut mean = steps[0].clone();
            let mut plain: Vec<f64> = steps[0].iter().map(|&w| f64::from(w)).collect();
            for w in &steps {
                track(&mut mean, w, decay);
                plain.iter_mut().zip(w).for_each(|(mean, &w)| *mean = decay * *mean + (1.0 - decay) * f64::from(w));
            }
            for (mean, plain) in mean.iter().zip(&plain) {
                prop_assert!((f64::from(*mean) - plain).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn the_decay_grows_from_a_tenth_to_its_value_and_stays_there() {
        assert_eq!([0, 1, 8, 90].map(|t| decay(0.999, t)), [0.1, 2.0 / 11.0, 0.5, 0.91]);
        assert_eq!([0, 79, 80, 81, u64::MAX].map(|t| decay(0.9, t)), [0.1, 80.0 / 89.0, 0.9, 0.9, 0.9]);
        assert_eq!(decay(0.05, 0), 0.05, "never above its value");
        // A constant decay would leave 0.999^200 = 0.82 of the first parameters in the mean.
        let left = |updates: u64| (0..updates).map(|t| decay(0.999, t)).product::<f64>();
        assert!(left(200) < 1e-9 && left(1) == 0.1, "{}", left(200));
    }

    #[test]
    fn the_bytes_do_not_depend_on_the_threads_and_a_mean_of_one_value_is_it() {
        let params: Vec<f32> = (0..3 * CHUNK + 7).map(|i| (i as f32).sin()).collect();
        let means = [1, 3].map(|threads| {
            let mut mean = vec![0.25; params.len()];
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| (0..5).for_each(|_| track(&mut mean, &params, 0.9)));
            mean
        });
        assert_eq!(means[0], means[1]);
        let mut mean = params.clone();
        track(&mut mean, &params, 0.999);
        assert_eq!(mean, params);
        track(&mut mean, &vec![1.0; params.len()], 0.0);
        assert!(mean.iter().all(|&mean| (mean - 1.0).abs() < 1e-6));
    }
}
