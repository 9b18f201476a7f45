//! Removing what no snapshot and no recent version reaches.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::DataType;
use chrono::{DateTime, Utc};
use futures::{FutureExt, TryStreamExt};
use lance::Dataset;
use lance::dataset::cleanup::{CleanupPolicy, CleanupPolicyBuilder};
use lance::dataset::optimize::{CompactionOptions, compact_files};
use serde::Serialize;

use super::agreement::{DataTables, Names, data_files, disagreement, require_whole};
use super::aside;
use super::catalogue;
use super::indexing;
use super::layout::{VERSIONS, version_of};
use super::listing::{data_tables, disk_bytes, names_in, staged_files};
use super::location::{Location, Place};
use super::lock::{self, Guard};
use super::properties::{TableVersions, properties};
use super::record::{ArtifactRecord, RowRange, TableRows, read_artifacts};
use super::relist::relist;
use super::scan::batch_rows;
use super::schema::{ARTIFACTS, LAYERS, Table};
use super::spans::{Span, addresses, first_files, scan, spans};
use super::update;
use super::versions::{self, VersionInfo};
use super::waiting::{Waiting, storage_error};
use crate::error::{Error, Result};
use crate::layer::ArtifactId;

/// How long gc waits for imports to finish before it gives up.
const PATIENCE: Duration = Duration::from_secs(10);

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
/// [`Error::Busy`] when an import does not finish in time; and when the storage refuses.
pub async fn collect(location: &Location, older_than: Duration, apply: bool) -> Result<GcReport> {
    // A dry run only reads, and may be done on a store that cannot be written.
    let mut guards = match apply {
        true => Some((lock::collecting(location, "gc", PATIENCE).await?, lock::committing(location).await?)),
        false => None,
    };
    // Versions that an earlier gc has begun to remove.
    let begun = match &guards {
        Some((Guard::Alone { lease }, _)) => lease.condemned().await,
        _ => BTreeSet::new(),
    };
    let age = chrono::Duration::from_std(older_than).unwrap_or(chrono::Duration::MAX);
    let cutoff = Utc::now().checked_sub_signed(age).unwrap_or(DateTime::<Utc>::MIN_UTC);
    let survey = survey(location, (cutoff, &begun), apply).await?;
    let Some((held, _)) = &mut guards else { return Ok(survey.report) };
    let before = disk_bytes(location).await;
    let mut report = survey.report.clone();
    remove((location, held), survey).await?;
    report.applied = true;
    report.removed_bytes = before.unwrap_or_default().saturating_sub(disk_bytes(location).await.unwrap_or_default());
    Ok(report)
}

/// Looks for what nothing reaches. Tables are opened for writing if what is found is to be removed.
///
/// The catalogue is asked first, then the list, then the data tables: each import writes them the other way round, so what is named
/// here is found there, unless a table is older than it was.
async fn survey(location: &Location, (cutoff, begun): (DateTime<Utc>, &BTreeSet<u64>), write: bool) -> Result<Survey> {
    let (named, old_versions) = reachable(location, (cutoff, begun)).await?;
    let list = open(location, ARTIFACTS, write).await?;
    let sorted = async |broken: &HashSet<ArtifactId>| match &list {
        Some(dataset) => sort_out(location, dataset, (&named, broken), cutoff).await,
        None => Ok((BTreeMap::new(), vec![])),
    };
    let (mut kept, mut unlisted) = sorted(&HashSet::new()).await?;
    let broken = require_agreement(location, &named, &kept).await?;
    if !broken.is_empty() {
        (kept, unlisted) = sorted(&broken).await?;
    }
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
        report.reclaimable_bytes += unreferenced_bytes(location, &dataset).await?;
        garbage.push((name, spans));
    }
    report.reclaimable_bytes += staged_files(location).iter().map(|(_, bytes)| bytes).sum::<u64>();
    Ok(Survey { old_versions, list, unlisted, kept, garbage, report })
}

/// Refuses to go on where the list or a data table lacks what a version that is kept names. Returns what is listed, named by no
/// such version, and has no longer the rows that it had: no artifact any more.
async fn require_agreement(
    location: &Location,
    named: &Names,
    kept: &BTreeMap<ArtifactId, ArtifactRecord>,
) -> Result<HashSet<ArtifactId>> {
    let mut tables = DataTables::of(location);
    let mut wrong = vec![];
    for (artifact, user) in named.iter() {
        let lack = match kept.get(artifact) {
            None => Some("the table of artifacts does not list it".to_owned()),
            Some(record) if !record.locations.as_many_rows(&user.locations) => {
                Some("the table of artifacts lists it with other numbers of rows".to_owned())
            }
            Some(record) => tables.lack(*artifact, &record.locations, true).await?,
        };
        wrong.extend(lack.map(|lack| format!("artifact {artifact} of {user}: {lack}")));
    }
    if let Some(first) = wrong.first() {
        return Err(disagreement(location, wrong.len(), first));
    }
    let mut broken = HashSet::new();
    for (artifact, record) in kept.iter().filter(|(artifact, _)| !named.has(artifact)) {
        if tables.lack(*artifact, &record.locations, true).await?.is_some() {
            broken.insert(*artifact);
        }
    }
    Ok(broken)
}

