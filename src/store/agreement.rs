//! Whether the catalogue, the list of artifacts and the data tables agree: each names what the one behind it has to hold.
//!
//! They are tables of their own, so a copy that was made folder by folder, or a lost manifest, can leave one of them older than
//! the others. Whoever removes anything asks here first.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};

use arrow::array::AsArray;
use futures::{FutureExt, TryStreamExt};
use lance::Dataset;
use lance::table::format::Fragment;

use super::catalogue;
use super::location::Location;
use super::record::{LayerName, locations_of, named_layers};
use super::row_locations::{LOCATIONS, LocationsText, RowLocations};
use super::scan::{batch_rows, for_each};
use super::schema::{LAYERS, Table};
use super::waiting::{Waiting, is_refused, reason, storage_error};
use crate::error::{Error, Result};
use crate::layer::ArtifactId;

/// What a version of the catalogue says of an artifact.
#[derive(Debug, Clone)]
pub struct Named {
    /// The newest version that names it, of those that were asked.
    pub version: u64,
    /// A layer that uses it there.
    pub layer: LayerName,
    /// Where that row of the catalogue says that its rows are.
    pub locations: LocationsText,
}

impl std::fmt::Display for Named {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "layer '{}' of model '{}' in version {}", self.layer.layer, self.layer.model, self.version)
    }
}

/// The artifacts that versions of the catalogue name.
#[derive(Debug, Default)]
pub struct Names {
    named: BTreeMap<ArtifactId, Named>,
    /// Fragments that were read, by the file of their rows and that of the rows deleted of them: most versions share most fragments.
    read: HashSet<(String, Option<u64>)>,
}

impl Names {
    /// Returns the artifacts that these versions name. Versions are asked in this order, and the first that names an artifact is
    /// remembered.
    ///
    /// # Errors
    /// When one of them cannot be read.
    pub async fn of(location: &Location, versions: impl IntoIterator<Item = u64>) -> Result<Self> {
        let mut names = Names::default();
        for version in versions {
            names.add(&catalogue::open(location, Some(version)).await?, |_, _| ()).await?;
        }
        Ok(names)
    }

    /// Adds the artifacts that a version names, and tells `used` of the layers that use them where no version did which was added
    /// before. Returns the fragments that say so.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn add(
        &mut self,
        catalogue: &Dataset,
        mut used: impl FnMut(ArtifactId, LayerName) + Send,
    ) -> Result<Vec<Fragment>> {
        let version = catalogue.version_id();
        let key = |fragment: &Fragment| {
            let file = fragment.files.first().map_or(String::new(), |file| file.path.clone());
            (file, fragment.deletion_file.as_ref().map(|file| file.id))
        };
        let fragments: Vec<Fragment> =
            catalogue.fragments().iter().filter(|fragment| !self.read.contains(&key(fragment))).cloned().collect();
        if fragments.is_empty() {
            return Ok(vec![]);
        }
        let action = format!("reading version {version} of the catalogue");
        let mut scan = catalogue.scan();
        scan.project(&["artifact", "model", "layer", LOCATIONS]).map_err(storage_error(action.as_str()))?;
        scan.with_fragments(fragments.clone()).batch_size(batch_rows(catalogue));
        for_each(scan, action, |batch| {
            for (row, (artifact, layer)) in named_layers(&batch)?.into_iter().enumerate() {
                if let Entry::Vacant(new) = self.named.entry(artifact) {
                    new.insert(Named { version, layer: layer.clone(), locations: locations_of(&batch, row)? });
                }
                used(artifact, layer);
            }
            Ok(())
        })
        .await?;
        self.read.extend(fragments.iter().map(key));
        Ok(fragments)
    }

    /// Adds what versions name, newest first; those that cannot be read, or are not there, are left out.
    pub async fn add_readable(&mut self, location: &Location, versions: impl IntoIterator<Item = u64>) {
        let mut versions: Vec<u64> = versions.into_iter().collect();
        versions.sort_unstable_by(|a, b| b.cmp(a));
        for version in versions {
            if let Ok(dataset) = catalogue::open(location, Some(version)).await {
                let _ = self.add(&dataset, |_, _| ()).await;
            }
        }
    }

    /// Returns whether one of the versions names an artifact.
    pub fn has(&self, artifact: &ArtifactId) -> bool {
        self.named.contains_key(artifact)
    }

    /// Returns what is said of an artifact.
    pub fn get(&self, artifact: &ArtifactId) -> Option<&Named> {
        self.named.get(artifact)
    }

    /// Returns all of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&ArtifactId, &Named)> {
        self.named.iter()
    }
}

