//! Reading artifacts: their records, and their rows.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow::array::RecordBatch;
use futures::TryStreamExt;
use lance::Dataset;

use super::files::{Files, Run};
use super::joined;
use super::location::{Location, readable, storage_error};
use super::record::{ArtifactRecord, LayerRecord, Places, Rows, read_artifacts};
use super::schema::{ARTIFACTS, Table};
use super::tables::{add_rows, all_of};
use crate::error::{Error, Result};
use crate::layer::MethodName;
use crate::layer::parts::{ArtifactId, Parts};

/// The data side of a store, for reading.
#[derive(Debug)]
pub struct Data {
    location: Location,
    files: Arc<Files>,
}

impl Data {
    pub fn new(location: Location) -> Self {
        Data { files: Arc::new(Files::new(location.clone())), location }
    }

    /// The artifact's record.
    async fn record(&self, id: ArtifactId) -> Result<ArtifactRecord> {
        let filter = format!("artifact = X'{id}'");
        self.listed(Some(&filter)).await?.into_values().next().ok_or_else(|| Error::Corrupt {
            artifact: id.to_string(),
            reason: "the table of artifacts does not list it".into(),
        })
    }

    /// All records, an artifact that was written twice once.
    pub async fn records(&self) -> Result<Vec<ArtifactRecord>> {
        Ok(self.listed(None).await?.into_values().collect())
    }

    async fn listed(&self, filter: Option<&str>) -> Result<BTreeMap<ArtifactId, ArtifactRecord>> {
        let dataset = match self.location.open_table(ARTIFACTS, None).await {
            Ok(dataset) => dataset,
            Err(lance::Error::DatasetNotFound { .. }) => return Ok(BTreeMap::new()),
            Err(e) => return Err(storage_error("opening the table of artifacts")(e)),
        };
        let read = async {
            let mut scan = dataset.scan();
            if let Some(filter) = filter {
                scan.filter(filter)?;
            }
            scan.try_into_stream().await?.try_collect().await
        };
        let batches: Vec<RecordBatch> = read.await.map_err(storage_error("reading the table of artifacts"))?;
        let mut records = BTreeMap::new();
        for batch in &batches {
            for record in read_artifacts(batch)? {
                records.entry(record.artifact).or_insert(record);
            }
        }
        Ok(records)
    }

    /// Opens the files that these layers lie in, so that their first loads find them open.
    pub async fn open_ahead(&self, layers: &[LayerRecord]) -> Result<()> {
        let tables = layers.iter().flat_map(|layer| &layer.places.0);
        let named = tables.flat_map(|(table, rows)| rows.runs.iter().map(move |run| (table.clone(), run.file.clone())));
        let wanted: BTreeSet<(String, String)> = named.collect();
        if self.files.are_open(&wanted) {
            return Ok(());
        }
        let files = self.files.clone();
        joined(tokio::task::spawn_blocking(move || files.open_ahead(&wanted)).await)
    }

    /// The parts of a layer's artifact, read by this thread from where the catalogue says that they are, in files on
    /// the local file system. None if they are not to be had like this: [`Data::layer_parts`] says why, or gets them.
    pub fn local_parts(&self, layer: &LayerRecord) -> Option<Parts> {
        // None known: the artifact was there before.
        if layer.places.0.is_empty() {
            return None;
        }
        let found = self.files.local_rows(&runs(&layer.places)).ok()??;
        let found = by_table(&layer.places, found.into_iter().map(|batch| vec![batch]).collect());
        complete(layer.artifact, &layer.places, &found)
            .then(|| assembled(layer.artifact, layer.method.clone(), &layer.config, &layer.places, found).ok())?
    }

    /// The parts of a layer's artifact: from where the catalogue says they are, or, where they have been moved, from
    /// where the table of artifacts says.
    ///
    /// # Errors
    /// As [`Data::parts`], and when no such artifact is listed.
    pub async fn layer_parts(self: &Arc<Self>, layer: &LayerRecord) -> Result<Parts> {
        if !layer.places.0.is_empty()
            && let Ok(found) = self.at_places(&layer.places).await
            && complete(layer.artifact, &layer.places, &found)
            && let Ok(parts) = assembled(layer.artifact, layer.method.clone(), &layer.config, &layer.places, found)
        {
            return Ok(parts);
        }
        self.parts(&self.record(layer.artifact).await?).await
    }