/// Removes what a survey found, in an order that leaves a store whole wherever it ends.
async fn remove((location, held): (&Location, &mut Guard), survey: Survey) -> Result<()> {
    let Survey { old_versions, list, unlisted, mut kept, garbage, .. } = survey;
    // First the old versions, which nobody may open or restore once what they lead to is gone; then what they alone led to. Lance
    // would remove both at once.
    let old: HashSet<u64> = old_versions.into_iter().collect();
    if let Guard::Alone { lease } = held {
        lease.condemn(old.iter().copied()).await?;
    }
    let mut manifests = names_in(location, LAYERS, &[VERSIONS]).await?;
    manifests.retain(|file| version_of(file).is_some_and(|version| old.contains(&version)));
    aside::remove_all(location, (LAYERS, VERSIONS), manifests).await?;
    let catalogue = location.open_for_write(LAYERS).during("opening the catalogue").await?;
    catalogue.cleanup_with_policy(no_version(location)).during("collecting old versions").await?;
    if let Guard::Alone { lease } = held {
        lease.removed().await?;
    }
    // Then the list, so that no later import takes what is about to go for complete.
    if let Some(dataset) = list.filter(|_| !unlisted.is_empty()) {
        delete((location, held), dataset, ("removing artifacts from the list", &unlisted)).await?;
    }
    let mut moved = HashSet::new();
    for (table, spans) in garbage {
        let action = || format!("collecting table '{table}'");
        let Some(dataset) = open(location, &table, true).await? else { continue };
        if !spans.is_empty() {
            delete((location, held), dataset, (&action(), &spans)).await?;
            let mut dataset = location.open_for_write(&table).during(action()).await?;
            compact(&mut dataset).during(format!("compacting table '{table}'")).await?;
            moved.extend(relocate(&dataset, &table, &mut kept).await?);
        } else {
            // Written again, since the table had lost them: where they were recorded to be is no file of the table.
            let files = data_files(&dataset);
            let mut ranges = kept.values().filter_map(|r| r.locations.0.get(&table)).flat_map(|rows| &rows.ranges);
            if ranges.any(|range| !files.contains(&range.file)) {
                moved.extend(relocate(&dataset, &table, &mut kept).await?);
            }
        }
        if let Some(dataset) = open(location, &table, true).await? {
            dataset.cleanup_with_policy(all_but_latest(location)).during(action()).await?;
        }
    }
    if let Some(dataset) = open(location, ARTIFACTS, true).await? {
        held.confirm().await?;
        let moved = kept.into_iter().filter(|(artifact, _)| moved.contains(artifact));
        let dataset = relist(dataset, &moved.map(|(artifact, record)| (artifact, record.locations)).collect()).await?;
        dataset.cleanup_with_policy(all_but_latest(location)).during("collecting the list of artifacts").await?;
    }
    join((location, held)).await?;
    // Last, what a writer that was killed had not moved to its place: no other writer is at work.
    for (path, _) in staged_files(location) {
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(path, e)),
            _ => {}
        }
    }
    Ok(())
}

