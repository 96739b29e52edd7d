//! A step in steady state asks the system for nothing. A process of its own: page faults are counted for the whole process.
#![cfg(target_os = "linux")]

use train::data::Batch;
use train::epoch::Epoch;
use train::learner::Learner;
use train::run::Run;

/// Minor page faults of this process so far, and its largest resident set in KiB.
fn faults_and_peak() -> (u64, u64) {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let faults = stat.rsplit(')').next().unwrap().split_whitespace().nth(7).unwrap();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    (faults.parse().unwrap(), peak.trim().trim_end_matches(" kB").parse().unwrap())
}

/// `documents` documents of `length` tokens whose ids repeat.
fn batch(documents: usize, length: usize) -> Batch {
    let n = documents * length;
    Batch {
        tokens_n: (0..n as u32).map(|i| i * 7 % 61).collect(),
        targets_n: (0..n as u32).map(|i| i * 5 % 61).collect(),
        loss_weights_n: vec![1.0; n],
        offsets_b1: (0..=documents).map(|i| i * length).collect(),
        documents: (0..documents).collect(),
    }
}

#[test]
fn a_step_in_steady_state_asks_for_no_page() {
    let run = Run::parse(
        r#"
        threads = 2
        [model]
        hidden_size = 64
        num_layers = 2
        num_heads = 4
        num_kv_heads = 2
        heads = { shared = 1, routed = 3, active = 2 }
        router = { kind = "top_p", p = 0.4, num_experts = 4, expert_hidden_size = 64 }
        "#,
    )
    .unwrap();
    let settings = run.phase("facts");
    let mut learner = Learner::new(&run, 61, &settings).unwrap();
    // Rate 0: the routing stays as it is, so that every step asks for the same. A new epoch each time, for its sample of tokens grows.
    let steps = |learner: &mut Learner, count: usize, batch: &Batch| {
        for _ in 0..count {
            let mut epoch = Epoch::new(&learner.policies);
            learner.update(batch, &settings, 0.0, &mut epoch, None).unwrap();
        }
    };
    let (long, short) = (batch(8, 80), batch(1, 3));
    steps(&mut learner, 2, &long);
    let held = learner.arena_bytes();
    // Which thread takes which piece differs from step to step: on a busy machine a thread may meet an op, and with it touch its working memory,
    // late. A step that asks for pages by itself does so in every window; a thread that comes late, in one.
    let window = |learner: &mut Learner| {
        let (faults, peak) = faults_and_peak();
        steps(learner, 20, &long);
        let (later_faults, later_peak) = faults_and_peak();
        println!("{} page faults in 20 steps, resident set {peak} to {later_peak} KiB", later_faults - faults);
        (later_faults - faults, later_peak - peak)
    };
    let calm = (0..20).any(|_| matches!(window(&mut learner), (faults, growth) if faults <= 100 && growth <= 512));
    assert!(calm, "20 steps never ended without asking for pages");
    assert_eq!(learner.arena_bytes(), held, "the arena grew after the second step");
    // A tiny batch after a large one, and back.
    steps(&mut learner, 2, &short);
    steps(&mut learner, 2, &long);
    let both = learner.arena_bytes();
    (0..5).for_each(|_| [&short, &long].iter().for_each(|batch| steps(&mut learner, 1, batch)));
    assert_eq!(learner.arena_bytes(), both);
}
