//! The store at one version: a consistent whole, whatever is committed meanwhile.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use lance::Dataset;
use serde::Serialize;

use super::catalogue::Catalogue;
use super::handle::LayerHandle;
use super::listed::Listed;
use super::record::{ErrorBasis, LayerRecord};
use super::rows;
use super::settings::{SettingChange, changed_settings};
use super::shared::Shared;
use super::stats::{self, Stats};
use crate::error::{Error, Result, closest};
use crate::layer::{ArtifactId, MethodName};

/// A version of the store, open for reading.
#[derive(Debug, Clone)]
pub struct Snapshot {
    shared: Arc<Shared>,
    catalogue: Catalogue,
    label: String,
}

/// One model of a snapshot.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelSummary {
    /// Its name.
    pub model: String,
    /// How many layers it has.
    pub layers: u64,
    /// How many of them each method has.
    pub methods: BTreeMap<String, u64>,
    /// How many files it has beside them.
    pub files: u64,
    /// Bytes of its layers in their checkpoints.
    pub dense_bytes: u64,
    /// Bytes of the artifacts of its layers and files; one that several share counts once.
    pub stored_bytes: u64,
    /// When its newest layer was stored.
    pub created_at: DateTime<Utc>,
}

/// How two versions differ.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Diff {
    /// Layers of the newer version alone.
    pub added: Vec<LayerState>,
    /// Layers of the older version alone.
    pub removed: Vec<LayerState>,
    /// Layers of both that are not the same.
    pub changed: Vec<LayerChange>,
}

/// A layer as one version has it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerState {
    /// The layer's model.
    pub model: String,
    /// The layer's name.
    pub layer: String,
    /// What is said of it.
    #[serde(flatten)]
    pub state: State,
}

/// A layer that both versions have, differently.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerChange {
    /// The layer's model.
    pub model: String,
    /// The layer's name.
    pub layer: String,
    /// What the older version says of it.
    pub before: State,
    /// What the newer version says of it.
    pub after: State,
    /// The settings that changed.
    pub settings: Vec<SettingChange>,
}

/// What `diff` and `compare` tell of a layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct State {
    /// How it is compressed.
    pub method: MethodName,
    /// The artifact's name.
    pub artifact: String,
    /// How far it is from the dense layer; `None` where no finite number describes it.
    pub relative_error: Option<f64>,
    /// What the error was measured over.
    pub error_basis: ErrorBasis,
    /// Bytes of the artifact's arrays.
    pub stored_bytes: u64,
    /// Its settings.
    pub config: serde_json::Value,
}

impl From<&LayerRecord> for State {
    fn from(r: &LayerRecord) -> Self {
        State {
            method: r.method.clone(),
            artifact: r.artifact.to_string(),
            relative_error: r.relative_error,
            error_basis: r.error_basis,
            stored_bytes: r.stored_bytes,
            config: r.config.clone(),
        }
    }
}

impl From<&LayerRecord> for LayerState {
    fn from(r: &LayerRecord) -> Self {
        LayerState { model: r.model.clone(), layer: r.layer.clone(), state: r.into() }
    }
}

impl Snapshot {
    /// Returns the snapshot of a catalogue; messages call it by `label`, or by its version.
    pub(super) fn new(shared: Arc<Shared>, catalogue: Catalogue, label: Option<&str>) -> Self {
        let version = catalogue.dataset().version_id();
        let label = label.map_or_else(|| format!("version {version}"), |l| format!("'{l}'"));
        Snapshot { shared, catalogue, label }
    }

    /// Returns the version's number.
    pub fn version(&self) -> u64 {
        self.dataset().version_id()
    }

    /// Returns the address of the store that the snapshot is of.
    pub(crate) fn uri(&self) -> &str {
        self.shared.location.uri()
    }

    /// Returns what artifacts were made from and how, as [`Provenance::recipe`](super::Provenance::recipe): those that are listed.
    ///
    /// # Errors
    /// When the list of artifacts cannot be read.
    pub(crate) async fn recipes(&self, of: &[ArtifactId]) -> Result<HashMap<ArtifactId, [u8; 32]>> {
        let listed = Listed::open(&self.shared.location).await?;
        let mut recipes = HashMap::new();
        for record in listed.rest().await? {
            recipes.entry(record.artifact).or_insert(record.recipe);
        }
        for id in of {
            if !recipes.contains_key(id) {
                let covered = listed.covered_of_artifact(*id).await?;
                recipes.extend(covered.first().map(|record| (*id, record.recipe)));
            }
        }
        Ok(recipes)
    }

    /// Returns what the snapshot shares with its store.
    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Returns the catalogue's table at this version.
    pub(super) fn dataset(&self) -> &Dataset {
        self.catalogue.dataset()
    }

