//! The catalogue: which artifact is which model's which layer. The only source of truth, and the only commit point.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{RecordBatch, RecordBatchIterator};
use arrow::datatypes::SchemaRef;
use futures::TryStreamExt;
use lance::Dataset;
use lance::dataset::transaction::Operation;
use lance::dataset::{
    CommitBuilder, InsertBuilder, MergeInsertBuilder, WhenMatched, WhenNotMatched, WhenNotMatchedBySource,
};
use tokio::sync::OnceCell;

use super::format::{with_foreign, without_missing};
use super::layout::{VERSIONS, version_of};
use super::listing::{names_in, table_folders};
use super::location::{Location, Place};
use super::lock;
use super::names::{Names, RowPosition};
use super::record::{LayerRecord, layers_batches, read_layers};
use super::scan::batch_rows;
use super::schema::{self, LAYERS};
use super::synced;
use super::waiting::{Waiting, storage_error};
use crate::error::{Error, Result};

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
///
/// # Errors
/// [`Error::NotAStore`] where there is none, [`Error::Damaged`] where there are other tables of a store, and when it cannot be read.
pub async fn open(location: &Location, version: Option<u64>) -> Result<Dataset> {
    match opened(location, version).await {
        Err(Error::NotAStore { path, reason }) if version.is_none() => match leftovers(location).await? {
            None => Err(Error::NotAStore { path, reason }),
            // Unless another process has made the store meanwhile: it begins with the catalogue.
            Some(found) => match opened(location, None).await {
                Err(Error::NotAStore { .. }) => Err(Error::Damaged {
                    action: format!("opening {}", location.uri()),
                    message: format!(
                        "it holds {found}, and no version of table '{LAYERS}', the catalogue: a copy that was cut short, or a damaged \
                         store. Bring the table back, or give an empty or new directory"
                    ),
                    source: None,
                }),
                other => other,
            },
        },
        other => other,
    }
}

/// Opens the newest version of the catalogue that can be read: the latest one, where that is not damaged.
///
/// # Errors
/// As [`open`] where the latest version cannot be opened for another reason, or no version can be read.
pub async fn open_newest_readable(location: &Location) -> Result<Dataset> {
    let damaged = match open(location, None).await {
        Err(e @ Error::Damaged { .. }) => e,
        other => return other,
    };
    let mut versions: Vec<u64> =
        names_in(location, LAYERS, &[VERSIONS]).await?.iter().filter_map(|file| version_of(file)).collect();
    versions.sort_unstable_by(|a, b| b.cmp(a));
    for version in versions {
        if let Ok(dataset) = opened(location, Some(version)).await {
            return Ok(dataset);
        }
    }
    Err(damaged)
}

async fn opened(location: &Location, version: Option<u64>) -> Result<Dataset> {
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
        Err(e) => Err(match storage_error(format!("opening {}", location.uri()))(e) {
            Error::Damaged { action, message, source } if version.is_none() => {
                let message = format!("{message}; `layerstore verify` says what helps");
                Error::Damaged { action, message, source }
            }
            other => other,
        }),
    }
}

fn check_format(location: &Location, dataset: Dataset) -> Result<Dataset> {
    location.format_of(&dataset)?;
    Ok(dataset)
}

fn not_a_store(location: &Location) -> Error {
    let reason = match location.place() {
        Place::Local(path) if !path.exists() => {
            let link = location.link().map(|link| format!(" (the symbolic link {} leads there)", link.display()));
            format!("the directory does not exist{}; `layerstore import` makes a store", link.unwrap_or_default())
        }
        _ => "it holds no table named 'layers'; `layerstore import` makes a store".to_owned(),
    };
    Error::NotAStore { path: location.uri().to_owned(), reason }
}

