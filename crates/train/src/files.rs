//! Every operation that changes a run directory, as one trait, so that tests can let any of them fail, stop short or be lost in a power cut;
//! and the ways to write that survive one: every file is fsynced, replaced by rename, and the folder that names it is fsynced too.

use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The disk as a run sees it. The methods do what the system does; a layer for tests overrides them.
pub trait Files: Debug + Send + Sync {
    /// Makes a file that is not there yet.
    fn create(&self, path: &Path) -> io::Result<File> {
        File::create_new(path)
    }

    /// Opens a file to append to, made if it is missing.
    fn open(&self, path: &Path) -> io::Result<File> {
        OpenOptions::new().append(true).create(true).open(path)
    }

    /// Writes all bytes at the end of an open file; a failure may leave a part of them.
    fn write(&self, _path: &Path, mut file: &File, bytes: &[u8]) -> io::Result<()> {
        file.write_all(bytes)
    }

    fn set_len(&self, _path: &Path, file: &File, len: u64) -> io::Result<()> {
        file.set_len(len)
    }

    /// Makes the contents of a file durable. After an error they may be lost: never try it again, write another file.
    fn sync(&self, _path: &Path, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        fs::read(path)
    }

    fn make_folder(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    /// Makes the names in a folder durable.
    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    /// Makes a symbolic link for people; no program reads it.
    fn link(&self, target: &Path, path: &Path) -> io::Result<()> {
        #[cfg(unix)]
        return std::os::unix::fs::symlink(target, path);
        #[cfg(not(unix))]
        return fs::write(path, target.to_string_lossy().as_bytes());
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    /// Removes an empty folder.
    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    /// Bytes that can still be written where `path` is.
    fn free(&self, path: &Path) -> io::Result<u64> {
        let found = rustix::fs::statvfs(path)?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }
}

/// The system's files.
#[derive(Debug)]
pub struct System;

impl Files for System {}

/// The disk of a run, shared with the thread that saves.
pub type Disk = Arc<dyn Files>;

/// The system's files, to share.
pub fn system() -> Disk {
    Arc::new(System)
}

/// Puts the path and what was tried before the system's reason: `cannot write runs/a/run.json: No space left on device`.
pub(crate) fn explain<'a>(action: &'a str, path: &'a Path) -> impl Fn(io::Error) -> io::Error + 'a {
    move |error| io::Error::new(error.kind(), format!("cannot {action} {}: {error}", path.display()))
}

/// Writes a file that does not exist yet and fsyncs it. After an error the file must not be trusted, nor the fsync tried again.
pub(crate) fn write_new(disk: &dyn Files, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let write = || {
        let file = disk.create(path)?;
        disk.write(path, &file, bytes)?;
        disk.sync(path, &file)
    };
    write().map_err(explain("write", path))
}

/// Makes the names in a folder durable.
pub(crate) fn sync_folder(disk: &dyn Files, path: &Path) -> io::Result<()> {
    disk.sync_folder(path).map_err(explain("fsync the folder", path))
}

/// Replaces a file atomically: whoever reads it sees the old bytes or the new ones, also after a crash.
pub(crate) fn replace(disk: &dyn Files, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = beside(path);
    match disk.remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(explain("remove", &temporary)(error)),
        _ => {} // a leftover of a process that was killed here
    }
    let written =
        write_new(disk, &temporary, bytes).and_then(|()| disk.rename(&temporary, path).map_err(explain("write", path)));
    if written.is_err() {
        let _ = disk.remove_file(&temporary); // the first error is the one to report
    }
    written.and_then(|()| sync_folder(disk, parent(path)))
}

/// Points the link at `path` to `target`, replacing an older one atomically.
pub(crate) fn replace_link(disk: &dyn Files, target: &Path, path: &Path) -> io::Result<()> {
    let temporary = beside(path);
    let _ = disk.remove_file(&temporary);
    disk.link(target, &temporary)?;
    disk.rename(&temporary, path)?;
    disk.sync_folder(parent(path))
}

/// Where a replacement of `path` is put together: one name for each, so that a leftover is found again.
fn beside(path: &Path) -> PathBuf {
    parent(path).join(format!(".tmp-{}", path.file_name().unwrap_or_default().to_string_lossy()))
}

/// Makes a folder and the folders above it, durably.
pub(crate) fn make_folders(disk: &dyn Files, path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let above = parent(path);
    make_folders(disk, above)?;
    match disk.make_folder(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(explain("make the folder", path)(error)),
        _ => sync_folder(disk, above),
    }
}

/// Removes a folder with the files and folders in it; links are removed, not followed.
pub(crate) fn remove_all(disk: &dyn Files, path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => remove_all(disk, &entry.path())?,
            false => disk.remove_file(&entry.path())?,
        }
    }
    disk.remove_folder(path)
}

/// Removes the temporaries in a folder that a process left when it was killed, or the disk refused.
pub(crate) fn sweep(disk: &dyn Files, folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        match (entry.file_name().to_string_lossy().starts_with(".tmp-"), entry.file_type()?.is_dir()) {
            (true, true) => remove_all(disk, &entry.path())?,
            (true, false) => disk.remove_file(&entry.path())?,
            _ => {}
        }
    }
    Ok(())
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
            replace(&System, &path, text.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn errors_name_the_file_and_leave_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("target")).unwrap();
        let error = replace(&System, &folder.path().join("target"), b"x").unwrap_err().to_string(); // a folder is in the way
        assert!(error.starts_with("cannot write") && error.contains("target"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(write_new(&System, &folder.path().join("no/file"), b"x").unwrap_err().to_string().contains("no/file"));
    }

    #[test]
    fn folders_are_made_with_those_above_and_removed_with_those_below() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("a/b/c");
        make_folders(&System, &deep).unwrap();
        make_folders(&System, &deep).unwrap();
        assert!(deep.is_dir());
        fs::write(folder.path().join("file"), "x").unwrap();
        assert!(make_folders(&System, &folder.path().join("file/b")).is_err());
        replace_link(&System, Path::new("../file"), &folder.path().join("a/link")).unwrap();
        remove_all(&System, &folder.path().join("a")).unwrap();
        assert!(!folder.path().join("a").exists() && folder.path().join("file").exists());
        make_folders(&System, &folder.path().join(".tmp-a/b")).unwrap();
        replace_link(&System, Path::new("file"), &folder.path().join(".tmp-link")).unwrap();
        sweep(&System, folder.path()).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_free_bytes_of_a_disk_are_known() {
        assert!(System.free(&std::env::temp_dir()).unwrap() > 0);
        assert!(System.free(Path::new("/no/such/folder")).is_err());
    }
}
