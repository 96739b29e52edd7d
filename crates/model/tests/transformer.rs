//! The whole page: gradients against differences, the CPU face against the reference, decoding against the full pass, isolation and causality.

use model::config::{Model, PositionKind};
use model::generate::{Sampling, Weights};
use model::transformer::{Context, Documents, Forward, Transformer, unwatched};
use moe_router::{Config, Mode, Threshold};
use tensor::ops::cross_entropy::{Targets, cross_entropy};
use tensor::ops::linear::linear;
use tensor::random::{Purpose, Random};
use tensor::{Arena, Engine, Precision, Tape};

const VOCABULARY: usize = 13;

fn top_p() -> Config {
    Config::TopP {
        p: Threshold::Same(0.4),
        bias_rate: 0.0,
        target: None,
        renormalize: false,
        num_experts: 4,
        expert_hidden_size: 6,
        shared: 0,
        frozen: false,
        init_std: 0.5,
    }
}

/// Two routed experts a token beside `shared` ones.
fn beside(shared: usize) -> Config {
    let sizes = r#""num_experts": 4, "expert_hidden_size": 6, "init_std": 0.5"#;
    serde_json::from_str(&format!(r#"{{"kind": "top_k", "shared": {shared}, {sizes}}}"#)).unwrap()
}

fn learned_p() -> Config {
    Config::LearnedP {
        temperature: 0.1,
        num_experts: 4,
        expert_hidden_size: 6,
        shared: 0,
        frozen: false,
        init_std: 0.5,
    }
}

fn forced() -> Config {
    Config::Forced { k: 2, num_experts: 4, expert_hidden_size: 6, shared: 0, frozen: false, init_std: 0.5 }
}

fn config(kind: PositionKind, mixture: bool, router: Config) -> Model {
    let mut config = Model {
        hidden_size: 24,
        num_layers: 2,
        num_heads: 6,
        num_kv_heads: 3,
        intermediate_size: 10,
        ..Model::default()
    };
    config.position.kind = kind;
    config.position.max = if kind == PositionKind::Learned { 24 } else { 4 }; // a table of 5 rows of 4 is padded in the flat buffer
    (config.heads.shared, config.heads.routed, config.heads.active) = if mixture { (2, 4, 2) } else { (0, 0, 0) };
    config.router = router;
    config.validate().unwrap();
    config
}

fn kinds() -> [PositionKind; 4] {
    [PositionKind::Cope, PositionKind::Rope, PositionKind::None, PositionKind::Learned]
}

fn all() -> Vec<Transformer> {
    let mut models = Vec::new();
    for kind in kinds() {
        for mixture in [false, true] {
            for router in [Config::Dense {}, top_p(), learned_p(), beside(2)] {
                models.push(Transformer::new(&config(kind, mixture, router), VOCABULARY));
            }
        }
    }
    models
}

/// Initial values moved off their special points (zero tables, unit gains).
fn params(model: &Transformer) -> Vec<f64> {
    let random = Random::new(5, Purpose::Test);
    let mut params: Vec<f64> = model.initialise(3).into_iter().map(f64::from).collect();
    for (_, p) in model.layout.iter() {
        for m in 0..p.count {
            for j in p.range(m) {
                params[j] += 0.2 * random.normal(0, j as u64);
            }
        }
    }
    params
}

fn documents() -> (Documents, Targets) {
    let tokens: Vec<u32> = (0..11).map(|i| (i * 7 + 3) % VOCABULARY as u32).collect();
    let targets: Vec<u32> = (0..11).map(|i| (i * 5 + 1) % VOCABULARY as u32).collect();
    let weights: Vec<f64> = (0..11).map(|i| if i < 7 { 1.0 / 7.0 } else { 0.25 }).collect();
    (Documents::new(tokens, vec![0, 7, 7, 11]), Targets { ids_n: targets.into(), weights_n: weights.into() })
}

fn loss_and_gradient<T: Forward>(model: &Transformer, params: &[f64], engine: Engine) -> (f64, Vec<f64>, Vec<f64>) {
    let params: Vec<T> = params.iter().map(|x| T::from_f64(*x)).collect();
    let (documents, targets) = documents();
    let arena = Arena::default();
    let mut tape = Tape::new(engine, &params, &arena);
    let output = model.forward(&mut tape, &documents, &model.policies(), Mode::Train, Context::Documents, unwatched());
    let hidden = output.hidden_nd.data().iter().map(|x| x.to_f64()).collect();
    let (loss, _) = cross_entropy(&mut tape, &output.hidden_nd, model.output, &targets);
    drop(output);
    let value = loss.scalar().to_f64();
    let mut flat = vec![T::ZERO; params.len()];
    tape.backward(&loss, &mut flat);
    drop(loss);
    assert_eq!(arena.live(), 0, "nothing may outlive a step");
    (value, flat.iter().map(|g| g.to_f64()).collect(), hidden)
}

#[test]
fn directional_derivatives_agree_with_differences() {
    const STEP: f64 = 1e-5;
    for model in all() {
        let params = params(&model);
        let (_, gradient, _) = loss_and_gradient::<f64>(&model, &params, Engine::Cpu);
        for direction in 0..4 {
            let random = Random::new(direction, Purpose::Test);
            let mut vector = vec![0.0; params.len()];
            for (_, p) in model.layout.iter() {
                (0..p.count).flat_map(|m| p.range(m)).for_each(|j| vector[j] = 0.1 * random.normal(1, j as u64));
            }
            let at = |h: f64| {
                let moved: Vec<f64> = params.iter().zip(&vector).map(|(x, v)| x + h * v).collect();
                loss_and_gradient::<f64>(&model, &moved, Engine::Cpu).0
            };
            let expected = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            let found: f64 = gradient.iter().zip(&vector).map(|(g, v)| g * v).sum();
            assert!((found - expected).abs() < 1e-6 * (1.0 + expected.abs()), "{:?}: {found} {expected}", model.config);
        }
    }
}

#[test]
fn the_cpu_face_equals_the_reference() {
    for model in all() {
        let params = params(&model);
        let (expected, reference, _) = loss_and_gradient::<f64>(&model, &params, Engine::Reference);
        let scale = reference.iter().fold(1.0f64, |m, g| m.max(g.abs()));
        for (bar, (found, gradient, _)) in [
            (1e-11, loss_and_gradient::<f64>(&model, &params, Engine::Cpu)),
            (1e-4, loss_and_gradient::<f32>(&model, &params, Engine::Cpu)),
        ] {
            assert!((found - expected).abs() < bar, "{:?}: {found} {expected}", model.config);
            let worst = gradient.iter().zip(&reference).fold(0.0f64, |m, (a, b)| m.max((a - b).abs()));
            assert!(worst < bar * scale, "{:?}: {worst}", model.config);
        }
    }
}

#[test]
fn every_parameter_that_serves_the_batch_gets_a_gradient() {
    for model in all() {
        let (_, gradient, _) = loss_and_gradient::<f32>(&model, &params(&model), Engine::Cpu);
        for (name, p) in model.layout.iter() {
            let used = (0..p.count).any(|m| gradient[p.range(m)].iter().any(|g| *g != 0.0));
            assert!(used, "{name} of {:?}", model.config);
        }
    }
}

#[test]
fn cached_decoding_equals_the_full_pass() {
    let forced = Transformer::new(&config(PositionKind::Rope, false, forced()), VOCABULARY);
    for model in all().into_iter().chain([forced]) {
        let params: Vec<f32> = params(&model).iter().map(|x| *x as f32).collect();
        let policies = model.policies();
        let weights = Weights {
            transformer: &model,
            params: &params,
            policies: &policies,
            engine: Engine::Cpu,
            precision: Precision::F32,
        };
        let text: Vec<u32> = (0..12).map(|i| (i * 5 + 2) % VOCABULARY as u32).collect();
        let full = weights.logits(&text);
        let mut cache = model.empty_cache();
        let mut fed = 0;
        for chunk in [3, 1, 1, 4, 1, 2] {
            let logits = weights.step(&mut cache, &text[fed..fed + chunk]);
            fed += chunk;
            let expected = &full[(fed - 1) * VOCABULARY..fed * VOCABULARY];
            let worst = logits.iter().zip(expected).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(worst < 1e-5, "{:?}: {worst}", model.config);
        }
        let greedy = |cached| weights.generate(&text[..4], 15, None, Sampling::GREEDY, cached);
        assert_eq!(greedy(true), greedy(false));
        assert_eq!(greedy(true).len(), 15);
    }
}

#[test]
fn documents_are_isolated_and_the_past_is_blind_to_the_future() {
    for model in all() {
        let params = params(&model);
        let run = |tokens: Vec<u32>, offsets: Vec<usize>| {
            let arena = Arena::default();
            let mut tape = Tape::inference(Engine::Cpu, &params, &arena);
            let documents = Documents::new(tokens, offsets);
            let output = model.forward(
                &mut tape,
                &documents,
                &model.policies(),
                Mode::Evaluate,
                Context::Documents,
                unwatched(),
            );
            linear(&mut tape, &output.hidden_nd, model.output).data().to_vec()
        };
        let both = run(vec![1, 2, 3, 4, 5, 6, 7], vec![0, 3, 7]);
        let alone = run(vec![9, 9, 9, 4, 5, 6, 7], vec![0, 3, 7]);
        assert_eq!(both[3 * VOCABULARY..], alone[3 * VOCABULARY..], "another document leaked");
        let later = run(vec![1, 2, 3, 4, 5, 6, 12], vec![0, 3, 7]);
        assert_eq!(both[..6 * VOCABULARY], later[..6 * VOCABULARY], "a later token leaked");
        assert_ne!(both[6 * VOCABULARY..], later[6 * VOCABULARY..]);
    }
}

#[test]
fn zero_output_projections_make_every_block_the_identity() {
    let model = Transformer::new(&config(PositionKind::Cope, true, Config::Dense {}), VOCABULARY);
    let mut params = params(&model);
    for (name, p) in model.layout.iter() {
        if name.contains("o_proj") || name.contains("down_proj") {
            params[p.span()].fill(0.0);
        }
    }
    let (_, _, hidden) = loss_and_gradient::<f64>(&model, &params, Engine::Cpu);
    let embedding = model.layout.get("model.embed_tokens.weight").unwrap();
    let gain = &params[model.layout.get("model.norm.weight").unwrap().span()];
    let (documents, _) = documents();
    for (t, id) in documents.tokens_n.iter().enumerate() {
        let row = &params[embedding.range(0)][*id as usize * 24..(*id as usize + 1) * 24];
        let r = (row.iter().map(|x| x * x).sum::<f64>() / 24.0 + 1e-6).sqrt();
        for j in 0..24 {
            assert!((hidden[t * 24 + j] - gain[j] * row[j] / r).abs() < 1e-12);
        }
    }
}

#[test]
fn parameter_counts_of_the_baseline() {
    let baseline = Model::default();
    let model = Transformer::new(&baseline, 1000);
    let count =
        |part: &str| model.layout.iter().filter(|(name, _)| name.contains(part)).map(|(_, p)| p.len()).sum::<usize>();
    assert_eq!(count("layers.0.mlp"), 98_304);
    assert_eq!(
        count("layers.0.self_attn") - count("layers.0.self_attn.cope") - count("layers.0.self_attn.heads"),
        49_152
    );
    assert_eq!(count("layers.0.self_attn.heads"), 1_280);
    assert_eq!(count("layers.0.self_attn.cope"), 65 * 16);
    assert_eq!(count("norm"), 896);
    assert_eq!(count("lm_head") + count("embed_tokens"), 2 * 128 * 1000);
    assert_eq!(model.layout.count() as u64, baseline.num_parameters(1000).unwrap());
}

#[test]
fn models_that_share_a_tensor_start_with_the_same_bytes_in_it() {
    let dense = Transformer::new(&Model::default(), 50);
    let sparse = Transformer::new(&Model { router: top_p(), ..Model::default() }, 50);
    let (a, b) = (dense.initialise(1), sparse.initialise(1));
    let range = |model: &Transformer| model.layout.get("model.layers.1.self_attn.q_proj.weight").unwrap().range(0);
    assert_eq!(a[range(&dense)], b[range(&sparse)]);
    assert_ne!(a, dense.initialise(2));
    let gate = sparse.layout.get("model.layers.0.mlp.gate.weight").unwrap().range(0);
    let std = (b[gate.clone()].iter().map(|x| f64::from(x * x)).sum::<f64>() / gate.len() as f64).sqrt();
    assert!((std - 0.5).abs() < 0.05, "{std}");
}

/// The numbers of `from` for every tensor that `to` has too, by its name there; zeros for the others.
fn carried(from: &Transformer, numbers: &[f64], to: &Transformer, name_there: impl Fn(&str) -> String) -> Vec<f64> {
    let mut carried = vec![0.0; to.layout.len()];
    for (name, p) in to.layout.iter() {
        if let Some(there) = from.layout.get(&name_there(name)) {
            (0..p.count).for_each(|m| carried[p.range(m)].copy_from_slice(&numbers[there.range(m)]));
        }
    }
    carried
}

#[test]
fn without_routed_experts_the_shared_ones_are_a_dense_layer_and_without_them_the_routed_ones_are_left() {
    let shared = Transformer::new(&config(PositionKind::Rope, true, beside(2)), VOCABULARY);
    let silenced = |part: &str| {
        let mut params = params(&shared);
        for (_, p) in shared.layout.iter().filter(|(name, _)| name.contains(part) && name.contains("down_proj")) {
            (0..p.count).for_each(|m| params[p.range(m)].fill(0.0));
        }
        params
    };
    let mut dense = config(PositionKind::Rope, true, Config::Dense {});
    dense.intermediate_size = 2 * 6;
    let dense = Transformer::new(&dense, VOCABULARY);
    let routed = Transformer::new(&config(PositionKind::Rope, true, beside(0)), VOCABULARY);
    let under_mlp = |name: &str| name.replace(".mlp.", ".mlp.shared_experts.");
    for engine in [Engine::Cpu, Engine::Reference] {
        let same = |numbers: &[f64], other: &Transformer, name_there: &dyn Fn(&str) -> String| {
            let (_, _, ours) = loss_and_gradient::<f64>(&shared, numbers, engine);
            let (_, _, theirs) = loss_and_gradient::<f64>(other, &carried(&shared, numbers, other, name_there), engine);
            ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 1e-12)
        };
        assert!(same(&silenced(".experts."), &dense, &under_mlp), "{engine:?}: weight 1 for every token");
        assert!(same(&silenced(".shared_experts."), &routed, &str::to_owned), "{engine:?}");
        assert!(!same(&params(&shared), &routed, &str::to_owned), "{engine:?}: they have an effect");
    }
}

#[test]
fn shared_experts_are_counted_and_are_no_part_of_the_routing() {
    let at = |shared| Transformer::new(&config(PositionKind::Cope, true, beside(shared)), VOCABULARY);
    let [plain, shared] = [0, 2].map(at);
    let added = 2 * 2 * 3 * 6 * 24; // layers, experts, matrices
    assert_eq!(shared.layout.count(), plain.layout.count() + added);
    assert_eq!(shared.layout.count() as u64, shared.config.num_parameters(VOCABULARY).unwrap());
    assert_eq!(shared.active_params(2.0), plain.active_params(2.0) + added as f64);
    let (params, arena) = (params(&shared), Arena::default());
    let mut tape = Tape::inference(Engine::Cpu, &params, &arena);
    let (documents, policies) = (documents().0, shared.policies());
    let output = shared.forward(&mut tape, &documents, &policies, Mode::Train, Context::Documents, unwatched());
    for trace in &output.experts {
        assert_eq!((trace.scores_ne.width(), trace.routing.num_ids), (4, 4));
        assert!((0..11).all(|t| trace.routing.row(t).len() == 2), "k routed experts a token, and no others");
    }
}

#[test]
fn without_shared_experts_the_layout_is_what_it_was_and_with_them_all_else_starts_alike() {
    let at = |shared| Transformer::new(&config(PositionKind::Cope, true, beside(shared)), VOCABULARY);
    let [plain, shared] = [0, 2].map(at);
    let new: Vec<&str> =
        shared.layout.iter().map(|(name, _)| name).filter(|name| plain.layout.get(name).is_none()).collect();
    let first = ["down", "gate", "up"].map(|part| format!("model.layers.0.mlp.shared_experts.{part}_proj.weight"));
    assert!(new.len() == 6 && new[..3] == first, "{new:?}");
    let (a, b) = (plain.initialise(1), shared.initialise(1));
    for (name, p) in plain.layout.iter() {
        let there = shared.layout.get(name).unwrap();
        assert!((0..p.count).all(|m| a[p.range(m)] == b[there.range(m)]), "{name}");
    }
    // Like a dense SwiGLU of their width: fan-in 24 above, 2 * 6 below.
    for (part, fan_in) in [("gate", 24.0), ("down", 12.0)] {
        let name = format!("model.layers.1.mlp.shared_experts.{part}_proj.weight");
        let numbers = &b[shared.layout.get(&name).unwrap().range(0)];
        let variance = numbers.iter().map(|x| f64::from(x * x)).sum::<f64>() / numbers.len() as f64;
        assert!((variance * fan_in / 2.0 - 1.0).abs() < 0.3, "{name}: {variance}");
    }
}
