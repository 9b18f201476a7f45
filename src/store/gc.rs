//! Removing what no snapshot and no recent version reaches.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{AsArray, RecordBatch, StringArray};
use arrow::datatypes::{DataType, UInt64Type};
use chrono::{DateTime, Utc};
use futures::TryStreamExt;
use lance::Dataset;
use lance::dataset::cleanup::{CleanupPolicy, CleanupPolicyBuilder};
use lance::dataset::optimize::{CompactionOptions, compact_files};
use lance::dataset::{MergeInsertBuilder, WhenMatched, WhenNotMatched};
use serde::Serialize;

use super::catalogue;
use super::listing::{data_tables, disk_bytes};
use super::location::{Location, Place};
use super::lock;
use super::record::{ArtifactRecord, LOCATIONS, RowRange, TableRows, read_artifacts};
use super::schema::{ARTIFACTS, LAYERS, Table};
use super::versions;
use super::waiting::{Waiting, storage_error};
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

/// What there is to remove.
struct Survey {
    /// Versions of the catalogue that nobody may restore once their artifacts are gone.
    old_versions: Vec<u64>,
    /// The list of artifacts, where there is one.
    list: Option<Dataset>,
    /// Rows of that list: of artifacts that nothing reaches, and second copies.
    unlisted: Vec<Span>,
    /// The records of the artifacts that stay.
    kept: BTreeMap<ArtifactId, ArtifactRecord>,
    /// Rows to remove of each data table.
    garbage: Vec<(String, Vec<Span>)>,
    report: GcReport,
}

/// Removes what nothing reaches; only counts it unless `apply`. What was replaced no longer than `older_than` ago stays.
///
/// # Errors
/// [`Error::Busy`] when an import does not finish in time; and when the storage refuses, or has no locks.
pub async fn collect(location: &Location, older_than: Duration, apply: bool) -> Result<GcReport> {
    if matches!(location.place(), Place::Remote) && apply {
        return Err(Error::expected(
            "store to collect",
            location.uri(),
            "a local one: on an object store an import at work cannot be seen",
        ));
    }
    // A dry run only reads, and may be done on a store that cannot be written.
    let _guards = match apply {
        true => Some((lock::collecting(location, PATIENCE).await?, lock::committing(location).await?)),
        false => None,
    };
    let age = chrono::Duration::from_std(older_than).unwrap_or(chrono::Duration::MAX);
    let cutoff = Utc::now().checked_sub_signed(age).unwrap_or(DateTime::<Utc>::MIN_UTC);
    let survey = survey(location, cutoff, apply).await?;
    if !apply {
        return Ok(survey.report);
    }
    let before = disk_bytes(location).await;
    let mut report = survey.report.clone();
    remove(location, survey).await?;
    report.applied = true;
    report.removed_bytes = before.unwrap_or_default().saturating_sub(disk_bytes(location).await.unwrap_or_default());
    Ok(report)
}

/// Looks for what nothing reaches. Tables are opened for writing if what is found is to be removed.
async fn survey(location: &Location, cutoff: DateTime<Utc>, write: bool) -> Result<Survey> {
    let (reached, old_versions) = reachable(location, cutoff).await?;
    let list = open(location, ARTIFACTS, write).await?;
    let (kept, unlisted) = match &list {
        Some(dataset) => sort_out(location, dataset, &reached, cutoff).await?,
        None => (BTreeMap::new(), vec![]),
    };
    let dead: HashSet<ArtifactId> = unlisted.iter().map(|d| d.artifact).filter(|a| !kept.contains_key(a)).collect();
    let mut report = GcReport { artifacts: dead.len() as u64, ..GcReport::default() };
    let mut garbage = vec![];
    for (name, table) in data_tables(location).await? {
        let Some(dataset) = open(location, &name, write).await? else { continue };
        let spans = unneeded(&dataset, &name, &kept).await?;
        for span in &spans {
            report.reclaimable_bytes += span_bytes(&dataset, table, span).await?;
            if !dead.contains(&span.artifact) {
                report.stray_rows += span.rows;
            }
        }
        report.reclaimable_bytes += unreferenced_bytes(&dataset).await?;
        garbage.push((name, spans));
    }
    Ok(Survey { old_versions, list, unlisted, kept, garbage, report })
}

