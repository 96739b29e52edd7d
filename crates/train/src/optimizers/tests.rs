//! Closed forms, a scalar f64 re-implementation over a trajectory, and the rules every optimizer keeps.

use super::*;
use crate::layers::FlatLayers;

const EXPERTS: &str = "model.layers.0.mlp.experts.down_proj";
const NORM: &str = "model.norm.weight";
const COPE: &str = "model.layers.0.self_attn.cope.weight";
const SPLIT: &str = "model.layers.0.self_attn.heads.split.weight";
const WEIGHT: &str = "model.layers.0.mlp.gate.weight";
const FROZEN: &str = "model.layers.0.self_attn.q_proj.weight";
const ALL: [Kind; 6] = [Kind::Adam, Kind::AdamW, Kind::Sgd, Kind::Lars, Kind::Lion, Kind::Muon];

/// Odd sizes, so that every tensor and expert has padding behind it.
fn layout() -> Layout {
    Layout::new([
        ("model.embed_tokens.weight".to_owned(), vec![11, 5], true),
        (EXPERTS.to_owned(), vec![3, 5, 7], true),
        (WEIGHT.to_owned(), vec![3, 5], true),
        (FROZEN.to_owned(), vec![5, 5], false),
        (COPE.to_owned(), vec![9, 3], true),
        (SPLIT.to_owned(), vec![2, 5], true),
        (NORM.to_owned(), vec![5], true),
    ])
}

/// A buffer with `value(flat index)` in every parameter and zero padding.
fn fill(layout: &Layout, value: impl Fn(usize) -> f32) -> Vec<f32> {
    let mut buffer = vec![0.0; layout.len()];
    for (_, param) in layout.iter() {
        (0..param.count).flat_map(|i| param.range(i)).for_each(|i| buffer[i] = value(i));
    }
    buffer
}

fn weights(layout: &Layout) -> Vec<f32> {
    fill(layout, |i| (i as f32 * 0.37).sin())
}

fn gradient(layout: &Layout, step: usize) -> Vec<f32> {
    fill(layout, |i| ((i * 31 + step * 17) as f32 * 0.11).cos() * 10f32.powi((i % 5) as i32 - 3))
}

fn settings() -> Settings {
    Settings { weight_decay: 0.02, ..Settings::default() }
}

/// One number of the scalar re-implementation.
#[derive(Clone, Copy, Default)]
struct Scalar {
    w: f64,
    m: f64,
    v: f64,
    steps: i32,
}

/// The textbook forms in f64, one matrix at a time; `ratio` is LARS's λ.
fn textbook(kind: Kind, s: &Settings, x: &mut Scalar, g: f64, rate: f64, decay: f64, ratio: f64) {
    x.steps += 1;
    match kind {
        Kind::Adam | Kind::AdamW => {
            let g = if kind == Kind::Adam { g + decay * x.w } else { g };
            x.m = s.beta1 * x.m + (1.0 - s.beta1) * g;
            x.v = s.beta2 * x.v + (1.0 - s.beta2) * g * g;
            let (mean, square) = (x.m / (1.0 - s.beta1.powi(x.steps)), x.v / (1.0 - s.beta2.powi(x.steps)));
            if kind == Kind::AdamW {
                x.w -= rate * decay * x.w;
            }
            x.w -= rate * mean / (square.sqrt() + s.eps);
        }
        Kind::Sgd => {
            x.m = s.momentum * x.m + g + decay * x.w;
            x.w -= rate * x.m;
        }
        Kind::Lion => {
            let u = s.beta1 * x.m + (1.0 - s.beta1) * g;
            let sign = if u == 0.0 { 0.0 } else { u.signum() };
            x.w -= rate * (sign + decay * x.w);
            x.m = s.beta2 * x.m + (1.0 - s.beta2) * g;
        }
        Kind::Muon => unreachable!("its hidden matrices are no matter of single numbers"),
        Kind::Lars => {
            x.m = s.momentum * x.m + rate * ratio * (g + decay * x.w);
            x.w -= x.m;
        }
    }
}

