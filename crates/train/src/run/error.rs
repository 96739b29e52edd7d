//! Why a configuration is refused.

use std::fmt;

/// Why a configuration is refused: one sentence per problem, one problem a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    pub problems: Vec<Problem>,
}

/// One problem: where it was written (file or `--set`, may be empty), the dotted key (may be empty), its value as TOML, what to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problem {
    pub source: String,
    pub key: String,
    pub value: Option<String>,
    pub message: String,
}

/// A key as it is shown: no longer than a line.
fn cut(key: &str) -> String {
    if key.chars().count() <= 120 { key.into() } else { key.chars().take(120).chain(['…']).collect() }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.value.as_ref().map(|value| format!(" = {value}")).unwrap_or_default();
        let place = [self.source.clone(), format!("{}{value}", cut(&self.key))];
        place.iter().filter(|part| !part.is_empty()).try_for_each(|part| write!(f, "{part}: "))?;
        f.write_str(&self.message)
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.problems.iter().map(Problem::to_string).collect();
        f.write_str(&lines.join("\n"))
    }
}

impl std::error::Error for ConfigError {}
