//! Where a store lies, and how Lance is asked to read and write there.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lance::Dataset;
use lance::dataset::builder::DatasetBuilder;
use lance::dataset::{WriteMode, WriteParams};
use lance::session::Session;
use lance_io::object_store::{ObjectStoreParams, ObjectStoreRegistry, WrappingObjectStore};
use object_store::ObjectStore;
use object_store::list::PaginatedListStore;
use object_store::local::LocalFileSystem;

use crate::error::{Error, Result};

/// Lance's own caches default to 7 GiB; a store that serves layers keeps its memory for layers.
const INDEX_CACHE_BYTES: usize = 16 << 20;
const METADATA_CACHE_BYTES: usize = 64 << 20;

/// A store's address and the settings that every table of it shares.
#[derive(Clone)]
pub struct Location {
    uri: String,
    /// The directory, for a store on the local file system.
    local: Option<PathBuf>,
    session: Arc<Session>,
    storage: Option<Arc<dyn WrappingObjectStore>>,
}

impl std::fmt::Debug for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Location").field("uri", &self.uri).finish_non_exhaustive()
    }
}

impl Location {
    /// A local path or an object-store URI. `storage` replaces the file system that writes go to.
    pub fn new(uri: &str, storage: Option<Arc<dyn WrappingObjectStore>>) -> Result<Self> {
        let session =
            Arc::new(Session::new(INDEX_CACHE_BYTES, METADATA_CACHE_BYTES, Arc::new(ObjectStoreRegistry::default())));
        if let Some((scheme, rest)) = uri.split_once("://")
            && scheme != "file"
        {
            if !matches!(scheme, "s3" | "gs" | "az" | "abfss" | "memory") || rest.is_empty() {
                return Err(Error::NotAStore {
                    path: uri.into(),
                    reason: format!(
                        "'{scheme}://' is no storage that a store can lie on: use a path, s3://, gs:// or az://"
                    ),
                });
            }
            return Ok(Location { uri: uri.trim_end_matches('/').to_owned(), local: None, session, storage });
        }
        let path = Path::new(uri.strip_prefix("file://").unwrap_or(uri));
        if path.as_os_str().is_empty() {
            return Err(Error::NotAStore { path: uri.into(), reason: "the path is empty".into() });
        }
        // Lance takes a relative name that starts with 'db' for a cloud address.
        let absolute = std::path::absolute(path).map_err(|e| Error::io(path, e))?;
        if absolute.exists() && !absolute.is_dir() {
            return Err(Error::NotAStore {
                path: absolute.display().to_string(),
                reason: "it is a file; a store is a directory".into(),
            });
        }
        let text = absolute.to_str().ok_or_else(|| Error::NotAStore {
            path: absolute.display().to_string(),
            reason: "the path is not UTF-8".into(),
        })?;
        let uri = text.to_owned();
        // One wrapper for the location: Lance shares connections by the wrapper's identity.
        let storage = storage.unwrap_or_else(|| Arc::new(Durable::new()));
        Ok(Location { uri, local: Some(absolute), session, storage: Some(storage) })
    }

    pub fn uri(&self) -> &str {
        &self.uri
    }

    pub fn local(&self) -> Option<&Path> {
        self.local.as_deref()
    }

    pub fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// The address that a table is read by.
    pub fn table_uri(&self, table: &str) -> String {
        format!("{}/{table}.lance", self.uri)
    }

    /// The address that a table is written by: for local stores one that sends every byte through [`Durable`].
    fn write_uri(&self, table: &str) -> String {
        match &self.local {
            // Lance's own writer for plain paths passes the wrapper by, and does not sync.
            Some(path) => {
                let table = path.join(format!("{table}.lance"));
                // As a URL, since a path may hold '#', '?' or '%'. An absolute path always makes one.
                let url = url::Url::from_file_path(&table)
                    .map_or_else(|()| table.display().to_string(), |u| u.path().to_owned());
                format!("file-object-store://{url}")
            }
            None => self.table_uri(table),
        }
    }

    fn store_params(&self) -> ObjectStoreParams {
        ObjectStoreParams { object_store_wrapper: self.storage.clone(), ..ObjectStoreParams::default() }
    }

    /// Opens a table for reading, at `version` or the latest.
    pub async fn open_table(&self, table: &str, version: Option<u64>) -> lance::Result<Dataset> {
        let mut builder = DatasetBuilder::from_uri(self.table_uri(table)).with_session(self.session.clone());
        if let Some(version) = version {
            builder = builder.with_version(version);
        }
        builder.load().await
    }

    /// Opens a table's latest version for writing: what is written through it is on disk before it is referred to.
    pub async fn open_for_write(&self, table: &str) -> lance::Result<Dataset> {
        DatasetBuilder::from_uri(self.write_uri(table))
            .with_session(self.session.clone())
            .with_store_params(self.store_params())
            .load()
            .await
    }

    /// The parameters to create a table with, and its address.
    pub fn create_params(&self, table: &str) -> (String, WriteParams) {
        let params = WriteParams {
            mode: WriteMode::Create,
            session: Some(self.session.clone()),
            store_params: Some(self.store_params()),
            ..WriteParams::default()
        };
        (self.write_uri(table), params)
    }
}

/// A local file system that syncs every file, and its directory, before a write returns. Lance and object_store leave
/// that out by default, and a power cut could then lose what a commit refers to.
#[derive(Debug)]
pub struct Durable {
    files: Arc<LocalFileSystem>,
}

impl Durable {
    pub fn new() -> Self {
        Durable { files: Arc::new(LocalFileSystem::new().with_fsync(true)) }
    }
}

impl WrappingObjectStore for Durable {
    fn wrap(&self, _prefix: &str, _original: Arc<dyn ObjectStore>) -> Arc<dyn ObjectStore> {
        self.files.clone()
    }

    fn wrap_paginated(
        &self,
        _prefix: &str,
        _original: Arc<dyn PaginatedListStore>,
    ) -> Option<Arc<dyn PaginatedListStore>> {
        None
    }
}

/// Lance's errors as ours: what was being done, and the storage's own reason.
pub fn storage_error(action: impl Into<String>) -> impl FnOnce(lance::Error) -> Error {
    let action = action.into();
    move |e| Error::Storage { action, message: readable(&e) }
}

/// Lance appends where in its own source an error arose; nobody who runs a store can use that.
pub fn readable(e: &lance::Error) -> String {
    let text = e.to_string();
    let first = text.split(", /").next().unwrap_or(&text);
    first.split(", object-store-").next().unwrap_or(first).to_owned()
}
