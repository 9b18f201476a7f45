//! What no snapshot and no recent version reaches, looked for.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::DataType;
use chrono::{DateTime, Utc};
use futures::TryStreamExt;
use lance::Dataset;
use lance::dataset::cleanup::{CleanupPolicy, CleanupPolicyBuilder};
use serde::Serialize;

use super::agreement::{DataTables, Names, disagreement, require_whole};
use super::catalogue;
use super::listing::{data_tables, staged_files};
use super::location::Location;
use super::place::Place;
use super::record::{Listing, read_listings};
use super::row_locations::LocationsText;
use super::scan::{batch_rows, for_each};
use super::schema::{ARTIFACTS, Table};
use super::spans::{Span, addresses, first_files, scan, spans};
use super::versions::{self, VersionInfo};
use super::waiting::{Waiting, storage_error};
use crate::error::Result;
use crate::layer::ArtifactId;

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
pub struct Survey {
    /// Versions of the catalogue that nobody may restore once their artifacts are gone.
    pub old_versions: Vec<u64>,
    /// The list of artifacts, where there is one.
    pub list: Option<Dataset>,
    /// Rows of that list: of artifacts that nothing reaches, and second copies.
    pub unlisted: Vec<Span>,
    /// Where the rows of the artifacts are that stay.
    pub kept: BTreeMap<ArtifactId, LocationsText>,
    /// Rows to remove of each data table.
    pub garbage: Vec<(String, Vec<Span>)>,
    pub report: GcReport,
}

impl Survey {
    /// Returns whether there is nothing to remove.
    pub fn finds_nothing(&self) -> bool {
        self.old_versions.is_empty()
            && self.unlisted.is_empty()
            && self.garbage.iter().all(|(_, spans)| spans.is_empty())
            && self.report.reclaimable_bytes == 0
    }
}

/// Looks for what nothing reaches. Tables are opened for writing if what is found is to be removed.
///
/// The catalogue is asked first, then the list, then the data tables: each import writes them the other way round, so what is named
/// here is found there, unless a table is older than it was.
pub async fn survey(
    location: &Location,
    (cutoff, begun): (DateTime<Utc>, &BTreeSet<u64>),
    write: bool,
) -> Result<Survey> {
    let (named, old_versions) = reachable(location, (cutoff, begun)).await?;
    let list = open(location, ARTIFACTS, write).await?;
    let sorted = async |broken: &HashSet<ArtifactId>| match &list {
        Some(dataset) => sort_out(dataset, (&named, broken), cutoff).await,
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
    kept: &BTreeMap<ArtifactId, LocationsText>,
) -> Result<HashSet<ArtifactId>> {
    let mut tables = DataTables::of(location);
    let mut wrong = vec![];
    for (artifact, user) in named.iter() {
        let lack = match kept.get(artifact).map(LocationsText::locations) {
            None => Some("the table of artifacts does not list it".to_owned()),
            Some(listed) if !listed.as_many_rows(&user.locations.locations()) => {
                Some("the table of artifacts lists it with other numbers of rows".to_owned())
            }
            Some(listed) => tables.lack(*artifact, &listed, true).await?,
        };
        wrong.extend(lack.map(|lack| format!("artifact {artifact} of {user}: {lack}")));
    }
    if let Some(first) = wrong.first() {
        return Err(disagreement(location, wrong.len(), first));
    }
    let mut broken = HashSet::new();
    for (artifact, listed) in kept.iter().filter(|(artifact, _)| !named.has(artifact)) {
        if tables.lack(*artifact, &listed.locations(), true).await?.is_some() {
            broken.insert(*artifact);
        }
    }
    Ok(broken)
}

pub async fn open(location: &Location, table: &str, write: bool) -> Result<Option<Dataset>> {
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
    unneeded.extend(kept.extract_if(.., |version| begun.contains(version) && !tagged.contains(version)));
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
    dataset: &Dataset,
    (reached, broken): (&Names, &HashSet<ArtifactId>),
    cutoff: DateTime<Utc>,
) -> Result<(BTreeMap<ArtifactId, LocationsText>, Vec<Span>)> {
    let mut kept = BTreeMap::new();
    let mut dead = vec![];
    for_each(scan(dataset, &Listing::COLUMNS)?, "reading the table of artifacts", |batch| {
        for (Listing { artifact, locations, created_at }, start) in
            read_listings(&batch)?.into_iter().zip(addresses(&batch)?)
        {
            let stays = reached.has(&artifact) || created_at >= cutoff;
            match kept.entry(artifact) {
                Entry::Vacant(first) if stays && !broken.contains(&artifact) => drop(first.insert(locations)),
                _ => dead.push(Span { artifact, start, rows: 1 }),
            }
        }
        Ok(())
    })
    .await?;
    Ok((kept, dead))
}

/// Rows that no kept artifact needs: of others, and copies beside the one that the list leads to. Where the rows are not all where the
/// list says, since a gc that ended early had moved them, the first of them are kept.
async fn unneeded(dataset: &Dataset, table: &str, kept: &BTreeMap<ArtifactId, LocationsText>) -> Result<Vec<Span>> {
    let files = first_files(dataset);
    let listed = |id: &ArtifactId| kept.get(id).and_then(|listed| listed.locations().0.remove(table));
    let spans = spans(dataset).await?;
    let mut there: HashMap<ArtifactId, u64> = HashMap::new();
    for span in &spans {
        let parts = listed(&span.artifact).map(|rows| span.parts_in(&files, &rows)).unwrap_or_default();
        *there.entry(span.artifact).or_default() += parts.iter().map(|part| part.rows).sum::<u64>();
    }
    let mut seen: HashMap<ArtifactId, u64> = HashMap::new();
    let mut garbage = vec![];
    for span in spans {
        let needed = match listed(&span.artifact) {
            None => vec![],
            Some(rows) if there.get(&span.artifact) == Some(&rows.rows) => span.parts_in(&files, &rows),
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

/// Whether files that no version ever had are those of writers that died. On an object store they may be a sleeping writer's, which
/// commits them later, and stay for a week.
pub fn is_alone(location: &Location) -> bool {
    !matches!(location.place(), Place::Remote)
}

/// The policy for tables whose older versions nobody opens.
pub fn all_but_latest(location: &Location) -> CleanupPolicy {
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
