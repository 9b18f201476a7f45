//! Artifacts, written: gathered, then appended table by table in few large fragments, then listed as complete.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use chrono::Utc;
use layerstore_core::layer::registry;
use serde_json::Value;

use super::agreement::DataTables;
use super::append::{Written, append, append_rows};
use super::batches::{ArtifactRows, Layout};
use super::catalogue::{self, Scope, replace};
use super::format::Format;
use super::lock::{self, Guard};
use super::mend::mend;
use super::record::{ArtifactRecord, ErrorBasis, LayerRecord, RowLocations, TableRows, artifacts_batches};
use super::relist::relist;
use super::schema::{ARTIFACTS, Table, WEIGHT_BLOCKS};
use super::shared::Shared;
use super::synced;
use super::waiting::Waiting;
use crate::error::{Error, Result};
use crate::layer::{ArtifactId, MethodName, Parts};
use crate::tasks::unwrap_join;

/// Bytes of parts and settings gathered before they are written: the memory that an import takes beside the layer at work. Rows
/// are made of them while they are written, a batch at a time.
const PENDING_BYTES: u64 = 256 << 20;

/// What an artifact was made from, and how well it stands for it.
#[derive(Debug, Clone, Copy)]
pub struct Provenance {
    /// BLAKE3 of source, settings and calibration inputs.
    pub recipe: [u8; 32],
    /// How far the artifact is from its source; `None` where no finite number describes it.
    pub relative_error: Option<f64>,
    /// What the error was measured over.
    pub error_basis: ErrorBasis,
}

/// An artifact that the store holds already.
#[derive(Debug, Clone, PartialEq)]
pub struct ArtifactInfo {
    /// Its name.
    pub artifact: ArtifactId,
    /// How it is compressed.
    pub method: MethodName,
    /// The parts' config.
    pub config: Value,
    /// Bytes of its arrays.
    pub stored_bytes: u64,
    /// How far it is from its source, as measured when it was made.
    pub relative_error: Option<f64>,
    /// What the error was measured over.
    pub error_basis: ErrorBasis,
}

/// What a writer knows of an artifact that the store has, or will have with the next flush.
#[derive(Debug, Clone)]
struct Known {
    locations: RowLocations,
    recipe: [u8; 32],
    content: Content,
}

/// Whether what the store has of an artifact is what its name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    /// Nobody has looked.
    Unknown,
    /// It is, or this writer writes it.
    Sound,
    /// It is not.
    Damaged,
}

/// One change of a model, from its first artifact to its commit. Nobody sees any of it before [`Writer::commit`];
/// dropping it leaves the catalogue as it was.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    _guard: Guard,
    /// The store's format, which does not change while the guard is held.
    format: &'static Format,
    /// Artifacts that are complete in the store, by recipe.
    recipes: HashMap<[u8; 32], ArtifactInfo>,
    known: HashMap<ArtifactId, Known>,
    /// Artifacts that are listed, and whose rows are not there.
    lost: HashMap<ArtifactId, ArtifactRecord>,
    /// Where versions say that artifacts are which are not listed.
    unlisted: HashMap<ArtifactId, RowLocations>,
    pending: Vec<(ArtifactRecord, ArtifactRows)>,
    /// Artifacts to be written in the place of damaged rows.
    again: Vec<ArtifactRows>,
    /// Memory that is taken by what is pending or to be written again.
    pending_bytes: u64,
    /// Bytes of the arrays of artifacts that were new, written or pending.
    added_bytes: u64,
    /// Set while rows are being written: what was gathered is gone if that fails or is given up.
    broken: bool,
    /// The lock of commits, where it was taken ahead.
    commit: Option<Guard>,
}