    /// Returns every layer, by model and name.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub async fn records(&self) -> Result<Vec<LayerRecord>> {
        rows::rows(&self.shared.location, self.dataset(), None).await
    }

    /// Returns every model, by name.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub async fn models(&self) -> Result<Vec<ModelSummary>> {
        Ok(summaries(self.records().await?))
    }

    /// Returns what [`Snapshot::models`] says of one model.
    ///
    /// # Errors
    /// When there is no such model.
    pub async fn summary(&self, model: &str) -> Result<ModelSummary> {
        let summary = summaries(self.rows(model).await?).pop();
        summary.ok_or_else(|| Error::expected("models of that name", 0, 1))
    }

    /// Returns the layers of a model, by name; [`Snapshot::files`] has what belongs to it beside them.
    ///
    /// # Errors
    /// When there is no such model.
    pub async fn layers(&self, model: &str) -> Result<Vec<LayerRecord>> {
        let mut rows = self.rows(model).await?;
        rows.retain(|record| !record.is_file());
        Ok(rows)
    }

    /// Returns all rows of a model, by name: its layers and its files.
    ///
    /// # Errors
    /// When there is no such model.
    pub(crate) async fn rows(&self, model: &str) -> Result<Vec<LayerRecord>> {
        let rows = rows::rows_of(&self.shared.location, self.catalogue.dataset(), &[model]).await?;
        if rows.is_empty() {
            return Err(self.unknown_model(model).await?);
        }
        Ok(rows.into_iter().map(|(_, record)| record).collect())
    }

    /// Returns a layer by name, to be loaded when it is used. The files that it lies in are opened now.
    ///
    /// # Errors
    /// When there is no such model or layer: the message gives the closest names.
    pub async fn layer(&self, model: &str, layer: &str) -> Result<LayerHandle> {
        let location = &self.shared.location;
        if let Some(record) = self.catalogue.find(location, model, layer).await? {
            self.shared.data.open_ahead(std::slice::from_ref(&record)).await?;
            return Ok(self.handle(record));
        }
        let layers = self.catalogue.layers_of(location, model).await?;
        if layers.is_empty() {
            return Err(self.unknown_model(model).await?);
        }
        Err(Error::UnknownLayer {
            model: model.to_owned(),
            layer: layer.to_owned(),
            at: self.label.clone(),
            closest: closest(layer, layers.iter().map(String::as_str), 5),
        })
    }

    /// Returns all layers of a model, by name, with one look at the catalogue for all of them.
    ///
    /// # Errors
    /// When there is no such model.
    pub async fn handles(&self, model: &str) -> Result<Vec<LayerHandle>> {
        let records = self.layers(model).await?;
        self.handles_of(records).await
    }

    /// Returns handles of rows of this snapshot, whose files are opened now.
    pub(crate) async fn handles_of(&self, records: Vec<LayerRecord>) -> Result<Vec<LayerHandle>> {
        self.shared.data.open_ahead(&records).await?;
        Ok(records.into_iter().map(|record| self.handle(record)).collect())
    }

    /// Returns the layer of a row of this snapshot.
    pub fn handle(&self, record: LayerRecord) -> LayerHandle {
        LayerHandle::new(self.shared.clone(), record)
    }

    /// Returns the error of a name that no model has.
    pub(super) async fn unknown_model(&self, model: &str) -> Result<Error> {
        let all = self.catalogue.models().await?;
        let known = closest(model, all.iter().map(String::as_str), all.len());
        Ok(Error::UnknownModel { model: model.to_owned(), at: self.label.clone(), known })
    }

    /// Counts what the store holds, as this version tells.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn stats(&self) -> Result<Stats> {
        stats::stats(&self.shared, self.dataset(), &self.records().await?).await
    }

    /// Compares this version with a `newer` one, layer by layer.
    ///
    /// # Errors
    /// When a catalogue cannot be read.
    pub async fn diff(&self, newer: &Snapshot) -> Result<Diff> {
        let keyed = |rows: Vec<LayerRecord>| {
            rows.into_iter().map(|r| ((r.model.clone(), r.layer.clone()), r)).collect::<BTreeMap<_, _>>()
        };
        let (before, after) = (keyed(self.records().await?), keyed(newer.records().await?));
        let mut diff = Diff::default();
        for (key, old) in &before {
            match after.get(key) {
                None => diff.removed.push(old.into()),
                Some(new) if new.artifact != old.artifact || new.config != old.config => {
                    diff.changed.push(LayerChange {
                        model: key.0.clone(),
                        layer: key.1.clone(),
                        before: old.into(),
                        after: new.into(),
                        settings: changed_settings(old, new),
                    });
                }
                Some(_) => {}
            }
        }
        diff.added.extend(after.iter().filter(|(key, _)| !before.contains_key(*key)).map(|(_, r)| r.into()));
        Ok(diff)
    }
}

/// Sums rows up, model by model.
fn summaries(rows: Vec<LayerRecord>) -> Vec<ModelSummary> {
    let mut models: BTreeMap<String, ModelSummary> = BTreeMap::new();
    let mut counted = HashSet::new();
    for r in rows {
        let model = models.entry(r.model.clone()).or_insert_with(|| ModelSummary {
            model: r.model.clone(),
            layers: 0,
            methods: BTreeMap::new(),
            files: 0,
            dense_bytes: 0,
            stored_bytes: 0,
            created_at: r.created_at,
        });
        if r.is_file() {
            model.files += 1;
        } else {
            model.layers += 1;
            *model.methods.entry(r.method.to_string()).or_default() += 1;
        }
        model.dense_bytes += r.dense_bytes;
        if counted.insert((r.model.clone(), r.artifact)) {
            model.stored_bytes += r.stored_bytes;
        }
        model.created_at = model.created_at.max(r.created_at);
    }
    models.into_values().collect()
}
