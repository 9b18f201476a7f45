//! The catalogue: which artifact is which model's which layer. The only source of truth, and the only commit point.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use arrow::array::{AsArray, RecordBatch, RecordBatchIterator};
use arrow::datatypes::SchemaRef;
use chrono::{DateTime, Utc};
use futures::TryStreamExt;
use lance::Dataset;
use lance::dataset::transaction::{Operation, TransactionBuilder};
use lance::dataset::{
    CommitBuilder, InsertBuilder, MergeInsertBuilder, WhenMatched, WhenNotMatched, WhenNotMatchedBySource,
};
use serde::Serialize;
use tokio::sync::OnceCell;

use super::location::{Location, readable, storage_error};
use super::lock;
use super::names::{Names, Place};
use super::record::{LayerRecord, layers_batch, read_layers};
use super::schema::{self, FORMAT_KEY, FORMAT_VERSION, LAYERS};
use crate::error::{Error, Result};
use crate::layer::ArtifactId;

/// Attempts at a commit before the contention is reported; only object stores, which have no lock, need more than one.
const COMMIT_ATTEMPTS: u32 = 20;

const MESSAGE: &str = "layerstore:message";
const OPERATION: &str = "layerstore:operation";

/// A version of the store, as `log` lists it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VersionInfo {
    pub version: u64,
    pub time: DateTime<Utc>,
    /// What made it: `create`, `import`, `remove` or `restore`, and of what.
    pub operation: String,
    pub message: Option<String>,
    /// Names given to it.
    pub snapshots: Vec<String>,
}

/// A named version.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SnapshotInfo {
    pub name: String,
    pub version: u64,
    /// When the version was committed.
    pub time: DateTime<Utc>,
}

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
    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    /// The latest version: this one, where nothing was committed since.
    pub async fn latest(self) -> Result<Self> {
        let mut dataset = Dataset::clone(&self.dataset);
        dataset.checkout_latest().await.map_err(storage_error("opening the latest version"))?;
        Ok(if dataset.version_id() == self.dataset.version_id() { self } else { dataset.into() })
    }

    pub async fn names(&self) -> Result<&Names> {
        let read = async { Names::read(&self.dataset).await.map_err(storage_error("reading the catalogue")) };
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
    match dataset.schema().metadata.get(FORMAT_KEY) {
        Some(found) if *found == FORMAT_VERSION.to_string() => Ok(dataset),
        Some(found) => Err(Error::Format {
            store: location.uri().to_owned(),
            found: found.clone(),
            known: format!("version {FORMAT_VERSION}"),
        }),
        None => Err(Error::NotAStore {
            path: location.uri().to_owned(),
            reason: format!("its table '{LAYERS}' does not name a format version: another program made it"),
        }),
    }
}

