//! Everything a run reads, ready to train on: tokenizer, one training set per phase with its floor, held-out sets, questions to recite.

use crate::data::augment::{self, Augmentation, Variant};
use crate::data::{DataError, Document, DocumentOrder, DocumentSet, Floor, ItemFile, Role, Source, TextFile};
use crate::data::{TextSource, Tokenizer, Unknowns, split_chat, split_documents};
use crate::routing::Recording;
use crate::run::Run;
use moe_router::Policy;
use std::collections::BTreeSet;
use std::path::Path;

/// Tokens of an answer where no document is longer.
const LONGEST_ANSWER: usize = 1024;

/// A prompt and the answer that is expected after it.
#[derive(Clone, Debug)]
pub struct Question {
    pub prompt: Vec<u32>,
    pub answer: Vec<u32>,
}

pub enum PhaseData {
    Documents { train: DocumentSet, validation: DocumentSet, order: DocumentOrder },
    Text(TextSource),
}

pub struct Phase {
    /// "facts", "chat" or "text".
    pub name: &'static str,
    pub data: PhaseData,
    /// The lowest loss on the training documents; not defined for random windows of a text.
    pub floor: Option<Floor>,
    /// Training documents before the first variant of one.
    pub originals: usize,
    /// The lowest loss on documents and variants together, where there are any.
    pub augmented_floor: Option<Floor>,
}

impl Phase {
    /// Training documents without their variants; none for text.
    pub fn documents(&self) -> Vec<&Document> {
        match &self.data {
            PhaseData::Documents { train, .. } => train.documents.iter().take(self.originals).collect(),
            PhaseData::Text(_) => Vec::new(),
        }
    }
}

pub struct Dataset {
    pub tokenizer: Tokenizer,
    pub phases: Vec<Phase>,
    /// Training dialogues as prompt and answer.
    pub questions: Vec<Question>,
    /// Held-out wordings of training questions; never trained on.
    pub paraphrases: Vec<Question>,
    pub paraphrase_set: Option<DocumentSet>,
    /// What was read, by role, and the variants that were made of it.
    pub sources: Vec<(&'static str, Source)>,
    /// Variants of training documents.
    pub variants: Vec<Variant>,
    /// Routing that is given, and its file.
    pub routing: Option<(Recording, String)>,
    /// Words of held-out text (validation, paraphrases) that the vocabulary lacks.
    pub unknowns: Unknowns,
}

/// The items of a file in their training and held-out parts.
struct Items {
    file: ItemFile,
    train: Vec<usize>,
    validation: Vec<usize>,
}

impl Items {
    fn read(run: &Run, path: Option<&Path>, role: Role, phase: u32) -> Result<Self, DataError> {
        let file = read_items(path, role)?;
        let (train, validation) =
            split_documents(&file.source.name, file.items.len(), run.data.val_fraction, run.seed, phase)?;
        Ok(Items { file, train, validation })
    }

    fn training_texts(&self) -> impl Iterator<Item = &str> {
        self.train.iter().map(|&i| self.file.items[i].as_str())
    }
}

fn read_items(path: Option<&Path>, role: Role) -> Result<ItemFile, DataError> {
    path.map_or_else(|| ItemFile::shipped(role), |path| ItemFile::read(path, role))
}

impl Dataset {
    /// Reads and encodes all data of a run. The vocabulary comes from the training parts alone.
    pub fn load(run: &Run) -> Result<Self, DataError> {
        match &run.data.text {
            Some(path) => Self::text(run, path),
            None => Self::facts_and_chat(run),
        }
    }

    fn text(run: &Run, path: &Path) -> Result<Self, DataError> {
        let file = TextFile::read(path)?;
        let tokenizer = Tokenizer::from_setting(&run.data.tokenizer, [file.text.as_str()])?;
        let mut unknowns = Unknowns::default();
        let tokens = tokenizer.encode_counting(&file.text, &mut unknowns)?;
        let batch_size = run.phase("text").batch_size;
        let source = TextSource::new(
            &file.source.name,
            tokens,
            run.data.val_fraction,
            run.data.block_size,
            batch_size,
            run.seed,
        )?
        .with_lengths(&file.source.name, &run.data.lengths)?;
        let phases = vec![Phase {
            name: "text",
            data: PhaseData::Text(source),
            floor: None,
            originals: usize::MAX,
            augmented_floor: None,
        }];
        let sources = vec![("text", file.source)];
        Ok(Dataset {
            tokenizer,
            phases,
            questions: vec![],
            paraphrases: vec![],
            paraphrase_set: None,
            sources,
            variants: vec![],
            routing: None,
            unknowns,
        })
    }

