//! Rules for files and texts that others wrote: no pickle, no links in a run directory, sizes bounded before a byte is read, and no text
//! that commands a terminal.

use crate::files::explain;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

/// Largest run.json, failure.json or stage.json that is read.
pub const MAX_RECORD: u64 = 16 << 20;
/// Largest run.toml that is read.
pub const MAX_RUN_FILE: u64 = 1 << 20;

/// File name endings that promise a pickle, alone or in a zip.
const PICKLES: [&str; 10] = ["bin", "pt", "pth", "ckpt", "pkl", "pickle", "npy", "npz", "joblib", "distcp"];

/// Names in a run directory that programs read or write through. (`plots` and what people add is their own.)
const FILES: [&str; 7] =
    ["run.toml", "run.json", "run.lock", "metrics.jsonl", "samples.jsonl", "failure.json", "metrics.pruned.jsonl"];

/// `text` as it may be shown: every character that could move a cursor, ring, colour, hide or reorder text becomes `�`. Line ends and tabs
/// stay.
pub fn shown(text: &str) -> String {
    let hides = |c: char| {
        (c.is_control() && c != '\n' && c != '\t')
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}' | '\u{2028}' | '\u{2029}')
    };
    text.chars().map(|c| if hides(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// Why the weights file at `path`, which begins with `bytes`, is refused: a pickle can run code as it is loaded. Known by name and by its
/// first bytes.
pub fn refuse_pickle(path: &Path, bytes: &[u8]) -> Result<(), String> {
    let ending = path.extension().map(|ending| ending.to_string_lossy().to_lowercase()).unwrap_or_default();
    let named = PICKLES.contains(&ending.as_str());
    // Protocol 2 and later, a zip (torch.save since 1.6), a numpy array, which may hold objects.
    let magic = [&b"\x80\x02"[..], b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04", b"\x93NUMPY"];
    if named || magic.iter().any(|magic| bytes.starts_with(magic)) {
        return Err(
            "is or may hold a Python pickle, which can run code when it is loaded; convert it to safetensors where you trust it".into(),
        );
    }
    Ok(())
}

/// Refuses a run directory in which a name that is read or written leads elsewhere: links could leave the directory, pipes and devices hang.
pub fn check_run_folder(folder: &Path) -> io::Result<()> {
    for name in FILES {
        let path = folder.join(name);
        refuse(&path, |kind| kind.is_file(), "is not a plain file")?;
    }
    refuse(&folder.join("checkpoints"), |kind| kind.is_dir(), "is not a folder")
}

fn refuse(path: &Path, good: impl Fn(fs::FileType) -> bool, what: &str) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if good(found.file_type()) => Ok(()),
        Ok(_) => {
            let text = format!("{} {what}; a run directory holds no links and no devices: remove it", path.display());
            Err(io::Error::new(io::ErrorKind::InvalidInput, text))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(explain("read", path)(error)),
    }
}

/// The text of a file of at most `limit` bytes; never more is read, also of a file that grows.
pub fn read_text(path: &Path, limit: u64) -> io::Result<String> {
    let mut text = String::new();
    let file = File::open(path).map_err(explain("read", path))?;
    file.take(limit + 1).read_to_string(&mut text).map_err(explain("read", path))?;
    if text.len() as u64 > limit {
        let text = format!("{} is larger than {limit} bytes, which such a file cannot be", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_commands_the_terminal() {
        assert_eq!(shown("plain ä 日本\n\tline"), "plain ä 日本\n\tline");
        let hostile = "a\u{1b}[2J\u{1b}]0;title\u{7}\r\u{8}b\u{9b}31m\u{202e}txt.exe\u{2066}\u{0}";
        let safe = shown(hostile);
        assert_eq!(safe, "a�[2J�]0;title���b�31m�txt.exe��");
        assert!(!safe.contains(|c: char| c.is_control()));
    }

    #[test]
    fn pickles_are_known_by_name_and_by_bytes() {
        for name in ["a.bin", "a.pt", "A.PTH", "x/model.ckpt", "a.pkl", "w.npy", "__0_0.distcp"] {
            assert!(refuse_pickle(Path::new(name), b"").unwrap_err().contains("pickle"), "{name}");
        }
        for bytes in [&b"\x80\x02}q"[..], b"\x80\x04\x95", b"PK\x03\x04zip", b"\x93NUMPY\x01"] {
            assert!(refuse_pickle(Path::new("model.safetensors"), bytes).is_err());
        }
        assert_eq!(refuse_pickle(Path::new("model.safetensors"), b"\x10\0\0\0\0\0\0\0{}"), Ok(()));
    }

    #[test]
    fn long_files_are_not_read_to_their_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.toml");
        File::create(&path).unwrap().set_len(1 << 40).unwrap(); // a terabyte, sparse
        assert!(read_text(&path, 100).unwrap_err().to_string().contains("larger than 100 bytes"));
        fs::write(&path, "short").unwrap();
        assert_eq!(read_text(&path, 5).unwrap(), "short");
        fs::write(&path, b"\xff").unwrap();
        assert!(read_text(&path, 5).unwrap_err().to_string().contains("run.toml"));
    }

    #[cfg(unix)]
    #[test]
    fn links_in_a_run_directory_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        check_run_folder(folder.path()).unwrap();
        for name in FILES.into_iter().chain(["checkpoints"]) {
            let path = folder.path().join(name);
            std::os::unix::fs::symlink("/nowhere", &path).unwrap();
            let message = check_run_folder(folder.path()).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains("holds no links"), "{message}");
            fs::remove_file(&path).unwrap();
        }
        fs::create_dir(folder.path().join("metrics.jsonl")).unwrap();
        assert!(check_run_folder(folder.path()).is_err());
    }
}
