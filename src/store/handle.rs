//! A layer of a snapshot, opened when it is first used.

use std::sync::Arc;

use ndarray::ArrayView2;

use super::Store;
use super::record::LayerRecord;
use crate::error::Result;
use crate::layer::{Accuracy, Output, SharedLayer, configured};

/// A layer by name. Making one reads a row of the catalogue; the first use reads the layer's arrays.
#[derive(Debug, Clone)]
pub struct LayerHandle {
    store: Store,
    record: Arc<LayerRecord>,
}

impl LayerHandle {
    pub(super) fn new(store: Store, record: LayerRecord) -> Self {
        LayerHandle { store, record: Arc::new(record) }
    }

    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    pub(super) fn shared_record(&self) -> &Arc<LayerRecord> {
        &self.record
    }

    /// The catalogue's row.
    pub fn record(&self) -> &LayerRecord {
        &self.record
    }

    /// The layer in memory: from the store's cache, or read now. Handles of the same artifact share the arrays.
    ///
    /// # Errors
    /// When the artifact cannot be read.
    pub async fn load(&self) -> Result<SharedLayer> {
        let shared = self.store.load(&self.record).await?;
        configured(&shared, &self.record.config).map_err(|e| e.in_layer(&self.record.layer))
    }

    /// [`Layer::forward`](crate::layer::Layer::forward) on the loaded layer, on a thread for blocking work.
    ///
    /// # Errors
    /// As [`LayerHandle::load`] and [`Layer::forward`](crate::layer::Layer::forward).
    pub async fn forward(&self, x: ArrayView2<'_, f32>, accuracy: Accuracy) -> Result<Output> {
        let layer = self.load().await?;
        let x = x.to_owned();
        let done = tokio::task::spawn_blocking(move || layer.forward(x.view(), accuracy)).await;
        super::joined(done)?.map_err(|e| e.in_layer(&self.record.layer))
    }
}
