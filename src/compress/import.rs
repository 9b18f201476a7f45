//! A source's model into the store: every layer, each by the first rule that takes it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use chrono::Utc;
use serde::Serialize;
use serde_json::Value;

use layerstore_core::layer::{configured, layer_from_parts};

use super::arranged::arranged;
use super::attention::PlannedBlock;
use super::calibration::CalibrationFile;
use super::inputs::Inputs;
use super::items::{Compressed, Item};
use super::plan::{Planned, Work};
use super::preflight::checked;
use super::readable::CheckpointModel;
use super::rules::Rules;
use super::text_calibration::{CalibrationText, Observed, TextCalibration};
use crate::error::{Error, Result};
use crate::formats::{SideFile, TensorSource};
use crate::layer::{CorrectionReport, MethodName, Parts, SearchReport, SharedLayer};
use crate::store::{
    ArtifactInfo, ErrorBasis, LayerRecord, ModelFile, Provenance, RowLocations, Source, Store, Writer, adapted,
    check_model_name, weight_bits,
};
use crate::tasks::unwrap_join;
use crate::work::{Cancel, Progress, Silent};

/// How a model is imported.
pub struct ImportOptions {
    /// Which layers are compressed how.
    pub rules: Rules,
    /// Statistics of layers' inputs.
    pub calibration: Option<CalibrationFile>,
    /// A text that the model reads to be calibrated, block by block, in place of a file of statistics.
    pub calibration_text: Option<CalibrationText>,
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
            calibration_text: None,
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
    /// The files that are kept with the model.
    pub files: Vec<ModelFile>,
    /// Bytes in the checkpoint, of all layers and files.
    pub dense_bytes: u64,
    /// Bytes that layers and files take, those counted that the store had already; one artifact of several layers counts once.
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
    text: Option<TextCalibration>,
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
        let ImportOptions { rules, calibration, calibration_text, message, progress, cancel } = options;
        if calibration.is_some() && calibration_text.is_some() {
            return Err(Error::expected("calibration", "a file and a text", "one of the two"));
        }
        let source = arranged(source, &rules)?;
        let text = match calibration_text {
            Some(text) => {
                let (source, cancelled) = (source.clone(), cancel.clone());
                let begin = move || TextCalibration::new(Arc::new(CheckpointModel::new(source)), &text, &cancelled);
                Some(unless_cancelled(&cancel, begin).await?)
            }
            None => None,
        };
        let promise = text.as_ref().map(TextCalibration::promise);
        let inputs = Arc::new(Inputs { source, calibration: calibration.map(Arc::new), heads: None });
        let work = {
            let (inputs, cancel) = (inputs.clone(), cancel.clone());
            move || checked(&*inputs.source, &rules, promise.as_ref().or(inputs.calibration.as_deref()), &cancel)
        };
        let work = unless_cancelled(&cancel, work).await?;
        Ok(Prepared { model: model.to_owned(), work, inputs, text, message, progress, cancel })
    }

    /// Does what was prepared.
    ///
    /// # Errors
    /// As [`import`].
    pub(crate) async fn import_into(self, store: &Store) -> Result<ImportReport> {
        let Prepared { model, work, inputs, text, message, progress, cancel } = self;
        let Work { mut layers, mut blocks, files, unused_rules, notes, misfits: _ } = work;
        let named: HashSet<&str> = layers.iter().map(|p| p.source.name.as_str()).collect();
        let given = inputs.calibration.iter().flat_map(|calibration| calibration.layers());
        let unmatched_calibration = given.filter(|name| !named.contains(name)).map(str::to_owned).collect();
        let bytes = layers.iter().map(Planned::dense_bytes).sum::<Result<u64>>()?;
        progress.started(layers.len() + blocks.len() + files.len(), bytes);
        let mut session = ImportSession::begin(store, &model, &progress, &cancel).await?;
        let order: HashMap<String, usize> = names_in_order(&layers, &blocks);
        if let Some(text) = text {
            session.add_while_reading(text, &inputs, &mut layers, &mut blocks).await?;
        }
        for layer in layers {
            session.add(&inputs, layer).await?;
        }
        for block in blocks {
            session.add(&inputs, block).await?;
        }
        session.layers.sort_by_key(|report| order.get(&report.layer).copied());
        session.records.sort_by_key(|record| order.get(&record.layer).copied());
        for file in files {
            session.add_file(&inputs, file).await?;
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

/// A model's layers on their way into its catalogue. When it goes, whether they got there or not, the work is over.
struct ImportSession<'a> {
    model: &'a str,
    progress: &'a Arc<dyn Progress>,
    cancel: &'a Cancel,
    /// Taken by the commit.
    writer: Option<Writer>,
    layers: Vec<LayerReport>,
    files: Vec<ModelFile>,
    records: Vec<LayerRecord>,
}

impl<'a> ImportSession<'a> {
    async fn begin(
        store: &Store,
        model: &'a str,
        progress: &'a Arc<dyn Progress>,
        cancel: &'a Cancel,
    ) -> Result<ImportSession<'a>> {
        let mut session =
            ImportSession { model, progress, cancel, writer: None, layers: vec![], files: vec![], records: vec![] };
        session.writer = Some(cancel.unless(store.writer()).await?);
        Ok(session)
    }

    /// Adds the layers of a model's blocks, and attention blocks with them, while the model reads a text: each block is made of what its
    /// layers' inputs are by then.
    async fn add_while_reading(
        &mut self,
        mut text: TextCalibration,
        inputs: &Arc<Inputs>,
        layers: &mut Vec<Planned>,
        blocks: &mut Vec<PlannedBlock>,
    ) -> Result<()> {
        for number in 0..text.blocks() {
            self.progress.layer(&format!("inputs of block {number}"));
            let names: HashSet<String> = text.names(number).into_iter().collect();
            let observe = move || {
                let Observed { layers, heads } = text.observe(number)?;
                Ok((text, CalibrationFile::in_memory(layers)?, heads))
            };
            let (read, found, heads) = unless_cancelled(self.cancel, observe).await?;
            text = read;
            let is_rotary = heads.is_rotary;
            let inputs = Arc::new(Inputs {
                source: inputs.source.clone(),
                calibration: Some(Arc::new(found)),
                heads: Some(Arc::new(heads)),
            });
            let mut made = BTreeMap::new();
            for layer in layers.extract_if(.., |layer| names.contains(&layer.source.name)) {
                let name = layer.source.name.clone();
                made.insert(name, self.add_kept(&inputs, layer).await?);
            }
            let is_own = |block: &mut PlannedBlock| block.projections.iter().any(|p| names.contains(&p.source.name));
            for mut block in blocks.extract_if(.., is_own) {
                block.config.rotary = is_rotary;
                made.insert(block.name.clone(), self.add_kept(&inputs, block).await?);
            }
            let go_on = move || text.go_on(number, &made).map(|()| text);
            text = unless_cancelled(self.cancel, go_on).await?;
        }
        Ok(())
    }

    /// Makes a layer, or finds that the store has what it would be.
    async fn add<I: Item>(&mut self, inputs: &Arc<Inputs>, item: I) -> Result<()> {
        self.add_item(inputs, item, false).await.map(drop)
    }

    /// Does what [`ImportSession::add`] does, and returns the layer as it will run.
    async fn add_kept<I: Item>(&mut self, inputs: &Arc<Inputs>, item: I) -> Result<SharedLayer> {
        let name = item.name().to_owned();
        let kept = self.add_item(inputs, item, true).await?;
        let (parts, config) = kept.ok_or(Error::Cancelled)?;
        let layer = layer_from_parts(parts).and_then(|layer| configured(&layer, &config));
        layer.map_err(|e| e.in_layer(&name))
    }

    /// Returns the parts of the layer and its configuration where they are to be kept.
    async fn add_item<I: Item>(&mut self, inputs: &Arc<Inputs>, item: I, keep: bool) -> Result<Option<(Parts, Value)>> {
        let started = Instant::now();
        self.progress.layer(item.name());
        let (recipe, source) = {
            let (inputs, item) = (inputs.clone(), item.clone());
            unless_cancelled(self.cancel, move || item.recipe(&inputs)).await?
        };
        let writer = self.writer.as_mut().ok_or(Error::Cancelled)?;
        let (mut notes, mut search): (Vec<String>, _) = (vec![], SearchReport::default());
        let there = writer.made_by(&recipe).is_some();
        let mut kept = None;
        let (stored, correction, reused) = match self.cancel.unless(writer.reusable(&recipe)).await? {
            Some(stored) => {
                if keep {
                    kept = Some(self.cancel.unless(writer.parts(stored.artifact)).await?);
                }
                (stored, CorrectionReport::default(), true)
            }
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
                kept = keep.then_some(parts);
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
        let kept = kept.map(|parts| (parts, done.config.clone()));
        self.records.push(done.record(self.model));
        Ok(kept)
    }

    /// Adds a file that belongs to the model, behind its layers.
    async fn add_file(&mut self, inputs: &Arc<Inputs>, file: SideFile) -> Result<()> {
        self.add(inputs, file).await?;
        self.layers.pop();
        self.files.extend(self.records.last().map(ModelFile::from));
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
            dense_bytes: self.records.iter().map(|r| r.dense_bytes).sum(),
            stored_bytes: self
                .records
                .iter()
                .map(|r| (r.artifact, r.stored_bytes))
                .collect::<HashMap<_, _>>()
                .values()
                .sum(),
            written_bytes,
            layers: std::mem::take(&mut self.layers),
            files: std::mem::take(&mut self.files),
            unused_rules,
            unmatched_calibration,
            notes,
        })
    }
}

/// The names of what an import makes, by their places in its report.
fn names_in_order(layers: &[Planned], blocks: &[PlannedBlock]) -> HashMap<String, usize> {
    let names = layers.iter().map(|layer| &layer.source.name).chain(blocks.iter().map(|block| &block.name));
    names.enumerate().map(|(place, name)| (name.clone(), place)).collect()
}

impl Drop for ImportSession<'_> {
    fn drop(&mut self) {
        self.progress.finished();
    }
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
