//! A disk that fails at a chosen operation, and that remembers what was written and what was made durable.

use crate::power::{Log, Node, Op};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use train::files::{Disk, Files, System};

/// What happens at the chosen operation.
#[derive(Clone, Copy, Debug)]
pub enum How {
    /// It fails and has no effect; the next one works.
    Once(io::ErrorKind),
    /// It and all later ones fail; of the first, if it is a write, a half reaches the file.
    From(io::ErrorKind),
    /// A write stops half way and fails; other operations fail.
    Short(io::ErrorKind),
    /// The process ends here: this and all later operations do nothing; a half of a write is done.
    Die,
    /// The process is killed here for good (SIGKILL).
    Kill,
    /// Everything works, but from here on each fsync takes so many milliseconds.
    Slow(u64),
}

pub const WAYS: [How; 6] = [
    How::Once(io::ErrorKind::Other), // EIO has no kind of its own
    How::Once(io::ErrorKind::PermissionDenied),
    How::Once(io::ErrorKind::StorageFull),
    How::Short(io::ErrorKind::StorageFull),
    How::From(io::ErrorKind::StorageFull),
    How::Die,
];

#[derive(Debug, Default)]
struct State {
    /// Operations so far.
    count: usize,
    plan: Option<(usize, How)>,
    fired: bool,
    log: Option<Log>,
}

#[derive(Debug, Default)]
pub struct Faulty {
    state: Mutex<State>,
}

enum Verdict {
    Go,
    Half(io::Error),
    Refuse(io::Error),
}

impl Faulty {
    /// Fails `how` at operation `at` (from 0); none to count only.
    pub fn new(plan: Option<(usize, How)>) -> Arc<Self> {
        Arc::new(Faulty { state: Mutex::new(State { plan, ..State::default() }) })
    }

    /// Fails nothing and writes down what happens under `root`, an empty folder.
    pub fn logging(root: &Path) -> Arc<Self> {
        let log = Log::new(fs::metadata(root).unwrap().ino());
        Arc::new(Faulty { state: Mutex::new(State { log: Some(log), ..State::default() }) })
    }

    pub fn disk(self: &Arc<Self>) -> Disk {
        self.clone()
    }

    /// Operations so far.
    pub fn count(&self) -> usize {
        self.lock().count
    }

    pub fn fired(&self) -> bool {
        self.lock().fired
    }

    pub fn log(&self) -> Log {
        self.lock().log.clone().expect("a logging layer")
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn verdict(state: &mut State) -> Verdict {
        let at = state.count;
        state.count += 1;
        let Some((planned, how)) = state.plan else { return Verdict::Go };
        if at < planned {
            return Verdict::Go;
        }
        let first = at == planned;
        state.fired = true;
        match how {
            How::Once(kind) if first => Verdict::Refuse(kind.into()),
            How::Short(kind) if first => Verdict::Half(kind.into()),
            How::Once(_) | How::Short(_) => Verdict::Go,
            How::From(kind) if first => Verdict::Half(kind.into()),
            How::From(kind) => Verdict::Refuse(kind.into()),
            How::Die if first => Verdict::Half(io::Error::other("the process is dead")),
            How::Die => Verdict::Refuse(io::Error::other("the process is dead")),
            How::Slow(_) => Verdict::Go,
            How::Kill => {
                let _ = signal_hook::low_level::raise(signal_hook::consts::SIGKILL);
                unreachable!("killed")
            }
        }
    }

    /// Waits as a slow disk does. Others may go on meanwhile.
    fn wait(&self) {
        let plan = self.lock().plan;
        if let Some((_, How::Slow(milliseconds))) = plan {
            std::thread::sleep(std::time::Duration::from_millis(milliseconds));
        }
    }

    /// Runs an operation that is done or not done, and logs it if it was.
    fn run<T>(&self, act: impl FnOnce() -> io::Result<T>, log: impl FnOnce(&T) -> Option<Op>) -> io::Result<T> {
        let mut state = self.lock();
        match Self::verdict(&mut state) {
            Verdict::Go => {}
            Verdict::Half(error) | Verdict::Refuse(error) => return Err(error),
        }
        let done = act()?;
        if let Some(written) = &mut state.log {
            written.ops.extend(log(&done));
        }
        Ok(done)
    }
}

fn folder_of(path: &Path) -> u64 {
    fs::metadata(path.parent().unwrap()).unwrap().ino()
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

fn node_of(path: &Path) -> Node {
    let found = fs::symlink_metadata(path).unwrap();
    match found.file_type() {
        kind if kind.is_dir() => Node::Folder(found.ino()),
        kind if kind.is_symlink() => Node::Link(fs::read_link(path).unwrap()),
        _ => Node::File(found.ino()),
    }
}

fn set(path: &Path) -> Option<Op> {
    Some(Op::Set { folder: folder_of(path), name: name_of(path), node: node_of(path) })
}

impl Files for Faulty {
    fn create(&self, path: &Path) -> io::Result<File> {
        self.run(|| System.create(path), |_| set(path))
    }

    fn open(&self, path: &Path) -> io::Result<File> {
        let new = !path.exists();
        self.run(|| System.open(path), |_| new.then(|| set(path))?)
    }

    fn write(&self, path: &Path, file: &File, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.lock();
        let (part, result) = match Self::verdict(&mut state) {
            Verdict::Go => (bytes, Ok(())),
            Verdict::Half(error) => (&bytes[..bytes.len() / 2], Err(error)),
            Verdict::Refuse(error) => (&bytes[..0], Err(error)),
        };
        let found = file.metadata()?;
        if let Some(log) = &mut state.log {
            log.ops.push(Op::Write { file: found.ino(), at: found.len() as usize, bytes: part.to_vec() });
        }
        System.write(path, file, part).and(result)
    }

    fn set_len(&self, path: &Path, file: &File, len: u64) -> io::Result<()> {
        let ino = file.metadata()?.ino();
        self.run(|| System.set_len(path, file, len), |_| Some(Op::Cut { file: ino, len: len as usize }))
    }

    fn sync(&self, path: &Path, file: &File) -> io::Result<()> {
        self.wait();
        let ino = file.metadata()?.ino();
        self.run(|| System.sync(path, file), |_| Some(Op::Sync { id: ino }))
    }

    fn make_folder(&self, path: &Path) -> io::Result<()> {
        self.run(|| System.make_folder(path), |_| set(path))
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        self.wait();
        self.run(|| System.sync_folder(path), |_| Some(Op::Sync { id: fs::metadata(path).ok()?.ino() }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.run(
            || System.rename(from, to),
            |_| Some(Op::Rename { folder: folder_of(to), from: name_of(from), to: name_of(to), node: node_of(to) }),
        )
    }

    fn link(&self, target: &Path, path: &Path) -> io::Result<()> {
        self.run(|| System.link(target, path), |_| set(path))
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let folder = path.parent().and_then(|above| fs::metadata(above).ok()).map(|found| found.ino());
        self.run(|| System.remove_file(path), |_| Some(Op::Remove { folder: folder?, name: name_of(path) }))
    }

    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        let folder = folder_of(path);
        self.run(|| System.remove_folder(path), |_| Some(Op::Remove { folder, name: name_of(path) }))
    }
}
