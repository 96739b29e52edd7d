//! The shapes that are timed: the presets of the PyTorch peer (benches/torch_peer.py), whole or with keys changed.

use super::Options;
use crate::data::Batch;
use crate::error::TrainError;
use crate::estimate;
use crate::learner::Learner;
use crate::run::Run;
use std::path::Path;
use tensor::Random;
use tensor::random::Purpose;

struct Preset {
    name: &'static str,
    model: [usize; 7], // hidden_size, num_layers, num_heads, num_kv_heads, num_experts, expert_hidden_size, intermediate_size
    vocab: usize,
    seq: usize,
    batch: usize,
}

const PRESETS: [Preset; 3] = [
    Preset { name: "seed", model: [128, 3, 8, 4, 4, 128, 256], vocab: 600, seq: 80, batch: 8 },
    Preset { name: "small", model: [384, 6, 6, 2, 8, 512, 1024], vocab: 512, seq: 256, batch: 16 },
    Preset { name: "medium", model: [768, 12, 12, 4, 8, 1024, 2048], vocab: 32_000, seq: 1024, batch: 8 },
];

/// The peer's table of contextual positions has 64 rows: 0 to 63.
const POSITION_MAX: usize = 63;

/// Standard deviation of the scores of a normed input under routers uniform in ±1/√d.
const SCORE_STD: f64 = 0.577;

/// A model and the shape of its batch.
pub struct Case {
    pub run: Run,
    pub vocab: usize,
    seq: usize,
    documents: usize,
}

impl Case {
    pub fn new(options: &Options) -> Result<Self, TrainError> {
        let known = PRESETS.map(|preset| preset.name).join(", ");
        let preset = PRESETS.iter().find(|preset| preset.name == options.preset);
        let Some(preset) = preset else {
            return Err(TrainError::Usage(format!("--preset {:?}: must be one of {known}", options.preset)));
        };
        let sizes = [
            ("--vocab", options.vocab.unwrap_or(preset.vocab), 1 << 24),
            ("--seq", options.seq.unwrap_or(preset.seq), 1 << 24),
            ("--batch", options.batch.unwrap_or(preset.batch), 1 << 24),
        ];
        if let Some((flag, value, most)) = sizes.iter().find(|(_, value, most)| !(1..=*most).contains(value)) {
            return Err(TrainError::Usage(format!("{flag} {value}: must be from 1 to {most}")));
        }
        let [(_, vocab, _), (_, seq, _), (_, documents, _)] = sizes;
        let run = Run::from_toml_str(&preset.toml(options), Path::new("."), &options.sets)
            .map_err(|error| TrainError::Usage(error.to_string()))?;
        run.engine.check(&run.device).map_err(|error| TrainError::Usage(error.to_string()))?;
        Ok(Case { run, vocab, seq, documents })
    }

    /// One random batch: documents of `seq` inputs and as many targets.
    pub fn batch(&self) -> Batch {
        let random = Random::new(self.run.seed, Purpose::Bench);
        let id = |document: usize, i: usize| random.below(document as u64, i as u64, self.vocab) as u32;
        let mut batch = Batch { offsets_b1: vec![0], ..Batch::default() };
        for document in 0..self.documents {
            batch.tokens_n.extend((0..self.seq).map(|i| id(document, i)));
            batch.targets_n.extend((1..=self.seq).map(|i| id(document, i)));
            batch.offsets_b1.push(batch.tokens_n.len());
            batch.documents.push(document);
        }
        batch.loss_weights_n = vec![1.0; batch.tokens_n.len()];
        batch
    }

    /// Router weights uniform in ±1/√d, PyTorch's initialisation, so that as many experts are active as in the peer.
    pub fn initialise_routers(&self, learner: &mut Learner) {
        let random = Random::new(self.run.seed, Purpose::Bench);
        let bound = (self.run.model.hidden_size as f64).powf(-0.5);
        let layout = learner.model.layout.clone();
        let routers = layout.iter().filter(|(name, _)| name.ends_with(".mlp.gate.weight"));
        for (layer, (_, router)) in routers.enumerate() {
            for (j, weight) in learner.params[router.range(0)].iter_mut().enumerate() {
                *weight = (bound * (2.0 * random.uniform((1 << 31) + layer as u64, j as u64) - 1.0)) as f32;
            }
        }
    }

