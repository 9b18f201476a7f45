//! The locks of writers: advisory ones on two files of a local store, which the system releases when a process dies, or
//! those of a store in memory.
//!
//! `layerstore.lock` is shared by imports and exclusive to gc, so that nothing an import is about to commit is
//! collected. `layerstore.commit.lock` is held for the moment of a catalogue commit, so that each one builds on the
//! one before it. `layerstore.index.lock` is held while indices are made, one after the other. Readers take none of them.
//!
//! An object store has no locks. The first one is a lease there ([`lease`]); commits are of the next version alone, and are made again
//! where another came first.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;
use std::time::Duration;

use tokio::sync::{OwnedMutexGuard, OwnedRwLockReadGuard, OwnedRwLockWriteGuard};

use super::lease::{self, Exclusive, Shared};
use super::location::Location;
use super::on_wait::OnWait;
use super::place::Place;
use crate::error::{Error, Result};

const USE: &str = "layerstore.lock";
const COMMIT: &str = "layerstore.commit.lock";
const INDEX: &str = "layerstore.index.lock";

/// How long to sleep between attempts at a lock: twice as long after each, up to the second.
const NAPS: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(32));

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
    /// A writer's lease, of a store on an object store.
    Writer { lease: Shared },
    /// The lease of whoever has such a store for itself.
    Alone { lease: Exclusive },
    /// None, beside a lease.
    Nothing,
}

impl Guard {
    /// Asks whether what is held is held still, as a lease may be not. To be asked after the version was opened that a commit follows.
    ///
    /// # Errors
    /// [`Error::Busy`] when it is not, and when the storage refuses.
    pub async fn confirm(&self) -> Result<()> {
        match self {
            Guard::Writer { lease } => lease.confirm().await,
            Guard::Alone { lease } => lease.confirm().await,
            _ => Ok(()),
        }
    }

    /// Commits a version that changes nothing, where a lease is held: to be done before anything is removed.
    ///
    /// # Errors
    /// When the storage refuses, or the latest version cannot be read.
    pub async fn fence(&self, location: &Location) -> Result<()> {
        match self {
            Guard::Alone { lease } => lease.fence(location).await,
            _ => Ok(()),
        }
    }

    /// Asks whether a version of the catalogue stays, since it is to be named or restored.
    ///
    /// # Errors
    /// When it is being removed, and when the storage refuses.
    pub async fn require_kept(&self, version: u64) -> Result<()> {
        match self {
            Guard::Writer { lease } => lease.require_kept(version).await,
            _ => Ok(()),
        }
    }
}

/// Keeps gc from artifacts that no version names yet, until it is dropped: [`Store::lease`](super::Store::lease).
#[derive(Debug)]
pub struct Lease {
    pub(super) _guard: Guard,
}

/// Waits for the lock that an import holds from its first look at the store to its commit. Whoever stops waiting has not taken it;
/// so it is with all of these.
///
/// # Errors
/// When the lock's file cannot be opened.
pub async fn importing(location: &Location) -> Result<Guard> {
    let lock = async {
        match location.place() {
            Place::Local(store) => held(store, USE, File::try_lock_shared).await,
            Place::Memory(memory) => Ok(Guard::Shared { _lock: memory.using.clone().read_owned().await }),
            Place::Remote => Ok(Guard::Writer { lease: lease::shared(location).await? }),
        }
    };
    // Who has a lease is told of where it is found.
    if let Place::Remote = location.place() {
        return lock.await;
    }
    OnWait::told(location.on_wait(), waiting(location, USE, "gc, or an upgrade, is at work"), lock).await
}

/// Waits for the lock that is held for one commit of the catalogue by whoever imports nothing; on an object store for a lease.
///
/// # Errors
/// As [`importing`].
pub async fn changing(location: &Location) -> Result<Guard> {
    match location.place() {
        Place::Local(_) | Place::Memory(_) => committing(location).await,
        Place::Remote => importing(location).await,
    }
}

/// Waits for the lock that is held for one commit of the catalogue.
///
/// # Errors
/// As [`importing`].
pub async fn committing(location: &Location) -> Result<Guard> {
    let lock = async {
        match location.place() {
            Place::Local(store) => held(store, COMMIT, File::try_lock).await,
            Place::Memory(memory) => Ok(Guard::Commit { _lock: memory.committing.clone().lock_owned().await }),
            Place::Remote => Ok(Guard::Nothing),
        }
    };
    OnWait::told(location.on_wait(), waiting(location, COMMIT, "another process commits, or gc is at work"), lock).await
}

