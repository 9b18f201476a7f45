//! What a version of the catalogue says of itself, as properties of its transaction: what made it, and on which versions of the other
//! tables it stands.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::join_all;
use lance::Dataset;

use super::layout::{VERSIONS, manifest_names, version_of};
use super::listing::{names_in, table_folders};
use super::location::Location;
use super::schema::{ARTIFACTS, Table};
use super::waiting::storage_error;
use crate::error::Result;

/// The property that holds the message of a version.
pub const MESSAGE: &str = "layerstore:message";
/// The property that says what made a version.
pub const OPERATION: &str = "layerstore:operation";
/// The property that says which versions the other tables had.
const TABLES: &str = "layerstore:tables";

/// Bytes that a manifest ends in.
const MANIFEST_END: &[u8] = b"LANC";

/// Properties of a version.
pub type Properties = Option<Arc<HashMap<String, String>>>;

/// Returns the properties of a version.
pub fn properties(operation: String, message: Option<&str>, tables: Option<&TableVersions>) -> Properties {
    let mut map = HashMap::from([(OPERATION.to_owned(), operation)]);
    map.extend(message.map(|m| (MESSAGE.to_owned(), m.to_owned())));
    map.extend(tables.and_then(|t| serde_json::to_string(&t.0).ok()).map(|text| (TABLES.to_owned(), text)));
    Some(Arc::new(map))
}

/// Versions that the list of artifacts and the data tables had when the catalogue was committed. A table that has none of its version,
/// or a later one, has lost rows that the catalogue names: it was copied earlier than the catalogue, or lost a manifest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TableVersions(BTreeMap<String, u64>);

impl TableVersions {
    /// Returns what a version of the catalogue says; `None` where it says nothing, as those that an older build or another program has
    /// committed, and where its transaction cannot be read.
    pub async fn said_by(catalogue: &Dataset) -> Option<Self> {
        let transaction = catalogue.read_transaction().await.ok()??;
        let text = transaction.transaction_properties.as_ref()?.get(TABLES)?.clone();
        serde_json::from_str(&text).ok().map(TableVersions)
    }

    /// Returns the latest versions of all tables.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub async fn latest(location: &Location) -> Result<Self> {
        let mut all = TableVersions::default();
        for table in table_folders(location).await? {
            if table != ARTIFACTS && Table::named(&table).is_none() {
                continue;
            }
            match location.open_table(&table, None).await {
                Ok(dataset) => all.note(&table, dataset.version_id()),
                Err(lance::Error::DatasetNotFound { .. }) => {}
                Err(e) => return Err(storage_error(format!("opening table '{table}'"))(e)),
            }
        }
        Ok(all)
    }

    /// Notes that a table has a version.
    pub fn note(&mut self, table: &str, version: u64) {
        let noted = self.0.entry(table.to_owned()).or_default();
        *noted = version.max(*noted);
    }

    /// Returns these and others, of each table the later.
    pub fn with(mut self, others: &TableVersions) -> Self {
        others.0.iter().for_each(|(table, version)| self.note(table, *version));
        self
    }

    /// Returns whether every table has its version or a later one, as far as can be told without reading it: on the local file system
    /// by the names and the ends of manifests.
    pub async fn are_there(&self, location: &Location) -> bool {
        let Some(store) = location.local() else {
            // All at once: each waits for answers.
            let opened = self.0.iter().map(async |(table, version)| {
                location.open_table(table, None).await.is_ok_and(|latest| latest.version_id() >= *version)
            });
            return join_all(opened).boxed().await.into_iter().all(|there| there);
        };
        for (table, version) in &self.0 {
            if !is_on_disk((location, store), table, *version).await {
                return false;
            }
        }
        true
    }
}

async fn is_on_disk((location, store): (&Location, &Path), table: &str, version: u64) -> bool {
    let folder = store.join(format!("{table}.lance")).join(VERSIONS);
    let is_whole = |name: &String| ends_as_written(&folder.join(name));
    let last = location.last_committed(table).filter(|last| *last >= version);
    if last.into_iter().chain([version]).flat_map(manifest_names).any(|name| is_whole(&name)) {
        return true;
    }
    let names = names_in(location, table, &[VERSIONS]).await.unwrap_or_default();
    let latest = names.into_iter().filter_map(|name| Some((version_of(&name)?, name))).max();
    latest.is_some_and(|(latest, name)| latest >= version && is_whole(&name))
}

/// Whether a manifest ends as all do: one that was cut short does not.
fn ends_as_written(path: &Path) -> bool {
    use std::io::{Read, Seek, SeekFrom};
    let end = || {
        let mut file = std::fs::File::open(path)?;
        let mut end = [0; MANIFEST_END.len()];
        file.seek(SeekFrom::End(-(MANIFEST_END.len() as i64)))?;
        file.read_exact(&mut end)?;
        std::io::Result::Ok(end)
    };
    end().is_ok_and(|end| end == MANIFEST_END)
}
