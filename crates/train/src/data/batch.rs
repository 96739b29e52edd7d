//! Documents and text windows as ragged batches. Which documents or windows a step sees is a pure function of (seed, phase, epoch or step), so
//! a resumed run needs no more than its position.

use super::corpus::ItemFile;
use super::tokenizer::{Tokenizer, Unknowns};
use super::{DataError, Floor};
use std::ops::Range;
use tensor::Random;
use tensor::random::Purpose;

/// Random numbers are keyed by a 32-bit step: 4 bits of phase, 28 bits of epoch. Phase 15 is kept for the validation split.
const EPOCH_BITS: u32 = 28;
const SPLIT_PHASE: u64 = 15;
/// Windows for evaluation draw from another half of the indices than those for training.
const EVALUATION: u64 = 1 << 63;
const EVALUATION_SEED: u64 = 0;

/// One item as token ids, at least 2: inputs are all but the last, targets all but the first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    pub tokens: Vec<u32>,
}

impl Document {
    /// What is read: all but the last token.
    pub fn inputs(&self) -> &[u32] {
        &self.tokens[..self.targets()]
    }

    /// Number of predicted tokens.
    pub fn targets(&self) -> usize {
        self.tokens.len() - 1
    }
}

/// A ragged batch of b documents with n targets in all; document i has the rows `offsets_b1[i]..offsets_b1[i + 1]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    pub tokens_n: Vec<u32>,
    pub targets_n: Vec<u32>,
    /// Weight of each target in the loss Σ w CE / Σ w: 1/targets of its document, or 1 for text.
    pub loss_weights_n: Vec<f64>,
    /// b + 1 row numbers, from 0 to n.
    pub offsets_b1: Vec<usize>,
    /// Which documents of the set these are; for text, where the windows start.
    pub documents: Vec<usize>,
}

impl Batch {
    fn empty() -> Self {
        Batch { offsets_b1: vec![0], ..Batch::default() }
    }

    fn push(&mut self, document: usize, tokens: &[u32], weight: f64) {
        let targets = tokens.len() - 1;
        self.tokens_n.extend_from_slice(&tokens[..targets]);
        self.targets_n.extend_from_slice(&tokens[1..]);
        self.loss_weights_n.resize(self.tokens_n.len(), weight);
        self.offsets_b1.push(self.tokens_n.len());
        self.documents.push(document);
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.tokens_n.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tokens_n.is_empty()
    }

    /// Σ w: what a sum of weighted losses is divided by. With accumulation it is the whole batch's, not the micro-batch's.
    pub fn total_weight(&self) -> f64 {
        self.loss_weights_n.iter().sum()
    }

    /// Batches one after the other as one.
    pub fn join(batches: impl IntoIterator<Item = Batch>) -> Batch {
        batches.into_iter().fold(Batch::empty(), |mut all, next| {
            let rows = all.len();
            all.offsets_b1.extend(next.offsets_b1[1..].iter().map(|offset| rows + offset));
            all.tokens_n.extend(next.tokens_n);
            all.targets_n.extend(next.targets_n);
            all.loss_weights_n.extend(next.loss_weights_n);
            all.documents.extend(next.documents);
            all
        })
    }

    /// At most `parts` micro-batches of whole documents, in order, none empty, of nearly equal numbers of rows.
    pub fn split(&self, parts: usize) -> Vec<Batch> {
        let count = self.documents.len();
        let parts = parts.clamp(1, count.max(1));
        let mut cuts = vec![0];
        for part in 1..parts {
            let goal = self.len() * part / parts;
            // The document edge nearest to the goal that leaves a document for this part and each of those to come.
            let edges = cuts[part - 1] + 1..=count - (parts - part);
            cuts.push(edges.min_by_key(|&edge| self.offsets_b1[edge].abs_diff(goal)).unwrap_or(part));
        }
        cuts.push(count);
        cuts.windows(2).map(|cut| self.slice(cut[0]..cut[1])).collect()
    }

