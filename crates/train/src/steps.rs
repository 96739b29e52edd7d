//! metrics.jsonl -> columns: the rows of steps, which are nearly all of a stream, flat and alike; every other line is the caller's to parse.

use crate::error::TrainError;
use crate::files::explain;
use memchr::{memchr_iter, memrchr};
use std::collections::HashMap;
use std::path::Path;

/// The rows of kind "train" whose values are numbers, plain strings or null, column by column.
#[derive(Debug, Default, PartialEq)]
pub struct Steps {
    /// The place of each row in the stream, from 0.
    pub places: Vec<u64>,
    /// In the order in which the stream names them first.
    pub columns: Vec<Column>,
    /// Place and bytes of every other line.
    pub others: Vec<(u64, Vec<u8>)>,
}

#[derive(Debug, PartialEq)]
pub struct Column {
    pub name: String,
    pub values: Values,
}

/// One value for each row of `Steps::places`.
#[derive(Debug, PartialEq)]
pub enum Values {
    /// NaN where a row has none (JSON knows no NaN); `integers` where all that are there were written as integers of at most 15 digits.
    Numbers { values: Vec<f64>, integers: bool },
    /// Places in `distinct`; `NO_TEXT` where a row has none.
    Texts { codes: Vec<u32>, distinct: Vec<String> },
}

pub const NO_TEXT: u32 = u32::MAX;

/// What one thread reads at least, in bytes.
const PIECE: usize = 8 << 20;

/// Texts that a column may have, as names of phases are; a row with one more is the caller's to parse.
const TEXTS: usize = 64;

/// The steps of a metrics.jsonl; an error names the file.
pub fn read(path: &Path) -> Result<Vec<Steps>, TrainError> {
    Ok(read_steps(&std::fs::read(path).map_err(explain("read", path))?))
}

/// Reads the whole lines of a stream, a piece to a thread: what stands behind the last line end was cut off and is left out.
pub fn read_steps(stream: &[u8]) -> Vec<Steps> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut pieces = pieces(stream, (stream.len() / PIECE).clamp(1, threads));
    let mut read: Vec<Steps> = std::thread::scope(|scope| {
        let running: Vec<_> = pieces.split_off(1).into_iter().map(|piece| scope.spawn(|| read_piece(piece))).collect();
        let first = read_piece(pieces[0]);
        let rest =
            running.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        std::iter::once(first).chain(rest).collect()
    });
    let mut before = 0;
    for steps in &mut read {
        steps.move_by(before);
        before += (steps.places.len() + steps.others.len()) as u64;
    }
    read
}

/// `count` pieces of about the same size, at least one, each of whole lines.
fn pieces(stream: &[u8], count: usize) -> Vec<&[u8]> {
    let mut rest = &stream[..memrchr(b'\n', stream).map_or(0, |last| last + 1)];
    let size = rest.len() / count;
    let mut pieces = Vec::new();
    for _ in 1..count {
        let (piece, others) = rest.split_at(memrchr(b'\n', &rest[..size.min(rest.len())]).map_or(0, |last| last + 1));
        pieces.push(piece);
        rest = others;
    }
    pieces.push(rest);
    pieces
}

fn read_piece(piece: &[u8]) -> Steps {
    let mut reader = Reader::default();
    let mut start = 0;
    for (place, end) in memchr_iter(b'\n', piece).enumerate() {
        let line = &piece[start..end];
        start = end + 1;
        if reader.step(line).is_some() {
            reader.steps.places.push(place as u64);
        } else {
            reader.steps.others.push((place as u64, line.to_vec()));
        }
    }
    reader.finish()
}

impl Steps {
    fn move_by(&mut self, places: u64) {
        self.places.iter_mut().for_each(|place| *place += places);
        self.others.iter_mut().for_each(|(place, _)| *place += places);
    }
}

#[derive(Default)]
struct Reader<'a> {
    steps: Steps,
    index: HashMap<&'a str, usize>,
    /// The line at hand: nothing enters a column before it was read to its end.
    fields: Vec<Field<'a>>,
    /// The fields of the last step: the next one most often has the same names in the same order.
    last: Vec<Field<'a>>,
}