fn not_a_store(location: &Location) -> Error {
    let reason = match location.local() {
        Some(path) if !path.exists() => "the directory does not exist; `layerstore import` makes a store",
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
    create_table(location, LAYERS, schema::layers()).await?;
    open(location, None).await
}

/// Makes an empty table, unless another process has made it meanwhile.
pub async fn create_table(location: &Location, table: &str, schema: SchemaRef) -> Result<()> {
    // One at a time: Lance turns the later of two creations at once into an overwrite, which would empty the table.
    let _guard = lock::committing(location.local()).await?;
    if location.open_table(table, None).await.is_ok() {
        return Ok(());
    }
    let (uri, params) = location.create_params(table);
    let empty = RecordBatchIterator::new(std::iter::empty(), schema);
    match InsertBuilder::new(uri.as_str()).with_params(&params).execute_stream(empty).await {
        Ok(_) | Err(lance::Error::DatasetAlreadyExists { .. }) => Ok(()),
        Err(e) => Err(storage_error(format!("creating table '{table}' in {}", location.uri()))(e)),
    }
}

/// The rows that `filter` (SQL) selects, by model and layer.
pub async fn rows(dataset: &Dataset, filter: Option<&str>) -> Result<Vec<LayerRecord>> {
    let read = async {
        let mut scan = dataset.scan();
        if let Some(filter) = filter {
            scan.filter(filter)?;
        }
        scan.try_into_stream().await?.try_collect::<Vec<RecordBatch>>().await
    };
    let batches = read.await.map_err(storage_error("reading the catalogue"))?;
    let mut records = Vec::new();
    for batch in &batches {
        records.extend(read_layers(batch)?);
    }
    records.sort_by(|a, b| (&a.model, &a.layer).cmp(&(&b.model, &b.layer)));
    Ok(records)
}

/// One row.
pub async fn row(dataset: &Dataset, place: Place) -> Result<LayerRecord> {
    let read = async {
        let fragment = dataset.get_fragment(place.fragment).ok_or_else(|| {
            lance::Error::internal(format!("fragment {} is not there, which lists the row", place.fragment))
        })?;
        fragment.take(&[place.row], dataset.schema()).await
    };
    let batch = read.await.map_err(storage_error("reading the catalogue"))?;
    read_layers(&batch)?.pop().ok_or_else(|| Error::expected("rows of the catalogue", "none", "1"))
}

/// The artifacts of all rows.
pub async fn artifacts(dataset: &Dataset) -> Result<Vec<ArtifactId>> {
    let read = async {
        let mut scan = dataset.scan();
        scan.project(&["artifact"])?;
        scan.try_into_stream().await?.try_collect::<Vec<RecordBatch>>().await
    };
    let batches = read.await.map_err(storage_error("reading the catalogue"))?;
    let arrays = batches.iter().filter_map(|b| b.column(0).as_fixed_size_binary_opt());
    Ok(arrays
        .flat_map(|a| a.iter().flatten().filter_map(|id| Some(ArtifactId(id.try_into().ok()?))).collect::<Vec<_>>())
        .collect())
}

/// A text as SQL.
pub fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// Numbers of all versions that still exist.
pub async fn versions(dataset: &Dataset) -> Result<Vec<u64>> {
    let refs = dataset.version_refs().await.map_err(storage_error("listing versions"))?;
    Ok(refs.into_iter().map(|r| r.version).collect())
}

/// All versions, newest first.
pub async fn log(dataset: &Dataset) -> Result<Vec<VersionInfo>> {
    let mut names: HashMap<u64, Vec<String>> = HashMap::new();
    for snapshot in tags(dataset).await? {
        names.entry(snapshot.1).or_default().push(snapshot.0);
    }
    let mut numbers = versions(dataset).await?;
    numbers.sort_unstable_by(|a, b| b.cmp(a));
    let mut log = Vec::with_capacity(numbers.len());
    for version in numbers {
        let read = dataset.read_version_transaction(version).await.map_err(storage_error("reading the log"))?;
        let property = |key: &str| {
            let properties = read.transaction.as_ref()?.transaction_properties.as_ref()?;
            properties.get(key).cloned()
        };
        log.push(VersionInfo {
            version,
            time: read.timestamp,
            operation: property(OPERATION)
                .unwrap_or_else(|| if version == 1 { "create".into() } else { "changed by another program".into() }),
            message: property(MESSAGE),
            snapshots: names.remove(&version).unwrap_or_default(),
        });
    }
    Ok(log)
}

/// Snapshot names and versions, by name.
pub async fn tags(dataset: &Dataset) -> Result<Vec<(String, u64)>> {
    let tags = dataset.tags().list().await.map_err(storage_error("listing snapshots"))?;
    let mut tags: Vec<(String, u64)> = tags.into_iter().map(|(name, tag)| (name, tag.version)).collect();
    tags.sort();
    Ok(tags)
}

/// A snapshot of the latest version.
pub async fn create_snapshot(location: &Location, name: &str) -> Result<SnapshotInfo> {
    check_snapshot_name(name)?;
    // gc must not remove the version between the look and the name.
    let _guard = lock::committing(location.local()).await?;
    let dataset = writable(location).await?;
    let version = dataset.version_id();
    let action = format!("creating snapshot '{name}'");
    match dataset.tags().create(name, version).await {
        Ok(()) => Ok(SnapshotInfo { name: name.to_owned(), version, time: dataset.version().timestamp }),
        Err(lance::Error::RefConflict { .. }) => {
            let taken = dataset.tags().get_version(name).await.map_err(storage_error(action))?;
            Err(Error::SnapshotExists { name: name.to_owned(), version: taken })
        }
        Err(e) => Err(storage_error(action)(e)),
    }
}

/// All snapshots, by version and name.
pub async fn list_snapshots(dataset: &Dataset) -> Result<Vec<SnapshotInfo>> {
    let mut times: BTreeMap<u64, DateTime<Utc>> = BTreeMap::new();
    let mut list = Vec::new();
    for (name, version) in tags(dataset).await? {
        let time = match times.get(&version) {
            Some(time) => *time,
            None => {
                dataset.read_version_transaction(version).await.map_err(storage_error("listing snapshots"))?.timestamp
            }
        };
        times.insert(version, time);
        list.push(SnapshotInfo { name, version, time });
    }
    list.sort_by(|a, b| (a.version, &a.name).cmp(&(b.version, &b.name)));
    Ok(list)
}

/// Takes a name away from its version.
pub async fn delete_snapshot(location: &Location, name: &str) -> Result<SnapshotInfo> {
    let dataset = writable(location).await?;
    let known = list_snapshots(&dataset).await?;
    let Some(found) = known.iter().find(|s| s.name == name) else {
        return Err(Error::UnknownSnapshot {
            name: name.to_owned(),
            known: known.into_iter().map(|s| s.name).collect(),
        });
    };
    dataset.tags().delete(name).await.map_err(storage_error(format!("deleting snapshot '{name}'")))?;
    Ok(found.clone())
}

/// The version that a snapshot's name, or a version's number, stands for.
pub async fn resolve(dataset: &Dataset, name: &str) -> Result<u64> {
    if let Ok(version) = name.parse::<u64>() {
        return Ok(version);
    }
    let tags = tags(dataset).await?;
    match tags.iter().find(|(tag, _)| tag == name) {
        Some((_, version)) => Ok(*version),
        None => {
            Err(Error::UnknownSnapshot { name: name.to_owned(), known: tags.into_iter().map(|(tag, _)| tag).collect() })
        }
    }
}

fn check_snapshot_name(name: &str) -> Result<()> {
    let invalid = |reason| Err(Error::InvalidName { what: "snapshot", name: name.to_owned(), reason });
    if name.is_empty() || name.len() > 128 {
        return invalid("it has to have 1 to 128 characters");
    }
    if name.bytes().all(|b| b.is_ascii_digit()) {
        return invalid("a number stands for a version");
    }
    if !name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')) {
        return invalid("letters, digits, '.', '-' and '_' can be used");
    }
    if name.starts_with('.') || name.ends_with('.') || name.contains("..") || name.ends_with(".lock") {
        return invalid("it must not start or end with '.', hold '..' or end with '.lock'");
    }
    Ok(())
}

