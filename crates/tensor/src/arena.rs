//! Recycled buffers: a training step asks for the same sizes again and again, and fresh pages cost more than the arithmetic on them.

use crate::Real;
use crate::kernels::memory::large_pages;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A pool of vectors by capacity. Clones share the pool.
#[derive(Clone, Debug)]
pub struct Arena<T: Real>(Arc<Mutex<Pool<T>>>);

#[derive(Debug)]
struct Pool<T> {
    free: BTreeMap<usize, Vec<Vec<T>>>,
    live: usize,
    peak: usize,
    held: usize,
}

impl<T: Real> Default for Arena<T> {
    fn default() -> Self {
        Arena(Arc::new(Mutex::new(Pool { free: BTreeMap::new(), live: 0, peak: 0, held: 0 })))
    }
}

impl<T: Real> Arena<T> {
    fn pool(&self) -> MutexGuard<'_, Pool<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of `len` numbers with arbitrary (stale) content.
    pub fn take(&self, len: usize) -> Buffer<T> {
        let mut pool = self.pool();
        // A buffer up to twice as large is reused: ragged batches ask for many lengths near each other.
        let found = pool.free.range(len..=len.saturating_mul(2).max(64)).next().map(|(&capacity, _)| capacity);
        let mut data = match found {
            Some(capacity) => {
                let same = pool.free.get_mut(&capacity).expect("key was just found");
                let data = same.pop().expect("empty lists are removed");
                if same.is_empty() {
                    pool.free.remove(&capacity);
                }
                data
            }
            None => {
                let data = Vec::with_capacity(len);
                large_pages(data.as_ptr(), len);
                pool.held += data.capacity();
                data
            }
        };
        pool.live += len;
        pool.peak = pool.peak.max(pool.live);
        drop(pool);
        data.resize(len, T::ZERO); // truncates, or zeroes only the part that was never used
        Buffer { data, home: self.clone() }
    }

    /// A buffer of `len` zeros.
    pub fn zeros(&self, len: usize) -> Buffer<T> {
        let mut buffer = self.take(len);
        buffer.fill(T::ZERO);
        buffer
    }

    pub fn copy(&self, from: &[T]) -> Buffer<T> {
        let mut buffer = self.take(from.len());
        buffer.copy_from_slice(from);
        buffer
    }

    /// Numbers in all buffers, handed out or not; it stops growing after the first steps.
    pub fn held(&self) -> usize {
        self.pool().held
    }

    /// Numbers in buffers that are handed out now; zero between steps.
    pub fn live(&self) -> usize {
        self.pool().live
    }

    /// The most numbers that were handed out at once. Counted as they were asked for: which buffer was found for them, perhaps a longer one,
    /// depends on what was asked before.
    pub fn peak(&self) -> usize {
        self.pool().peak
    }
}

/// A vector that returns to its arena when dropped.
#[derive(Debug)]
pub struct Buffer<T: Real> {
    data: Vec<T>,
    home: Arena<T>,
}

impl<T: Real> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.data
    }
}

impl<T: Real> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.data
    }
}

impl<T: Real> Drop for Buffer<T> {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        let (len, capacity) = (data.len(), data.capacity());
        let mut pool = self.home.pool();
        pool.live = pool.live.saturating_sub(len);
        if capacity > 0 {
            pool.free.entry(capacity).or_default().push(data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_what_was_handed_out_at_once_whatever_buffers_were_found() {
        let arena = Arena::<f32>::default();
        let both = (arena.take(100), arena.zeros(50));
        drop(both);
        let short = arena.take(70); // out of the buffer of 100
        assert_eq!((short.len(), arena.live(), arena.peak(), arena.held()), (70, 70, 150, 150));
        let long = arena.take(90);
        assert_eq!((arena.live(), arena.peak()), (160, 160));
        drop((short, long));
        assert_eq!((arena.clone().live(), arena.peak()), (0, 160));
    }
}
