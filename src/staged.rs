//! Files that appear whole or not at all.

use std::collections::BTreeSet;
use std::fs::{DirBuilder, File, Metadata, OpenOptions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

/// Links that are followed before they are taken for a ring, as Linux has it.
const MOST_LINKS: usize = 40;

/// The folders that files are being written in; `None` once this process has given all of them up.
static WRITING: Mutex<Option<BTreeSet<PathBuf>>> = Mutex::new(Some(BTreeSet::new()));

/// Removes what is being written and not in its place, and lets nothing be written any more: for a process that is about to
/// end.
pub(crate) fn abandon() {
    let writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner).take();
    for folder in writing.into_iter().flatten() {
        // Another thread may be adding to it.
        for _ in 0..3 {
            match std::fs::remove_dir_all(&folder) {
                Err(e) if e.kind() != ErrorKind::NotFound => {}
                _ => break,
            }
        }
    }
}

/// Makes a folder for temporary files in that of the system, which [`abandon`] removes with all that is in it.
///
/// # Errors
/// When it cannot be made.
pub(crate) fn temporary_folder() -> Result<PathBuf> {
    let place = Place { path: std::env::temp_dir().join("files"), there: None };
    let staged = Staged::create(&place, &place.path)?;
    let folder = staged.folder.clone();
    // Kept until the process ends.
    std::mem::forget(staged);
    Ok(folder)
}

/// Has a file written in a folder beside its place, and moves it there when it is whole and on disk. Returns its bytes. What was
/// at its place is replaced: where that is a link, the file that it leads to; and the new file has the old one's mode.
///
/// # Errors
/// That of `write`, or when the place cannot be written to, or the file cannot be synced or moved: then what was at its place
/// is as it was.
pub(crate) fn write(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<u64> {
    let place = Place::of(path)?;
    let staged = Staged::create(&place, path)?;
    write(&staged.path)?;
    staged.finish(&place).map_err(|e| Error::io(path, e))
}

/// Has files written in a folder beside their place, and moves it there when all are whole and on disk. Returns what `write` gives.
/// An empty folder that is there is filled, and stays what it is: a mounted one, one that a link leads to, or that others may not read.
///
/// # Errors
/// That of `write`, or when something is there already, or the folder cannot be synced or moved: then nothing is there.
pub(crate) fn write_folder<T>(path: &Path, write: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let (staged, place) = staged_folder(path)?;
    let written = write(&staged.path)?;
    let moved = sync_all(&staged.path, &staged.made).and_then(|()| match &place {
        FolderPlace::New(path) => {
            std::fs::rename(&staged.path, path)?;
            sync_folder(folder_of(path))
        }
        FolderPlace::Empty(folder) => fill(folder, &staged.path),
    });
    moved.map_err(|e| Error::io(path, e))?;
    Ok(written)
}

/// Where a folder is to go.
enum FolderPlace {
    /// A name that nothing has, behind all links.
    New(PathBuf),
    /// An empty folder.
    Empty(PathBuf),
}

/// Moves all that is in one folder into another one of its file system; all or nothing, unless the process is killed meanwhile.
fn fill(folder: &Path, from: &Path) -> std::io::Result<()> {
    let names = std::fs::read_dir(from)?.map(|entry| entry.map(|entry| entry.file_name()));
    let mut names = names.collect::<std::io::Result<Vec<_>>>()?;
    names.sort();
    for (count, name) in names.iter().enumerate() {
        let to = folder.join(name);
        // Not in the place of what somebody has put there meanwhile.
        let moved = match std::fs::symlink_metadata(&to) {
            Ok(_) => Err(ErrorKind::AlreadyExists.into()),
            Err(_) => std::fs::rename(from.join(name), &to),
        };
        if let Err(e) = moved {
            for name in &names[..count] {
                let _ = std::fs::rename(folder.join(name), from.join(name));
            }
            return Err(e);
        }
    }
    sync_folder(folder)
}

/// Tries whether [`write_folder`] could make a folder at a place. Nothing is left behind.
///
/// # Errors
/// When something is there that is no empty folder, or no folder can be made there.
pub(crate) fn probe_folder(path: &Path) -> Result<()> {
    staged_folder(path).map(drop)
}

/// Makes an empty folder beside a place where there is none, or in an empty one.
fn staged_folder(path: &Path) -> Result<(Staged, FolderPlace)> {
    let place = match std::fs::read_dir(path).map(|mut entries| entries.next().is_none()) {
        Ok(true) => FolderPlace::Empty(std::fs::canonicalize(path).map_err(|e| Error::io(path, e))?),
        Ok(false) => {
            return Err(Error::file(path, "a folder is there that is not empty, expected nothing, or an empty one"));
        }
        // Without the '/' that a folder's name may end with.
        Err(e) if e.kind() == ErrorKind::NotFound && path.file_name().is_some() => {
            FolderPlace::New(Place::of(&path.components().collect::<PathBuf>())?.path)
        }
        Err(e) if e.kind() == ErrorKind::NotADirectory => {
            return Err(Error::file(path, "a file is there, expected nothing, or an empty folder"));
        }
        Err(e) => return Err(Error::io(path, e)),
    };
    let beside = match &place {
        FolderPlace::New(path) => path.clone(),
        FolderPlace::Empty(folder) => folder.join("folder"),
    };
    let mut staged = Staged::create(&Place { path: beside, there: None }, path)?;
    staged.path = staged.folder.join("folder");
    std::fs::create_dir(&staged.path).map_err(|e| Error::io(path, e))?;
    Ok((staged, place))
}

/// Gives all files of a folder the mode of a new one, and syncs them and the folders themselves.
fn sync_all(folder: &Path, made: &Metadata) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        match path.is_dir() {
            true => sync_all(&path, made)?,
            false => {
                let file = File::open(&path)?;
                file.set_permissions(made.permissions())?;
                file.sync_all()?;
            }
        }
    }
    sync_folder(folder)
}

