//! What was found to be reached by nothing, removed.

use std::collections::{BTreeMap, HashMap, HashSet};

use chrono::{DateTime, Utc};
use futures::FutureExt;
use lance::Dataset;
use lance::dataset::cleanup::{CleanupPolicy, CleanupPolicyBuilder};
use lance::dataset::optimize::{CompactionOptions, compact_files};

use super::agreement::data_files;
use super::aside;
use super::indexing;
use super::layout::{VERSIONS, version_of};
use super::listing::{names_in, staged_files};
use super::location::Location;
use super::lock::Guard;
use super::properties::{TableVersions, properties};
use super::relist::relist;
use super::row_locations::{LocationsText, RowRange, TableRows};
use super::scan::batch_rows;
use super::schema::{ARTIFACTS, LAYERS};
use super::spans::{Span, first_files, spans};
use super::survey::{Survey, all_but_latest, is_alone, open};
use super::update;
use super::waiting::{Waiting, storage_error};
use crate::error::{Error, Result};
use crate::layer::ArtifactId;

/// Removes what a survey found, in an order that leaves a store whole wherever it ends.
pub async fn remove((location, held): (&Location, &mut Guard), survey: Survey) -> Result<()> {
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
            let mut ranges =
                kept.values().filter_map(|listed| listed.locations().0.remove(&table)).flat_map(|rows| rows.ranges);
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
        let dataset =
            relist(dataset, &moved.map(|(artifact, listed)| (artifact, listed.locations())).collect()).await?;
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

/// The policy for the catalogue, whose versions are removed by themselves: what no version leads to.
fn no_version(location: &Location) -> CleanupPolicy {
    CleanupPolicyBuilder::default()
        .before_timestamp(DateTime::<Utc>::MIN_UTC)
        .error_if_tagged_old_versions(false)
        .delete_unverified(is_alone(location))
        .build()
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

/// Puts into the listings where the rows of a table are now, and gives the artifacts whose rows are not where they were.
async fn relocate(
    dataset: &Dataset,
    table: &str,
    kept: &mut BTreeMap<ArtifactId, LocationsText>,
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
        let Some(listed) = kept.get_mut(&artifact) else { continue };
        let mut locations = listed.locations();
        let Some(known) = locations.0.get_mut(table) else { continue };
        let now = TableRows { rows: known.rows, ranges };
        if *known != now {
            *known = now;
            *listed = (&locations).into();
            moved.insert(artifact);
        }
    }
    Ok(moved)
}
