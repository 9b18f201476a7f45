//! How much a store holds.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use serde::Serialize;

use super::catalog;
use super::location::Location;
use super::schema::Table;
use super::{Snapshot, Store};
use crate::error::{Error, Result};

/// How much a store holds, as one of its versions tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stats {
    pub models: u64,
    pub layers: u64,
    /// Artifacts that are stored, used or not.
    pub artifacts: u64,
    pub versions: u64,
    pub snapshots: u64,
    /// Of all files; `null` on an object store.
    pub bytes: Option<u64>,
    /// What the layers took in their checkpoints.
    pub dense_bytes: u64,
    /// What layers that share an artifact would take beyond it, had each its own.
    pub deduplicated_bytes: u64,
}

pub async fn stats(store: &Store, snapshot: &Snapshot) -> Result<Stats> {
    let records = snapshot.records().await?;
    let models: BTreeSet<&str> = records.iter().map(|r| r.model.as_str()).collect();
    let shared: HashMap<_, u64> = records.iter().map(|r| (r.artifact, r.stored_bytes)).collect();
    Ok(Stats {
        models: models.len() as u64,
        layers: records.len() as u64,
        artifacts: store.inner.data.records().await?.len() as u64,
        versions: catalog::versions(snapshot.dataset()).await?.len() as u64,
        snapshots: catalog::tags(snapshot.dataset()).await?.len() as u64,
        bytes: disk_bytes(&store.inner.location),
        dense_bytes: records.iter().map(|r| r.dense_bytes).sum(),
        deduplicated_bytes: records.iter().map(|r| r.stored_bytes).sum::<u64>() - shared.values().sum::<u64>(),
    })
}

/// Bytes of all files of a local store.
pub fn disk_bytes(location: &Location) -> Option<u64> {
    fn under(path: &Path) -> u64 {
        let Ok(entries) = std::fs::read_dir(path) else { return 0 };
        entries
            .filter_map(|e| e.ok())
            .map(|e| match e.file_type() {
                Ok(kind) if kind.is_dir() => under(&e.path()),
                _ => e.metadata().map_or(0, |m| m.len()),
            })
            .sum()
    }
    location.local().map(under)
}

/// The store's data tables, by name.
pub async fn data_tables(location: &Location) -> Result<Vec<(String, Table)>> {
    let action = || format!("listing the tables of {}", location.uri());
    let connection = lancedb::connect(location.uri()).session(location.session().clone()).execute().await;
    let connection = connection.map_err(|e| Error::Storage { action: action(), message: e.to_string() })?;
    let mut names = Vec::new();
    // LanceDB lists a page at a time.
    loop {
        let mut page = connection.table_names().limit(1000);
        if let Some(last) = names.last() {
            page = page.start_after(String::clone(last));
        }
        let page = page.execute().await.map_err(|e| Error::Storage { action: action(), message: e.to_string() })?;
        if page.is_empty() {
            break;
        }
        names.extend(page);
    }
    Ok(names.into_iter().filter_map(|n| Table::named(&n).map(|t| (n, t))).collect())
}
