//! Who may write. Advisory locks on two files of a local store, released by the system when a process dies.
//!
//! `layerstore.lock` is shared by imports and exclusive to gc, so that nothing an import is about to commit is
//! collected. `layerstore.commit.lock` is held for the moment of a catalogue commit, so that each one builds on the
//! one before it. Readers take neither. An object store has no such locks: Lance's own conflict detection orders
//! commits there, and gc goes by age.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

const USE: &str = "layerstore.lock";
const COMMIT: &str = "layerstore.commit.lock";

/// A lock, held until it is dropped. Without a file where the storage has none.
#[derive(Debug)]
pub struct Guard {
    _file: Option<File>,
}

/// Held by an import from its first look at the store to its commit.
pub async fn importing(store: Option<&Path>) -> Result<Guard> {
    held(store, USE, |file| file.lock_shared()).await
}

/// Held for one commit of the catalogue.
pub async fn committing(store: Option<&Path>) -> Result<Guard> {
    held(store, COMMIT, |file| file.lock()).await
}

/// Held by gc while it removes. Waits up to `patience` for imports to finish.
pub async fn collecting(store: Option<&Path>, patience: Duration) -> Result<Guard> {
    let Some(store) = store else { return Ok(Guard { _file: None }) };
    let path = store.join(USE);
    let file = open(&path)?;
    let deadline = Instant::now() + patience;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Guard { _file: Some(file) }),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(50)).await
            }
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Busy {
                    what: store.display().to_string(),
                    holder: "an import is writing to it".into(),
                });
            }
            Err(TryLockError::Error(e)) => return Err(Error::io(path, e)),
        }
    }
}

async fn held(store: Option<&Path>, name: &str, lock: fn(&File) -> std::io::Result<()>) -> Result<Guard> {
    let Some(store) = store else { return Ok(Guard { _file: None }) };
    let path = store.join(name);
    let file = open(&path)?;
    let waited = tokio::task::spawn_blocking(move || lock(&file).map(|()| file)).await;
    match waited {
        Ok(Ok(file)) => Ok(Guard { _file: Some(file) }),
        Ok(Err(e)) => Err(Error::io(path, e)),
        Err(_) => Err(Error::Cancelled),
    }
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new().create(true).truncate(false).write(true).open(path).map_err(|e| Error::io(path, e))
}
