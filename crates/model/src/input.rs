//! What enters a forward pass: the tokens of a batch, and who looks on.

use std::rc::Rc;
use std::sync::Arc;
use tensor::{Real, Tape, Value};

/// The tokens of a batch: ids of all documents one after the other, and where each document starts (the last offset is n).
#[derive(Clone, Debug)]
pub struct Documents {
    pub tokens_n: Arc<[u32]>,
    pub offsets_b1: Arc<[usize]>,
}

impl Documents {
    /// Panics unless offsets rise from 0 to the number of tokens.
    pub fn new(tokens_n: Vec<u32>, offsets_b1: Vec<usize>) -> Self {
        assert!(offsets_b1.first() == Some(&0) && offsets_b1.last() == Some(&tokens_n.len()));
        assert!(offsets_b1.is_sorted());
        Documents { tokens_n: tokens_n.into(), offsets_b1: offsets_b1.into() }
    }

    /// Position of every token in its document.
    pub(crate) fn positions(&self) -> Vec<u32> {
        self.offsets_b1.windows(2).flat_map(|w| 0..(w[1] - w[0]) as u32).collect()
    }
}

/// Called with (flat layer, value, where its documents start) at the input of each flat layer (0 embedding output, then per block: attention sublayer, normed input of
/// attention, feed-forward sublayer, normed input of the feed-forward; final norm; output projection). A block that is replayed on the walk
/// back calls it twice: first on values without gradient, then on those that have one. Inside a routed block there are only the tokens it takes.
pub type Watch<'a, T> = Rc<dyn Fn(&mut Tape<'a, T>, usize, &Value<T>, &Arc<[usize]>) + 'a>;

/// Looks at nothing.
pub fn unwatched<'a, T: Real>() -> Watch<'a, T> {
    Rc::new(|_, _, _, _| {})
}
