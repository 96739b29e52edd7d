//! Mixture of depths: a routed block that takes every token with factor 1 is the block, tokens it does not take keep their bits, the causal rule is
//! causal and the one of training is not, decoding equals the full pass, gradients agree with differences.

use model::config::{DepthChoice, Depths, Model, PositionKind};
use model::generate::{Sampling, Weights};
use model::transformer::{Context, Documents, Forward, Output, Transformer, Watch, unwatched};
use moe_router::{Config, Mode, node};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use tensor::ops::combine::weighted_sum;
use tensor::ops::cross_entropy::{Targets, cross_entropy};
use tensor::ops::linear::linear;
use tensor::random::{Purpose, Random};
use tensor::{Arena, Engine, Precision, Tape, Value};

const VOCABULARY: usize = 13;
const WIDTH: usize = 24;

/// Routed experts and a shared one.
fn sparse() -> Config {
    let text = r#"{"kind": "top_p", "num_experts": 4, "expert_hidden_size": 6, "shared": 1, "init_std": 0.5}"#;
    serde_json::from_str(text).unwrap()
}

fn model(kind: PositionKind, router: Config, depths: Depths) -> Transformer {
    let mut config = Model { hidden_size: WIDTH, num_layers: 2, num_heads: 6, num_kv_heads: 3, ..Model::default() };
    (config.intermediate_size, config.router, config.position.kind, config.depths) = (10, router, kind, depths);
    config.position.max = if kind == PositionKind::Learned { 24 } else { 4 };
    (config.heads.shared, config.heads.routed, config.heads.active) = (2, 4, 2);
    config.validate().unwrap();
    Transformer::new(&config, VOCABULARY)
}

fn all(capacity: f64) -> Vec<Transformer> {
    let mut models = Vec::new();
    for kind in [PositionKind::Cope, PositionKind::Rope, PositionKind::None, PositionKind::Learned] {
        for router in [Config::Dense {}, sparse()] {
            for (every, choice) in [(1, DepthChoice::Best), (2, DepthChoice::Best), (2, DepthChoice::Causal)] {
                models.push(model(kind, router.clone(), Depths { capacity, every, choice }));
            }
        }
    }
    models
}

/// Initial values moved off their special points.
fn params(model: &Transformer) -> Vec<f64> {
    let random = Random::new(5, Purpose::Test);
    let mut params: Vec<f64> = model.initialise(3).into_iter().map(f64::from).collect();
    for (_, p) in model.layout.iter() {
        (0..p.count).flat_map(|m| p.range(m)).for_each(|j| params[j] += 0.2 * random.normal(0, j as u64));
    }
    params
}

fn documents() -> (Documents, Targets) {
    let tokens: Vec<u32> = (0..11).map(|i| (i * 7 + 3) % VOCABULARY as u32).collect();
    let ids: Vec<u32> = (0..11).map(|i| (i * 5 + 1) % VOCABULARY as u32).collect();
    (Documents::new(tokens, vec![0, 7, 7, 11]), Targets { ids_n: ids.into(), weights_n: vec![1.0 / 11.0; 11].into() })
}

/// Cross-entropy and half the loss of the depth routers, with gradients and the stream behind the last norm.
fn step<T: Forward>(model: &Transformer, params: &[f64], engine: Engine) -> (f64, Vec<f64>, Vec<f64>) {
    let params: Vec<T> = params.iter().map(|x| T::from_f64(*x)).collect();
    let (documents, targets) = documents();
    let arena = Arena::default();
    let mut tape = Tape::new(engine, &params, &arena);
    let output = model.forward(&mut tape, &documents, &model.policies(), Mode::Train, Context::Documents, unwatched());
    let hidden = output.hidden_nd.data().iter().map(|x| x.to_f64()).collect();
    let mut terms = vec![(cross_entropy(&mut tape, &output.hidden_nd, model.output, &targets).0, 1.0)];
    for trace in &output.depths {
        terms.push((node::depth_loss(&mut tape, &trace.scores_n1, &trace.target), 0.5));
    }
    drop(output);
    let loss = weighted_sum(&mut tape, &terms.iter().map(|(value, c)| (value, *c)).collect::<Vec<_>>());
    let mut flat = vec![T::ZERO; params.len()];
    let value = loss.scalar().to_f64();
    tape.backward(&loss, &mut flat);
    (value, flat.iter().map(|g| g.to_f64()).collect(), hidden)
}

