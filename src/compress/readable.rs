//! Models that can be read block by block: a checkpoint's, and a store's.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use tokio::runtime::Handle;

use crate::error::{Error, Result};
use crate::formats::{SourceContent, SourceLayer, TensorSource};
use crate::layer::parts::Tensor;
use crate::layer::{DenseLayer, Layer, SharedLayer};
use crate::store::Snapshot;

/// A model's layers and files, wherever they are. Its methods do blocking work.
pub(super) trait ReadableModel: Send + Sync {
    /// What messages call it.
    fn kind(&self) -> &'static str;

    /// Returns whether there is a layer of this name.
    fn has(&self, layer: &str) -> bool;

    /// Reads a layer.
    fn layer(&self, name: &str) -> Result<SharedLayer>;

    /// Reads a file that lies beside the layers; `None` where there is none of this name.
    fn file(&self, name: &str) -> Result<Option<Bytes>>;
}

/// A model of a checkpoint.
pub(super) struct CheckpointModel {
    layers: BTreeMap<String, SourceLayer>,
    source: Arc<dyn TensorSource>,
}

impl CheckpointModel {
    pub fn new(source: Arc<dyn TensorSource>) -> Self {
        let layers = source.layers().into_iter().map(|layer| (layer.name.clone(), layer)).collect();
        CheckpointModel { layers, source }
    }
}

impl ReadableModel for CheckpointModel {
    fn kind(&self) -> &'static str {
        "checkpoint"
    }

    fn has(&self, layer: &str) -> bool {
        self.layers.contains_key(layer)
    }

    fn layer(&self, name: &str) -> Result<SharedLayer> {
        let layer = self.layers.get(name).ok_or_else(|| not_there(self, name))?;
        match &layer.content {
            SourceContent::Ready { layer, .. } => layer.load(),
            SourceContent::Tensors { weight, bias } => {
                let bias = bias.as_ref().map(|bias| self.source.vector(bias)).transpose()?;
                if weight.shape.len() == 2 {
                    let weight = self.source.matrix(weight)?;
                    return Ok(DenseLayer::from_f32(weight.view(), bias.as_ref().map(|bias| bias.view())).shared());
                }
                let data = self.source.bytes(weight)?.into_owned().into();
                let bias = bias.map(|bias| Tensor::vector("bias", &bias.to_vec()));
                Ok(DenseLayer::new(weight.dtype, weight.shape.clone(), data, bias)?.shared())
            }
        }
    }

    fn file(&self, name: &str) -> Result<Option<Bytes>> {
        let files = self.source.side_files();
        let file = files.iter().find(|file| file.name == name);
        file.map(|file| file.read()).transpose()
    }
}

/// A model of a snapshot.
pub(super) struct StoredModel {
    snapshot: Snapshot,
    model: String,
    layers: HashSet<String>,
    files: HashSet<String>,
    runtime: Handle,
}

impl StoredModel {
    /// Lists the layers and files of a model.
    ///
    /// # Errors
    /// When there is no such model.
    pub async fn new(snapshot: &Snapshot, model: &str) -> Result<Self> {
        Ok(StoredModel {
            layers: snapshot.layers(model).await?.into_iter().map(|record| record.layer).collect(),
            files: snapshot.files(model).await?.into_iter().map(|file| file.name).collect(),
            snapshot: snapshot.clone(),
            model: model.to_owned(),
            runtime: Handle::current(),
        })
    }
}

impl ReadableModel for StoredModel {
    fn kind(&self) -> &'static str {
        "model"
    }

    fn has(&self, layer: &str) -> bool {
        self.layers.contains(layer)
    }

    fn layer(&self, name: &str) -> Result<SharedLayer> {
        if !self.has(name) {
            return Err(not_there(self, name));
        }
        self.runtime.block_on(async { self.snapshot.layer(&self.model, name).await?.load().await })
    }

    fn file(&self, name: &str) -> Result<Option<Bytes>> {
        match self.files.contains(name) {
            true => self.runtime.block_on(self.snapshot.file(&self.model, name)).map(Some),
            false => Ok(None),
        }
    }
}

/// The error for a layer that a model's configuration calls for.
pub(super) fn not_there(model: &dyn ReadableModel, name: &str) -> Error {
    Error::expected(format!("layer '{name}' of the {}", model.kind()), "none", "what its config.json calls for")
}
