//! Writing that survives a power cut: every file is fsynced, replaced by rename, and the folder that names it is fsynced too.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// Puts the path and what was tried before the system's reason: `cannot write runs/a/run.json: No space left on device`.
pub(crate) fn explain<'a>(action: &'a str, path: &'a Path) -> impl Fn(io::Error) -> io::Error + 'a {
    move |error| io::Error::new(error.kind(), format!("cannot {action} {}: {error}", path.display()))
}

/// Writes a file that does not exist yet and fsyncs it. After an error the file must not be trusted, nor the fsync tried again.
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let write = || {
        let mut file = File::create_new(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(explain("write", path))
}

/// Makes the names in a folder durable.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(explain("fsync the folder", path))
}

/// Replaces a file atomically: whoever reads it sees the old bytes or the new ones, also after a crash.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = parent(path);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = folder.join(format!(".tmp-{name}"));
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(explain("remove", &temporary)(error)),
        _ => {} // a leftover of a process that was killed here
    }
    let written =
        write_new(&temporary, bytes).and_then(|()| fs::rename(&temporary, path).map_err(explain("write", path)));
    if written.is_err() {
        let _ = fs::remove_file(&temporary); // the first error is the one to report
    }
    written.and_then(|()| sync_folder(folder))
}

/// Makes a folder and the folders above it, durably.
pub(crate) fn make_folder(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let above = parent(path);
    make_folder(above)?;
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(explain("make the folder", path)(error)),
        _ => sync_folder(above),
    }
}

/// The folder that holds `path`; "." for a bare name.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(above) if above.as_os_str().is_empty() => Path::new("."),
        Some(above) => above,
        None => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replace_leaves_the_new_bytes_and_no_temporary() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.json");
        fs::write(folder.path().join(".tmp-run.json"), "left over").unwrap();
        for text in ["first, longer", "second"] {
            replace(&path, text.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn errors_name_the_file_and_leave_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("target")).unwrap();
        let error = replace(&folder.path().join("target"), b"x").unwrap_err().to_string(); // a folder is in the way
        assert!(error.starts_with("cannot write") && error.contains("target"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(write_new(&folder.path().join("no/file"), b"x").unwrap_err().to_string().contains("no/file"));
    }

    #[test]
    fn folders_are_made_with_those_above() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("a/b/c");
        make_folder(&deep).unwrap();
        make_folder(&deep).unwrap();
        assert!(deep.is_dir());
        fs::write(folder.path().join("file"), "x").unwrap();
        assert!(make_folder(&folder.path().join("file/b")).is_err());
    }
}
