//! What a loss of power leaves: which of the pending operations reached the disk, by several models.

use std::collections::{BTreeMap, HashMap, HashSet};

use fastrand::Rng;

use super::disk::{Disk, Node, ROOT};
use super::log::Op;
use super::tree::{Content, Piece, Tree};

/// Which pending operations survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Model {
    /// None of them.
    None,
    /// All of them, as when only the process dies.
    All,
    /// The first ones of each directory, as a journal has them.
    Prefix,
    /// The first ones of each name; a rename is done or not.
    Names,
    /// The first ones of each name; of a rename, one half may be done alone.
    Split,
    /// All but this one.
    But(usize),
    /// This one alone.
    Only(usize),
}

impl Model {
    pub fn name(self) -> &'static str {
        match self {
            Model::None => "none",
            Model::All => "all",
            Model::Prefix => "prefix",
            Model::Names => "names",
            Model::Split => "split",
            Model::But(_) => "but one",
            Model::Only(_) => "only one",
        }
    }
}

/// One loss of power.
#[derive(Debug, Clone, Copy)]
pub struct Loss {
    /// Operations that were done before.
    pub at: usize,
    pub model: Model,
    /// Of what is left to chance.
    pub seed: u64,
}

/// The tree that a loss leaves. Bytes that are pending follow the model as well; where it leaves them to chance, each write is
/// there, not there, cut short, or zeros.
pub fn left(disk: &Disk, loss: &Loss) -> Tree {
    let mut rng = Rng::with_seed(loss.seed);
    let kept = survivors(disk, loss, &mut rng);
    let contents: HashMap<usize, Content> = (0..disk.nodes.len())
        .filter(|node| !disk.nodes[*node].is_directory)
        .map(|node| (node, content(disk, &disk.nodes[node], loss, &mut rng)))
        .collect();
    let (mut entries, mut directories) = (BTreeMap::new(), vec![(ROOT, String::new())]);
    while let Some((node, path)) = directories.pop() {
        for (name, node) in names(&disk.nodes[node], node, loss.at, &kept) {
            let path = if path.is_empty() { name.to_owned() } else { format!("{path}/{name}") };
            entries.insert(path.clone(), contents.get(&node).cloned());
            if disk.nodes[node].is_directory {
                directories.push((node, path));
            }
        }
    }
    Tree { entries }
}

/// A change of an entry: the operation, the directory, and the name.
type Change<'a> = (usize, usize, &'a str);

/// The entries of a directory.
fn names<'a>(node: &'a Node, at: usize, loss: usize, kept: &HashSet<Change<'a>>) -> BTreeMap<&'a str, usize> {
    let (certain, mut names) = (node.certain(loss), BTreeMap::new());
    for event in node.events.iter().filter(|event| event.op < loss) {
        if event.op < certain || kept.contains(&(event.op, at, &event.name)) {
            match event.node {
                Some(node) => names.insert(&event.name[..], node),
                None => names.remove(&event.name[..]),
            };
        }
    }
    names
}

/// The pending changes of entries that survive.
fn survivors<'a>(disk: &'a Disk, loss: &Loss, rng: &mut Rng) -> HashSet<Change<'a>> {
    let mut pending: Vec<Change> = vec![];
    for (at, node) in disk.nodes.iter().enumerate() {
        let range = node.certain(loss.at)..loss.at;
        pending.extend(node.events.iter().filter(|e| range.contains(&e.op)).map(|e| (e.op, at, &e.name[..])));
    }
    pending.sort_unstable();
    let keeps: Vec<bool> = match loss.model {
        Model::None => vec![false; pending.len()],
        Model::All => vec![true; pending.len()],
        Model::But(one) => pending.iter().map(|(op, ..)| *op != one).collect(),
        Model::Only(one) => pending.iter().map(|(op, ..)| *op == one).collect(),
        Model::Prefix => first_ones(&pending, rng, |(_, at, _)| (*at, ""), true),
        Model::Names => first_ones(&pending, rng, |(_, at, name)| (*at, *name), true),
        Model::Split => first_ones(&pending, rng, |(_, at, name)| (*at, *name), false),
    };
    pending.into_iter().zip(keeps).filter_map(|(change, keeps)| keeps.then_some(change)).collect()
}

