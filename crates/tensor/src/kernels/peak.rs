//! The most arithmetic this machine does: products of registers, no memory. What a share of peak is a share of.
#![allow(unsafe_code)]

use super::isa::{self, Isa};
use crate::Precision;
use rayon::prelude::*;
use std::hint::black_box;
use std::time::Instant;

/// Chains of multiply-adds that are in flight at once: more than latency x units of any machine.
const CHAINS: usize = 12;
const ROUNDS: usize = 1 << 18;
const TRIES: usize = 5;

/// Best rate of multiply-adds into f32, of operands as `precision` says, of all threads of the current pool together: FLOP/s. Where an instruction set
/// has no instruction for bf16 it is the rate of f32.
pub fn register_flops(precision: Precision) -> f64 {
    let threads = rayon::current_num_threads();
    let mut best = 0.0f64;
    for _ in 0..TRIES {
        let start = Instant::now();
        let work: usize = (0..threads).into_par_iter().with_max_len(1).map(|_| chains(precision)).sum();
        best = best.max(work as f64 / start.elapsed().as_secs_f64());
    }
    best
}

/// Runs the chains once with the widest registers of this process and returns how many operations they were.
fn chains(precision: Precision) -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        let isa = isa::current();
        if isa >= Isa::Amx && precision == Precision::Bf16 {
            return super::gemm::tile_chains(ROUNDS / 8);
        }
        if isa >= Isa::Avx512Bf16 && precision == Precision::Bf16 {
            // SAFETY: the machine has AVX512-BF16.
            return unsafe { chains_bf16() };
        }
        if isa >= Isa::Avx512 {
            // SAFETY: the machine has AVX-512F.
            return unsafe { chains_avx512() };
        }
        if isa >= Isa::Avx2 {
            // SAFETY: the machine has AVX2 and FMA.
            return unsafe { chains_avx2() };
        }
    }
    let _ = precision;
    multiply_add()
}

/// Defines chains of one instruction: `of` makes an operand of a number, `add` a sum of a sum and two operands; `operations` are those of one.
#[cfg(target_arch = "x86_64")]
macro_rules! chains {
    ($name:ident, $set:literal, $operations:literal, $sum:ident, $of:expr, $add:expr) => {
        #[target_feature(enable = $set)]
        fn $name() -> usize {
            use std::arch::x86_64::*;
            let [a, b] = [0.999, 0.001].map(|x: f32| ($of)(black_box(x)));
            let mut sums = [$sum(black_box(1.0)); CHAINS];
            for _ in 0..ROUNDS {
                for sum in &mut sums {
                    *sum = ($add)(*sum, a, b);
                }
            }
            black_box(&sums);
            $operations * CHAINS * ROUNDS
        }
    };
}
#[cfg(target_arch = "x86_64")]
chains!(
    chains_bf16,
    "avx512f,avx512bf16",
    64,
    _mm512_set1_ps,
    |x| _mm512_cvtne2ps_pbh(_mm512_set1_ps(x), _mm512_set1_ps(x)),
    |sum, a, b| _mm512_dpbf16_ps(sum, a, b)
);
#[cfg(target_arch = "x86_64")]
chains!(chains_avx512, "avx512f", 32, _mm512_set1_ps, |x| _mm512_set1_ps(x), |sum, a, b| _mm512_fmadd_ps(sum, a, b));
#[cfg(target_arch = "x86_64")]
chains!(chains_avx2, "avx2,fma", 16, _mm256_set1_ps, |x| _mm256_set1_ps(x), |sum, a, b| _mm256_fmadd_ps(sum, a, b));

fn multiply_add() -> usize {
    const LANES: usize = 4;
    let mut sums = [[1.0f32; LANES]; CHAINS];
    let (a, b) = ([black_box(0.999_f32); LANES], [black_box(0.001_f32); LANES]);
    for _ in 0..ROUNDS {
        for sum in &mut sums {
            for lane in 0..LANES {
                sum[lane] = sum[lane] * a[lane] + b[lane];
            }
        }
    }
    black_box(&sums);
    2 * LANES * CHAINS * ROUNDS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::gemm::{Matrix, matmul};

    /// Half, because tests beside this one take their share of the machine.
    #[test]
    fn no_product_is_much_faster_than_the_peak() {
        const N: usize = 512;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let (a, mut c) = (vec![1.0f32; N * N], vec![0.0; N * N]);
        for precision in [Precision::F32, Precision::Bf16] {
            let product = pool.install(|| {
                let rates = (0..TRIES).map(|_| {
                    let start = Instant::now();
                    matmul(precision, &mut c, Matrix::new(&a, N, N), Matrix::new(&a, N, N), false);
                    2.0 * (N * N * N) as f64 / start.elapsed().as_secs_f64()
                });
                rates.fold(0.0, f64::max)
            });
            let peak = pool.install(|| register_flops(precision));
            assert!(peak > 0.5 * product, "{precision:?}: peak {peak:.3e}, product {product:.3e}");
        }
    }
}
