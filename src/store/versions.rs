//! The versions of the catalogue, and the names that they have: snapshots, which are Lance's tags.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use lance::Dataset;
use lance::dataset::transaction::{Operation, TransactionBuilder};
use serde::Serialize;

use super::catalogue::{nameable, open, versions, writable};
use super::listing::names_in;
use super::location::Location;
use super::lock::{self, Guard};
use super::properties::{MESSAGE, OPERATION, TableVersions, properties};
use super::schema::LAYERS;
use super::strict::{Attempts, is_conflict, next_version};
use super::upgrade::with_format;
use super::waiting::{Waiting, reason, storage_error};
use crate::error::{Error, Result, closest};

/// A version of the store, as `log` lists it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VersionInfo {
    /// Its number.
    pub version: u64,
    /// When it was committed.
    pub time: DateTime<Utc>,
    /// What made it: `create`, `import`, `train`, `save`, `copy`, `remove`, `rename`, `restore` or `upgrade`, and of what; `gc` where rows
    /// were joined, and that or `repair` for a version that changes nothing, on an object store.
    pub operation: String,
    /// The message that it was committed with.
    pub message: Option<String>,
    /// Names given to it.
    pub snapshots: Vec<String>,
}

/// A named version.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SnapshotInfo {
    /// Its name.
    pub name: String,
    /// The number of the version.
    pub version: u64,
    /// When the version was committed.
    pub time: DateTime<Utc>,
}

/// A snapshot whose name was taken away.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DeletedSnapshot {
    /// Its name.
    pub name: String,
    /// The number of the version that it named; `None` where its file named none.
    pub version: Option<u64>,
    /// When that version was committed; `None` where it cannot be read.
    pub time: Option<DateTime<Utc>>,
}

