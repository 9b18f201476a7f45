//! The catalogue: which artifact is which model's which layer. The only source of truth, and the only commit point.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{AsArray, RecordBatch, RecordBatchIterator};
use arrow::datatypes::SchemaRef;
use futures::TryStreamExt;
use lance::Dataset;
use lance::dataset::{
    CommitBuilder, InsertBuilder, MergeInsertBuilder, WhenMatched, WhenNotMatched, WhenNotMatchedBySource,
};
use tokio::sync::OnceCell;

use super::format::{with_foreign, without_missing};
use super::location::{Location, Place};
use super::lock;
use super::names::{Names, RowPosition};
use super::record::{LayerRecord, layers_batch, read_layers};
use super::schema::{self, LAYERS};
use super::waiting::{Waiting, storage_error};
use crate::error::{Error, Result};
use crate::layer::ArtifactId;

/// Attempts at a commit before the contention is reported; only object stores, which have no lock, need more than one.
const COMMIT_ATTEMPTS: u32 = 20;

/// The transaction property that holds the message of a version.
pub const MESSAGE: &str = "layerstore:message";
/// The transaction property that says what made a version.
pub const OPERATION: &str = "layerstore:operation";

/// The catalogue at one version, and the names in it once somebody has looked one up.
#[derive(Debug, Clone)]
pub struct Catalogue {
    dataset: Arc<Dataset>,
    names: Arc<OnceCell<Names>>,
}

impl From<Dataset> for Catalogue {
    fn from(dataset: Dataset) -> Self {
        Catalogue { dataset: Arc::new(dataset), names: Arc::default() }
    }
}

impl Catalogue {
    /// Returns the table at this version.
    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    /// Returns the latest version: this one, where nothing was committed since.
    ///
    /// # Errors
    /// When the storage refuses, or the store has come to be of a format that this build does not know.
    pub async fn latest(self, location: &Location) -> Result<Self> {
        let mut dataset = Dataset::clone(&self.dataset);
        dataset.checkout_latest().during("opening the latest version").await?;
        if dataset.version_id() == self.dataset.version_id() {
            return Ok(self);
        }
        Ok(check_format(location, dataset)?.into())
    }

    /// Returns the names of all rows, which are read at the first call.
    pub async fn names(&self) -> Result<&Names> {
        let read = async { Names::read(&self.dataset).during("reading the catalogue").await };
        self.names.get_or_try_init(|| read).await
    }
}

/// Opens the catalogue at `version` or the latest, and checks that this build can read it.
pub async fn open(location: &Location, version: Option<u64>) -> Result<Dataset> {
    match location.open_table(LAYERS, version).await {
        Ok(dataset) => check_format(location, dataset),
        Err(lance::Error::DatasetNotFound { .. }) if version.is_none() => Err(not_a_store(location)),
        Err(lance::Error::DatasetNotFound { .. } | lance::Error::VersionNotFound { .. }) => {
            let latest = Box::pin(open(location, None)).await?;
            let versions = versions(&latest).await?;
            Err(Error::UnknownVersion {
                version: version.unwrap_or_default(),
                oldest: versions.iter().min().copied().unwrap_or_default(),
                latest: latest.version_id(),
            })
        }
        Err(e) => Err(storage_error(format!("opening {}", location.uri()))(e)),
    }
}

fn check_format(location: &Location, dataset: Dataset) -> Result<Dataset> {
    location.format_of(&dataset)?;
    Ok(dataset)
}

fn not_a_store(location: &Location) -> Error {
    let reason = match location.place() {
        Place::Local(path) if !path.exists() => "the directory does not exist; `layerstore import` makes a store",
        _ => "it holds no table named 'layers'; `layerstore import` makes a store",
    };
    Error::NotAStore { path: location.uri().to_owned(), reason: reason.into() }
}