impl Writer {
    /// Takes the lock of imports, and reads which artifacts the store has.
    ///
    /// # Errors
    /// When the storage refuses.
    pub(super) async fn begin(shared: &Arc<Shared>) -> Result<Self> {
        let location = &shared.location;
        let guard = lock::importing(location).await?;
        let format = location.format_of(&catalogue::open(location, None).await?)?;
        let mut writer = Writer {
            shared: shared.clone(),
            _guard: guard,
            format,
            recipes: HashMap::new(),
            known: HashMap::new(),
            lost: HashMap::new(),
            unlisted: HashMap::new(),
            pending: vec![],
            again: vec![],
            pending_bytes: 0,
            added_bytes: 0,
            broken: false,
            commit: None,
        };
        let mut tables = DataTables::of(location);
        for record in shared.data.records().await? {
            if tables.lack(record.artifact, &record.locations, false).await?.is_some() {
                writer.lost.insert(record.artifact, record);
                continue;
            }
            let (locations, recipe) = (record.locations, record.recipe);
            writer.known.insert(record.artifact, Known { locations, recipe, content: Content::Unknown });
            let stored = ArtifactInfo {
                artifact: record.artifact,
                method: record.method,
                config: record.config,
                stored_bytes: record.stored_bytes,
                relative_error: record.relative_error,
                error_basis: record.error_basis,
            };
            writer.recipes.insert(recipe, stored);
        }
        Ok(writer)
    }

    /// Returns whether the store has an artifact, or will have it with the next flush.
    pub(super) fn has(&self, artifact: &ArtifactId) -> bool {
        self.known.contains_key(artifact)
    }

    /// Returns the records of artifacts that are listed, and whose rows are not there.
    pub(super) fn lost(&self) -> &HashMap<ArtifactId, ArtifactRecord> {
        &self.lost
    }

    /// Lists artifacts whose rows are there and are what their names stand for.
    pub(super) async fn list(&mut self, records: Vec<ArtifactRecord>) -> Result<()> {
        let (moved, new): (Vec<_>, Vec<_>) = records.into_iter().partition(|r| self.lost.contains_key(&r.artifact));
        if !new.is_empty() {
            append((&self.shared.location, self.format), ARTIFACTS, artifacts_batches(&new)?).await?;
        }
        if !moved.is_empty() {
            let list = self.shared.location.open_for_write(ARTIFACTS).during("opening the table of artifacts").await?;
            relist(list, &moved.iter().map(|r| (r.artifact, r.locations.clone())).collect()).await?;
        }
        for record in new.into_iter().chain(moved) {
            let recipe = self.lost.remove(&record.artifact).map_or(record.recipe, |listed| listed.recipe);
            let known = Known { locations: record.locations, recipe, content: Content::Sound };
            self.known.insert(record.artifact, known);
        }
        Ok(())
    }

    /// Says that what the store has of an artifact is not what was written: it is written anew when it is added.
    pub(super) fn distrust(&mut self, artifact: &ArtifactId) {
        if let Some(known) = self.known.get_mut(artifact) {
            known.content = Content::Damaged;
        }
    }