/// Joins the small fragments of the catalogue and of the list, where there are many, and makes each index of them one part.
async fn join((location, held): (&Location, &Guard)) -> Result<()> {
    let limits = location.limits();
    for table in [ARTIFACTS, LAYERS] {
        let Some(dataset) = open(location, table, true).await? else { continue };
        held.confirm().await?;
        let before = dataset.version_id();
        let tables = TableVersions::said_by(&dataset).await;
        // What the log shows.
        let said = || properties("gc".into(), None, tables.as_ref()).filter(|_| table == LAYERS);
        let action = || format!("joining the rows of table '{table}'");
        let joined = update::join_all(dataset, (limits, said())).boxed().during(action()).await?;
        // A version of the store is made for joined rows alone.
        if !joined && table == LAYERS {
            continue;
        }
        let Some(dataset) = open(location, table, true).await? else { continue };
        let dataset = indexing::merge_all(dataset, table, (limits, said())).boxed().during(action()).await?;
        if table == ARTIFACTS && dataset.version_id() > before {
            dataset.cleanup_with_policy(all_but_latest(location)).during("collecting the list of artifacts").await?;
        }
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
/// and the versions that are none of these, or that an earlier gc has begun to remove.
///
/// # Errors
/// When one of the versions cannot be read, or versions are known to be missing.
async fn reachable(location: &Location, (cutoff, begun): (DateTime<Utc>, &BTreeSet<u64>)) -> Result<(Names, Vec<u64>)> {
    let latest = catalogue::open(location, None).await?;
    let tags = versions::tags(location, &latest).await?;
    let log = versions::log(location, &latest).await?;
    require_whole(location, &latest, &log.iter().map(|version| version.version).collect(), &tags)?;
    let tagged: HashSet<u64> = tags.into_iter().map(|(_, version)| version).collect();
    let (mut kept, mut unneeded) = sort_versions(&log, &tagged, cutoff);
    unneeded.extend(kept.extract_if(.., |version| begun.contains(version)));
    Ok((Names::of(location, kept).await?, unneeded))
}

/// The versions that are kept, and those that are not, of a log, newest first.
///
/// A version is as old as the one that replaced it. A clock may have been behind when that was committed, so it counts as not older
/// than any version before it.
fn sort_versions(log: &[VersionInfo], tagged: &HashSet<u64>, cutoff: DateTime<Utc>) -> (Vec<u64>, Vec<u64>) {
    let mut times: Vec<DateTime<Utc>> = log.iter().map(|version| version.time).collect();
    for place in (1..times.len()).rev() {
        times[place - 1] = times[place - 1].max(times[place]);
    }
    let replaced = std::iter::once(None).chain(times.into_iter().map(Some));
    let (kept, unneeded): (Vec<_>, Vec<_>) = log.iter().zip(replaced).partition(|(version, replaced)| {
        replaced.is_none_or(|time| time >= cutoff) || tagged.contains(&version.version)
    });
    let numbers = |versions: Vec<(&VersionInfo, _)>| versions.into_iter().map(|(version, _)| version.version).collect();
    (numbers(kept), numbers(unneeded))
}

/// Splits the list of artifacts into one row for each that stays, and the rows that go: those of `broken` artifacts among them.
async fn sort_out(
    location: &Location,
    dataset: &Dataset,
    (reached, broken): (&Names, &HashSet<ArtifactId>),
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
            let stays = reached.has(&record.artifact) || record.created_at >= cutoff;
            if stays && !broken.contains(&record.artifact) && !kept.contains_key(&record.artifact) {
                kept.insert(record.artifact, record);
            } else {
                dead.push(Span { artifact: record.artifact, start, rows: 1 });
            }
        }
    }
    Ok((kept, dead))
}