#[test]
fn trajectories_equal_a_scalar_f64_version_over_200_steps() {
    let layout = layout();
    for kind in ALL.into_iter().filter(|kind| *kind != Kind::Muon) {
        let s = settings();
        // Unlike rates, so that a mix-up of parameters shows.
        let layers = FlatLayers::new(&layout, 1).unwrap();
        let norms: Vec<f64> = (0..layers.len()).map(|layer| 0.5 + layer as f64).collect();
        let rates = layers.rates(if kind == Kind::Lars { 0.3 } else { 1e-3 }, Some(&norms));
        let (mut params, mut optimizer) = (weights(&layout), Optimizer::new(kind, s, &layout));
        let mut scalars: Vec<Scalar> =
            params.iter().map(|&w| Scalar { w: f64::from(w), ..Scalar::default() }).collect();
        for step in 0..200 {
            let grads = gradient(&layout, step);
            optimizer.step(&layout, &mut params, &grads, &rates);
            for (index, (name, param)) in layout.iter().enumerate().filter(|(_, (_, p))| p.trainable) {
                let excluded = [NORM, COPE, SPLIT].contains(&name);
                for range in (0..param.count).map(|i| param.range(i)) {
                    let norm = |x: &dyn Fn(usize) -> f64| range.clone().map(|i| x(i).powi(2)).sum::<f64>().sqrt();
                    let (w, g) = (norm(&|i| scalars[i].w), norm(&|i| f64::from(grads[i])));
                    let ratio = if excluded { 1.0 } else { s.trust * w / (g + s.weight_decay * w + s.eps) };
                    let decay = if excluded { 0.0 } else { s.weight_decay };
                    for i in range.clone() {
                        let g = f64::from(grads[i]);
                        textbook(kind, &s, &mut scalars[i], g, rates.parameter(index), decay, ratio);
                    }
                }
            }
        }
        let off = |(&w, x): (&f32, &Scalar)| (f64::from(w) - x.w).abs() / x.w.abs().max(1.0);
        let far = params.iter().zip(&scalars).map(off).fold(0.0, f64::max);
        let moved = params.iter().zip(weights(&layout)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 1e-5 && moved > 1e-2, "{kind:?}: off by {far}, moved by {moved}");
    }
}

#[test]
fn muon_is_adamw_but_for_hidden_matrices_whose_first_step_is_orthogonal() {
    let layout = layout();
    let rates = Rates::uniform(&layout, 0.01);
    let run = |kind| {
        let mut params = weights(&layout);
        Optimizer::new(kind, settings(), &layout).step(&layout, &mut params, &gradient(&layout, 3), &rates);
        params
    };
    let (muon, adamw, before) = (run(Kind::Muon), run(Kind::AdamW), weights(&layout));
    for (name, param) in layout.iter().filter(|(_, p)| p.trainable) {
        let same = (0..param.count).flat_map(|m| param.range(m)).all(|i| muon[i] == adamw[i]);
        assert_eq!(same, name != EXPERTS, "{name}");
    }
    // [5, 7] matrices: an orthogonal one has norm √5, the step is 0.2 √7 times as long.
    for range in (0..3).map(|m| layout.get(EXPERTS).unwrap().range(m)) {
        let moved: f64 = range.map(|i| f64::from(muon[i] - before[i] * (1.0 - 0.01 * 0.02)).powi(2)).sum();
        let length = moved.sqrt() / (0.01 * 0.2 * 35f64.sqrt());
        assert!((0.3..1.2).contains(&length), "{length}");
    }
}

#[test]
fn the_first_adam_step_is_the_rate_against_the_sign_of_the_gradient() {
    let layout = layout();
    let rates = Rates::uniform(&layout, 0.01);
    for kind in [Kind::Adam, Kind::AdamW] {
        let (mut params, grads) = (vec![0.0; layout.len()], gradient(&layout, 3));
        Optimizer::new(kind, Settings::default(), &layout).step(&layout, &mut params, &grads, &rates);
        for (_, param) in layout.iter().filter(|(_, p)| p.trainable) {
            for i in (0..param.count).flat_map(|i| param.range(i)).filter(|&i| grads[i].abs() > 1e-5) {
                assert!((params[i] + 0.01 * grads[i].signum()).abs() < 1e-5, "{} at {}", params[i], grads[i]);
            }
        }
    }
}