/// Waits for the lock that is held while indices are made.
///
/// # Errors
/// As [`importing`].
pub async fn indexing(location: &Location) -> Result<Guard> {
    let lock = async {
        match location.place() {
            Place::Local(store) => held(store, INDEX, File::try_lock).await,
            Place::Memory(memory) => Ok(Guard::Commit { _lock: memory.indexing.clone().lock_owned().await }),
            Place::Remote => Ok(Guard::Nothing),
        }
    };
    OnWait::told(location.on_wait(), waiting(location, INDEX, "another process makes indices"), lock).await
}

/// Waits up to `patience` for imports to finish, and keeps others from beginning: for gc, repairs and changes of the format, as `what`
/// says. On an object store it waits longer for writers of which is not known whether they live.
///
/// # Errors
/// As [`importing`], and [`Error::Busy`] when an import is still at work.
pub async fn collecting(location: &Location, what: &str, patience: Duration) -> Result<Guard> {
    let lock = async {
        match location.place() {
            Place::Local(store) => held(store, USE, File::try_lock).await,
            Place::Memory(memory) => Ok(Guard::Exclusive { _lock: memory.using.clone().write_owned().await }),
            Place::Remote => Ok(Guard::Alone { lease: lease::exclusive(location, what, patience).await? }),
        }
    };
    if let Place::Remote = location.place() {
        return lock.await;
    }
    let told = OnWait::told(location.on_wait(), waiting(location, USE, "an import is at work"), lock);
    tokio::time::timeout(patience, told).await.unwrap_or_else(|_| {
        Err(Error::Busy { what: location.uri().to_owned(), holder: "an import is writing to it".into() })
    })
}

fn waiting<'a>(location: &'a Location, lock: &'a str, holder: &'a str) -> impl Fn() -> String + 'a {
    move || match location.local() {
        Some(store) => format!("waiting for {}: {holder}", store.join(lock).display()),
        None => format!("waiting for a lock of {}: {holder}", location.uri()),
    }
}

/// Waits for a lock of a file without holding a thread, so that whoever waits can be stopped.
async fn held(store: &Path, name: &str, lock: fn(&File) -> Result<(), TryLockError>) -> Result<Guard> {
    let path = store.join(name);
    let file = open(&path)?;
    let mut nap = NAPS.0;
    loop {
        match lock(&file) {
            Ok(()) => return Ok(Guard::File { _lock: file }),
            Err(TryLockError::WouldBlock) => {
                tokio::time::sleep(nap).await;
                nap = (2 * nap).min(NAPS.1);
            }
            Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(TryLockError::Error(e)) => return Err(Error::io(path, e)),
        }
    }
}

fn open(path: &Path) -> Result<File> {
    // For reading too: network file systems ask that of a shared lock, and for writing of an exclusive one.
    OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path).map_err(|e| Error::io(path, e))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::super::s3::StorageOptions;
    use super::*;
    use crate::store::on_wait::UNTOLD;
    use crate::store::testing::Hooks;

    /// A lock that is held is told of, can be given up, and is had when it is free.
    #[tokio::test]
    async fn waiting_is_told_and_can_be_given_up() {
        let folder = tempfile::tempdir().unwrap();
        for uri in [folder.path().to_str().unwrap(), "memory://waiting_is_told"] {
            let told = Arc::new(Mutex::new(vec![]));
            let listener = told.clone();
            let on_wait = OnWait::new(move |text| listener.lock().unwrap().push(text.to_owned()));
            let location =
                Location::new(uri, &Hooks::default(), &StorageOptions::new()).unwrap().with_on_wait(Some(on_wait));
            let commit = committing(&location).await.unwrap();
            let index = indexing(&location).await.unwrap();
            let collect = collecting(&location, "gc", Duration::from_secs(5)).await.unwrap();
            assert_eq!(*told.lock().unwrap(), Vec::<String>::new());
            let given_up = async |lock: &mut (dyn Future<Output = Result<Guard>> + Unpin)| {
                assert!(tokio::time::timeout(UNTOLD + Duration::from_millis(200), lock).await.is_err());
            };
            given_up(&mut Box::pin(committing(&location))).await;
            given_up(&mut Box::pin(indexing(&location))).await;
            given_up(&mut Box::pin(importing(&location))).await;
            let said = told.lock().unwrap().clone();
            assert_eq!(said.len(), 3, "{said:?}");
            assert!(said[0].contains("commits") && said[1].contains("indices") && said[2].contains("gc"), "{said:?}");
            drop((commit, index, collect));
            // Whoever gave up holds nothing.
            drop((committing(&location).await.unwrap(), indexing(&location).await.unwrap()));
            let import = (importing(&location).await.unwrap(), importing(&location).await.unwrap());
            let busy = collecting(&location, "gc", Duration::from_millis(20)).await.unwrap_err();
            assert!(matches!(busy, Error::Busy { .. }), "{busy}");
            drop(import);
            collecting(&location, "gc", Duration::from_secs(5)).await.unwrap();
            assert_eq!(told.lock().unwrap().len(), 3);
        }
    }
}
