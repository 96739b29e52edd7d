//! Floating-point operations of the matrix products of a training step, from shapes and actual counts: forward once, backward twice (one product
//! for each operand), nothing recomputed, nothing elementwise.

use model::config::{DepthChoice, Model, PositionKind};
use moe_router::depths;

/// Products of one step on documents with these offsets when a token uses `experts_per_token` routed experts of a sparse layer on average, and every shared
/// one. Windows count as wide as they may become. Routed blocks take their capacity of each document, or the measured share `taken` where tokens choose
/// by themselves.
pub fn step(model: &Model, vocab: usize, offsets_b1: &[usize], experts_per_token: f64, taken: Option<f64>) -> f64 {
    3.0 * forward(model, vocab, offsets_b1, experts_per_token, taken)
}

fn forward(model: &Model, vocab: usize, offsets_b1: &[usize], experts_per_token: f64, taken: Option<f64>) -> f64 {
    let n = offsets_b1.last().copied().unwrap_or(0) as f64;
    let (d, width) = (model.hidden_size as f64, model.hidden_size as f64 / model.num_heads as f64);
    let kv = width * model.num_kv_heads as f64;
    let heads = &model.heads;
    // Heads that a token uses: skipped ones need no scores and no values.
    let (active_heads, head_routers) = match heads.routed {
        0 => (model.num_heads, 0),
        routed => (heads.shared + heads.active, heads.shared + routed + if heads.shared > 0 { 2 } else { 0 }),
    };
    let projections = d * (2.0 * d + 2.0 * kv + head_routers as f64);
    let table = match model.position.kind {
        PositionKind::Cope => (model.position.max + 1) as f64,
        _ => 0.0,
    };
    let feed_forward = match model.router.experts() {
        None => 3.0 * d * model.intermediate_size as f64,
        Some(e) => {
            let hidden = experts_per_token * e.expert_hidden_size as f64 + e.shared_width() as f64;
            d * (e.num_experts as f64 + 3.0 * hidden)
        }
    };
    let lengths = || offsets_b1.windows(2).map(|w| w[1] - w[0]);
    // A block that is given so many tokens of each document.
    let block = |lengths: Vec<usize>| {
        let (n, pairs) =
            lengths.iter().fold((0.0, 0.0), |(n, sum), &t| (n + t as f64, sum + pairs(t, model.widest_window())));
        n * (projections + feed_forward) + active_heads as f64 * width * (2.0 * pairs + n * table)
    };
    let passed = |t: usize| match (model.depths.choice, taken) {
        (DepthChoice::Causal, Some(share)) => (share * t as f64).round() as usize,
        _ => depths::taken(model.depths.capacity, t),
    };
    let (whole, part) = (block(lengths().collect()), block(lengths().map(passed).collect()));
    let routed = (0..model.num_layers).filter(|&i| model.depths.routes(i)).count() as f64;
    let blocks = (model.num_layers as f64 - routed) * whole + routed * (part + n * d);
    2.0 * (blocks + n * d * vocab as f64)
}

/// Pairs of query and key of a document of `t` tokens.
fn pairs(t: usize, window: Option<usize>) -> f64 {
    let w = window.map_or(t, |w| w.min(t));
    // The first w queries see 1..=w keys, the others w each.
    (w * (w + 1) / 2 + (t - w) * w) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_agree_with_a_count_by_hand() {
        let mut model = Model { hidden_size: 8, num_layers: 2, num_heads: 4, num_kv_heads: 2, ..Model::default() };
        model.intermediate_size = 16;
        model.position.kind = PositionKind::Rope;
        model.heads.routed = 0;
        model.router = serde_json::from_str(r#"{"kind": "dense"}"#).unwrap();
        // Two documents of 3 and 2 tokens: 6 + 3 pairs; per layer 5 tokens x 8 x (8 + 4 + 4 + 8) and 3 x 8 x 16; output 5 x 8 x 10.
        let layer = 5 * 8 * 24 + 5 * 3 * 8 * 16 + 4 * 2 * 2 * 9;
        assert_eq!(step(&model, 10, &[0, 3, 5], 0.0, None), (3 * 2 * (2 * layer + 5 * 8 * 10)) as f64);
        model.window = Some(2);
        let windowed = layer - 4 * 2 * 2;
        assert_eq!(step(&model, 10, &[0, 3, 5], 0.0, None), (3 * 2 * (2 * windowed + 5 * 8 * 10)) as f64);
        model.window = None;
        // The second block takes 2 tokens of the first document and 1 of the second: 3 + 1 pairs, and it scores all 5.
        model.depths.capacity = 0.5;
        let routed = 3 * 8 * 24 + 3 * 3 * 8 * 16 + 4 * 2 * 2 * 4 + 5 * 8;
        assert_eq!(step(&model, 10, &[0, 3, 5], 0.0, None), (3 * 2 * (layer + routed + 5 * 8 * 10)) as f64);
        // Where tokens choose by themselves, what they were measured to take: 2 and 1 again, then all.
        model.depths.choice = DepthChoice::Causal;
        let measured = |share: f64| step(&model, 10, &[0, 3, 5], 0.0, Some(share));
        assert_eq!(measured(0.6), step(&model, 10, &[0, 3, 5], 0.0, None));
        assert_eq!(measured(1.0), (3 * 2 * (2 * layer + 5 * 8 + 5 * 8 * 10)) as f64);
        model.depths = Default::default();
        model.router = serde_json::from_str(r#"{"kind": "top_p", "num_experts": 4, "expert_hidden_size": 6}"#).unwrap();
        (model.heads.shared, model.heads.routed, model.heads.active) = (1, 3, 2);
        model.position.kind = PositionKind::Cope;
        model.position.max = 7;
        let layer =
            5.0 * 8.0 * (24.0 + 6.0) + 3.0 * 2.0 * (2.0 * 9.0 + 5.0 * 8.0) + 5.0 * 8.0 * (4.0 + 3.0 * 1.5 * 6.0);
        assert_eq!(step(&model, 10, &[0, 3, 5], 1.5, None), 6.0 * (2.0 * layer + 5.0 * 8.0 * 10.0));
        // Two shared experts are two experts more for each of the 5 tokens.
        let shared = r#"{"kind": "top_p", "num_experts": 4, "expert_hidden_size": 6, "shared": 2}"#;
        model.router = serde_json::from_str(shared).unwrap();
        let layer = layer + 5.0 * 8.0 * 3.0 * 2.0 * 6.0;
        assert_eq!(step(&model, 10, &[0, 3, 5], 1.5, None), 6.0 * (2.0 * layer + 5.0 * 8.0 * 10.0));
    }
}