    /// What the steps will take; an error where the machine has not the memory.
    pub fn memory(&self) -> Result<estimate::Memory, TrainError> {
        let tokens = self.documents * self.seq; // every step is an epoch
        let memory = estimate::Memory::new(&self.run, self.vocab, [tokens, self.seq, tokens], SCORE_STD);
        match self.run.device.as_str() {
            "cpu" => memory.check("a smaller --batch, --seq or --preset").map(|()| memory),
            _ => Ok(memory),
        }
    }
}

impl Preset {
    fn toml(&self, options: &Options) -> String {
        let [d, layers, heads, kv_heads, experts, hidden, intermediate] = self.model;
        let max = if options.position == "cope" { format!(", max = {POSITION_MAX}") } else { String::new() };
        let position = format!("{{ kind = {:?}{max} }}", options.position);
        let router = match options.dense {
            true => "{ kind = \"dense\" }".to_owned(),
            false => format!("{{ kind = \"top_p\", p = 0.4, num_experts = {experts}, expert_hidden_size = {hidden} }}"),
        };
        let mixture = match options.no_moh {
            true => "{ routed = 0 }".to_owned(),
            false => {
                let shared = (heads / 4).max(1);
                let routed = heads - shared;
                format!("{{ shared = {shared}, routed = {routed}, active = {} }}", (2 * routed).div_ceil(3))
            }
        };
        format!(
            "name = \"bench\"\n[model]\nhidden_size = {d}\nnum_layers = {layers}\nnum_heads = {heads}\nnum_kv_heads = {kv_heads}\n\
             intermediate_size = {intermediate}\nrms_norm_eps = 1e-5\nposition = {position}\nheads = {mixture}\nrouter = {router}\n\
             [train]\noptimizer = \"adamw\"\nlr_scale = \"none\"\nweight_decay = 0.01\nclip = 1e9\n\
             [losses]\nbalance = 0.01\nentropy = 1e-4\nheads = 0.01\n"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_the_peers() {
        for (preset, moh, active) in [("seed", (2, 6), 4), ("small", (1, 5), 4), ("medium", (3, 9), 6)] {
            let case = Case::new(&Options { preset: preset.into(), ..Options::default() }).unwrap();
            let heads = &case.run.model.heads;
            assert_eq!((heads.shared, heads.routed, heads.active), (moh.0, moh.1, active));
        }
        let case = Case::new(&Options { preset: "seed".into(), ..Options::default() }).unwrap();
        let rope = Options { position: "rope".into(), dense: true, no_moh: true, ..Options::default() };
        assert_eq!(Case::new(&rope).unwrap().run.model.heads.routed, 0);
        let batch = case.batch();
        assert_eq!((batch.len(), batch.documents.len(), batch.offsets_b1.last()), (640, 8, Some(&640)));
        assert_eq!(batch.tokens_n[1..80], batch.targets_n[..79], "targets are the next tokens");
    }

    #[test]
    fn what_cannot_be_timed_is_refused_by_name() {
        let bad = |options: Options| Case::new(&options).map(|_| ()).unwrap_err().to_string();
        assert!(bad(Options { preset: "huge".into(), ..Options::default() }).contains("seed, small, medium"));
        assert!(bad(Options { seq: Some(0), ..Options::default() }).contains("--seq 0"));
        assert!(bad(Options { position: "alibi".into(), ..Options::default() }).contains("alibi"));
        assert!(bad(Options { sets: vec!["model.hiden_size=3".into()], ..Options::default() }).contains("hidden_size"));
        let wide = Options { sets: vec!["model.hidden_size=98304".into()], ..Options::default() };
        let refused = Case::new(&wide).unwrap().memory().unwrap_err();
        assert!(refused.exit_status() == 2 && refused.to_string().contains("GiB"), "{refused}");
    }
}
