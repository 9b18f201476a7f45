//! Removing what no snapshot and no recent version reaches.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::{DataType, UInt64Type};
use chrono::{DateTime, Utc};
use futures::TryStreamExt;
use lance::Dataset;
use lance::dataset::cleanup::{CleanupPolicy, CleanupPolicyBuilder};
use lance::dataset::optimize::{CompactionOptions, compact_files};
use lance::dataset::{MergeInsertBuilder, WhenMatched, WhenNotMatched};
use serde::Serialize;

use super::catalog;
use super::location::{Location, storage_error};
use super::lock;
use super::record::{ArtifactRecord, Rows, Run, artifacts_batch, read_artifacts};
use super::schema::{ARTIFACTS, LAYERS, Table};
use super::stats::{data_tables, disk_bytes};
use crate::error::{Error, Result};
use crate::layer::ArtifactId;

/// How long gc waits for imports to finish before it gives up.
const PATIENCE: Duration = Duration::from_secs(10);

/// Ranges of rows named in one deletion.
const RANGES_AT_ONCE: usize = 200;

/// What gc found, and what it did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct GcReport {
    /// Bytes of rows and files that nothing reaches.
    pub reclaimable_bytes: u64,
    /// Bytes that the store became smaller by; 0 when dry.
    pub removed_bytes: u64,
    /// Artifacts that nothing reaches.
    pub artifacts: u64,
    /// Copies beside the first of rows that were written twice, and rows of imports that never finished.
    pub stray_rows: u64,
    /// Whether anything was removed.
    pub applied: bool,
}

/// Consecutive rows of one artifact in a data table, by row address.
#[derive(Debug, Clone, Copy)]
struct Span {
    artifact: ArtifactId,
    start: u64,
    rows: u64,
}

/// What to do in one table.
struct Plan {
    table: String,
    garbage: Vec<Span>,
}

pub async fn collect(location: &Location, older_than: Duration, apply: bool) -> Result<GcReport> {
    if location.local().is_none() && apply {
        return Err(Error::expected(
            "store to collect",
            location.uri(),
            "a local one: on an object store an import at work cannot be seen",
        ));
    }
    // A dry run only reads, and may be done on a store that cannot be written.
    let _guards = if apply {
        Some((lock::collecting(location.local(), PATIENCE).await?, lock::committing(location.local()).await?))
    } else {
        None
    };
    let age = chrono::Duration::from_std(older_than).unwrap_or(chrono::Duration::MAX);
    let cutoff = Utc::now().checked_sub_signed(age).unwrap_or(DateTime::<Utc>::MIN_UTC);
    let (reached, unneeded_versions) = reachable(location, cutoff).await?;
    let mut report = GcReport { applied: apply, ..GcReport::default() };
    let before = disk_bytes(location);

    let artifacts = open(location, ARTIFACTS, apply).await?;
    let (mut kept, dead) = match &artifacts {
        Some(dataset) => sort_out(dataset, &reached, cutoff).await?,
        None => (BTreeMap::new(), vec![]),
    };
    let listed: HashSet<ArtifactId> = dead.iter().map(|d| d.artifact).filter(|a| !kept.contains_key(a)).collect();
    report.artifacts = listed.len() as u64;
    let mut plans = vec![];
    for (name, table) in data_tables(location).await? {
        let Some(dataset) = open(location, &name, apply).await? else { continue };
        let garbage = unneeded(&dataset, &name, &kept).await?;
        for span in &garbage {
            report.reclaimable_bytes += span_bytes(&dataset, table, span).await?;
            if !listed.contains(&span.artifact) {
                report.stray_rows += span.rows;
            }
        }
        report.reclaimable_bytes += unreferenced_bytes(&dataset).await?;
        plans.push(Plan { table: name, garbage });
    }
    if !apply {
        return Ok(report);
    }

    // First the old versions, which nobody may restore once their artifacts are gone.
    let catalogue = location.open_for_write(LAYERS).await.map_err(storage_error("opening the catalogue"))?;
    let policy = CleanupPolicyBuilder::default().error_if_tagged_old_versions(false).delete_unverified(true);
    let policy = if unneeded_versions.is_empty() {
        None
    } else {
        Some(policy.versions(unneeded_versions).map_err(storage_error("naming old versions"))?)
    };
    if let Some(policy) = policy {
        catalogue.cleanup_with_policy(policy.build()).await.map_err(storage_error("collecting old versions"))?;
    }
    // Then the list, so that no later import takes what is about to go for complete.
    if let Some(dataset) = artifacts
        && !dead.is_empty()
    {
        delete(dataset, &dead).await.map_err(storage_error("removing artifacts from the list"))?;
    }
    let mut moved = HashSet::new();
    for plan in plans {
        let action = format!("collecting table '{}'", plan.table);
        let Some(dataset) = open(location, &plan.table, true).await? else { continue };
        if !plan.garbage.is_empty() {
            let dataset = delete(dataset, &plan.garbage).await.map_err(storage_error(action.clone()))?;
            moved.extend(compacted(dataset, &plan.table, &mut kept).await.map_err(storage_error(action.clone()))?);
        }
        if let Some(dataset) = open(location, &plan.table, true).await? {
            dataset.cleanup_with_policy(all_but_latest()).await.map_err(storage_error(action))?;
        }
    }
    if let Some(dataset) = open(location, ARTIFACTS, true).await? {
        let places: Vec<ArtifactRecord> = kept.into_values().filter(|r| moved.contains(&r.artifact)).collect();
        let dataset = relist(dataset, places).await?;
        dataset
            .cleanup_with_policy(all_but_latest())
            .await
            .map_err(storage_error("collecting the list of artifacts"))?;
    }
    report.removed_bytes = before.unwrap_or_default().saturating_sub(disk_bytes(location).unwrap_or_default());
    Ok(report)
}

