//! Where a step spends its time: a span for every op and direction with the arithmetic it has to do and the bytes it has to move.
//!
//! Off it costs one relaxed load for a span. On it takes a lock at the end of each; results never depend on it. One recording at a time in a
//! process: `start` begins anew, `stop` hands out what was recorded since.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

static ON: AtomicBool = AtomicBool::new(false);
static EVENTS: Mutex<Vec<Event>> = Mutex::new(Vec::new());

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    Forward,
    Backward,
    /// Neither: clipping, the optimizer, measuring.
    Update,
}

/// What one direction of an op has to do, from shapes and actual counts: nothing recomputed, every array moved once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Floating-point operations of matrix products (2 per multiply-add); 0 for an op that has none.
    pub flops: usize,
    /// Bytes read and written.
    pub bytes: usize,
}

/// The work of an op in both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    pub forward: Work,
    pub backward: Work,
}

impl Cost {
    /// `flops` and `numbers` (read and written) of the forward direction; backward takes twice both, as for a product.
    pub fn new<T>(flops: usize, numbers: usize) -> Self {
        let work = |times: usize| Work { flops: times * flops, bytes: times * numbers * size_of::<T>() };
        Cost { forward: work(1), backward: work(2) }
    }

    /// [n, d] x [d, f], and the two products of its backward.
    pub fn product<T>(n: usize, d: usize, f: usize) -> Self {
        Cost::new::<T>(2 * n * d * f, n * d + d * f + n * f)
    }
}

/// A finished span. Times are nanoseconds since the first span of the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub name: &'static str,
    pub direction: Direction,
    pub work: Work,
    /// Threads count up from 0 in the order of their first span.
    pub thread: u32,
    pub start: u64,
    pub end: u64,
}

/// Open until it is dropped.
#[must_use = "a span ends where it is dropped"]
pub struct Span {
    name: &'static str,
    direction: Direction,
    work: Work,
    start: u64,
}

/// A span from here to the drop of the result; `None`, at once, while nothing is recorded.
#[inline]
pub fn span(name: &'static str, direction: Direction, work: Work) -> Option<Span> {
    enabled().then(|| Span { name, direction, work, start: now() })
}

impl Drop for Span {
    fn drop(&mut self) {
        let Span { name, direction, work, start } = *self;
        let event = Event { name, direction, work, thread: thread(), start, end: now() };
        events().push(event);
    }
}

#[inline]
pub fn enabled() -> bool {
    ON.load(Ordering::Relaxed)
}

/// Records from here on; forgets what was recorded before.
pub fn start() {
    events().clear();
    ON.store(true, Ordering::Relaxed);
}

/// Ends the recording and returns its spans in the order in which they ended.
pub fn stop() -> Vec<Event> {
    ON.store(false, Ordering::Relaxed);
    std::mem::take(&mut *events())
}

fn events() -> MutexGuard<'static, Vec<Event>> {
    EVENTS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now() -> u64 {
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    EPOCH.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

fn thread() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    thread_local!(static MINE: Cell<Option<u32>> = const { Cell::new(None) });
    MINE.with(|mine| {
        let id = mine.get().unwrap_or_else(|| NEXT.fetch_add(1, Ordering::Relaxed));
        mine.set(Some(id));
        id
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::linear::linear;
    use crate::{Arena, Engine, Layout, Tape};

    /// One test, for the recording is global: other tests of this process may add spans of their own, of other shapes.
    #[test]
    fn an_op_is_seen_in_both_directions_with_its_work_and_only_while_recording() {
        let layout = Layout::new([("w".into(), vec![1, 1234], true)]);
        let weight = layout.get("w").unwrap();
        let (params, arena) = (vec![0.5f32; layout.len()], Arena::default());
        let step = || {
            let mut tape = Tape::new(Engine::Cpu, &params, &arena);
            let x = tape.leaf(&[1.0; 1234], 1, 1234);
            let y = linear(&mut tape, &x, weight);
            let mut flat = vec![0.0; params.len()];
            tape.backward(&y, &mut flat);
            flat
        };
        let cost = Cost::product::<f32>(1, 1234, 1);
        assert_eq!((cost.forward.flops, cost.backward.flops), (2 * 1234, 4 * 1234));
        let mine = |events: &[Event]| -> Vec<Direction> {
            let own = events.iter().filter(|e| e.name == "linear" && [cost.forward, cost.backward].contains(&e.work));
            own.map(|e| e.direction).collect()
        };
        let plain = step();
        start();
        let profiled = step();
        {
            let _outer = span("outer", Direction::Update, Work::default());
            let _inner = span("inner", Direction::Update, Work::default());
        }
        let events = stop();
        assert_eq!(plain, profiled, "recording must not change a byte");
        assert_eq!(mine(&events), [Direction::Forward, Direction::Backward]);
        let find = |name: &str| events.iter().find(|e| e.name == name).unwrap();
        let (outer, inner) = (find("outer"), find("inner"));
        assert!(outer.start <= inner.start && inner.end <= outer.end && outer.thread == inner.thread);
        step();
        assert!(span("late", Direction::Update, Work::default()).is_none() && mine(&stop()).is_empty());
    }
}
