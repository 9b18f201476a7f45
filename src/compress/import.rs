//! A source's model into the store: every layer, each by the first rule that takes it.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use chrono::Utc;
use layerstore_core::layer::dtype_name;
use ndarray::ArrayView2;
use serde::Serialize;
use serde_json::Value;

use super::attention::{PlannedBlock, block_recipe, make_block};
use super::calibration::CalibrationFile;
use super::measure::measure;
use super::plan::{Planned, Work};
use super::preflight::checked;
use super::recipe::Recipe;
use super::rules::Rules;
use super::work::{Cancel, Progress, Silent};
use crate::error::{Error, Result};
use crate::formats::{SourceContent, TensorSource};
use crate::layer::parts::Tensor;
use crate::layer::{CorrectionReport, DenseLayer, KeyValueLayer, Layer, MethodName, Parts, SearchReport, SharedLayer};
use crate::store::{
    ArtifactInfo, ErrorBasis, LayerRecord, Provenance, RowLocations, Source, Store, Writer, adapted, check_model_name,
    source_tensors, weight_bits,
};
use crate::tasks::unwrap_join;

/// How a model is imported.
pub struct ImportOptions {
    /// Which layers are compressed how.
    pub rules: Rules,
    /// Statistics of layers' inputs.
    pub calibration: Option<CalibrationFile>,
    /// What the log says of the new version.
    pub message: Option<String>,
    /// What is told how far the import is.
    pub progress: Arc<dyn Progress>,
    /// Stops the import when the caller asks: nothing is committed then.
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

impl ImportOptions {
    /// Returns options with the rules and the calibration of these files.
    ///
    /// # Errors
    /// When one of them cannot be used.
    pub fn from_files(rules: Option<&Path>, calibration: Option<&Path>) -> Result<Self> {
        Ok(ImportOptions {
            rules: rules.map(Rules::open).transpose()?.unwrap_or_default(),
            calibration: calibration.map(CalibrationFile::open).transpose()?,
            ..ImportOptions::default()
        })
    }
}

/// What became of one layer.
#[derive(Debug, Clone, Serialize)]
pub struct LayerReport {
    /// The layer's name.
    pub layer: String,
    /// The method that it is compressed by.
    pub method: MethodName,
    /// Length of an input row.
    pub in_features: u64,
    /// Length of an output row.
    pub out_features: u64,
    /// The artifact's name, in hex.
    pub artifact: String,
    /// ‖ŷ − y‖ / ‖y‖ over the calibration inputs where the layer had some, else ‖Ŵ − W‖ / ‖W‖; `None` where there is no such
    /// number. On the inputs that the layer was made for it is less than on others, which [`evaluate`](super::evaluate()) measures.
    pub relative_error: Option<f64>,
    /// What the error is measured on.
    pub error_basis: ErrorBasis,
    /// Bytes in the checkpoint, bias included.
    pub dense_bytes: u64,
    /// Bytes of the artifact's arrays.
    pub stored_bytes: u64,
    /// Stored bits for each weight, the bias and everything else counted; `null` in JSON for layers without weights.
    pub bits_per_weight: Option<f64>,
    /// What its correction gains; empty for layers that were not made anew, and for methods without one.
    #[serde(flatten)]
    pub correction: CorrectionReport,
    /// What its search finds for the calibration inputs, where its settings have it certify an error; empty for others, and for
    /// layers that were not made anew.
    #[serde(flatten)]
    pub search: SearchReport,
    /// What was adapted to the layer, and what of its settings or inputs was not used; empty where all is as the rule says.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Whether the store had it already.
    pub reused: bool,
    /// Time that the layer took, in seconds.
    pub seconds: f64,
}

/// What became of a model.
#[derive(Debug, Clone, Serialize)]
pub struct ImportReport {
    /// The model.
    pub model: String,
    /// The version that the commit made; the latest one where nothing had changed.
    pub version: u64,
    /// What became of each layer.
    pub layers: Vec<LayerReport>,
    /// Bytes in the checkpoint, of all layers.
    pub dense_bytes: u64,
    /// Bytes that the layers take, those counted that the store had already.
    pub stored_bytes: u64,
    /// Bytes of parts that were new to the store.
    pub written_bytes: u64,
    /// Patterns of rules that took no layer, with their lines: likely mistakes.
    pub unused_rules: Vec<String>,
    /// Calibration tensors that are named after no layer of the source: likely mistakes too.
    pub unmatched_calibration: Vec<String>,
    /// What was left out of the checkpoint, and what it says that an import does not do.
    pub notes: Vec<String>,
}

/// Imports `source` as `model`, in place of what the store held under that name, as one new version.
///
/// Everything that rules, calibration and values can get wrong is refused before any layer is worked on, in one error. Layers
/// that were made from the same tensors, settings and calibration before are not made again.
///
/// # Errors
/// When a rule or calibration does not fit a layer, a tensor holds NaN, the storage refuses, or the work is cancelled:
/// then the store is as it was.
pub async fn import(
    store: &Store,
    source: Arc<dyn TensorSource>,
    model: &str,
    options: ImportOptions,
) -> Result<ImportReport> {
    // Boxed, so that callers' futures do not nest as deep as the compiler's limit.
    let prepared = Box::pin(Prepared::new(source, model, options)).await?;
    Box::pin(prepared.import_into(store)).await
}

/// An import whose source, rules and calibration were looked through, all values included.
pub(crate) struct Prepared {
    model: String,
    work: Work,
    inputs: Arc<Inputs>,
    message: Option<String>,
    progress: Arc<dyn Progress>,
    cancel: Cancel,
}

impl Prepared {
    /// Looks through all that the import will use.
    ///
    /// # Errors
    /// As [`import`], the storage aside.
    pub(crate) async fn new(source: Arc<dyn TensorSource>, model: &str, options: ImportOptions) -> Result<Self> {
        check_model_name(model)?;
        let ImportOptions { rules, calibration, message, progress, cancel } = options;
        let inputs = Arc::new(Inputs { source, calibration: calibration.map(Arc::new) });
        let work = {
            let (inputs, cancel) = (inputs.clone(), cancel.clone());
            move || checked(&*inputs.source, &rules, inputs.calibration.as_deref(), &cancel)
        };
        let work = unless_cancelled(&cancel, work).await?;
        Ok(Prepared { model: model.to_owned(), work, inputs, message, progress, cancel })
    }

