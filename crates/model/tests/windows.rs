//! Windows of tokens follow their attention in the block below: wide ones change nothing, uniform attention keeps the widest and attention to one key
//! brings the narrowest, the past is blind to the future, decoding and replaying agree.

use model::config::{AdaptiveWindow, AdaptiveWindowKind, Depths, Model, PositionKind};
use model::generate::{Sampling, Weights};
use model::transformer::{Context, Documents, Output, Transformer, unwatched};
use moe_router::Mode;
use tensor::ops::cross_entropy::{Targets, cross_entropy};
use tensor::ops::linear::linear;
use tensor::random::{Purpose, Random};
use tensor::{Arena, Engine, Precision, Tape};

const VOCABULARY: usize = 13;

fn model(kind: PositionKind, window: Option<(usize, usize, usize)>, capacity: f64) -> Transformer {
    let mut config = Model { hidden_size: 24, num_layers: 3, num_heads: 6, num_kv_heads: 3, ..Model::default() };
    (config.intermediate_size, config.position.kind, config.depths) =
        (10, kind, Depths { capacity, ..Depths::default() });
    config.position.max = if kind == PositionKind::Learned { 40 } else { 4 };
    (config.heads.shared, config.heads.routed, config.heads.active) = (2, 4, 2);
    if let Some((min, max, block)) = window {
        config.adaptive_window = AdaptiveWindow { kind: AdaptiveWindowKind::Token, min, max, block };
    }
    config.validate().unwrap();
    Transformer::new(&config, VOCABULARY)
}

fn params(model: &Transformer, scale: f64) -> Vec<f32> {
    let random = Random::new(5, Purpose::Test);
    let mut params = model.initialise(3);
    for (_, p) in model.layout.iter() {
        (0..p.count).flat_map(|m| p.range(m)).for_each(|j| params[j] += (scale * random.normal(0, j as u64)) as f32);
    }
    params
}

fn text(n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * i * 5 + 2) % VOCABULARY as u32).collect()
}

fn look(model: &Transformer, params: &[f32], tokens: &[u32]) -> (Output<f32>, Vec<f32>) {
    let arena = Arena::default();
    let mut tape = Tape::inference(Engine::Cpu, params, &arena);
    let documents = Documents::new(tokens.to_vec(), vec![0, tokens.len()]);
    let policies = model.policies();
    let output = model.forward(&mut tape, &documents, &policies, Mode::Evaluate, Context::Documents, unwatched());
    let logits = linear(&mut tape, &output.hidden_nd, model.output).data().to_vec();
    (output, logits)
}

/// Loss and gradient as bits.
fn step(model: &Transformer, params: &[f32], checkpoints: bool) -> (u32, Vec<u32>) {
    let tokens = text(40);
    let targets = Targets { ids_n: text(41)[1..].into(), weights_n: vec![1.0 / 40.0; 40].into() };
    let arena = Arena::default();
    let mut tape = Tape::new(Engine::Cpu, params, &arena).with_checkpoints(checkpoints);
    let (documents, policies) = (Documents::new(tokens, vec![0, 29, 40]), model.policies());
    let output = model.forward(&mut tape, &documents, &policies, Mode::Train, Context::Documents, unwatched());
    let (loss, _) = cross_entropy(&mut tape, &output.hidden_nd, model.output, &targets);
    drop(output);
    let mut flat = vec![0.0; params.len()];
    let value = loss.scalar().to_bits();
    tape.backward(&loss, &mut flat);
    (value, flat.iter().map(|g| g.to_bits()).collect())
}

const KINDS: [PositionKind; 4] = [PositionKind::Cope, PositionKind::Rope, PositionKind::None, PositionKind::Learned];

