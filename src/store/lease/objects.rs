//! The objects that writers of a store on an object store meet at: the lease of whoever needs the store for itself, and a sign of life
//! of every writer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::TryStreamExt;
use lance_io::object_store::ObjectStore as LanceStore;
use object_store::path::Path;
use object_store::{Error as StoreError, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutResult, UpdateVersion};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Error, Result};

/// The object that holds the lease. It is never deleted, since its epoch must not begin anew.
pub const LEASE: &str = "layerstore.lease.json";

/// The folder of the writers' signs of life.
const WRITERS: &str = "layerstore.writers";

/// What the lease says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// How often something was removed, or may have been, that a writer who began before may count on.
    pub epoch: u64,
    /// Who has the store for itself, or waits for that.
    pub holder: Option<Holder>,
    /// Versions of the catalogue that are removed, or may still be by a holder who was taken for dead: nobody may name or restore one.
    #[serde(default)]
    pub condemned: BTreeSet<u64>,
    /// A name of what was written, unlike all others.
    nonce: String,
}

impl State {
    /// Gives it a name unlike all others: what is to be written has one of its own.
    pub fn name_anew(&mut self) {
        self.nonce = Uuid::new_v4().to_string();
    }

    /// Returns the name of what was written.
    pub fn nonce(&self) -> &str {
        &self.nonce
    }
}

/// Who holds the lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// A name unlike all others.
    pub id: String,
    /// What it does.
    pub what: String,
    /// Whether writers have ended, and it removes what nothing reaches.
    pub removes: bool,
}

/// The lease as it was read, and the version of its object, which a change of it is put over.
pub type Seen = Option<(State, UpdateVersion)>;

/// The objects of one store.
#[derive(Debug, Clone)]
pub struct Objects {
    files: Arc<LanceStore>,
    root: Path,
    uri: String,
}

impl Objects {
    /// Returns the objects of the store at `uri`, which is `root` of these files.
    pub fn new(files: Arc<LanceStore>, root: Path, uri: String) -> Self {
        Objects { files, root, uri }
    }

    /// Returns the store's address.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Reads the lease; `None` where nobody ever held it.
    ///
    /// # Errors
    /// When the storage refuses, or the object holds something else.
    pub async fn lease(&self) -> Result<Seen> {
        let read = async {
            let found = self.files.inner.get(&self.root.clone().join(LEASE)).await?;
            let version = UpdateVersion { e_tag: found.meta.e_tag.clone(), version: found.meta.version.clone() };
            Ok((found.bytes().await?, version))
        };
        let (bytes, version) = match read.await {
            Err(StoreError::NotFound { .. }) => return Ok(None),
            read => read.map_err(|e| self.refused("reading the lease", e))?,
        };
        let state = serde_json::from_slice(&bytes).map_err(|e| Error::Damaged {
            action: format!("reading the lease of {}", self.uri),
            message: format!("object {LEASE} holds no lease: {e}; while no writer is at work, it can be deleted"),
            source: None,
        })?;
        Ok(Some((state, version)))
    }

    /// Puts a lease in the place of the one that was read, and returns its version; `None` where another came first.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn put_lease(&self, state: &State, over: Option<&UpdateVersion>) -> Result<Option<UpdateVersion>> {
        let mode = over.map_or(PutMode::Create, |version| PutMode::Update(version.clone()));
        let options = PutOptions { mode, ..PutOptions::default() };
        let bytes = serde_json::to_vec(state).map_err(|e| Error::storage("writing the lease", e))?;
        let error = match self.files.inner.put_opts(&self.root.clone().join(LEASE), bytes.into(), options).await {
            Ok(PutResult { e_tag, version, .. }) => return Ok(Some(UpdateVersion { e_tag, version })),
            Err(StoreError::AlreadyExists { .. } | StoreError::Precondition { .. }) => return Ok(None),
            Err(e) => e,
        };
        // Whether it came about is not known: what is there tells.
        match self.lease().await? {
            Some((found, version)) if found.nonce == state.nonce => Ok(Some(version)),
            Some((_, version)) if over.is_none_or(|over| over.e_tag != version.e_tag) => Ok(None),
            _ => Err(self.refused("writing the lease", error)),
        }
    }

    /// Writes a writer's sign of life, a new one each time.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn sign(&self, writer: &str) -> Result<()> {
        let sign = format!("{{\"nonce\": \"{}\"}}", Uuid::new_v4());
        let put = self.files.inner.put(&self.writer(writer), sign.into_bytes().into()).await;
        put.map(drop).map_err(|e| self.refused("signing in as a writer", e))
    }

    /// Removes a writer's sign of life.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn sign_out(&self, writer: &str) -> Result<()> {
        match self.files.inner.delete(&self.writer(writer)).await {
            Ok(()) | Err(StoreError::NotFound { .. }) => Ok(()),
            Err(e) => Err(self.refused("signing out as a writer", e)),
        }
    }

    /// Returns the writers that have signed in, and what tells each one's last sign from those before.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn writers(&self) -> Result<BTreeMap<String, String>> {
        let listed = self.files.inner.list(Some(&self.root.clone().join(WRITERS)));
        // What else lies there is nobody's.
        let named = listed.try_filter_map(|meta| async move {
            let name = meta.location.filename().and_then(|name| name.strip_suffix(".json")).map(str::to_owned);
            Ok(name.map(|name| (name, format!("{:?} {}", meta.e_tag, meta.last_modified))))
        });
        named.try_collect().await.map_err(|e| self.refused("listing writers", e))
    }

    fn writer(&self, writer: &str) -> Path {
        self.root.clone().join(WRITERS).join(format!("{writer}.json"))
    }

    fn refused(&self, action: &str, e: StoreError) -> Error {
        Error::storage(format!("{action} of {}", self.uri), e)
    }
}
