//! Artifacts, written: gathered, then appended table by table in few large fragments, then listed as complete.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use arrow::array::{RecordBatch, RecordBatchIterator};
use arrow::datatypes::SchemaRef;
use arrow::error::ArrowError;
use chrono::Utc;
use lance::Dataset;
use lance::dataset::transaction::Operation;
use lance::dataset::{CommitBuilder, InsertBuilder, WriteMode, WriteParams};
use layerstore_core::layer::registry;
use serde_json::Value;

use super::agreement::DataTables;
use super::batches::{ArtifactRows, Layout};
use super::catalogue::{self, Scope, create_table, replace};
use super::data::Data;
use super::format::{Format, without_missing};
use super::heal;
use super::location::Location;
use super::lock::{self, Guard};
use super::record::{ArtifactRecord, ErrorBasis, LayerRecord, RowLocations, RowRange, TableRows, artifacts_batches};
use super::schema::{ARTIFACTS, Table, WEIGHT_BLOCKS};
use super::waiting::{Waiting, storage_error};
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

/// One change of a model, from its first artifact to its commit. Nobody sees any of it before [`Writer::commit`];
/// dropping it leaves the catalogue as it was.
#[derive(Debug)]
pub struct Writer {
    location: Location,
    _guard: Guard,
    /// The store's format, which does not change while the guard is held.
    format: &'static Format,
    /// Artifacts that are complete in the store, by recipe.
    recipes: HashMap<[u8; 32], ArtifactInfo>,
    known: HashMap<ArtifactId, RowLocations>,
    pending: Vec<(ArtifactRecord, ArtifactRows)>,
    /// Memory that is taken by what is pending.
    pending_bytes: u64,
    /// Bytes of the arrays of artifacts that were new, written or pending.
    added_bytes: u64,
    /// Set while rows are being written: what was gathered is gone if that fails or is given up.
    broken: bool,
    /// The lock of commits, where it was taken ahead.
    commit: Option<Guard>,
}

impl Writer {
    /// Takes the lock of imports, and reads which artifacts the store has. Those that the catalogue names and the list or a data
    /// table has lost are written again.
    ///
    /// # Errors
    /// When the storage refuses.
    pub(super) async fn begin(location: &Location, data: &Arc<Data>) -> Result<Self> {
        let guard = lock::importing(location).await?;
        let format = location.format_of(&catalogue::open(location, None).await?)?;
        let mut recipes = HashMap::new();
        let mut known = HashMap::new();
        let (mut tables, mut lost) = (DataTables::of(location), HashMap::new());
        for record in data.records().await? {
            if tables.lack(record.artifact, &record.locations, false).await?.is_some() {
                lost.insert(record.artifact, record);
                continue;
            }
            known.insert(record.artifact, record.locations);
            let stored = ArtifactInfo {
                artifact: record.artifact,
                method: record.method.clone(),
                config: record.config,
                stored_bytes: record.stored_bytes,
                relative_error: record.relative_error,
                error_basis: record.error_basis,
            };
            recipes.insert(record.recipe, stored);
        }
        let mut writer = Writer {
            location: location.clone(),
            _guard: guard,
            format,
            recipes,
            known,
            pending: vec![],
            pending_bytes: 0,
            added_bytes: 0,
            broken: false,
            commit: None,
        };
        heal::complete(&mut writer, location, data, &lost).await?;
        // What was lost is not the change's own.
        writer.added_bytes = 0;
        Ok(writer)
    }

    /// Returns whether the store has an artifact, or will have it with the next flush.
    pub(crate) fn has(&self, artifact: &ArtifactId) -> bool {
        self.known.contains_key(artifact)
    }

