//! A disk that takes a log at its word: what a sync made certain, and what was pending, at any point.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::log::{Op, wrong};
use crate::child::Trouble;

/// A file or a directory, of which the log's operations are events.
#[derive(Debug, Default)]
pub struct Node {
    pub is_directory: bool,
    /// What became of a directory's entries.
    pub events: Vec<Event>,
    /// Operations that changed a file's bytes.
    pub writes: Vec<usize>,
    /// Operations that synced it.
    syncs: Vec<usize>,
    /// A directory's entries after all operations.
    entries: BTreeMap<String, usize>,
}

/// A change of one entry of a directory.
#[derive(Debug)]
pub struct Event {
    /// The operation; that of a rename changes two entries.
    pub op: usize,
    pub name: String,
    /// What the entry leads to from then on; `None` where it is gone.
    pub node: Option<usize>,
}

impl Node {
    /// The operations before this one are certain, where so many were done; later ones are pending.
    pub fn certain(&self, at: usize) -> usize {
        self.syncs[..self.syncs.partition_point(|sync| *sync < at)].last().copied().unwrap_or(0)
    }
}

/// All operations of a log, by what they changed.
#[derive(Debug)]
pub struct Disk {
    pub ops: Vec<Op>,
    pub nodes: Vec<Node>,
}

/// The node of the directory that was recorded.
pub const ROOT: usize = 0;

impl Disk {
    /// Follows a log from an empty directory.
    pub fn new(ops: Vec<Op>) -> Result<Disk, Trouble> {
        let root = Node { is_directory: true, ..Node::default() };
        let mut disk = Disk { ops: vec![], nodes: vec![root] };
        // The file that an inode's number is now; it may have been another's.
        let mut files = HashMap::new();
        for (op, done) in ops.iter().enumerate() {
            let followed = disk.follow(op, done, &mut files);
            followed.map_err(|e| wrong(format!("operation {op} of a log, {}: {}", done.name(), e.what)))?;
        }
        Ok(Disk { ops, ..disk })
    }

    fn follow(&mut self, op: usize, done: &Op, files: &mut HashMap<u64, usize>) -> Result<(), Trouble> {
        let file = |inode: &u64| files.get(inode).copied().ok_or_else(|| wrong("a file that the log did not make"));
        match done {
            Op::Create { path, inode } => {
                let node = self.add(false);
                files.insert(*inode, node);
                self.enter(op, path, Some(node))?;
            }
            Op::MakeDirectory { path } => {
                let node = self.add(true);
                self.enter(op, path, Some(node))?;
            }
            Op::Write { inode, .. } | Op::Truncate { inode, .. } => self.nodes[file(inode)?].writes.push(op),
            Op::SyncFile { inode } => self.nodes[file(inode)?].syncs.push(op),
            Op::SyncDirectory { path } => {
                let node = self.find(path)?;
                self.nodes[node].syncs.push(op);
            }
            Op::Link { from, to } => {
                let node = self.find(from)?;
                self.enter(op, to, Some(node))?;
            }
            Op::Rename { from, to } => {
                let node = self.find(from)?;
                // Two names of one file stay as they are.
                if self.find(to).ok() != Some(node) {
                    self.enter(op, from, None)?;
                    self.enter(op, to, Some(node))?;
                }
            }
            Op::Unlink { path } | Op::RemoveDirectory { path } => {
                self.find(path)?;
                self.enter(op, path, None)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, is_directory: bool) -> usize {
        self.nodes.push(Node { is_directory, ..Node::default() });
        self.nodes.len() - 1
    }

    /// What is at a path now.
    fn find(&self, path: &str) -> Result<usize, Trouble> {
        let mut node = ROOT;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            let next = self.nodes[node].entries.get(name);
            node = *next.ok_or_else(|| wrong(format!("'{path}' is nothing that the log made")))?;
        }
        Ok(node)
    }

    /// Has an entry lead to a node, or be gone.
    fn enter(&mut self, op: usize, path: &str, node: Option<usize>) -> Result<(), Trouble> {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        let parent = self.find(parent)?;
        let parent = &mut self.nodes[parent];
        match node {
            Some(node) => parent.entries.insert(name.to_owned(), node),
            None => parent.entries.remove(name),
        };
        parent.events.push(Event { op, name: name.to_owned(), node });
        Ok(())
    }

    /// An operation, as a message names it.
    pub fn told(&self, op: usize) -> String {
        let is_of = |node: &Node| node.writes.contains(&op) || node.syncs.contains(&op);
        let (file, events) = (self.nodes.iter().position(is_of), self.nodes.iter().flat_map(|node| &node.events));
        let first_name = || events.into_iter().find(|event| event.node == file).map(|event| &event.name[..]);
        let path = self.ops[op].path().or_else(first_name);
        format!("{} {}", self.ops[op].name(), path.unwrap_or_default())
    }

    /// The operations that a loss of power after so many may undo.
    pub fn pending(&self, at: usize) -> BTreeSet<usize> {
        let pending = |node: &Node| {
            let (certain, events) = (node.certain(at), node.events.iter().map(|event| event.op));
            let ops: Vec<usize> = events.chain(node.writes.iter().copied()).collect();
            ops.into_iter().filter(move |op| (certain..at).contains(op))
        };
        self.nodes.iter().flat_map(pending).collect()
    }
}