#[test]
fn windows_as_long_as_the_documents_change_nothing_and_replays_agree() {
    for kind in KINDS {
        let (plain, wide) = (model(kind, None, 1.0), model(kind, Some((40, 48, 8)), 1.0));
        let numbers = params(&plain, 0.2);
        assert!(step(&plain, &numbers, false) == step(&wide, &numbers, false), "{kind:?}");
        for capacity in [1.0, 0.5] {
            let narrow = model(kind, Some((2, 20, 3)), capacity);
            let numbers = params(&narrow, 0.2);
            assert!(step(&narrow, &numbers, false) == step(&narrow, &numbers, true), "{kind:?} {capacity}");
        }
        let narrow = model(kind, Some((2, 20, 3)), 1.0);
        assert!(
            step(&narrow, &numbers, false) != step(&plain, &numbers, false),
            "{kind:?}: narrow windows have an effect"
        );
    }
}

#[test]
fn uniform_attention_keeps_the_widest_window_and_one_key_brings_the_narrowest() {
    let model = model(PositionKind::None, Some((2, 20, 3)), 1.0);
    let mut numbers = params(&model, 0.2);
    for (name, p) in model.layout.iter().filter(|(name, _)| name.contains("q_proj")) {
        assert!(p.count == 1, "{name}");
        numbers[p.range(0)].fill(0.0);
    }
    let (output, _) = look(&model, &numbers, &text(30));
    assert_eq!(output.windows.len(), 3);
    assert!(output.windows.iter().all(|trace| trace.windows_n.iter().all(|&w| w == 20)), "{:?}", output.windows);
    let (mean, masked) = output.windows[1].mean_and_masked();
    assert_eq!((mean, masked), (20.0, 55.0 / 465.0), "1 + … + 10 of 1 + … + 30 keys");
    // Queries and keys so large that one key takes all.
    let sharp: Vec<f32> = {
        let mut numbers = params(&model, 0.2);
        let layout = &model.layout;
        for (_, p) in layout.iter().filter(|(name, _)| name.contains("q_proj") || name.contains("k_proj")) {
            numbers[p.range(0)].iter_mut().for_each(|w| *w *= 100.0);
        }
        numbers
    };
    // Of tokens that are all different, for equal ones share the attention.
    let (output, _) = look(&model, &sharp, &(0..13).collect::<Vec<u32>>());
    let narrow = output.windows[1].windows_n[2..].iter().filter(|&&w| w == 2).count();
    assert!(narrow >= 9, "{:?}", output.windows[1]);
    assert_eq!(output.windows[0].windows_n[5], 20, "nothing lies below the first block");
}

#[test]
fn the_past_is_blind_to_the_future_and_decoding_equals_the_full_pass() {
    for kind in KINDS {
        for capacity in [1.0, 0.5] {
            let model = model(kind, Some((2, 20, 3)), capacity);
            let (params, policies) = (params(&model, 0.4), model.policies());
            let tokens = text(24);
            let (output, full) = look(&model, &params, &tokens);
            let windows: Vec<u32> = output.windows.iter().flat_map(|trace| trace.windows_n.to_vec()).collect();
            assert!(windows.iter().any(|w| *w != windows[0]), "{kind:?}: windows differ");
            for t in [4, 11, 22] {
                let mut other = tokens.clone();
                other[t + 1] = (other[t + 1] + 4) % VOCABULARY as u32;
                let (_, changed) = look(&model, &params, &other);
                let pairs = full[..(t + 1) * VOCABULARY].iter().zip(&changed);
                assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-4), "{kind:?} {capacity}: {t}");
            }
            let (engine, precision) = (Engine::Cpu, Precision::F32);
            let weights = Weights { transformer: &model, params: &params, policies: &policies, engine, precision };
            let (mut cache, mut fed) = (model.empty_cache(), 0);
            for chunk in [3, 1, 1, 4, 1, 12, 2] {
                let logits = weights.step(&mut cache, &tokens[fed..fed + chunk]);
                fed += chunk;
                let expected = &full[(fed - 1) * VOCABULARY..fed * VOCABULARY];
                let worst = logits.iter().zip(expected).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
                assert!(worst < 1e-4, "{kind:?} {capacity}: {worst}");
            }
            let greedy = |cached| weights.generate(&tokens[..4], 15, None, Sampling::GREEDY, cached);
            assert_eq!(greedy(true), greedy(false));
        }
    }
}