/// Tries whether [`write`] could write to a place, before the work whose result goes there. Nothing is left behind.
///
/// # Errors
/// When something else than a file is there, or no file can be made or named so.
pub(crate) fn probe(path: &Path) -> Result<()> {
    Staged::create(&Place::of(path)?, path).map(drop)
}

/// Where a file is to go.
struct Place {
    /// No link.
    path: PathBuf,
    /// Of the file that is there.
    there: Option<Metadata>,
}

impl Place {
    fn of(path: &Path) -> Result<Self> {
        if path.as_os_str().as_encoded_bytes().ends_with(b"/") && !path.is_dir() {
            return Err(Error::file(path, "the name ends with '/', as a folder's does; expected a file's name"));
        }
        let mut place = path.to_owned();
        for _ in 0..=MOST_LINKS {
            match std::fs::symlink_metadata(&place) {
                Ok(there) if there.is_symlink() => {
                    let target = std::fs::read_link(&place).map_err(|e| Error::io(path, e))?;
                    place = folder_of(&place).join(target);
                }
                Ok(there) if there.is_file() => return Ok(Place { path: place, there: Some(there) }),
                Ok(there) => {
                    let what = if there.is_dir() { "a directory is" } else { "something else than a regular file is" };
                    return Err(Error::file(path, format!("{what} there, expected a file to replace, or nothing")));
                }
                Err(e) if e.kind() == ErrorKind::NotFound && place.file_name().is_some() => {
                    return Ok(Place { path: place, there: None });
                }
                // Such as a name that is too long.
                Err(e) => return Err(Error::io(path, e)),
            }
        }
        Err(Error::file(
            path,
            format!("more than {MOST_LINKS} symbolic links lead from there, expected a file or nothing"),
        ))
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A file in a folder beside its place, which is removed when it goes, whatever writers have left there.
struct Staged {
    folder: PathBuf,
    path: PathBuf,
    /// What a new file gets of the process, before anything else replaced this one.
    made: Metadata,
}

impl Staged {
    fn create(place: &Place, path: &Path) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let mut builder = DirBuilder::new();
        // Nobody may read what is in there who may not read what it replaces.
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        loop {
            // Short, whatever the name at the place.
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let folder = folder_of(&place.path).join(format!(".layerstore.{}.{count}.partial", std::process::id()));
            let mut writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
            let listed = writing.as_mut().ok_or(Error::Cancelled)?;
            match builder.create(&folder) {
                Ok(()) => listed.insert(folder.clone()),
                // Of a process that had this one's number.
                Err(e) if e.kind() == ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(Error::io(path, e)),
            };
            drop(writing);
            let staged = folder.join("file");
            let made = OpenOptions::new().write(true).create_new(true).open(&staged).and_then(|file| file.metadata());
            return match made {
                Ok(made) => Ok(Staged { path: staged, folder, made }),
                Err(e) => {
                    remove(&folder);
                    Err(Error::io(path, e))
                }
            };
        }
    }

    fn finish(self, place: &Place) -> std::io::Result<u64> {
        let file = File::open(&self.path)?;
        let bytes = file.metadata()?.len();
        if bytes == 0 {
            return Err(std::io::Error::new(ErrorKind::UnexpectedEof, "nothing was written"));
        }
        keep_owner(&file, place);
        let mode = place.there.as_ref().unwrap_or(&self.made).permissions();
        file.set_permissions(mode)?;
        file.sync_all()?;
        std::fs::rename(&self.path, &place.path)?;
        sync_folder(folder_of(&place.path))?;
        Ok(bytes)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        remove(&self.folder);
    }
}

/// Removes a folder in [`WRITING`].
fn remove(folder: &Path) {
    let _ = std::fs::remove_dir_all(folder);
    if let Some(writing) = WRITING.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
        writing.remove(folder);
    }
}

