//! A damaged store made whole again: from what it still has itself, from checkpoints, and from other stores.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use layerstore_core::layer::registry;
use serde::Serialize;

use super::arranged::seen_again;
use super::calibration::CalibrationFile;
use super::inputs::Inputs;
use super::items::Item;
use super::plan::Planned;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::{self, SourceContent, SourceLayer, TensorSource};
use crate::layer::{ArtifactId, Dense, FileLayer, Layer, Method, Parts};
use crate::store::{
    CorruptArtifact, DamagedMetadata, ErrorBasis, LayerName, LayerRecord, Provenance, Repairing, SourceTensor, Store,
};
use crate::tasks::unless_cancelled;
use crate::work::{Cancel, Progress, Silent};

/// Where a repair looks for what a store has lost.
#[derive(Clone)]
pub enum RepairSource {
    /// A checkpoint that holds the layers' tensors.
    Checkpoint(Arc<dyn TensorSource>),
    /// Another store, which may hold the artifacts.
    Store(Store),
}

impl fmt::Debug for RepairSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RepairSource({self})")
    }
}

/// The path or address that the source was opened by.
impl fmt::Display for RepairSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RepairSource::Checkpoint(source) => write!(f, "{}", source.path().display()),
            RepairSource::Store(store) => f.write_str(store.uri()),
        }
    }
}

impl RepairSource {
    /// Opens what lies at a path or an address: a store, where there is one, and else a checkpoint.
    ///
    /// # Errors
    /// As [`Store::open`] or [`formats::open`](crate::formats::open).
    pub async fn open(place: &str) -> Result<Self> {
        let is_store = place.contains("://") || Path::new(place).join("layers.lance").is_dir();
        Ok(match is_store {
            true => RepairSource::Store(Store::open(place).await?),
            false => RepairSource::Checkpoint(formats::open(place)?),
        })
    }
}

/// How a store is repaired.
pub struct RepairOptions {
    /// Where damaged artifacts are looked for, the first place that has one first.
    pub sources: Vec<RepairSource>,
    /// Statistics of layers' inputs that were calibrated when they were imported.
    pub calibration: Option<CalibrationFile>,
    /// What is told how far the work is: the layers that are damaged artifacts.
    pub progress: Arc<dyn Progress>,
    /// Stops the work when the caller asks: what was mended by then is kept or not.
    pub cancel: Cancel,
}

impl Default for RepairOptions {
    fn default() -> Self {
        RepairOptions { sources: vec![], calibration: None, progress: Arc::new(Silent), cancel: Cancel::new() }
    }
}

/// An artifact that is whole again.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MendedArtifact {
    /// Its name.
    pub artifact: String,
    /// The checkpoint that it was made again from, or the store that it was taken from.
    pub from: String,
    /// Layers that use it.
    pub layers: Vec<LayerName>,
}

/// A source that could not mend an artifact.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FailedSource {
    /// The artifact's name.
    pub artifact: String,
    /// The checkpoint or store.
    pub from: String,
    /// Why it could not.
    pub reason: String,
}

/// What a repair did, and what is left.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct RepairReport {
    /// Artifacts that were looked at.
    pub artifacts: u64,
    /// Artifacts that the list of artifacts had lost, listed again.
    pub listed: Vec<String>,
    /// Artifacts that a data table had lost, written again from the store's own files.
    pub written: Vec<String>,
    /// Artifacts that were mended from a checkpoint or another store.
    pub mended: Vec<MendedArtifact>,
    /// Files that could not be read and are no part of the store any more: their names end with `.damaged`.
    pub set_aside: Vec<String>,
    /// Sources that could not mend what is still damaged.
    pub tried: Vec<FailedSource>,
    /// Artifacts that are still damaged.
    pub corrupt: Vec<CorruptArtifact>,
    /// Files of tables, and snapshots, that are still damaged.
    pub damaged: Vec<DamagedMetadata>,
}

impl RepairReport {
    /// Returns whether nothing is damaged any more.
    pub fn is_sound(&self) -> bool {
        self.corrupt.is_empty() && self.damaged.is_empty()
    }
}

