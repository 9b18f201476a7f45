//! The leases of writers.

use std::sync::Arc;

use uuid::Uuid;

use super::exclusive::{Exclusive, fence_all};
use super::keeper::{keeper, on_keeper};
use super::objects::{Objects, Seen};
use super::renewed::{Renew, Renewed};
use super::watch::Watch;
use super::{LOOKS, SIGNS, Told, objects_of, read};
use crate::error::{Error, Result};
use crate::store::location::Location;

/// What the lease says that a writer does who takes it over from a dead holder.
const RECOVERING: &str = "taking the lease over";

/// A writer's lease, until it is dropped.
#[derive(Debug)]
pub struct Shared {
    epoch: u64,
    objects: Arc<Objects>,
    _renewed: Renewed,
}

/// Signs in as a writer, after whoever has the store for itself.
///
/// # Errors
/// When the storage refuses.
pub async fn shared(location: &Location) -> Result<Shared> {
    let objects = objects_of(location).await?;
    loop {
        let signing = {
            let objects = objects.clone();
            on_keeper(async move {
                // First the sign, then the look: whoever takes the store for itself does it the other way round, so one sees the other.
                let signed = Signed::begin(objects.clone()).await?;
                match objects.lease().await {
                    Err(e) => {
                        signed.end().await;
                        Err(e)
                    }
                    Ok(None) => Ok(Some((signed, 0))),
                    Ok(Some((state, _))) if state.holder.is_none() => Ok(Some((signed, state.epoch))),
                    Ok(Some(_)) => {
                        signed.end().await;
                        Ok(None)
                    }
                }
            })
            .await?
        };
        if let Some((signed, epoch)) = signing {
            let renewed = Renewed::begin(location.lease_life() / SIGNS, signed)?;
            return Ok(Shared { epoch, objects, _renewed: renewed });
        }
        if let dead @ Some(_) = free_or_dead(location, &objects).await? {
            recover(location, &objects, dead).await?;
        }
    }
}

/// Waits until nobody holds the lease, or its holder is dead: then returns what it says.
async fn free_or_dead(location: &Location, objects: &Arc<Objects>) -> Result<Seen> {
    let life = location.lease_life();
    let mut watch = Watch::new(life);
    let mut told = Told::new(location);
    loop {
        let seen = read(objects).await?;
        match &seen {
            Some((state, _)) if state.holder.is_some() => {
                let what = state.holder.as_ref().map_or("", |holder| &holder.what);
                told.once(|| format!("{what} is at work, or was killed within the last minute"));
                if watch.is_dead("holder", state.nonce()) {
                    return Ok(seen);
                }
            }
            _ => return Ok(None),
        }
        tokio::time::sleep(life / LOOKS).await;
    }
}

/// Takes the lease over from a dead holder, so that nothing that it may still do harms, and gives it up.
async fn recover(location: &Location, objects: &Arc<Objects>, dead: Seen) -> Result<()> {
    if let Some(mut taken) = Exclusive::take(objects, dead, RECOVERING, location.lease_life()).await? {
        fence_all(location, RECOVERING).await?;
        taken.fenced().await;
    }
    Ok(())
}

impl Shared {
    /// Asks whether nobody has taken this writer for dead. To be asked after the version was opened that a commit follows.
    ///
    /// # Errors
    /// [`Error::Busy`] when somebody has, and when the storage refuses.
    pub async fn confirm(&self) -> Result<()> {
        let epoch = read(&self.objects).await?.map_or(0, |(state, _)| state.epoch);
        if epoch == self.epoch {
            return Ok(());
        }
        Err(Error::Busy {
            what: self.objects.uri().to_owned(),
            holder: "this process gave no sign of life for long, and what it has written may have been collected"
                .into(),
        })
    }

    /// Asks whether a version is being removed, or may still be.
    ///
    /// # Errors
    /// When it is, and when the storage refuses.
    pub async fn require_kept(&self, version: u64) -> Result<()> {
        match read(&self.objects).await?.is_some_and(|(state, _)| state.condemned.contains(&version)) {
            true => Err(Error::expected(
                format!("version of {} to be named or restored", self.objects.uri()),
                version,
                "one that gc has not begun to remove",
            )),
            false => Ok(()),
        }
    }
}

/// A writer's sign of life, which is removed when this is dropped.
#[derive(Debug)]
struct Signed {
    id: String,
    objects: Arc<Objects>,
    ended: bool,
}

impl Signed {
    async fn begin(objects: Arc<Objects>) -> Result<Self> {
        // Made before the request, which may come about where its answer is not waited for.
        let signed = Signed { id: Uuid::new_v4().to_string(), objects, ended: false };
        signed.objects.sign(&signed.id).await?;
        Ok(signed)
    }
}

impl Renew for Signed {
    async fn renew(&mut self) -> bool {
        // What refuses now may give later: a commit asks whether it was long enough to be taken for dead.
        let _ = self.objects.sign(&self.id).await;
        true
    }

    async fn end(mut self) {
        // What is not removed is taken for dead later.
        let _ = self.objects.sign_out(&self.id).await;
        self.ended = true;
    }
}

impl Drop for Signed {
    fn drop(&mut self) {
        if let (false, Ok(keeper)) = (self.ended, keeper()) {
            let (id, objects) = (std::mem::take(&mut self.id), self.objects.clone());
            keeper.spawn(async move { objects.sign_out(&id).await });
        }
    }
}