    fn facts_and_chat(run: &Run) -> Result<Self, DataError> {
        let facts = Items::read(run, run.data.facts.as_deref(), Role::Facts, 0)?;
        let chat = Items::read(run, run.data.chat.as_deref(), Role::Chat, 1)?;
        let held_out = match (&run.data.paraphrases, &run.data.chat) {
            (None, Some(_)) => None, // the shipped paraphrases ask the shipped chat alone
            (path, _) => Some(read_items(path.as_deref(), Role::Paraphrases)?),
        };
        let texts = facts.training_texts().chain(chat.training_texts());
        let tokenizer = Tokenizer::from_setting(&run.data.tokenizer, texts)?;
        let length = run.data.max_length;
        let augmentation = Augmentation::read(&run.data.augment, run.seed)?;
        let mut taken = match &augmentation {
            Some(_) => identities([&facts.file, &chat.file].into_iter().chain(&held_out), &tokenizer)?,
            None => BTreeSet::new(),
        };
        let mut variants = Vec::new();
        let mut unknowns = Unknowns::default();
        let mut phases = Vec::new();
        for (number, name, items) in [(0, "facts", &facts), (1, "chat", &chat)] {
            let part =
                |indices: &[usize]| DocumentSet::encode_items(&items.file, indices.iter().copied(), &tokenizer, length);
            let (mut train, validation) = (part(&items.train)?, part(&items.validation)?);
            unknowns.merge(&validation.unknowns);
            let (floor, originals) = (train.floor(), train.documents.len());
            if let Some(augmentation) = &augmentation {
                let place = (number, name, items.file.role);
                let made = augmentation.variants(place, &items.file.items, &items.train, &tokenizer, &mut taken)?;
                train.extend(made.iter().map(|variant| &*variant.text), &tokenizer, length)?;
                variants.extend(made);
            }
            let augmented_floor = (train.documents.len() > originals).then(|| train.floor()).flatten();
            let batch_size = run.phase(name).batch_size;
            let order = DocumentOrder::new(run.seed, number, train.documents.len(), batch_size, run.data.shuffle)?;
            let data = PhaseData::Documents { train, validation, order };
            phases.push(Phase { name, data, floor, originals, augmented_floor });
        }
        let questions = questions(chat.training_texts(), &tokenizer, length)?;
        let (mut paraphrases, mut paraphrase_set) = (Vec::new(), None);
        let mut sources = vec![("facts", facts.file.source.clone()), ("chat", chat.file.source.clone())];
        if let Some(file) = held_out {
            paraphrases = self::questions(file.items.iter().map(String::as_str), &tokenizer, length)?;
            let set = DocumentSet::encode(&file, &tokenizer, length)?;
            unknowns.merge(&set.unknowns);
            paraphrase_set = Some(set);
            sources.push(("paraphrases", file.source));
        }
        if let Some(augmentation) = augmentation {
            if variants.is_empty() {
                return Err(DataError::NoVariants { file: augmentation.source.name });
            }
            sources.push(("augment", augmentation.source));
            sources.push(("augmented", augment::record(&variants).1));
        }
        let routing = match &run.data.routing {
            Some(path) => {
                let (recording, source) = recorded(path, &tokenizer, &phases)?;
                sources.push(("routing", source));
                Some((recording, path.display().to_string()))
            }
            None => None,
        };
        Ok(Dataset { tokenizer, phases, questions, paraphrases, paraphrase_set, sources, variants, routing, unknowns })
    }

    /// The policies of a run, told what routing is given.
    pub fn overrule(&self, policies: Vec<Policy>) -> Result<Vec<Policy>, DataError> {
        match &self.routing {
            Some((recording, file)) => {
                recording.overrule(policies).map_err(|reason| DataError::BadRouting { file: file.clone(), reason })
            }
            None => Ok(policies),
        }
    }

    /// The token that ends an answer, where the tokenizer has it as one.
    pub fn stop(&self) -> Option<u32> {
        match self.tokenizer.end()[..] {
            [id] => Some(id),
            _ => None,
        }
    }

    /// Tokens that an answer or a sample may have: `data.max_length`, but no more than a text that is read here could make sense of. A model
    /// that never ends a text would otherwise write for as long as the key allows.
    pub fn longest_answer(&self, run: &Run) -> usize {
        run.data.max_length.min(self.longest().max(LONGEST_ANSWER))
    }

    /// Tokens of the longest document or window.
    pub fn longest(&self) -> usize {
        let length = |phase: &Phase| match &phase.data {
            PhaseData::Documents { train, validation, .. } => {
                train.documents.iter().chain(&validation.documents).map(|d| d.tokens.len()).max().unwrap_or(0)
            }
            PhaseData::Text(text) => text.longest() + 1,
        };
        self.phases.iter().map(length).max().unwrap_or(0)
    }
}

/// The recorded routing of a file that must know every training document.
fn recorded(path: &Path, tokenizer: &Tokenizer, phases: &[Phase]) -> Result<(Recording, Source), DataError> {
    let (recording, source) = Recording::read(path)?;
    let bad = |reason: String| DataError::BadRouting { file: path.display().to_string(), reason };
    recording.check_tokenizer(&tokenizer.sha256()).map_err(bad)?;
    for phase in phases {
        let PhaseData::Documents { train, .. } = &phase.data else { continue };
        let missing = train.documents.iter().filter(|document| !recording.contains(document.inputs())).count();
        if missing > 0 {
            let reason = format!("{missing} of the {} {} documents are not in it", train.documents.len(), phase.name);
            return Err(bad(format!("{reason}; record a run on the same data")));
        }
    }
    Ok((recording, source))
}

/// What no variant may be: every item of the files, trained on or held out.
fn identities<'f>(
    files: impl Iterator<Item = &'f ItemFile>,
    tokenizer: &Tokenizer,
) -> Result<BTreeSet<Vec<u32>>, DataError> {
    files.flat_map(|file| file.items.iter().map(|item| augment::identity(item, file.role, tokenizer))).collect()
}

/// Dialogues as prompt and answer, cut like the training documents.
fn questions<'t>(
    items: impl Iterator<Item = &'t str>,
    tokenizer: &Tokenizer,
    max_length: usize,
) -> Result<Vec<Question>, DataError> {
    let mut questions = Vec::new();
    for item in items {
        let Ok(exchange) = split_chat(item) else { continue }; // files were checked when read
        let prompt = tokenizer.encode(exchange.prompt)?;
        let mut whole = tokenizer.encode(item)?;
        whole.truncate(max_length);
        if whole.len() > prompt.len() && whole.starts_with(&prompt) {
            questions.push(Question { answer: whole.split_off(prompt.len()), prompt });
        }
    }
    Ok(questions)
}
