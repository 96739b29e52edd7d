//! The two float types of the CPU face: f32 trains, f64 lets the very same code be checked by central differences.

use candle_core::WithDType;
use std::iter::Sum;
use std::ops::Neg;

/// f32 or f64. Conversions are `T::from_f64` and `x.to_f64` of candle's `WithDType`.
pub trait Real: WithDType + Default + Neg<Output = Self> + Sum + gemm_types::Gemm {
    const ZERO: Self;
    const ONE: Self;
    const INFINITY: Self;
    fn exp(self) -> Self;
    fn ln(self) -> Self;
    fn sqrt(self) -> Self;
    fn floor(self) -> Self;
    fn abs(self) -> Self;
    /// self · a + b, rounded once; a slow call where the code around it is not compiled for a machine that fuses.
    fn mul_add(self, a: Self, b: Self) -> Self;
    fn max(self, other: Self) -> Self;
    fn min(self, other: Self) -> Self;
    fn finite(self) -> bool;
    /// Total order: NaN sorts after every number, so that a sort never panics.
    fn total_order(&self, other: &Self) -> std::cmp::Ordering;
    /// 1 / (1 + exp(-x)), without overflow at either end.
    fn sigmoid(self) -> Self {
        Self::ONE / (Self::ONE + (-self).exp())
    }
}

mod gemm_types {
    /// Marker that keeps `Real` closed to the types the matrix product knows.
    pub trait Gemm {}
    impl Gemm for f32 {}
    impl Gemm for f64 {}
}

macro_rules! real {
    ($t:ty) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const INFINITY: Self = <$t>::INFINITY;
            #[inline(always)]
            fn exp(self) -> Self {
                <$t>::exp(self)
            }
            #[inline(always)]
            fn ln(self) -> Self {
                <$t>::ln(self)
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                <$t>::sqrt(self)
            }
            #[inline(always)]
            fn floor(self) -> Self {
                <$t>::floor(self)
            }
            #[inline(always)]
            fn abs(self) -> Self {
                <$t>::abs(self)
            }
            #[inline(always)]
            fn mul_add(self, a: Self, b: Self) -> Self {
                <$t>::mul_add(self, a, b)
            }
            #[inline(always)]
            fn max(self, other: Self) -> Self {
                <$t>::max(self, other)
            }
            #[inline(always)]
            fn min(self, other: Self) -> Self {
                <$t>::min(self, other)
            }
            #[inline(always)]
            fn finite(self) -> bool {
                <$t>::is_finite(self)
            }
            #[inline(always)]
            fn total_order(&self, other: &Self) -> std::cmp::Ordering {
                self.total_cmp(other)
            }
        }
    };
}
real!(f32);
real!(f64);
