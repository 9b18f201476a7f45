//! Artifacts, written: gathered, then appended table by table in few large fragments, then listed as complete.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::Utc;
use layerstore_core::layer::registry;

use super::batches::{ArtifactRows, Layout};
use super::change::{Made, Scope, Seen, replace};
use super::flushing::{self, Flushed, Flushing};
use super::format::Format;
use super::inventory::{ArtifactInfo, Inventory};
use super::lock::{self, Guard};
use super::mend::mend;
use super::properties::TableVersions;
use super::record::{ArtifactRecord, ErrorBasis, LayerRecord};
use super::row_locations::RowLocations;
use super::schema::{ARTIFACTS, WEIGHT_BLOCKS};
use super::shared::Shared;
use super::synced;
use crate::error::{Error, Result};
use crate::layer::{ArtifactId, Parts};
use crate::tasks::unwrap_join;

/// Bytes of parts and settings gathered before they are written. As many may be being written, so an import takes twice the memory
/// beside the layer at work. Rows are made of them while they are written, a batch at a time.
const PENDING_BYTES: u64 = 128 << 20;

/// How long artifacts are gathered before they are written, however few: the work that is lost where a process is killed.
const PENDING_TIME: Duration = Duration::from_secs(60);

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

/// One change of a model, from its first artifact to its commit. Nobody sees any of it before [`Writer::commit`];
/// dropping it leaves the catalogue as it was.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    guard: Arc<Guard>,
    /// The store's format, which does not change while the guard is held.
    format: &'static Format,
    /// The artifacts of the store.
    inventory: Inventory,
    /// The versions of tables that this writer has seen or written.
    seen: Seen,
    /// Where versions say that artifacts are which are not listed.
    unlisted: HashMap<ArtifactId, RowLocations>,
    pending: Vec<(ArtifactRecord, ArtifactRows)>,
    /// Artifacts to be written in the place of damaged rows.
    again: Vec<ArtifactRows>,
    /// Memory that is taken by what is pending or to be written again.
    pending_bytes: u64,
    /// Bytes of the arrays of artifacts that were new, written or pending.
    added_bytes: u64,
    /// What is being written.
    writing: Option<Flushing>,
    /// When that began, or the writer.
    handed_over: Instant,
    /// Set where a write has failed, and while rows are replaced: what was gathered is gone if that fails or is given up.
    broken: bool,
    /// The lock of commits, where it was taken ahead.
    commit: Option<Guard>,
}

impl Writer {
    /// Begins a change of a store of this format, whose lock of imports the guard is.
    ///
    /// # Errors
    /// When the storage refuses.
    pub(super) async fn begin(shared: &Arc<Shared>, guard: Guard, format: &'static Format) -> Result<Self> {
        Ok(Writer {
            shared: shared.clone(),
            guard: Arc::new(guard),
            format,
            inventory: Inventory::open(shared).await?,
            seen: Seen::nothing(),
            unlisted: HashMap::new(),
            pending: vec![],
            again: vec![],
            pending_bytes: 0,
            added_bytes: 0,
            writing: None,
            handed_over: Instant::now(),
            broken: false,
            commit: None,
        })
    }

    /// Reads the whole list of artifacts, and which versions all tables have: what a commit of this writer says of them.
    pub(super) async fn look_at_all(&mut self) -> Result<()> {
        self.inventory.look_at_all().await?;
        self.seen = Seen::All(TableVersions::latest(&self.shared.location).await?);
        Ok(())
    }

    /// Returns the artifacts of the store.
    pub(super) fn inventory(&self) -> &Inventory {
        &self.inventory
    }

    /// Lists artifacts whose rows are there and are what their names stand for.
    pub(super) async fn list(&mut self, records: Vec<ArtifactRecord>) -> Result<()> {
        let lost = self.lost_of(records.iter());
        let flushed = flushing::list((&self.shared, &self.guard), self.format, records, &lost).await?;
        self.note(flushed);
        Ok(())
    }

    /// Notes what was written.
    fn note(&mut self, Flushed { listed, versions }: Flushed) {
        versions.iter().for_each(|(table, version)| self.seen.note(table, *version));
        listed.into_iter().for_each(|record| self.inventory.note_listed(record));
    }

    /// Says that what the store has of an artifact is not what was written: it is written anew when it is added.
    pub(super) fn distrust(&mut self, artifact: &ArtifactId) {
        self.inventory.distrust(artifact);
    }