async fn writable(location: &Location) -> Result<Dataset> {
    let dataset = location.open_for_write(LAYERS).await;
    check_format(location, dataset.map_err(storage_error(format!("opening {}", location.uri())))?)
}

fn properties(operation: String, message: Option<&str>) -> Option<Arc<HashMap<String, String>>> {
    let mut map = HashMap::from([(OPERATION.to_owned(), operation)]);
    map.extend(message.map(|m| (MESSAGE.to_owned(), m.to_owned())));
    Some(Arc::new(map))
}

/// Makes `records` all that the catalogue holds of `model`, in one commit, and gives the version. Nothing is committed
/// where that is so already.
pub async fn replace_model(
    location: &Location,
    model: &str,
    records: &[LayerRecord],
    operation: &str,
    message: Option<&str>,
) -> Result<u64> {
    let _guard = lock::committing(location.local()).await?;
    let action = || format!("committing model '{model}'");
    let mut attempt = 1;
    loop {
        let dataset = writable(location).await?;
        let present = rows(&dataset, Some(&format!("model = {}", quoted(model)))).await?;
        let unchanged = present.len() == records.len() && {
            let by_layer: HashMap<&str, &LayerRecord> = present.iter().map(|r| (r.layer.as_str(), r)).collect();
            records.iter().all(|r| by_layer.get(r.layer.as_str()).is_some_and(|p| p.same_as(r)))
        };
        if unchanged {
            return Ok(dataset.version_id());
        }
        match replace_once(dataset, model, records, properties(format!("{operation} {model}"), message)).await {
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
    records: &[LayerRecord],
    properties: Option<Arc<HashMap<String, String>>>,
) -> lance::Result<u64> {
    let dataset = Arc::new(dataset);
    let batch = layers_batch(records).map_err(|e| lance::Error::invalid_input(e.to_string()))?;
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

/// Makes the catalogue of an older version the latest, as a new version.
pub async fn restore(location: &Location, name: &str) -> Result<SnapshotInfo> {
    let _guard = lock::committing(location.local()).await?;
    let dataset = writable(location).await?;
    let version = resolve(&dataset, name).await?;
    open(location, Some(version)).await?;
    let restored = |dataset: &Dataset| SnapshotInfo {
        name: name.to_owned(),
        version: dataset.version_id(),
        time: dataset.version().timestamp,
    };
    if version == dataset.version_id() {
        return Ok(restored(&dataset));
    }
    let transaction = TransactionBuilder::new(dataset.version_id(), Operation::Restore { version })
        .transaction_properties(properties(format!("restore {name}"), None))
        .build();
    let commit = CommitBuilder::new(Arc::new(dataset)).with_skip_auto_cleanup(true).execute(transaction).await;
    match commit {
        Ok(dataset) => Ok(restored(&dataset)),
        Err(e) => Err(Error::Storage { action: format!("restoring '{name}'"), message: readable(&e) }),
    }
}