/// The data tables of a store at their latest versions, each opened when it is first asked for.
#[derive(Debug)]
pub struct DataTables {
    location: Location,
    tables: HashMap<String, Option<DataTable>>,
}

#[derive(Debug)]
struct DataTable {
    dataset: Dataset,
    files: HashSet<String>,
    /// Once they were counted.
    rows: Option<Counted>,
}

/// The rows of a table.
#[derive(Debug, Default)]
struct Counted {
    /// Rows of each artifact, in the fragments that can be read.
    rows: HashMap<ArtifactId, u64>,
    /// Fragments that cannot be read.
    unreadable: Vec<Unreadable>,
}

/// A fragment of a table that cannot be read.
#[derive(Debug, Clone)]
pub struct Unreadable {
    /// The name of its data file.
    pub file: String,
    /// Why it cannot be read.
    pub reason: String,
}

impl DataTables {
    /// Returns the data tables of a store, none of them open.
    pub fn of(location: &Location) -> Self {
        DataTables { location: location.clone(), tables: HashMap::new() }
    }

    async fn table(&mut self, name: &str) -> Result<Option<&mut DataTable>> {
        // Nothing is opened by a name that only damaged or hostile lists have.
        if Table::named(name).is_none() {
            return Ok(None);
        }
        if !self.tables.contains_key(name) {
            let table = match self.location.open_table(name, None).await {
                Ok(dataset) => Some(DataTable { files: data_files(&dataset), dataset, rows: None }),
                Err(lance::Error::DatasetNotFound { .. }) => None,
                Err(e) => return Err(storage_error(format!("opening table '{name}'"))(e)),
            };
            self.tables.insert(name.to_owned(), table);
        }
        Ok(self.tables.get_mut(name).and_then(Option::as_mut))
    }

    /// Returns the fragments that could not be read when the rows of a table were counted, of each table where there are some.
    pub fn unreadable(&self) -> impl Iterator<Item = (&str, &Unreadable)> {
        let counted = self.tables.iter().filter_map(|(name, table)| Some((name, table.as_ref()?.rows.as_ref()?)));
        counted.flat_map(|(name, counted)| counted.unreadable.iter().map(move |fragment| (name.as_str(), fragment)))
    }

    /// Returns why a table does not hold the rows that an artifact is said to have; `None` where all do. Rows are not counted
    /// where the files that they were written to are still the tables', unless `count`. Those of a file that cannot be read are not
    /// there.
    ///
    /// # Errors
    /// When a table cannot be read.
    pub async fn lack(&mut self, id: ArtifactId, locations: &RowLocations, count: bool) -> Result<Option<String>> {
        for (name, wanted) in &locations.0 {
            let Some(table) = self.table(name).await? else {
                return Ok(Some(format!("there is no table '{name}', which should hold {} of its rows", wanted.rows)));
            };
            if !count && wanted.ranges.iter().all(|range| table.files.contains(&range.file)) {
                continue;
            }
            let counted = match &mut table.rows {
                Some(counted) => counted,
                none => none.insert(count_rows(name, &table.dataset).await?),
            };
            let found = counted.rows.get(&id).copied().unwrap_or_default();
            if found < wanted.rows {
                let version = table.dataset.version_id();
                let found = format!("version {version} of table '{name}', its latest, holds {found}");
                let lies_in = |file: &&Unreadable| wanted.ranges.iter().any(|range| range.file == file.file);
                let why =
                    counted.unreadable.iter().find(lies_in).map_or(String::new(), |file| format!(": {}", file.reason));
                return Ok(Some(format!("{found} of its {} rows{why}", wanted.rows)));
            }
        }
        Ok(None)
    }
}

/// Returns the names of the data files of a version, those that its fragments were first written to.
pub fn data_files(dataset: &Dataset) -> HashSet<String> {
    dataset.fragments().iter().filter_map(|fragment| Some(fragment.files.first()?.path.clone())).collect()
}

