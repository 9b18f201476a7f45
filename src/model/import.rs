//! A checkpoint into the store: every tensor, each layer by the first rule that takes it.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use chrono::Utc;
use serde::Serialize;
use serde_json::Value;

use super::attention::{block_recipe, make_block};
use super::checkpoint::{Activations, Checkpoint, LayerSource, TensorEntry};
use super::measure::{CorrectionReport, measure};
use super::plan::{All, Planned, bits_per_weight, flattened, plan};
use super::rules::Rules;
use super::work::{Cancel, Progress, Silent};
use crate::error::{Error, Result};
use crate::layer::parts::{Tensor, canonical_json};
use crate::layer::{DenseLayer, Layer, Method, MethodConfig, Parts, dtype_name};
use crate::store::{
    ArtifactInfo, ErrorBasis, LayerRecord, Provenance, RowLocations, Source, SourceTensor, Store, Writer,
    check_model_name,
};
use crate::tasks::unwrap_join;

/// Part of every recipe: raise it when a method comes to make other parts from the same settings.
pub(super) const RECIPE_VERSION: u32 = 2;

/// How a checkpoint is imported.
pub struct ImportOptions {
    pub rules: Rules,
    pub calibration: Option<Activations>,
    /// For the log.
    pub message: Option<String>,
    pub progress: Arc<dyn Progress>,
    pub cancel: Cancel,
}

impl Default for ImportOptions {
    fn default() -> Self {
        ImportOptions {
            rules: Rules::default(),
            calibration: None,
            message: None,
            progress: Arc::new(Silent),
            cancel: Cancel::new(),
        }
    }
}

/// What became of one layer.
#[derive(Debug, Clone, Serialize)]
pub struct LayerReport {
    pub layer: String,
    pub method: Method,
    pub in_features: u64,
    pub out_features: u64,
    pub artifact: String,
    pub relative_error: Option<f64>,
    pub error_basis: ErrorBasis,
    pub dense_bytes: u64,
    pub stored_bytes: u64,
    /// Stored bits for each weight, the bias and everything else counted.
    pub bits_per_weight: f64,
    /// Of layers that were made anew.
    #[serde(flatten)]
    pub correction: CorrectionReport,
    /// Whether the store had it already.
    pub reused: bool,
    pub seconds: f64,
}

/// What became of a checkpoint.
#[derive(Debug, Clone, Serialize)]
pub struct ImportReport {
    pub model: String,
    pub version: u64,
    pub layers: Vec<LayerReport>,
    pub dense_bytes: u64,
    pub stored_bytes: u64,
    /// Bytes of parts that were new to the store.
    pub written_bytes: u64,
    /// Patterns of rules that took no layer, with their lines: likely mistakes.
    pub unused_rules: Vec<String>,
    /// Calibration tensors that are named after no layer of the checkpoint: likely mistakes too.
    pub unmatched_calibration: Vec<String>,
}