    /// Does what was prepared.
    ///
    /// # Errors
    /// As [`import`].
    pub(crate) async fn import_into(self, store: &Store) -> Result<ImportReport> {
        let Prepared { model, work, inputs, message, progress, cancel } = self;
        let Work { layers, blocks, unused_rules, notes, misfits: _ } = work;
        let named: HashSet<&str> = layers.iter().map(|p| p.source.name.as_str()).collect();
        let given = inputs.calibration.iter().flat_map(|calibration| calibration.layers());
        let unmatched_calibration = given.filter(|name| !named.contains(name)).map(str::to_owned).collect();
        let bytes = layers.iter().map(Planned::dense_bytes).sum::<Result<u64>>()?;
        progress.started(layers.len() + blocks.len(), bytes);
        let mut session = ImportSession::begin(store, &model, &progress, &cancel).await?;
        for layer in layers {
            session.add(&inputs, layer).await?;
        }
        for block in blocks {
            session.add(&inputs, block).await?;
        }
        // What is said of the whole checkpoint is stored once, with its first layer.
        if let Some(first) = session.records.first_mut() {
            first.source.metadata = inputs.source.metadata();
        }
        session.commit(message.as_deref(), Remarks { unused_rules, unmatched_calibration, notes }).await
    }
}

/// What is said of a layer that the store had, when what it had was not what was written.
const DAMAGED: &str = "what the store had of it was damaged: it was made again";

/// What a report says beside what became of the layers.
struct Remarks {
    unused_rules: Vec<String>,
    unmatched_calibration: Vec<String>,
    notes: Vec<String>,
}

/// What layers are made from.
pub(super) struct Inputs {
    pub source: Arc<dyn TensorSource>,
    pub calibration: Option<Arc<CalibrationFile>>,
}

/// A layer that an import makes, or finds made. Its methods do blocking work.
pub(super) trait Item: Clone + Send + Sync + 'static {
    fn name(&self) -> &str;

