//! Another choice in place of a policy's own, for questions of the kind "what if": the routing of an earlier pass again, or some of the experts only.
//! Weights are made of the router's scores as ever, and so is their gradient.

use crate::{Mode, Policy, RouterInput, Routing, assign, assign_backward};
use std::collections::BTreeMap;
use std::sync::Arc;
use tensor::Real;

/// The experts of every token of a layer by document, that is by its token ids.
pub type Rows = BTreeMap<Vec<u32>, Vec<Vec<u32>>>;

/// A score that a softmax turns into exactly 0, in f32 and f64.
const NEVER: f64 = -1e30;

#[derive(Clone, Debug, PartialEq)]
pub enum Ruling {
    /// Tokens of these documents go where they went; those of other documents, and of one that is being continued, where the policy sends them.
    Replay(Arc<Rows>),
    /// Experts that are there; the policy chooses among them as if there were no others.
    Only(Vec<bool>),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Overruled {
    pub policy: Policy,
    ruling: Ruling,
    renormalize: bool,
}

impl Overruled {
    /// None for a policy whose weights are more than the probabilities of the chosen, and where no expert would be left.
    pub fn new(policy: Policy, ruling: Ruling) -> Option<Self> {
        let renormalize = match &policy {
            Policy::TopP(policy) => policy.renormalize,
            Policy::TopK(policy) => policy.renormalize,
            Policy::Forced(_) => true,
            Policy::ExpertChoice(_) => false,
            Policy::LearnedP(_) | Policy::Overruled(_) => return None,
        };
        match &ruling {
            Ruling::Only(there) if there.len() != policy.num_experts() || !there.contains(&true) => None,
            _ => Some(Overruled { policy, ruling, renormalize }),
        }
    }

    pub fn route<T: Real>(&self, input: &RouterInput<'_, T>, mode: Mode) -> (Routing, Vec<T>) {
        match &self.ruling {
            Ruling::Replay(rows) => self.replay(rows, input, mode),
            Ruling::Only(there) => {
                let masked = masked(input.scores_ne, there);
                let input = input.with_scores(&masked, input.num_ids);
                let (routing, _) = self.policy.route(&input, mode);
                assign(&input, there.len(), self.renormalize, |t, _, row| {
                    row.extend(routing.row(t).iter().filter(|id| there[**id as usize]));
                })
            }
        }
    }

    fn replay<T: Real>(&self, rows: &Rows, input: &RouterInput<'_, T>, mode: Mode) -> (Routing, Vec<T>) {
        let documents = input.offsets_b1.windows(2).map(|ends| ends[0]..ends[1]);
        let known = |range: &std::ops::Range<usize>| match input.start {
            0 => rows.get(&input.tokens_n[range.clone()]),
            _ => None,
        };
        let recorded: Vec<Option<&Vec<Vec<u32>>>> = documents.clone().map(|range| known(&range)).collect();
        let live = recorded.contains(&None).then(|| self.policy.route(input, mode).0);
        let mut chosen: Vec<&[u32]> = Vec::with_capacity(input.num_tokens());
        for (range, recorded) in documents.zip(recorded) {
            match (recorded, &live) {
                (Some(rows), _) => chosen.extend(rows.iter().map(Vec::as_slice)),
                (None, Some(live)) => chosen.extend(range.map(|t| live.row(t))),
                (None, None) => unreachable!("the policy is asked where a document is not recorded"),
            }
        }
        let num_experts = self.policy.num_experts();
        assign(input, num_experts, self.renormalize, |t, _, row| row.extend_from_slice(chosen[t]))
    }