    /// Returns the artifact that was made by this recipe, if the store has it and it is what was written: its rows are read, and
    /// hashed.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn reusable(&mut self, recipe: &[u8; 32]) -> Result<Option<ArtifactInfo>> {
        let Some(stored) = self.made_by(recipe).cloned() else { return Ok(None) };
        Ok(self.is_sound(stored.artifact).await?.then_some(stored))
    }

    /// Returns whether what the store has of an artifact is what its name stands for: read and hashed where nobody has looked.
    ///
    /// # Errors
    /// When the storage refuses.
    pub(crate) async fn is_sound(&mut self, id: ArtifactId) -> Result<bool> {
        let Some(known) = self.known.get(&id) else { return Ok(false) };
        if known.content != Content::Unknown {
            return Ok(known.content == Content::Sound);
        }
        let record = self.record(id).await?;
        let content = match self.shared.data.parts(&record).await {
            Ok(parts) => match unwrap_join(tokio::task::spawn_blocking(move || parts.id()).await)? == id {
                true => Content::Sound,
                false => Content::Damaged,
            },
            Err(Error::Corrupt { .. }) => Content::Damaged,
            Err(e) => return Err(e),
        };
        if let Some(known) = self.known.get_mut(&id) {
            known.content = content;
        }
        Ok(content == Content::Sound)
    }

    /// Returns the row of an artifact that the store has.
    async fn record(&self, id: ArtifactId) -> Result<ArtifactRecord> {
        let known = self.known.get(&id).map(|known| (known.recipe, known.locations.clone()));
        let stored = known.as_ref().and_then(|(recipe, _)| self.recipes.get(recipe));
        match (known.as_ref(), stored.filter(|stored| stored.artifact == id)) {
            (Some((recipe, locations)), Some(stored)) => Ok(ArtifactRecord {
                artifact: id,
                method: stored.method.clone(),
                config: stored.config.clone(),
                locations: locations.clone(),
                stored_bytes: stored.stored_bytes,
                recipe: *recipe,
                relative_error: stored.relative_error,
                error_basis: stored.error_basis,
                created_at: Utc::now(),
            }),
            // Two artifacts of one recipe.
            _ => self.shared.data.record(id).await,
        }
    }

    /// Returns the parts of an artifact that the store has, what is not written yet being written first.
    ///
    /// # Errors
    /// When the storage refuses.
    pub(crate) async fn parts(&mut self, id: ArtifactId) -> Result<Parts> {
        self.flush().await?;
        let record = self.record(id).await?;
        self.shared.data.parts(&record).await
    }

    /// Returns the artifact that was made by this recipe, if the store has it.
    pub fn made_by(&self, recipe: &[u8; 32]) -> Option<&ArtifactInfo> {
        self.recipes.get(recipe)
    }

    /// Returns the bytes of parts written so far; what the store held already is not counted.
    pub fn written_bytes(&self) -> u64 {
        self.added_bytes
    }

    /// Notes where a version says that an artifact is which is not listed, and whose rows there are not what was written.
    pub(super) fn note_unlisted(&mut self, artifact: ArtifactId, locations: &RowLocations) {
        if !locations.0.is_empty() {
            self.unlisted.insert(artifact, locations.clone());
        }
    }

    /// How the rows of an artifact are to lie: as they did where the store has it or had it, since the catalogue says how many rows of
    /// which tables it has; else as in the store's format.
    fn layout_of(&self, id: &ArtifactId) -> Layout {
        let lost = || self.lost.get(id).map(|record| &record.locations);
        if let Some(locations) = self.known.get(id).map(|known| &known.locations).or_else(lost) {
            return Layout::of(locations);
        }
        match self.shared.location.formats().schema(WEIGHT_BLOCKS, self.format.version) {
            Some(_) => Layout::Blocks,
            None => Layout::Rows,
        }
    }

    /// Adds an artifact, unless the store has it. Returns its name, and whether it is written: it was new, or what the store had of it
    /// was not what was written, and is replaced. What is written is built into a layer first, so that nothing is stored that cannot
    /// be loaded.
    ///
    /// # Errors
    /// When no layer can be built from the parts, a number of theirs is not finite, they do not fit the tables, or the storage
    /// refuses.
    pub async fn add(&mut self, parts: &Parts, provenance: Provenance) -> Result<(ArtifactId, bool)> {
        let id = parts.id();
        if self.is_sound(id).await? {
            self.recipes.insert(provenance.recipe, info(id, parts, provenance));
            return Ok((id, false));
        }
        let built = parts.clone();
        unwrap_join(tokio::task::spawn_blocking(move || registry::rebuilt_layer(&built).map(drop)).await)??;
        if let Some(locations) = self.unlisted.remove(&id)
            && !self.known.contains_key(&id)
            && !self.lost.contains_key(&id)
        {
            // A version leads readers to the damaged rows: they are listed, and replaced like any others.
            self.commit = None;
            self.list(vec![ArtifactRecord { locations, ..record(id, parts, provenance) }]).await?;
        }
        let rows = ArtifactRows::new(id, parts.clone(), self.layout_of(&id))?;
        let (recipe, held_bytes) = (provenance.recipe, rows.held_bytes());
        self.recipes.insert(recipe, info(id, parts, provenance));
        if self.known.contains_key(&id) || self.lost.remove(&id).is_some() {
            self.again.push(rows);
        } else {
            self.pending.push((record(id, parts, provenance), rows));
        }
        let known = self.known.entry(id).or_insert(Known {
            locations: RowLocations::default(),
            recipe,
            content: Content::Unknown,
        });
        known.content = Content::Sound;
        self.added_bytes += parts.stored_bytes();
        self.gathered(held_bytes).await?;
        Ok((id, true))
    }

    /// Adds an artifact that was read whole, and whose rows some tables have lost: they are written once more, as they lay, and the
    /// list is told. What was lost is not the change's own, and its bytes are not counted.
    pub(super) async fn complete(&mut self, parts: &Parts, provenance: Provenance, layout: Layout) -> Result<()> {
        let id = parts.id();
        let rows = ArtifactRows::new(id, parts.clone(), layout)?;
        let held_bytes = rows.held_bytes();
        self.recipes.insert(provenance.recipe, info(id, parts, provenance));
        self.pending.push((record(id, parts, provenance), rows));
        let (locations, recipe) = (RowLocations::default(), provenance.recipe);
        self.known.insert(id, Known { locations, recipe, content: Content::Sound });
        self.gathered(held_bytes).await
    }

    /// Counts the memory of what was gathered, and writes it where it is much.
    async fn gathered(&mut self, held_bytes: u64) -> Result<()> {
        self.pending_bytes += held_bytes;
        match self.pending_bytes >= PENDING_BYTES {
            true => self.flush().await,
            false => Ok(()),
        }
    }

    /// Writes what was gathered: data rows first, then the list of complete artifacts; then damaged artifacts anew.
    ///
    /// # Errors
    /// When the storage refuses. Rows that were written stay unseen, for gc.
    pub async fn flush(&mut self) -> Result<()> {
        if self.broken {
            return Err(Error::Storage {
                action: "writing artifacts".into(),
                message: "an earlier write of this writer failed; begin again with a new one".into(),
                source: None,
            });
        }
        if self.pending.is_empty() && self.again.is_empty() {
            return Ok(());
        }
        self.broken = true;
        // A table that is made now takes the lock for itself, and so does whoever replaces rows.
        self.commit = None;
        let pending = std::mem::take(&mut self.pending);
        let records = self.write_rows(pending).await?;
        self.list(records).await?;
        for (artifact, locations) in mend(&self.shared, self.format, std::mem::take(&mut self.again)).await? {
            if let Some(known) = self.known.get_mut(&artifact) {
                known.locations = locations;
            }
        }
        self.pending_bytes = 0;
        self.broken = false;
        Ok(())
    }

    /// Writes what was gathered and waits for the lock of commits, so that the commit itself waits for nobody.
    pub(crate) async fn ready(&mut self) -> Result<()> {
        self.flush().await?;
        if self.commit.is_none() {
            self.commit = Some(lock::committing(&self.shared.location).await?);
        }
        Ok(())
    }

    /// Appends the rows of artifacts to their tables, and notes in the records where they are.
    async fn write_rows(&self, pending: Vec<(ArtifactRecord, ArtifactRows)>) -> Result<Vec<ArtifactRecord>> {
        let (mut records, artifacts): (Vec<ArtifactRecord>, Vec<ArtifactRows>) = pending.into_iter().unzip();
        let artifacts = Arc::new(artifacts);
        let tables: BTreeSet<Table> = artifacts.iter().flat_map(|rows| rows.tables().map(|(table, _)| table)).collect();
        for table in tables {
            let name = table.name();
            let mut written = Written::new(append_rows((&self.shared.location, self.format), table, &artifacts).await?);
            for (record, rows) in records.iter_mut().zip(artifacts.iter()) {
                let rows: u64 = rows.tables().filter(|(of, _)| *of == table).map(|(_, rows)| rows).sum();
                if rows == 0 {
                    continue;
                }
                let ranges = written.take(rows).ok_or_else(|| Error::Storage {
                    action: format!("appending to table '{name}'"),
                    message: "fewer rows were written than given".into(),
                    source: None,
                })?;
                record.locations.0.insert(name.clone(), TableRows { rows, ranges });
            }
        }
        Ok(records)
    }

    /// Makes `records` all that the store holds of `model`, as one new version, and returns its number. Where that is so
    /// already, no version is made and the latest one's number is returned.
    ///
    /// # Errors
    /// When a record names an artifact that is not in the store, or the storage refuses: then nothing has changed.
    pub async fn commit(self, model: &str, records: &[LayerRecord], message: Option<&str>) -> Result<u64> {
        let operation = if records.is_empty() { "remove" } else { "import" };
        self.commit_in((model, Scope::Model), records, (operation, message)).await
    }

    /// Puts `records` in the place of the model's layers of the same names, as one new version, and returns its number. Other layers
    /// of the model stay as they are in the latest version, whoever has changed them since the writer began.
    ///
    /// # Errors
    /// As [`Writer::commit`].
    pub async fn commit_layers(self, model: &str, records: &[LayerRecord], message: Option<&str>) -> Result<u64> {
        self.commit_in((model, Scope::Layers), records, ("import", message)).await
    }

    /// Commits layers as [`Writer::commit_layers`] does; the log calls it training.
    ///
    /// # Errors
    /// As [`Writer::commit`].
    pub(crate) async fn commit_trained(self, model: &str, records: &[LayerRecord], message: &str) -> Result<u64> {
        self.commit_in((model, Scope::Layers), records, ("train", Some(message))).await
    }

    /// Puts `records` in the place of what is in a scope. The log has the operation, with the model's name, and the message.
    ///
    /// # Errors
    /// As [`Writer::commit`].
    pub(crate) async fn commit_in(
        mut self,
        (model, scope): (&str, Scope<'_>),
        records: &[LayerRecord],
        (operation, message): (&str, Option<&str>),
    ) -> Result<u64> {
        check_model_name(model)?;
        if let Some(record) = records.iter().find(|r| r.model != model) {
            return Err(Error::expected(format!("model of layer '{}'", record.layer), &record.model, model));
        }
        if let Some(record) = records.iter().find(|r| !self.known.contains_key(&r.artifact)) {
            return Err(Error::expected(
                format!("artifact of layer '{}'", record.layer),
                record.artifact,
                "one that was added",
            ));
        }
        let mut names = HashSet::new();
        if let Some(record) = records.iter().find(|r| !names.insert(r.layer.as_str())) {
            return Err(Error::expected(
                format!("layers of model '{model}'"),
                format!("'{}' twice", record.layer),
                "each name once",
            ));
        }
        self.ready().await?;
        let mut records = records.to_vec();
        let mut tables = BTreeSet::from([ARTIFACTS.to_owned()]);
        for record in &mut records {
            record.locations =
                self.known.get(&record.artifact).map_or_else(RowLocations::default, |k| k.locations.clone());
            tables.extend(record.locations.0.keys().cloned());
        }
        // Of artifacts that the store had, nobody may have seen to it.
        synced::tables(self.shared.location.local(), tables)
            .await
            .map_err(|e| Error::io(self.shared.location.uri(), e))?;
        replace(&self.shared.location, (model, scope), &records, operation, message).await
    }
}