/// Returns all versions, newest first.
///
/// # Errors
/// When a version or a snapshot cannot be read.
pub async fn log(location: &Location, dataset: &Dataset) -> Result<Vec<VersionInfo>> {
    let mut names: HashMap<u64, Vec<String>> = HashMap::new();
    for (name, version) in tags(location, dataset).await? {
        names.entry(version).or_default().push(name);
    }
    let mut numbers = versions(dataset).await?;
    numbers.sort_unstable_by(|a, b| b.cmp(a));
    let mut log = Vec::with_capacity(numbers.len());
    for version in numbers {
        let read =
            dataset.read_version_transaction(version).during(format!("reading what made version {version}")).await?;
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

/// The folder of a table that holds its tags.
const TAGS: [&str; 2] = ["_refs", "tags"];

/// Returns the snapshots' names and versions, by name.
///
/// # Errors
/// When one of them cannot be read: the message names its file.
pub async fn tags(location: &Location, dataset: &Dataset) -> Result<Vec<(String, u64)>> {
    let mut tags = vec![];
    for name in tag_names(location).await? {
        let version = tag(location, dataset, &name).await?;
        tags.push((name, version));
    }
    Ok(tags)
}

/// Returns the snapshots' names, also of those that cannot be read.
pub async fn tag_names(location: &Location) -> Result<Vec<String>> {
    let files = names_in(location, LAYERS, &TAGS).await?;
    Ok(files.iter().filter_map(|file| file.strip_suffix(".json")).map(str::to_owned).collect())
}

/// Returns the version that a snapshot's file names.
///
/// # Errors
/// [`Error::Damaged`] when it names none.
pub async fn tag(location: &Location, dataset: &Dataset, name: &str) -> Result<u64> {
    let read = dataset.tags().get_version(name).caught().await;
    read.map_err(|e| Error::Damaged {
        action: format!("reading snapshot '{name}'"),
        message: format!(
            "file {} names no version: {}; `layerstore snapshot delete {name}` removes it",
            tag_file(location, name),
            reason(&e)
        ),
        source: Some(Box::new(e)),
    })
}

/// Returns the address of the file that names a snapshot's version.
pub fn tag_file(location: &Location, name: &str) -> String {
    format!("{}/{}/{name}.json", location.table_uri(LAYERS), TAGS.join("/"))
}

/// Names a version: the one that a snapshot's name, or a version's number, `at` stands for, or the latest.
pub async fn create_snapshot(location: &Location, name: &str, at: Option<&str>) -> Result<SnapshotInfo> {
    check_snapshot_name(name)?;
    // gc must not remove the version between the look and the name.
    let guard = lock::changing(location).await?;
    let dataset = nameable(location).await?;
    let (version, time) = match at {
        Some(at) => {
            let version = resolve(location, &dataset, at).await?;
            // A name is given to what can be read.
            (version, open(location, Some(version)).await?.version().timestamp)
        }
        None => (dataset.version_id(), dataset.version().timestamp),
    };
    let action = format!("creating snapshot '{name}'");
    match dataset.tags().create(name, version).caught().await {
        Ok(()) => {
            // Whoever removes versions reads the names first, and says which go before they do: one sees the other.
            let kept = async {
                guard.confirm().await?;
                guard.require_kept(version).await
            };
            if let Err(e) = kept.await {
                dataset.tags().delete(name).during(format!("deleting snapshot '{name}'")).await?;
                return Err(e);
            }
            Ok(SnapshotInfo { name: name.to_owned(), version, time })
        }
        Err(lance::Error::RefConflict { .. }) => {
            let taken = tag(location, &dataset, name).await?;
            Err(Error::SnapshotExists { name: name.to_owned(), version: taken })
        }
        Err(e) => Err(storage_error(action)(e)),
    }
}

/// Returns all snapshots, by version and name.
///
/// # Errors
/// When one cannot be read, or names a version that is not there.
pub async fn list_snapshots(location: &Location, dataset: &Dataset) -> Result<Vec<SnapshotInfo>> {
    let mut times: BTreeMap<u64, DateTime<Utc>> = BTreeMap::new();
    let mut list = Vec::new();
    for (name, version) in tags(location, dataset).await? {
        let time = match times.get(&version) {
            Some(time) => *time,
            None => time_of(dataset, &name, version).await?,
        };
        times.insert(version, time);
        list.push(SnapshotInfo { name, version, time });
    }
    list.sort_by(|a, b| (a.version, &a.name).cmp(&(b.version, &b.name)));
    Ok(list)
}

/// When the version of a snapshot was committed.
async fn time_of(dataset: &Dataset, name: &str, version: u64) -> Result<DateTime<Utc>> {
    let read = dataset.read_version_transaction(version).caught().await;
    let action = || format!("reading version {version}, which snapshot '{name}' names");
    read.map(|read| read.timestamp).map_err(storage_error(action()))
}

/// Takes a name away from its version, also a name whose file or version cannot be read.
pub async fn delete_snapshot(location: &Location, name: &str) -> Result<DeletedSnapshot> {
    let _guard = lock::changing(location).await?;
    let dataset = writable(location).await?;
    let known = tag_names(location).await?;
    if !known.iter().any(|known| known == name) {
        return Err(unknown_snapshot(name, &known));
    }
    let version = tag(location, &dataset, name).await.ok();
    let time = match version {
        Some(version) => time_of(&dataset, name, version).await.ok(),
        None => None,
    };
    dataset.tags().delete(name).during(format!("deleting snapshot '{name}'")).await?;
    Ok(DeletedSnapshot { name: name.to_owned(), version, time })
}

/// What stands for the latest version where a snapshot's name can be given.
const LATEST: &str = "latest";

/// Returns the version that a snapshot's name, or a version's number, stands for. `latest` is the latest version, unless a snapshot
/// has that name, from the time when one could.
pub async fn resolve(location: &Location, dataset: &Dataset, name: &str) -> Result<u64> {
    if let Ok(version) = name.parse::<u64>() {
        return Ok(version);
    }
    let known = tag_names(location).await?;
    match known.iter().any(|known| known == name) {
        true => tag(location, dataset, name).await,
        false if name == LATEST => Ok(open(location, None).await?.version_id()),
        false => Err(unknown_snapshot(name, &known)),
    }
}

fn unknown_snapshot(name: &str, known: &[String]) -> Error {
    let known = closest(name, known.iter().map(String::as_str), known.len());
    Error::UnknownSnapshot { name: name.to_owned(), known }
}

fn check_snapshot_name(name: &str) -> Result<()> {
    let invalid = |reason| Err(Error::InvalidName { what: "snapshot", name: name.to_owned(), reason });
    if name.is_empty() || name.len() > 128 {
        return invalid("it has to have 1 to 128 characters");
    }
    if name.bytes().all(|b| b.is_ascii_digit()) {
        return invalid("a number stands for a version");
    }
    if name == LATEST {
        return invalid("it stands for the latest version");
    }
    if !name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')) {
        return invalid("letters, digits, '.', '-' and '_' can be used");
    }
    if name.starts_with('.') || name.ends_with('.') || name.contains("..") || name.ends_with(".lock") {
        return invalid("it must not start or end with '.', hold '..' or end with '.lock'");
    }
    Ok(())
}

/// Makes the catalogue of an older version the latest, as a new version. The store's format stays what it is.
pub async fn restore(location: &Location, name: &str) -> Result<SnapshotInfo> {
    let guard = lock::changing(location).await?;
    let mut attempts = Attempts::begin();
    loop {
        if let Some(restored) = restore_once((location, &guard), name, &mut attempts).await? {
            return Ok(restored);
        }
    }
}

/// Restores a version on the latest one; `None` where another commit came between.
async fn restore_once(
    (location, held): (&Location, &Guard),
    name: &str,
    attempts: &mut Attempts,
) -> Result<Option<SnapshotInfo>> {
    let dataset = writable(location).await?;
    let format = location.format_of(&dataset)?;
    let version = resolve(location, &dataset, name).await?;
    open(location, Some(version)).await?;
    let restored = |dataset: &Dataset| SnapshotInfo {
        name: name.to_owned(),
        version: dataset.version_id(),
        time: dataset.version().timestamp,
    };
    if version == dataset.version_id() {
        return Ok(Some(restored(&dataset)));
    }
    held.confirm().await?;
    held.require_kept(version).await?;
    let tables = TableVersions::said_by(&dataset).await;
    let transaction = TransactionBuilder::new(dataset.version_id(), Operation::Restore { version })
        .transaction_properties(properties(format!("restore {name}"), None, tables.as_ref()))
        .build();
    match next_version(Arc::new(dataset)).execute(transaction).caught().await {
        Ok(_) => {}
        Err(e) if is_conflict(&e) && attempts.again().await => return Ok(None),
        Err(e) => return Err(storage_error(format!("restoring '{name}'"))(e)),
    }
    // Tables of the newer format stay as they are.
    Ok(Some(restored(&with_format(location, writable(location).await?, format).await?)))
}
