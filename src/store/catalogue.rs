//! The catalogue: which artifact is which model's which layer. The only source of truth, and the only commit point.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::RecordBatchIterator;
use arrow::datatypes::SchemaRef;
use futures::FutureExt;
use lance::Dataset;
use lance::dataset::InsertBuilder;
use lance::deps::datafusion::scalar::ScalarValue;
use lru::LruCache;
use tokio::sync::OnceCell;

use super::layout::{VERSIONS, version_of};
use super::listing::{names_in, table_folders};
use super::location::Location;
use super::lock;
use super::lookup::{BY_MODEL, Lookup};
use super::names::Names;
use super::place::Place;
use super::record::LayerRecord;
use super::rows;
use super::schema::{self, LAYERS};
use super::strict::is_conflict;
use super::synced;
use super::waiting::{Waiting, storage_error};
use crate::error::{Error, Result};

const READING: &str = "reading the catalogue";

/// Models whose names a version keeps, once they were looked up.
const MODELS_KEPT: NonZeroUsize = NonZeroUsize::new(16).unwrap();

/// The catalogue at one version, and the names in it once somebody has looked one up.
#[derive(Debug, Clone)]
pub struct Catalogue {
    dataset: Arc<Dataset>,
    index: Arc<OnceCell<Lookup>>,
    /// Names that the index does not cover.
    rest: Arc<OnceCell<Names>>,
    /// Names that it covers, by model.
    models: Arc<Mutex<LruCache<String, Arc<Names>>>>,
}

impl From<Dataset> for Catalogue {
    fn from(dataset: Dataset) -> Self {
        let models = Arc::new(Mutex::new(LruCache::new(MODELS_KEPT)));
        Catalogue { dataset: Arc::new(dataset), index: Arc::default(), rest: Arc::default(), models }
    }
}

impl Catalogue {
    /// Returns the table at this version.
    pub fn dataset(&self) -> &Arc<Dataset> {
        &self.dataset
    }

    /// Returns the latest version: this one, where nothing was committed since.
    ///
    /// # Errors
    /// When the storage refuses, or the store has come to be of a format that this build does not know.
    pub async fn latest(self, location: &Location) -> Result<Self> {
        let opened = location.open_table(LAYERS, None).await;
        let dataset = opened.map_err(storage_error("opening the latest version"))?;
        let file = |dataset: &Dataset| dataset.manifest_location().e_tag.clone();
        if dataset.version_id() == self.dataset.version_id() && file(&dataset) == file(&self.dataset) {
            return Ok(self);
        }
        Ok(check_format(location, dataset)?.into())
    }

    /// Finds the row of a layer.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn find(&self, location: &Location, model: &str, layer: &str) -> Result<Option<LayerRecord>> {
        let found = match self.covered(location, model).await?.find(model, layer) {
            Some(found) => Some(found),
            None => self.rest().await?.find(model, layer),
        };
        match found {
            Some(found) => rows::row(location, &self.dataset, found).await.map(Some),
            None => Ok(None),
        }
    }

    /// Returns the names of a model's layers.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn layers_of(&self, location: &Location, model: &str) -> Result<Vec<String>> {
        let (covered, rest) = (self.covered(location, model).await?, self.rest().await?);
        Ok(rest.layers_of(model).chain(covered.layers_of(model)).map(str::to_owned).collect())
    }

    /// Returns the names of all models. All rows' names are read for it.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn models(&self) -> Result<Vec<String>> {
        let read = async { Names::read(&self.dataset, self.dataset.fragments()).await };
        Ok(read.boxed().during(READING).await?.models())
    }

    /// Reads the names that no index covers, as a lookup and a change do.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn look(&self) -> Result<()> {
        self.rest().await.map(drop)
    }

    async fn index(&self) -> Result<&Lookup> {
        let opened = async { Lookup::open(&self.dataset, BY_MODEL).await };
        self.index.get_or_try_init(|| opened.boxed().during(READING)).await
    }

    async fn rest(&self) -> Result<&Names> {
        let lookup = self.index().await?;
        let read = async { Names::read(&self.dataset, lookup.rest()).await };
        self.rest.get_or_try_init(|| read.boxed().during(READING)).await
    }

    /// The names of a model's rows that the index covers.
    async fn covered(&self, location: &Location, model: &str) -> Result<Arc<Names>> {
        let kept = || self.models.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(names) = kept().get(model) {
            return Ok(names.clone());
        }
        let lookup = self.index().await?;
        let read = async {
            let hits = lookup.hits(ScalarValue::from(model)).await?;
            let columns = location.formats().known_columns(LAYERS, &self.dataset);
            let mut names = Names::at(&self.dataset, &hits.addresses, &columns).await?;
            names.extend(Names::read(&self.dataset, &hits.unread).await?);
            Ok(names)
        };
        let names = Arc::new(read.boxed().during(READING).await?);
        kept().put(model.to_owned(), names.clone());
        Ok(names)
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
        require_own(path)?;
    }
    let formats = location.formats();
    create_table(location, LAYERS, formats.catalogue(formats.newest().version)).await?;
    open(location, None).await
}

/// Looks whether [`open_or_create`] would refuse. Nothing is made.
pub async fn could_create(location: &Location) -> Result<()> {
    match open(location, None).await {
        Err(Error::NotAStore { .. }) => match location.local() {
            Some(path) if path.exists() => require_own(path),
            _ => Ok(()),
        },
        opened => opened.map(drop),
    }
}

/// Refuses a directory of somebody else's, which is not to be filled with tables.
fn require_own(path: &Path) -> Result<()> {
    let entries = std::fs::read_dir(path).map_err(|e| Error::io(path, e))?;
    let known = |name: &str| match name.strip_suffix(".lance") {
        Some(table) => matches!(table, LAYERS | schema::ARTIFACTS) || schema::Table::named(table).is_some(),
        None => name.starts_with("layerstore.") || name.starts_with('.'),
    };
    let mut names = entries.filter_map(|e| e.ok()).map(|e| e.file_name().to_string_lossy().into_owned());
    match names.find(|name| !known(name)) {
        None => Ok(()),
        Some(name) => Err(Error::NotAStore {
            path: path.display().to_string(),
            reason: format!("it holds '{name}' and no table named 'layers': give an empty or new directory"),
        }),
    }
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
        Err(e) if is_conflict(&e) && location.open_table(table, None).await.is_ok() => Ok(()),
        Err(e) => Err(storage_error(format!("creating table '{table}' in {}", location.uri()))(e)),
    }
}

/// Returns the numbers of all versions that still exist.
pub async fn versions(dataset: &Dataset) -> Result<Vec<u64>> {
    let refs = dataset.version_refs().during("listing versions").await?;
    Ok(refs.into_iter().map(|r| r.version).collect())
}

/// Opens the latest version to write names of versions, found as readers find it.
pub async fn nameable(location: &Location) -> Result<Dataset> {
    if let Some(newest) = location.newest(LAYERS)
        && let Ok(dataset) = location.open_for_write_at(LAYERS, Some(newest)).await
    {
        return check_format(location, dataset);
    }
    writable(location).await
}

/// Opens the latest version for writing, and checks that this build can write it.
pub async fn writable(location: &Location) -> Result<Dataset> {
    let dataset = location.open_for_write(LAYERS).during(format!("opening {}", location.uri())).await?;
    check_format(location, dataset)
}
