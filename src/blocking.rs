//! The store without async: the same types, run on a runtime of its own.
//!
//! ```no_run
//! use layerstore::blocking::Store;
//! use layerstore::layer::Accuracy;
//! # fn main() -> layerstore::Result<()> {
//! let store = Store::open("./layers")?;
//! let layer = store.layer("my-model", "encoder.dense")?;
//! let y = store.run(layer.forward(ndarray::Array2::zeros((1, 384)).view(), Accuracy::Approximate))?.y;
//! # Ok(()) }
//! ```

use std::future::Future;
use std::sync::Arc;

use tokio::runtime::{Builder, Runtime};

use crate::error::{Error, Result};
use crate::layer::{Layer, SharedLayer};
use crate::nn::{AttentionBlock, Module};
use crate::store::{LayerHandle, Snapshot, SnapshotInfo, StoreOptions, VersionInfo};

/// A [`crate::store::Store`] for callers that are not async. Not for use inside a tokio runtime.
#[derive(Debug, Clone)]
pub struct Store {
    store: crate::store::Store,
    runtime: Arc<Runtime>,
}

impl Store {
    /// See [`crate::store::Store::open`].
    ///
    /// # Errors
    /// As there.
    pub fn open(uri: &str) -> Result<Self> {
        Self::with(crate::store::Store::open(uri))
    }

    /// See [`crate::store::Store::create`].
    ///
    /// # Errors
    /// As there.
    pub fn create(uri: &str) -> Result<Self> {
        Self::with(crate::store::Store::create(uri))
    }

    /// See [`crate::store::Store::open_with`].
    ///
    /// # Errors
    /// As there.
    pub fn open_with(uri: &str, options: StoreOptions) -> Result<Self> {
        Self::with(crate::store::Store::open_with(uri, options))
    }

    fn with(opening: impl Future<Output = Result<crate::store::Store>>) -> Result<Self> {
        let runtime = runtime()?;
        let store = runtime.block_on(opening)?;
        Ok(Store { store, runtime: Arc::new(runtime) })
    }

    /// The async store.
    pub fn inner(&self) -> &crate::store::Store {
        &self.store
    }

    /// Runs any of the async operations to its end: `store.run(compress::import(store.inner(), …))`.
    pub fn run<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// See [`crate::store::Store::latest`].
    ///
    /// # Errors
    /// As there.
    pub fn latest(&self) -> Result<Snapshot> {
        self.run(self.store.latest())
    }

    /// See [`crate::store::Store::at`].
    ///
    /// # Errors
    /// As there.
    pub fn at(&self, name: &str) -> Result<Snapshot> {
        self.run(self.store.at(name))
    }

    /// A layer of the latest version.
    ///
    /// # Errors
    /// As [`Snapshot::layer`].
    pub fn layer(&self, model: &str, layer: &str) -> Result<LayerHandle> {
        self.run(async { self.store.latest().await?.layer(model, layer).await })
    }

    /// See [`LayerHandle::load`].
    ///
    /// # Errors
    /// As there.
    pub fn load(&self, handle: &LayerHandle) -> Result<SharedLayer> {
        self.run(handle.load())
    }

    /// An attention block of the latest version, its projections included.
    ///
    /// # Errors
    /// As [`Snapshot::attention`] and [`AttentionHandle::load`](crate::store::AttentionHandle::load).
    pub fn attention(&self, model: &str, layer: &str) -> Result<AttentionBlock> {
        self.run(async { self.store.latest().await?.attention(model, layer).await?.load().await })
    }

    /// A module of the latest version, with all that it is made of.
    ///
    /// # Errors
    /// As [`Snapshot::module`] and [`ModuleHandle::load`](crate::store::ModuleHandle::load).
    pub fn module(&self, model: &str, name: &str) -> Result<Module> {
        self.run(async { self.store.latest().await?.module(model, name).await?.load().await })
    }

    /// See [`crate::store::Store::save_module`].
    ///
    /// # Errors
    /// As there.
    pub fn save_module(&self, model: &str, name: &str, module: &Module, message: Option<&str>) -> Result<u64> {
        self.run(self.store.save_module(model, name, module, message))
    }

    /// See [`crate::store::Store::create_snapshot`].
    ///
    /// # Errors
    /// As there.
    pub fn create_snapshot(&self, name: &str) -> Result<SnapshotInfo> {
        self.run(self.store.create_snapshot(name))
    }

    /// See [`crate::store::Store::restore`].
    ///
    /// # Errors
    /// As there.
    pub fn restore(&self, name: &str) -> Result<SnapshotInfo> {
        self.run(self.store.restore(name))
    }

    /// See [`crate::store::Store::log`].
    ///
    /// # Errors
    /// As there.
    pub fn log(&self) -> Result<Vec<VersionInfo>> {
        self.run(self.store.log())
    }
}

/// See [`crate::store::save_backend`].
///
/// # Errors
/// As there.
pub fn save_backend(layer: &dyn Layer, uri: &str) -> Result<()> {
    runtime()?.block_on(crate::store::save_backend(layer, uri))
}

/// See [`crate::store::load_backend`].
///
/// # Errors
/// As there.
pub fn load_backend(uri: &str) -> Result<SharedLayer> {
    runtime()?.block_on(crate::store::load_backend(uri))
}

fn runtime() -> Result<Runtime> {
    Builder::new_multi_thread().enable_all().build().map_err(|e| Error::io("the store's runtime", e))
}