    /// The parts of an artifact.
    ///
    /// # Errors
    /// When its rows are missing or are not what was written, as far as can be told without hashing them.
    pub async fn parts(self: &Arc<Self>, record: &ArtifactRecord) -> Result<Parts> {
        let (id, places) = (record.artifact, &record.places);
        let found = match self.at_places(places).await {
            Ok(found) if complete(id, places, &found) => found,
            _ => {
                let mut found = Vec::with_capacity(places.0.len());
                for (name, rows) in &places.0 {
                    let (data, name, rows) = (self.clone(), name.to_owned(), rows.clone());
                    let read = tokio::spawn(async move { data.rows(id, &name, &rows).await });
                    // Decoding damaged bytes may panic in Lance.
                    found.push(read.await.map_err(|_| corrupt(id, "its rows cannot be decoded".into()))??);
                }
                found
            }
        };
        assembled(id, record.method.clone(), &record.config, places, found)
    }

    /// One table's rows of an artifact: where they were written if they are still there, else by search.
    async fn rows(&self, id: ArtifactId, table: &str, rows: &Rows) -> Result<Vec<RecordBatch>> {
        let unreadable =
            |e: &lance::Error| corrupt(id, format!("its rows in table '{table}' cannot be read: {}", readable(e)));
        let place = Places([(table.to_owned(), rows.clone())].into());
        let failure = match self.at_places(&place).await {
            Ok(found) if complete(id, &place, &found) => return Ok(found.into_iter().flatten().collect()),
            Ok(_) => None,
            Err(e) => Some(e),
        };
        let found = async {
            let dataset = self.location.open_table(table, None).await?;
            by_search(&dataset, id, rows.rows as usize).await
        };
        match found.await {
            Ok(batches) if all_of(&batches, id, rows.rows) => Ok(batches),
            Ok(batches) => {
                let found: usize = batches.iter().map(RecordBatch::num_rows).sum();
                Err(failure.map_or_else(
                    || corrupt(id, format!("table '{table}' holds {found} of its {} rows", rows.rows)),
                    |e| unreadable(&e),
                ))
            }
            Err(e) => Err(unreadable(&failure.unwrap_or(e))),
        }
    }

    /// Rows from where they were written: those of each table.
    async fn at_places(&self, places: &Places) -> lance::Result<Vec<Vec<RecordBatch>>> {
        let files = self.files.clone();
        let runs = runs(places);
        let local = tokio::task::spawn_blocking({
            let runs = runs.clone();
            move || files.local_rows(&runs)
        });
        let local = local.await.map_err(|e| lance::Error::io(e.to_string()))?;
        let found = match local.map_err(|e| lance::Error::io(e.to_string()))? {
            Some(batches) => batches.into_iter().map(|batch| vec![batch]).collect(),
            None => self.files.rows(&runs).await?,
        };
        Ok(by_table(places, found))
    }
}

fn corrupt(id: ArtifactId, reason: String) -> Error {
    Error::Corrupt { artifact: id.to_string(), reason }
}

/// All runs of rows, table by table.
fn runs(places: &Places) -> Vec<Run> {
    let run = |table: &String, run: &super::record::Run| Run {
        table: table.clone(),
        file: run.file.clone(),
        rows: run.offset..run.offset.saturating_add(run.rows),
    };
    places.0.iter().flat_map(|(table, rows)| rows.runs.iter().map(move |r| run(table, r))).collect()
}

/// The batches of all runs, as one list a table.
fn by_table(places: &Places, runs: Vec<Vec<RecordBatch>>) -> Vec<Vec<RecordBatch>> {
    let mut runs = runs.into_iter();
    places.0.values().map(|rows| runs.by_ref().take(rows.runs.len()).flatten().collect()).collect()
}

/// Whether these are all rows of an artifact, table by table, and no others.
fn complete(id: ArtifactId, places: &Places, found: &[Vec<RecordBatch>]) -> bool {
    found.len() == places.0.len() && found.iter().zip(places.0.values()).all(|(f, rows)| all_of(f, id, rows.rows))
}

/// The parts that rows make up.
fn assembled(
    id: ArtifactId,
    method: MethodName,
    config: &serde_json::Value,
    places: &Places,
    found: Vec<Vec<RecordBatch>>,
) -> Result<Parts> {
    let mut tables = Vec::with_capacity(found.len());
    for (name, batches) in places.0.keys().zip(found) {
        let unknown = || corrupt(id, format!("it has rows in '{name}', which is no table of this format"));
        tables.push((Table::named(name).ok_or_else(unknown)?, batches));
    }
    tables.sort_by_key(|(table, _)| *table);
    let mut parts = Parts::new(method, config.clone());
    for (table, batches) in tables {
        add_rows(&mut parts, table, batches).map_err(|reason| corrupt(id, reason))?;
    }
    Ok(parts)
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