#[derive(Clone, Copy)]
struct Field<'a> {
    name: &'a str,
    /// The name as the line has it, from its quotation mark to its colon.
    head: &'a [u8],
    value: Scalar<'a>,
    column: Option<usize>,
}

#[derive(Clone, Copy)]
enum Scalar<'a> {
    Number { value: f64, integer: bool },
    Text(&'a str),
    Null,
}

impl<'a> Reader<'a> {
    /// Takes a line in; none where it is no plain row of kind "train" or has a value that its column does not take.
    fn step(&mut self, line: &'a [u8]) -> Option<()> {
        self.parse(line)?;
        if !self.fields.iter().any(|field| field.name == "kind" && matches!(field.value, Scalar::Text("train"))) {
            return None;
        }
        let known = self.steps.columns.len();
        if !self.find_columns() {
            self.steps.columns.truncate(known);
            self.index.retain(|_, column| *column < known);
            return None;
        }
        let row = self.steps.places.len();
        for field in &self.fields {
            if let Some(column) = field.column {
                self.steps.columns[column].values.set(row, field.value);
            }
        }
        std::mem::swap(&mut self.fields, &mut self.last);
        Some(())
    }

    fn parse(&mut self, line: &'a [u8]) -> Option<()> {
        self.fields.clear();
        let mut rest = Cursor(line);
        rest.token(b'{')?;
        loop {
            rest.spaces();
            let known = self.last.get(self.fields.len()).filter(|known| rest.0.starts_with(known.head));
            let mut field = match known {
                Some(known) => {
                    rest.take(known.head.len());
                    *known
                }
                None => rest.name()?,
            };
            field.value = rest.scalar()?;
            self.fields.push(field);
            if rest.token(b',').is_none() {
                break;
            }
        }
        rest.token(b'}')?;
        rest.spaces();
        rest.0.is_empty().then_some(())
    }

    /// Finds or makes the column of every field; false where a value does not fit.
    fn find_columns(&mut self) -> bool {
        let columns = &mut self.steps.columns;
        self.fields.iter_mut().all(|field| {
            let column = *field.column.get_or_insert_with(|| {
                *self.index.entry(field.name).or_insert_with(|| {
                    columns.push(Column { name: field.name.to_owned(), values: Values::of(field.value) });
                    columns.len() - 1
                })
            });
            columns[column].values.takes(field.value)
        })
    }

    fn finish(mut self) -> Steps {
        let rows = self.steps.places.len();
        self.steps.columns.iter_mut().for_each(|column| column.values.fill(rows));
        self.steps
    }
}

impl Values {
    fn of(value: Scalar) -> Self {
        match value {
            Scalar::Text(_) => Values::Texts { codes: Vec::new(), distinct: Vec::new() },
            _ => Values::Numbers { values: Vec::new(), integers: true },
        }
    }

    fn takes(&self, value: Scalar) -> bool {
        match (self, value) {
            (_, Scalar::Null) | (Values::Numbers { .. }, Scalar::Number { .. }) => true,
            (Values::Texts { distinct, .. }, Scalar::Text(text)) => {
                distinct.len() < TEXTS || distinct.iter().any(|known| known == text)
            }
            _ => false,
        }
    }

    /// Fills up with nothing to `rows` values.
    fn fill(&mut self, rows: usize) {
        match self {
            Values::Numbers { values, .. } => values.resize(rows, f64::NAN),
            Values::Texts { codes, .. } => codes.resize(rows, NO_TEXT),
        }
    }

    /// Of a name that a line has twice the last value stays, as with every JSON reader.
    fn set(&mut self, row: usize, value: Scalar) {
        self.fill(row + 1);
        match (self, value) {
            (Values::Numbers { values, integers }, Scalar::Number { value, integer }) => {
                *integers &= integer;
                values[row] = value;
            }
            (Values::Texts { codes, distinct }, Scalar::Text(text)) => {
                let code = distinct.iter().position(|known| known == text).unwrap_or_else(|| {
                    distinct.push(text.to_owned());
                    distinct.len() - 1
                });
                codes[row] = code as u32;
            }
            (Values::Numbers { values, .. }, _) => values[row] = f64::NAN,
            (Values::Texts { codes, .. }, _) => codes[row] = NO_TEXT,
        }
    }
}