    /// dscores += the gradient of the weights, the choice held constant.
    pub fn backward<T: Real>(&self, scores_ne: &[T], routing: &Routing, dweights_a: &[T], dscores_ne: &mut [T]) {
        match &self.ruling {
            Ruling::Replay(_) => assign_backward(scores_ne, routing, self.renormalize, dweights_a, dscores_ne),
            Ruling::Only(there) => {
                assign_backward(&masked(scores_ne, there), routing, self.renormalize, dweights_a, dscores_ne);
            }
        }
    }
}

/// Scores with those of experts that are not there out of the way.
fn masked<T: Real>(scores_ne: &[T], there: &[bool]) -> Vec<T> {
    let never = T::from_f64(NEVER);
    scores_ne.iter().zip(there.iter().cycle()).map(|(score, there)| if *there { *score } else { never }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::tests::policy;
    use tensor::check::{self, Input, normals};
    use tensor::{Engine, Tape, Value};

    const KINDS: [&str; 5] = [
        r#"{"kind": "top_p", "num_experts": 5, "p": 0.6}"#,
        r#"{"kind": "top_p", "num_experts": 5, "p": 1.0, "renormalize": true}"#,
        r#"{"kind": "top_k", "num_experts": 5, "k": 2}"#,
        r#"{"kind": "expert_choice", "num_experts": 5, "k": 1.5}"#,
        r#"{"kind": "forced", "num_experts": 5, "k": 2}"#,
    ];
    const TOKENS: [u32; 9] = [4, 1, 2, 4, 1, 7, 7, 7, 3];
    const OFFSETS: [usize; 4] = [0, 3, 5, 9];

    fn input(scores: &[f64]) -> RouterInput<'_, f64> {
        RouterInput::new(&OFFSETS, &TOKENS, 0).with_scores(scores, 5)
    }

    fn recorded(routing: &Routing) -> Rows {
        let document = |ends: &[usize]| {
            let rows = (ends[0]..ends[1]).map(|t| routing.row(t).to_vec()).collect();
            (TOKENS[ends[0]..ends[1]].to_vec(), rows)
        };
        OFFSETS.windows(2).map(document).collect()
    }

    #[test]
    fn a_replay_of_the_same_scores_is_the_same_routing_and_one_of_others_keeps_the_choice() {
        let (scores, others) = (normals(1, 45, 1.0), normals(2, 45, 1.0));
        for kind in KINDS {
            let own = policy(kind);
            let (routing, weights) = own.route(&input(&scores), Mode::Evaluate);
            let replay = |rows| Overruled::new(own.clone(), Ruling::Replay(Arc::new(rows))).unwrap();
            let all = replay(recorded(&routing));
            assert_eq!(all.route(&input(&scores), Mode::Evaluate), (routing.clone(), weights), "{kind}");
            let (same, moved) = all.route(&input(&others), Mode::Train);
            assert_eq!(same, routing, "{kind}");
            assert!(kind.contains("\"k\": 1.5") || moved.iter().all(|w| *w > 0.0), "{kind}");
            // A document that is not recorded, and one that goes on, are routed by the policy.
            let mut rows = recorded(&routing);
            rows.remove(&TOKENS[3..5]);
            let live = own.route(&input(&others), Mode::Evaluate).0;
            let (mixed, _) = replay(rows).route(&input(&others), Mode::Evaluate);
            for t in 0..9 {
                assert_eq!(mixed.row(t), if (3..5).contains(&t) { live.row(t) } else { routing.row(t) }, "{kind}");
            }
            assert_eq!(
                all.route(&input(&others).starting_at(1), Mode::Evaluate),
                own.route(&input(&others).starting_at(1), Mode::Evaluate)
            );
        }
    }

    #[test]
    fn experts_that_are_not_there_are_as_if_they_had_never_been() {
        let scores = normals(3, 45, 1.0);
        let there = [true, false, true, false, true];
        let left: Vec<f64> = scores.iter().zip(there.iter().cycle()).filter(|(_, t)| **t).map(|(s, _)| *s).collect();
        for kind in &KINDS[..3] {
            let only = Overruled::new(policy(kind), Ruling::Only(there.to_vec())).unwrap();
            let (routing, weights) = only.route(&input(&scores), Mode::Evaluate);
            let three = policy(&kind.replace("\"num_experts\": 5", "\"num_experts\": 3"));
            let (small, expected) =
                three.route(&RouterInput::new(&OFFSETS, &TOKENS, 0).with_scores(&left, 3), Mode::Evaluate);
            let renamed: Vec<u32> = small.expert_ids_a.iter().map(|id| 2 * id).collect();
            assert_eq!((&routing.expert_ids_a, &routing.row_offsets_n1), (&renamed, &small.row_offsets_n1), "{kind}");
            assert!(weights.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-15), "{kind}");
        }
        let one = Overruled::new(policy(KINDS[2]), Ruling::Only(vec![false, true, false, false, false])).unwrap();
        let (routing, weights) = one.route(&input(&scores), Mode::Evaluate);
        assert!(routing.expert_ids_a == [1; 9] && weights == [1.0; 9], "fewer than k are left");
        for bad in [vec![false; 5], vec![true; 4]] {
            assert_eq!(Overruled::new(policy(KINDS[2]), Ruling::Only(bad)), None);
        }
        let learned = policy(r#"{"kind": "learned_p", "num_experts": 5}"#);
        assert_eq!(Overruled::new(learned, Ruling::Only(vec![true; 5])), None);
    }

    #[test]
    fn gradients_agree_with_differences() {
        let first = normals(1, 45, 1.0);
        for kind in KINDS {
            let own = policy(kind);
            let rows = recorded(&own.route(&input(&first), Mode::Evaluate).0);
            let replay = Ruling::Replay(Arc::new(rows));
            for ruling in [replay, Ruling::Only(vec![true, true, false, true, true])] {
                if matches!(ruling, Ruling::Only(_)) && !kind.contains("1.0") && !kind.contains("forced") {
                    continue; // a difference may cross a boundary of the choice
                }
                let policy = Policy::Overruled(Box::new(Overruled::new(own.clone(), ruling).unwrap()));
                let op = |tape: &mut Tape<'_, f64>, v: &[Value<f64>]| {
                    let parts = RouterInput::new(&OFFSETS, &TOKENS, 0);
                    vec![crate::node::route(tape, &v[0], &policy, &parts, Mode::Evaluate).0]
                };
                let worst = check::worst(Engine::Cpu, &[Input::random(7, 9, 5, 1.0)], &[], op);
                assert!(worst < 1e-7, "{kind}: {worst}");
            }
        }
    }
}
