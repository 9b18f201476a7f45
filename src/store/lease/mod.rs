//! Leases of stores on object stores, which have no locks: one for itself for whoever removes files, and as many as there are writers.
//!
//! A writer signs in with an object of its own, and renews it. Whoever needs the store for itself puts its name into the lease, by a put
//! that only one can make; writers that come later wait, and it waits for those that have signed in. Then it raises the lease's epoch,
//! commits a version of the catalogue that changes nothing, and removes what nothing reaches.
//!
//! A process that sleeps gives no sign of life, and is taken for dead after a time, measured by whoever waits: no two clocks are
//! compared. When it wakes, nothing that it does may harm what came to be meanwhile:
//!
//! - A writer reads the lease after it opened the version that its commit follows. Was the epoch raised before, then it commits nothing.
//!   Was it raised after, then either its commit comes before the version that changes nothing, and is seen, or after it, and is refused:
//!   each commit is of the next version and of no other.
//! - A holder of the lease opens a table, then reads the lease, then commits the next version of the table. Whoever takes the lease over
//!   commits a version of every table that changes nothing: rows that the late holder removes go before it, and that is seen, or it is
//!   refused. Rows that it writes anew in other files stay what they are.
//! - Versions that a late holder may still remove are named in the lease before it begins. Nobody names or restores one, and the next
//!   holder removes them.
//! - Files that it may still remove belong to versions of tables that were removed, or to no version for a week.

mod exclusive;
mod keeper;
mod objects;
mod renewed;
mod shared;
mod watch;

use std::sync::Arc;

pub use self::exclusive::{Exclusive, exclusive};
use self::keeper::on_keeper;
pub use self::objects::LEASE;
use self::objects::{Objects, Seen};
pub use self::shared::{Shared, shared};
use super::location::Location;
use super::on_wait::OnWait;
use super::place::Place;
use super::waiting::storage_error;
use crate::error::Result;

/// Signs of life in the time after which whoever gives none is taken for dead.
const SIGNS: u32 = 4;

/// Looks at others in that time.
const LOOKS: u32 = 120;

/// Whoever is told, once, what is waited for.
struct Told<'a> {
    location: &'a Location,
    done: bool,
}

impl<'a> Told<'a> {
    fn new(location: &'a Location) -> Self {
        Told { location, done: false }
    }

    fn once(&mut self, holder: impl FnOnce() -> String) {
        if !self.done {
            self.done = true;
            OnWait::tell(self.location.on_wait(), &format!("waiting for {}: {}", self.location.uri(), holder()));
        }
    }
}

/// Returns the objects of a store, which are reached by connections of their own: those of the thread that renews leases.
async fn objects_of(location: &Location) -> Result<Arc<Objects>> {
    let own = location.own_files().await;
    let (files, root) = own.map_err(storage_error(format!("opening {}", location.uri())))?;
    Ok(Arc::new(Objects::new(files, root, location.uri().to_owned())))
}

/// Looks whether the lease of a store can be read. Stores that have locks have none.
///
/// # Errors
/// When the storage refuses, and [`Error::Damaged`](crate::Error::Damaged) when the object holds something else.
pub async fn look(location: &Location) -> Result<()> {
    match location.place() {
        Place::Local(_) | Place::Memory(_) => Ok(()),
        Place::Remote => read(&objects_of(location).await?).await.map(drop),
    }
}

/// Reads the lease.
async fn read(objects: &Arc<Objects>) -> Result<Seen> {
    let objects = objects.clone();
    on_keeper(async move { objects.lease().await }).await
}