/// Whether each change is among the first of its group, of which a random number survives. Where operations are whole, what is
/// lost under one name is lost under all of them, with what came after it there.
fn first_ones<'a>(
    pending: &[Change<'a>],
    rng: &mut Rng,
    group: impl Fn(&Change<'a>) -> (usize, &'a str),
    is_whole: bool,
) -> Vec<bool> {
    let mut left: BTreeMap<(usize, &str), usize> = BTreeMap::new();
    pending.iter().for_each(|change| *left.entry(group(change)).or_default() += 1);
    left.values_mut().for_each(|count| *count = rng.usize(..=*count));
    let mut keeps = Vec::with_capacity(pending.len());
    for together in pending.chunk_by(|a, b| is_whole && a.0 == b.0) {
        let is_kept = together.iter().all(|change| left.get(&group(change)).is_some_and(|left| *left > 0));
        for change in together {
            left.entry(group(change)).and_modify(|left| *left = if is_kept { left.saturating_sub(1) } else { 0 });
            keeps.push(is_kept);
        }
    }
    keeps
}

/// What a file holds.
fn content(disk: &Disk, node: &Node, loss: &Loss, rng: &mut Rng) -> Content {
    let certain = node.certain(loss.at);
    let mut pieces = vec![];
    for op in node.writes.iter().copied().take_while(|op| *op < loss.at) {
        let length = match &disk.ops[op] {
            Op::Write { bytes, .. } => bytes.len(),
            _ => 0,
        };
        let whole = Piece { op, length, is_zero: false };
        let keeps = |keeps: bool| keeps.then_some(whole);
        pieces.extend(match loss.model {
            _ if op < certain => Some(whole),
            Model::None => None,
            Model::All => Some(whole),
            Model::But(one) => keeps(op != one),
            Model::Only(one) => keeps(op == one),
            Model::Prefix | Model::Names | Model::Split => match rng.u8(..10) {
                0..4 => Some(whole),
                // A new length is there, or not.
                4..7 if length > 0 => match rng.usize(..length) {
                    0 => None,
                    length => Some(Piece { length, ..whole }),
                },
                7 => Some(Piece { is_zero: length > 0, ..whole }),
                _ => None,
            },
        });
    }
    Content(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn create(path: &str, inode: u64) -> Op {
        Op::Create { path: path.into(), inode }
    }

    fn write(inode: u64, bytes: &[u8]) -> Op {
        Op::Write { inode, offset: 0, bytes: bytes.into() }
    }

    fn mkdir(path: &str) -> Op {
        Op::MakeDirectory { path: path.into() }
    }

    fn rename(from: &str, to: &str) -> Op {
        Op::Rename { from: from.into(), to: to.into() }
    }

    fn unlink(path: &str) -> Op {
        Op::Unlink { path: path.into() }
    }

    fn sync(path: &str) -> Op {
        Op::SyncDirectory { path: path.into() }
    }

    /// The files and directories, these with a slash, after all operations.
    fn after(ops: &[Op], model: Model, seed: u64) -> BTreeMap<String, Vec<u8>> {
        let disk = Disk::new(ops.to_vec()).unwrap();
        let tree = left(&disk, &Loss { at: ops.len(), model, seed });
        let entry = |(path, content): (&String, &Option<Content>)| match content {
            Some(content) => (path.clone(), content.bytes(&disk.ops)),
            None => (format!("{path}/"), vec![]),
        };
        tree.entries.iter().map(entry).collect()
    }

    /// All that a model leaves, by chance.
    fn outcomes(ops: &[Op], model: Model) -> HashSet<BTreeMap<String, Vec<u8>>> {
        (0..200).map(|seed| after(ops, model, seed)).collect()
    }

    fn files(files: &[(&str, &[u8])]) -> BTreeMap<String, Vec<u8>> {
        files.iter().map(|(path, bytes)| ((*path).to_owned(), bytes.to_vec())).collect()
    }

    #[test]
    fn a_rename_is_lost_without_a_sync_of_the_directory() {
        let mut ops = vec![create("f#1", 1), write(1, b"new"), Op::SyncFile { inode: 1 }, sync(""), rename("f#1", "f")];
        assert_eq!(after(&ops, Model::None, 0), files(&[("f#1", b"new")]));
        assert_eq!(after(&ops, Model::All, 0), files(&[("f", b"new")]));
        let whole = HashSet::from([files(&[("f#1", b"new")]), files(&[("f", b"new")])]);
        assert_eq!(outcomes(&ops, Model::Names), whole);
        assert_eq!(outcomes(&ops, Model::Prefix), whole);
        let halves = [files(&[]), files(&[("f#1", b"new"), ("f", b"new")])];
        assert_eq!(outcomes(&ops, Model::Split), whole.into_iter().chain(halves).collect());
        ops.push(sync(""));
        assert_eq!(after(&ops, Model::None, 0), files(&[("f", b"new")]));
    }

    #[test]
    fn a_directory_whose_entry_is_lost_takes_all_below_it() {
        let mut ops = vec![
            mkdir("a"),
            mkdir("a/b"),
            create("a/b/f", 1),
            write(1, b"new"),
            Op::SyncFile { inode: 1 },
            sync("a/b"),
            sync("a"),
        ];
        assert_eq!(after(&ops, Model::None, 0), files(&[]));
        assert_eq!(after(&ops, Model::But(0), 0), files(&[]));
        assert_eq!(after(&ops, Model::Only(0), 0), files(&[("a/", b""), ("a/b/", b""), ("a/b/f", b"new")]));
        ops.push(sync(""));
        assert_eq!(after(&ops, Model::None, 0), files(&[("a/", b""), ("a/b/", b""), ("a/b/f", b"new")]));
    }

    #[test]
    fn a_write_is_torn_without_a_sync_of_the_file() {
        let mut ops = vec![create("f", 1), sync(""), write(1, b"abcdef")];
        assert_eq!(after(&ops, Model::None, 0), files(&[("f", b"")]));
        let bytes: HashSet<Vec<u8>> =
            outcomes(&ops, Model::Prefix).into_iter().map(|files| files["f"].clone()).collect();
        let expected = [&b""[..], b"a", b"ab", b"abc", b"abcd", b"abcde", b"abcdef", &[0; 6]];
        assert_eq!(bytes, expected.into_iter().map(<[u8]>::to_vec).collect());
        ops.push(Op::SyncFile { inode: 1 });
        assert_eq!(outcomes(&ops, Model::Prefix), HashSet::from([files(&[("f", b"abcdef")])]));
    }

    #[test]
    fn a_removed_file_comes_back_without_a_sync_of_the_directory() {
        let mut ops = vec![create("f", 1), create("g", 2), sync(""), unlink("f"), unlink("g")];
        assert_eq!(after(&ops, Model::None, 0), files(&[("f", b""), ("g", b"")]));
        assert_eq!(after(&ops, Model::But(3), 0), files(&[("f", b"")]));
        assert_eq!(after(&ops, Model::Only(3), 0), files(&[("g", b"")]));
        ops.push(sync(""));
        assert_eq!(outcomes(&ops, Model::Split), HashSet::from([files(&[])]));
    }

    #[test]
    fn a_sync_of_a_file_makes_no_entry_certain_and_that_of_a_directory_no_bytes() {
        let start = [create("f", 1), write(1, b"new")];
        let file = [&start[..], &[Op::SyncFile { inode: 1 }]].concat();
        assert_eq!(after(&file, Model::None, 0), files(&[]));
        assert_eq!(after(&file, Model::Only(0), 0), files(&[("f", b"new")]));
        let directory = [&start[..], &[sync("")]].concat();
        assert_eq!(after(&directory, Model::None, 0), files(&[("f", b"")]));
        assert_eq!(Disk::new(directory).unwrap().pending(3), [1].into());
    }

    #[test]
    fn what_is_done_after_the_loss_is_not_there() {
        let disk = Disk::new(vec![create("f", 1), write(1, b"new"), create("g", 2), sync("")]).unwrap();
        let tree = left(&disk, &Loss { at: 1, model: Model::All, seed: 0 });
        assert_eq!(tree.entries, BTreeMap::from([("f".to_owned(), Some(Content(vec![])))]));
    }

    #[test]
    fn names_of_a_file_and_an_inode_that_is_used_again_are_told_apart() {
        let ops = [
            create("f#1", 1),
            write(1, b"old"),
            Op::Link { from: "f#1".into(), to: "f".into() },
            unlink("f#1"),
            Op::Write { inode: 1, offset: 3, bytes: b"er".into() },
            create("g", 1),
            write(1, b"new"),
            Op::Truncate { inode: 1, length: 5 },
        ];
        assert_eq!(after(&ops, Model::All, 0), files(&[("f", b"older"), ("g", b"new\0\0")]));
    }

    #[test]
    fn a_log_that_cannot_have_been_is_an_error() {
        for ops in [vec![write(1, b"new")], vec![unlink("f")], vec![rename("f", "g")], vec![create("d/f", 1)]] {
            assert!(Disk::new(ops).is_err());
        }
    }
}
