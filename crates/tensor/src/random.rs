//! Counter-based random numbers (Philox 4x32-10, Salmon et al. 2011): a value is a pure function of (seed, purpose, step, index), so there is no
//! state to save and no order to keep.

/// What a number is drawn for; two purposes never share a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    Init = 1,
    DataOrder = 2,
    Sampling = 3,
    Bench = 4,
    Shuffle = 5,
    Augment = 6,
    Length = 7,
    Test = 99,
}

/// The stream of one (seed, purpose).
#[derive(Clone, Copy, Debug)]
pub struct Random {
    key: [u32; 2],
    purpose: u32,
}

const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

impl Random {
    pub fn new(seed: u64, purpose: Purpose) -> Self {
        Random { key: [seed as u32, (seed >> 32) as u32], purpose: purpose as u32 }
    }

    /// The four 32-bit words of block `index` at `step` (step below 2³²).
    pub fn words(&self, step: u64, index: u64) -> [u32; 4] {
        let mut counter = [index as u32, (index >> 32) as u32, step as u32, self.purpose];
        let mut key = self.key;
        for round in 0..10 {
            if round > 0 {
                key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
            }
            let low = u64::from(MULTIPLIER[0]) * u64::from(counter[0]);
            let high = u64::from(MULTIPLIER[1]) * u64::from(counter[2]);
            counter = [
                (high >> 32) as u32 ^ counter[1] ^ key[0],
                high as u32,
                (low >> 32) as u32 ^ counter[3] ^ key[1],
                low as u32,
            ];
        }
        counter
    }

    /// Uniform in [0, 1) with 53 bits.
    pub fn uniform(&self, step: u64, index: u64) -> f64 {
        let w = self.words(step, index);
        let bits = (u64::from(w[0]) << 32 | u64::from(w[1])) >> 11;
        bits as f64 / (1u64 << 53) as f64
    }

    /// Standard normal (Box-Muller on the two halves of one block).
    pub fn normal(&self, step: u64, index: u64) -> f64 {
        let w = self.words(step, index);
        let unit = |a: u32, b: u32| (((u64::from(a) << 32 | u64::from(b)) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        (-2.0 * unit(w[0], w[1]).ln()).sqrt() * (std::f64::consts::TAU * unit(w[2], w[3])).cos()
    }

    /// Uniform integer below `bound` (bound > 0; the bias is below bound / 2⁶⁴).
    pub fn below(&self, step: u64, index: u64, bound: usize) -> usize {
        let w = self.words(step, index);
        let x = u64::from(w[0]) << 32 | u64::from(w[1]);
        ((u128::from(x) * bound as u128) >> 64) as usize
    }

    /// A permutation of 0..n keyed by `step` (Fisher-Yates).
    pub fn permutation(&self, step: u64, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(step, i as u64, i + 1));
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of Random123's kat_vectors for philox4x32 with 10 rounds.
    #[test]
    fn philox_matches_its_published_vectors() {
        let zero = Random { key: [0, 0], purpose: 0 };
        assert_eq!(zero.words(0, 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = Random { key: [u32::MAX; 2], purpose: u32::MAX };
        assert_eq!(ones.words(u64::from(u32::MAX), u64::MAX), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn moments_and_permutations_are_right() {
        let random = Random::new(7, Purpose::Test);
        let draws: Vec<f64> = (0..20_000).map(|i| random.normal(3, i)).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / draws.len() as f64;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.04, "mean {mean}, variance {variance}");
        let mut order = random.permutation(1, 100);
        assert_ne!(order, random.permutation(2, 100));
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }
}
