//! bf16 as bits, alone in the upper half of four bytes or two side by side.

/// The bits of the nearest bf16 in the upper half, ties to even; NaN stays NaN.
#[inline(always)]
pub fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let nan = if x.is_nan() { u32::MAX } else { 0 }; // masks, not branches: this is vectorised
    (rounded & !nan | (bits | 0x0040_0000) & nan) & 0xffff_0000
}

/// Two numbers as bf16, the first in the lower half.
#[inline(always)]
pub fn pair(first: f32, second: f32) -> u32 {
    round(first) >> 16 | round(second)
}

/// The two numbers of a pair.
#[inline(always)]
pub fn apart(pair: u32) -> [f32; 2] {
    [f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000)]
}
