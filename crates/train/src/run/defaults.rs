//! The default of every value: the baseline's, where it has one.

use super::{
    Augment, BatchScaling, Checkpoint, Data, Eval, Losses, LrScale, Monitor, OnNonfinite, OnSpike, Optimizer, Phases,
    Response, Run, Schedule, Train, Warmup,
};
use tensor::{Engine, Precision};

impl Default for Run {
    fn default() -> Self {
        Self {
            name: "run".into(),
            seed: 0,
            engine: Engine::default(),
            device: "cpu".into(),
            dtype: Precision::default(),
            threads: 0,
            quick: false,
            data: Data::default(),
            model: model::Model::default(),
            train: Train::default(),
            losses: Losses::default(),
            monitor: Monitor::default(),
            eval: Eval::default(),
            checkpoint: Checkpoint::default(),
            phase: Phases::default(),
        }
    }
}

impl Default for Data {
    fn default() -> Self {
        Self {
            facts: None,
            chat: None,
            paraphrases: None,
            text: None,
            tokenizer: "word".into(),
            max_length: 80,
            block_size: 64,
            lengths: Vec::new(),
            val_fraction: 0.0,
            shuffle: false,
            routing: None,
            augment: Augment::default(),
        }
    }
}

impl Default for Augment {
    fn default() -> Self {
        Self { copies: 0, templates: 0.5, synonyms: 0.3, drop: 0.0, table: None }
    }
}

impl Default for Train {
    fn default() -> Self {
        Self {
            learning_rate: 1e-4,
            lr_scale: LrScale::default(),
            batch_scaling: BatchScaling::default(),
            base_batch_size: 8,
            batch_size: 8,
            accumulate: 1,
            activation_checkpointing: false,
            epochs: 100,
            max_steps: 2000,
            optimizer: Optimizer::default(),
            schedule: Schedule::default(),
            warmup: Warmup::default(),
            warmup_epochs: 15,
            warmup_steps: 100,
            min_lr_ratio: 0.1,
            power: 2.0,
            decay_share: 0.2,
            restart_every: 10,
            restart_growth: 2,
            clip: 100.0,
            clip_percentile: 0.0,
            clip_window: 200,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            momentum: 0.9,
            trust: 1e-3,
            ema: 0.0,
            sam: 0.0,
            noise_scale: 0,
            patience: 0,
            min_delta: 1e-3,
            on_nonfinite: OnNonfinite::default(),
            on_spike: OnSpike::default(),
        }
    }
}

impl Default for Losses {
    fn default() -> Self {
        Self { balance: 0.01, entropy: 1e-4, budget: 0.01, z: 0.0, heads: 0.01, depths: 0.01, label_smoothing: 0.0 }
    }
}

impl Default for Monitor {
    fn default() -> Self {
        Self {
            exploding: 0.0,
            vanishing: 0.0,
            layer_exploding: 0.0,
            layer_vanishing: 0.0,
            update_ratio: 0.0,
            response: Response::default(),
            factor: 0.5,
            cooldown: 50,
        }
    }
}

impl Default for Eval {
    fn default() -> Self {
        Self { every: 0, batches: 100, samples: Vec::new() }
    }
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self { every: 0, keep: 3, keep_every: 0, best: false }
    }
}
