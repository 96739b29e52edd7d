//! The tape entries of this crate. The formulas have no plain-candle twin: the same pure functions serve every engine, held by differences in f64.
//! Where scores need no gradient nothing is recorded.

use crate::heads::{self, HeadGradients, HeadScores, Selection};
use crate::learned_p::LearnedP;
use crate::{Mode, Policy, RouterInput, Routing, depths, losses};
use std::sync::Arc;
use tensor::profile::Cost;
use tensor::{Param, Real, Tape, Value};

/// Weights [a, 1] and the assignments they belong to, for score rows [n, num_ids]. `input` is what surrounds the scores
/// (`RouterInput::new`; its own scores are not read).
pub fn route<'a, T: Real>(
    tape: &mut Tape<'a, T>,
    scores_ne: &Value<T>,
    policy: &Policy,
    input: &RouterInput<'_, T>,
    mode: Mode,
) -> (Value<T>, Arc<Routing>) {
    let _span = tape.span("route", Cost::new::<T>(0, scores_ne.data().len()));
    let (routing, weights_a) = policy.route(&input.with_scores(scores_ne.data(), scores_ne.width()), mode);
    let routing = Arc::new(routing);
    let weights = tape.output(tape.arena().copy(&weights_a), weights_a.len(), 1, scores_ne.needs_grad());
    if weights.needs_grad() {
        let (scores, slot, policy, kept) = (scores_ne.clone(), weights.slot(), policy.clone(), routing.clone());
        tape.record(move |grads| {
            let Some(dweights_a) = grads.take(slot) else { return };
            grads.add(scores.slot(), |dscores_ne| policy.backward(scores.data(), &kept, &dweights_a, dscores_ne));
        });
    }
    (weights, routing)
}

/// The same for a learned threshold: `logits_n1` is w·x, `bias` its b. Also returns the mean over tokens of the sum of gates, [1, 1].
pub fn route_learned<'a, T: Real>(
    tape: &mut Tape<'a, T>,
    [scores_ne, logits_n1]: [&Value<T>; 2],
    bias: Param,
    policy: &LearnedP,
    input: &RouterInput<'_, T>,
) -> (Value<T>, Value<T>, Arc<Routing>) {
    let _span = tape.span("route", Cost::new::<T>(0, scores_ne.data().len()));
    let b = tape.param(&bias)[0];
    let logits_n: Vec<T> = logits_n1.data().iter().map(|x| *x + b).collect();
    let input = input.with_scores(scores_ne.data(), scores_ne.width()).with_thresholds(&logits_n);
    let (routing, weights_a, mean) = policy.route(&input);
    let routing = Arc::new(routing);
    let needs_grad = scores_ne.needs_grad() || logits_n1.needs_grad() || bias.trainable;
    let weights = tape.output(tape.arena().copy(&weights_a), weights_a.len(), 1, needs_grad);
    let mean = tape.output(tape.arena().copy(&[T::from_f64(mean)]), 1, 1, needs_grad);
    if needs_grad {
        let (scores, logits, policy, kept) = (scores_ne.clone(), logits_n1.clone(), policy.clone(), routing.clone());
        let slots = [weights.slot(), mean.slot()];
        tape.record(move |grads| {
            let [dweights_a, dmean] = slots.map(|slot| grads.take(slot));
            if dweights_a.is_none() && dmean.is_none() {
                return;
            }
            let upstream = (dweights_a.as_ref().map(|d| &d[..]), dmean.map_or(0.0, |d| d[0].to_f64()));
            let mut dscores_ne = vec![T::ZERO; scores.data().len()];
            let dlogits_n = policy.backward((scores.data(), &logits_n), &kept, upstream, &mut dscores_ne);
            if let Some(dbias) = grads.param(&bias) {
                dbias[0] += T::from_f64(dlogits_n.iter().sum());
            }
            grads.add(scores.slot(), |d| d.iter_mut().zip(&dscores_ne).for_each(|(d, x)| *d += *x));
            grads.add(logits.slot(), |d| d.iter_mut().zip(&dlogits_n).for_each(|(d, x)| *d += T::from_f64(*x)));
        });
    }
    (weights, mean, routing)
}