/// Opens the catalogue, or makes an empty one.
pub async fn open_or_create(location: &Location) -> Result<Dataset> {
    match open(location, None).await {
        Err(Error::NotAStore { .. }) => {}
        other => return other,
    }
    if let Some(path) = location.local() {
        synced::create_all(path)?;
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

/// What is there of a store without a catalogue.
async fn leftovers(location: &Location) -> Result<Option<String>> {
    let known = |name: &String| name == schema::ARTIFACTS || schema::Table::named(name).is_some();
    if let Some(table) = table_folders(location).await?.into_iter().find(known) {
        return Ok(Some(format!("table '{table}'")));
    }
    let data = names_in(location, LAYERS, &["data"]).await?;
    Ok((!data.is_empty()).then(|| format!("data files of table '{LAYERS}'")))
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
        scan.project(&location.formats().known_columns(LAYERS, dataset))?.batch_size(batch_rows(dataset));
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

/// What a change of the catalogue puts its records in the place of. It is looked up when the change is committed, in the version
/// that the commit builds on, so that changes of other layers, made meanwhile, stay.
#[derive(Debug, Clone, Copy)]
pub enum Scope<'a> {
    /// All layers of the model.
    Model,
    /// The layer of this name, and those behind it.
    Part(&'a str),
    /// Layers that have the records' names.
    Layers,
    /// Layers that have the records' names, in a store that holds no others.
    Alone,
}

/// Whether a layer is `name`, or behind it, as `block.ffn` is behind `block`.
pub fn is_part(layer: &str, name: &str) -> bool {
    layer.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// Returns the error of a store at `uri` that holds another layer than those that it is for.
pub fn not_alone(uri: &str, other: &LayerRecord, (model, layers): (&str, &[&str])) -> Error {
    Error::expected(
        format!("layers in {uri}"),
        format!("layer '{}' of model '{}'", other.layer, other.model),
        format!("none, or layer '{}' of model '{model}' alone", layers.join("', '")),
    )
}

/// Puts `records` in the place of what the catalogue holds of `model` in a scope, in one commit, and returns the version. Nothing is
/// committed where that is so already. The caller holds the lock of commits.
pub async fn replace(
    location: &Location,
    (model, scope): (&str, Scope<'_>),
    records: &[LayerRecord],
    operation: &str,
    message: Option<&str>,
) -> Result<u64> {
    let new: HashMap<&str, &LayerRecord> = records.iter().map(|r| (r.layer.as_str(), r)).collect();
    let mut attempt = 1;
    loop {
        let dataset = writable(location).await?;
        let filter = (!matches!(scope, Scope::Alone)).then(|| format!("model = {}", quoted(model)));
        let mut present = rows(location, &dataset, filter.as_deref()).await?;
        if let Scope::Alone = scope
            && let Some(other) = present.iter().find(|r| r.model != model || !new.contains_key(r.layer.as_str()))
        {
            let names: Vec<&str> = new.keys().copied().collect();
            return Err(not_alone(location.uri(), other, (model, &names)));
        }
        present.retain(|r| match scope {
            Scope::Model => true,
            Scope::Part(name) => is_part(&r.layer, name) || new.contains_key(r.layer.as_str()),
            Scope::Layers | Scope::Alone => new.contains_key(r.layer.as_str()),
        });
        let unchanged = present.len() == records.len()
            && present.iter().all(|p| new.get(p.layer.as_str()).is_some_and(|r| r.same_as(p)));
        if unchanged {
            return Ok(dataset.version_id());
        }
        let removed: Vec<&str> =
            present.iter().map(|r| r.layer.as_str()).filter(|layer| !new.contains_key(layer)).collect();
        let removed = match scope {
            // All that is not among the records: no list of names to be gone through.
            Scope::Model => Some(format!("model = {}", quoted(model))),
            _ if removed.is_empty() => None,
            _ => {
                let names: Vec<String> = removed.into_iter().map(quoted).collect();
                Some(format!("model = {} AND layer IN ({})", quoted(model), names.join(", ")))
            }
        };
        let change = Change { model, records, removed, operation: format!("{operation} {model}"), message };
        if let Some(version) = change.commit(location, dataset, &mut attempt).await? {
            return Ok(version);
        }
    }
}

/// A change of the catalogue's rows.
pub struct Change<'a> {
    /// The model that errors name.
    pub model: &'a str,
    /// Rows to update, by model and layer, or to insert.
    pub records: &'a [LayerRecord],
    /// Selects rows to delete (SQL), those aside that are among the records.
    pub removed: Option<String>,
    /// What the log calls it.
    pub operation: String,
    /// The message in the log.
    pub message: Option<&'a str>,
}

impl Change<'_> {
    /// Commits the change on the version that is open, the latest one, and returns the new version; `None` where another commit came
    /// between, and the change is to be made of the latest version again. `attempt` counts these.
    ///
    /// # Errors
    /// When the storage refuses, or others commit again and again.
    pub async fn commit(self, location: &Location, latest: Dataset, attempt: &mut u32) -> Result<Option<u64>> {
        let format = location.format_of(&latest)?;
        let fitted = |batch| {
            let batch = without_missing(batch, (LAYERS, &latest), (location.uri(), format))?;
            with_foreign(batch, (LAYERS, &latest))
        };
        let batches = layers_batches(self.records)?.into_iter().map(fitted).collect::<Result<Vec<_>>>()?;
        let alone = !matches!(location.place(), Place::Remote);
        let committed = commit_once(latest, self.removed, batches, (properties(self.operation, self.message), alone));
        match committed.caught().await {
            Ok(version) => Ok(Some(version)),
            Err(lance::Error::RetryableCommitConflict { .. } | lance::Error::CommitConflict { .. })
                if *attempt < COMMIT_ATTEMPTS =>
            {
                *attempt += 1;
                Ok(None)
            }
            Err(e) => Err(storage_error(format!("committing model '{}'", self.model))(e)),
        }
    }
}

/// Updates rows by model and layer, inserts those that are not there, and deletes those that `removed` (SQL) selects and that are not
/// in the batches. `alone` says that nobody else commits meanwhile.
async fn commit_once(
    dataset: Dataset,
    removed: Option<String>,
    batches: Vec<RecordBatch>,
    (properties, alone): (Option<Arc<HashMap<String, String>>>, bool),
) -> lance::Result<u64> {
    let dataset = Arc::new(dataset);
    let others = match removed {
        Some(removed) => WhenNotMatchedBySource::delete_if(&dataset, &removed)?,
        None => WhenNotMatchedBySource::Keep,
    };
    let mut merge = MergeInsertBuilder::try_new(dataset.clone(), vec!["model".into(), "layer".into()])?;
    merge
        .when_matched(WhenMatched::UpdateAll)
        .when_not_matched(WhenNotMatched::InsertAll)
        .when_not_matched_by_source(others)
        .use_index(false);
    let prepared = merge.try_build()?.execute_uncommitted_batches(batches).await?;
    let mut transaction = prepared.transaction;
    transaction.transaction_properties = properties;
    if let Operation::Update { inserted_rows_filter, .. } = &mut transaction.operation
        && alone
    {
        // By which commits at the same time find out that they insert the same rows: 32 KiB in each of two files of a version.
        *inserted_rows_filter = None;
    }
    let mut commit = CommitBuilder::new(dataset).with_skip_auto_cleanup(true);
    if let Some(affected) = prepared.affected_rows {
        commit = commit.with_affected_rows(affected);
    }
    Ok(commit.execute(transaction).await?.version_id())
}
