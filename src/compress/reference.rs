//! What compressed layers stand for: the weights of a checkpoint, or dense layers of the same tensors in the store.

use std::collections::HashMap;
use std::sync::Arc;

use ndarray::{Array1, Array2};

use crate::error::{Error, Result, closest, known_list};
use crate::formats::{TensorInfo, TensorSource};
use crate::layer::{ExactSource, SharedLayer};
use crate::store::{LayerHandle, LayerRecord, Snapshot};
use crate::tasks::unwrap_join;

/// Where weights to compare with come from.
#[derive(Debug, Clone)]
pub(super) enum Reference {
    /// By the tensor that a layer came from, else by its name.
    Checkpoint(Arc<dyn TensorSource>),
    /// Dense layers of a snapshot, by the hash of the tensor that their weight came from.
    Stored(Snapshot, Arc<HashMap<String, LayerRecord>>),
}

impl Reference {
    /// Returns the weights of `checkpoint`, else of the snapshot's dense layers.
    pub async fn new(snapshot: &Snapshot, checkpoint: Option<Arc<dyn TensorSource>>) -> Result<Self> {
        if let Some(checkpoint) = checkpoint {
            return Ok(Reference::Checkpoint(checkpoint));
        }
        let dense = dense_layers(snapshot).await?.into_iter();
        let dense = dense.filter_map(|r| Some((r.source.tensors.first()?.hash.clone(), r))).collect();
        Ok(Reference::Stored(snapshot.clone(), Arc::new(dense)))
    }

    /// Refuses a layer whose weight is not there or cannot be used. It reads that of a checkpoint.
    pub fn check(&self, record: &LayerRecord) -> Result<()> {
        match self {
            Reference::Checkpoint(checkpoint) => weight_of(&**checkpoint, record).map(drop),
            Reference::Stored(_, dense) => stored(dense, record).map(drop),
        }
    }

    /// Refuses a layer whose bias is not there, where it had one, or cannot be used.
    pub fn check_bias(&self, record: &LayerRecord) -> Result<()> {
        match self {
            Reference::Checkpoint(checkpoint) => bias_of(&**checkpoint, record).map(drop),
            Reference::Stored(..) => Ok(()),
        }
    }

    /// Reads the weight that a layer stands for, `[out_features, in_features]`.
    pub async fn weight(&self, record: &LayerRecord) -> Result<Array2<f32>> {
        match self {
            Reference::Checkpoint(checkpoint) => {
                let (checkpoint, record) = (checkpoint.clone(), record.clone());
                unwrap_join(tokio::task::spawn_blocking(move || weight_of(&*checkpoint, &record)).await)?
            }
            Reference::Stored(snapshot, dense) => {
                snapshot.handle(stored(dense, record)?.clone()).load().await?.weight()
            }
        }
    }

    /// Reads the bias that goes with the weight, `[out_features]`; `None` where there is none.
    pub async fn bias(&self, record: &LayerRecord) -> Result<Option<Array1<f32>>> {
        match self {
            Reference::Checkpoint(checkpoint) => {
                let (checkpoint, record) = (checkpoint.clone(), record.clone());
                unwrap_join(tokio::task::spawn_blocking(move || bias_of(&*checkpoint, &record)).await)?
            }
            // Layers of the same weight may have biases of their own. Every method stores them as they are.
            Reference::Stored(snapshot, _) => snapshot.handle(record.clone()).load().await?.stored_bias(),
        }
    }
}

fn weight_of(checkpoint: &dyn TensorSource, record: &LayerRecord) -> Result<Array2<f32>> {
    let source = record.source.tensors.first().map(|t| t.tensor.as_str());
    let shape = [record.out_features as usize, record.in_features as usize];
    checkpoint.matrix(entry(checkpoint, record, ("weight", source), &shape)?)
}

fn bias_of(checkpoint: &dyn TensorSource, record: &LayerRecord) -> Result<Option<Array1<f32>>> {
    let shape = [record.out_features as usize];
    let Some(source) = record.source.tensors.get(1).filter(|t| t.shape == shape) else { return Ok(None) };
    checkpoint.vector(entry(checkpoint, record, ("bias", Some(&source.tensor)), &shape)?).map(Some)
}

/// A layer's weight or bias in a checkpoint: by the tensor that it came from, else by the layer's name.
fn entry<'a>(
    checkpoint: &'a dyn TensorSource,
    record: &LayerRecord,
    (part, source): (&str, Option<&str>),
    shape: &[usize],
) -> Result<&'a TensorInfo> {
    let named = format!("{}.{part}", record.layer);
    let entry = source.and_then(|name| checkpoint.tensor(name)).or_else(|| checkpoint.tensor(&named));
    let entry = entry.ok_or_else(|| {
        let near = closest(&named, checkpoint.tensors().keys().map(String::as_str), 3);
        Error::expected(
            format!("{part} of layer '{}'", record.layer),
            format!("no such tensor in {}", checkpoint.path().display()),
            format!("'{named}'; {}", known_list("closest names", &near)),
        )
    })?;
    match entry.shape == shape {
        true => Ok(entry),
        false => Err(Error::expected(
            format!("shape of tensor '{}' in {}", entry.name, checkpoint.path().display()),
            format!("{:?}", entry.shape),
            format!("{shape:?}, the layer's"),
        )),
    }
}

fn stored<'a>(dense: &'a HashMap<String, LayerRecord>, record: &LayerRecord) -> Result<&'a LayerRecord> {
    let found = record.source.tensors.first().and_then(|t| dense.get(&t.hash));
    found.ok_or_else(|| {
        Error::expected(
            format!("dense weights of layer '{}'", record.layer),
            "none in the store",
            "a model of the same checkpoint with that layer dense, or --checkpoint",
        )
    })
}

async fn dense_layers(snapshot: &Snapshot) -> Result<Vec<LayerRecord>> {
    Ok(snapshot.records().await?.into_iter().filter(|r| r.method == "dense").collect())
}

/// Returns the layer to run for an exact answer: itself where everything it needs is stored in it, else the dense layer
/// of the same tensors; see [`ExactSource`].
///
/// # Errors
/// When the store holds no dense weights for a quantised layer.
pub async fn exact_layer(snapshot: &Snapshot, handle: &LayerHandle) -> Result<SharedLayer> {
    let layer = handle.load().await?;
    let source = layer.exact_source();
    if source == ExactSource::Layer {
        return Ok(layer);
    }
    // The bias has to be the same too: a tied weight may be another layer's, without one.
    let hashes = |r: &LayerRecord| r.source.tensors.iter().map(|t| t.hash.clone()).collect::<Vec<_>>();
    let wanted = hashes(handle.record());
    let found = dense_layers(snapshot).await?.into_iter().find(|r| !wanted.is_empty() && hashes(r) == wanted);
    match found {
        Some(record) => snapshot.handle(record).load().await,
        None if source == ExactSource::DenseOrLayer => Ok(layer),
        None => Err(Error::expected(
            format!("dense weights of layer '{}'", handle.record().layer),
            "none in the store",
            "a model of the same checkpoint with that layer dense; a quantised layer alone cannot answer exactly",
        )),
    }
}
