//! Files that appear whole or not at all.

use std::fs::File;
use std::path::Path;

use crate::error::{Error, Result};

/// Has a file written beside its place, and moves it there when it is whole and on disk. Returns its bytes. A file that
/// was at its place is replaced.
///
/// # Errors
/// That of `write`, or when the file cannot be synced or moved: then what was at its place is as it was.
pub(crate) fn write(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<u64> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let staged = parent.join(format!(".{name}.{}.partial", std::process::id()));
    let finish = || -> std::io::Result<u64> {
        let file = File::open(&staged)?;
        file.sync_all()?;
        let bytes = file.metadata()?.len();
        std::fs::rename(&staged, path)?;
        sync_folder(parent)?;
        Ok(bytes)
    };
    write(&staged).and_then(|()| finish().map_err(|e| Error::io(path, e))).inspect_err(|_| {
        let _ = std::fs::remove_file(&staged);
    })
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