/// Counts the rows of a table: fragment by fragment where not all of them can be read.
async fn count_rows(table: &str, dataset: &Dataset) -> Result<Counted> {
    let action = || format!("counting rows of table '{table}'");
    let mut counted = Counted::default();
    match counted_in(dataset, None).boxed().caught().await {
        Ok(rows) => counted.rows = rows,
        // Nothing is known of rows that the system does not let us read.
        Err(e) if is_refused(&e) => return Err(storage_error(action())(e)),
        Err(_) => {
            for fragment in dataset.fragments().iter() {
                match counted_in(dataset, Some(fragment)).boxed().caught().await {
                    Ok(rows) => rows.into_iter().for_each(|(id, n)| *counted.rows.entry(id).or_default() += n),
                    Err(e) if is_refused(&e) => return Err(storage_error(action())(e)),
                    Err(e) => counted.unreadable.push(Unreadable {
                        file: fragment.files.first().map_or(String::new(), |file| file.path.clone()),
                        reason: reason(&e),
                    }),
                }
            }
        }
    }
    Ok(counted)
}

/// Returns the artifacts that rows of each file of a table belong to. Files that cannot be read are left out.
///
/// # Errors
/// When the system refuses to read one.
pub async fn artifacts_by_file(table: &str, dataset: &Dataset) -> Result<Vec<(String, HashSet<ArtifactId>)>> {
    let mut found = vec![];
    for fragment in dataset.fragments().iter() {
        let Some(file) = fragment.files.first() else { continue };
        match counted_in(dataset, Some(fragment)).boxed().caught().await {
            Ok(rows) => found.push((file.path.clone(), rows.into_keys().collect())),
            Err(e) if is_refused(&e) => return Err(storage_error(format!("reading table '{table}'"))(e)),
            Err(_) => {}
        }
    }
    Ok(found)
}

async fn counted_in(dataset: &Dataset, fragment: Option<&Fragment>) -> lance::Result<HashMap<ArtifactId, u64>> {
    let mut scan = dataset.scan();
    scan.project(&["artifact"])?;
    if let Some(fragment) = fragment {
        scan.with_fragments(vec![fragment.clone()]);
    }
    let mut batches = scan.try_into_stream().await?;
    let mut rows = HashMap::new();
    while let Some(batch) = batches.try_next().await? {
        let names = batch.column_by_name("artifact").and_then(|c| c.as_fixed_size_binary_opt());
        let names = names.ok_or_else(|| lance::Error::internal("column 'artifact' holds no hashes"))?;
        for name in names.iter().flatten() {
            let name = name.try_into().map_err(|_| lance::Error::internal("column 'artifact' holds no hashes"))?;
            *rows.entry(ArtifactId(name)).or_default() += 1;
        }
    }
    Ok(rows)
}

/// Returns the error of a step that would remove what is still needed. `first` says of one what disagrees, `count` how many there
/// are.
pub fn disagreement(location: &Location, count: usize, first: &str) -> Error {
    Error::Damaged {
        action: format!("collecting what nothing reaches in {}", location.uri()),
        message: format!(
            "nothing was removed, since the tables disagree about {count} of the artifacts that versions to be kept name: {first}. A \
             table that is older than the others (of a copy made while the store was written to, or with a lost manifest) is \
             completed by the next import, or by `layerstore repair`; `layerstore verify` lists all that is missing"
        ),
        source: None,
    }
}

/// Returns an error where the catalogue is known to have had a later version than its latest, or a snapshot names a version that
/// is not there: what those versions used would be taken for garbage.
///
/// # Errors
/// See above.
pub fn require_whole(
    location: &Location,
    catalogue: &Dataset,
    versions: &HashSet<u64>,
    tags: &[(String, u64)],
) -> Result<()> {
    let damaged = |message: String| Error::Damaged {
        action: format!("reading the versions of {}", location.uri()),
        message,
        source: None,
    };
    if let Some((name, version)) = tags.iter().find(|(_, version)| !versions.contains(version)) {
        return Err(damaged(format!(
            "snapshot '{name}' names version {version}, which is not there: nothing can be removed until its manifest is brought \
             back or the snapshot is deleted"
        )));
    }
    let latest = catalogue.version_id();
    match location.last_committed(LAYERS) {
        Some(last) if last > latest => Err(damaged(format!(
            "version {last} was committed, and the latest that is there is {latest}: nothing can be removed before its manifest is \
             brought back or another version is committed"
        ))),
        _ => Ok(()),
    }
}