    /// `(out_features, in_features)`.
    fn shape(&self) -> (u64, u64);

    /// Bytes in the source.
    fn dense_bytes(&self) -> Result<u64>;

    /// Names what the layer is made from and how, and where it comes from.
    fn recipe(&self, inputs: &Inputs) -> Result<([u8; 32], Source)>;

    /// Makes the layer, and measures it.
    fn make(&self, inputs: &Inputs) -> Result<Compressed>;

    /// The full configuration of the layer, whose parts the store has with this config.
    fn configuration(&self, stored: &Value) -> Value;
}

/// A layer that was made.
pub(super) struct Compressed {
    pub parts: Parts,
    /// What a person should know of it.
    notes: Vec<String>,
    search: SearchReport,
    correction: CorrectionReport,
    pub relative_error: Option<f64>,
    pub error_basis: ErrorBasis,
}

impl Item for Planned {
    fn name(&self) -> &str {
        &self.source.name
    }

    fn shape(&self) -> (u64, u64) {
        Planned::shape(self)
    }

    fn dense_bytes(&self) -> Result<u64> {
        Planned::dense_bytes(self)
    }

    fn recipe(&self, inputs: &Inputs) -> Result<([u8; 32], Source)> {
        let mut recipe = Recipe::new();
        let from = &*inputs.source;
        let source = match &self.source.content {
            SourceContent::Tensors { weight, bias } => {
                let tensors = std::iter::once(weight).chain(bias).map(|tensor| recipe.tensor(from, tensor));
                let tensors = tensors.collect::<Result<_>>()?;
                Source { file: from.file_name(&weight.name), tensors, metadata: BTreeMap::new() }
            }
            SourceContent::Ready { layer, .. } => {
                let layer = layer.load()?;
                let id = layer.to_parts().id();
                recipe.artifact(id);
                let tensors = source_tensors(&self.source.name, &*layer, id)?;
                Source { file: from.file_name(&self.source.name), tensors, metadata: BTreeMap::new() }
            }
        };
        if let Some(method) = &self.method {
            recipe.settings(method);
            if self.calibrated {
                recipe.calibration(inputs.calibration.as_deref(), &self.source.name)?;
            }
        }
        Ok((recipe.finish(), source))
    }

    fn make(&self, inputs: &Inputs) -> Result<Compressed> {
        let Some(method) = &self.method else { return self.as_it_is(&*inputs.source) };
        let (weight, bias) = match &self.source.content {
            SourceContent::Tensors { weight, bias } => {
                let bias = bias.as_ref().map(|b| inputs.source.vector(b)).transpose()?;
                (inputs.source.matrix(weight)?, bias)
            }
            SourceContent::Ready { layer, .. } => {
                let layer = layer.load()?;
                (layer.weight()?, layer.stored_bias()?)
            }
        };
        let calibration = match inputs.calibration.as_ref().filter(|_| self.calibrated) {
            Some(calibration) => calibration.get(&self.source.name, weight.ncols())?,
            None => None,
        };
        let layer = method.compress(weight.view(), bias.as_ref().map(|b| b.view()), calibration.as_ref())?;
        // What says nothing of inputs is no measure either.
        let unusable = calibration.as_ref().and_then(|calibration| method.unusable(calibration));
        let inputs = calibration.as_ref().filter(|_| unusable.is_none()).map(|c| c.sample());
        let inputs = inputs.filter(|sample| sample.nrows() > 0);
        let measured = measure(&*layer, weight.view(), inputs)?;
        let inputs = inputs.filter(|_| measured.basis == ErrorBasis::Activations);
        let parts = layer.to_parts();
        let noted = adapted(&parts.config).iter().any(|note| note.starts_with("calibration"));
        let unused = unusable.filter(|_| !noted).map(|reason| format!("calibration: not used, {reason}"));
        let (search, unkept) = promised(&layer, inputs)?;
        Ok(Compressed {
            correction: layer.correction_report(weight.view(), inputs),
            search,
            notes: unused.into_iter().chain(measured.note).chain(unkept).collect(),
            parts,
            relative_error: Some(measured.error).filter(|e| e.is_finite()),
            error_basis: measured.basis,
        })
    }