/// Rows that no kept artifact needs: of others, and copies beside the one that the list leads to. Where the rows are not all where the
/// list says, since a gc that ended early had moved them, the first of them are kept.
async fn unneeded(dataset: &Dataset, table: &str, kept: &BTreeMap<ArtifactId, ArtifactRecord>) -> Result<Vec<Span>> {
    let files = first_files(dataset);
    let listed = |id: &ArtifactId| kept.get(id).and_then(|record| record.locations.0.get(table));
    let spans = spans(dataset).await?;
    let mut there: HashMap<ArtifactId, u64> = HashMap::new();
    for span in &spans {
        let parts = listed(&span.artifact).map(|rows| span.parts_in(&files, rows)).unwrap_or_default();
        *there.entry(span.artifact).or_default() += parts.iter().map(|part| part.rows).sum::<u64>();
    }
    let mut seen: HashMap<ArtifactId, u64> = HashMap::new();
    let mut garbage = vec![];
    for span in spans {
        let needed = match listed(&span.artifact) {
            None => vec![],
            Some(rows) if there.get(&span.artifact) == Some(&rows.rows) => span.parts_in(&files, rows),
            Some(rows) => {
                let seen = seen.entry(span.artifact).or_default();
                let first = span.rows.min(rows.rows - *seen);
                *seen += first;
                vec![Span { rows: first, ..span }]
            }
        };
        let mut start = span.start;
        for part in needed.into_iter().filter(|part| part.rows > 0).chain([Span { start: span.end(), rows: 0, ..span }])
        {
            if part.start > start {
                garbage.push(Span { start, rows: part.start - start, ..span });
            }
            start = part.end();
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
        let (fragment, offset) = (span.fragment() as usize, span.offset());
        let rows = batch_rows(dataset).min(1024) as u32;
        if let Some(fragment) = dataset.get_fragment(fragment) {
            let stream =
                fragment.read_physical_slice(offset..offset + span.rows, &projection, rows).during(action).await?;
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

/// The policy for the catalogue, whose versions are removed by themselves: what no version leads to.
fn no_version(location: &Location) -> CleanupPolicy {
    CleanupPolicyBuilder::default()
        .before_timestamp(DateTime::<Utc>::MIN_UTC)
        .error_if_tagged_old_versions(false)
        .delete_unverified(is_alone(location))
        .build()
}

/// Whether files that no version ever had are those of writers that died. On an object store they may be a sleeping writer's, which
/// commits them later, and stay for a week.
fn is_alone(location: &Location) -> bool {
    !matches!(location.place(), Place::Remote)
}

/// The policy for tables whose older versions nobody opens.
fn all_but_latest(location: &Location) -> CleanupPolicy {
    CleanupPolicyBuilder::default()
        .before_timestamp(Utc::now())
        .error_if_tagged_old_versions(false)
        .delete_unverified(is_alone(location))
        .build()
}

async fn unreferenced_bytes(location: &Location, dataset: &Dataset) -> Result<u64> {
    let explained =
        dataset.cleanup(all_but_latest(location)).explain().during("looking for unreferenced files").await?;
    Ok(explained.stats.bytes_removed)
}

/// Removes rows from the latest version of a table, which is open.
async fn delete(
    (location, held): (&Location, &Guard),
    dataset: Dataset,
    (action, spans): (&str, &[Span]),
) -> Result<()> {
    let gone: Vec<u64> = spans.iter().flat_map(|span| span.start..span.end()).collect();
    held.confirm().await?;
    let deleted = update::commit(dataset, &gone, vec![], (&[], location.limits(), None)).boxed().caught().await;
    match deleted {
        Ok(_) => Ok(()),
        Err(e) => {
            // Another may have taken the lease over since.
            held.confirm().await?;
            Err(storage_error(action)(e))
        }
    }
}

/// Writes fragments with deleted rows anew without them.
async fn compact(dataset: &mut Dataset) -> lance::Result<()> {
    let whole = dataset.fragments().iter().filter(|f| f.deletion_file.is_none()).map(|f| f.id as u32).collect();
    let options = CompactionOptions {
        batch_size: Some(batch_rows(dataset)),
        // Only what has deletions: merging small fragments would move every artifact for nothing.
        excluded_fragment_ids: whole,
        materialize_deletions_threshold: 0.0,
        num_threads: Some(1),
        ..CompactionOptions::default()
    };
    compact_files(dataset, options, None).await?;
    Ok(())
}

/// Puts into the records where the rows of a table are now, and gives the artifacts whose rows are not where they were.
async fn relocate(
    dataset: &Dataset,
    table: &str,
    kept: &mut BTreeMap<ArtifactId, ArtifactRecord>,
) -> Result<HashSet<ArtifactId>> {
    let files = first_files(dataset);
    let mut ranges: HashMap<ArtifactId, Vec<RowRange>> = HashMap::new();
    for span in spans(dataset).await? {
        let Some(file) = files.get(&span.fragment()) else { continue };
        let range = RowRange { file: file.clone(), offset: span.offset(), rows: span.rows };
        ranges.entry(span.artifact).or_default().push(range);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn log(days_ago: &[i64]) -> (Vec<VersionInfo>, DateTime<Utc>) {
        let now = Utc::now();
        let version = |(place, days): (usize, &i64)| VersionInfo {
            version: place as u64 + 1,
            time: now - chrono::Duration::days(*days),
            operation: String::new(),
            message: None,
            snapshots: vec![],
        };
        (days_ago.iter().enumerate().map(version).rev().collect(), now - chrono::Duration::days(7))
    }

    /// The latest is kept, and what was replaced within the time; a clock that was behind makes nothing old.
    #[test]
    fn versions_age_in_their_order() {
        let sorted = |days_ago: &[i64], tagged: &[u64]| {
            let (log, cutoff) = log(days_ago);
            sort_versions(&log, &tagged.iter().copied().collect(), cutoff)
        };
        assert_eq!(sorted(&[40], &[]), (vec![1], vec![]));
        assert_eq!(sorted(&[40, 20, 3, 1], &[]), (vec![4, 3, 2], vec![1]));
        assert_eq!(sorted(&[40, 20, 3, 1], &[1]), (vec![4, 3, 2, 1], vec![]));
        // The second and the third were committed while a clock was 30 days behind.
        assert_eq!(sorted(&[1, 31, 30], &[]), (vec![3, 2, 1], vec![]));
        assert_eq!(sorted(&[50, 45, 3, 33, 32, 0], &[]), (vec![6, 5, 4, 3, 2], vec![1]));
        // While it was ahead: what came before is kept for longer.
        assert_eq!(sorted(&[20, -30, 18, 17], &[]), (vec![4, 3, 2, 1], vec![]));
    }
}