/// Makes a damaged store whole, as far as that can be done, and says what is left.
///
/// Manifests of the list of artifacts and of data tables, and data files, that cannot be read are set aside. What the list or a table
/// lacks is completed from the data files. An artifact that is still missing or not what was written is made again from a checkpoint
/// that holds its tensors, with the settings that the catalogue has of it, or taken from another store; only what has the artifact's
/// name is stored. The catalogue stays as it is: no version is made, but for one that changes nothing on an object
/// store.
///
/// # Errors
/// When the latest version of the catalogue cannot be read, an import is at work and does not finish in time, the storage refuses, or
/// the work is cancelled.
pub async fn repair(store: &Store, options: RepairOptions) -> Result<RepairReport> {
    // Boxed, so that callers' futures do not nest as deep as the compiler's limit.
    Box::pin(mended(store, options)).await
}

async fn mended(store: &Store, options: RepairOptions) -> Result<RepairReport> {
    let RepairOptions { sources, calibration, progress, cancel } = options;
    let sources = Sources::new(sources, calibration);
    let mut work = cancel.unless(store.begin_repair(|_, _| ())).await?;
    let names = |ids: &[ArtifactId]| ids.iter().map(ArtifactId::to_string).collect();
    let mut report = RepairReport {
        artifacts: work.report.artifacts,
        listed: names(&work.healed.listed),
        written: names(&work.healed.written),
        set_aside: std::mem::take(&mut work.set_aside),
        ..RepairReport::default()
    };
    let corrupt = work.report.corrupt.clone();
    progress.started(corrupt.len(), 0);
    let done = async {
        for artifact in corrupt {
            if let Some(layer) = artifact.layers.first() {
                progress.layer(&layer.layer);
            }
            sources.mend(&mut work, artifact, &mut report, &cancel).await?;
            progress.layer_done(0, false);
        }
        cancel.unless(work.finish()).await
    };
    let done = done.await;
    progress.finished();
    let left = done?;
    (report.corrupt, report.damaged) = (left.corrupt, left.damaged);
    let whole = |id: &String| !report.corrupt.iter().any(|c| c.artifact == *id);
    report.mended.retain(|m| whole(&m.artifact));
    report.tried.retain(|t| !whole(&t.artifact));
    Ok(report)
}

/// Where damaged artifacts are looked for.
struct Sources(Vec<(String, Opened)>);

/// A source, as it is asked.
enum Opened {
    Checkpoint(Arc<Inputs>, Vec<SourceLayer>),
    Store(Store),
}

impl Sources {
    fn new(sources: Vec<RepairSource>, calibration: Option<CalibrationFile>) -> Self {
        let calibration = calibration.map(Arc::new);
        let opened = sources.into_iter().map(|source| {
            let name = source.to_string();
            let opened = match source {
                RepairSource::Checkpoint(source) => {
                    let layers = source.layers();
                    Opened::Checkpoint(Arc::new(Inputs::new(source, calibration.clone())), layers)
                }
                RepairSource::Store(store) => Opened::Store(store),
            };
            (name, opened)
        });
        Sources(opened.collect())
    }

    /// Mends an artifact from the first source that can.
    async fn mend(
        &self,
        work: &mut Repairing,
        corrupt: CorruptArtifact,
        report: &mut RepairReport,
        cancel: &Cancel,
    ) -> Result<()> {
        let id: ArtifactId = corrupt.artifact.parse()?;
        if self.0.is_empty() {
            return Ok(());
        }
        let row = work.row(id).await;
        for (name, source) in &self.0 {
            let found = match source {
                Opened::Store(store) => match cancel.unless(store.artifact(id)).await {
                    Ok(None) => Err(Error::expected("artifact", "none of this name that is whole", id)),
                    Ok(Some(found)) => Ok(found),
                    Err(e) => Err(e),
                },
                Opened::Checkpoint(inputs, layers) => match &row {
                    Ok(row) => {
                        let (inputs, layers, row) = (inputs.clone(), layers.clone(), row.clone());
                        unless_cancelled(cancel, move || made_again(&inputs, &layers, id, row.as_ref())).await
                    }
                    Err(e) => Err(Error::expected("row of the catalogue", e, "one that can be read")),
                },
            };
            let failed = |e: Error| FailedSource {
                artifact: corrupt.artifact.clone(),
                from: name.clone(),
                reason: e.to_string(),
            };
            match found {
                Ok((parts, provenance)) => {
                    if let Err(e) = cancel.unless(work.add(&parts, provenance)).await {
                        // What is wrong with one artifact is no reason not to mend the others.
                        if matches!(e.kind(), ErrorKind::Storage | ErrorKind::Conflict | ErrorKind::Cancelled) {
                            return Err(e);
                        }
                        report.tried.push(failed(e));
                        continue;
                    }
                    let CorruptArtifact { artifact, layers, .. } = corrupt;
                    report.mended.push(MendedArtifact { artifact, from: name.clone(), layers });
                    return Ok(());
                }
                Err(Error::Cancelled) => return Err(Error::Cancelled),
                Err(e) => report.tried.push(failed(e)),
            }
        }
        Ok(())
    }
}