    fn configuration(&self, stored: &Value) -> Value {
        match (&self.method, &self.source.content) {
            (Some(method), _) => method.with_stored(stored),
            (None, SourceContent::Ready { layer, .. }) => {
                layer.in_memory().map_or_else(|| stored.clone(), |layer| layer.config())
            }
            (None, SourceContent::Tensors { .. }) => stored.clone(),
        }
    }
}

impl Planned {
    /// The layer as the source has it, bit for bit.
    fn as_it_is(&self, source: &dyn TensorSource) -> Result<Compressed> {
        let (parts, relative_error) = match &self.source.content {
            SourceContent::Ready { layer, .. } => (layer.load()?.to_parts(), None),
            SourceContent::Tensors { weight, bias } => {
                let bias = bias.as_ref().map(|b| {
                    source.refuse_nan(b)?;
                    let data = source.bytes(b)?.into_owned().into();
                    Ok::<_, Error>(Tensor {
                        name: "bias".into(),
                        dtype: dtype_name(b.dtype),
                        shape: b.shape.clone(),
                        data,
                    })
                });
                source.refuse_nan(weight)?;
                let data = source.bytes(weight)?.into_owned().into();
                let layer = DenseLayer::new(weight.dtype, weight.shape.clone(), data, bias.transpose()?)?;
                (layer.to_parts(), Some(0.0))
            }
        };
        let correction = CorrectionReport::default();
        Ok(Compressed {
            parts,
            notes: vec![],
            search: SearchReport::default(),
            correction,
            relative_error,
            error_basis: ErrorBasis::Weights,
        })
    }
}

impl Item for PlannedBlock {
    fn name(&self) -> &str {
        &self.name
    }

    fn shape(&self) -> (u64, u64) {
        let width = self.config.d_model.unwrap_or_default() as u64;
        (width, width)
    }

    /// None of its own: its projections are layers by themselves.
    fn dense_bytes(&self) -> Result<u64> {
        Ok(0)
    }

    fn recipe(&self, inputs: &Inputs) -> Result<([u8; 32], Source)> {
        Ok((block_recipe(&*inputs.source, self, inputs.calibration.as_deref())?, Source::default()))
    }

    fn make(&self, inputs: &Inputs) -> Result<Compressed> {
        let (layer, error) = make_block(&*inputs.source, self, inputs.calibration.as_deref())?;
        Ok(Compressed {
            parts: layer.to_parts(),
            notes: vec![],
            search: SearchReport::default(),
            correction: CorrectionReport::default(),
            relative_error: error.filter(|e| e.is_finite()),
            error_basis: ErrorBasis::Activations,
        })
    }

    fn configuration(&self, stored: &Value) -> Value {
        stored.clone()
    }
}

/// A model's layers on their way into its catalogue. When it goes, whether they got there or not, the work is over.
struct ImportSession<'a> {
    model: &'a str,
    progress: &'a Arc<dyn Progress>,
    cancel: &'a Cancel,
    /// Taken by the commit.
    writer: Option<Writer>,
    layers: Vec<LayerReport>,
    records: Vec<LayerRecord>,
}

