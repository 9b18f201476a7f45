//! A store on its way from damaged to whole.
//!
//! What stands in the way is set aside first: manifests of the list and of data tables that cannot be read, and fragments whose rows
//! cannot. Then what the list or a table lacks is completed from the data files, as every import does it; then whoever repairs adds
//! artifacts that are still missing or damaged, from wherever it has them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::RecordBatch;
use futures::TryStreamExt;
use lance::Dataset;

use super::agreement::Names;
use super::append::replace_fragments;
use super::aside;
use super::catalogue;
use super::heal::{self, Healed};
use super::index_check;
use super::indexing;
use super::layout::{VERSION_HINT, VERSIONS, version_of};
use super::listing::{names_in, table_folders};
use super::location::Location;
use super::lock;
use super::lookup::indices_of;
use super::metadata;
use super::properties::{TableVersions, properties};
use super::record::{LayerRecord, read_artifacts};
use super::root::Store;
use super::scan::batch_rows;
use super::schema::{ARTIFACTS, LAYERS, Table};
use super::shared::Shared;
use super::verify::{VerifyDepth, VerifyReport, verify};
use super::waiting::{Waiting, is_refused, storage_error};
use super::writer::{Provenance, Writer};
use crate::error::{Error, Result};
use crate::layer::{ArtifactId, Parts};

/// How long a repair waits for imports to finish before it gives up.
const PATIENCE: Duration = Duration::from_secs(10);

/// A store that is being repaired. No import or gc is at work meanwhile that could be in the way.
pub(crate) struct Repairing {
    shared: Arc<Shared>,
    writer: Writer,
    /// Addresses of files that were set aside.
    pub set_aside: Vec<String>,
    /// What was found again in the store itself.
    pub healed: Healed,
    /// What is still damaged.
    pub report: VerifyReport,
    names: Names,
    added: BTreeSet<ArtifactId>,
}

impl Store {
    /// Sets aside what stands in the way, completes what is still in the data files, and looks for what is still damaged.
    ///
    /// # Errors
    /// When no version of the catalogue can be opened, an import is at work and does not finish in time, or the storage
    /// refuses.
    pub(crate) async fn begin_repair(&self, seen: impl Fn(usize, usize) + Send + Sync + 'static) -> Result<Repairing> {
        let shared = self.shared();
        let location = &shared.location;
        let set_aside = {
            let (held, _commit) =
                (lock::collecting(location, "repair", PATIENCE).await?, lock::committing(location).await?);
            // First, since nothing is committed on a version that cannot be read.
            let mut files = roll_back(location).await?;
            held.fence(location).await?;
            files.extend(clear(shared).await?);
            mend_indices(location).await?;
            files
        };
        let (writer, healed) = heal::begin(shared, true).await?;
        let report = verify(shared, VerifyDepth::Full, Arc::new(seen)).await?;
        let mut names = Names::default();
        if !report.corrupt.is_empty() {
            let latest = catalogue::open(location, None).await?;
            names.add_readable(location, catalogue::versions(&latest).await?).await;
        }
        Ok(Repairing { shared: shared.clone(), writer, set_aside, healed, report, names, added: BTreeSet::new() })
    }