/// What a writer tells of an artifact.
fn info(artifact: ArtifactId, parts: &Parts, provenance: Provenance) -> ArtifactInfo {
    ArtifactInfo {
        artifact,
        method: parts.method.clone(),
        config: parts.config.clone(),
        stored_bytes: parts.stored_bytes(),
        relative_error: provenance.relative_error,
        error_basis: provenance.error_basis,
    }
}

/// What the list is to say of an artifact whose rows are not written yet.
fn record(artifact: ArtifactId, parts: &Parts, provenance: Provenance) -> ArtifactRecord {
    ArtifactRecord {
        artifact,
        method: parts.method.clone(),
        config: parts.config.clone(),
        locations: RowLocations::default(),
        stored_bytes: parts.stored_bytes(),
        recipe: provenance.recipe,
        relative_error: provenance.relative_error,
        error_basis: provenance.error_basis,
        created_at: Utc::now(),
    }
}

/// Checks a model's name: 1 to 256 bytes, no control characters, no space at either end.
///
/// # Errors
/// [`Error::InvalidName`] when it is not so.
pub fn check_model_name(name: &str) -> Result<()> {
    check_name("model", name)
}

/// Checks a layer's name, of those that are given by whoever saves them, as [`check_model_name`].
pub(super) fn check_layer_name(name: &str) -> Result<()> {
    check_name("layer", name)
}

fn check_name(what: &'static str, name: &str) -> Result<()> {
    let reason = if name.is_empty() || name.len() > 256 {
        "it has to have 1 to 256 bytes"
    } else if name.chars().any(char::is_control) {
        "it holds a control character"
    } else if name.trim() != name {
        "it starts or ends with a space"
    } else {
        return Ok(());
    };
    Err(Error::InvalidName { what, name: name.escape_debug().to_string(), reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_be_trouble() {
        for bad in ["", " a", "a\n", "a\0b", &"x".repeat(300)] {
            assert!(check_model_name(bad).is_err(), "{bad:?}");
        }
        assert!(check_model_name("org/model-7b v2 'quoted'").is_ok());
    }
}
