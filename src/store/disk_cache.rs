//! Copies on the local disk of what was read from an object store.
//!
//! Data files never change, and have names that none had before, so a copy of a part of one is right for ever. A copy is a file of its
//! own, named by the hash of what it is a copy of, with the hash of its bytes behind them: one that was damaged, or not written to its
//! end, is removed and read from the store again. Several processes may share a directory.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use uuid::Uuid;

use super::address::check_writable;
use crate::error::{Error, Result};

/// Bytes of a hash.
const HASH: usize = 32;

/// What the names of copies end with.
const ENDING: &str = "copy";

/// What a copy that is being written is called by.
const STAGED: &str = "staged-";

/// How long after its last use a copy's time is written anew.
const TOUCHED: Duration = Duration::from_secs(3600);

/// How long something that is being written stays, whoever may write it.
const WRITTEN_FOR: Duration = Duration::from_secs(3600);

/// Of a full cache, this much is kept when the oldest copies are removed: nine tenths.
const KEPT: (u64, u64) = (9, 10);

/// After so many bytes were written, as a part of the limit, it is looked what others have written.
const LOOKED: u64 = 16;

/// Where copies are kept, and how many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskCacheOptions {
    /// The directory, which is made where it is not there. Nothing else may lie in it.
    pub directory: PathBuf,
    /// How many bytes of copies are kept: those used longest ago are removed.
    pub bytes: u64,
}

/// A directory of copies.
#[derive(Debug, Clone)]
pub struct DiskCache(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    options: DiskCacheOptions,
    /// Bytes that were there at the last look, and those that were written since.
    held: Mutex<Option<Held>>,
}

#[derive(Debug, Clone, Copy)]
struct Held {
    bytes: u64,
    since: u64,
}

impl DiskCache {
    /// Opens a directory of copies, which is made where it is not there.
    ///
    /// # Errors
    /// When it cannot be made or written to, something else lies there, or it holds something that is no copy.
    pub fn open(options: DiskCacheOptions) -> Result<Self> {
        let directory = &options.directory;
        let named = |e| Error::io(directory, e);
        if fs::metadata(directory).is_ok_and(|there| !there.is_dir()) {
            return Err(Error::expected("directory of copies", directory.display(), "a directory; it is a file"));
        }
        make(directory).map_err(named)?;
        check_writable(directory)?;
        for entry in fs::read_dir(directory).map_err(named)? {
            let name = entry.map_err(named)?.file_name().to_string_lossy().into_owned();
            if !is_folder(&name) && !name.starts_with(STAGED) {
                return Err(Error::expected(
                    format!("directory {} of copies", directory.display()),
                    format!("'{name}' in it"),
                    "an empty or new directory, or one of such copies",
                ));
            }
        }
        Ok(DiskCache(Arc::new(Inner { options, held: Mutex::default() })))
    }

    /// Reads a copy, if there is one and it is what was written.
    pub async fn get(&self, key: &str) -> Option<Bytes> {
        let (cache, path) = (self.clone(), self.0.path(key));
        tokio::task::spawn_blocking(move || cache.0.read(&path)).await.ok().flatten()
    }

    /// Writes a copy. A disk that is full or refuses keeps nothing.
    pub async fn put(&self, key: String, pieces: Vec<Bytes>) {
        let cache = self.clone();
        // Waited for: a process that ends now would keep nothing.
        let _ = tokio::task::spawn_blocking(move || cache.0.write(&cache.0.path(&key), &pieces)).await;
    }
}

impl Inner {
    fn path(&self, key: &str) -> PathBuf {
        let name = blake3::hash(key.as_bytes()).to_hex();
        self.options.directory.join(&name[..2]).join(&name[2..]).with_extension(ENDING)
    }