/// Gives the file to the owner of what it replaces, where that is allowed.
#[cfg(unix)]
fn keep_owner(file: &File, place: &Place) {
    use std::os::unix::fs::MetadataExt;
    if let Some(there) = &place.there {
        let _ = std::os::unix::fs::fchown(file, Some(there.uid()), Some(there.gid()));
    }
}

#[cfg(not(unix))]
fn keep_owner(_: &File, _: &Place) {}

/// Syncs the entry of a new name in its folder.
#[cfg(unix)]
fn sync_folder(folder: &Path) -> std::io::Result<()> {
    match File::open(folder) {
        Ok(folder) => folder.sync_all(),
        // Names can be made in a folder that cannot be read, which cannot be synced then.
        Err(e) if e.kind() == ErrorKind::PermissionDenied => Ok(()),
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

    fn put(text: &'static str) -> impl FnOnce(&Path) -> Result<()> {
        move |staged| std::fs::write(staged, text).map_err(|e| Error::io(staged, e))
    }

    #[test]
    fn whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        assert_eq!(write(&path, put("first")).unwrap(), 5);
        let error = write(&path, |staged| {
            put("half")(staged)?;
            Err(Error::Cancelled)
        });
        assert!(matches!(error, Err(Error::Cancelled)));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "first");
        assert_eq!(write(&path, put("second")).unwrap(), 6);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "second");
        probe(&path).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        // A file that was not written is an error too.
        assert!(matches!(write(&path, |_| Ok(())), Err(Error::Io { .. })));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "second");
    }

    #[test]
    fn temporary_folders_are_known_to_whoever_ends_the_process() {
        let folder = temporary_folder().unwrap();
        assert!(folder.is_dir() && folder.starts_with(std::env::temp_dir()));
        assert!(WRITING.lock().unwrap().as_ref().unwrap().contains(&folder));
        remove(&folder);
        assert!(!folder.exists());
    }

    #[test]
    fn folders_appear_whole() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("model");
        let two = |staged: &Path| {
            std::fs::create_dir(staged.join("inner")).unwrap();
            put("one")(&staged.join("a"))?;
            // As safetensors makes files.
            #[cfg(unix)]
            {
                use std::os::unix::fs::PermissionsExt;
                std::fs::set_permissions(staged.join("a"), std::fs::Permissions::from_mode(0o600)).unwrap();
            }
            put("two")(&staged.join("inner/b"))
        };
        let failed = write_folder(&at, |staged| two(staged).and(Err::<(), _>(Error::Cancelled)));
        assert!(matches!(failed, Err(Error::Cancelled)) && !at.exists());
        std::fs::create_dir(&at).unwrap();
        probe_folder(&at).unwrap();
        write_folder(&at, two).unwrap();
        assert_eq!(std::fs::read_to_string(at.join("inner/b")).unwrap(), "two");
        let mode = |name: &str| std::fs::metadata(at.join(name)).unwrap().permissions();
        assert_eq!(mode("a"), mode("inner/b"), "files are as the process makes them");
        let message = write_folder(&at, two).unwrap_err().to_string();
        assert!(message.contains("not empty"), "{message}");
        let slash = format!("{}/", folder.path().join("slash").display());
        write_folder(Path::new(&slash), two).unwrap();
        assert_eq!(std::fs::read_to_string(folder.path().join("slash/inner/b")).unwrap(), "two");
        std::fs::remove_dir_all(folder.path().join("slash")).unwrap();
        let message = write(Path::new(&slash), put("text")).unwrap_err().to_string();
        assert!(message.contains("ends with '/'"), "{message}");
        let message = probe_folder(&at.join("a")).unwrap_err().to_string();
        assert!(message.contains("a file is there"), "{message}");
        assert!(probe_folder(&folder.path().join("none/model")).is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    /// What is there already stays the folder that it is.
    #[cfg(unix)]
    #[test]
    fn empty_folders_are_filled() {
        use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("private")).unwrap();
        std::fs::set_permissions(at("private"), std::fs::Permissions::from_mode(0o700)).unwrap();
        let before = std::fs::metadata(at("private")).unwrap();
        symlink("private", at("link")).unwrap();
        symlink("later", at("dangling")).unwrap();
        let two = |staged: &Path| put("one")(&staged.join("a")).and_then(|()| put("two")(&staged.join("b")));
        let failed = write_folder(&at("link"), |staged| two(staged).and(Err::<(), _>(Error::Cancelled)));
        assert!(matches!(failed, Err(Error::Cancelled)));
        assert_eq!(std::fs::read_dir(at("private")).unwrap().count(), 0);
        write_folder(&at("link"), two).unwrap();
        let after = std::fs::metadata(at("private")).unwrap();
        assert_eq!((after.ino(), after.mode()), (before.ino(), before.mode()));
        assert_eq!(std::fs::read_dir(at("private")).unwrap().count(), 2);
        write_folder(&at("dangling"), two).unwrap();
        assert!(at("dangling").is_symlink() && at("later/b").is_file());
        // What somebody puts there meanwhile is not replaced, and what was moved before goes back.
        std::fs::create_dir(at("shared")).unwrap();
        let late = |staged: &Path| two(staged).and_then(|()| put("theirs")(&at("shared/b")));
        assert!(write_folder(&at("shared"), late).is_err());
        assert_eq!(std::fs::read_to_string(at("shared/b")).unwrap(), "theirs");
        assert_eq!(std::fs::read_dir(at("shared")).unwrap().count(), 1);
    }

    #[test]
    fn names_may_be_as_long_as_names_can_be() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("n".repeat(255));
        assert_eq!(write(&path, put("text")).unwrap(), 4);
        let longer = folder.path().join("n".repeat(256));
        for refused in [probe(&longer), probe(&folder.path().join("none/file"))] {
            assert!(matches!(refused, Err(Error::Io { .. })), "{refused:?}");
        }
        let message = probe(folder.path()).unwrap_err().to_string();
        assert!(message.contains("a directory is there"), "{message}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn links_and_modes_stay() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let mode = |name: &str| std::fs::metadata(at(name)).unwrap().permissions().mode() & 0o777;
        std::fs::create_dir(at("inner")).unwrap();
        symlink("inner/file", at("link")).unwrap();
        symlink(at("link"), at("far")).unwrap();
        // A link to nothing yet.
        write(&at("far"), put("first")).unwrap();
        assert_eq!(std::fs::read_to_string(at("inner/file")).unwrap(), "first");
        std::fs::write(at("plain"), "").unwrap();
        assert_eq!(mode("inner/file"), mode("plain"), "a new file is as the process makes files");
        for wanted in [0o600, 0o640, 0o444] {
            std::fs::set_permissions(at("inner/file"), std::fs::Permissions::from_mode(wanted)).unwrap();
            write(&at("far"), |staged| {
                let around = std::fs::metadata(staged.parent().unwrap()).unwrap();
                assert_eq!(around.permissions().mode() & 0o777, 0o700, "nobody else may read it yet");
                // As writers do that make files of their own.
                std::fs::remove_file(staged).unwrap();
                put("second")(staged)
            })
            .unwrap();
            assert_eq!(
                (std::fs::read_to_string(at("inner/file")).unwrap(), mode("inner/file")),
                ("second".into(), wanted)
            );
        }
        assert!(at("link").is_symlink() && at("far").is_symlink());
        symlink("ring", at("ring")).unwrap();
        assert!(probe(&at("ring")).is_err());
        assert_eq!(std::fs::read_dir(at("inner")).unwrap().count(), 1);
    }
}
