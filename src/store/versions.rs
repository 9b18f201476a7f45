//! The versions of the catalogue, and the names that they have: snapshots, which are Lance's tags.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use lance::Dataset;
use lance::dataset::CommitBuilder;
use lance::dataset::transaction::{Operation, TransactionBuilder};
use serde::Serialize;

use super::catalogue::{MESSAGE, OPERATION, open, properties, versions, writable};
use super::location::Location;
use super::lock;
use super::upgrade::with_format;
use super::waiting::{Waiting, storage_error};
use crate::error::{Error, Result};

/// A version of the store, as `log` lists it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VersionInfo {
    /// Its number.
    pub version: u64,
    /// When it was committed.
    pub time: DateTime<Utc>,
    /// What made it: `create`, `import`, `remove`, `restore` or `upgrade`, and of what.
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

/// Returns all versions, newest first.
pub async fn log(dataset: &Dataset) -> Result<Vec<VersionInfo>> {
    let mut names: HashMap<u64, Vec<String>> = HashMap::new();
    for snapshot in tags(dataset).await? {
        names.entry(snapshot.1).or_default().push(snapshot.0);
    }
    let mut numbers = versions(dataset).await?;
    numbers.sort_unstable_by(|a, b| b.cmp(a));
    let mut log = Vec::with_capacity(numbers.len());
    for version in numbers {
        let read = dataset.read_version_transaction(version).during("reading the log").await?;
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

/// Returns the snapshots' names and versions, by name.
pub async fn tags(dataset: &Dataset) -> Result<Vec<(String, u64)>> {
    let tags = dataset.tags().list().during("listing snapshots").await?;
    let mut tags: Vec<(String, u64)> = tags.into_iter().map(|(name, tag)| (name, tag.version)).collect();
    tags.sort();
    Ok(tags)
}

/// Names the latest version.
pub async fn create_snapshot(location: &Location, name: &str) -> Result<SnapshotInfo> {
    check_snapshot_name(name)?;
    // gc must not remove the version between the look and the name.
    let _guard = lock::committing(location).await?;
    let dataset = writable(location).await?;
    let version = dataset.version_id();
    let action = format!("creating snapshot '{name}'");
    match dataset.tags().create(name, version).caught().await {
        Ok(()) => Ok(SnapshotInfo { name: name.to_owned(), version, time: dataset.version().timestamp }),
        Err(lance::Error::RefConflict { .. }) => {
            let taken = dataset.tags().get_version(name).during(action).await?;
            Err(Error::SnapshotExists { name: name.to_owned(), version: taken })
        }
        Err(e) => Err(storage_error(action)(e)),
    }
}

/// Returns all snapshots, by version and name.
pub async fn list_snapshots(dataset: &Dataset) -> Result<Vec<SnapshotInfo>> {
    let mut times: BTreeMap<u64, DateTime<Utc>> = BTreeMap::new();
    let mut list = Vec::new();
    for (name, version) in tags(dataset).await? {
        let time = match times.get(&version) {
            Some(time) => *time,
            None => dataset.read_version_transaction(version).during("listing snapshots").await?.timestamp,
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
    dataset.tags().delete(name).during(format!("deleting snapshot '{name}'")).await?;
    Ok(found.clone())
}

/// Returns the version that a snapshot's name, or a version's number, stands for.
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

/// Makes the catalogue of an older version the latest, as a new version. The store's format stays what it is.
pub async fn restore(location: &Location, name: &str) -> Result<SnapshotInfo> {
    let _guard = lock::committing(location).await?;
    let dataset = writable(location).await?;
    let format = location.format_of(&dataset)?;
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
    let commit = CommitBuilder::new(Arc::new(dataset)).with_skip_auto_cleanup(true).execute(transaction);
    let dataset = commit.during(format!("restoring '{name}'")).await?;
    // Tables of the newer format stay as they are.
    Ok(restored(&with_format(location, dataset, format).await?))
}