    fn read(&self, path: &Path) -> Option<Bytes> {
        // What else lies there may have no end.
        let there = fs::symlink_metadata(path).ok()?;
        if !there.is_file() || there.len() > self.options.bytes {
            return None;
        }
        let mut bytes = vec![];
        let mut file = fs::File::open(path).ok()?;
        file.read_to_end(&mut bytes).ok()?;
        let content = bytes.len().checked_sub(HASH);
        let whole = content.filter(|&end| blake3::hash(&bytes[..end]).as_bytes() == &bytes[end..]);
        let Some(end) = whole else {
            let _ = fs::remove_file(path);
            return None;
        };
        let now = SystemTime::now();
        let used = file.metadata().and_then(|meta| meta.modified()).unwrap_or(now);
        if now.duration_since(used).is_ok_and(|age| age > TOUCHED) {
            let touch = fs::File::options().append(true).open(path);
            let _ = touch.and_then(|file| file.set_modified(now));
        }
        Some(Bytes::from(bytes).slice(..end))
    }

    fn write(&self, path: &Path, pieces: &[Bytes]) -> io::Result<()> {
        let length = pieces.iter().map(|piece| piece.len() as u64).sum::<u64>() + HASH as u64;
        if !self.make_room(length)? {
            return Ok(());
        }
        let staged = self.options.directory.join(format!("{STAGED}{}", Uuid::new_v4()));
        let written = (|| {
            let (mut file, mut hasher) = (fs::File::create_new(&staged)?, blake3::Hasher::new());
            for piece in pieces {
                hasher.update(piece);
                file.write_all(piece)?;
            }
            file.write_all(hasher.finalize().as_bytes())?;
            drop(file);
            path.parent().map_or(Ok(()), make)?;
            fs::rename(&staged, path)
        })();
        if written.is_err() {
            let _ = fs::remove_file(&staged);
        }
        written
    }

    /// Removes the copies used longest ago where so many more bytes would be too many; `false` where they are too many alone.
    fn make_room(&self, length: u64) -> io::Result<bool> {
        let most = self.options.bytes;
        if length > most {
            return Ok(false);
        }
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let known = held.filter(|held| held.since <= most / LOOKED && held.bytes + length <= most);
        let now = match known {
            Some(known) => known,
            None => Held { bytes: self.evict(most - length)?, since: 0 },
        };
        *held = Some(Held { bytes: now.bytes + length, since: now.since + length });
        Ok(true)
    }

    /// Returns the bytes of all copies, after the oldest were removed where they are more than `most`.
    fn evict(&self, most: u64) -> io::Result<u64> {
        let now = SystemTime::now();
        let mut copies = BTreeSet::new();
        for folder in fs::read_dir(&self.options.directory)?.filter_map(|entry| entry.ok()) {
            let name = folder.file_name().to_string_lossy().into_owned();
            if name.starts_with(STAGED) {
                // Of a process that was killed.
                let written = folder.metadata().and_then(|meta| meta.modified()).unwrap_or(now);
                if now.duration_since(written).is_ok_and(|age| age > WRITTEN_FOR) {
                    let _ = fs::remove_file(folder.path());
                }
                continue;
            }
            let files = if is_folder(&name) { fs::read_dir(folder.path()).ok() } else { None };
            for copy in files.into_iter().flatten().filter_map(|entry| entry.ok()) {
                if let Ok(meta) = copy.metadata()
                    && meta.is_file()
                    && is_copy(&copy.file_name().to_string_lossy())
                {
                    copies.insert((meta.modified().unwrap_or(now), copy.path(), meta.len()));
                }
            }
        }
        let mut bytes: u64 = copies.iter().map(|(.., bytes)| bytes).sum();
        if bytes > most {
            let kept = (self.options.bytes / KEPT.1 * KEPT.0).min(most);
            for (_, path, length) in copies {
                if bytes <= kept {
                    break;
                }
                // Another process may have removed it.
                let _ = fs::remove_file(path);
                bytes -= length;
            }
        }
        Ok(bytes)
    }
}