#[test]
fn adamw_without_gradient_is_pure_geometric_decay_of_the_2d_weights() {
    let layout = layout();
    let (mut params, before) = (weights(&layout), weights(&layout));
    let mut optimizer = Optimizer::new(Kind::AdamW, Settings { weight_decay: 0.5, ..settings() }, &layout);
    for _ in 0..10 {
        optimizer.step(&layout, &mut params, &vec![0.0; layout.len()], &Rates::uniform(&layout, 0.1));
    }
    for (name, param) in layout.iter() {
        let factor = if [NORM, COPE, SPLIT, FROZEN, EXPERTS].contains(&name) { 1.0 } else { 0.95f64.powi(10) };
        for i in (0..param.count).flat_map(|i| param.range(i)) {
            assert!((f64::from(params[i]) - f64::from(before[i]) * factor).abs() < 1e-6, "{name}");
        }
    }
}

#[test]
fn lars_without_decay_ignores_the_scale_of_the_loss() {
    let layout = layout();
    let s = Settings { weight_decay: 0.0, trust: 0.01, eps: 1e-8, ..Settings::default() };
    let run = |scale: f32| {
        let (mut params, mut optimizer) = (weights(&layout), Optimizer::new(Kind::Lars, s, &layout));
        for step in 0..20 {
            let grads: Vec<f32> = gradient(&layout, step).iter().map(|g| g * scale).collect();
            optimizer.step(&layout, &mut params, &grads, &Rates::uniform(&layout, 0.5));
        }
        params
    };
    let (plain, scaled, start) = (run(1.0), run(1000.0), weights(&layout));
    for (name, param) in layout.iter().filter(|(name, _)| ![NORM, COPE, SPLIT].contains(name)) {
        for i in (0..param.count).flat_map(|i| param.range(i)) {
            assert!((plain[i] - scaled[i]).abs() < 1e-5, "{name}");
        }
    }
    // The excluded ones follow plain momentum, so they do see the scale.
    let norm = layout.get(NORM).unwrap().offset;
    assert!((plain[norm] - scaled[norm]).abs() > 1.0);
    // The relative update of a segment in the first step is rate times trust.
    let mut params = start.clone();
    let grads = gradient(&layout, 0);
    Optimizer::new(Kind::Lars, s, &layout).step(&layout, &mut params, &grads, &Rates::uniform(&layout, 0.5));
    let range = layout.get(EXPERTS).unwrap().range(1);
    let moved: Vec<f32> = params[range.clone()].iter().zip(&start[range.clone()]).map(|(a, b)| a - b).collect();
    let relative = (crate::layers::sum_squares(&moved) / crate::layers::sum_squares(&start[range])).sqrt();
    assert!((relative / (0.5 * 0.01) - 1.0).abs() < 1e-4, "{relative}");
}

#[test]
fn the_lars_ratio_is_one_where_a_norm_is_zero() {
    let layout = layout();
    let s = Settings { momentum: 0.0, weight_decay: 0.0, ..Settings::default() };
    let (mut params, grads) = (vec![0.0; layout.len()], gradient(&layout, 0));
    Optimizer::new(Kind::Lars, s, &layout).step(&layout, &mut params, &grads, &Rates::uniform(&layout, 0.25));
    for i in layout.get(WEIGHT).unwrap().range(0) {
        assert_eq!(params[i], -0.25 * grads[i]);
    }
}

