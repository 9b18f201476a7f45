//! Artifacts written anew in the place of rows that are not what was written.
//!
//! Readers go where the catalogue says that an artifact's rows are, in any version, so the files that hold damaged rows have to go.
//! What else lies in them is written again as it is. Each table changes in one commit, and holds one copy of every artifact at any
//! time; where the work ends early, `verify` still finds what is damaged, and the next attempt goes on.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::compute::cast;
use arrow::datatypes::Schema;
use lance::Dataset;
use lance::dataset::transaction::Transaction;

use super::agreement::artifacts_by_file;
use super::append::{Written, open_or_create, replace_fragments, write};
use super::aside;
use super::batches::ArtifactRows;
use super::format::Format;
use super::location::Location;
use super::lock;
use super::record::ArtifactRecord;
use super::relist::relist;
use super::row_locations::{RowLocations, TableRows};
use super::schema::{ARTIFACTS, Table};
use super::shared::Shared;
use super::waiting::{Waiting, storage_error};
use crate::error::{Error, Result};
use crate::layer::ArtifactId;

/// Bytes of rows that are gathered before they are written.
const PENDING_BYTES: usize = 256 << 20;

/// Writes artifacts anew, and takes the files away that held what was damaged: files that hold other artifacts that cannot be read
/// are set aside. Returns where the rows are of all that was written. The caller holds the lock of imports.
///
/// # Errors
/// When the storage refuses.
pub async fn mend(
    shared: &Arc<Shared>,
    format: &'static Format,
    again: Vec<ArtifactRows>,
) -> Result<Vec<(ArtifactId, RowLocations)>> {
    if again.is_empty() {
        return Ok(vec![]);
    }
    let location = &shared.location;
    let ids: BTreeSet<ArtifactId> = again.iter().map(ArtifactRows::id).collect();
    let tables = again.iter().flat_map(|artifact| artifact.tables());
    let wanted: BTreeMap<String, Table> = tables.map(|(table, _)| (table.name(), table)).collect();
    for table in wanted.keys() {
        // A table that is made takes the lock for itself.
        open_or_create((location, format), table).await?;
    }
    let guard = lock::committing(location).await?;
    let listed = shared.data.listings().await?;
    let mut places = Places::of(&listed);
    for table in wanted.keys().cloned().chain(places.tables_of(&ids)).collect::<BTreeSet<String>>() {
        places.look_into(location, &table).await?;
    }
    let files = places.files_to_go(&ids);
    let mut now: BTreeMap<ArtifactId, RowLocations> = BTreeMap::new();
    for record in &listed {
        if ids.contains(&record.artifact) {
            now.entry(record.artifact).or_insert_with(|| record.locations.clone());
        }
    }
    let tables: BTreeSet<&String> = wanted.keys().chain(files.keys()).collect();
    for table in tables {
        let dataset = match location.open_for_write(table).await {
            Ok(dataset) => Arc::new(dataset),
            Err(lance::Error::DatasetNotFound { .. }) => continue,
            Err(e) => return Err(storage_error(format!("opening table '{table}'"))(e)),
        };
        let none = BTreeSet::new();
        let going = files.get(table).unwrap_or(&none);
        let mut rewriting = Rewriting::new(shared, format, (table, dataset.clone()));
        for artifact in &again {
            for piece in wanted.get(table).map(|table| artifact.pieces(*table)).unwrap_or_default() {
                let rows = artifact.batch(&piece);
                let rows = rows.map_err(|e| Error::storage(format!("replacing rows of table '{table}'"), e))?;
                rewriting.add(artifact.id(), rows).await?;
            }
        }
        let mut unreadable = BTreeSet::new();
        let mut seen = ids.clone();
        for record in &listed {
            let Some(rows) = record.locations.0.get(table) else { continue };
            if places.lies_in(table, &record.artifact, going) && seen.insert(record.artifact) {
                match shared.data.rows(record.artifact, table, rows).await {
                    Ok(found) => {
                        now.entry(record.artifact).or_insert_with(|| record.locations.clone());
                        for rows in found {
                            rewriting.add(record.artifact, rows).await?;
                        }
                    }
                    Err(Error::Corrupt { .. }) => unreadable.extend(rows.ranges.iter().map(|range| range.file.clone())),
                    Err(e) => return Err(e),
                }
            }
        }
        let fragments = dataset.fragments();
        let removed = fragments.iter().filter(|f| f.files.first().is_some_and(|file| going.contains(&file.path)));
        let removed: Vec<u64> = removed.map(|fragment| fragment.id).collect();
        for (artifact, rows) in rewriting.commit(removed).await? {
            now.entry(artifact).or_default().0.insert(table.clone(), rows);
        }
        // Before the list tells where the rows are: as long as the damaged ones can be read, it leads there.
        for file in going {
            match unreadable.contains(file) {
                true => aside::set_aside(location, (table, "data"), file).await.map(drop)?,
                false => aside::remove(location, (table, "data"), file).await?,
            }
        }
        shared.data.forget(table, going.iter().cloned()).await;
    }
    let list = location.open_for_write(ARTIFACTS).during("opening the table of artifacts").await?;
    relist(list, &now).await?;
    drop(guard);
    shared.forget(&ids).await;
    Ok(now.into_iter().collect())
}