    /// The documents `range` of this batch as a batch.
    pub fn slice(&self, range: Range<usize>) -> Batch {
        let rows = self.offsets_b1[range.start]..self.offsets_b1[range.end];
        Batch {
            tokens_n: self.tokens_n[rows.clone()].to_vec(),
            targets_n: self.targets_n[rows.clone()].to_vec(),
            loss_weights_n: self.loss_weights_n[rows.clone()].to_vec(),
            offsets_b1: self.offsets_b1[range.start..=range.end].iter().map(|offset| offset - rows.start).collect(),
            documents: self.documents[range].to_vec(),
        }
    }
}

/// The encoded items of a file, cut after `max_length` tokens.
#[derive(Clone, Debug)]
pub struct DocumentSet {
    pub name: String,
    pub documents: Vec<Document>,
    /// How many items were longer than the cap.
    pub cut: usize,
    pub unknowns: Unknowns,
}

impl DocumentSet {
    /// Encodes all items of `file`.
    pub fn encode(file: &ItemFile, tokenizer: &Tokenizer, max_length: usize) -> Result<Self, DataError> {
        Self::encode_items(file, 0..file.items.len(), tokenizer, max_length)
    }

    /// Encodes the items `indices` of `file`, such as one side of a split. An item of fewer than 2 tokens is refused with its number in the file, for
    /// it has nothing to predict.
    pub fn encode_items(
        file: &ItemFile,
        indices: impl IntoIterator<Item = usize>,
        tokenizer: &Tokenizer,
        max_length: usize,
    ) -> Result<Self, DataError> {
        if max_length < 2 {
            return Err(DataError::CapTooSmall { max_length });
        }
        let name = file.source.name.clone();
        let mut set = DocumentSet { name, documents: Vec::new(), cut: 0, unknowns: Unknowns::default() };
        for index in indices {
            let mut tokens = tokenizer.encode_counting(&file.items[index], &mut set.unknowns)?;
            if tokens.len() < 2 {
                return Err(DataError::TooShort { file: set.name, item: index + 1, tokens: tokens.len() });
            }
            set.cut += usize::from(tokens.len() > max_length);
            tokens.truncate(max_length);
            set.documents.push(Document { tokens });
        }
        Ok(set)
    }

    /// Adds texts of known words, such as variants of items.
    pub fn extend<'t>(
        &mut self,
        texts: impl Iterator<Item = &'t str>,
        tokenizer: &Tokenizer,
        max_length: usize,
    ) -> Result<(), DataError> {
        for text in texts {
            let mut tokens = tokenizer.encode(text)?;
            self.cut += usize::from(tokens.len() > max_length);
            tokens.truncate(max_length);
            self.documents.push(Document { tokens });
        }
        Ok(())
    }

    /// The documents `indices` as one batch, in that order. Weights: 1/targets of the document, so that Σ w CE / Σ w is the mean over documents
    /// of per-document means.
    pub fn batch(&self, indices: &[usize]) -> Batch {
        let mut batch = Batch::empty();
        for &index in indices {
            let document = &self.documents[index];
            batch.push(index, &document.tokens, 1.0 / document.targets() as f64);
        }
        batch
    }

    /// Entropy floor of the set as it is trained on.
    pub fn floor(&self) -> Option<Floor> {
        Floor::of(&self.documents.iter().map(|document| document.tokens.as_slice()).collect::<Vec<_>>())
    }

    /// Tokens after the cap.
    pub fn tokens(&self) -> usize {
        self.documents.iter().map(|document| document.tokens.len()).sum()
    }
}

/// The order in which a phase visits its documents: file order, or a permutation keyed by (seed, phase, epoch).
#[derive(Clone, Copy, Debug)]
pub struct DocumentOrder {
    pub seed: u64,
    /// Position of the phase in the run, below 15.
    pub phase: u32,
    /// Number of documents.
    pub count: usize,
    /// Documents in a batch, at least 1; the last batch of an epoch may have fewer.
    pub batch_size: usize,
    pub shuffle: bool,
}

impl DocumentOrder {
    /// Checks that batches have at least one document.
    pub fn new(seed: u64, phase: u32, count: usize, batch_size: usize, shuffle: bool) -> Result<Self, DataError> {
        if batch_size == 0 {
            return Err(DataError::Zero { what: "train.batch_size" });
        }
        Ok(DocumentOrder { seed, phase, count, batch_size, shuffle })
    }

