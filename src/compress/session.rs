//! Layers on their way into the store, one after another.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use chrono::Utc;
use serde_json::Value;

use layerstore_core::layer::{configured, layer_from_parts};

use super::attention::PlannedBlock;
use super::calibration::CalibrationFile;
use super::inputs::Inputs;
use super::items::{Compressed, Item};
use super::plan::Planned;
use super::report::{CompressReport, ImportReport, LayerReport};
use super::text_calibration::{Observed, TextCalibration};
use crate::error::{Error, Result};
use crate::formats::{SideFile, TensorInfo};
use crate::layer::{CorrectionReport, Parts, SearchReport, SharedLayer};
use crate::store::{
    ArtifactInfo, LayerRecord, ModelFile, Provenance, RowLocations, Source, Store, Writer, adapted, weight_bits,
};
use crate::tasks::{unless_cancelled, unwrap_join};
use crate::work::{Cancel, Progress};

/// What is said of a layer that the store had, when what it had was not what was written.
const DAMAGED: &str = "what the store had of it was damaged: it was made again";

/// Bytes of two layers' tensors that may be in memory at once, also where no layer has as many.
const AHEAD_BYTES: u64 = 256 << 20;

/// What a report says beside what became of the layers.
pub(super) struct Remarks {
    pub unused_rules: Vec<String>,
    pub unmatched_calibration: Vec<String>,
    pub notes: Vec<String>,
}

/// A model's layers on their way into its catalogue. When it goes, whether they got there or not, the work is over.
pub(super) struct ImportSession<'a> {
    model: &'a str,
    progress: &'a Arc<dyn Progress>,
    cancel: &'a Cancel,
    /// Taken by the commit.
    writer: Option<Writer>,
    pub layers: Vec<LayerReport>,
    files: Vec<ModelFile>,
    pub records: Vec<LayerRecord>,
    /// The tensor that the next layer is made of, to be read while this one is made.
    next: Option<TensorInfo>,
}

impl<'a> ImportSession<'a> {
    pub async fn begin(
        store: &Store,
        model: &'a str,
        progress: &'a Arc<dyn Progress>,
        cancel: &'a Cancel,
    ) -> Result<ImportSession<'a>> {
        let mut session = ImportSession {
            model,
            progress,
            cancel,
            writer: None,
            layers: vec![],
            files: vec![],
            records: vec![],
            next: None,
        };
        session.writer = Some(cancel.unless(store.writer()).await?);
        Ok(session)
    }

    /// Adds the layers of a model's blocks, and attention blocks with them, while the model reads a text: each block is made of what its
    /// layers' inputs are by then.
    pub async fn add_while_reading(
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
            let inputs = Arc::new(inputs.with(Some(Arc::new(found)), Some(Arc::new(heads))));
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

    /// Adds layers in turn. While one is made, the tensor of the next is read, where both together take no more memory than the largest
    /// layer, or than [`AHEAD_BYTES`].
    pub async fn add_all(&mut self, inputs: &Arc<Inputs>, layers: Vec<Planned>) -> Result<()> {
        let bytes = layers.iter().map(Planned::dense_bytes).collect::<Result<Vec<u64>>>()?;
        let most = bytes.iter().copied().max().unwrap_or_default().max(AHEAD_BYTES);
        let tensors: Vec<Option<TensorInfo>> = layers.iter().map(|layer| layer.tensor().cloned()).collect();
        for (place, layer) in layers.into_iter().enumerate() {
            let fits = bytes.get(place + 1).is_some_and(|next| bytes[place].saturating_add(*next) <= most);
            self.next = if fits { tensors[place + 1].clone() } else { None };
            self.add(inputs, layer).await?;
        }
        Ok(())
    }

    /// Makes a layer, or finds that the store has what it would be.
    pub async fn add<I: Item>(&mut self, inputs: &Arc<Inputs>, item: I) -> Result<()> {
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
        let there = self.cancel.unless(async { Ok(writer.made_by(&recipe).await?.is_some()) }).await?;
        let mut kept = None;
        let (stored, correction, reused) = match self.cancel.unless(writer.reusable(&recipe)).await? {
            Some(stored) => {
                inputs.ahead().forget_ahead();
                if keep {
                    kept = Some(self.cancel.unless(writer.parts(stored.artifact)).await?);
                }
                (stored, CorrectionReport::default(), true)
            }
            None => {
                if there {
                    notes.push(DAMAGED.to_owned());
                }
                let ahead = self.next.take().map(|tensor| {
                    let source = inputs.ahead().clone();
                    tokio::task::spawn_blocking(move || source.read_ahead(&tensor))
                });
                let work = {
                    let (inputs, item) = (inputs.clone(), item.clone());
                    unless_cancelled(self.cancel, move || item.make(&inputs)).await
                };
                if let Some(ahead) = ahead {
                    unwrap_join(ahead.await)?;
                }
                let made = work.map_err(|e| e.in_layer(item.name()))?;
                let Compressed { parts, correction, relative_error, error_basis, notes: more, search: found } = made;
                notes.extend(more);
                search = found;
                let made = writer.add(&parts, Provenance { recipe, relative_error, error_basis });
                let (_, new) = self.cancel.unless(made).await.map_err(|e| e.in_layer(item.name()))?;
                kept = keep.then_some(parts);
                let stored = writer.made_by(&recipe).await?.cloned().ok_or(Error::Cancelled)?;
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
    pub async fn add_file(&mut self, inputs: &Arc<Inputs>, file: SideFile) -> Result<()> {
        self.add(inputs, file).await?;
        self.layers.pop();
        self.files.extend(self.records.last().map(ModelFile::from));
        Ok(())
    }

    /// Writes what was made, for an import to find.
    pub async fn flush(mut self) -> Result<CompressReport> {
        let mut writer = self.writer.take().ok_or(Error::Cancelled)?;
        self.cancel.unless(writer.flush()).await?;
        Ok(CompressReport { layers: std::mem::take(&mut self.layers), written_bytes: writer.written_bytes() })
    }

    /// Makes all layers the model's, unless somebody has asked to stop.
    pub async fn commit(mut self, message: Option<&str>, remarks: Remarks) -> Result<ImportReport> {
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
pub(super) fn names_in_order(layers: &[Planned], blocks: &[PlannedBlock]) -> HashMap<String, usize> {
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
