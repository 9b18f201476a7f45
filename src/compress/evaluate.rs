//! A model's layers against the dense weights they stand for.

use std::collections::HashMap;
use std::sync::Arc;

use ndarray::{Array2, ArrayView2};
use serde::Serialize;

use super::calibration::ActivationsFile;
use super::measure::measure;
use super::plan::bits_per_weight;
use super::unapplied::such_as;
use crate::error::{Error, Result, closest, known_list};
use crate::formats::TensorSource;
use crate::layer::{CorrectionReport, ExactSource, MethodName, SearchReport, SharedLayer};
use crate::store::{ErrorBasis, LayerHandle, LayerRecord, Snapshot};
use crate::tasks::unwrap_join;

/// One layer's error.
#[derive(Debug, Clone, Serialize)]
pub struct LayerEvaluation {
    /// The layer's name.
    pub layer: String,
    /// The method that it is compressed by.
    pub method: MethodName,
    /// ‖ŷ − y‖ / ‖y‖ over the inputs; `None`, `null` in JSON, where y is zero.
    pub relative_error: Option<f64>,
    /// What the error is measured on.
    pub error_basis: ErrorBasis,
    /// Rows of input that the layer ran on.
    pub tokens: usize,
    /// Bytes in the checkpoint, bias included.
    pub dense_bytes: u64,
    /// Bytes of the artifact's arrays.
    pub stored_bytes: u64,
    /// Stored bits for each weight, the bias and everything else counted.
    pub bits_per_weight: f64,
    /// What the layer's correction gains; empty for methods without one.
    #[serde(flatten)]
    pub correction: CorrectionReport,
    /// What its search finds; empty for methods that search no keys.
    #[serde(flatten)]
    pub search: SearchReport,
}

/// A model's errors.
#[derive(Debug, Clone, Serialize)]
pub struct Evaluation {
    /// The model.
    pub model: String,
    /// The layers, by name.
    pub layers: Vec<LayerEvaluation>,
    /// The mean of the errors above.
    pub mean_relative_error: Option<f64>,
    /// Inputs that no layer of the model is named after.
    pub unmatched_activations: Vec<String>,
}

/// Runs every layer of `model` that has inputs in `activations`, and compares with the weights of `checkpoint`, or with
/// the dense weights of the same tensor in the store.
///
/// # Errors
/// When there is no such model, inputs do not fit, no inputs are for it, or there is nothing to compare with.
pub async fn evaluate(
    snapshot: &Snapshot,
    model: &str,
    activations: ActivationsFile,
    checkpoint: Option<Arc<dyn TensorSource>>,
) -> Result<Evaluation> {
    let records = snapshot.layers(model).await?;
    let (present, unmatched): (Vec<&str>, Vec<&str>) =
        activations.layers().partition(|name| records.iter().any(|r| r.layer == *name));
    if present.is_empty() {
        let wanted = unmatched.first().copied().unwrap_or_default();
        let near = closest(wanted, records.iter().map(|r| r.layer.as_str()), 1);
        return Err(Error::expected(
            "activations",
            format!("inputs for {}", if unmatched.is_empty() { "no layer".to_owned() } else { such_as(&unmatched) }),
            format!("inputs for layers of model '{model}', such as '{}'", near.concat()),
        ));
    }
    let dense = if checkpoint.is_none() { dense_by_source(snapshot).await? } else { HashMap::new() };
    let unmatched_activations = unmatched.into_iter().map(str::to_owned).collect();
    let mut layers = Vec::new();
    for record in records {
        // Inputs named after a norm or an embedding's table are for no product with a matrix.
        if record.source.tensors.first().is_none_or(|t| t.shape.len() != 2) {
            continue;
        }
        let Some(inputs) = activations.get(&record.layer, record.in_features as usize)? else { continue };
        let weight = match &checkpoint {
            Some(checkpoint) => reference(&**checkpoint, &record)?,
            None => stored_reference(snapshot, &dense, &record).await?,
        };
        let handle = snapshot.handle(record.clone());
        let layer = handle.load().await?;
        let measured =
            tokio::task::spawn_blocking(move || evaluate_layer(&record, &layer, weight.view(), inputs.view())).await;
        layers.push(unwrap_join(measured)?.map_err(|e| e.in_layer(&handle.record().layer))?);
    }
    let errors: Vec<f64> = layers.iter().filter_map(|l| l.relative_error).collect();
    let mean_relative_error = (!errors.is_empty()).then(|| errors.iter().sum::<f64>() / errors.len() as f64);
    Ok(Evaluation { model: model.to_owned(), layers, mean_relative_error, unmatched_activations })
}