    /// Lists artifacts whose rows are there.
    pub(super) async fn list(&mut self, records: Vec<ArtifactRecord>) -> Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        append((&self.location, self.format), ARTIFACTS, artifacts_batches(&records)?).await?;
        self.known.extend(records.into_iter().map(|r| (r.artifact, r.locations)));
        Ok(())
    }

    /// Returns the artifact that was made by this recipe, if the store has it.
    pub fn made_by(&self, recipe: &[u8; 32]) -> Option<&ArtifactInfo> {
        self.recipes.get(recipe)
    }

    /// Returns the bytes of parts written so far; what the store held already is not counted.
    pub fn written_bytes(&self) -> u64 {
        self.added_bytes
    }

    /// The layout of the store's format.
    fn layout(&self) -> Layout {
        match self.location.formats().schema(WEIGHT_BLOCKS, self.format.version) {
            Some(_) => Layout::Blocks,
            None => Layout::Rows,
        }
    }

    /// Adds an artifact, unless the store has it. Returns its name, and whether it was new. What is new is built into a layer
    /// first, so that nothing is stored that cannot be loaded.
    ///
    /// # Errors
    /// When no layer can be built from the parts, a number of theirs is not finite, they do not fit the tables, or writing a full
    /// buffer fails.
    pub async fn add(&mut self, parts: &Parts, provenance: Provenance) -> Result<(ArtifactId, bool)> {
        self.add_as(parts, provenance, self.layout()).await
    }

    /// Adds an artifact as [`Writer::add`] does, in a layout that an older format of the store may have had: the catalogue says how
    /// many rows an artifact has that was written before.
    pub(super) async fn add_as(
        &mut self,
        parts: &Parts,
        provenance: Provenance,
        layout: Layout,
    ) -> Result<(ArtifactId, bool)> {
        let id = parts.id();
        let new = !self.known.contains_key(&id);
        if new {
            let parts = parts.clone();
            unwrap_join(tokio::task::spawn_blocking(move || registry::rebuilt_layer(&parts).map(drop)).await)??;
        }
        let stored_bytes = parts.stored_bytes();
        let stored = ArtifactInfo {
            artifact: id,
            method: parts.method.clone(),
            config: parts.config.clone(),
            stored_bytes,
            relative_error: provenance.relative_error,
            error_basis: provenance.error_basis,
        };
        if !new {
            self.recipes.insert(provenance.recipe, stored);
            return Ok((id, false));
        }
        let rows = ArtifactRows::new(id, parts.clone(), layout)?;
        self.recipes.insert(provenance.recipe, stored);
        self.known.insert(id, RowLocations::default());
        let record = ArtifactRecord {
            artifact: id,
            method: parts.method.clone(),
            config: parts.config.clone(),
            locations: RowLocations::default(),
            stored_bytes,
            recipe: provenance.recipe,
            relative_error: provenance.relative_error,
            error_basis: provenance.error_basis,
            created_at: Utc::now(),
        };
        self.pending_bytes += rows.held_bytes();
        self.added_bytes += stored_bytes;
        self.pending.push((record, rows));
        if self.pending_bytes >= PENDING_BYTES {
            self.flush().await?;
        }
        Ok((id, true))
    }

    /// Writes what was gathered: data rows first, then the list of complete artifacts.
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
        if self.pending.is_empty() {
            return Ok(());
        }
        self.broken = true;
        // A table that is made now takes the lock for itself.
        self.commit = None;
        let pending = std::mem::take(&mut self.pending);
        let records = self.write_rows(pending).await?;
        self.list(records).await?;
        self.pending_bytes = 0;
        self.broken = false;
        Ok(())
    }

    /// Writes what was gathered and waits for the lock of commits, so that the commit itself waits for nobody.
    pub(crate) async fn ready(&mut self) -> Result<()> {
        self.flush().await?;
        if self.commit.is_none() {
            self.commit = Some(lock::committing(&self.location).await?);
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
            let mut written = Written::new(append_rows((&self.location, self.format), table, &artifacts).await?);
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
        for record in &mut records {
            record.locations = self.known.get(&record.artifact).cloned().unwrap_or_default();
        }
        replace(&self.location, (model, scope), &records, operation, message).await
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

/// Appends rows to a table, made first in the store's format where it is missing, and returns the new data files with their
/// rows, in order.
pub(super) async fn append(
    (location, format): (&Location, &Format),
    table: &str,
    batches: Vec<RecordBatch>,
) -> Result<Vec<(String, u64)>> {
    let dataset = opened((location, format), table).await?;
    let fitted = |batch| without_missing(batch, (table, &dataset), (location.uri(), format));
    let batches = batches.into_iter().map(fitted).collect::<Result<Vec<_>>>()?;
    let Some(schema) = batches.first().map(RecordBatch::schema) else { return Ok(vec![]) };
    let appended = append_to(Arc::new(dataset), schema, batches.into_iter().map(Ok));
    appended.during(format!("appending to table '{table}'")).await
}

/// Appends the rows that artifacts have in a table, as [`append`] does. They are made meanwhile, batch by batch.
async fn append_rows(
    (location, format): (&Location, &Format),
    table: Table,
    artifacts: &Arc<Vec<ArtifactRows>>,
) -> Result<Vec<(String, u64)>> {
    let dataset = opened((location, format), &table.name()).await?;
    let pieces = artifacts.iter().enumerate().map(|(owner, rows)| (owner, rows.pieces(table)));
    let pieces: Vec<_> = pieces.flat_map(|(owner, all)| all.into_iter().map(move |piece| (owner, piece))).collect();
    let artifacts = artifacts.clone();
    // They have no column that a later format adds to the table.
    let batches = pieces.into_iter().map(move |(owner, piece)| artifacts[owner].batch(&piece));
    let appended = append_to(Arc::new(dataset), table.schema(), batches);
    appended.during(format!("appending to table '{}'", table.name())).await
}

/// Opens a table for writing, made first in the store's format where it is missing.
async fn opened((location, format): (&Location, &Format), table: &str) -> Result<Dataset> {
    let action = || format!("opening table '{table}'");
    match location.open_for_write(table).await {
        Ok(dataset) => Ok(dataset),
        Err(lance::Error::DatasetNotFound { .. }) => {
            let schema = location.formats().schema(table, format.version);
            let schema = schema.ok_or_else(|| Error::expected("table", table, "one of the format's"))?;
            create_table(location, table, schema).await?;
            location.open_for_write(table).during(action()).await
        }
        Err(e) => Err(storage_error(action())(e)),
    }
}

/// Columns of the table that the batches do not have, which take nulls, are left out of the new files.
async fn append_to(
    dataset: Arc<Dataset>,
    schema: SchemaRef,
    batches: impl Iterator<Item = std::result::Result<RecordBatch, ArrowError>> + Send + 'static,
) -> lance::Result<Vec<(String, u64)>> {
    let params = WriteParams { mode: WriteMode::Append, ..WriteParams::default() };
    let reader = RecordBatchIterator::new(batches, schema);
    let transaction =
        InsertBuilder::new(dataset.clone()).with_params(&params).execute_uncommitted_stream(reader).await?;
    let Operation::Append { fragments } = &transaction.operation else {
        return Err(lance::Error::internal(format!("an append came to be {}", transaction.operation.name())));
    };
    let mut written = Vec::with_capacity(fragments.len());
    for fragment in fragments {
        let [file] = fragment.files.as_slice() else {
            return Err(lance::Error::internal(format!("a new fragment has {} data files", fragment.files.len())));
        };
        written.push((file.path.clone(), fragment.physical_rows.unwrap_or_default() as u64));
    }
    CommitBuilder::new(dataset).with_skip_auto_cleanup(true).execute(transaction).await?;
    Ok(written)
}

/// Hands out consecutive rows of a list of files.
struct Written {
    files: std::vec::IntoIter<(String, u64)>,
    current: Option<(String, u64)>,
    offset: u64,
}

impl Written {
    fn new(files: Vec<(String, u64)>) -> Self {
        Written { files: files.into_iter(), current: None, offset: 0 }
    }

    fn take(&mut self, mut rows: u64) -> Option<Vec<RowRange>> {
        let mut ranges = Vec::new();
        while rows > 0 {
            match &self.current {
                Some((file, size)) if self.offset < *size => {
                    let taken = rows.min(size - self.offset);
                    ranges.push(RowRange { file: file.clone(), offset: self.offset, rows: taken });
                    self.offset += taken;
                    rows -= taken;
                }
                _ => {
                    self.current = Some(self.files.next()?);
                    self.offset = 0;
                }
            }
        }
        Some(ranges)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_go_on_in_the_next_file() {
        let run = |file: &str, offset, rows| RowRange { file: file.into(), offset, rows };
        let mut written = Written::new(vec![("a".into(), 3), ("b".into(), 0), ("c".into(), 10)]);
        assert_eq!(written.take(2).unwrap(), [run("a", 0, 2)]);
        assert_eq!(written.take(4).unwrap(), [run("a", 2, 1), run("c", 0, 3)]);
        assert_eq!(written.take(0).unwrap(), []);
        assert_eq!(written.take(8), None);
    }

    #[test]
    fn names_that_would_be_trouble() {
        for bad in ["", " a", "a\n", "a\0b", &"x".repeat(300)] {
            assert!(check_model_name(bad).is_err(), "{bad:?}");
        }
        assert!(check_model_name("org/model-7b v2 'quoted'").is_ok());
    }
}
