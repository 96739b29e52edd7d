//! The header of a safetensors file, checked before any library reads it: its length, number and names of tensors, no name twice, every
//! shape × dtype equal to its bytes, and the tensors side by side over exactly the data that is there. The safetensors crate checks less
//! (names may repeat, headers may have 100 MB).

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use std::collections::{BTreeMap, BTreeSet};

const MAX_HEADER: u64 = 16 << 20;
const MAX_TENSORS: usize = 100_000;
const MAX_NAME: usize = 256;
const MAX_RANK: usize = 8;
const METADATA: &str = "__metadata__";

/// Bytes of a number of each dtype. What is not listed here (packed 4-bit numbers) no file of ours holds.
const DTYPES: [(&str, u64); 15] = [
    ("BOOL", 1),
    ("U8", 1),
    ("I8", 1),
    ("F8_E4M3", 1),
    ("F8_E5M2", 1),
    ("U16", 2),
    ("I16", 2),
    ("F16", 2),
    ("BF16", 2),
    ("U32", 4),
    ("I32", 4),
    ("F32", 4),
    ("I64", 8),
    ("U64", 8),
    ("F64", 8),
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Info {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Where the data of each tensor begin and end.
struct Header(Vec<(u64, u64)>);

/// Why the bytes of a file are no safetensors file that we would read.
pub fn check(bytes: &[u8]) -> Result<(), String> {
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or("shorter than a safetensors header")?;
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(format!("a header of {length} bytes; {MAX_HEADER} are the most"));
    }
    let (header, data) = rest.split_at_checked(length as usize).ok_or("the header is longer than the file")?;
    let Header(mut spans) = serde_json::from_slice(header).map_err(|error| format!("bad header: {error}"))?;
    spans.sort_unstable();
    let mut place = 0;
    for (begin, end) in spans {
        if begin != place {
            let what = if begin > place { "a hole" } else { "two tensors" };
            return Err(format!("bad header: {what} at byte {} of the data", begin.min(place)));
        }
        place = end;
    }
    match data.len() as u64 {
        there if there == place => Ok(()),
        there => Err(format!("the header describes {place} bytes of data but the file has {there}")),
    }
}

impl Info {
    /// The span of the data, which must be what shape and dtype need.
    fn span(&self, name: &str) -> Result<(u64, u64), String> {
        let size = DTYPES.iter().find(|(dtype, _)| *dtype == self.dtype).map(|(_, size)| *size);
        let size = size.ok_or_else(|| format!("{name:?} has an unknown dtype"))?;
        if self.shape.len() > MAX_RANK {
            return Err(format!("{name:?} has {} dimensions; {MAX_RANK} are the most", self.shape.len()));
        }
        let needed = self.shape.iter().try_fold(size, |product, length| product.checked_mul(*length));
        let (begin, end) = self.data_offsets;
        match end.checked_sub(begin) {
            Some(found) if needed == Some(found) => Ok((begin, end)),
            _ => Err(format!("the bytes of {name:?} do not fit its shape and dtype")),
        }
    }
}

fn check_name(name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(plain) {
        let start: String = name.chars().take(40).collect();
        return Err(format!("{start:?} is no name of a tensor: up to {MAX_NAME} letters, digits, '.', '_' and '-'"));
    }
    Ok(())
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = Header;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let (mut names, mut spans) = (BTreeSet::new(), Vec::new());
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        map.next_value::<BTreeMap<String, String>>()?;
                    } else {
                        check_name(&name).map_err(de::Error::custom)?;
                        spans.push(map.next_value::<Info>()?.span(&name).map_err(de::Error::custom)?);
                    }
                    if spans.len() > MAX_TENSORS {
                        return Err(de::Error::custom(format!("more than {MAX_TENSORS} tensors")));
                    }
                    if let Some(name) = names.replace(name) {
                        return Err(de::Error::custom(format!("two tensors are called {name:?}")));
                    }
                }
                Ok(Header(spans))
            }
        }
        deserializer.deserialize_map(Keys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    #[test]
    fn what_the_library_writes_is_good() {
        use safetensors::tensor::{Dtype, TensorView};
        let data = [0u8; 24];
        let view = |shape: Vec<usize>, data| TensorView::new(Dtype::F32, shape, data).unwrap();
        let tensors =
            [("a.weight", view(vec![2, 3], &data)), ("b", view(vec![], &data[..4])), ("c", view(vec![0, 4], &[]))];
        let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
        assert_eq!(check(&safetensors::serialize(tensors, Some(metadata)).unwrap()), Ok(()));
        assert_eq!(check(&file("{}", 0)), Ok(()));
    }

    #[test]
    fn crafted_headers_are_refused() {
        let tensor = |name: &str, dtype: &str, shape: &str, from: u64, to: u64| {
            format!("\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{from},{to}]}}")
        };
        let good = tensor("a", "F32", "[2]", 0, 8);
        assert_eq!(check(&file(&format!("{{{good}}}"), 8)), Ok(()));
        let many: String = (0..=MAX_TENSORS).map(|i| tensor(&format!("t{i}"), "U8", "[0]", 0, 0) + ",").collect();
        let cases = [
            (format!("{{{good},{good}}}"), 8, "two tensors are called \"a\""),
            (format!("{{{good}}}"), 9, "describes 8 bytes of data but the file has 9"),
            (format!("{{{good}}}"), 7, "describes 8 bytes of data but the file has 7"),
            (format!("{{{}}}", tensor("a", "F32", "[2]", 4, 12)), 12, "a hole at byte 0"),
            (format!("{{{good},{}}}", tensor("b", "F32", "[2]", 4, 12)), 12, "two tensors at byte 4"),
            (format!("{{{}}}", tensor("a", "F32", "[3]", 0, 8)), 8, "do not fit its shape"),
            (format!("{{{}}}", tensor("a", "F32", "[4294967296,4294967296]", 0, 0)), 0, "do not fit its shape"),
            (format!("{{{}}}", tensor("a", "F32", "[2]", 8, 0)), 8, "do not fit its shape"),
            (format!("{{{}}}", tensor("a", "F32", "[1,1,1,1,1,1,1,1,1]", 0, 4)), 4, "9 dimensions"),
            (format!("{{{}}}", tensor("a", "F4", "[2]", 0, 1)), 1, "unknown dtype"),
            (format!("{{{}}}", tensor("../../x", "F32", "[2]", 0, 8)), 8, "is no name of a tensor"),
            (format!("{{{}}}", tensor("", "F32", "[2]", 0, 8)), 8, "is no name of a tensor"),
            (format!("{{{}}}", tensor(&"n".repeat(257), "F32", "[2]", 0, 8)), 8, "is no name of a tensor"),
            (format!("{{{}}}", tensor("\\u001b[2J", "F32", "[2]", 0, 8)), 8, "is no name of a tensor"),
            ("{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,0]}}".into(), 0, "bad header"),
            (
                "{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}".into(),
                4,
                "duplicate field",
            ),
            ("{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4],\"x\":0}}".into(), 4, "unknown field"),
            ("{\"__metadata__\":{\"a\":1}}".into(), 0, "bad header"),
            ("{\"__metadata__\":{},\"__metadata__\":{}}".into(), 0, "two tensors"),
            ("[]".into(), 0, "bad header"),
            (format!("{{\"a\":{}", "[".repeat(100_000)), 0, "bad header"),
            (format!("{{{}", many), 0, "more than 100000 tensors"),
        ];
        for (header, data, reason) in cases {
            let message = check(&file(&header, data)).unwrap_err();
            assert!(message.contains(reason), "{}: {message}", &header[..header.len().min(80)]);
            assert!(message.len() < 300 && !message.contains('\u{1b}'), "{message}");
        }
        assert!(check(b"1234567").unwrap_err().contains("shorter"));
        assert!(check(&u64::MAX.to_le_bytes()).unwrap_err().contains("are the most"));
        assert!(check(&100u64.to_le_bytes()).unwrap_err().contains("longer than the file"));
    }
}