/// Whether a name is that of a folder of copies.
fn is_folder(name: &str) -> bool {
    name.len() == 2 && name.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Whether a name is that of a copy in such a folder.
fn is_copy(name: &str) -> bool {
    name.split_once('.').is_some_and(|(hash, ending)| {
        hash.len() == 2 * HASH - 2 && hash.bytes().all(|b| b.is_ascii_hexdigit()) && ending == ENDING
    })
}

/// Makes a directory that others cannot read.
fn make(directory: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(directory: &Path, bytes: u64) -> DiskCache {
        DiskCache::open(DiskCacheOptions { directory: directory.to_owned(), bytes }).unwrap()
    }

    fn files(directory: &Path) -> Vec<PathBuf> {
        let folders = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        folders.flat_map(|folder| fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path())).collect()
    }

    #[tokio::test]
    async fn gives_what_it_was_given() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("made");
        let kept = cache(&directory, 1 << 20);
        assert_eq!(kept.get("a").await, None);
        kept.put("a".into(), vec![Bytes::from_static(b"on"), Bytes::from_static(b"e")]).await;
        kept.put("empty".into(), vec![]).await;
        // Another process.
        let other = cache(&directory, 1 << 20);
        assert_eq!(other.get("a").await.as_deref(), Some(b"one".as_slice()));
        assert_eq!(other.get("empty").await.as_deref(), Some(b"".as_slice()));
    }

    #[tokio::test]
    async fn what_is_damaged_is_no_copy() {
        let folder = tempfile::tempdir().unwrap();
        let kept = cache(folder.path(), 1 << 20);
        for damage in [0, 1, 2] {
            kept.put("a".into(), vec![Bytes::from_static(b"one")]).await;
            let [path] = &files(folder.path())[..] else { panic!() };
            let mut bytes = fs::read(path).unwrap();
            match damage {
                0 => bytes[1] ^= 1,
                1 => bytes.truncate(10),
                _ => bytes.clear(),
            }
            fs::write(path, bytes).unwrap();
            assert_eq!(kept.get("a").await, None);
            assert_eq!(files(folder.path()).len(), 0);
        }
    }

    #[tokio::test]
    async fn the_oldest_go() {
        let folder = tempfile::tempdir().unwrap();
        let kept = cache(folder.path(), 10_000);
        for i in 0..40 {
            kept.put(format!("{i}"), vec![vec![i; 900].into()]).await;
            let bytes: u64 = files(folder.path()).iter().map(|path| fs::metadata(path).unwrap().len()).sum();
            assert!(bytes <= 10_000);
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(kept.get("39").await.is_some() && kept.get("0").await.is_none());
        // What is not a copy is nobody's to remove, and does not count.
        let other = files(folder.path())[0].with_file_name("1d8cd98f00b204e9800998ecf8427e");
        fs::write(&other, vec![0; 50_000]).unwrap();
        kept.put("40".into(), vec![vec![0; 900].into()]).await;
        assert!(cache(folder.path(), 10_000).get("40").await.is_some() && other.exists());
        fs::remove_file(other).unwrap();
        // More than all of it.
        kept.put("long".into(), vec![vec![0; 20_000].into()]).await;
        assert!(kept.get("long").await.is_none() && kept.get("39").await.is_some());
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn what_has_no_end_is_no_copy() {
        let folder = tempfile::tempdir().unwrap();
        let kept = cache(folder.path(), 1 << 20);
        kept.put("a".into(), vec![Bytes::from_static(b"one")]).await;
        let [path] = &files(folder.path())[..] else { panic!() };
        fs::remove_file(path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", path).unwrap();
        assert_eq!(kept.get("a").await, None);
    }

    #[test]
    fn somebody_elses_directory_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("thesis.tex"), "").unwrap();
        let options = DiskCacheOptions { directory: folder.path().to_owned(), bytes: 1 };
        let refused = DiskCache::open(options).unwrap_err().to_string();
        assert!(refused.contains("thesis.tex"), "{refused}");
    }
}