    pub fn batches_per_epoch(&self) -> usize {
        self.count.div_ceil(self.batch_size)
    }

    /// Where step `step` of the phase (from 0) stands: (epoch, batch in the epoch), both from 0. Needs at least one document.
    pub fn position(&self, step: u64) -> (u64, usize) {
        let per_epoch = self.batches_per_epoch() as u64;
        (step / per_epoch, (step % per_epoch) as usize)
    }

    /// All documents in the order of `epoch` (from 0).
    pub fn documents(&self, epoch: u64) -> Vec<usize> {
        if !self.shuffle {
            return (0..self.count).collect();
        }
        Random::new(self.seed, Purpose::DataOrder).permutation(stream(u64::from(self.phase), epoch), self.count)
    }

    /// The batches of `epoch` (from 0) as lists of documents.
    pub fn batches(&self, epoch: u64) -> Vec<Vec<usize>> {
        self.documents(epoch).chunks(self.batch_size).map(<[usize]>::to_vec).collect()
    }
}

fn stream(phase: u64, epoch: u64) -> u64 {
    debug_assert!(phase <= SPLIT_PHASE && epoch < 1 << EPOCH_BITS);
    phase << EPOCH_BITS | epoch
}

/// Disjoint (training, validation) indices, each ascending, drawn at random by (seed, phase), at least one on each side if `fraction` > 0.
/// `file` is for the error message.
pub fn split_documents(
    file: &str,
    count: usize,
    fraction: f64,
    seed: u64,
    phase: u32,
) -> Result<(Vec<usize>, Vec<usize>), DataError> {
    check_fraction(fraction)?;
    if fraction == 0.0 {
        return Ok(((0..count).collect(), Vec::new()));
    }
    if count < 2 {
        return Err(DataError::CannotSplit { file: file.to_string(), count });
    }
    let held_out = ((count as f64 * fraction).round() as usize).clamp(1, count - 1);
    let mut train = Random::new(seed, Purpose::DataOrder).permutation(stream(SPLIT_PHASE, u64::from(phase)), count);
    let mut validation = train.split_off(count - held_out);
    train.sort_unstable();
    validation.sort_unstable();
    Ok((train, validation))
}

fn check_fraction(fraction: f64) -> Result<(), DataError> {
    if !(0.0..1.0).contains(&fraction) {
        return Err(DataError::BadFraction { value: fraction.to_string() });
    }
    Ok(())
}

/// Which part of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    Train,
    Validation,
}

/// One long text of tokens, read through windows of `block_size` targets whose starts are drawn at random (as nanoGPT does).
#[derive(Clone, Debug)]
pub struct TextSource {
    tokens: Vec<u32>,
    /// The first `train_tokens` are for training, the rest for validation.
    train_tokens: usize,
    block_size: usize,
    /// Window lengths to draw from at each step; empty = `block_size` alone.
    lengths: Vec<usize>,
    batch_size: usize,
    seed: u64,
}

impl TextSource {
    /// Holds out the last `val_fraction` of `tokens`: the training part has ⌊tokens · (1 - val_fraction)⌋. Each part that exists must hold one
    /// window. `file` is for the error messages.
    pub fn new(
        file: &str,
        tokens: Vec<u32>,
        val_fraction: f64,
        block_size: usize,
        batch_size: usize,
        seed: u64,
    ) -> Result<Self, DataError> {
        check_fraction(val_fraction)?;
        for (value, what) in [(block_size, "data.block_size"), (batch_size, "train.batch_size")] {
            if value == 0 {
                return Err(DataError::Zero { what });
            }
        }
        let train_tokens = (tokens.len() as f64 * (1.0 - val_fraction)) as usize;
        let source = TextSource { tokens, train_tokens, block_size, lengths: Vec::new(), batch_size, seed };
        source.check_length(file, "block_size", block_size)?;
        Ok(source)
    }

    /// Windows of one of `lengths`, drawn for each step, in place of `block_size`. Each must divide the tokens of a batch.
    pub fn with_lengths(self, file: &str, lengths: &[usize]) -> Result<Self, DataError> {
        lengths.iter().try_for_each(|length| self.check_length(file, "lengths", *length))?;
        Ok(TextSource { lengths: lengths.to_vec(), ..self })
    }