async fn open(location: &Location, table: &str, write: bool) -> Result<Option<Dataset>> {
    let opened = if write { location.open_for_write(table).await } else { location.open_table(table, None).await };
    match opened {
        Ok(dataset) => Ok(Some(dataset)),
        Err(lance::Error::DatasetNotFound { .. }) => Ok(None),
        Err(e) => Err(storage_error(format!("opening table '{table}'"))(e)),
    }
}

/// Artifacts of the latest version, of every snapshot, and of every version that was the latest at `cutoff` or later;
/// and the versions that are none of these.
async fn reachable(location: &Location, cutoff: DateTime<Utc>) -> Result<(HashSet<ArtifactId>, Vec<u64>)> {
    let latest = catalog::open(location, None).await?;
    let tagged: HashSet<u64> = catalog::tags(&latest).await?.into_iter().map(|(_, version)| version).collect();
    let mut reached = HashSet::new();
    let mut unneeded = vec![];
    // Newest first, so the one seen before is what replaced it.
    let mut replaced = None;
    for version in catalog::log(&latest).await? {
        let recent = replaced.replace(version.time).is_none_or(|time| time >= cutoff);
        if recent || tagged.contains(&version.version) {
            let dataset = catalog::open(location, Some(version.version)).await?;
            reached.extend(catalog::artifacts(&dataset).await?);
        } else {
            unneeded.push(version.version);
        }
    }
    Ok((reached, unneeded))
}

/// Splits the list of artifacts into one row for each that stays, and the rows that go.
async fn sort_out(
    dataset: &Dataset,
    reached: &HashSet<ArtifactId>,
    cutoff: DateTime<Utc>,
) -> Result<(BTreeMap<ArtifactId, ArtifactRecord>, Vec<Span>)> {
    let mut kept = BTreeMap::new();
    let mut dead = vec![];
    for batch in scan(dataset, None).await.map_err(storage_error("reading the table of artifacts"))? {
        let addresses = addresses(&batch)?;
        for (record, start) in read_artifacts(&batch)?.into_iter().zip(addresses) {
            let stays = reached.contains(&record.artifact) || record.created_at >= cutoff;
            if stays && !kept.contains_key(&record.artifact) {
                kept.insert(record.artifact, record);
            } else {
                dead.push(Span { artifact: record.artifact, start, rows: 1 });
            }
        }
    }
    Ok((kept, dead))
}