/// What is left of a line. It knows less than JSON and never more: what it takes, every JSON reader takes for the same.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn spaces(&mut self) {
        while let [b' ' | b'\t' | b'\r', rest @ ..] = self.0 {
            self.0 = rest;
        }
    }

    fn token(&mut self, token: u8) -> Option<()> {
        self.spaces();
        let (&first, rest) = self.0.split_first()?;
        (first == token).then(|| self.0 = rest)
    }

    fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len);
        self.0 = rest;
        taken
    }

    /// The name of a field and the colon behind it.
    fn name(&mut self) -> Option<Field<'a>> {
        self.spaces();
        let start = self.0;
        let name = self.string()?;
        self.token(b':')?;
        Some(Field { name, head: &start[..start.len() - self.0.len()], value: Scalar::Null, column: None })
    }

    /// A string without escapes.
    fn string(&mut self) -> Option<&'a str> {
        self.token(b'"')?;
        let len = self.0.iter().position(|&byte| byte == b'"' || byte == b'\\' || byte < b' ')?;
        let text = self.take(len);
        self.token_here(b'"')?;
        str::from_utf8(text).ok()
    }

    fn token_here(&mut self, token: u8) -> Option<()> {
        self.0 = self.0.strip_prefix(&[token])?;
        Some(())
    }

    fn scalar(&mut self) -> Option<Scalar<'a>> {
        self.spaces();
        match self.0.first()? {
            b'"' => self.string().map(Scalar::Text),
            b'n' => {
                self.0 = self.0.strip_prefix(b"null".as_slice())?;
                Some(Scalar::Null)
            }
            _ => self.number(),
        }
    }

    fn digits(&mut self) -> Option<usize> {
        let len = self.0.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(self.0.len());
        self.take(len);
        (len > 0).then_some(len)
    }

    /// A finite number by the grammar of RFC 8259, section 6; integers have at most 15 digits, so that an f64 holds them.
    fn number(&mut self) -> Option<Scalar<'a>> {
        let start = self.0;
        let _ = self.token_here(b'-');
        let leading_zero = self.0.first() == Some(&b'0');
        let digits = self.digits()?;
        if leading_zero && digits > 1 {
            return None;
        }
        let mut integer = true;
        if self.token_here(b'.').is_some() {
            integer = false;
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.0.first() {
            integer = false;
            self.take(1);
            if let Some(b'+' | b'-') = self.0.first() {
                self.take(1);
            }
            self.digits()?;
        }
        let text = str::from_utf8(&start[..start.len() - self.0.len()]).ok()?;
        let value: f64 = text.parse().ok()?;
        (value.is_finite() && !(integer && digits > 15)).then_some(Scalar::Number { value, integer })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Map, Value};

    /// The row at `index` as JSON, numbers as f64.
    fn row(steps: &Steps, index: usize) -> Map<String, Value> {
        let value = |column: &Column| match &column.values {
            Values::Numbers { values, .. } => Value::from(values[index]), // NaN becomes null
            Values::Texts { codes, distinct } => {
                distinct.get(codes[index] as usize).map_or(Value::Null, |text| Value::from(text.as_str()))
            }
        };
        steps
            .columns
            .iter()
            .map(|column| (column.name.clone(), value(column)))
            .filter(|(_, value)| !value.is_null())
            .collect()
    }

    fn told(line: &[u8]) -> Map<String, Value> {
        let fields: Map<String, Value> = serde_json::from_slice(line).unwrap();
        let as_float = |value: Value| value.as_f64().map_or(value, Value::from);
        fields.into_iter().filter(|(_, value)| !value.is_null()).map(|(name, value)| (name, as_float(value))).collect()
    }

    #[test]
    fn the_pieces_of_a_stream_are_whole_lines_and_all_of_it() {
        let stream: Vec<u8> =
            (0..200).flat_map(|step| format!("{{\"step\":{step}}}\n").into_bytes()).chain(*b"{\"st").collect();
        for count in 1..9 {
            let pieces = pieces(&stream, count);
            assert_eq!(pieces.len(), count);
            assert!(pieces.iter().all(|piece| piece.ends_with(b"\n")));
            assert_eq!(pieces.concat(), stream[..stream.len() - 4]);
        }
        assert_eq!(pieces(b"", 1), [b""]);
        assert_eq!(pieces(b"one line\n", 3).concat(), b"one line\n");
    }

    #[test]
    fn places_count_on_from_piece_to_piece() {
        let line = format!("{{\"kind\":\"train\",\"text\":\"{}\"}}\n", "a".repeat(1 << 16));
        let stream = (line + "{}\n").repeat(512);
        let read = read_steps(stream.as_bytes());
        let mut places: Vec<u64> = read.iter().flat_map(|steps| &steps.places).copied().collect();
        assert_eq!(places, (0..1024).step_by(2).collect::<Vec<u64>>());
        places.extend(read.iter().flat_map(|steps| &steps.others).map(|(place, _)| place));
        places.sort_unstable();
        assert_eq!(places, (0..1024).collect::<Vec<u64>>());
    }

    #[test]
    fn steps_become_columns_and_all_else_is_handed_back() {
        let lines = [
            r#"{"step":0,"kind":"event","event":"run_started"}"#,
            r#"{"step":1,"ts":1.5,"kind":"train","phase":"facts","loss":2}"#,
            r#"{ "step" : 2, "ts": 2.5, "kind": "train", "phase": "chat", "loss": 1.25, "spike": -1e-3 }"#,
            r#"{"step":3,"ts":3.5,"kind":"train","phase":"chat","loss":null,"nonfinite":["loss"]}"#,
            r#"{"step":4,"kind":"train","phase":"chat","loss":null}"#,
            r#"{"step":5,"kind":"train","phase":5}"#,
            r#"{"step":6,"kind":"train","new":1,"phase":5}"#,
            r#"{"step":7,"kind":"tra"#,
        ];
        let text = lines.join("\n");
        let steps = read_piece(pieces(text.as_bytes(), 1)[0]);
        assert_eq!(steps.places, [1, 2, 4]);
        assert_eq!(steps.others.iter().map(|(place, _)| *place).collect::<Vec<_>>(), [0, 3, 5, 6]);
        let names: Vec<&str> = steps.columns.iter().map(|column| column.name.as_str()).collect();
        assert_eq!(names, ["step", "ts", "kind", "phase", "loss", "spike"]);
        for (index, place) in [1, 2, 4].into_iter().enumerate() {
            assert_eq!(row(&steps, index), told(lines[place].as_bytes()));
        }
        let integers = |name: &str| match &steps.columns.iter().find(|column| column.name == name).unwrap().values {
            Values::Numbers { integers, .. } => *integers,
            Values::Texts { .. } => false,
        };
        assert!(integers("step") && !integers("loss") && !integers("phase"));
    }

    #[test]
    fn a_column_of_many_texts_is_handed_back_from_the_first_too_many() {
        let lines: String = (0..200).map(|i| format!("{{\"kind\":\"train\",\"note\":\"{i}\"}}\n")).collect();
        let steps = read_piece(lines.as_bytes());
        assert_eq!((steps.places.len(), steps.others.len()), (TEXTS, 200 - TEXTS));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        /// Whatever is broken in a line, it is handed back or is what serde_json reads.
        #[test]
        fn what_is_taken_is_what_json_says(
            at in 0..80usize,
            byte in proptest::sample::select(b"0123456789+-.eE,:\"{}[] \\\ntfnulx\x80\t".to_vec()),
            kept in 0..90usize,
            replaced in any::<bool>(),
        ) {
            let mut line = br#"{"step":10,"kind":"train","a":-0.5e+3,"b":null,"c":"text","a":1E2,"d":0.0625}"#.to_vec();
            let at = at.min(line.len() - 1);
            if replaced { line[at] = byte } else { line.insert(at, byte) }
            line.truncate(kept);
            line.push(b'\n');
            let steps = read_piece(&line);
            let lines: Vec<&[u8]> = line.split_inclusive(|&byte| byte == b'\n').collect();
            prop_assert_eq!(steps.places.len() + steps.others.len(), lines.len());
            for (index, &place) in steps.places.iter().enumerate() {
                prop_assert_eq!(row(&steps, index), told(lines[place as usize]));
            }
        }
    }
}