#[test]
fn gradients_agree_with_differences_and_the_cpu_face_with_the_reference() {
    const STEP: f64 = 1e-6;
    for model in all(0.4) {
        let params = params(&model);
        let (value, gradient, _) = step::<f64>(&model, &params, Engine::Cpu);
        for direction in 0..3 {
            let random = Random::new(direction, Purpose::Test);
            let mut vector = vec![0.0; params.len()];
            for (_, p) in model.layout.iter() {
                (0..p.count).flat_map(|m| p.range(m)).for_each(|j| vector[j] = 0.1 * random.normal(1, j as u64));
            }
            let at = |h: f64| {
                let moved: Vec<f64> = params.iter().zip(&vector).map(|(x, v)| x + h * v).collect();
                step::<f64>(&model, &moved, Engine::Cpu).0
            };
            let expected = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            let found: f64 = gradient.iter().zip(&vector).map(|(g, v)| g * v).sum();
            assert!((found - expected).abs() < 1e-6 * (1.0 + expected.abs()), "{:?}: {found} {expected}", model.config);
        }
        for (name, p) in model.layout.iter().filter(|(name, _)| name.ends_with("depths.weight")) {
            assert!(gradient[p.range(0)].iter().any(|g| *g != 0.0), "{name} gets no gradient");
        }
        let (expected, reference, _) = step::<f64>(&model, &params, Engine::Reference);
        let worst = gradient.iter().zip(&reference).fold((value - expected).abs(), |m, (a, b)| m.max((a - b).abs()));
        assert!(worst < 1e-10, "{:?}: {worst}", model.config);
    }
}

#[test]
fn a_block_that_takes_every_token_with_factor_one_is_the_block() {
    for kind in [PositionKind::Cope, PositionKind::Rope, PositionKind::Learned] {
        for router in [Config::Dense {}, sparse()] {
            let routed = model(kind, router.clone(), Depths { capacity: 0.999, ..Depths::default() });
            let plain = model(kind, router, Depths::default());
            let mut numbers = params(&routed);
            // Column 0 of the stream is 1 for every token, whatever block 0 does, and the router of block 1 reads it alone.
            for (name, p) in routed.layout.iter() {
                match name {
                    "model.embed_tokens.weight" => p.range(0).step_by(WIDTH).for_each(|j| numbers[j] = 1.0),
                    "model.embed_positions.weight" => p.range(0).step_by(WIDTH).for_each(|j| numbers[j] = 0.0),
                    "model.layers.1.depths.weight" => {
                        numbers[p.range(0)].fill(0.0);
                        numbers[p.range(0).start] = 1.0;
                    }
                    _ if name.ends_with("0.self_attn.o_proj.weight")
                        || name.contains("0.mlp.") && name.contains("down_proj") =>
                    {
                        (0..p.count).for_each(|m| numbers[p.range(m)][..p.width].fill(0.0));
                    }
                    _ => {}
                }
            }
            let mut same = vec![0.0; plain.layout.len()];
            for (name, p) in plain.layout.iter() {
                let from = routed.layout.get(name).unwrap();
                (0..p.count).for_each(|m| same[p.range(m)].copy_from_slice(&numbers[from.range(m)]));
            }
            let (_, d_routed, a) = step::<f64>(&routed, &numbers, Engine::Cpu);
            let (_, d_plain, b) = step::<f64>(&plain, &same, Engine::Cpu);
            let close = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12);
            assert!(close(&a, &b), "{kind:?}: the streams differ");
            // Gradients of what lies in the routed block: below it the router adds its own.
            for (name, p) in plain.layout.iter().filter(|(name, _)| name.contains("layers.1.")) {
                let from = routed.layout.get(name).unwrap();
                for m in 0..p.count {
                    assert!(close(&d_plain[p.range(m)], &d_routed[from.range(m)]), "{kind:?}: {name}");
                }
            }
        }
    }
}

/// A pass without gradients, and the inputs of block 1 and of the last norm.
fn look(
    model: &Transformer,
    params: &[f64],
    tokens: &[u32],
    mode: Mode,
) -> (Output<f64>, Vec<f64>, Vec<f64>, Vec<f64>) {
    let arena = Arena::default();
    let seen = RefCell::new((Vec::new(), Vec::new()));
    let mut tape = Tape::inference(Engine::Cpu, params, &arena);
    let watch: Watch<'_, f64> =
        Rc::new(|_: &mut Tape<'_, f64>, layer, value: &Value<f64>, _: &Arc<[usize]>| match layer {
            5 => seen.borrow_mut().0 = value.data().to_vec(),
            9 => seen.borrow_mut().1 = value.data().to_vec(),
            _ => {}
        });
    let documents = Documents::new(tokens.to_vec(), vec![0, tokens.len()]);
    let output = model.forward(&mut tape, &documents, &model.policies(), mode, Context::Documents, watch);
    let logits = linear(&mut tape, &output.hidden_nd, model.output).data().to_vec();
    drop(tape);
    let (before, after) = seen.into_inner();
    (output, before, after, logits)
}

#[test]
fn tokens_that_are_not_taken_keep_their_bits_and_the_share_is_the_capacity() {
    let looks = |model: &&Transformer| model.config.depths == Depths { capacity: 0.4, ..Depths::default() };
    for model in all(0.4).iter().filter(looks) {
        let tokens: Vec<u32> = (0..12).map(|i| (i * 5 + 2) % VOCABULARY as u32).collect();
        let (output, before, after, _) = look(model, &params(model), &tokens, Mode::Train);
        let [trace] = &output.depths[..] else { panic!("one routed block") };
        assert_eq!((trace.layer, trace.selection.rows_m.len()), (1, 5), "ceil(0.4 · 12) tokens");
        for t in 0..12 {
            let same = before[t * WIDTH..(t + 1) * WIDTH] == after[t * WIDTH..(t + 1) * WIDTH];
            assert_eq!(same, trace.selection.row(t).is_none(), "token {t}");
        }
        for trace in output.experts.iter().filter(|trace| trace.layer == 1) {
            assert_eq!((trace.routing.num_tokens(), trace.scores_ne.rows()), (5, 5), "experts serve the taken tokens");
        }
    }
}