async fn scan(dataset: &Dataset, columns: Option<&[&str]>) -> lance::Result<Vec<RecordBatch>> {
    let mut scan = dataset.scan();
    if let Some(columns) = columns {
        scan.project(columns)?;
    }
    scan.with_row_address().scan_in_order(true);
    scan.try_into_stream().await?.try_collect().await
}

fn addresses(batch: &RecordBatch) -> Result<Vec<u64>> {
    let column = batch.column_by_name("_rowaddr").and_then(|c| c.as_primitive_opt::<UInt64Type>());
    column.map(|c| c.values().to_vec()).ok_or_else(|| Error::expected("row addresses", "none", "one a row"))
}

/// Runs of rows of one artifact, in the table's order.
async fn spans(dataset: &Dataset) -> Result<Vec<Span>> {
    let mut spans: Vec<Span> = vec![];
    for batch in scan(dataset, Some(&["artifact"])).await.map_err(storage_error("reading the rows' artifacts"))? {
        let addresses = addresses(&batch)?;
        let names = batch
            .column(0)
            .as_fixed_size_binary_opt()
            .ok_or_else(|| Error::expected("column 'artifact'", "another type", "hashes"))?;
        for (i, start) in addresses.into_iter().enumerate() {
            let Ok(name) = names.value(i).try_into() else {
                return Err(Error::expected(
                    "column 'artifact'",
                    format!("{} bytes", names.value_length()),
                    "32 bytes",
                ));
            };
            let artifact = ArtifactId(name);
            match spans.last_mut() {
                Some(last) if last.artifact == artifact && last.start + last.rows == start => last.rows += 1,
                _ => spans.push(Span { artifact, start, rows: 1 }),
            }
        }
    }
    Ok(spans)
}

/// Rows that no kept artifact needs: of others, or beyond the first copy.
async fn unneeded(dataset: &Dataset, table: &str, kept: &BTreeMap<ArtifactId, ArtifactRecord>) -> Result<Vec<Span>> {
    let mut wanted: HashMap<ArtifactId, u64> =
        kept.iter().filter_map(|(id, record)| Some((*id, record.places.0.get(table)?.rows))).collect();
    let mut garbage = vec![];
    for span in spans(dataset).await? {
        let left = wanted.entry(span.artifact).or_default();
        let needed = span.rows.min(*left);
        *left -= needed;
        if needed < span.rows {
            garbage.push(Span { start: span.start + needed, rows: span.rows - needed, ..span });
        }
    }
    Ok(garbage)
}

/// Bytes of a run's columns; rows of fixed width are counted, others are looked at.
async fn span_bytes(dataset: &Dataset, table: Table, span: &Span) -> Result<u64> {
    let schema = table.schema();
    let mut width = 0;
    let mut varying: Vec<&str> = vec![];
    for field in schema.fields() {
        match field.data_type() {
            DataType::FixedSizeBinary(n) => width += *n as u64,
            DataType::FixedSizeList(item, n) => {
                width += *n as u64 * item.data_type().primitive_width().unwrap_or(1) as u64
            }
            DataType::Binary | DataType::LargeBinary => varying.push(field.name()),
            other => width += other.primitive_width().unwrap_or(4) as u64,
        }
    }
    let mut bytes = width * span.rows;
    if !varying.is_empty() {
        let action = || storage_error("reading the rows to be removed");
        let projection = dataset.schema().project(&varying).map_err(action())?;
        let (fragment, offset) = ((span.start >> 32) as usize, span.start & u64::from(u32::MAX));
        if let Some(fragment) = dataset.get_fragment(fragment) {
            let stream =
                fragment.read_physical_slice(offset..offset + span.rows, &projection, 1024).await.map_err(action())?;
            let batches: Vec<RecordBatch> =
                futures::StreamExt::buffered(stream, 1).try_collect().await.map_err(action())?;
            for column in batches.iter().flat_map(|b| b.columns().to_vec()) {
                bytes += column.as_binary_opt::<i32>().map_or(0, |c| c.iter().flatten().map(|v| v.len() as u64).sum());
                bytes += column.as_binary_opt::<i64>().map_or(0, |c| c.iter().flatten().map(|v| v.len() as u64).sum());
            }
        }
    }
    Ok(bytes)
}