/// Reads a file that belongs to a model again.
fn file_again(inputs: &Inputs, id: ArtifactId, name: &str) -> Result<(Parts, Provenance)> {
    let files = inputs.source().side_files();
    let file = files.iter().find(|file| file.name == name);
    let file = file.ok_or_else(|| Error::expected("file that belongs to the model", "none of its name", name))?;
    let parts = FileLayer::new(file.read()?).to_parts();
    match parts.id() == id {
        true => Ok((parts, Provenance { recipe: id.0, relative_error: None, error_basis: ErrorBasis::Weights })),
        false => Err(Error::expected(format!("content of '{name}'"), parts.id(), format!("{id}, which was stored"))),
    }
}

/// Makes the artifact of a row of the catalogue again.
fn made_again(
    inputs: &Inputs,
    layers: &[SourceLayer],
    id: ArtifactId,
    row: Option<&LayerRecord>,
) -> Result<(Parts, Provenance)> {
    if let Some(row) = row.filter(|row| row.is_file()) {
        return file_again(inputs, id, &row.layer);
    }
    let Some((row, wanted)) = row.and_then(|row| Some((row, row.source.tensors.first()?))) else {
        return Err(Error::expected(
            "source of the artifact",
            "no tensors of a checkpoint",
            "some: another store may have it",
        ));
    };
    let (seen, again);
    let (inputs, layers) = match row.source.tensors.iter().any(|tensor| tensor.stored_as.is_some()) {
        false => (inputs, layers),
        true => {
            let source = seen_again(inputs.shared_source(), std::iter::once(row));
            again = source.layers();
            seen = Inputs::new(source, inputs.calibration.clone());
            (&seen, &again[..])
        }
    };
    let holds = |layer: &&SourceLayer| match &layer.content {
        SourceContent::Tensors { weight, .. } => weight.name == wanted.tensor,
        SourceContent::Ready { .. } => layer.name == row.layer,
    };
    let layer = layers.iter().find(holds).or_else(|| layers.iter().find(|layer| layer.name == row.layer));
    let layer =
        layer.ok_or_else(|| Error::expected("tensor to make the layer of", "none of its name", &wanted.tensor))?;
    let mut planned = Planned { source: layer.clone(), method: None, calibrated: false, rule: None, tied: false };
    let (_, source) = planned.recipe(inputs)?;
    let hashes = |tensors: &[SourceTensor]| tensors.iter().map(|t| t.hash.clone()).collect::<Vec<_>>();
    if hashes(&source.tensors) != hashes(&row.source.tensors) {
        let what = format!("content of tensor '{}'", wanted.tensor);
        let found = source.tensors.first().map_or("none".to_owned(), |tensor| format!("BLAKE3 {}", tensor.hash));
        return Err(Error::expected(what, found, format!("{}, which the layer was made from", wanted.hash)));
    }
    let as_it_is = planned.clone();
    // What no rule made is stored bit for bit.
    if registry::is_linear(&row.method) && row.method != Dense::NAME {
        let method = registry::method(row.method.as_str())?.settings_of(&row.config)?;
        let shape = planned.lengths()?;
        if let Some(calibration) = &inputs.calibration {
            planned.calibrated = calibration.check(&layer.name, shape.in_features)?;
        }
        method.check(shape, planned.calibrated)?;
        planned.method = Some(method);
    }
    // A layer that comes ready may be of a method that rules have, too.
    let ready = matches!(layer.content, SourceContent::Ready { .. }).then(|| as_it_is.make(inputs)).transpose()?;
    let (made, recipe) = match ready.filter(|made| made.parts.id() == id) {
        Some(made) => (made, as_it_is.recipe(inputs)?.0),
        None => (planned.make(inputs)?, planned.recipe(inputs)?.0),
    };
    let found = made.parts.id();
    if found != id {
        return Err(Error::expected(
            "artifact made again with the settings of the catalogue",
            found,
            format!(
                "{id}: it depends on what the catalogue does not hold, as calibration and rules that adapt to a layer do; import the checkpoint again as before"
            ),
        ));
    }
    let (relative_error, error_basis) = (made.relative_error, made.error_basis);
    Ok((made.parts, Provenance { recipe, relative_error, error_basis }))
}
