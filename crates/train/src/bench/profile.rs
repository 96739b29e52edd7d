//! The spans of some steps as a table by op and direction, and as a Chrome trace.

use super::peak::Roof;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::time::Duration;
use tensor::profile::{Direction, Event};

/// Recorded steps.
pub struct Profile {
    events: Vec<Event>,
    steps: usize,
    wall: Duration,
    /// What the machine can do, where it was measured.
    roof: Option<Roof>,
}

#[derive(Clone, Copy, Default)]
struct Sum {
    nanoseconds: u64,
    calls: usize,
    flops: usize,
    bytes: usize,
}

impl Profile {
    pub fn new(events: Vec<Event>, steps: usize, wall: Duration) -> Self {
        Profile { events, steps, wall, roof: None }
    }

    pub fn against(self, roof: Option<Roof>) -> Self {
        Profile { roof, ..self }
    }

    /// Spans of the step's own thread: those of other threads run beside them and are in the trace alone.
    fn own(&self) -> impl Iterator<Item = &Event> {
        let count = |thread: u32| self.events.iter().filter(|event| event.thread == thread).count();
        let threads: std::collections::BTreeSet<u32> = self.events.iter().map(|event| event.thread).collect();
        let own = threads.into_iter().max_by_key(|thread| count(*thread));
        self.events.iter().filter(move |event| Some(event.thread) == own)
    }

    /// Time of every op and direction without that of the spans inside it.
    fn sums(&self) -> BTreeMap<(&'static str, Direction), Sum> {
        let mut sums: BTreeMap<_, Sum> = BTreeMap::new();
        // Spans come in the order of their ends, so that those inside a span come before it.
        let mut inner: Vec<(u64, u64)> = Vec::new();
        for event in self.own() {
            let at = inner.partition_point(|(start, _)| *start < event.start);
            let inside: u64 = inner.drain(at..).map(|(start, end)| end - start).sum();
            inner.push((event.start, event.end));
            let sum = sums.entry((event.name, event.direction)).or_default();
            sum.nanoseconds += (event.end - event.start).saturating_sub(inside);
            sum.calls += 1;
            sum.flops += event.work.flops;
            sum.bytes += event.work.bytes;
        }
        sums
    }

    /// One object per op and direction, the longest first, per step; the last is the time outside any span.
    pub fn rows(&self) -> Vec<Map<String, Value>> {
        let sums = self.sums();
        let (wall, steps) = (self.wall.as_secs_f64(), self.steps as f64);
        let spent: f64 = sums.values().map(|sum| sum.nanoseconds as f64 / 1e9).sum();
        let mut sums: Vec<_> = sums.into_iter().collect();
        sums.sort_by_key(|(_, sum)| std::cmp::Reverse(sum.nanoseconds));
        let row = |name: &str, direction: &str, seconds: f64, sum: Sum| {
            let rate = |work: usize| if work == 0 { Value::Null } else { json!(work as f64 / seconds / 1e9) };
            let share = |roof: &Roof| sum.flops as f64 / seconds / roof.flops;
            let bound = |roof: &Roof| roof.seconds(sum.flops as f64, sum.bytes as f64) / seconds;
            let fields = [
                ("op", json!(name)),
                ("direction", json!(direction)),
                ("ms", json!(1e3 * seconds / steps)),
                ("share", json!(seconds / wall)),
                ("calls", json!(sum.calls as f64 / steps)),
                ("flops", json!(sum.flops as f64 / steps)),
                ("bytes", json!(sum.bytes as f64 / steps)),
                ("gflops", rate(sum.flops)),
                ("gbytes_per_second", rate(sum.bytes)),
                ("share_of_peak", json!(self.roof.as_ref().filter(|_| sum.flops > 0).map(share))),
                ("share_of_roof", json!(self.roof.as_ref().filter(|_| sum.flops + sum.bytes > 0).map(bound))),
            ];
            fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
        };
        let mut rows: Vec<Map<String, Value>> = sums
            .iter()
            .map(|((name, direction), sum)| {
                let direction = match direction {
                    Direction::Forward => "forward",
                    Direction::Backward => "backward",
                    Direction::Update => "",
                };
                row(name, direction, sum.nanoseconds as f64 / 1e9, *sum)
            })
            .collect();
        rows.push(row("(outside)", "", (wall - spent).max(0.0), Sum { calls: self.steps, ..Sum::default() }));
        rows
    }