#[test]
fn sgd_by_hand() {
    let layout = Layout::new([(WEIGHT.to_owned(), vec![1, 2], true)]);
    let rates = Rates::uniform(&layout, 0.5);
    let mut grads = vec![0.0; layout.len()];
    grads[..2].copy_from_slice(&[1.0, -2.0]);
    let run = |momentum: f64, weight_decay: f64| {
        let mut params = vec![0.0; layout.len()];
        params[..2].copy_from_slice(&[4.0, 8.0]);
        let mut optimizer = Optimizer::new(Kind::Sgd, Settings { momentum, weight_decay, ..settings() }, &layout);
        (0..2).for_each(|_| drop(optimizer.step(&layout, &mut params, &grads, &rates)));
        assert_eq!(optimizer.state().moments.len(), usize::from(momentum != 0.0));
        [params[0], params[1]]
    };
    assert_eq!(run(0.0, 0.0), [3.0, 10.0]);
    assert_eq!(run(0.5, 0.0), [4.0 - 0.5 - 0.75, 8.0 + 1.0 + 1.5]);
    assert_eq!(run(0.0, 0.25), [2.125, 8.0]); // 4 - (1 + 1) / 2 = 3, then 3 - (1 + 0.75) / 2; 8 - (-2 + 2) / 2
}

#[test]
fn an_expert_without_gradient_stays_as_it_is_to_the_bit_and_counts_its_own_steps() {
    let layout = layout();
    let param = layout.get(EXPERTS).unwrap();
    let rates = Rates::uniform(&layout, 0.01);
    for kind in ALL {
        let (mut params, mut optimizer) = (weights(&layout), Optimizer::new(kind, settings(), &layout));
        optimizer.step(&layout, &mut params, &gradient(&layout, 0), &rates);
        let (before, state) = (params.clone(), optimizer.state().clone());
        for step in 1..4 {
            let mut grads = gradient(&layout, step);
            grads[param.range(1)].fill(-0.0);
            optimizer.step(&layout, &mut params, &grads, &rates);
        }
        let bits = |buffer: &[f32]| buffer[param.range(1)].iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&params), bits(&before), "{kind:?}");
        for ((_, after), (_, before)) in optimizer.state().moments.iter().zip(&state.moments) {
            assert_eq!(bits(after), bits(before), "{kind:?}");
        }
        assert_eq!(optimizer.state().expert_steps[EXPERTS], [4, 1, 4]);
        assert_eq!(optimizer.state().steps, 4);
        assert_ne!(params[param.range(0)], before[param.range(0)]);
    }
    // A first step taken late is a first step.
    let (mut params, mut optimizer) = (weights(&layout), Optimizer::new(Kind::Adam, Settings::default(), &layout));
    let mut grads = gradient(&layout, 0);
    grads[param.range(2)].fill(0.0);
    (0..50).for_each(|_| drop(optimizer.step(&layout, &mut params, &grads, &rates)));
    let before = params.clone();
    optimizer.step(&layout, &mut params, &gradient(&layout, 0), &rates);
    for i in param.range(2) {
        assert!(((params[i] - before[i]).abs() - 0.01).abs() < 1e-5);
    }
}

#[test]
fn padding_stays_zero_and_frozen_parameters_are_not_touched() {
    let layout = layout();
    for kind in ALL {
        let (mut params, mut optimizer) = (weights(&layout), Optimizer::new(kind, settings(), &layout));
        for step in 0..5 {
            optimizer.step(&layout, &mut params, &gradient(&layout, step), &Rates::uniform(&layout, 0.1));
        }
        let inside = fill(&layout, |_| 1.0);
        for buffer in optimizer.state().moments.iter().map(|(_, moment)| moment).chain([&params]) {
            assert!(buffer.iter().zip(&inside).all(|(&x, &inside)| inside == 1.0 || x.to_bits() == 0), "{kind:?}");
        }
        let frozen = layout.get(FROZEN).unwrap().range(0);
        assert_eq!(params[frozen.clone()], weights(&layout)[frozen]);
    }
}