/// The files that rows of artifacts lie in: those that the list says, and those that hold rows of them, since the list may be older
/// than the tables, and copies may lie beside those that it leads to.
struct Places(BTreeMap<String, BTreeMap<ArtifactId, BTreeSet<String>>>);

impl Places {
    /// Returns what the list says. Names that no table has are passed over: nothing is written by them.
    fn of(listed: &[ArtifactRecord]) -> Self {
        let mut places = Places(BTreeMap::new());
        for record in listed {
            for (table, rows) in record.locations.0.iter().filter(|(table, _)| Table::named(table).is_some()) {
                let files = places.0.entry(table.clone()).or_default().entry(record.artifact).or_default();
                files.extend(rows.ranges.iter().map(|range| range.file.clone()));
            }
        }
        places
    }

    /// Returns the tables that these artifacts have rows in.
    fn tables_of(&self, ids: &BTreeSet<ArtifactId>) -> Vec<String> {
        let have = |artifacts: &BTreeMap<ArtifactId, _>| ids.iter().any(|id| artifacts.contains_key(id));
        self.0.iter().filter(|(_, artifacts)| have(artifacts)).map(|(table, _)| table.clone()).collect()
    }

    /// Adds what a table holds.
    async fn look_into(&mut self, location: &Location, table: &str) -> Result<()> {
        let dataset = match location.open_table(table, None).await {
            Ok(dataset) => dataset,
            Err(lance::Error::DatasetNotFound { .. }) => return Ok(()),
            Err(e) => return Err(storage_error(format!("opening table '{table}'"))(e)),
        };
        let artifacts = self.0.entry(table.to_owned()).or_default();
        for (file, held) in artifacts_by_file(table, &dataset).await? {
            for artifact in held {
                artifacts.entry(artifact).or_default().insert(file.clone());
            }
        }
        Ok(())
    }

    /// Returns whether rows of an artifact lie in some of these files of a table.
    fn lies_in(&self, table: &str, artifact: &ArtifactId, files: &BTreeSet<String>) -> bool {
        let own = self.0.get(table).and_then(|artifacts| artifacts.get(artifact));
        own.is_some_and(|own| !own.is_disjoint(files))
    }

    /// Returns the files of each table that rows of these artifacts lie in, and those of all artifacts that go on in other files: an
    /// artifact's rows of a table move together.
    fn files_to_go(&self, ids: &BTreeSet<ArtifactId>) -> BTreeMap<String, BTreeSet<String>> {
        let mut all = BTreeMap::new();
        for (table, artifacts) in &self.0 {
            let mut files: BTreeSet<String> =
                ids.iter().filter_map(|id| artifacts.get(id)).flatten().cloned().collect();
            loop {
                let before = files.len();
                for own in artifacts.values() {
                    if !own.is_disjoint(&files) {
                        files.extend(own.iter().cloned());
                    }
                }
                if files.len() == before {
                    break;
                }
            }
            if !files.is_empty() {
                all.insert(table.clone(), files);
            }
        }
        all
    }
}

/// Rows of one table on their way to new places.
struct Rewriting<'a> {
    shared: &'a Arc<Shared>,
    format: &'static Format,
    table: (&'a str, Arc<Dataset>),
    pending: Vec<RecordBatch>,
    pending_bytes: usize,
    /// Artifacts and their numbers of rows, in order.
    owners: Vec<(ArtifactId, u64)>,
    written: Vec<Transaction>,
    files: Vec<(String, u64)>,
}