/// Removes what a survey found, in an order that leaves a store whole wherever it ends.
async fn remove(location: &Location, survey: Survey) -> Result<()> {
    let Survey { old_versions, list, unlisted, mut kept, garbage, .. } = survey;
    // First the old versions, which nobody may restore once their artifacts are gone.
    if !old_versions.is_empty() {
        let catalogue = location.open_for_write(LAYERS).during("opening the catalogue").await?;
        let policy = CleanupPolicyBuilder::default().error_if_tagged_old_versions(false).delete_unverified(true);
        let policy = policy.versions(old_versions).map_err(storage_error("naming old versions"))?;
        catalogue.cleanup_with_policy(policy.build()).during("collecting old versions").await?;
    }
    // Then the list, so that no later import takes what is about to go for complete.
    if let Some(dataset) = list.filter(|_| !unlisted.is_empty()) {
        delete(dataset, &unlisted).during("removing artifacts from the list").await?;
    }
    let mut moved = HashSet::new();
    for (table, spans) in garbage {
        let action = || format!("collecting table '{table}'");
        let Some(dataset) = open(location, &table, true).await? else { continue };
        if !spans.is_empty() {
            let dataset = delete(dataset, &spans).during(action()).await?;
            moved.extend(compacted(dataset, &table, &mut kept).await?);
        }
        if let Some(dataset) = open(location, &table, true).await? {
            dataset.cleanup_with_policy(all_but_latest()).during(action()).await?;
        }
    }
    if let Some(dataset) = open(location, ARTIFACTS, true).await? {
        kept.retain(|artifact, _| moved.contains(artifact));
        let dataset = relist(dataset, &kept).await?;
        dataset.cleanup_with_policy(all_but_latest()).during("collecting the list of artifacts").await?;
    }
    Ok(())
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
    let latest = catalogue::open(location, None).await?;
    let tagged: HashSet<u64> = versions::tags(&latest).await?.into_iter().map(|(_, version)| version).collect();
    let mut reached = HashSet::new();
    let mut unneeded = vec![];
    // Newest first, so the one seen before is what replaced it.
    let mut replaced = None;
    for version in versions::log(&latest).await? {
        let recent = replaced.replace(version.time).is_none_or(|time| time >= cutoff);
        if recent || tagged.contains(&version.version) {
            let dataset = catalogue::open(location, Some(version.version)).await?;
            reached.extend(catalogue::artifacts(&dataset).await?);
        } else {
            unneeded.push(version.version);
        }
    }
    Ok((reached, unneeded))
}

