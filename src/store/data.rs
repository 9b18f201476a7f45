//! Reading artifacts: where their rows are, and the rows.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch};
use futures::{StreamExt, TryStreamExt};
use lance::Dataset;
use lance::dataset::fragment::FileFragment;
use tokio::sync::Mutex;

use super::location::{Location, readable, storage_error};
use super::record::{ArtifactRecord, Rows, read_artifacts};
use super::schema::{ARTIFACTS, Table};
use super::tables::add_rows;
use crate::error::{Error, Result};
use crate::layer::parts::{ArtifactId, Parts};

/// Rows that Lance decodes at a time: as many as most layers have, so that they come as one piece, and few enough that
/// 32-bit offsets can address rows of half a MiB.
const READ_ROWS: u32 = 1 << 12;

/// The data side of a store, for reading.
#[derive(Debug)]
pub struct Data {
    location: Location,
    tables: Mutex<HashMap<String, Arc<Dataset>>>,
    index: Mutex<Index>,
}

/// Where in the table of artifacts each one's row is. Fragments never change but for deletions, so each is read once.
#[derive(Debug, Default)]
struct Index {
    /// By fragment: how many deletions it had when it was read.
    seen: HashMap<usize, usize>,
    rows: HashMap<ArtifactId, (usize, u32)>,
}

impl Data {
    pub fn new(location: Location) -> Self {
        Data { location, tables: Mutex::default(), index: Mutex::default() }
    }

    /// A table's dataset, opened once. `fresh` asks for its latest version.
    async fn table(&self, name: &str, fresh: bool) -> Result<Arc<Dataset>> {
        let mut tables = self.tables.lock().await;
        if !fresh && let Some(dataset) = tables.get(name) {
            return Ok(dataset.clone());
        }
        let dataset = Arc::new(
            self.location.open_table(name, None).await.map_err(storage_error(format!("opening table '{name}'")))?,
        );
        tables.insert(name.to_owned(), dataset.clone());
        Ok(dataset)
    }

    /// The record of a complete artifact.
    ///
    /// # Errors
    /// When there is none, or it cannot be read.
    pub async fn record(&self, id: ArtifactId) -> Result<ArtifactRecord> {
        let missing = |reason: &str| Error::Corrupt { artifact: id.to_string(), reason: reason.to_owned() };
        for fresh in [false, true] {
            let dataset = match self.table(ARTIFACTS, fresh).await {
                Ok(dataset) => dataset,
                Err(_) if !fresh => continue,
                Err(e) => return Err(e),
            };
            let mut index = self.index.lock().await;
            if !fresh && !index.rows.contains_key(&id) && !index.seen.is_empty() {
                continue;
            }
            if fresh || index.seen.is_empty() {
                index.update(&dataset).await.map_err(storage_error("reading the table of artifacts"))?;
            }
            let Some(&(fragment, row)) = index.rows.get(&id) else { continue };
            drop(index);
            let Some(fragment) = dataset.get_fragment(fragment) else { continue };
            let taken = match fragment.take(&[row], dataset.schema()).await {
                Ok(taken) => taken,
                Err(_) if !fresh => continue,
                Err(e) => return Err(storage_error("reading the table of artifacts")(e)),
            };
            let record =
                read_artifacts(&taken)?.pop().ok_or_else(|| missing("its row in the table of artifacts is gone"))?;
            if record.artifact == id {
                return Ok(record);
            }
        }
        Err(missing("the table of artifacts does not list it"))
    }

    /// All records, an artifact that was written twice once.
    pub async fn records(&self) -> Result<Vec<ArtifactRecord>> {
        let dataset = match self.location.open_table(ARTIFACTS, None).await {
            Ok(dataset) => dataset,
            Err(lance::Error::DatasetNotFound { .. }) => return Ok(vec![]),
            Err(e) => return Err(storage_error("opening the table of artifacts")(e)),
        };
        let batches: Vec<RecordBatch> = async { dataset.scan().try_into_stream().await?.try_collect().await }
            .await
            .map_err(storage_error("reading the table of artifacts"))?;
        let mut records = BTreeMap::new();
        for batch in &batches {
            for record in read_artifacts(batch)? {
                records.entry(record.artifact).or_insert(record);
            }
        }
        Ok(records.into_values().collect())
    }

    /// The parts of an artifact.
    ///
    /// # Errors
    /// When its rows are missing or are not what was written, as far as can be told without hashing them.
    pub async fn parts(&self, record: &ArtifactRecord) -> Result<Parts> {
        let corrupt = |reason: String| Error::Corrupt { artifact: record.artifact.to_string(), reason };
        let mut wanted = Vec::with_capacity(record.tables.len());
        for (name, rows) in &record.tables {
            let table = Table::named(name)
                .ok_or_else(|| corrupt(format!("it has rows in '{name}', which is no table of this format")))?;
            wanted.push((table, name, rows));
        }
        let read = wanted.into_iter().map(|(table, name, rows)| async move {
            Ok::<_, Error>((table, self.rows(record.artifact, name, rows).await?))
        });
        let mut tables: Vec<(Table, Vec<RecordBatch>)> = futures::future::try_join_all(read).await?;
        tables.sort_by_key(|(table, _)| *table);
        let mut parts = Parts::new(record.method, record.config.clone());
        for (table, batches) in &tables {
            add_rows(&mut parts, record.artifact, *table, batches).map_err(corrupt)?;
        }
        Ok(parts)
    }