fn evaluate_layer(
    record: &LayerRecord,
    layer: &SharedLayer,
    weight: ArrayView2<f32>,
    inputs: ArrayView2<f32>,
) -> Result<LayerEvaluation> {
    let (error, error_basis) = measure(&**layer, weight, Some(inputs))?;
    Ok(LayerEvaluation {
        bits_per_weight: bits_per_weight(record.stored_bytes, record.out_features, record.in_features),
        correction: layer.correction_report(weight, Some(inputs)),
        search: layer.search_report(inputs)?,
        layer: record.layer.clone(),
        method: record.method.clone(),
        relative_error: Some(error).filter(|e| e.is_finite()),
        error_basis,
        tokens: inputs.nrows(),
        dense_bytes: record.dense_bytes,
        stored_bytes: record.stored_bytes,
    })
}

/// A layer's weight in a checkpoint: by the tensor it came from, else by its name.
fn reference(checkpoint: &dyn TensorSource, record: &LayerRecord) -> Result<Array2<f32>> {
    let source = record.source.tensors.first().map(|t| t.tensor.as_str());
    let named = format!("{}.weight", record.layer);
    let entry = source.and_then(|name| checkpoint.tensor(name)).or_else(|| checkpoint.tensor(&named));
    let entry = entry.ok_or_else(|| {
        let near = closest(&named, checkpoint.tensors().keys().map(String::as_str), 3);
        Error::expected(
            format!("weights of layer '{}'", record.layer),
            format!("no such tensor in {}", checkpoint.path().display()),
            format!("'{named}'; {}", known_list("closest names", &near)),
        )
    })?;
    let weight = checkpoint.matrix(entry)?;
    if weight.dim() != (record.out_features as usize, record.in_features as usize) {
        return Err(Error::expected(
            format!("shape of tensor '{}' in {}", entry.name, checkpoint.path().display()),
            format!("{:?}", weight.dim()),
            format!("({}, {}), the layer's", record.out_features, record.in_features),
        ));
    }
    Ok(weight)
}

/// Dense layers of a snapshot, by the hash of the tensor that their weight came from.
async fn dense_by_source(snapshot: &Snapshot) -> Result<HashMap<String, LayerRecord>> {
    Ok(dense_layers(snapshot)
        .await?
        .into_iter()
        .filter_map(|r| Some((r.source.tensors.first()?.hash.clone(), r)))
        .collect())
}

async fn dense_layers(snapshot: &Snapshot) -> Result<Vec<LayerRecord>> {
    Ok(snapshot.records().await?.into_iter().filter(|r| r.method == "dense").collect())
}

async fn stored_reference(
    snapshot: &Snapshot,
    dense: &HashMap<String, LayerRecord>,
    record: &LayerRecord,
) -> Result<Array2<f32>> {
    let found = record.source.tensors.first().and_then(|t| dense.get(&t.hash));
    let Some(found) = found else {
        return Err(Error::expected(
            format!("dense weights of layer '{}'", record.layer),
            "none in the store",
            "a model of the same checkpoint with that layer dense, or --checkpoint",
        ));
    };
    snapshot.handle(found.clone()).load().await?.weight()
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