/// For tables of data, whose older versions nobody opens.
fn all_but_latest() -> CleanupPolicy {
    // Unverified files are those of writers that died: the exclusive lock says that no other writer is at work.
    CleanupPolicyBuilder::default()
        .before_timestamp(Utc::now())
        .error_if_tagged_old_versions(false)
        .delete_unverified(true)
        .build()
}

async fn unreferenced_bytes(dataset: &Dataset) -> Result<u64> {
    let explained =
        dataset.cleanup(all_but_latest()).explain().await.map_err(storage_error("looking for unreferenced files"))?;
    Ok(explained.stats.bytes_removed)
}

async fn delete(mut dataset: Dataset, spans: &[Span]) -> lance::Result<Dataset> {
    for some in spans.chunks(RANGES_AT_ONCE) {
        let ranges: Vec<String> =
            some.iter().map(|s| format!("(_rowaddr >= {} AND _rowaddr < {})", s.start, s.start + s.rows)).collect();
        dataset.delete(&ranges.join(" OR ")).await?;
    }
    Ok(dataset)
}

/// Writes fragments with deleted rows anew without them, and gives the artifacts whose places have changed.
async fn compacted(
    mut dataset: Dataset,
    table: &str,
    kept: &mut BTreeMap<ArtifactId, ArtifactRecord>,
) -> lance::Result<HashSet<ArtifactId>> {
    let whole = dataset.fragments().iter().filter(|f| f.deletion_file.is_none()).map(|f| f.id as u32).collect();
    let options = CompactionOptions {
        // Only what has deletions: merging small fragments would move every artifact for nothing.
        excluded_fragment_ids: whole,
        materialize_deletions_threshold: 0.0,
        num_threads: Some(1),
        ..CompactionOptions::default()
    };
    compact_files(&mut dataset, options, None).await?;
    let files: HashMap<u64, String> =
        dataset.fragments().iter().filter_map(|f| Some((f.id, f.files.first()?.path.clone()))).collect();
    let mut runs: HashMap<ArtifactId, Vec<Run>> = HashMap::new();
    for span in spans(&dataset).await.map_err(|e| lance::Error::internal(e.to_string()))? {
        let Some(file) = files.get(&(span.start >> 32)) else { continue };
        let offset = span.start & u64::from(u32::MAX);
        runs.entry(span.artifact).or_default().push(Run { file: file.clone(), offset, rows: span.rows });
    }
    let mut moved = HashSet::new();
    for (artifact, runs) in runs {
        let Some(place) = kept.get_mut(&artifact).and_then(|r| r.places.0.get_mut(table)) else { continue };
        let now = Rows { rows: place.rows, runs };
        if *place != now {
            *place = now;
            moved.insert(artifact);
        }
    }
    Ok(moved)
}

/// Writes the new places into the list of artifacts.
async fn relist(dataset: Dataset, records: Vec<ArtifactRecord>) -> Result<Dataset> {
    let action = || storage_error("writing the artifacts' new places");
    if records.is_empty() {
        return Ok(dataset);
    }
    let batch = artifacts_batch(&records)?;
    let mut merge = MergeInsertBuilder::try_new(Arc::new(dataset), vec!["artifact".into()]).map_err(action())?;
    merge.when_matched(WhenMatched::UpdateAll).when_not_matched(WhenNotMatched::DoNothing).use_index(false);
    let (dataset, _) = merge.try_build().map_err(action())?.execute_batches(vec![batch]).await.map_err(action())?;
    Ok(Arc::unwrap_or_clone(dataset))
}