impl<'a> ImportSession<'a> {
    async fn begin(
        store: &Store,
        model: &'a str,
        progress: &'a Arc<dyn Progress>,
        cancel: &'a Cancel,
    ) -> Result<ImportSession<'a>> {
        let mut session = ImportSession { model, progress, cancel, writer: None, layers: vec![], records: vec![] };
        session.writer = Some(cancel.unless(store.writer()).await?);
        Ok(session)
    }

    /// Makes a layer, or finds that the store has what it would be.
    async fn add<I: Item>(&mut self, inputs: &Arc<Inputs>, item: I) -> Result<()> {
        let started = Instant::now();
        self.progress.layer(item.name());
        let (recipe, source) = {
            let (inputs, item) = (inputs.clone(), item.clone());
            unless_cancelled(self.cancel, move || item.recipe(&inputs)).await?
        };
        let writer = self.writer.as_mut().ok_or(Error::Cancelled)?;
        let (mut notes, mut search): (Vec<String>, _) = (vec![], SearchReport::default());
        let there = writer.made_by(&recipe).is_some();
        let (stored, correction, reused) = match self.cancel.unless(writer.reusable(&recipe)).await? {
            Some(stored) => (stored, CorrectionReport::default(), true),
            None => {
                if there {
                    notes.push(DAMAGED.to_owned());
                }
                let work = {
                    let (inputs, item) = (inputs.clone(), item.clone());
                    unless_cancelled(self.cancel, move || item.make(&inputs)).await
                };
                let made = work.map_err(|e| e.in_layer(item.name()))?;
                let Compressed { parts, correction, relative_error, error_basis, notes: more, search: found } = made;
                notes.extend(more);
                search = found;
                let made = writer.add(&parts, Provenance { recipe, relative_error, error_basis });
                let (_, new) = self.cancel.unless(made).await.map_err(|e| e.in_layer(item.name()))?;
                let stored = writer.made_by(&recipe).cloned().ok_or(Error::Cancelled)?;
                (stored, correction, !new)
            }
        };
        let (out_features, in_features) = item.shape();
        let config = item.configuration(&stored.config);
        notes.splice(..0, adapted(&stored.config));
        let done = Done {
            notes,
            search,
            dense_bytes: item.dense_bytes()?,
            name: item.name().to_owned(),
            in_features,
            out_features,
            stored,
            config,
            correction,
            reused,
            source,
        };
        self.progress.layer_done(done.dense_bytes, done.reused);
        self.layers.push(done.report(started));
        self.records.push(done.record(self.model));
        Ok(())
    }

    /// Makes all layers the model's, unless somebody has asked to stop.
    async fn commit(mut self, message: Option<&str>, remarks: Remarks) -> Result<ImportReport> {
        let Remarks { unused_rules, unmatched_calibration, notes } = remarks;
        let mut writer = self.writer.take().filter(|_| !self.cancel.is_cancelled()).ok_or(Error::Cancelled)?;
        let written_bytes = writer.written_bytes();
        // The last moment at which it can be given up: what comes now is done, or not, as a whole.
        self.cancel.unless(writer.ready()).await?;
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
            notes,
        })
    }
}

impl Drop for ImportSession<'_> {
    fn drop(&mut self) {
        self.progress.finished();
    }
}

/// Returns what a layer that is to certify an error finds for `inputs`, and what to say where it cannot certify it.
fn promised(layer: &SharedLayer, inputs: Option<ArrayView2<f32>>) -> Result<(SearchReport, Option<String>)> {
    let found = layer.downcast_ref::<KeyValueLayer>().filter(|layer| layer.asked_error().is_some());
    let Some(layer) = found else { return Ok((SearchReport::default(), None)) };
    let report = inputs.map_or(Ok(SearchReport::default()), |x| layer.search_report(x))?;
    let note = layer.unkept_promise(inputs.map_or(0, |x| x.nrows()), &report);
    Ok((report, note))
}

/// A layer that is in the store.
struct Done {
    name: String,
    notes: Vec<String>,
    search: SearchReport,
    in_features: u64,
    out_features: u64,
    dense_bytes: u64,
    stored: ArtifactInfo,
    config: Value,
    correction: CorrectionReport,
    reused: bool,
    source: Source,
}

impl Done {
    fn report(&self, started: Instant) -> LayerReport {
        let stored = &self.stored;
        LayerReport {
            layer: self.name.clone(),
            method: stored.method.clone(),
            in_features: self.in_features,
            out_features: self.out_features,
            artifact: stored.artifact.to_string(),
            relative_error: stored.relative_error,
            error_basis: stored.error_basis,
            dense_bytes: self.dense_bytes,
            stored_bytes: stored.stored_bytes,
            bits_per_weight: weight_bits(&stored.method, stored.stored_bytes, (self.out_features, self.in_features)),
            correction: self.correction.clone(),
            search: self.search.clone(),
            notes: self.notes.clone(),
            reused: self.reused,
            seconds: started.elapsed().as_secs_f64(),
        }
    }

    fn record(self, model: &str) -> LayerRecord {
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
