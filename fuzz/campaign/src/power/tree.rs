//! A tree of files as a loss of power leaves it.

use std::collections::BTreeMap;
use std::path::Path;

use super::log::{Op, wrong};
use crate::child::Trouble;

/// Files with what they hold, and directories, by their paths.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Tree {
    pub entries: BTreeMap<String, Option<Content>>,
}

/// The writes that a file holds, one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Content(pub Vec<Piece>);

/// A write, or a new length, by its operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Piece {
    pub op: usize,
    /// Bytes of a write that are there.
    pub length: usize,
    /// They are zeros.
    pub is_zero: bool,
}

impl Content {
    /// The bytes.
    pub fn bytes(&self, ops: &[Op]) -> Vec<u8> {
        let mut content = vec![];
        for piece in &self.0 {
            match &ops[piece.op] {
                Op::Write { offset, bytes, .. } => {
                    let offset = *offset as usize;
                    let end = offset + piece.length;
                    content.resize(content.len().max(end), 0);
                    match piece.is_zero {
                        true => content[offset..end].fill(0),
                        false => content[offset..end].copy_from_slice(&bytes[..piece.length]),
                    }
                }
                Op::Truncate { length, .. } => content.resize(*length as usize, 0),
                _ => {}
            }
        }
        content
    }
}

impl Tree {
    /// Makes the files and directories in an empty directory.
    pub fn write(&self, ops: &[Op], at: &Path) -> Result<(), Trouble> {
        for (path, content) in &self.entries {
            match content {
                Some(content) => std::fs::write(at.join(path), content.bytes(ops))?,
                None => std::fs::create_dir(at.join(path))?,
            }
        }
        Ok(())
    }

    /// Checks that a directory holds this, byte for byte: that the log has all that was written.
    pub fn must_equal(&self, ops: &[Op], at: &Path) -> Result<(), Trouble> {
        let mut found = BTreeMap::new();
        find(at, "", &mut found)?;
        if let Some(path) = found.keys().find(|path| !self.entries.contains_key(*path)) {
            return Err(wrong(format!("the recorder missed how '{path}' was made")));
        }
        for (path, content) in &self.entries {
            if found.get(path) != Some(&content.as_ref().map(|content| content.bytes(ops))) {
                return Err(wrong(format!("the recorder missed what became of '{path}'")));
            }
        }
        Ok(())
    }
}

/// Files with their bytes, and directories, below a directory.
fn find(at: &Path, path: &str, found: &mut BTreeMap<String, Option<Vec<u8>>>) -> Result<(), Trouble> {
    for entry in std::fs::read_dir(at.join(path))? {
        let name = entry?.file_name();
        let name = name.to_str().ok_or_else(|| wrong("a file's name is no text"))?;
        let path = if path.is_empty() { name.to_owned() } else { format!("{path}/{name}") };
        let full = at.join(&path);
        if full.is_dir() {
            find(at, &path, found)?;
            found.insert(path, None);
        } else {
            found.insert(path, Some(std::fs::read(full)?));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_written_and_a_file_that_it_lacks_is_told() {
        let ops = [Op::Write { inode: 1, offset: 2, bytes: b"xy".into() }];
        let file = Content(vec![Piece { op: 0, length: 2, is_zero: false }]);
        let tree = Tree { entries: BTreeMap::from([("d".to_owned(), None), ("d/f".to_owned(), Some(file))]) };
        let folder = tempfile::tempdir().unwrap();
        tree.write(&ops, folder.path()).unwrap();
        assert_eq!(std::fs::read(folder.path().join("d/f")).unwrap(), b"\0\0xy");
        tree.must_equal(&ops, folder.path()).unwrap();
        std::fs::write(folder.path().join("d/g"), b"").unwrap();
        assert!(tree.must_equal(&ops, folder.path()).unwrap_err().what.contains("d/g"));
        std::fs::remove_file(folder.path().join("d/g")).unwrap();
        std::fs::write(folder.path().join("d/f"), b"\0\0xz").unwrap();
        assert!(tree.must_equal(&ops, folder.path()).unwrap_err().what.contains("d/f"));
    }
}
