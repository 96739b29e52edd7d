//! One owner of a run directory: an exclusive lock on run.lock that the kernel frees with the process, however it ends.

use crate::files::explain;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::Path;

/// Held as long as the run directory is ours.
#[derive(Debug)]
pub struct RunLock {
    file: File,
}

impl RunLock {
    /// Takes the run directory `folder`. Errors: one sentence naming the process that holds it, or why the file cannot be made.
    pub fn acquire(folder: &Path) -> io::Result<Self> {
        let path = folder.join("run.lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(explain("open", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(taken(folder, &mut file)),
            Err(TryLockError::Error(error)) => return Err(explain("lock", &path)(error)),
        }
        let mut lock = Self { file };
        lock.write(&format!("{}\n", std::process::id())).map_err(explain("write", &path))?;
        Ok(lock)
    }

    fn write(&mut self, text: &str) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.file.write_all(text.as_bytes())
    }
}

impl Drop for RunLock {
    fn drop(&mut self) {
        let _ = self.write(""); // the lock itself goes with the file handle
    }
}

fn taken(folder: &Path, file: &mut File) -> io::Error {
    let mut text = String::new();
    let read = file.take(32).read_to_string(&mut text);
    let owner = match text.trim() {
        pid if read.is_ok() && !pid.is_empty() => format!("process {pid}"),
        _ => "another process".to_owned(),
    };
    io::Error::new(
        io::ErrorKind::WouldBlock,
        format!("{} is in use by {owner}; wait for it, stop it, or choose another --out", folder.display()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_opener_is_told_who_holds_the_run() {
        let folder = tempfile::tempdir().unwrap();
        let lock = RunLock::acquire(folder.path()).unwrap();
        let error = RunLock::acquire(folder.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        drop(lock);
        RunLock::acquire(folder.path()).unwrap();
    }

    #[test]
    fn a_lock_file_left_by_a_killed_process_is_no_lock() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("run.lock"), "4194303 and a longer text\n").unwrap();
        let _lock = RunLock::acquire(folder.path()).unwrap();
        let text = std::fs::read_to_string(folder.path().join("run.lock")).unwrap();
        assert_eq!(text, format!("{}\n", std::process::id()));
    }

    #[test]
    fn of_many_openers_exactly_one_owns_the_run() {
        let folder = tempfile::tempdir().unwrap();
        for _ in 0..20 {
            let all_tried = std::sync::Barrier::new(6);
            let owners: usize = std::thread::scope(|scope| {
                let open = || {
                    let lock = RunLock::acquire(folder.path());
                    all_tried.wait();
                    usize::from(lock.is_ok())
                };
                (0..6).map(|_| scope.spawn(open)).collect::<Vec<_>>().into_iter().map(|t| t.join().unwrap()).sum()
            });
            assert_eq!(owners, 1);
        }
    }

    #[test]
    fn a_folder_that_does_not_exist_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = RunLock::acquire(&folder.path().join("gone")).unwrap_err().to_string();
        assert!(error.contains("gone"), "{error}");
    }
}
