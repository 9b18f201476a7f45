//! A source's model into the store: every layer, each by the first rule that takes it.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use futures::FutureExt;

use super::arranged::arranged;
use super::calibration::CalibrationFile;
use super::inputs::Inputs;
use super::plan::{Planned, Work};
use super::preflight::checked;
use super::readable::CheckpointModel;
use super::report::{CompressReport, ImportReport};
use super::rules::Rules;
use super::session::{ImportSession, Remarks, names_in_order};
use super::text_calibration::{CalibrationText, TextCalibration};
use crate::error::{Error, Result};
use crate::formats::TensorSource;
use crate::store::{Store, check_model_name};
use crate::tasks::unless_cancelled;
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
    let prepared = Prepared::new(source, model, options).boxed().await?;
    prepared.import_into(store).boxed().await
}

/// Compresses layers of a source, and attention blocks, and adds their artifacts to the store; nothing is committed.
///
/// An [`import`] of the same source by the same rules and statistics finds them, whichever process made them, and makes those that it
/// does not find. So several processes can each compress some of a model's layers, and one import commit them all. Until then
/// [`Store::lease`] keeps gc from them. `options.message` is for commits, and is not used.
///
/// # Errors
/// As [`import`]; when the source has no layer of a name; and for calibration by a text, which all layers before one take part in.
pub async fn compress_layers(
    store: &Store,
    source: Arc<dyn TensorSource>,
    layers: &[String],
    options: ImportOptions,
) -> Result<CompressReport> {
    if options.calibration_text.is_some() {
        return Err(Error::expected(
            "calibration of some layers",
            "a text",
            "statistics, which `calibrate` makes of a text",
        ));
    }
    let only = layers.iter().cloned().collect();
    let prepared = Prepared::of(source, NO_MODEL, Some(only), options).boxed().await?;
    prepared.compress_into(store).boxed().await
}

/// The model of layers that become no model's.
const NO_MODEL: &str = "layers";

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
        Self::of(source, model, None, options).await
    }

    /// Looks through what the import of some layers will use, or of all.
    async fn of(
        source: Arc<dyn TensorSource>,
        model: &str,
        only: Option<HashSet<String>>,
        options: ImportOptions,
    ) -> Result<Self> {
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
        let inputs = Arc::new(Inputs::new(source, calibration.map(Arc::new)));
        let work = {
            let (inputs, cancel) = (inputs.clone(), cancel.clone());
            move || {
                let calibration = promise.as_ref().or(inputs.calibration.as_deref());
                checked(inputs.source(), &rules, calibration, only.as_ref(), &cancel)
            }
        };
        let work = unless_cancelled(&cancel, work).await?;
        Ok(Prepared { model: model.to_owned(), work, inputs, text, message, progress, cancel })
    }

    /// Compresses what was prepared.
    async fn compress_into(self, store: &Store) -> Result<CompressReport> {
        let Prepared { model, work: Work { layers, blocks, .. }, inputs, progress, cancel, .. } = self;
        let bytes = layers.iter().map(Planned::dense_bytes).sum::<Result<u64>>()?;
        progress.started(layers.len() + blocks.len(), bytes);
        let mut session = ImportSession::begin(store, &model, &progress, &cancel).await?;
        session.add_all(&inputs, layers).await?;
        for block in blocks {
            session.add(&inputs, block).await?;
        }
        session.flush().await
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
        session.add_all(&inputs, layers).await?;
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
            first.source.metadata = inputs.source().metadata();
        }
        session.commit(message.as_deref(), Remarks { unused_rules, unmatched_calibration, notes }).await
    }
}
