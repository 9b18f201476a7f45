//! The list of artifacts at one version, looked into by name and by recipe.

use std::sync::Arc;

use arrow::array::RecordBatch;
use futures::future::BoxFuture;
use futures::{FutureExt, TryStreamExt};
use lance::Dataset;
use lance::deps::datafusion::scalar::ScalarValue;
use lance::table::format::Fragment;

use super::location::Location;
use super::lookup::{BY_ARTIFACT, BY_RECIPE, Indexed, Lookup};
use super::record::{ArtifactRecord, read_artifacts};
use super::scan::{batch_rows, rows_at};
use super::schema::ARTIFACTS;
use super::waiting::{Waiting, storage_error};
use crate::error::{Error, Result};
use crate::layer::ArtifactId;

const READING: &str = "reading the table of artifacts";

/// The list of artifacts, open at its latest version.
#[derive(Debug)]
pub struct Listed {
    location: Location,
    /// `None` where there is no list yet.
    list: Option<Open>,
}

#[derive(Debug)]
struct Open {
    dataset: Arc<Dataset>,
    by_artifact: Lookup,
    by_recipe: Lookup,
}

impl Listed {
    /// Opens the list.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn open(location: &Location) -> Result<Self> {
        let dataset = match location.open_table(ARTIFACTS, None).await {
            Ok(dataset) => Arc::new(dataset),
            Err(lance::Error::DatasetNotFound { .. }) => return Ok(Listed { location: location.clone(), list: None }),
            Err(e) => return Err(storage_error("opening the table of artifacts")(e)),
        };
        let opened = async {
            let by_artifact = Lookup::open(&dataset, BY_ARTIFACT).await?;
            let by_recipe = Lookup::open(&dataset, BY_RECIPE).await?;
            Ok(Open { dataset: dataset.clone(), by_artifact, by_recipe })
        };
        Ok(Listed { location: location.clone(), list: Some(opened.boxed().during(READING).await?) })
    }

    /// Reads all records in their order, each as often as it was written.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn all(&self) -> Result<Vec<ArtifactRecord>> {
        let Some(list) = &self.list else { return Ok(vec![]) };
        self.read(scanned(list, (&self.location, list.dataset.fragments()), None).boxed()).await
    }

    /// Reads the records that an index does not cover: in a small store, all.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn rest(&self) -> Result<Vec<ArtifactRecord>> {
        let Some(list) = &self.list else { return Ok(vec![]) };
        let fragments = ordered([list.by_artifact.rest(), list.by_recipe.rest()].concat());
        self.read(scanned(list, (&self.location, &fragments), None).boxed()).await
    }

    /// Reads the records of an artifact: several where it was written several times.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn of_artifact(&self, id: ArtifactId) -> Result<Vec<ArtifactRecord>> {
        self.find((BY_ARTIFACT, id.0), true).await
    }

    /// Reads the records of an artifact that the index covers: [`Listed::rest`] has the others.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn covered_of_artifact(&self, id: ArtifactId) -> Result<Vec<ArtifactRecord>> {
        self.find((BY_ARTIFACT, id.0), false).await
    }

    /// Reads the records of artifacts of a recipe that the index covers: [`Listed::rest`] has the others.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn covered_of_recipe(&self, recipe: &[u8; 32]) -> Result<Vec<ArtifactRecord>> {
        self.find((BY_RECIPE, *recipe), false).await
    }

    /// Reads the records that an index has of a hash, and with `rest` also those that it does not cover.
    async fn find(&self, (by, hash): (Indexed, [u8; 32]), rest: bool) -> Result<Vec<ArtifactRecord>> {
        let Some(list) = &self.list else { return Ok(vec![]) };
        let lookup = if by == BY_ARTIFACT { &list.by_artifact } else { &list.by_recipe };
        let read = async {
            let hits = lookup.hits(ScalarValue::FixedSizeBinary(32, Some(hash.to_vec()))).await?;
            let columns = self.location.formats().known_columns(ARTIFACTS, &list.dataset);
            let columns = list.dataset.schema().project(&columns)?;
            let mut batches = rows_at(&list.dataset, &hits.addresses, &columns).await?;
            let more = if rest { lookup.rest() } else { &[] };
            let fragments = ordered([&hits.unread, more].concat());
            let filter = format!("{} = X'{}'", by.column, ArtifactId(hash));
            batches.extend(scanned(list, (&self.location, &fragments), Some(&filter)).await?);
            Ok(batches)
        };
        let mut records = self.read(read.boxed()).await?;
        // An address is where the index says that the hash is.
        records.retain(|record| if by == BY_ARTIFACT { record.artifact.0 == hash } else { record.recipe == hash });
        Ok(records)
    }

    async fn read(&self, batches: BoxFuture<'_, lance::Result<Vec<RecordBatch>>>) -> Result<Vec<ArtifactRecord>> {
        let mut records = vec![];
        for batch in batches.during(READING).await? {
            let completed = self.location.formats().completed(ARTIFACTS, batch);
            records.extend(read_artifacts(&completed.map_err(|e| Error::storage(READING, e))?)?);
        }
        Ok(records)
    }
}

/// Fragments in the order of their table, each once.
fn ordered(mut fragments: Vec<Fragment>) -> Vec<Fragment> {
    fragments.sort_unstable_by_key(|fragment| fragment.id);
    fragments.dedup_by_key(|fragment| fragment.id);
    fragments
}

async fn scanned(
    list: &Open,
    (location, fragments): (&Location, &[Fragment]),
    filter: Option<&str>,
) -> lance::Result<Vec<RecordBatch>> {
    if fragments.is_empty() {
        return Ok(vec![]);
    }
    let mut scan = list.dataset.scan();
    scan.project(&location.formats().known_columns(ARTIFACTS, &list.dataset))?
        .scan_in_order(true)
        .use_scalar_index(false)
        .batch_size(batch_rows(&list.dataset));
    if fragments.len() < list.dataset.fragments().len() {
        scan.with_fragments(fragments.to_vec());
    }
    if let Some(filter) = filter {
        scan.filter(filter)?;
    }
    scan.try_into_stream().await?.try_collect().await
}