    /// Each part that exists must hold a window of `length` targets.
    fn check_length(&self, file: &str, key: &'static str, length: usize) -> Result<(), DataError> {
        for (split, part) in [(Split::Train, "training"), (Split::Validation, "validation")] {
            let tokens = self.part(split).len();
            if tokens <= length && (split == Split::Train || self.has_validation()) {
                let (file, needed) = (file.to_string(), length.saturating_add(1));
                return Err(DataError::TextTooShort { file, part, tokens, key, length, needed });
            }
        }
        Ok(())
    }

    /// The tokens of a part.
    pub fn part(&self, split: Split) -> &[u32] {
        let (train, validation) = self.tokens.split_at(self.train_tokens);
        match split {
            Split::Train => train,
            Split::Validation => validation,
        }
    }

    /// Lengths that are drawn from; none where every window has `block_size` targets.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Targets in the longest window that is trained or evaluated on.
    pub fn longest(&self) -> usize {
        self.lengths.iter().copied().fold(self.block_size, usize::max)
    }

    /// Targets in each window of the training batch of `step`.
    pub fn length(&self, step: u64) -> usize {
        match self.lengths.len() {
            0 => self.block_size,
            count => self.lengths[Random::new(self.seed, Purpose::Length).below(step, 0, count)],
        }
    }

    /// Whether a part is held out.
    pub fn has_validation(&self) -> bool {
        self.train_tokens < self.tokens.len()
    }

    /// The training batch of `step`: windows with `batch_size` · `block_size` targets in all, every weight 1.
    pub fn batch(&self, step: u64) -> Batch {
        self.windows(Split::Train, self.length(step), self.seed, step, 0)
    }

