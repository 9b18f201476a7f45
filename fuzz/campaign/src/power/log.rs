//! The log of a recorder: operations on files, in the order in which they were done.

use std::path::Path;

use crate::child::{Trouble, TroubleKind};

/// One operation. Paths are relative to the directory that was recorded, which is the empty path itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    Create { path: String, inode: u64 },
    Write { inode: u64, offset: u64, bytes: Vec<u8> },
    Truncate { inode: u64, length: u64 },
    SyncFile { inode: u64 },
    SyncDirectory { path: String },
    Rename { from: String, to: String },
    Link { from: String, to: String },
    MakeDirectory { path: String },
    RemoveDirectory { path: String },
    Unlink { path: String },
}

impl Op {
    /// The operation's kind.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Create { .. } => "create",
            Op::Write { .. } => "write",
            Op::Truncate { .. } => "truncate",
            Op::SyncFile { .. } => "sync of a file",
            Op::SyncDirectory { .. } => "sync of a directory",
            Op::Rename { .. } => "rename",
            Op::Link { .. } => "link",
            Op::MakeDirectory { .. } => "mkdir",
            Op::RemoveDirectory { .. } => "rmdir",
            Op::Unlink { .. } => "unlink",
        }
    }

    /// The path that it changes, where it has one.
    pub fn path(&self) -> Option<&str> {
        match self {
            Op::Create { path, .. } | Op::SyncDirectory { path } | Op::MakeDirectory { path } => Some(path),
            Op::RemoveDirectory { path } | Op::Unlink { path } => Some(path),
            Op::Rename { to, .. } | Op::Link { to, .. } => Some(to),
            Op::Write { .. } | Op::Truncate { .. } | Op::SyncFile { .. } => None,
        }
    }
}

/// Numbers before the paths and bytes of an operation; `recorder/src/lib.rs` says what they are.
const NUMBERS: usize = 6;

/// Reads a log of what was done below `root`; there is none before the first operation.
pub fn read(path: &Path, root: &Path) -> Result<Vec<Op>, Trouble> {
    match path.exists() {
        true => parse(&std::fs::read(path)?, root),
        false => Ok(vec![]),
    }
}

/// The operations of a log.
pub fn parse(mut log: &[u8], root: &Path) -> Result<Vec<Op>, Trouble> {
    let mut ops = vec![];
    while !log.is_empty() {
        let mut numbers = [0; NUMBERS];
        for number in &mut numbers {
            let bytes = log.split_off(..8).and_then(|bytes| bytes.try_into().ok());
            *number = u64::from_le_bytes(bytes.ok_or_else(cut)?);
        }
        let [letter, inode, number, first, second, length] = numbers;
        let mut part = |length: u64| {
            let length = usize::try_from(length).map_err(|_| cut())?;
            log.split_off(..length).ok_or_else(cut)
        };
        let (first, second, bytes) = (part(first)?, part(second)?, part(length)?.to_vec());
        let path = relative(first, root);
        ops.push(match u8::try_from(letter) {
            Ok(b'C') => Op::Create { path: path?, inode },
            Ok(b'W') => Op::Write { inode, offset: number, bytes },
            Ok(b'T') => Op::Truncate { inode, length: number },
            Ok(b'F') => Op::SyncFile { inode },
            Ok(b'S') => Op::SyncDirectory { path: path? },
            Ok(b'R') => Op::Rename { from: path?, to: relative(second, root)? },
            Ok(b'L') => Op::Link { from: path?, to: relative(second, root)? },
            Ok(b'M') => Op::MakeDirectory { path: path? },
            Ok(b'D') => Op::RemoveDirectory { path: path? },
            Ok(b'U') => Op::Unlink { path: path? },
            _ => return Err(wrong(format!("operation {} of a log is none that is known", ops.len()))),
        });
    }
    Ok(ops)
}

fn relative(path: &[u8], root: &Path) -> Result<String, Trouble> {
    let path = Path::new(str::from_utf8(path).map_err(|_| wrong("a path of a log is no text"))?);
    let below = path.strip_prefix(root).ok().and_then(Path::to_str);
    below.map(str::to_owned).ok_or_else(|| wrong(format!("{} is not below {}", path.display(), root.display())))
}

fn cut() -> Trouble {
    wrong("a log ends within an operation")
}

/// What is wrong with a log, or with what it says.
pub fn wrong(what: impl Into<String>) -> Trouble {
    Trouble { kind: TroubleKind::Campaign, what: what.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record as the recorder writes it.
    fn record(letter: u8, numbers: [u64; 2], paths: [&str; 2], bytes: &[u8]) -> Vec<u8> {
        let lengths = [paths[0].len() as u64, paths[1].len() as u64, bytes.len() as u64];
        let numbers = [u64::from(letter), numbers[0], numbers[1], lengths[0], lengths[1], lengths[2]];
        let head = numbers.into_iter().flat_map(u64::to_le_bytes);
        head.chain(paths.concat().into_bytes()).chain(bytes.iter().copied()).collect()
    }

    #[test]
    fn operations_are_read_with_paths_below_the_root() {
        let log = [
            record(b'M', [0, 0], ["/r/d", ""], b""),
            record(b'C', [7, 0], ["/r/d/f", ""], b""),
            record(b'W', [7, 3], ["", ""], b"xyz"),
            record(b'S', [0, 0], ["/r", ""], b""),
            record(b'R', [0, 0], ["/r/d/f", "/r/g"], b""),
        ];
        let ops = parse(&log.concat(), Path::new("/r")).unwrap();
        let expected = [
            Op::MakeDirectory { path: "d".into() },
            Op::Create { path: "d/f".into(), inode: 7 },
            Op::Write { inode: 7, offset: 3, bytes: b"xyz".into() },
            Op::SyncDirectory { path: "".into() },
            Op::Rename { from: "d/f".into(), to: "g".into() },
        ];
        assert_eq!(ops, expected);
    }

    #[test]
    fn a_log_that_is_cut_or_odd_is_an_error() {
        let whole = record(b'W', [7, 3], ["", ""], b"xyz");
        for length in 1..whole.len() {
            assert!(parse(&whole[..length], Path::new("/r")).is_err(), "{length}");
        }
        for odd in [record(b'X', [0, 0], ["/r/a", ""], b""), record(b'U', [0, 0], ["/elsewhere", ""], b"")] {
            assert!(parse(&odd, Path::new("/r")).is_err());
        }
    }
}