    /// Reads the parts of an artifact, and how far they were measured to be from their source; `None` where the store does not have
    /// it as it was written.
    ///
    /// # Errors
    /// When the storage refuses.
    pub(crate) async fn artifact(&self, id: ArtifactId) -> Result<Option<(Parts, Provenance)>> {
        let data = &self.shared().data;
        let read = async {
            let record = data.record(id).await?;
            let parts = data.verified(&record).await?;
            let (relative_error, error_basis) = (record.relative_error, record.error_basis);
            Ok((parts, Provenance { recipe: record.recipe, relative_error, error_basis }))
        };
        match read.await {
            Ok(found) => Ok(Some(found)),
            Err(Error::Corrupt { .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

impl Repairing {
    /// Returns a row of the catalogue that names an artifact, of the newest version that does.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn row(&self, artifact: ArtifactId) -> Result<Option<LayerRecord>> {
        match self.names.get(&artifact) {
            Some(user) => heal::row(&self.shared.location, artifact, user).await,
            None => Ok(None),
        }
    }

    /// Puts parts in the place of what the store has of their artifact.
    ///
    /// # Errors
    /// As [`Writer::add`].
    pub async fn add(&mut self, parts: &Parts, provenance: Provenance) -> Result<()> {
        let id = parts.id();
        self.writer.distrust(&id);
        if let Some(user) = self.names.get(&id) {
            self.writer.note_unlisted(id, user.locations.locations());
        }
        self.writer.add(parts, provenance).await?;
        self.added.insert(id);
        Ok(())
    }

    /// Writes what was added, and returns what is damaged now.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn finish(mut self) -> Result<VerifyReport> {
        self.writer.flush().await?;
        if self.added.is_empty() {
            return Ok(self.report);
        }
        let mut report = verify(&self.shared, VerifyDepth::Quick, Arc::new(|_, _| ())).await?;
        let listed: BTreeMap<ArtifactId, _> =
            self.shared.data.records().await?.into_iter().map(|r| (r.artifact, r)).collect();
        let found: BTreeSet<String> = report.corrupt.iter().map(|c| c.artifact.clone()).collect();
        for mut corrupt in self.report.corrupt {
            let id: ArtifactId = corrupt.artifact.parse()?;
            let Some(record) = listed.get(&id).filter(|_| !found.contains(&corrupt.artifact)) else { continue };
            // What was not touched is as damaged as it was; what was written has to be right.
            if self.added.contains(&id) {
                match self.shared.data.verified(record).await {
                    Ok(_) => continue,
                    Err(e) => corrupt.reason = e.to_string(),
                }
            }
            report.corrupt.push(corrupt);
        }
        report.corrupt.sort_by(|a, b| a.artifact.cmp(&b.artifact));
        Ok(report)
    }
}

/// Sets aside the versions of the catalogue that are newer than the newest one that can be opened, and returns the addresses of
/// the files: nothing can be read of what they said, and nothing older either while they are there.
async fn roll_back(location: &Location) -> Result<Vec<String>> {
    let readable = catalogue::open_newest_readable(location).await?.version_id();
    let mut files = vec![];
    for file in names_in(location, LAYERS, &[VERSIONS]).await? {
        if version_of(&file).is_some_and(|version| version > readable) {
            files.extend(aside::set_aside(location, (LAYERS, VERSIONS), &file).await?);
        }
    }
    if !files.is_empty() {
        aside::remove(location, (LAYERS, VERSIONS), VERSION_HINT).await?;
    }
    Ok(files)
}

/// Sets aside what keeps the list of artifacts and the data tables from being read and written, and returns the addresses of the
/// files.
async fn clear(shared: &Shared) -> Result<Vec<String>> {
    let location = &shared.location;
    let mut files = vec![];
    for table in table_folders(location).await? {
        if table != ARTIFACTS && Table::named(&table).is_none() {
            continue;
        }
        let manifests = names_in(location, &table, &[VERSIONS]).await?;
        let manifests: Vec<_> = manifests.iter().filter_map(|file| Some((version_of(file)?, file))).collect();
        let latest = manifests.iter().map(|(version, _)| *version).max();
        for (version, manifest) in manifests {
            match metadata::open(location, &table, version, Some(version) == latest).await {
                Ok(()) => {}
                // Nothing is known of what the system does not let us read, or another program has written.
                Err(e) if is_refused(&e) || matches!(e, lance::Error::NotSupported { .. }) => {
                    return Err(storage_error(format!("opening version {version} of table '{table}'"))(e));
                }
                Err(_) => files.extend(aside::set_aside(location, (&table, VERSIONS), manifest).await?),
            }
        }
        files.extend(drop_unreadable(shared, &table).await?);
    }
    Ok(files)
}

/// Makes indices anew that do not lead to the rows which have a value.
async fn mend_indices(location: &Location) -> Result<()> {
    for table in [LAYERS, ARTIFACTS] {
        for indexed in indices_of(table) {
            let Ok(dataset) = location.open_table(table, None).await else { continue };
            if index_check::fault(&Arc::new(dataset), *indexed).await?.is_some() {
                let action = || format!("making index '{}' anew", indexed.index);
                let dataset = location.open_for_write(table).during(action()).await?;
                let tables = TableVersions::said_by(&dataset).await;
                let properties = properties("index".into(), None, tables.as_ref()).filter(|_| table == LAYERS);
                indexing::make_anew(dataset, *indexed, properties).during(action()).await?;
            }
        }
    }
    Ok(())
}

/// Takes the fragments out of a table whose rows cannot be read, and sets their files aside.
async fn drop_unreadable(shared: &Shared, table: &str) -> Result<Vec<String>> {
    let location = &shared.location;
    let dataset = match location.open_for_write(table).await {
        Ok(dataset) => Arc::new(dataset),
        Err(lance::Error::DatasetNotFound { .. }) => return Ok(vec![]),
        Err(e) => return Err(storage_error(format!("opening table '{table}'"))(e)),
    };
    let unreadable = unreadable(location, table, &dataset).await?;
    replace_fragments((table, dataset), unreadable.iter().map(|(fragment, _)| *fragment).collect(), vec![]).await?;
    let mut files = vec![];
    for (_, file) in &unreadable {
        files.extend(aside::set_aside(location, (table, "data"), file).await?);
    }
    shared.data.forget(table, unreadable.into_iter().map(|(_, file)| file)).await;
    Ok(files)
}

/// Returns the numbers and files of the fragments whose rows cannot be read: of the list all of a row, of a data table whose it is.
async fn unreadable(location: &Location, table: &str, dataset: &Dataset) -> Result<Vec<(u64, String)>> {
    let formats = location.formats();
    let columns = match table {
        ARTIFACTS => formats.known_columns(ARTIFACTS, dataset),
        _ => vec!["artifact".to_owned()],
    };
    let mut found = vec![];
    for fragment in dataset.fragments().iter() {
        let read = async {
            let mut scan = dataset.scan();
            scan.project(&columns)?.with_fragments(vec![fragment.clone()]).batch_size(batch_rows(dataset));
            scan.try_into_stream().await?.try_collect::<Vec<RecordBatch>>().await
        };
        let is_readable = match read.caught().await {
            Ok(batches) if table == ARTIFACTS => batches
                .into_iter()
                .all(|batch| formats.completed(ARTIFACTS, batch).is_ok_and(|batch| read_artifacts(&batch).is_ok())),
            Ok(_) => true,
            Err(e) if is_refused(&e) => return Err(storage_error(format!("reading table '{table}'"))(e)),
            Err(_) => false,
        };
        if !is_readable {
            let file = fragment.files.first().map_or(String::new(), |file| file.path.clone());
            found.push((fragment.id, file));
        }
    }
    Ok(found)
}
