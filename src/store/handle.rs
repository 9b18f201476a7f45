//! A layer of a snapshot, loaded when it is first used.

use std::sync::Arc;

use layerstore_core::layer::configured;
use ndarray::ArrayView2;

use super::record::LayerRecord;
use super::shared::Shared;
use crate::error::Result;
use crate::layer::{Accuracy, Output, SharedLayer};
use crate::tasks::unwrap_join;

/// A layer by name. Making one reads a row of the catalogue; the first use reads the layer's arrays.
#[derive(Debug, Clone)]
pub struct LayerHandle {
    shared: Arc<Shared>,
    record: Arc<LayerRecord>,
}

impl LayerHandle {
    /// Returns the handle of a row of the catalogue.
    pub(super) fn new(shared: Arc<Shared>, record: LayerRecord) -> Self {
        LayerHandle { shared, record: Arc::new(record) }
    }

    /// Returns what the handle shares with its store.
    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Returns the layer's row of the catalogue, to be kept.
    pub(super) fn shared_record(&self) -> &Arc<LayerRecord> {
        &self.record
    }

    /// Returns the layer's row of the catalogue.
    pub fn record(&self) -> &LayerRecord {
        &self.record
    }

    /// Returns the layer in memory: from the store's cache, or read now. Handles of the same artifact share the arrays.
    ///
    /// # Errors
    /// When the artifact cannot be read.
    pub async fn load(&self) -> Result<SharedLayer> {
        let shared = self.shared.load(&self.record).await?;
        configured(&shared, &self.record.config).map_err(|e| e.in_layer(&self.record.layer))
    }

    /// Runs the layer, loaded where it is not yet, on a thread for blocking work: [`Layer::forward`](crate::layer::Layer::forward).
    ///
    /// # Errors
    /// As [`LayerHandle::load`] and [`Layer::forward`](crate::layer::Layer::forward).
    pub async fn forward(&self, x: ArrayView2<'_, f32>, accuracy: Accuracy) -> Result<Output> {
        let layer = self.load().await?;
        let x = x.to_owned();
        let done = tokio::task::spawn_blocking(move || layer.forward(x.view(), accuracy)).await;
        unwrap_join(done)?.map_err(|e| e.in_layer(&self.record.layer))
    }
}