#[test]
fn a_step_measures_how_far_every_parameter_moved_and_how_large_it_was() {
    let layout = layout();
    for kind in ALL {
        let (mut params, before) = (weights(&layout), weights(&layout));
        let mut grads = gradient(&layout, 0);
        grads[layout.get(EXPERTS).unwrap().range(1)].fill(0.0);
        let rates = Rates::uniform(&layout, 0.1);
        let moved = Optimizer::new(kind, settings(), &layout).step(&layout, &mut params, &grads, &rates);
        assert_eq!(moved.len(), layout.iter().count());
        for (moved, (name, param)) in moved.iter().zip(layout.iter()) {
            let sum = |value: &dyn Fn(usize) -> f32| -> f64 {
                (0..param.count).flat_map(|i| param.range(i)).map(|i| f64::from(value(i)).powi(2)).sum()
            };
            let (difference, weight) = (sum(&|i| params[i] - before[i]), sum(&|i| before[i]));
            assert!((moved.difference - difference).abs() <= 1e-12 * difference, "{kind:?} {name}");
            assert!(
                (moved.weight - weight).abs() <= 1e-12 * weight && (difference == 0.0) == (name == FROZEN),
                "{kind:?} {name}"
            );
        }
    }
}

#[test]
fn the_bytes_do_not_depend_on_the_number_of_threads() {
    let layout = Layout::new([
        ("lm_head.weight".to_owned(), vec![301, 257], true),
        (EXPERTS.to_owned(), vec![3, 100, 61], true),
        (NORM.to_owned(), vec![61], true),
    ]);
    for kind in ALL {
        let run = |threads: usize, first: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let (mut params, mut optimizer) = (weights(&layout), Optimizer::new(kind, settings(), &layout));
                for step in first..first + 3 {
                    optimizer.step(&layout, &mut params, &gradient(&layout, step), &Rates::uniform(&layout, 0.01));
                }
                params.iter().map(|w| w.to_bits()).collect::<Vec<_>>()
            })
        };
        let one = run(1, 0);
        assert!([2, 3, 8].iter().all(|&threads| run(threads, 0) == one), "{kind:?}");
        assert_ne!(run(2, 1), one); // the comparison can fail
    }
}

#[test]
fn adam_stays_finite_for_huge_and_tiny_gradients() {
    let layout = layout();
    for size in [f32::MAX, 1e25, 1e19, 1e-25, f32::MIN_POSITIVE, 1e-45] {
        let (mut params, mut optimizer) = (weights(&layout), Optimizer::new(Kind::Adam, settings(), &layout));
        for step in 0..20 {
            let grads = fill(&layout, |i| if (i + step) % 3 == 0 { -size } else { size });
            optimizer.step(&layout, &mut params, &grads, &Rates::uniform(&layout, 0.01));
        }
        let far = params.iter().zip(weights(&layout)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(params.iter().all(|w| w.is_finite()) && far < 0.21, "{size}: {far}");
        assert!(optimizer.state().moments.iter().all(|(_, moment)| moment.iter().all(|x| x.is_finite())));
    }
}

#[test]
fn a_restored_optimizer_goes_on_to_the_bit_and_a_foreign_state_is_refused() {
    let layout = layout();
    let rates = Rates::uniform(&layout, 0.01);
    for kind in ALL {
        let (mut params, mut optimizer) = (weights(&layout), Optimizer::new(kind, settings(), &layout));
        (0..3).for_each(|step| drop(optimizer.step(&layout, &mut params, &gradient(&layout, step), &rates)));
        let state = optimizer.state().clone();
        let mut restored = Optimizer::restore(kind, settings(), &layout, state).unwrap();
        let mut again = params.clone();
        optimizer.step(&layout, &mut params, &gradient(&layout, 3), &rates);
        restored.step(&layout, &mut again, &gradient(&layout, 3), &rates);
        assert_eq!(params, again);
        assert_eq!(optimizer.state(), restored.state());
    }
    let adam = Optimizer::new(Kind::Adam, settings(), &layout).state().clone();
    let refused = Optimizer::restore(Kind::Sgd, settings(), &layout, adam.clone()).unwrap_err();
    assert!(refused.contains("exp_avg") && refused.contains("momentum"), "{refused}");
    let small = Layout::new([(WEIGHT.to_owned(), vec![3, 5], true)]);
    assert!(Optimizer::restore(Kind::Adam, settings(), &small, adam).unwrap_err().contains("another shape"));
}
