//! Working memory that a thread keeps for its next piece of work, one of each type.

use std::any::Any;
use std::cell::Cell;

thread_local! {
    static KEPT: Cell<Vec<Box<dyn Any>>> = const { Cell::new(Vec::new()) };
}

/// Runs `f` with what this thread kept of the type, as it was left, or a fresh one.
pub(crate) fn with<S: Default + 'static, R>(f: impl FnOnce(&mut S) -> R) -> R {
    let mut all = KEPT.take();
    let found = all.iter().position(|kept| kept.is::<S>()).map(|at| all.swap_remove(at));
    KEPT.set(all);
    let mut own = found.and_then(|kept| kept.downcast::<S>().ok()).unwrap_or_default();
    let result = f(&mut own);
    let mut all = KEPT.take();
    all.push(own);
    KEPT.set(all);
    result
}

/// `len` numbers of any content.
pub(crate) fn grown<S: Copy + Default>(room: &mut Vec<S>, len: usize) -> &mut [S] {
    if room.len() < len {
        room.resize(len, S::default());
    }
    &mut room[..len]
}

#[cfg(test)]
mod tests {
    use super::with;

    #[test]
    fn a_thread_finds_what_it_left_of_each_type() {
        with(|numbers: &mut Vec<u8>| numbers.push(1));
        with(|words: &mut Vec<String>| words.push("one".into()));
        with(|numbers: &mut Vec<u8>| {
            with(|inner: &mut Vec<u8>| assert!(inner.is_empty(), "in use: a fresh one"));
            assert_eq!(numbers, &[1]);
        });
        std::thread::spawn(|| with(|numbers: &mut Vec<u8>| assert!(numbers.is_empty()))).join().unwrap();
    }
}