#[test]
fn the_causal_rule_is_blind_to_the_future_and_the_best_of_a_document_is_not() {
    for model in all(0.4) {
        let params = params(&model);
        let tokens: Vec<u32> = (0..14).map(|i| (i * 5 + 2) % VOCABULARY as u32).collect();
        let mut leaks = 0;
        for t in 0..13 {
            let mut other = tokens.clone();
            other[t + 1] = (other[t + 1] + 4) % VOCABULARY as u32;
            let before = |mode, tokens: &[u32]| look(&model, &params, tokens, mode).3[..(t + 1) * VOCABULARY].to_vec();
            // Another number of taken tokens may round products otherwise.
            let gap = |mode| {
                let (a, b) = (before(mode, &tokens), before(mode, &other));
                a.iter().zip(&b).fold(0.0f64, |most, (a, b)| most.max((a - b).abs()))
            };
            assert!(gap(Mode::Evaluate) < 1e-12, "{:?}: {t}", model.config);
            leaks += usize::from(gap(Mode::Train) > 1e-6);
        }
        let best = model.config.depths.choice == DepthChoice::Best;
        assert_eq!(leaks > 0, best, "{:?}: {leaks} places of training saw the next token", model.config);
    }
}

#[test]
fn the_causal_choice_trains_on_what_it_evaluates_and_is_drawn_to_the_capacity() {
    for model in all(0.4).iter().filter(|model| model.config.depths.choice == DepthChoice::Causal) {
        let tokens: Vec<u32> = (0..12).map(|i| (i * 5 + 2) % VOCABULARY as u32).collect();
        let mut params = params(model);
        let seen = |mode, params: &[f64]| look(model, params, &tokens, mode);
        let ((trained, .., a), (evaluated, .., b)) = (seen(Mode::Train, &params), seen(Mode::Evaluate, &params));
        assert_eq!((&trained.depths[0].selection, a), (&evaluated.depths[0].selection, b));
        assert_eq!(trained.depths[0].target.rows_m.len(), 5, "ceil(0.4 · 12) tokens");
        // No score is above 0: the best of the document train the block, so that it can come back.
        let router = model.layout.get("model.layers.1.depths.weight").unwrap().range(0);
        params[router].fill(0.0);
        let (trained, ..) = seen(Mode::Train, &params);
        assert_eq!(trained.depths[0].selection.rows_m.len(), 5);
    }
}

#[test]
fn cached_decoding_equals_the_full_pass_and_keeps_taken_tokens_only() {
    for model in all(0.4) {
        let params: Vec<f32> = params(&model).iter().map(|x| *x as f32).collect();
        let policies = model.policies();
        let (engine, precision) = (Engine::Cpu, Precision::F32);
        let weights = Weights { transformer: &model, params: &params, policies: &policies, engine, precision };
        let text: Vec<u32> = (0..12).map(|i| (i * 5 + 2) % VOCABULARY as u32).collect();
        let full = weights.logits(&text);
        let mut cache = model.empty_cache();
        let mut fed = 0;
        for chunk in [3, 1, 1, 4, 1, 2] {
            let logits = weights.step(&mut cache, &text[fed..fed + chunk]);
            fed += chunk;
            let expected = &full[(fed - 1) * VOCABULARY..fed * VOCABULARY];
            let worst = logits.iter().zip(expected).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(worst < 2e-5, "{:?}: {worst}", model.config);
        }
        let wide: Vec<f64> = params.iter().map(|x| f64::from(*x)).collect();
        let (output, ..) = look(&model, &wide, &text, Mode::Evaluate);
        for trace in &output.depths {
            let numbers = trace.selection.rows_m.len() * WIDTH / 2; // three heads of six
            assert_eq!(cache[trace.layer].numbers(), numbers, "{:?}", model.config);
        }
        let greedy = |cached| weights.generate(&text[..4], 15, None, Sampling::GREEDY, cached);
        assert_eq!(greedy(true), greedy(false));
    }
}

#[test]
fn a_block_that_takes_nothing_is_the_identity() {
    let model = model(PositionKind::Cope, sparse(), Depths { capacity: 0.4, ..Depths::default() });
    let mut params = params(&model);
    let embedding = model.layout.get("model.embed_tokens.weight").unwrap();
    params[embedding.range(0)].iter_mut().step_by(WIDTH).for_each(|x| *x = 100.0);
    let router = model.layout.get("model.layers.1.depths.weight").unwrap().range(0);
    params[router.clone()].fill(0.0);
    params[router.start] = -1.0;
    let (output, before, after, _) = look(&model, &params, &[1, 2, 3, 4], Mode::Evaluate);
    assert!(output.depths[0].selection.rows_m.is_empty() && before == after && output.experts.len() == 1);
}