/// Opens the catalogue, or makes an empty one.
pub async fn open_or_create(location: &Location) -> Result<Dataset> {
    match open(location, None).await {
        Err(Error::NotAStore { .. }) => {}
        other => return other,
    }
    if let Some(path) = location.local() {
        std::fs::create_dir_all(path).map_err(|e| Error::io(path, e))?;
        if let Some(parent) = path.parent() {
            // The directory's own entry has to last too; a parent that cannot be opened is not ours to sync.
            let _ = std::fs::File::open(parent).and_then(|d| d.sync_all());
        }
        // A directory of somebody else's is not to be filled with tables.
        let entries = std::fs::read_dir(path).map_err(|e| Error::io(path, e))?;
        let known = |name: &str| match name.strip_suffix(".lance") {
            Some(table) => matches!(table, LAYERS | schema::ARTIFACTS) || schema::Table::named(table).is_some(),
            None => name.starts_with("layerstore.") || name.starts_with('.'),
        };
        let foreign =
            entries.filter_map(|e| e.ok()).map(|e| e.file_name().to_string_lossy().into_owned()).find(|n| !known(n));
        if let Some(name) = foreign {
            return Err(Error::NotAStore {
                path: path.display().to_string(),
                reason: format!("it holds '{name}' and no table named 'layers': give an empty or new directory"),
            });
        }
    }
    let formats = location.formats();
    create_table(location, LAYERS, formats.catalogue(formats.newest().version)).await?;
    open(location, None).await
}

/// Makes an empty table, unless another process has made it meanwhile.
pub async fn create_table(location: &Location, table: &str, schema: SchemaRef) -> Result<()> {
    // One at a time: Lance turns the later of two creations at once into an overwrite, which would empty the table.
    let _guard = lock::committing(location).await?;
    if location.open_table(table, None).await.is_ok() {
        return Ok(());
    }
    let (uri, params) = location.create_params(table);
    let empty = RecordBatchIterator::new(std::iter::empty(), schema);
    match InsertBuilder::new(uri.as_str()).with_params(&params).execute_stream(empty).caught().await {
        Ok(_) | Err(lance::Error::DatasetAlreadyExists { .. }) => Ok(()),
        Err(e) => Err(storage_error(format!("creating table '{table}' in {}", location.uri()))(e)),
    }
}

/// Reads the rows that `filter` (SQL) selects, by model and layer.
pub async fn rows(location: &Location, dataset: &Dataset, filter: Option<&str>) -> Result<Vec<LayerRecord>> {
    let read = async {
        let mut scan = dataset.scan();
        scan.project(&location.formats().known_columns(LAYERS, dataset))?;
        if let Some(filter) = filter {
            scan.filter(filter)?;
        }
        scan.try_into_stream().await?.try_collect::<Vec<RecordBatch>>().await
    };
    let batches = read.during("reading the catalogue").await?;
    let mut records = Vec::new();
    for batch in batches {
        records.extend(completed(location, batch)?);
    }
    records.sort_by(|a, b| (&a.model, &a.layer).cmp(&(&b.model, &b.layer)));
    Ok(records)
}

/// Reads one row.
pub async fn row(location: &Location, dataset: &Dataset, position: RowPosition) -> Result<LayerRecord> {
    let read = async {
        let columns = dataset.schema().project(&location.formats().known_columns(LAYERS, dataset))?;
        let fragment = dataset.get_fragment(position.fragment).ok_or_else(|| {
            lance::Error::internal(format!("fragment {} is not there, which lists the row", position.fragment))
        })?;
        fragment.take(&[position.row], &columns).await
    };
    let batch = read.during("reading the catalogue").await?;
    completed(location, batch)?.pop().ok_or_else(|| Error::expected("rows of the catalogue", "none", "1"))
}

fn completed(location: &Location, batch: RecordBatch) -> Result<Vec<LayerRecord>> {
    let batch = location.formats().completed(LAYERS, batch);
    read_layers(&batch.map_err(|e| Error::storage("reading the catalogue", e))?)
}