/// A [1, 1] value of `scores` with `backward(scores, upstream, dscores)`.
fn loss<'a, T: Real>(
    tape: &mut Tape<'a, T>,
    scores: &Value<T>,
    value: impl FnOnce(&[T]) -> f64,
    backward: impl FnOnce(&[T], T, &mut [T]) + 'a,
) -> Value<T> {
    let _span = tape.span("losses", Cost::new::<T>(0, scores.data().len()));
    let data = tape.arena().copy(&[T::from_f64(value(scores.data()))]);
    let loss = tape.output(data, 1, 1, scores.needs_grad());
    if loss.needs_grad() {
        let (scores, slot) = (scores.clone(), loss.slot());
        tape.record(move |grads| {
            let Some(upstream) = grads.take(slot) else { return };
            grads.add(scores.slot(), |dscores| backward(scores.data(), upstream[0], dscores));
        });
    }
    loss
}

/// `losses::balance` as [1, 1].
pub fn balance_loss<'a, T: Real>(tape: &mut Tape<'a, T>, scores_ne: &Value<T>, routing: &Arc<Routing>) -> Value<T> {
    let (measured, routing) = (routing.clone(), routing.clone());
    loss(
        tape,
        scores_ne,
        move |scores| losses::balance(scores, &measured),
        move |scores, upstream, dscores| {
            losses::balance_backward(scores, &routing, upstream, dscores);
        },
    )
}

/// `losses::entropy` as [1, 1].
pub fn entropy_loss<'a, T: Real>(tape: &mut Tape<'a, T>, scores_ne: &Value<T>) -> Value<T> {
    let e = scores_ne.width();
    loss(
        tape,
        scores_ne,
        |scores| losses::entropy(scores, e),
        move |scores, upstream, dscores| {
            losses::entropy_backward(scores, e, upstream, dscores);
        },
    )
}

/// `losses::z` as [1, 1].
pub fn z_loss<'a, T: Real>(tape: &mut Tape<'a, T>, scores_ne: &Value<T>) -> Value<T> {
    let e = scores_ne.width();
    loss(
        tape,
        scores_ne,
        |scores| losses::z(scores, e),
        move |scores, upstream, dscores| losses::z_backward(scores, e, upstream, dscores),
    )
}

/// Gates [n, shared + routed] of the mixture of heads and the choice of routed heads. `shared` [n, shared] and `split` [n, 2] come together or
/// not at all.
pub fn head_gates<'a, T: Real>(
    tape: &mut Tape<'a, T>,
    shared: Option<&Value<T>>,
    routed: &Value<T>,
    split: Option<&Value<T>>,
    active: usize,
) -> (Value<T>, Arc<Selection>) {
    assert_eq!(shared.is_some(), split.is_some(), "shared heads need a split between shared and routed");
    let _span = tape.span("head_gates", Cost::new::<T>(0, 2 * routed.data().len()));
    let head_scores = HeadScores {
        shared_ns: shared.map_or(&[], Value::data),
        routed_nr: routed.data(),
        split_n2: split.map_or(&[], Value::data),
        shared: shared.map_or(0, Value::width),
        routed: routed.width(),
    };
    let (gates_nh, selection) = heads::gates(&head_scores, active);
    let selection = Arc::new(selection);
    let inputs = [shared, Some(routed), split].map(|value| value.cloned());
    let needs_grad = inputs.iter().flatten().any(Value::needs_grad);
    let gates = tape.output(tape.arena().copy(&gates_nh), routed.rows(), selection.num_heads(), needs_grad);
    if gates.needs_grad() {
        let (slot, kept) = (gates.slot(), selection.clone());
        tape.record(move |grads| {
            let Some(dgates_nh) = grads.take(slot) else { return };
            let data = |i: usize| inputs[i].as_ref().map_or(&[][..], Value::data);
            let scores = HeadScores {
                shared_ns: data(0),
                routed_nr: data(1),
                split_n2: data(2),
                shared: kept.shared,
                routed: kept.routing.num_experts,
            };
            let [mut dshared, mut drouted, mut dsplit] = [0, 1, 2].map(|i| grads.arena().zeros(data(i).len()));
            let mut gradients =
                HeadGradients { shared_ns: &mut dshared, routed_nr: &mut drouted, split_n2: &mut dsplit };
            heads::gates_backward(&scores, &kept, &dgates_nh, &mut gradients);
            for (value, gradient) in inputs.iter().zip([dshared, drouted, dsplit]) {
                if let Some(value) = value {
                    grads.give(value.slot(), gradient);
                }
            }
        });
    }
    (gates, selection)
}

