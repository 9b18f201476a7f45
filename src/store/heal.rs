//! What the list of artifacts, or a data table, has lost is completed before anything new is written: from the rows that are still
//! in data files, where the list or the catalogue says that they are.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures::FutureExt;
use lance::Dataset;

use super::agreement::{DataTables, Named, Names};
use super::batches::Layout;
use super::catalogue;
use super::location::Location;
use super::lock;
use super::properties::TableVersions;
use super::record::{ArtifactRecord, LayerRecord};
use super::rows;
use super::shared::Shared;
use super::versions;
use super::writer::{Provenance, Writer};
use crate::error::Result;
use crate::layer::{ArtifactId, Parts};

/// What was lost and is there again.
#[derive(Debug, Clone, Default)]
pub struct Healed {
    /// Artifacts that the list had lost, and whose rows are where they were.
    pub listed: Vec<ArtifactId>,
    /// Artifacts whose rows a table had lost, and that were written again.
    pub written: Vec<ArtifactId>,
}

/// Begins a change of a store, after everything was completed that the list of artifacts or a data table has lost. Where the tables have
/// the versions that the catalogue says, nothing is, and nothing is read for it. Else the latest version and the snapshots are asked
/// what they name, and if some of it is lost, or where it is to be `thorough`, so are all versions.
///
/// # Errors
/// When the catalogue cannot be read, or the storage refuses what is written.
pub async fn begin(shared: &Arc<Shared>, thorough: bool) -> Result<(Writer, Healed)> {
    let location = &shared.location;
    let guard = lock::importing(location).await?;
    let latest = shared.latest().await?;
    // What of it a commit would read has to be readable: better told before the work.
    latest.look().await?;
    let latest = latest.dataset().clone();
    let format = location.format_of(&latest)?;
    let tables = if thorough { None } else { TableVersions::said_by(&latest).await };
    let agree = match tables {
        Some(tables) => tables.are_there(location).await,
        None => false,
    };
    let mut writer = Writer::begin(shared, guard, format).await?;
    if agree && writer.inventory().lost().is_empty() {
        return Ok((writer, Healed::default()));
    }
    // Boxed: Lance's futures are large.
    writer.look_at_all().boxed().await?;
    let healed = complete(&mut writer, shared, (&latest, thorough)).boxed().await?;
    Ok((writer, healed))
}

/// Lists again what the catalogue names and the list does not have, and writes again what is in no version of its table. What cannot
/// be read any more is left for `verify` to tell of.
async fn complete(writer: &mut Writer, shared: &Arc<Shared>, (latest, thorough): (&Dataset, bool)) -> Result<Healed> {
    let location = &shared.location;
    let mut asked: BTreeSet<u64> = BTreeSet::new();
    for name in versions::tag_names(location).await? {
        // A damaged snapshot is no reason not to import.
        asked.extend(versions::tag(location, latest, &name).await.ok());
    }
    asked.remove(&latest.version_id());
    let mut names = Names::default();
    names.add(latest, |_, _| ()).await?;
    names.add_readable(location, asked.iter().copied()).await;
    let mut healed = Healed::default();
    let thorough = thorough || !writer.inventory().lost().is_empty();
    if !thorough && names.iter().all(|(artifact, _)| writer.inventory().has(artifact)) {
        return Ok(healed);
    }
    // Also look at all the versions that may be restored.
    let others = catalogue::versions(latest).await?.into_iter().filter(|v| !asked.contains(v));
    names.add_readable(location, others).await;
    let mut tables = DataTables::of(location);
    let mut listed = vec![];
    for (artifact, user) in names.iter() {
        if writer.inventory().has(artifact) {
            continue;
        }
        let lost = writer.inventory().lost().get(artifact).cloned();
        let Some((record, parts)) = found(shared, lost.as_ref(), user, *artifact).await else {
            writer.note_unlisted(*artifact, user.locations.locations());
            continue;
        };
        if lost.is_none() && tables.lack(*artifact, &record.locations, false).await?.is_none() {
            healed.listed.push(*artifact);
            listed.push(record);
        } else {
            healed.written.push(*artifact);
            let (relative_error, error_basis) = (record.relative_error, record.error_basis);
            let provenance = Provenance { recipe: record.recipe, relative_error, error_basis };
            // As many rows as before in each table, which is what the catalogue says.
            writer.complete(&parts, provenance, Layout::of(&record.locations)).await?;
        }
    }
    writer.list(listed).await?;
    writer.flush().await?;
    Ok(healed)
}

/// Finds an artifact where the list says that its rows are, or else where the catalogue says; `None` where neither holds what its name
/// stands for.
pub async fn found(
    shared: &Arc<Shared>,
    listed: Option<&ArtifactRecord>,
    user: &Named,
    artifact: ArtifactId,
) -> Option<(ArtifactRecord, Parts)> {
    // gc keeps the list's locations up to date, and not those of the catalogue.
    if let Some(record) = listed
        && let Ok(parts) = shared.data.verified(record).await
    {
        return Some((record.clone(), parts));
    }
    let record = row(&shared.location, artifact, user).await.ok()??.artifact_record();
    let parts = shared.data.verified(&record).await.ok()?;
    let recipe = listed.map_or(record.recipe, |listed| listed.recipe);
    Some((ArtifactRecord { config: parts.config.clone(), recipe, ..record }, parts))
}

/// Reads a row of the catalogue that names an artifact.
///
/// # Errors
/// When it cannot be read.
pub async fn row(location: &Location, artifact: ArtifactId, user: &Named) -> Result<Option<LayerRecord>> {
    let dataset = catalogue::open(location, Some(user.version)).await?;
    let rows = rows::rows(location, &dataset, Some(&format!("artifact = X'{artifact}'"))).await?;
    Ok(rows.into_iter().next())
}
