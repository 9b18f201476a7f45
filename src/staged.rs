//! Files that appear whole or not at all.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

/// The folders that files are being written in; `None` once this process has given all of them up.
static WRITING: Mutex<Option<BTreeSet<PathBuf>>> = Mutex::new(Some(BTreeSet::new()));

/// A folder in [`WRITING`], which is removed when it is no longer needed.
struct Listed(PathBuf);

impl Listed {
    fn new(folder: PathBuf) -> Result<Self> {
        let mut writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
        writing.as_mut().ok_or(Error::Cancelled)?.insert(folder.clone());
        Ok(Listed(folder))
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
        if let Some(writing) = WRITING.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            writing.remove(&self.0);
        }
    }
}

/// Removes what is being written and not in its place, and lets nothing be written any more: for a process that is about to end.
pub(crate) fn abandon() {
    let writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner).take();
    for folder in writing.into_iter().flatten() {
        // Another thread may be adding to it.
        for _ in 0..3 {
            match std::fs::remove_dir_all(&folder) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {}
                _ => break,
            }
        }
    }
}

/// Has a file written in a folder beside its place, and moves it there when it is whole and on disk. Returns its bytes. A file that
/// was at its place is replaced.
///
/// # Errors
/// That of `write`, or when the file cannot be synced or moved: then what was at its place is as it was.
pub(crate) fn write(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<u64> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // A folder, since `write` may have temporary files of its own.
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let folder = parent.join(format!(".layerstore.{}.{number}.partial", std::process::id()));
    let listed = Listed::new(folder)?;
    std::fs::create_dir_all(&listed.0).map_err(|e| Error::io(path, e))?;
    let staged = listed.0.join("file");
    let finish = || -> std::io::Result<u64> {
        let file = File::open(&staged)?;
        file.sync_all()?;
        let bytes = file.metadata()?.len();
        std::fs::rename(&staged, path)?;
        sync_folder(parent)?;
        Ok(bytes)
    };
    write(&staged).and_then(|()| finish().map_err(|e| Error::io(path, e)))
}

/// Syncs the entry of a new name in its folder.
#[cfg(unix)]
fn sync_folder(folder: &Path) -> std::io::Result<()> {
    match File::open(folder) {
        Ok(folder) => folder.sync_all(),
        // Names can be made in a folder that cannot be read, which cannot be synced then.
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => Ok(()),
        Err(e) => Err(e),
    }
}

#[cfg(not(unix))]
fn sync_folder(_: &Path) -> std::io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let put =
            |text: &'static str| move |staged: &Path| std::fs::write(staged, text).map_err(|e| Error::io(staged, e));
        assert_eq!(write(&path, put("first")).unwrap(), 5);
        let error = write(&path, |staged| {
            put("half")(staged)?;
            Err(Error::Cancelled)
        });
        assert!(matches!(error, Err(Error::Cancelled)));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "first");
        assert_eq!(write(&path, put("second")).unwrap(), 6);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "second");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        // A file that was not written is an error too.
        assert!(matches!(write(&path, |_| Ok(())), Err(Error::Io { .. })));
    }
}