    /// Returns the artifact that was made by this recipe, if the store has it and it is what was written: its rows are read, and
    /// hashed.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn reusable(&mut self, recipe: &[u8; 32]) -> Result<Option<ArtifactInfo>> {
        let Some(stored) = self.made_by(recipe).await?.cloned() else { return Ok(None) };
        Ok(self.is_sound(stored.artifact).await?.then_some(stored))
    }

    /// Returns whether what the store has of an artifact is what its name stands for: read and hashed where nobody has looked.
    ///
    /// # Errors
    /// When the storage refuses.
    pub(crate) async fn is_sound(&mut self, id: ArtifactId) -> Result<bool> {
        self.inventory.is_sound(id).await
    }

    /// Returns the parts of an artifact that the store has, what is not written yet being written first.
    ///
    /// # Errors
    /// When the storage refuses.
    pub(crate) async fn parts(&mut self, id: ArtifactId) -> Result<Parts> {
        self.flush().await?;
        let record = self.inventory.record(id).await?;
        self.shared.data.parts(&record).await
    }

    /// Returns the artifact that was made by this recipe, if the store has it.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn made_by(&mut self, recipe: &[u8; 32]) -> Result<Option<&ArtifactInfo>> {
        self.inventory.made_by(recipe).await
    }

    /// Returns the bytes of parts written so far; what the store held already is not counted.
    pub fn written_bytes(&self) -> u64 {
        self.added_bytes
    }

    /// Notes where a version says that an artifact is which is not listed, and whose rows there are not what was written.
    pub(super) fn note_unlisted(&mut self, artifact: ArtifactId, locations: RowLocations) {
        if !locations.0.is_empty() {
            self.unlisted.insert(artifact, locations);
        }
    }

    /// How the rows of an artifact are to lie: as they did where the store has it or had it, since the catalogue says how many rows of
    /// which tables it has; else as in the store's format.
    fn layout_of(&self, id: &ArtifactId) -> Layout {
        if let Some(locations) = self.inventory.locations(id) {
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
            self.inventory.note_recipe(provenance.recipe, info(id, parts, provenance));
            return Ok((id, false));
        }
        let built = parts.clone();
        unwrap_join(tokio::task::spawn_blocking(move || registry::rebuilt_layer(&built).map(drop)).await)??;
        if let Some(locations) = self.unlisted.remove(&id)
            && self.inventory.locations(&id).is_none()
        {
            // A version leads readers to the damaged rows: they are listed, and replaced like any others.
            self.commit = None;
            self.list(vec![ArtifactRecord { locations, ..record(id, parts, provenance) }]).await?;
        }
        let rows = ArtifactRows::new(id, parts.clone(), self.layout_of(&id))?;
        let (recipe, held_bytes) = (provenance.recipe, rows.held_bytes());
        self.inventory.note_recipe(recipe, info(id, parts, provenance));
        match self.inventory.note_written(id, recipe) {
            true => self.pending.push((record(id, parts, provenance), rows)),
            false => self.again.push(rows),
        }
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
        self.inventory.note_recipe(provenance.recipe, info(id, parts, provenance));
        self.pending.push((record(id, parts, provenance), rows));
        self.inventory.note_completed(id, provenance.recipe);
        self.gathered(held_bytes).await
    }

    /// Returns which artifacts of these records are listed, and have lost rows.
    fn lost_of<'r>(&self, records: impl Iterator<Item = &'r ArtifactRecord>) -> HashSet<ArtifactId> {
        records.map(|record| record.artifact).filter(|id| self.inventory.lost().contains_key(id)).collect()
    }

    /// Counts the memory of what was gathered, and begins to write it where it is much, or was gathered for long.
    async fn gathered(&mut self, held_bytes: u64) -> Result<()> {
        self.pending_bytes += held_bytes;
        if self.pending_bytes < PENDING_BYTES && self.handed_over.elapsed() < PENDING_TIME {
            return Ok(());
        }
        match self.again.is_empty() {
            true => self.hand_over().await,
            false => self.flush().await,
        }
    }

    /// Begins to write what was gathered, after what is being written.
    async fn hand_over(&mut self) -> Result<()> {
        self.settle().await?;
        self.handed_over = Instant::now();
        if self.pending.is_empty() {
            return Ok(());
        }
        // A table that is made now takes the lock for itself, and so does whoever replaces rows.
        self.commit = None;
        let pending = std::mem::take(&mut self.pending);
        let lost = self.lost_of(pending.iter().map(|(record, _)| record));
        self.writing = Some(Flushing::begin(self.shared.clone(), (self.format, self.guard.clone()), pending, lost));
        self.pending_bytes = 0;
        Ok(())
    }

    /// Waits for what is being written.
    async fn settle(&mut self) -> Result<()> {
        if self.broken {
            return Err(Error::Storage {
                action: "writing artifacts".into(),
                message: "an earlier write of this writer failed; begin again with a new one".into(),
                source: None,
            });
        }
        if let Some(writing) = &mut self.writing {
            let flushed = writing.finished().await;
            self.writing = None;
            self.broken = flushed.is_err();
            self.note(flushed?);
        }
        Ok(())
    }

    /// Writes what was gathered: data rows first, then the list of complete artifacts; then damaged artifacts anew.
    ///
    /// # Errors
    /// When the storage refuses. Rows that were written stay unseen, for gc.
    pub async fn flush(&mut self) -> Result<()> {
        self.hand_over().await?;
        self.settle().await?;
        if !self.again.is_empty() {
            self.broken = true;
            self.commit = None;
            for (artifact, locations) in mend(&self.shared, self.format, std::mem::take(&mut self.again)).await? {
                self.inventory.note_moved(&artifact, locations);
            }
            self.broken = false;
        }
        self.pending_bytes = 0;
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
        for record in records {
            self.inventory.look_up(record.artifact).await?;
        }
        if let Some(record) = records.iter().find(|r| !self.inventory.has(&r.artifact)) {
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
            record.locations = self.inventory.locations(&record.artifact).cloned().unwrap_or_default();
            tables.extend(record.locations.0.keys().cloned());
        }
        // Of artifacts that the store had, nobody may have seen to it.
        synced::tables(self.shared.location.local(), tables)
            .await
            .map_err(|e| Error::io(self.shared.location.uri(), e))?;
        let made = Made { operation, message, tables: &self.seen };
        replace((&self.shared.location, &self.guard), (model, scope), &records, made).await
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