/// Imports `checkpoint` as `model`, in place of what the store held under that name, as one new version.
///
/// Everything that rules and calibration can get wrong is refused before any layer is worked on. Layers that were made
/// from the same tensors, settings and calibration before are not made again.
///
/// # Errors
/// When a rule or calibration does not fit a layer, a tensor holds NaN, the storage refuses, or the work is cancelled:
/// then the store is as it was.
pub async fn import(
    store: &Store,
    checkpoint: Arc<Checkpoint>,
    model: &str,
    options: ImportOptions,
) -> Result<ImportReport> {
    check_model_name(model)?;
    let ImportOptions { rules, calibration, message, progress, cancel } = options;
    let All { layers: planned, blocks, unused_rules } = plan(&checkpoint, &rules, calibration.as_ref())?;
    let named: HashSet<&str> = planned.iter().map(|p| p.source.layer.as_str()).collect();
    let given = calibration.iter().flat_map(Activations::layers);
    let unmatched_calibration = given.filter(|name| !named.contains(name)).map(str::to_owned).collect();
    let calibration = Arc::new(calibration);
    let bytes = planned.iter().map(|p| p.source.byte_len() as u64).sum();
    progress.started(planned.len() + blocks.len(), bytes);
    let mut landing = Landing::new(model, &progress);
    let mut writer = store.writer().await?;
    for planned in planned {
        let started = Instant::now();
        let name = planned.source.layer.clone();
        let dense_bytes = planned.source.byte_len() as u64;
        progress.layer(&name);
        let (out_features, in_features) = flattened(&planned.source.weight);
        let planned = Arc::new(planned);
        let (recipe, source) = {
            let (checkpoint, calibration, planned) = (checkpoint.clone(), calibration.clone(), planned.clone());
            unless_cancelled(&cancel, move || Ok(recipe(&checkpoint, &planned, calibration.as_ref().as_ref()))).await?
        };
        let before = writer.made_by(&recipe).cloned();
        let (stored, config, correction, reused) = match before {
            Some(stored) => {
                let config = planned.method.with_stored(&stored.config);
                (stored, config, CorrectionReport::default(), true)
            }
            None => {
                let (checkpoint, calibration, planned) = (checkpoint.clone(), calibration.clone(), planned.clone());
                let made = unless_cancelled(&cancel, move || {
                    make(&checkpoint, &planned, calibration.as_ref().as_ref(), recipe)
                });
                let (parts, config, correction, made) = made.await.map_err(|e| e.in_layer(&name))?;
                let (_, new) = writer.add(&parts, made).await?;
                let stored = writer.made_by(&recipe).cloned().ok_or(Error::Cancelled)?;
                (stored, config, correction, !new)
            }
        };
        let done = Done { name, in_features, out_features, dense_bytes, stored, config, correction, reused, source };
        landing.done(done, started);
    }
    for block in blocks {
        let started = Instant::now();
        let name = block.name.clone();
        progress.layer(&name);
        let width = block.config.d_model.unwrap_or_default() as u64;
        let (checkpoint, calibration, block) = (checkpoint.clone(), calibration.clone(), Arc::new(block));
        let recipe = {
            let (checkpoint, calibration, block) = (checkpoint.clone(), calibration.clone(), block.clone());
            unless_cancelled(&cancel, move || Ok(block_recipe(&checkpoint, &block, calibration.as_ref().as_ref())))
                .await?
        };
        let before = writer.made_by(&recipe).cloned();
        let (stored, reused) = match before {
            Some(stored) => (stored, true),
            None => {
                let made =
                    unless_cancelled(&cancel, move || make_block(&checkpoint, &block, calibration.as_ref().as_ref()));
                let (layer, error) = made.await.map_err(|e| e.in_layer(&name))?;
                let made = Provenance {
                    recipe,
                    relative_error: error.filter(|e| e.is_finite()),
                    error_basis: ErrorBasis::Activations,
                };
                let (_, new) = writer.add(&Layer::VqAttention(layer).to_parts(), made).await?;
                (writer.made_by(&recipe).cloned().ok_or(Error::Cancelled)?, !new)
            }
        };
        let done = Done {
            name,
            in_features: width,
            out_features: width,
            dense_bytes: 0,
            config: stored.config.clone(),
            stored,
            correction: CorrectionReport::default(),
            reused,
            source: Source::default(),
        };
        landing.done(done, started);
    }
    landing.commit(writer, message.as_deref(), &cancel, unused_rules, unmatched_calibration).await
}

/// A model's layers on their way into its catalogue. When it goes, whether they got there or not, the work is over.
pub(super) struct Landing<'a> {
    model: &'a str,
    progress: &'a Arc<dyn Progress>,
    layers: Vec<LayerReport>,
    records: Vec<LayerRecord>,
}

impl<'a> Landing<'a> {
    pub fn new(model: &'a str, progress: &'a Arc<dyn Progress>) -> Self {
        Landing { model, progress, layers: vec![], records: vec![] }
    }

    /// A layer begun then is in the store.
    pub fn done(&mut self, layer: Done, started: Instant) {
        self.progress.layer_done(layer.dense_bytes, layer.reused);
        self.layers.push(layer.report(started));
        self.records.push(layer.record(self.model));
    }

    /// Makes all of them the model's, unless somebody has asked to stop.
    pub async fn commit(
        mut self,
        writer: Writer,
        message: Option<&str>,
        cancel: &Cancel,
        unused_rules: Vec<String>,
        unmatched_calibration: Vec<String>,
    ) -> Result<ImportReport> {
        if cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let written_bytes = writer.written_bytes();
        let version = writer.commit(self.model, &self.records, message).await?;
        Ok(ImportReport {
            model: self.model.to_owned(),
            version,
            dense_bytes: self.layers.iter().map(|l| l.dense_bytes).sum(),
            stored_bytes: self.layers.iter().map(|l| l.stored_bytes).sum(),
            written_bytes,
            layers: std::mem::take(&mut self.layers),
            unused_rules,
            unmatched_calibration,
        })
    }
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        self.progress.finished();
    }
}

/// A layer that is in the store.
pub(super) struct Done {
    pub name: String,
    pub in_features: u64,
    pub out_features: u64,
    pub dense_bytes: u64,
    pub stored: ArtifactInfo,
    pub config: Value,
    pub correction: CorrectionReport,
    pub reused: bool,
    pub source: Source,
}

impl Done {
    pub fn report(&self, started: Instant) -> LayerReport {
        let stored = &self.stored;
        LayerReport {
            layer: self.name.clone(),
            method: stored.method,
            in_features: self.in_features,
            out_features: self.out_features,
            artifact: stored.artifact.to_string(),
            relative_error: stored.relative_error,
            error_basis: stored.error_basis,
            dense_bytes: self.dense_bytes,
            stored_bytes: stored.stored_bytes,
            bits_per_weight: match stored.method {
                // They have none.
                method if !method.is_linear() => 0.0,
                _ => bits_per_weight(stored.stored_bytes, self.out_features, self.in_features),
            },
            correction: self.correction.clone(),
            reused: self.reused,
            seconds: started.elapsed().as_secs_f64(),
        }
    }