impl<'a> Rewriting<'a> {
    fn new(shared: &'a Arc<Shared>, format: &'static Format, table: (&'a str, Arc<Dataset>)) -> Self {
        Rewriting {
            shared,
            format,
            table,
            pending: vec![],
            pending_bytes: 0,
            owners: vec![],
            written: vec![],
            files: vec![],
        }
    }

    /// Adds rows of an artifact, behind those of it that were added before.
    async fn add(&mut self, artifact: ArtifactId, batch: RecordBatch) -> Result<()> {
        let rows = batch.num_rows() as u64;
        match self.owners.last_mut() {
            Some((owner, all)) if *owner == artifact => *all += rows,
            _ => self.owners.push((artifact, rows)),
        }
        // With all columns, and of the table's types, so that all rows are alike: a reader may have wider offsets than the table.
        let completed = self.shared.location.formats().completed(self.table.0, batch);
        let completed = completed.and_then(|batch| with_types_of(&self.table.1, batch));
        let batch = completed.map_err(|e| Error::storage(format!("reading table '{}'", self.table.0), e))?;
        self.pending_bytes += batch.get_array_memory_size();
        self.pending.push(batch);
        if self.pending_bytes >= PENDING_BYTES {
            self.write().await?;
        }
        Ok(())
    }

    async fn write(&mut self) -> Result<()> {
        self.pending_bytes = 0;
        let place = (&self.shared.location, self.format);
        let written = write(place, (self.table.0, &self.table.1), std::mem::take(&mut self.pending)).await?;
        if let Some((transaction, files)) = written {
            self.written.push(transaction);
            self.files.extend(files);
        }
        Ok(())
    }

    /// Puts all rows in the place of these fragments, and returns where each artifact's are.
    async fn commit(mut self, removed: Vec<u64>) -> Result<Vec<(ArtifactId, TableRows)>> {
        self.write().await?;
        let Rewriting { table, owners, written, files, .. } = self;
        replace_fragments((table.0, table.1), removed, written).await?;
        let mut places = Written::new(files);
        let placed = owners.into_iter().map(|(artifact, rows)| {
            let ranges = places.take(rows).ok_or_else(|| Error::Storage {
                action: format!("replacing rows of table '{}'", table.0),
                message: "fewer rows were written than given".into(),
                source: None,
            })?;
            Ok((artifact, TableRows { rows, ranges }))
        });
        placed.collect()
    }
}

/// Gives a batch's columns the types that they have in a table.
fn with_types_of(dataset: &Dataset, batch: RecordBatch) -> arrow::error::Result<RecordBatch> {
    let schema = batch.schema();
    let mut fields = Vec::with_capacity(schema.fields().len());
    let mut columns = Vec::with_capacity(schema.fields().len());
    for (field, column) in schema.fields().iter().zip(batch.columns()) {
        let wanted = dataset.schema().field(field.name()).map_or_else(|| field.data_type().clone(), |f| f.data_type());
        columns.push(cast(column, &wanted)?);
        fields.push(Arc::new(field.as_ref().clone().with_data_type(wanted)));
    }
    RecordBatch::try_new(Arc::new(Schema::new_with_metadata(fields, schema.metadata().clone())), columns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::record::ErrorBasis;
    use crate::store::row_locations::RowRange;

    fn record(id: u8, table: &str, files: &[&str]) -> ArtifactRecord {
        let ranges = files.iter().map(|file| RowRange { file: (*file).into(), offset: 0, rows: 1 }).collect();
        let rows = TableRows { rows: files.len() as u64, ranges };
        ArtifactRecord {
            artifact: ArtifactId([id; 32]),
            method: "dense".to_owned().into(),
            config: serde_json::Value::Null,
            locations: RowLocations([(table.to_owned(), rows)].into()),
            stored_bytes: 0,
            recipe: [id; 32],
            relative_error: None,
            error_basis: ErrorBasis::Weights,
            created_at: chrono::Utc::now(),
        }
    }

    /// Rows of one artifact are never left in two places.
    #[test]
    fn files_of_what_goes_on_elsewhere_go_too() {
        let listed = [
            record(1, "weights", &["a"]),
            record(2, "weights", &["b", "c"]),
            record(3, "weights", &["a", "b"]),
            record(4, "weights", &["d"]),
            record(5, "tensors", &["a"]),
            // The second copy of the first.
            record(1, "weights", &["e"]),
        ];
        let going = Places::of(&listed).files_to_go(&[ArtifactId([1; 32])].into());
        let expected: BTreeSet<String> = ["a", "b", "c", "e"].map(str::to_owned).into();
        assert_eq!(going, [("weights".to_owned(), expected)].into());
    }
}