    /// One table's rows of an artifact: where they were written if they are still there, else by search.
    async fn rows(&self, id: ArtifactId, table: &str, rows: &Rows) -> Result<Vec<RecordBatch>> {
        let corrupt = |reason: String| Error::Corrupt { artifact: id.to_string(), reason };
        let mut failure = None;
        for fresh in [false, true] {
            let dataset = self.table(table, fresh).await?;
            match at_hint(&dataset, rows).await {
                Ok(Some(batches)) if batches.iter().all(|b| all_of(b, id)) => return Ok(batches),
                Ok(_) => {}
                Err(e) => failure = Some(e),
            }
        }
        let dataset = self.table(table, false).await?;
        match by_search(&dataset, id, rows.rows as usize).await {
            Ok(batches) => {
                let found: usize = batches.iter().map(RecordBatch::num_rows).sum();
                if found as u64 == rows.rows {
                    return Ok(batches);
                }
                let reason = failure.map_or_else(
                    || format!("table '{table}' holds {found} of its {} rows", rows.rows),
                    |e| format!("its rows in table '{table}' cannot be read: {}", readable(&e)),
                );
                Err(corrupt(reason))
            }
            Err(e) => {
                Err(corrupt(format!("its rows in table '{table}' cannot be read: {}", readable(&failure.unwrap_or(e)))))
            }
        }
    }
}

/// The rows where they were written; `None` where there is no such place any more.
async fn at_hint(dataset: &Dataset, rows: &Rows) -> lance::Result<Option<Vec<RecordBatch>>> {
    let mut all = Vec::new();
    for run in &rows.runs {
        let Some(fragment) = dataset.get_fragment(run.fragment as usize) else { return Ok(None) };
        let end = run.offset + run.rows;
        if fragment.physical_rows().await? < end as usize {
            return Ok(None);
        }
        all.extend(slice(&fragment, run.offset..end).await?);
    }
    Ok((all.iter().map(RecordBatch::num_rows).sum::<usize>() as u64 == rows.rows).then_some(all))
}

async fn slice(fragment: &FileFragment, rows: Range<u64>) -> lance::Result<Vec<RecordBatch>> {
    fragment.read_physical_slice(rows, fragment.schema(), READ_ROWS).await?.buffered(4).try_collect().await
}

/// The first `count` rows of an artifact, in the order they were written; a second copy lies behind the first.
async fn by_search(dataset: &Dataset, id: ArtifactId, count: usize) -> lance::Result<Vec<RecordBatch>> {
    let mut scan = dataset.scan();
    scan.filter(&format!("artifact = X'{id}'"))?.scan_in_order(true);
    let batches: Vec<RecordBatch> = scan.try_into_stream().await?.try_collect().await?;
    let mut left = count;
    let cut = batches.into_iter().map(|batch| {
        let rows = batch.num_rows().min(left);
        left -= rows;
        batch.slice(0, rows)
    });
    Ok(cut.filter(|b| b.num_rows() > 0).collect())
}

fn all_of(batch: &RecordBatch, id: ArtifactId) -> bool {
    let names = batch.column_by_name("artifact").and_then(|c| c.as_fixed_size_binary_opt());
    names.is_some_and(|names| (0..names.len()).all(|i| names.value(i) == id.0))
}

impl Index {
    async fn update(&mut self, dataset: &Dataset) -> lance::Result<()> {
        let projection = dataset.schema().project(&["artifact"])?;
        let fragments = dataset.get_fragments();
        let mut state = HashMap::new();
        for fragment in &fragments {
            let deleted =
                fragment.metadata().deletion_file.as_ref().map_or(0, |d| d.num_deleted_rows.unwrap_or(usize::MAX));
            state.insert(fragment.id(), deleted);
        }
        // A fragment that went or lost rows makes places stale: begin again.
        if self.seen.iter().any(|(id, deleted)| state.get(id) != Some(deleted)) {
            *self = Index::default();
        }
        for fragment in fragments {
            if self.seen.contains_key(&fragment.id()) {
                continue;
            }
            let rows = fragment.count_rows(None).await? as u32;
            let reader = fragment.open(&projection, Default::default()).await?;
            let batches: Vec<RecordBatch> =
                reader.read_range(0..rows, READ_ROWS).await?.buffered(4).try_collect().await?;
            let mut row = 0;
            for batch in &batches {
                let names = batch.column(0).as_fixed_size_binary();
                for i in 0..names.len() {
                    if let Ok(id) = names.value(i).try_into() {
                        self.rows.entry(ArtifactId(id)).or_insert((fragment.id(), row));
                    }
                    row += 1;
                }
            }
            self.seen.insert(fragment.id(), state[&fragment.id()]);
        }
        Ok(())
    }
}
