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
        lock.write(&owner()).map_err(explain("write", &path))?;
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
        let _ = self.write("");
        // Not left to the closing of the handle: a process that was just started holds a copy of it until it is another program.
        let _ = self.file.unlock();
    }
}

/// This process for the next opener to read: its id, host, boot and the time it took the lock.
fn owner() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let (host, boot) = (read("/proc/sys/kernel/hostname"), read("/proc/sys/kernel/random/boot_id"));
    let since = crate::record::timestamp(std::time::SystemTime::now());
    format!("{} on {host} since {since} (boot {boot})\n", std::process::id())
}

fn taken(folder: &Path, file: &mut File) -> io::Error {
    let mut text = String::new();
    let read = file.take(256).read_to_string(&mut text);
    // Text of a file, shown on a terminal: one plain line.
    let shown: String = text.lines().next().unwrap_or_default().chars().filter(|c| !c.is_control()).collect();
    let owner = match shown.split(" (boot").next().unwrap_or_default() {
        owner if read.is_ok() && !owner.is_empty() => format!("process {owner}"),
        _ => "another process".to_owned(),
    };
    io::Error::new(
        io::ErrorKind::WouldBlock,
        format!("E-LOCK: {} is in use by {owner}; wait for it, stop it, or choose another --out", folder.display()),
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
    fn a_copy_of_the_handle_does_not_outlive_the_owner() {
        let folder = tempfile::tempdir().unwrap();
        let lock = RunLock::acquire(folder.path()).unwrap();
        let _copy = lock.file.try_clone().unwrap(); // as between fork and exec
        drop(lock);
        RunLock::acquire(folder.path()).unwrap();
    }

    #[test]
    fn a_lock_file_left_by_a_killed_process_is_no_lock() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("run.lock"), "4194303 and a longer text\n").unwrap();
        let _lock = RunLock::acquire(folder.path()).unwrap();
        let text = std::fs::read_to_string(folder.path().join("run.lock")).unwrap();
        assert!(text.starts_with(&format!("{} on ", std::process::id())) && text.lines().count() == 1, "{text}");
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
