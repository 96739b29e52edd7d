//! How broadly tokens attend, as a signal for the windows of the layer above.

use super::Choice;
use crate::Real;
use std::sync::Arc;

/// The entropies [n, heads] of the weights of rows at `positions` of their documents, each divided by ln of the keys it sees, mean over the heads that
/// serve the row. A row that sees itself alone has 1: nothing says that it needs less.
pub(super) fn breadth<T: Real>(
    entropies_nh: &[T],
    heads: usize,
    positions: impl Iterator<Item = usize>,
    windows_n: &Arc<[u32]>,
    choice: Option<&Choice>,
) -> Vec<f64> {
    let row = |(t, position): (usize, usize)| {
        let keys = (position + 1).min(windows_n[t] as usize);
        if keys == 1 {
            return 1.0;
        }
        let served = (0..heads).filter(|&h| choice.is_none_or(|choice| choice.serves(h, t)));
        let (sum, count) =
            served.fold((0.0, 0.0), |(sum, count), h| (sum + entropies_nh[t * heads + h].to_f64(), count + 1.0));
        (sum / f64::max(count, 1.0) / (keys as f64).ln()).clamp(0.0, 1.0)
    };
    positions.enumerate().map(row).collect()
}