    /// The rows as text.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<16}{:<10}{:>10}{:>8}{:>8}{:>9}{:>9}{:>10}{:>8}{:>9}{:>9}\n",
            "op", "", "ms/step", "share", "calls", "MFLOP", "MB", "GFLOP/s", "GB/s", "of peak", "of roof"
        );
        for row in self.rows() {
            let number = |name: &str| row[name].as_f64();
            let shown = |name: &str, digits: usize| number(name).map_or(String::new(), |x| format!("{x:.digits$}"));
            let millions =
                |name: &str| number(name).filter(|x| *x > 0.0).map_or(String::new(), |x| format!("{:.1}", x / 1e6));
            let percent = |name: &str| number(name).map_or(String::new(), |x| format!("{:.1} %", 100.0 * x));
            text += &format!(
                "{:<16}{:<10}{:>10}{:>8}{:>8}{:>9}{:>9}{:>10}{:>8}{:>9}{:>9}\n",
                row["op"].as_str().unwrap_or_default(),
                row["direction"].as_str().unwrap_or_default(),
                shown("ms", 3),
                percent("share"),
                shown("calls", 0),
                millions("flops"),
                millions("bytes"),
                shown("gflops", 1),
                shown("gbytes_per_second", 1),
                percent("share_of_peak"),
                percent("share_of_roof"),
            );
        }
        text
    }

    /// All spans in the trace event format of Chrome.
    pub fn trace(&self) -> String {
        let event = |event: &Event| {
            let category = match event.direction {
                Direction::Forward => "forward",
                Direction::Backward => "backward",
                Direction::Update => "update",
            };
            json!({
                "name": event.name, "cat": category, "ph": "X", "pid": 0, "tid": event.thread,
                "ts": event.start as f64 / 1e3, "dur": (event.end - event.start) as f64 / 1e3,
                "args": { "flops": event.work.flops, "bytes": event.work.bytes },
            })
        };
        json!({ "displayTimeUnit": "ms", "traceEvents": self.events.iter().map(event).collect::<Vec<_>>() }).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::profile::Work;

    #[test]
    fn a_span_counts_without_those_inside_it_and_the_rest_is_outside() {
        let event = |name, thread, start, end| Event {
            name,
            direction: Direction::Forward,
            work: Work { flops: 4000, bytes: 0 },
            thread,
            start,
            end,
        };
        let events = vec![
            event("inner", 0, 2_000, 3_000),
            event("inner", 0, 3_000, 5_000),
            event("outer", 0, 1_000, 6_000),
            event("outer", 0, 6_000, 7_000),
            event("elsewhere", 1, 0, 9_000),
        ];
        let profile = Profile::new(events, 2, Duration::from_nanos(8_000));
        let profile = profile.against(Some(Roof { flops: 4e9, bytes: 1e9, round_trip: None }));
        let rows = profile.rows();
        let row = |name: &str| rows.iter().find(|row| row["op"] == name).unwrap();
        assert_eq!((row("inner")["ms"].as_f64(), row("outer")["ms"].as_f64()), (Some(0.0015), Some(0.0015)));
        let outside = row("(outside)")["share"].as_f64().unwrap();
        assert!((outside - 0.25).abs() < 1e-9 && row("inner")["calls"].as_f64() == Some(1.0), "{rows:?}");
        let share = row("inner")["share_of_peak"].as_f64().unwrap();
        assert!((share - 8000.0 / 3e-6 / 4e9).abs() < 1e-9 && rows.iter().all(|row| row["op"] != "elsewhere"));
        assert_eq!(
            (row("inner")["flops"].as_f64(), row("inner")["share_of_roof"].as_f64()),
            (Some(4000.0), Some(share))
        );
        let trace: Value = serde_json::from_str(&profile.trace()).unwrap();
        assert_eq!(trace["traceEvents"].as_array().unwrap().len(), 5);
        assert_eq!(profile.table().lines().count(), 1 + rows.len());
    }
}
