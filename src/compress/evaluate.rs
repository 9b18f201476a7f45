//! A model's layers against the dense weights they stand for.

use std::sync::Arc;

use ndarray::{Array2, ArrayView2};
use serde::Serialize;

use super::arranged::seen_again;
use super::calibration::ActivationsFile;
use super::measurable::{Measurable, UnmeasuredLayer, measurable};
use super::measure::{measure, measure_attention, projected};
use super::reference::Reference;
use super::unapplied::such_as;
use crate::error::{Error, Result, closest};
use crate::formats::TensorSource;
use crate::layer::{CorrectionReport, MethodName, SearchReport, SharedLayer, VqAttentionLayer};
use crate::store::{ErrorBasis, LayerRecord, Snapshot};
use crate::tasks::unwrap_join;

/// One layer's error.
#[derive(Debug, Clone, Serialize)]
pub struct LayerEvaluation {
    /// The layer's name.
    pub layer: String,
    /// The method that it is compressed by.
    pub method: MethodName,
    /// ‖ŷ − y‖ / ‖y‖ over the inputs; `None`, `null` in JSON, where y is zero. Of an attention block, y are the outputs of the heads
    /// under exact attention, for queries, keys and values that the dense projections make of their inputs.
    pub relative_error: Option<f64>,
    /// What the error is measured on.
    pub error_basis: ErrorBasis,
    /// Rows of input that the layer ran on.
    pub tokens: usize,
    /// Bytes in the checkpoint, bias included.
    pub dense_bytes: u64,
    /// Bytes of the artifact's arrays.
    pub stored_bytes: u64,
    /// Stored bits for each weight, the bias and everything else counted; `None` for attention blocks, which have none.
    pub bits_per_weight: Option<f64>,
    /// What the layer's correction gains; empty for methods without one.
    #[serde(flatten)]
    pub correction: CorrectionReport,
    /// What its search finds; empty for methods that search no keys.
    #[serde(flatten)]
    pub search: SearchReport,
}

impl LayerEvaluation {
    /// Returns the evaluation of a layer on so many inputs that measured this error.
    fn new(record: &LayerRecord, tokens: usize, (error, error_basis): (f64, ErrorBasis)) -> Self {
        LayerEvaluation {
            layer: record.layer.clone(),
            method: record.method.clone(),
            relative_error: Some(error).filter(|e| e.is_finite()),
            error_basis,
            tokens,
            dense_bytes: record.dense_bytes,
            stored_bytes: record.stored_bytes,
            bits_per_weight: record.bits_per_weight(),
            correction: CorrectionReport::default(),
            search: SearchReport::default(),
        }
    }
}

/// A model's errors.
#[derive(Debug, Clone, Serialize)]
pub struct Evaluation {
    /// The model.
    pub model: String,
    /// The layers that were measured, by name.
    pub layers: Vec<LayerEvaluation>,
    /// The mean of the errors above.
    pub mean_relative_error: Option<f64>,
    /// All other layers of the model, by name.
    pub unmeasured: Vec<UnmeasuredLayer>,
    /// Inputs that no layer of the model is named after.
    pub unmatched_activations: Vec<String>,
}

/// Runs every layer of `model` that has inputs in `activations`, and compares with the weights of `checkpoint`, or with
/// the dense weights of the same tensor in the store. Attention blocks whose projections of queries, keys and values have inputs
/// are compared with exact attention. What cannot be measured is named.
///
/// # Errors
/// When there is no such model, or no inputs are for it. When inputs do not fit or hold a number that is not finite, or there is
/// nothing to compare with: all that is wrong is found before the first layer runs, and told in one error.
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
    let unmatched_activations = unmatched.into_iter().map(str::to_owned).collect();
    let checkpoint = checkpoint.map(|checkpoint| seen_again(checkpoint, records.iter()));
    let reference = Reference::new(snapshot, checkpoint).await?;
    let activations = Arc::new(activations);
    let (measurables, unmeasured) = {
        let (activations, reference) = (activations.clone(), reference.clone());
        unwrap_join(tokio::task::spawn_blocking(move || measurable(&records, &activations, &reference)).await)??
    };
    let work = Work { snapshot, activations, reference };
    let mut layers = Vec::with_capacity(measurables.len());
    for measurable in measurables {
        layers.push(match measurable {
            Measurable::Linear(record) => {
                let name = record.layer.clone();
                work.linear(record).await.map_err(|e| e.in_layer(&name))?
            }
            Measurable::Block(record, projections) => {
                work.block(&record, &projections).await.map_err(|e| e.in_layer(&record.layer))?
            }
        });
    }
    let errors: Vec<f64> = layers.iter().filter_map(|l| l.relative_error).collect();
    let mean_relative_error = (!errors.is_empty()).then(|| errors.iter().sum::<f64>() / errors.len() as f64);
    Ok(Evaluation { model: model.to_owned(), layers, mean_relative_error, unmeasured, unmatched_activations })
}

/// What layers are measured with.
struct Work<'a> {
    snapshot: &'a Snapshot,
    activations: Arc<ActivationsFile>,
    reference: Reference,
}

impl Work<'_> {
    async fn linear(&self, record: LayerRecord) -> Result<LayerEvaluation> {
        let weight = self.reference.weight(&record).await?;
        let layer = self.snapshot.handle(record.clone()).load().await?;
        let activations = self.activations.clone();
        let measured = tokio::task::spawn_blocking(move || {
            let inputs = activations.required(&record.layer, record.in_features as usize)?;
            evaluate_layer(&record, &layer, weight.view(), inputs.view())
        });
        unwrap_join(measured.await)?
    }

    async fn block(&self, record: &LayerRecord, projections: &[LayerRecord; 3]) -> Result<LayerEvaluation> {
        let layer = self.snapshot.handle(record.clone()).load().await?;
        let layer = layer.downcast_ref::<VqAttentionLayer>().cloned();
        let layer = layer.ok_or_else(|| Error::expected("layer to measure", &record.method, "vq_attention"))?;
        let [query, key, value] = projections;
        let (q, k, v) = (self.projected(query).await?, self.projected(key).await?, self.projected(value).await?);
        let tokens = q.nrows();
        let measured = tokio::task::spawn_blocking(move || measure_attention(&layer, [&q, &k, &v]));
        let error = unwrap_join(measured.await)??;
        Ok(LayerEvaluation::new(record, tokens, (error, ErrorBasis::Activations)))
    }

    /// What a dense projection makes of its inputs.
    async fn projected(&self, record: &LayerRecord) -> Result<Array2<f32>> {
        let (weight, bias) = (self.reference.weight(record).await?, self.reference.bias(record).await?);
        let (activations, record) = (self.activations.clone(), record.clone());
        let made = tokio::task::spawn_blocking(move || {
            let inputs = activations.required(&record.layer, record.in_features as usize)?;
            Ok::<_, Error>(projected(inputs.view(), weight.view(), bias.as_ref()))
        });
        unwrap_join(made.await)?
    }
}

fn evaluate_layer(
    record: &LayerRecord,
    layer: &SharedLayer,
    weight: ArrayView2<f32>,
    inputs: ArrayView2<f32>,
) -> Result<LayerEvaluation> {
    let measured = measure(&**layer, weight, Some(inputs))?;
    let usable = Some(inputs).filter(|_| measured.basis == ErrorBasis::Activations);
    Ok(LayerEvaluation {
        correction: layer.correction_report(weight, usable),
        search: layer.search_report(inputs)?,
        ..LayerEvaluation::new(record, inputs.nrows(), (measured.error, measured.basis))
    })
}
