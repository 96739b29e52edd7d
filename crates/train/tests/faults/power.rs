//! What a power cut may leave of a log of operations: what was fsynced, and of the rest nothing, all, zeros, halves or any part in any order.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// Files and folders are told apart by number; one that is used again after a removal is made empty by the entry that names it anew.
pub type Id = u64;

#[derive(Clone, Debug)]
pub enum Node {
    File(Id),
    Folder(Id),
    Link(PathBuf),
}

#[derive(Clone, Debug)]
pub enum Op {
    /// A new name in a folder.
    Set {
        folder: Id,
        name: String,
        node: Node,
    },
    Remove {
        folder: Id,
        name: String,
    },
    /// Within one folder.
    Rename {
        folder: Id,
        from: String,
        to: String,
        node: Node,
    },
    Write {
        file: Id,
        at: usize,
        bytes: Vec<u8>,
    },
    Cut {
        file: Id,
        len: usize,
    },
    /// Of a file: its bytes; of a folder: its names.
    Sync {
        id: Id,
    },
}

impl Op {
    /// The file or folder whose fsync makes the operation durable.
    fn subject(&self) -> Option<Id> {
        match self {
            Op::Set { folder, .. } | Op::Remove { folder, .. } | Op::Rename { folder, .. } => Some(*folder),
            Op::Write { file, .. } | Op::Cut { file, .. } => Some(*file),
            Op::Sync { .. } => None,
        }
    }
}

#[derive(Clone, Debug)]
pub struct Log {
    root: Id,
    pub ops: Vec<Op>,
}

/// What becomes of operations that were not made durable.
#[derive(Clone, Copy, Debug)]
pub enum Fate {
    Lost,
    Done,
    /// Names are there, bytes are not.
    Empty,
    /// Names and lengths are there, bytes are zeros.
    Zeros,
    /// Names are there, and the first half of every write.
    Halves,
    /// Each has a fate of its own, drawn from this number.
    Drawn(u64),
}

pub const FATES: [Fate; 9] = [
    Fate::Lost,
    Fate::Done,
    Fate::Empty,
    Fate::Zeros,
    Fate::Halves,
    Fate::Drawn(1),
    Fate::Drawn(2),
    Fate::Drawn(3),
    Fate::Drawn(4),
];

impl Fate {
    fn of(self, index: usize) -> Fate {
        let Fate::Drawn(seed) = self else { return self };
        // SplitMix64 (Steele 2014).
        let mut z = (seed << 32 | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        [Fate::Lost, Fate::Done, Fate::Done, Fate::Zeros, Fate::Halves, Fate::Lost][((z ^ (z >> 31)) % 6) as usize]
    }
}

#[derive(Default)]
struct Left {
    folders: HashMap<Id, BTreeMap<String, Node>>,
    files: HashMap<Id, Vec<u8>>,
}

impl Log {
    pub fn new(root: Id) -> Self {
        Log { root, ops: Vec::new() }
    }

    /// Makes in the empty folder `to` what a cut before operation `cut` leaves.
    pub fn replay(&self, cut: usize, fate: Fate, to: &Path) {
        let mut left = Left::default();
        let mut last_sync: HashMap<Id, usize> = HashMap::new();
        for (index, op) in self.ops[..cut].iter().enumerate() {
            if let Op::Sync { id } = op {
                last_sync.insert(*id, index);
            }
        }
        for (index, op) in self.ops[..cut].iter().enumerate() {
            let Some(subject) = op.subject() else { continue };
            let durable = last_sync.get(&subject).is_some_and(|sync| *sync > index);
            left.apply(op, if durable { Fate::Done } else { fate.of(index) });
        }
        left.write(self.root, to);
    }
}

impl Left {
    fn apply(&mut self, op: &Op, fate: Fate) {
        let lost = matches!(fate, Fate::Lost);
        match op {
            Op::Set { folder, name, node } => {
                match node {
                    Node::File(id) => drop(self.files.insert(*id, Vec::new())),
                    Node::Folder(id) => drop(self.folders.insert(*id, BTreeMap::new())),
                    Node::Link(_) => {}
                }
                if !lost {
                    self.folders.entry(*folder).or_default().insert(name.clone(), node.clone());
                }
            }
            Op::Remove { folder, name } if !lost => drop(self.folders.entry(*folder).or_default().remove(name)),
            Op::Rename { folder, from, to, node } if !lost => {
                let names = self.folders.entry(*folder).or_default();
                names.remove(from);
                names.insert(to.clone(), node.clone());
            }
            Op::Cut { file, len } if !lost => self.files.entry(*file).or_default().resize(*len, 0),
            Op::Write { file, at, bytes } => {
                let part = match fate {
                    Fate::Done => bytes.clone(),
                    Fate::Zeros => vec![0; bytes.len()],
                    Fate::Halves => bytes[..bytes.len() / 2].to_vec(),
                    _ => return,
                };
                let contents = self.files.entry(*file).or_default();
                contents.resize(contents.len().max(at + part.len()), 0);
                contents[*at..at + part.len()].copy_from_slice(&part);
            }
            _ => {}
        }
    }

    fn write(&self, folder: Id, to: &Path) {
        for (name, node) in self.folders.get(&folder).into_iter().flatten() {
            let path = to.join(name);
            match node {
                Node::File(id) => fs::write(path, self.files.get(id).map_or(&[][..], Vec::as_slice)).unwrap(),
                Node::Link(target) => symlink(target, path).unwrap(),
                Node::Folder(id) => {
                    fs::create_dir(&path).unwrap();
                    self.write(*id, &path);
                }
            }
        }
    }
}
