//! The lease of whoever has a store for itself.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use object_store::UpdateVersion;
use tokio::sync::Mutex;
use uuid::Uuid;

use super::keeper::on_keeper;
use super::objects::{Holder, Objects, Seen, State};
use super::renewed::{Renew, Renewed};
use super::watch::Watch;
use super::{LOOKS, SIGNS, Told, objects_of, read};
use crate::error::{Error, Result};
use crate::store::listing::table_folders;
use crate::store::location::Location;
use crate::store::schema::LAYERS;
use crate::store::unchanged::commit_unchanged;

/// The lease of whoever has a store for itself, until it is dropped.
#[derive(Debug)]
pub struct Exclusive {
    uri: String,
    held: Arc<Mutex<Held>>,
    _renewed: Renewed,
}

/// The lease as its holder has written it.
#[derive(Debug)]
struct Held {
    objects: Arc<Objects>,
    id: String,
    state: State,
    /// The version of its object; `None` where another has taken the lease over.
    version: Option<UpdateVersion>,
    /// Whether a holder was taken for dead who may still commit.
    is_fenced: bool,
}

/// Takes the store for itself, after writers that have signed in have ended. [`Exclusive::fence`] is to follow before anything is removed.
///
/// # Errors
/// [`Error::Busy`] when another holds the lease, or a writer goes on, longer than `patience`, and there was a sign of life of it; and
/// when the storage refuses.
pub async fn exclusive(location: &Location, what: &str, patience: Duration) -> Result<Exclusive> {
    let objects = objects_of(location).await?;
    let life = location.lease_life();
    let until = Instant::now() + patience;
    let busy = |holder: String| Error::Busy { what: location.uri().to_owned(), holder };
    let mut watch = Watch::new(life);
    let mut told = Told::new(location);
    let mut taken = loop {
        let seen = read(&objects).await?;
        let state = seen.as_ref().map(|(state, _)| state);
        if let Some((state, holder)) = state.and_then(|state| Some((state, state.holder.as_ref()?)))
            && !watch.is_dead("holder", state.nonce())
        {
            if Instant::now() > until && watch.has_moved("holder") {
                return Err(busy(format!("another process has it for itself ({})", holder.what)));
            }
            told.once(|| format!("{} is at work, or was killed within the last minute", holder.what));
            tokio::time::sleep(life / LOOKS).await;
            continue;
        }
        if let Some(taken) = Exclusive::take(&objects, seen, what, life).await? {
            break taken;
        }
    };
    if !taken.held.lock().await.is_fenced {
        fence_all(location, what).await?;
        taken.fenced().await;
    }
    let mut watch = Watch::new(life);
    loop {
        let alive = alive(&objects, &mut watch).await?;
        if alive.is_empty() {
            break;
        }
        if Instant::now() > until && alive.iter().any(|writer| watch.has_moved(writer)) {
            return Err(busy("an import is writing to it".into()));
        }
        told.once(|| "an import is at work, or was killed within the last minute".into());
        tokio::time::sleep(life / LOOKS).await;
    }
    taken
        .change(|state| {
            state.epoch = state.epoch.wrapping_add(1);
            state.holder.iter_mut().for_each(|holder| holder.removes = true);
        })
        .await?;
    Ok(taken)
}

/// Returns the writers that are alive, and removes the signs of those that are dead.
async fn alive(objects: &Arc<Objects>, watch: &mut Watch) -> Result<Vec<String>> {
    let signs = {
        let objects = objects.clone();
        on_keeper(async move { objects.writers().await }).await?
    };
    let mut alive = vec![];
    for (writer, sign) in signs {
        match watch.is_dead(&writer, &sign) {
            true => {
                let objects = objects.clone();
                on_keeper(async move { objects.sign_out(&writer).await }).await?;
            }
            false => alive.push(writer),
        }
    }
    Ok(alive)
}