/// Reads the artifacts of all rows.
pub async fn artifacts(dataset: &Dataset) -> Result<Vec<ArtifactId>> {
    let read = async {
        let mut scan = dataset.scan();
        scan.project(&["artifact"])?;
        scan.try_into_stream().await?.try_collect::<Vec<RecordBatch>>().await
    };
    let batches = read.during("reading the catalogue").await?;
    let arrays = batches.iter().filter_map(|b| b.column(0).as_fixed_size_binary_opt());
    Ok(arrays
        .flat_map(|a| a.iter().flatten().filter_map(|id| Some(ArtifactId(id.try_into().ok()?))).collect::<Vec<_>>())
        .collect())
}

/// Returns a text as an SQL literal.
pub fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// Returns the numbers of all versions that still exist.
pub async fn versions(dataset: &Dataset) -> Result<Vec<u64>> {
    let refs = dataset.version_refs().during("listing versions").await?;
    Ok(refs.into_iter().map(|r| r.version).collect())
}

/// Opens the latest version for writing, and checks that this build can write it.
pub async fn writable(location: &Location) -> Result<Dataset> {
    let dataset = location.open_for_write(LAYERS).during(format!("opening {}", location.uri())).await?;
    check_format(location, dataset)
}

/// Returns the transaction properties that `log` shows.
pub fn properties(operation: String, message: Option<&str>) -> Option<Arc<HashMap<String, String>>> {
    let mut map = HashMap::from([(OPERATION.to_owned(), operation)]);
    map.extend(message.map(|m| (MESSAGE.to_owned(), m.to_owned())));
    Some(Arc::new(map))
}

/// Makes `records` all that the catalogue holds of `model`, in one commit, and returns the version. Nothing is committed
/// where that is so already.
pub async fn replace_model(
    location: &Location,
    model: &str,
    records: &[LayerRecord],
    operation: &str,
    message: Option<&str>,
) -> Result<u64> {
    let _guard = lock::committing(location).await?;
    let action = || format!("committing model '{model}'");
    let mut attempt = 1;
    loop {
        let dataset = writable(location).await?;
        let format = location.format_of(&dataset)?;
        let present = rows(location, &dataset, Some(&format!("model = {}", quoted(model)))).await?;
        let unchanged = present.len() == records.len() && {
            let by_layer: HashMap<&str, &LayerRecord> = present.iter().map(|r| (r.layer.as_str(), r)).collect();
            records.iter().all(|r| by_layer.get(r.layer.as_str()).is_some_and(|p| p.same_as(r)))
        };
        if unchanged {
            return Ok(dataset.version_id());
        }
        let batch = without_missing(layers_batch(records)?, (LAYERS, &dataset), (location.uri(), format))?;
        let batch = with_foreign(batch, (LAYERS, &dataset))?;
        let replaced = replace_once(dataset, model, batch, properties(format!("{operation} {model}"), message));
        match replaced.caught().await {
            Ok(version) => return Ok(version),
            Err(lance::Error::RetryableCommitConflict { .. } | lance::Error::CommitConflict { .. })
                if attempt < COMMIT_ATTEMPTS =>
            {
                attempt += 1;
            }
            Err(e) => return Err(storage_error(action())(e)),
        }
    }
}

async fn replace_once(
    dataset: Dataset,
    model: &str,
    batch: RecordBatch,
    properties: Option<Arc<HashMap<String, String>>>,
) -> lance::Result<u64> {
    let dataset = Arc::new(dataset);
    let others = WhenNotMatchedBySource::delete_if(&dataset, &format!("model = {}", quoted(model)))?;
    let mut merge = MergeInsertBuilder::try_new(dataset.clone(), vec!["model".into(), "layer".into()])?;
    merge
        .when_matched(WhenMatched::UpdateAll)
        .when_not_matched(WhenNotMatched::InsertAll)
        .when_not_matched_by_source(others)
        .use_index(false);
    let prepared = merge.try_build()?.execute_uncommitted_batches(vec![batch]).await?;
    let mut transaction = prepared.transaction;
    transaction.transaction_properties = properties;
    let mut commit = CommitBuilder::new(dataset).with_skip_auto_cleanup(true);
    if let Some(affected) = prepared.affected_rows {
        commit = commit.with_affected_rows(affected);
    }
    Ok(commit.execute(transaction).await?.version_id())
}
