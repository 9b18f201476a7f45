//! Directories whose entries are on disk: what a file or a folder is found by after a power loss.
//!
//! A file that is synced can be lost all the same while the directory that names it is not, and so can a folder with all that is in
//! it. Whoever makes an entry syncs its directory; one that was killed before did not, and what it made looks like anything else
//! that is there. So a table's directories are synced before something is built on what they name.

use std::io::{Error as IoError, ErrorKind};
use std::path::Path;

use super::layout::VERSIONS;
use crate::error::{Error, Result};

/// Folders of a table that hold what a version is made of.
const FOLDERS: [&str; 6] = [VERSIONS, "data", "_transactions", "_deletions", "_refs", "_refs/tags"];

/// Syncs a directory's entries. One that is not there, or that is not ours to open, is left; so is one of a file system that does not
/// sync directories.
///
/// # Errors
/// When it cannot be synced.
pub fn directory(path: &Path) -> std::io::Result<()> {
    let left = |e: &IoError| {
        use ErrorKind::{InvalidInput, NotFound, PermissionDenied, ReadOnlyFilesystem, Unsupported};
        matches!(e.kind(), InvalidInput | NotFound | PermissionDenied | ReadOnlyFilesystem | Unsupported)
    };
    match std::fs::File::open(path).and_then(|directory| directory.sync_all()) {
        Err(e) if !left(&e) => Err(e),
        _ => Ok(()),
    }
}

/// Makes a directory with those that it lies in, all of whose entries are on disk then: also those that were there, which somebody else
/// may have made a moment ago.
///
/// # Errors
/// When one cannot be made or synced.
pub fn create_all(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(|e| Error::io(path, e))?;
    let above = path.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty());
    for parent in above {
        directory(parent).map_err(|e| Error::io(parent, e))?;
    }
    Ok(())
}

/// Syncs the directories of tables of a store on the local file system, and the store's own; nothing of a store elsewhere.
///
/// # Errors
/// When one cannot be synced.
pub async fn tables(store: Option<&Path>, names: impl IntoIterator<Item = String>) -> std::io::Result<()> {
    let Some(store) = store.map(Path::to_owned) else {
        return Ok(());
    };
    let names: Vec<String> = names.into_iter().collect();
    let sync = move || {
        let named = |path: &Path, e: IoError| IoError::new(e.kind(), format!("{}: {e}", path.display()));
        let sync = |path: &Path| directory(path).map_err(|e| named(path, e));
        for name in names {
            let table = store.join(format!("{name}.lance"));
            FOLDERS.iter().try_for_each(|folder| sync(&table.join(folder)))?;
            sync(&table)?;
        }
        sync(&store)
    };
    tokio::task::spawn_blocking(sync).await.map_err(IoError::other)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_made_with_those_they_lie_in() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("a/b/c");
        create_all(&deep).unwrap();
        create_all(&deep).unwrap();
        assert!(deep.is_dir());
        directory(&deep.join("nothing")).unwrap();
        std::fs::write(folder.path().join("file"), "x").unwrap();
        assert!(create_all(&folder.path().join("file/d")).is_err());
    }
}