    pub fn record(self, model: &str) -> LayerRecord {
        LayerRecord {
            model: model.to_owned(),
            layer: self.name,
            method: self.stored.method,
            in_features: self.in_features,
            out_features: self.out_features,
            artifact: self.stored.artifact,
            relative_error: self.stored.relative_error,
            error_basis: self.stored.error_basis,
            dense_bytes: self.dense_bytes,
            stored_bytes: self.stored.stored_bytes,
            config: self.config,
            source: self.source,
            created_at: Utc::now(),
            locations: RowLocations::default(),
        }
    }
}

/// Runs blocking work, and stops waiting for it when somebody asks.
pub(super) async fn unless_cancelled<T: Send + 'static>(
    cancel: &Cancel,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    if cancel.is_cancelled() {
        return Err(Error::Cancelled);
    }
    tokio::select! {
        done = tokio::task::spawn_blocking(work) => unwrap_join(done)?,
        () = cancel.cancelled() => Err(Error::Cancelled),
    }
}

/// Names what a layer is made from and how, and where it comes from.
fn recipe(checkpoint: &Checkpoint, planned: &Planned, calibration: Option<&Activations>) -> ([u8; 32], Source) {
    let mut hasher = blake3::Hasher::new();
    let mut add = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update_rayon(bytes);
    };
    let mut tensors = Vec::new();
    for entry in std::iter::once(&planned.source.weight).chain(&planned.source.bias) {
        let tensor = source_tensor(checkpoint, entry);
        add(tensor.hash.as_bytes());
        tensors.push(tensor);
    }
    // A method's settings, and the code that reads them.
    let settings = serde_json::to_value(&planned.method).unwrap_or(Value::Null);
    add(canonical_json(&settings).as_bytes());
    add(&RECIPE_VERSION.to_le_bytes());
    if let Some((dtype, shape, bytes)) =
        calibration.filter(|_| planned.calibrated).and_then(|c| c.raw(&planned.source.layer))
    {
        add(format!("{dtype:?} {shape:?}").as_bytes());
        add(bytes);
    }
    let file = checkpoint.file_name(&planned.source.weight).to_owned();
    (hasher.finalize().into(), Source { file, tensors, metadata: checkpoint.metadata().clone() })
}

pub(super) fn source_tensor(checkpoint: &Checkpoint, entry: &TensorEntry) -> SourceTensor {
    let dtype = dtype_name(entry.dtype);
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("{dtype} {:?} ", entry.shape).as_bytes());
    hasher.update_rayon(checkpoint.bytes(entry));
    SourceTensor {
        tensor: entry.name.clone(),
        dtype,
        shape: entry.shape.clone(),
        hash: hasher.finalize().to_hex().to_string(),
    }
}

/// Compresses one layer and measures it. Gives its parts, its full configuration and what its correction is good for.
fn make(
    checkpoint: &Checkpoint,
    planned: &Planned,
    calibration: Option<&Activations>,
    recipe: [u8; 32],
) -> Result<(Parts, Value, CorrectionReport, Provenance)> {
    let LayerSource { layer: name, weight, bias } = &planned.source;
    if planned.method == MethodConfig::Dense {
        let bias = bias.as_ref().map(|b| {
            checkpoint.refuse_nan(b)?;
            Ok::<_, Error>(Tensor {
                name: "bias".into(),
                dtype: dtype_name(b.dtype),
                shape: b.shape.clone(),
                data: checkpoint.to_bytes(b),
            })
        });
        checkpoint.refuse_nan(weight)?;
        let layer = Layer::Dense(DenseLayer::new(
            weight.dtype,
            weight.shape.clone(),
            checkpoint.to_bytes(weight),
            bias.transpose()?,
        )?);
        let made = Provenance { recipe, relative_error: Some(0.0), error_basis: ErrorBasis::Weights };
        return Ok((layer.to_parts(), layer.config(), CorrectionReport::default(), made));
    }
    let w = checkpoint.matrix(weight)?;
    let b = bias.as_ref().map(|b| checkpoint.vector(b)).transpose()?;
    let inputs = calibration.filter(|_| planned.calibrated).map(|c| c.get(name, w.ncols())).transpose()?.flatten();
    let layer = planned.method.compress(w.view(), b.as_ref().map(|b| b.view()), inputs.as_ref().map(|x| x.view()))?;
    let (error, error_basis) = measure(&layer, &w, inputs.as_ref())?;
    let made = Provenance { recipe, relative_error: Some(error).filter(|e| e.is_finite()), error_basis };
    let correction = CorrectionReport::of(&layer, &w, inputs.as_ref());
    Ok((layer.to_parts(), layer.config(), correction, made))
}

/// Opens a checkpoint, rules and calibration by their paths.
///
/// # Errors
/// When one of them cannot be used.
pub fn open_inputs(
    checkpoint: &Path,
    rules: Option<&Path>,
    calibration: Option<&Path>,
) -> Result<(Checkpoint, Rules, Option<Activations>)> {
    let rules = rules.map(Rules::open).transpose()?.unwrap_or_default();
    let calibration = calibration.map(Activations::open).transpose()?;
    Ok((Checkpoint::open(checkpoint)?, rules, calibration))
}