    /// Fixed batches for evaluation: the same at every call and for every seed, so that runs compare on equal windows; from streams that training
    /// does not use. Of the training part if nothing is held out.
    pub fn eval_batches(&self, split: Split, count: usize) -> impl Iterator<Item = Batch> + '_ {
        self.eval_batches_of(split, self.block_size, count)
    }

    /// The same in windows of `length` targets, which must divide the tokens of a batch.
    pub fn eval_batches_of(&self, split: Split, length: usize, count: usize) -> impl Iterator<Item = Batch> + '_ {
        let split = if self.has_validation() { split } else { Split::Train };
        (0..count as u64).map(move |index| self.windows(split, length, EVALUATION_SEED, index, EVALUATION))
    }

    fn windows(&self, split: Split, length: usize, seed: u64, step: u64, stream: u64) -> Batch {
        let random = Random::new(seed, Purpose::DataOrder);
        let tokens = self.part(split);
        let mut batch = Batch::empty();
        for window in 0..(self.batch_size * self.block_size / length) as u64 {
            let start = random.below(step, stream | window, tokens.len() - length);
            batch.push(start, &tokens[start..=start + length], 1.0);
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::super::corpus::Role;
    use super::*;
    use proptest::prelude::*;

    fn file(items: &[&str]) -> ItemFile {
        ItemFile::parse("f.json", &serde_json::to_vec(items).unwrap(), Role::Facts).unwrap()
    }

    fn set_of_lengths(lengths: &[usize]) -> DocumentSet {
        let text = |length: &usize| vec!["a"; *length].join(" ");
        let items: Vec<String> = lengths.iter().map(text).collect();
        let file = file(&items.iter().map(String::as_str).collect::<Vec<_>>());
        DocumentSet::encode(&file, &Tokenizer::words(["a"]), 80).unwrap()
    }

    #[test]
    fn a_batch_reads_all_but_the_last_and_predicts_all_but_the_first() {
        let file = file(&["a b c </s>", "b </s>", "c z a"]);
        let tokenizer = Tokenizer::words(["a b c"]);
        let set = DocumentSet::encode(&file, &tokenizer, 3).unwrap();
        assert_eq!((set.cut, set.tokens(), set.unknowns.count), (1, 8, 1));
        let batch = set.batch(&[2, 0, 1]);
        assert_eq!(batch.tokens_n, [4, 0, 2, 3, 3]);
        assert_eq!(batch.targets_n, [0, 2, 3, 4, 1]);
        assert_eq!(batch.loss_weights_n, [0.5, 0.5, 0.5, 0.5, 1.0]);
        assert_eq!(batch.offsets_b1, [0, 2, 4, 5]);
        assert_eq!(batch.documents, [2, 0, 1]);
        assert_eq!((batch.len(), batch.is_empty(), batch.total_weight()), (5, false, 3.0));
    }

    #[test]
    fn what_cannot_be_trained_on_is_refused() {
        let tokenizer = Tokenizer::words(["a"]);
        let message = DocumentSet::encode(&file(&["a a", "a"]), &tokenizer, 80).unwrap_err().to_string();
        assert_eq!(
            message,
            "f.json: item 2 gives 1 token but needs 2, one to read and one to predict; lengthen or remove it"
        );
        let message = DocumentSet::encode(&file(&["a a"]), &tokenizer, 1).unwrap_err().to_string();
        assert_eq!(message, "data.max_length = 1 leaves nothing to predict; set it to 2 or more");
        let message = DocumentOrder::new(1, 0, 3, 0, false).unwrap_err().to_string();
        assert_eq!(message, "train.batch_size must be at least 1 but is 0; set it in the run file");
        let message = split_documents("f.json", 1, 0.1, 1, 0).unwrap_err().to_string();
        assert_eq!(
            message,
            "f.json: 1 items cannot be split into training and validation; add items or set data.val_fraction = 0"
        );
        for (fraction, shown) in [(1.0, "1"), (-0.5, "-0.5"), (f64::NAN, "NaN")] {
            let message = split_documents("f.json", 9, fraction, 1, 0).unwrap_err().to_string();
            assert!(message.starts_with(&format!("data.val_fraction = {shown} is not in the range")), "{message}");
        }
    }

    #[test]
    fn batches_follow_the_file_or_a_keyed_shuffle() {
        let order = DocumentOrder::new(7, 1, 10, 4, false).unwrap();
        assert_eq!(order.batches(5), [vec![0, 1, 2, 3], vec![4, 5, 6, 7], vec![8, 9]]);
        assert_eq!((order.batches_per_epoch(), order.position(0), order.position(7)), (3, (0, 0), (2, 1)));
        let shuffled = DocumentOrder { shuffle: true, ..order };
        assert_eq!(shuffled.batches(5), shuffled.batches(5));
        for other in [
            shuffled.documents(6),
            DocumentOrder { seed: 8, ..shuffled }.documents(5),
            DocumentOrder { phase: 0, ..shuffled }.documents(5),
        ] {
            assert_ne!(shuffled.documents(5), other);
        }
    }

    #[test]
    fn micro_batches_are_cut_between_documents_and_balanced() {
        let batch = set_of_lengths(&[11, 11, 21, 6, 6, 31]).batch(&[0, 1, 2, 3, 4, 5]);
        let parts = batch.split(3);
        assert_eq!(parts.iter().map(Batch::len).collect::<Vec<_>>(), [20, 30, 30]);
        assert_eq!(parts[1].documents, [2, 3, 4]);
        assert_eq!(parts[1].offsets_b1, [0, 20, 25, 30]);
        assert_eq!(Batch::join(parts), batch);
        assert_eq!(batch.split(1), std::slice::from_ref(&batch));
        assert_eq!(batch.split(0), std::slice::from_ref(&batch));
        assert_eq!(batch.split(99).len(), 6);
    }

    #[test]
    fn a_split_keeps_counts_and_needs_both_sides() {
        let (train, validation) = split_documents("f", 10, 0.25, 3, 0).unwrap();
        assert_eq!((train.len(), validation.len()), (7, 3));
        assert_eq!(split_documents("f", 10, 0.25, 3, 0).unwrap(), (train.clone(), validation.clone()));
        assert_ne!(split_documents("f", 10, 0.25, 4, 0).unwrap().1, validation);
        assert_eq!(split_documents("f", 10, 0.0, 3, 0).unwrap().1, [0usize; 0]);
        assert_eq!(split_documents("f", 2, 0.001, 3, 0).unwrap().1.len(), 1);
        assert_eq!(split_documents("f", 2, 0.999, 3, 0).unwrap().0.len(), 1);
        let file = file(&["a", "b b", "a b b", "b"]);
        let part =
            |indices: &[usize]| DocumentSet::encode_items(&file, indices.iter().copied(), &Tokenizer::words(["b"]), 80);
        let set = part(&[2, 1]).unwrap();
        assert_eq!(set.documents.iter().map(|d| d.tokens.len()).collect::<Vec<_>>(), [3, 2]);
        assert_eq!(set.unknowns.count, 1);
        assert!(part(&[1, 3]).unwrap_err().to_string().starts_with("f.json: item 4 gives 1 token "));
    }

    #[test]
    fn text_windows_are_nanogpts() {
        let text = TextSource::new("t.txt", (0..1_115_394).collect(), 0.1, 64, 12, 5).unwrap();
        assert_eq!(
            (text.longest(), text.part(Split::Train).len(), text.part(Split::Validation).len()),
            (64, 1_003_854, 111_540)
        );
        let batch = text.batch(17);
        assert_eq!((batch.len(), batch.documents.len(), batch.total_weight()), (768, 12, 768.0));
        for (row, (&token, &target)) in batch.tokens_n.iter().zip(&batch.targets_n).enumerate() {
            assert_eq!(target, token + 1);
            assert_eq!(token as usize, batch.documents[row / 64] + row % 64);
            assert!((target as usize) < 1_003_854);
        }
        assert_eq!(text.batch(17), batch);
        assert_ne!(text.batch(18).documents, batch.documents);
        let evaluation: Vec<Batch> = text.eval_batches(Split::Validation, 3).collect();
        assert_eq!(evaluation, text.eval_batches(Split::Validation, 3).collect::<Vec<_>>());
        assert!(evaluation.iter().all(|b| b.tokens_n.iter().all(|&t| t >= 1_003_854)));
        assert_ne!(evaluation[0].documents, evaluation[1].documents);
        let other = TextSource::new("t.txt", (0..1_115_394).collect(), 0.1, 64, 12, 0).unwrap();
        assert_eq!(other.eval_batches(Split::Validation, 1).next().unwrap(), evaluation[0]);
        assert_ne!(other.batch(17), batch);
        // The same key, yet other windows: the streams are apart.
        assert_ne!(other.eval_batches(Split::Train, 1).next().unwrap().documents, other.batch(0).documents);
        assert_ne!(text.eval_batches(Split::Train, 1).next().unwrap().documents, text.batch(0).documents);
    }

    #[test]
    fn every_window_of_a_short_text_is_drawn() {
        let text = TextSource::new("t.txt", vec![5, 6, 7, 8, 9], 0.0, 2, 50, 1).unwrap();
        assert_eq!((text.longest(), text.length(3), text.lengths().len()), (2, 2, 0));
        let mut starts = text.batch(0).documents;
        starts.sort_unstable();
        starts.dedup();
        assert_eq!(starts, [0, 1, 2]);
        assert!(!text.has_validation());
        assert!(text.eval_batches(Split::Validation, 1).all(|b| b.targets_n.iter().all(|&t| t > 5)));
    }

    #[test]
    fn lengths_are_drawn_by_step_and_keep_the_tokens_of_a_batch() {
        let text = |seed| TextSource::new("t.txt", (0..9000).collect(), 0.1, 64, 6, seed).unwrap();
        let mixed = text(5).with_lengths("t.txt", &[32, 64, 128]).unwrap();
        assert_eq!((mixed.longest(), mixed.lengths()), (128, &[32, 64, 128][..]));
        let lengths: Vec<usize> = (0..300).map(|step| mixed.length(step)).collect();
        for length in [32, 64, 128] {
            let count = lengths.iter().filter(|l| **l == length).count();
            assert!((70..130).contains(&count), "{length}: {count} of 300");
        }
        assert_ne!(
            lengths,
            (0..300)
                .map(|step| text(6).with_lengths("t.txt", &[32, 64, 128]).unwrap().length(step))
                .collect::<Vec<_>>()
        );
        for (step, length) in lengths.iter().enumerate().take(20) {
            let batch = mixed.batch(step as u64);
            assert_eq!((batch.len(), batch.total_weight()), (6 * 64, 384.0));
            assert!(batch.offsets_b1.windows(2).all(|rows| rows[1] - rows[0] == *length));
            assert_eq!(mixed.batch(step as u64), batch);
        }
        // The same windows as without lengths where the length is the block's, in training and in evaluation.
        let step = lengths.iter().position(|length| *length == 64).unwrap() as u64;
        assert_eq!(mixed.batch(step), text(5).batch(step));
        let first = |source: &TextSource| source.eval_batches(Split::Validation, 1).next().unwrap();
        assert_eq!(first(&mixed), first(&text(5)));
        let long = mixed.eval_batches_of(Split::Validation, 128, 2).last().unwrap();
        assert_eq!((long.len(), long.documents.len()), (384, 3));
        let message = text(5).with_lengths("t.txt", &[64, 900]).unwrap_err().to_string();
        assert!(
            message.contains("data.lengths = 900 needs at least 901; use a longer text or a smaller lengths"),
            "{message}"
        );
    }

    #[test]
    fn a_text_shorter_than_a_window_is_refused() {
        let refused = |tokens: u32, fraction, block, batch| {
            TextSource::new("t.txt", (0..tokens).collect(), fraction, block, batch, 1).unwrap_err().to_string()
        };
        let remedy = "use a longer text or a smaller block_size";
        assert_eq!(
            refused(64, 0.0, 64, 1),
            format!("t.txt: the training part has 64 tokens but data.block_size = 64 needs at least 65; {remedy}")
        );
        assert_eq!(
            refused(100, 0.1, 64, 1),
            format!("t.txt: the validation part has 10 tokens but data.block_size = 64 needs at least 65; {remedy}")
        );
        assert!(refused(0, 0.0, usize::MAX, 1).contains("has 0 tokens"));
        assert_eq!(refused(9, 0.0, 0, 1), "data.block_size must be at least 1 but is 0; set it in the run file");
        assert_eq!(refused(9, 0.0, 1, 0), "train.batch_size must be at least 1 but is 0; set it in the run file");
        assert!(refused(9, 2.0, 1, 1).starts_with("data.val_fraction = 2 is not"));
    }

    proptest! {
        #[test]
        fn every_epoch_visits_every_document_once(
            seed: u64, phase in 0u32..15, epoch in 0u64..1000, count in 1usize..60, size in 1usize..20, shuffle: bool,
        ) {
            let order = DocumentOrder::new(seed, phase, count, size, shuffle).unwrap();
            let batches = order.batches(epoch);
            prop_assert_eq!(batches.len(), order.batches_per_epoch());
            prop_assert!(batches.iter().rev().skip(1).all(|batch| batch.len() == size));
            let mut seen = batches.concat();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..count).collect::<Vec<_>>());
        }

        #[test]
        fn micro_batches_join_to_the_batch(
            lengths in proptest::collection::vec(2usize..30, 1..12), parts in 1usize..15,
        ) {
            let set = set_of_lengths(&lengths);
            let batch = set.batch(&(0..lengths.len()).collect::<Vec<_>>());
            let micro = batch.split(parts);
            prop_assert_eq!(micro.len(), parts.min(lengths.len()));
            prop_assert!(micro.iter().all(|part| !part.is_empty() && part.offsets_b1[0] == 0));
            prop_assert_eq!(micro.iter().flat_map(|p| p.documents.clone()).collect::<Vec<_>>(), batch.documents.clone());
            prop_assert_eq!(micro.iter().flat_map(|p| p.loss_weights_n.clone()).collect::<Vec<_>>(), batch.loss_weights_n.clone());
            for part in &micro {
                prop_assert_eq!(part.offsets_b1.last(), Some(&part.len()));
                prop_assert_eq!(part.clone(), set.batch(&part.documents));
            }
            prop_assert!((batch.total_weight() - lengths.len() as f64).abs() < 1e-9);
        }

        #[test]
        fn splits_are_disjoint_and_whole(seed: u64, count in 2usize..80, fraction in 0.001f64..0.999) {
            let (train, validation) = split_documents("f", count, fraction, seed, 1).unwrap();
            prop_assert!(!train.is_empty() && !validation.is_empty());
            let mut all = [train, validation].concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..count).collect::<Vec<_>>());
        }
    }
}
