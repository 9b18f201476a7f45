//! What a store, its snapshots and its handles share.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use lance::Dataset;
use moka::future::Cache;

use super::catalogue::Catalogue;
use super::data::Data;
use super::disk_cache::DiskCache;
use super::location::Location;
use super::reader::Reader;
use super::record::LayerRecord;
use crate::error::{Error, Result};
use crate::layer::{ArtifactId, SharedLayer, layer_from_parts};
use crate::tasks::unwrap_join;

/// An open store: where it lies, its data files, and the layers that are loaded.
#[derive(Debug)]
pub struct Shared {
    /// Where it lies.
    pub location: Location,
    /// Its artifacts, for reading.
    pub data: Arc<Data>,
    layers: Cache<ArtifactId, SharedLayer>,
    /// Whether all that is loaded is held against its name.
    verify_loads: bool,
    /// The latest version as it was last seen.
    catalogue: Mutex<Catalogue>,
}

impl Shared {
    /// Returns a store that was opened at this version of its catalogue. Of what is read of files that are not on the local file system,
    /// the disk keeps copies where a `disk_cache` is given.
    pub fn new(
        location: Location,
        catalogue: Dataset,
        (cache_bytes, reader, verify_loads): (u64, Reader, bool),
        disk_cache: Option<DiskCache>,
    ) -> Self {
        // moka weighs in 32 bits: count KiB.
        let layers = Cache::builder()
            .max_capacity(cache_bytes >> 10)
            .weigher(|_, layer: &SharedLayer| u32::try_from(1 + (layer.memory_bytes() >> 10)).unwrap_or(u32::MAX))
            .build();
        let data = Arc::new(Data::new(location.clone(), reader, disk_cache));
        Shared { location, data, layers, verify_loads, catalogue: Mutex::new(catalogue.into()) }
    }

    /// Returns the catalogue as it was last seen.
    pub fn catalogue(&self) -> Catalogue {
        self.catalogue.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the latest version of the catalogue, and remembers it.
    ///
    /// # Errors
    /// As [`Catalogue::latest`].
    pub async fn latest(&self) -> Result<Catalogue> {
        let latest = self.catalogue().latest(&self.location).await?;
        *self.catalogue.lock().unwrap_or_else(PoisonError::into_inner) = latest.clone();
        Ok(latest)
    }

    /// Returns an artifact's layer, from the cache or read now; concurrent callers wait for one read.
    ///
    /// # Errors
    /// When the artifact cannot be read, or its parts make no layer; and, where loads are verified, are not what its name stands for.
    pub async fn load(&self, record: &Arc<LayerRecord>) -> Result<SharedLayer> {
        let id = record.artifact;
        let built = move |parts| {
            layer_from_parts(parts).map_err(|e| match e {
                unknown @ Error::UnknownMethod { .. } => unknown,
                other => Error::Corrupt { artifact: id.to_string(), reason: other.to_string() },
            })
        };
        let read = async {
            if self.verify_loads {
                let parts = self.data.verified_layer(record).await?;
                return unwrap_join(tokio::task::spawn_blocking(move || built(parts)).await)?;
            }
            let (data, wanted) = (self.data.clone(), record.clone());
            // One task reads and builds it, where its files are at hand.
            let local = tokio::task::spawn_blocking(move || data.local_parts(&wanted).map(built)).await;
            if let Some(layer) = unwrap_join(local)? {
                return layer;
            }
            let parts = self.data.layer_parts(record).await?;
            unwrap_join(tokio::task::spawn_blocking(move || built(parts)).await)?
        };
        self.layers.try_get_with(id, read).await.map_err(Error::Shared)
    }

    /// Drops layers of artifacts that were made of rows which have been replaced.
    pub async fn forget(&self, artifacts: &BTreeSet<ArtifactId>) {
        for artifact in artifacts {
            self.layers.invalidate(artifact).await;
        }
    }

    /// Returns the bytes of loaded layers held now.
    pub async fn cached_bytes(&self) -> u64 {
        self.layers.run_pending_tasks().await;
        self.layers.weighted_size() << 10
    }
}
