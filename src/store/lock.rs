//! The locks of writers: advisory ones on two files of a local store, which the system releases when a process dies, or
//! those of a store in memory.
//!
//! `layerstore.lock` is shared by imports and exclusive to gc, so that nothing an import is about to commit is
//! collected. `layerstore.commit.lock` is held for the moment of a catalogue commit, so that each one builds on the
//! one before it. Readers take neither. An object store has no such locks: Lance's own conflict detection orders
//! commits there, and gc goes by age.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedMutexGuard, OwnedRwLockReadGuard, OwnedRwLockWriteGuard};

use super::location::{Location, Place};
use crate::error::{Error, Result};

const USE: &str = "layerstore.lock";
const COMMIT: &str = "layerstore.commit.lock";

/// A lock, held until it is dropped.
#[derive(Debug)]
pub enum Guard {
    /// Of a file.
    File { _lock: File },
    /// Shared with others, of a store in memory.
    Shared { _lock: OwnedRwLockReadGuard<()> },
    /// Exclusive, of a store in memory.
    Exclusive { _lock: OwnedRwLockWriteGuard<()> },
    /// Of a commit to a store in memory.
    Commit { _lock: OwnedMutexGuard<()> },
    /// None: the storage has no locks.
    Nothing,
}

/// Waits for the lock that an import holds from its first look at the store to its commit.
///
/// # Errors
/// When the lock's file cannot be opened.
pub async fn importing(location: &Location) -> Result<Guard> {
    match location.place() {
        Place::Local(store) => held(store, USE, |file| file.lock_shared()).await,
        Place::Memory(memory) => Ok(Guard::Shared { _lock: memory.using.clone().read_owned().await }),
        Place::Remote => Ok(Guard::Nothing),
    }
}

/// Waits for the lock that is held for one commit of the catalogue.
///
/// # Errors
/// As [`importing`].
pub async fn committing(location: &Location) -> Result<Guard> {
    match location.place() {
        Place::Local(store) => held(store, COMMIT, |file| file.lock()).await,
        Place::Memory(memory) => Ok(Guard::Commit { _lock: memory.committing.clone().lock_owned().await }),
        Place::Remote => Ok(Guard::Nothing),
    }
}

/// Waits up to `patience` for imports to finish, and keeps others from beginning: for gc, and for changes of the format.
///
/// # Errors
/// As [`importing`], and [`Error::Busy`] when an import is still at work.
pub async fn collecting(location: &Location, patience: Duration) -> Result<Guard> {
    let busy = || Error::Busy { what: location.uri().to_owned(), holder: "an import is writing to it".into() };
    let store = match location.place() {
        Place::Local(store) => store,
        Place::Memory(memory) => {
            let lock = tokio::time::timeout(patience, memory.using.clone().write_owned()).await;
            return Ok(Guard::Exclusive { _lock: lock.map_err(|_| busy())? });
        }
        Place::Remote => return Ok(Guard::Nothing),
    };
    let path = store.join(USE);
    let file = open(&path)?;
    let deadline = Instant::now() + patience;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Guard::File { _lock: file }),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(50)).await
            }
            Err(TryLockError::WouldBlock) => return Err(busy()),
            Err(TryLockError::Error(e)) => return Err(Error::io(path, e)),
        }
    }
}

async fn held(store: &Path, name: &str, lock: fn(&File) -> std::io::Result<()>) -> Result<Guard> {
    let path = store.join(name);
    let file = open(&path)?;
    let waited = tokio::task::spawn_blocking(move || lock(&file).map(|()| file)).await;
    match waited {
        Ok(Ok(file)) => Ok(Guard::File { _lock: file }),
        Ok(Err(e)) => Err(Error::io(path, e)),
        Err(_) => Err(Error::Cancelled),
    }
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new().create(true).truncate(false).write(true).open(path).map_err(|e| Error::io(path, e))
}
