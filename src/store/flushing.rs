//! Gathered artifacts, written to their tables beside the work that gathers more: data rows first, then the list.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use tokio::task::JoinHandle;

use super::append::{Written, append_rows};
use super::batches::ArtifactRows;
use super::format::Format;
use super::lock::Guard;
use super::record::{ArtifactRecord, artifacts_batches};
use super::relist::relist;
use super::row_locations::TableRows;
use super::schema::{ARTIFACTS, Table};
use super::shared::Shared;
use super::update;
use super::waiting::Waiting;
use crate::error::{Error, Result};
use crate::layer::ArtifactId;
use crate::tasks::unwrap_join;

/// A write at work. It goes on if this is dropped, and holds the lock of imports until it has ended.
#[derive(Debug)]
pub struct Flushing(JoinHandle<Result<Flushed>>);

/// What was written.
#[derive(Debug, Default)]
pub struct Flushed {
    /// What is listed now.
    pub listed: Vec<ArtifactRecord>,
    /// The versions of tables that have it.
    pub versions: Vec<(String, u64)>,
}

impl Flushing {
    /// Begins to write artifacts to a store of this format, whose lock of imports the guard is. Of those in `lost`, the list has rows
    /// already.
    pub fn begin(
        shared: Arc<Shared>,
        (format, guard): (&'static Format, Arc<Guard>),
        pending: Vec<(ArtifactRecord, ArtifactRows)>,
        lost: HashSet<ArtifactId>,
    ) -> Self {
        Flushing(tokio::spawn(async move {
            let (records, mut versions) = write_rows(&shared, format, pending).await?;
            let flushed = list((&shared, &guard), format, records, &lost).await?;
            versions.extend(flushed.versions);
            Ok(Flushed { listed: flushed.listed, versions })
        }))
    }

    /// Waits until all is written.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn finished(&mut self) -> Result<Flushed> {
        unwrap_join((&mut self.0).await)?
    }
}

/// Appends the rows of artifacts to their tables, and notes in the records where they are.
async fn write_rows(
    shared: &Shared,
    format: &Format,
    pending: Vec<(ArtifactRecord, ArtifactRows)>,
) -> Result<(Vec<ArtifactRecord>, Vec<(String, u64)>)> {
    let (mut records, artifacts): (Vec<ArtifactRecord>, Vec<ArtifactRows>) = pending.into_iter().unzip();
    let artifacts = Arc::new(artifacts);
    let tables: BTreeSet<Table> = artifacts.iter().flat_map(|rows| rows.tables().map(|(table, _)| table)).collect();
    let mut versions = vec![];
    for table in tables {
        let name = table.name();
        let appended = append_rows((&shared.location, format), table, &artifacts).await?;
        versions.push((name.clone(), appended.version));
        let mut written = Written::new(appended.files);
        for (record, rows) in records.iter_mut().zip(artifacts.iter()) {
            let rows: u64 = rows.tables().filter(|(of, _)| *of == table).map(|(_, rows)| rows).sum();
            if rows == 0 {
                continue;
            }
            let ranges = written.take(rows).ok_or_else(|| Error::Storage {
                action: format!("appending to table '{name}'"),
                message: "fewer rows were written than given".into(),
                source: None,
            })?;
            record.locations.0.insert(name.clone(), TableRows { rows, ranges });
        }
    }
    Ok((records, versions))
}

/// Lists artifacts whose rows are there and are what their names stand for, under the lock of imports, which is held. Those of `lost` are
/// listed, with other locations.
///
/// # Errors
/// When the storage refuses.
pub async fn list(
    (shared, held): (&Shared, &Guard),
    format: &Format,
    records: Vec<ArtifactRecord>,
    lost: &HashSet<ArtifactId>,
) -> Result<Flushed> {
    let location = &shared.location;
    // Else the rows may have been collected since they were written.
    held.confirm().await?;
    let (moved, new): (Vec<_>, Vec<_>) = records.into_iter().partition(|record| lost.contains(&record.artifact));
    let mut versions = vec![];
    if !new.is_empty() {
        let version = update::list((location, format), artifacts_batches(&new)?).await?;
        versions.push((ARTIFACTS.to_owned(), version));
    }
    if !moved.is_empty() {
        let list = location.open_for_write(ARTIFACTS).during("opening the table of artifacts").await?;
        let list = relist(list, &moved.iter().map(|r| (r.artifact, r.locations.clone())).collect()).await?;
        versions.push((ARTIFACTS.to_owned(), list.version_id()));
    }
    Ok(Flushed { listed: new.into_iter().chain(moved).collect(), versions })
}
