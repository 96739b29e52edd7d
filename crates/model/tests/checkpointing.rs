//! Activation checkpointing: the same loss, gradients and watched norms to the bit, in less memory.

use model::config::{Depths, Model, PositionKind};
use model::transformer::{Context, Documents, Transformer};
use moe_router::{Config, Mode, node};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use tensor::ops::combine::weighted_sum;
use tensor::ops::cross_entropy::{Targets, cross_entropy};
use tensor::{Arena, Engine, Tape, Value};

const VOCABULARY: usize = 17;

fn router(kind: &str) -> Config {
    serde_json::from_str(&match kind {
        "dense" => r#"{"kind": "dense"}"#.to_owned(),
        "shared" => r#"{"kind": "top_k", "num_experts": 4, "expert_hidden_size": 24, "shared": 2}"#.to_owned(),
        _ => format!(r#"{{"kind": "{kind}", "num_experts": 4, "expert_hidden_size": 24, "init_std": 0.3}}"#),
    })
    .unwrap()
}

fn model(num_layers: usize, router: Config, kind: PositionKind, mixture: bool, capacity: f64) -> Transformer {
    let mut config = Model { hidden_size: 32, num_layers, num_heads: 8, num_kv_heads: 4, ..Model::default() };
    (config.intermediate_size, config.router, config.position.kind) = (48, router, kind);
    config.position.max = if kind == PositionKind::Learned { 64 } else { 5 };
    if !mixture {
        (config.heads.shared, config.heads.routed, config.heads.active) = (0, 0, 0);
    }
    config.depths = Depths { capacity, ..Depths::default() };
    config.validate().unwrap();
    Transformer::new(&config, VOCABULARY)
}

/// Loss, gradient and watched gradients as bits, and the most numbers the arena held.
fn step(model: &Transformer, checkpoints: bool, threads: usize) -> ((u32, Vec<u32>, Vec<u64>), usize) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let params = model.initialise(3);
        let n = 160;
        let documents = Documents::new(
            (0..n).map(|i| (i * i * 7 + 3) % VOCABULARY as u32).collect(),
            vec![0, 50, 50, 53, 110, 160],
        );
        let targets = Targets {
            ids_n: (0..n).map(|i| (i * 5 + 1) % VOCABULARY as u32).collect(),
            weights_n: vec![1.0 / f64::from(n); n as usize].into(),
        };
        let arena = Arena::default();
        let seen = Rc::new(RefCell::new(vec![0.0f64; 4 * model.config.num_layers + 3]));
        let norms = seen.clone();
        let watch = Rc::new(move |tape: &mut Tape<'_, f32>, layer: usize, value: &Value<f32>, _: &Arc<[usize]>| {
            let norms = norms.clone();
            tape.watch(value, move |g| norms.borrow_mut()[layer] += g.iter().map(|x| f64::from(x * x)).sum::<f64>());
        });
        let mut tape = Tape::new(Engine::Cpu, &params, &arena).with_checkpoints(checkpoints);
        let policies = model.policies();
        let output = model.forward(&mut tape, &documents, &policies, Mode::Train, Context::Documents, watch);
        let mut terms = vec![(cross_entropy(&mut tape, &output.hidden_nd, model.output, &targets).0, 1.0)];
        for trace in &output.experts {
            terms.push((node::balance_loss(&mut tape, &trace.scores_ne, &trace.routing), 0.3));
            terms.push((node::entropy_loss(&mut tape, &trace.scores_ne), 0.1));
            terms.push((node::z_loss(&mut tape, &trace.scores_ne), 0.1));
            terms.extend(trace.gates.clone().map(|gates| (gates, 0.2)));
        }
        for trace in &output.depths {
            terms.push((node::depth_loss(&mut tape, &trace.scores_n1, &trace.target), 0.3));
        }
        for trace in &output.heads {
            terms.push((node::head_balance_loss(&mut tape, &trace.routed_nh, &trace.selection), 0.3));
        }
        let total = weighted_sum(&mut tape, &terms.iter().map(|(value, c)| (value, *c)).collect::<Vec<_>>());
        let loss = total.scalar().to_bits();
        drop((terms, output));
        let mut flat = vec![0.0f32; params.len()];
        tape.backward(&total, &mut flat);
        drop(total);
        assert_eq!(arena.live(), 0, "nothing may outlive a step");
        let norms = seen.borrow().iter().map(|x| x.to_bits()).collect();
        ((loss, flat.iter().map(|g| g.to_bits()).collect(), norms), arena.held())
    })
}

#[test]
fn gradients_and_watched_norms_are_the_same_bits_in_less_memory() {
    for kind in ["dense", "top_p", "top_k", "learned_p", "expert_choice", "shared"] {
        for (position, mixture, capacity) in [
            (PositionKind::Cope, true, 1.0),
            (PositionKind::Rope, false, 1.0),
            (PositionKind::Learned, true, 1.0),
            (PositionKind::Cope, true, 0.5),
        ] {
            let model = model(6, router(kind), position, mixture, capacity);
            let (plain, kept) = step(&model, false, 1);
            assert!(plain.2.iter().all(|norm| f64::from_bits(*norm) > 0.0), "every flat layer is watched");
            for threads in [1, 4] {
                let (replayed, held) = step(&model, true, threads);
                assert!(replayed == plain, "{kind} {position:?} {mixture}: other bits with {threads} threads");
                // Half of the blocks keep half of the tokens where depths are routed.
                let bound = if capacity < 1.0 { 2 * kept / 3 } else { kept / 2 };
                assert!(held < bound, "{kind} {position:?}: {held} of {kept} numbers");
            }
        }
    }
}

#[test]
fn memory_grows_by_the_stream_of_a_block_and_no_more() {
    let held =
        |layers, checkpoints| step(&model(layers, router("dense"), PositionKind::Cope, true, 1.0), checkpoints, 1).1;
    let growth = |checkpoints| (held(24, checkpoints) - held(8, checkpoints)) / 16;
    let stream = 160 * 32;
    // The stream, the scores of routed heads, and what reuse of buffers up to twice as large adds.
    assert!(growth(true) <= 2 * stream, "{} numbers a block, the stream has {stream}", growth(true));
    assert!(growth(false) >= 6 * stream, "{} numbers a block", growth(false));
}