/// routed · Σ_h f_h Q_h over the routed heads: the balance loss of their scores [n, routed].
pub fn head_balance_loss<'a, T: Real>(
    tape: &mut Tape<'a, T>,
    routed: &Value<T>,
    selection: &Arc<Selection>,
) -> Value<T> {
    let (measured, selection) = (selection.clone(), selection.clone());
    loss(
        tape,
        routed,
        move |scores| losses::balance(scores, &measured.routing),
        move |scores, upstream, dscores| {
            losses::balance_backward(scores, &selection.routing, upstream, dscores);
        },
    )
}

/// `depths::loss` of scores [n, 1] as [1, 1].
pub fn depth_loss<'a, T: Real>(
    tape: &mut Tape<'a, T>,
    scores_n1: &Value<T>,
    selection: &Arc<depths::Selection>,
) -> Value<T> {
    let (measured, selection) = (selection.clone(), selection.clone());
    loss(
        tape,
        scores_n1,
        move |scores| depths::loss(scores, &measured),
        move |scores, upstream, dscores| depths::loss_backward(scores, &selection, upstream, dscores),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, softmax};
    use tensor::check::{self, Input};
    use tensor::{Arena, Engine, Layout};

    const OFFSETS: [usize; 4] = [0, 3, 4, 7];
    const ROWS: usize = 7;
    const WIDTH: usize = 5;
    /// Differences are only valid where no step changes a choice.
    const MARGIN: f64 = 1e-3;

    fn policy(text: &str) -> Policy {
        Policy::new(&serde_json::from_str::<Config>(text).unwrap(), 0).unwrap()
    }

    /// Score rows whose probabilities, their sorted sums against every p used here, and their columns keep `MARGIN` to any boundary.
    fn clear_of_boundaries() -> Input {
        let apart = |mut values: Vec<f64>| {
            values.sort_by(f64::total_cmp);
            values.windows(2).all(|w| w[1] - w[0] > MARGIN)
        };
        let clear = |input: &Input| {
            let p_ne = softmax::probabilities(&input.data, WIDTH);
            p_ne.chunks(WIDTH).all(|row| {
                let mut sorted = row.to_vec();
                sorted.sort_by(|a, b| b.total_cmp(a));
                let sums = sorted.iter().scan(0.0, |sum, p| {
                    *sum += p;
                    Some(*sum)
                });
                let sums: Vec<f64> = sums.collect();
                apart(row.to_vec()) && [0.4, 0.7].iter().all(|p| sums.iter().all(|sum| (sum - p).abs() > MARGIN))
            }) && (0..WIDTH).all(|e| apart((0..ROWS).map(|t| p_ne[t * WIDTH + e]).collect()))
        };
        (0..10_000).map(|seed| Input::random(seed, ROWS, WIDTH, 1.0)).find(clear).expect("some seed is clear")
    }

    fn worst_of_route(policy: &Policy, mode: Mode) -> f64 {
        check::worst(Engine::Cpu, &[clear_of_boundaries()], &[], |tape, v| {
            let input = RouterInput::new(&OFFSETS, &[0; ROWS], 0);
            vec![route(tape, &v[0], policy, &input, mode).0]
        })
    }

    #[test]
    fn gradients_of_every_policy_agree_with_differences() {
        for text in [
            r#"{"kind": "top_p", "num_experts": 5, "p": 0.4}"#,
            r#"{"kind": "top_p", "num_experts": 5, "p": 0.7}"#,
            r#"{"kind": "top_p", "num_experts": 5, "p": 1}"#,
            r#"{"kind": "top_p", "num_experts": 5, "p": 0.7, "renormalize": true}"#,
            r#"{"kind": "top_k", "num_experts": 5, "k": 2}"#,
            r#"{"kind": "top_k", "num_experts": 5, "k": 3, "renormalize": false}"#,
            r#"{"kind": "expert_choice", "num_experts": 5, "k": 1.5}"#,
            r#"{"kind": "forced", "num_experts": 5, "k": 2}"#,
        ] {
            let worst = worst_of_route(&policy(text), Mode::Train);
            assert!(worst < 1e-7, "{text}: {worst}");
        }
    }

    #[test]
    fn gradients_of_a_learned_threshold_agree_with_differences() {
        for temperature in [0.05, 0.3] {
            let policy = LearnedP { num_experts: WIDTH, temperature };
            let layout = Layout::new([("bias".to_string(), vec![1], true)]);
            let bias = layout.get("bias").unwrap();
            // A step that changes which gates exceed 1 % shows in the differences: not all draws are clear of that.
            let clear = |seed: u64| {
                let inputs = [clear_of_boundaries(), Input::random(seed, ROWS, 1, 1.0)];
                let logits: Vec<f64> = inputs[1].data.iter().map(|x| x + 0.3).collect();
                let sizes = |shift: f64| {
                    let moved: Vec<f64> = logits.iter().map(|x| x + shift).collect();
                    let input = RouterInput::new(&OFFSETS, &[], 0).with_scores(&inputs[0].data, WIDTH);
                    policy.route(&input.with_thresholds(&moved)).0.row_offsets_n1.clone()
                };
                (sizes(-MARGIN) == sizes(MARGIN)).then_some(inputs)
            };
            let inputs = (0..1000).find_map(clear).expect("some seed is clear");
            let mut params = vec![0.0; layout.len()];
            params[bias.range(0)].fill(0.3);
            let worst = check::worst(Engine::Cpu, &inputs, &params, |tape, v| {
                let parts = RouterInput::new(&OFFSETS, &[], 0);
                let (weights, mean, _) = route_learned(tape, [&v[0], &v[1]], bias, &policy, &parts);
                vec![weights, mean]
            });
            assert!(worst < 1e-6, "temperature {temperature}: {worst}");
        }
    }

    #[test]
    fn gradients_of_expert_choice_in_evaluation_agree_with_differences() {
        let mut policy = policy(r#"{"kind": "expert_choice", "num_experts": 5, "k": 1.5}"#);
        assert!(worst_of_route(&policy, Mode::Evaluate) < 1e-7);
        let mut observation = crate::Observation::default();
        let input = clear_of_boundaries();
        let input = RouterInput::new(&OFFSETS, &[], 0).with_scores(&input.data, WIDTH);
        let (routing, _) = policy.route(&input, Mode::Train);
        policy.observe(&mut observation, &input, &routing);
        policy.step(&observation);
        assert!(worst_of_route(&policy, Mode::Evaluate) < 1e-7);
    }

    #[test]
    fn gradients_of_the_losses_agree_with_differences() {
        let policy = policy(r#"{"kind": "top_p", "num_experts": 5, "p": 0.7}"#);
        let worst = check::worst(Engine::Cpu, &[clear_of_boundaries()], &[], |tape, v| {
            let (weights, routing) = route(tape, &v[0], &policy, &RouterInput::new(&OFFSETS, &[], 0), Mode::Train);
            vec![weights, balance_loss(tape, &v[0], &routing), entropy_loss(tape, &v[0]), z_loss(tape, &v[0])]
        });
        assert!(worst < 1e-7, "{worst}");
        let empty = check::worst(Engine::Cpu, &[Input::random(1, 0, WIDTH, 1.0)], &[], |tape, v| {
            let (weights, routing) = route(tape, &v[0], &policy, &RouterInput::new(&[0], &[], 0), Mode::Train);
            vec![weights, balance_loss(tape, &v[0], &routing), entropy_loss(tape, &v[0]), z_loss(tape, &v[0])]
        });
        assert_eq!(empty, 0.0);
    }

    #[test]
    fn gradients_of_the_head_gates_and_their_balance_agree_with_differences() {
        for (shared, active) in [(2, 3), (1, 5), (3, 1)] {
            let inputs = [Input::random(1, ROWS, shared, 1.0), clear_of_boundaries(), Input::random(2, ROWS, 2, 1.0)];
            let worst = check::worst(Engine::Cpu, &inputs, &[], |tape, v| {
                let (gates, selection) = head_gates(tape, Some(&v[0]), &v[1], Some(&v[2]), active);
                vec![gates, head_balance_loss(tape, &v[1], &selection)]
            });
            assert!(worst < 1e-7, "{shared} {active}: {worst}");
        }
        let worst = check::worst(Engine::Cpu, &[clear_of_boundaries()], &[], |tape, v| {
            vec![head_gates(tape, None, &v[0], None, 2).0]
        });
        assert!(worst < 1e-7, "without shared heads: {worst}");
    }

    #[test]
    fn gradients_of_the_loss_of_depths_agree_with_differences() {
        let input = Input::random(4, ROWS, 1, 1.0);
        let selection = Arc::new(depths::best(&input.data, &OFFSETS, 0.5));
        let worst = check::worst(Engine::Cpu, &[input], &[], |tape, v| vec![depth_loss(tape, &v[0], &selection)]);
        assert!(worst < 1e-8, "{worst}");
    }

    #[test]
    fn scores_without_gradient_record_nothing() {
        let policy = policy(r#"{"kind": "top_p", "num_experts": 5}"#);
        let arena = Arena::default();
        let mut tape = Tape::<f32>::new(Engine::Cpu, &[], &arena);
        let scores = tape.constant(&[0.5; ROWS * WIDTH], ROWS, WIDTH);
        let (weights, routing) = route(&mut tape, &scores, &policy, &RouterInput::new(&OFFSETS, &[], 0), Mode::Train);
        let (gates, selection) = head_gates(&mut tape, None, &scores, None, 2);
        let values = [
            balance_loss(&mut tape, &scores, &routing),
            entropy_loss(&mut tape, &scores),
            z_loss(&mut tape, &scores),
            head_balance_loss(&mut tape, &scores, &selection),
        ];
        assert!(!weights.needs_grad() && !gates.needs_grad() && values.iter().all(|v| !v.needs_grad()));
        assert_eq!(Arc::strong_count(&routing), 1, "no node holds the routing");
        assert!(values.iter().all(|v| v.scalar() > 0.0));
    }

    #[test]
    fn single_precision_agrees_with_double() {
        fn run<T: Real>(input: &[Input; 1]) -> Vec<f64> {
            let policy = policy(r#"{"kind": "top_p", "num_experts": 5, "p": 0.7, "renormalize": true}"#);
            let op = |tape: &mut Tape<'_, T>, v: &[Value<T>]| {
                let parts = RouterInput::new(&OFFSETS, &[], 0);
                let (weights, routing) = route(tape, &v[0], &policy, &parts, Mode::Train);
                let losses = [balance_loss(tape, &v[0], &routing), entropy_loss(tape, &v[0]), z_loss(tape, &v[0])];
                [vec![weights], losses.to_vec()].concat()
            };
            let (value, mut gradients) = check::analytic::<T>(Engine::Cpu, input, &[], op);
            gradients[0].push(value);
            gradients.remove(0)
        }
        let input = [clear_of_boundaries()];
        let pairs = run::<f64>(&input).into_iter().zip(run::<f32>(&input));
        pairs.for_each(|(wide, narrow)| assert!((wide - narrow).abs() < 1e-5, "{wide} {narrow}"));
    }
}