/// Commits a version of every table that changes nothing: what a holder that was taken for dead may still commit is refused.
///
/// # Errors
/// When the storage refuses.
pub async fn fence_all(location: &Location, what: &str) -> Result<()> {
    for table in table_folders(location).await? {
        match commit_unchanged(location, &table, what).await {
            // Nobody opens it, and so nobody commits to it.
            Ok(()) | Err(Error::Damaged { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

impl Exclusive {
    /// Puts a name into the lease, in the place of that of nobody or of a dead holder; `None` where another came first.
    pub(super) async fn take(objects: &Arc<Objects>, seen: Seen, what: &str, life: Duration) -> Result<Option<Self>> {
        let (state, version) = seen.unzip();
        let mut state = state.unwrap_or_default();
        // Until all tables are fenced, whoever takes it over from here has to do that.
        let removes = state.holder.is_some_and(|holder| holder.removes);
        let id = Uuid::new_v4().to_string();
        state.holder = Some(Holder { id: id.clone(), what: what.to_owned(), removes });
        state.name_anew();
        let put = {
            let (objects, state) = (objects.clone(), state.clone());
            on_keeper(async move { objects.put_lease(&state, version.as_ref()).await }).await?
        };
        let Some(version) = put else { return Ok(None) };
        let held = Held { objects: objects.clone(), id, state, version: Some(version), is_fenced: !removes };
        let held = Arc::new(Mutex::new(held));
        let renewed = Renewed::begin(life / SIGNS, Renewing(held.clone()))?;
        Ok(Some(Exclusive { uri: objects.uri().to_owned(), held, _renewed: renewed }))
    }

    /// Notes that all tables were fenced since it was taken from a dead holder.
    pub(super) async fn fenced(&mut self) {
        self.held.lock().await.is_fenced = true;
    }

    /// Commits a version of the catalogue that changes nothing: no writer of an earlier epoch commits behind it.
    ///
    /// # Errors
    /// When the storage refuses, or the latest version cannot be read.
    pub async fn fence(&self, location: &Location) -> Result<()> {
        let what = self.held.lock().await.state.holder.as_ref().map(|holder| holder.what.clone());
        commit_unchanged(location, LAYERS, &what.unwrap_or_default()).await
    }

    /// Writes a change of the lease.
    async fn change(&mut self, change: impl FnOnce(&mut State)) -> Result<()> {
        let mut held = self.held.clone().lock_owned().await;
        change(&mut held.state);
        let kept = on_keeper(async move { held.write().await }).await?;
        if kept { Ok(()) } else { Err(self.lost()) }
    }

    /// Names versions of the catalogue that are going to be removed, beside those that an earlier holder named.
    ///
    /// # Errors
    /// [`Error::Busy`] when the lease was taken over, and when the storage refuses.
    pub async fn condemn(&mut self, versions: impl IntoIterator<Item = u64>) -> Result<()> {
        let versions: Vec<u64> = versions.into_iter().collect();
        self.change(|state| state.condemned.extend(versions)).await
    }

    /// Returns the versions of the catalogue that are to be removed.
    pub async fn condemned(&self) -> BTreeSet<u64> {
        self.held.lock().await.state.condemned.clone()
    }

    /// Notes that all such versions were removed.
    ///
    /// # Errors
    /// As [`Exclusive::condemn`].
    pub async fn removed(&mut self) -> Result<()> {
        self.change(|state| state.condemned.clear()).await
    }

    /// Asks whether the lease is still this one's. To be asked after a table was opened, and before a commit that follows its version.
    ///
    /// # Errors
    /// [`Error::Busy`] when another has taken it over, and when the storage refuses.
    pub async fn confirm(&self) -> Result<()> {
        let (objects, id) = {
            let held = self.held.lock().await;
            (held.objects.clone(), held.id.clone())
        };
        let holder = read(&objects).await?.and_then(|(state, _)| state.holder);
        if holder.is_some_and(|holder| holder.id == id) { Ok(()) } else { Err(self.lost()) }
    }

    fn lost(&self) -> Error {
        Error::Busy {
            what: self.uri.clone(),
            holder: "this process gave no sign of life for long, and another has taken its lease over".into(),
        }
    }
}

impl Held {
    /// Writes the lease, and returns whether it is still this one's.
    async fn write(&mut self) -> Result<bool> {
        self.state.name_anew();
        let Some(version) = &self.version else { return Ok(false) };
        self.version = self.objects.put_lease(&self.state, Some(version)).await?;
        Ok(self.version.is_some())
    }
}

/// The lease, as the thread has it that renews it.
struct Renewing(Arc<Mutex<Held>>);

impl Renew for Renewing {
    async fn renew(&mut self) -> bool {
        let mut held = self.0.lock().await;
        // What refuses now may give later.
        held.write().await.unwrap_or(true)
    }

    async fn end(self) {
        let mut held = self.0.lock().await;
        // Others are to take it over as that of a dead holder, and fence all tables.
        if held.is_fenced {
            held.state.holder = None;
            let _ = held.write().await;
        }
    }
}