/// Splits the list of artifacts into one row for each that stays, and the rows that go.
async fn sort_out(
    location: &Location,
    dataset: &Dataset,
    reached: &HashSet<ArtifactId>,
    cutoff: DateTime<Utc>,
) -> Result<(BTreeMap<ArtifactId, ArtifactRecord>, Vec<Span>)> {
    let mut kept = BTreeMap::new();
    let mut dead = vec![];
    let action = "reading the table of artifacts";
    let formats = location.formats();
    let columns = formats.known_columns(ARTIFACTS, dataset);
    for batch in scan(dataset, Some(&columns)).during(action).await? {
        let addresses = addresses(&batch)?;
        let batch = formats.completed(ARTIFACTS, batch).map_err(|e| Error::storage(action, e))?;
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

async fn scan(dataset: &Dataset, columns: Option<&[String]>) -> lance::Result<Vec<RecordBatch>> {
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

/// Consecutive rows of one artifact each, in the table's order.
async fn spans(dataset: &Dataset) -> Result<Vec<Span>> {
    let mut spans: Vec<Span> = vec![];
    for batch in scan(dataset, Some(&["artifact".into()])).during("reading the rows' artifacts").await? {
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
        kept.iter().filter_map(|(id, record)| Some((*id, record.locations.0.get(table)?.rows))).collect();
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

/// Bytes of a span's columns: of fixed width by their number, of others by looking at them.
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
        let action = "reading the rows to be removed";
        let projection = dataset.schema().project(&varying).map_err(storage_error(action))?;
        let (fragment, offset) = ((span.start >> 32) as usize, span.start & u64::from(u32::MAX));
        if let Some(fragment) = dataset.get_fragment(fragment) {
            let stream =
                fragment.read_physical_slice(offset..offset + span.rows, &projection, 1024).during(action).await?;
            let batches: Vec<RecordBatch> =
                futures::StreamExt::buffered(stream, 1).try_collect().during(action).await?;
            for column in batches.iter().flat_map(|b| b.columns().to_vec()) {
                bytes += column.as_binary_opt::<i32>().map_or(0, |c| c.iter().flatten().map(|v| v.len() as u64).sum());
                bytes += column.as_binary_opt::<i64>().map_or(0, |c| c.iter().flatten().map(|v| v.len() as u64).sum());
            }
        }
    }
    Ok(bytes)
}

/// The policy for tables of data, whose older versions nobody opens.
fn all_but_latest() -> CleanupPolicy {
    // Unverified files are those of writers that died: the exclusive lock says that no other writer is at work.
    CleanupPolicyBuilder::default()
        .before_timestamp(Utc::now())
        .error_if_tagged_old_versions(false)
        .delete_unverified(true)
        .build()
}

async fn unreferenced_bytes(dataset: &Dataset) -> Result<u64> {
    let explained = dataset.cleanup(all_but_latest()).explain().during("looking for unreferenced files").await?;
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

/// Writes fragments with deleted rows anew without them, and gives the artifacts whose rows have moved.
async fn compacted(
    mut dataset: Dataset,
    table: &str,
    kept: &mut BTreeMap<ArtifactId, ArtifactRecord>,
) -> Result<HashSet<ArtifactId>> {
    let whole = dataset.fragments().iter().filter(|f| f.deletion_file.is_none()).map(|f| f.id as u32).collect();
    let options = CompactionOptions {
        // Only what has deletions: merging small fragments would move every artifact for nothing.
        excluded_fragment_ids: whole,
        materialize_deletions_threshold: 0.0,
        num_threads: Some(1),
        ..CompactionOptions::default()
    };
    compact_files(&mut dataset, options, None).during(format!("compacting table '{table}'")).await?;
    // The first file of a fragment holds the columns that it was written with.
    let files: HashMap<u64, String> =
        dataset.fragments().iter().filter_map(|f| Some((f.id, f.files.first()?.path.clone()))).collect();
    let mut ranges: HashMap<ArtifactId, Vec<RowRange>> = HashMap::new();
    for span in spans(&dataset).await? {
        let Some(file) = files.get(&(span.start >> 32)) else { continue };
        let offset = span.start & u64::from(u32::MAX);
        ranges.entry(span.artifact).or_default().push(RowRange { file: file.clone(), offset, rows: span.rows });
    }
    let mut moved = HashSet::new();
    for (artifact, ranges) in ranges {
        let Some(known) = kept.get_mut(&artifact).and_then(|r| r.locations.0.get_mut(table)) else { continue };
        let now = TableRows { rows: known.rows, ranges };
        if *known != now {
            *known = now;
            moved.insert(artifact);
        }
    }
    Ok(moved)
}

/// Writes the locations of these artifacts' rows into the list of artifacts; all other columns stay as they are, also
/// those that are not known here.
async fn relist(dataset: Dataset, moved: &BTreeMap<ArtifactId, ArtifactRecord>) -> Result<Dataset> {
    let action = "writing where the artifacts' rows are";
    if moved.is_empty() {
        return Ok(dataset);
    }
    let mut batches = vec![];
    let mut all = dataset.scan();
    all.scan_in_order(true);
    let rows = async { all.try_into_stream().await?.try_collect::<Vec<RecordBatch>>().await };
    for batch in rows.during(action).await? {
        batches.extend(relocated(&batch, moved).ok_or_else(|| {
            Error::expected(
                "columns 'artifact' and 'places' of the list of artifacts",
                "another type",
                "hashes and texts",
            )
        })?);
    }
    if batches.is_empty() {
        return Ok(dataset);
    }
    let mut merge =
        MergeInsertBuilder::try_new(Arc::new(dataset), vec!["artifact".into()]).map_err(storage_error(action))?;
    merge.when_matched(WhenMatched::UpdateAll).when_not_matched(WhenNotMatched::DoNothing).use_index(false);
    let merge = merge.try_build().map_err(storage_error(action))?;
    let (dataset, _) = merge.execute_batches(batches).during(action).await?;
    Ok(Arc::unwrap_or_clone(dataset))
}

/// The rows of a batch of the list whose artifacts have moved, with their new locations.
fn relocated(batch: &RecordBatch, moved: &BTreeMap<ArtifactId, ArtifactRecord>) -> Option<Vec<RecordBatch>> {
    let names = batch.column_by_name("artifact")?.as_fixed_size_binary_opt()?;
    let place = batch.schema().index_of(LOCATIONS).ok()?;
    let mut rows = vec![];
    for row in 0..batch.num_rows() {
        let Some(record) = moved.get(&ArtifactId(names.value(row).try_into().ok()?)) else { continue };
        let one = batch.slice(row, 1);
        let mut columns = one.columns().to_vec();
        columns[place] = Arc::new(StringArray::from(vec![serde_json::to_string(&record.locations).ok()?]));
        rows.push(RecordBatch::try_new(one.schema(), columns).ok()?);
    }
    Some(rows)
}
