//! What the list of artifacts, or a data table, has lost is completed before anything new is written: from the rows that are still
//! in data files, where the catalogue says that they are.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::agreement::{DataTables, Named, Names};
use super::batches::Layout;
use super::catalogue;
use super::data::Data;
use super::location::Location;
use super::record::{ArtifactRecord, LayerRecord};
use super::versions;
use super::writer::{Provenance, Writer};
use crate::error::Result;
use crate::layer::{ArtifactId, Parts, layer_from_parts};
use crate::tasks::unwrap_join;

/// Lists again what the catalogue names and the list does not have, and writes again what is in no version of its table. `lost` are
/// the records of artifacts that are listed and have lost rows. What cannot be read any more is left for `verify` to tell of.
///
/// # Errors
/// When the catalogue cannot be read, or the storage refuses what is written.
pub async fn complete(
    writer: &mut Writer,
    location: &Location,
    data: &Arc<Data>,
    lost: &HashMap<ArtifactId, ArtifactRecord>,
) -> Result<()> {
    let latest = catalogue::open(location, None).await?;
    let mut asked: BTreeSet<u64> = BTreeSet::new();
    for name in versions::tag_names(location).await? {
        // A damaged snapshot is no reason not to import.
        asked.extend(versions::tag(location, &latest, &name).await.ok());
    }
    asked.remove(&latest.version_id());
    let mut names = Names::default();
    names.add(&latest).await?;
    names.add_readable(location, asked.iter().copied()).await;
    if names.iter().all(|(artifact, _)| writer.has(artifact)) {
        return Ok(());
    }
    // Something was lost: also look at all the versions that may be restored.
    let others = catalogue::versions(&latest).await?.into_iter().filter(|v| !asked.contains(v));
    names.add_readable(location, others).await;
    let mut tables = DataTables::of(location);
    let mut listed = vec![];
    for (artifact, user) in names.iter() {
        if writer.has(artifact) {
            continue;
        }
        // gc keeps the list's locations up to date, and not those of the catalogue.
        let found = match lost.get(artifact) {
            Some(record) => read(data, record.clone()).await.ok().flatten(),
            None => None,
        };
        let found = match found {
            None => {
                let row = row(location, *artifact, user).await.ok().flatten();
                match row {
                    Some(row) => read(data, row.artifact_record()).await.ok().flatten(),
                    None => None,
                }
            }
            found => found,
        };
        let Some((record, parts)) = found else { continue };
        if !lost.contains_key(artifact) && tables.lack(*artifact, &record.locations, false).await?.is_none() {
            listed.push(record);
        } else {
            let recipe = lost.get(artifact).map_or(record.recipe, |record| record.recipe);
            let provenance =
                Provenance { recipe, relative_error: record.relative_error, error_basis: record.error_basis };
            // As many rows as before in each table, which is what the catalogue says.
            let layout = Layout::of_tables(record.locations.0.keys().map(String::as_str));
            writer.add_as(&parts, provenance, layout).await?;
        }
    }
    writer.list(listed).await?;
    writer.flush().await
}

/// Reads a row of the catalogue that names an artifact.
async fn row(location: &Location, artifact: ArtifactId, user: &Named) -> Result<Option<LayerRecord>> {
    let dataset = catalogue::open(location, Some(user.version)).await?;
    let rows = catalogue::rows(location, &dataset, Some(&format!("artifact = X'{artifact}'"))).await?;
    Ok(rows.into_iter().next())
}

/// Reads an artifact from where a record says that its rows are; `None` where they are not what its name stands for.
async fn read(data: &Arc<Data>, mut record: ArtifactRecord) -> Result<Option<(ArtifactRecord, Parts)>> {
    let artifact = record.artifact;
    let parts = data.parts(&record).await?;
    let named = tokio::task::spawn_blocking(move || {
        // The catalogue's settings may be more than those that are part of the name.
        let parts = if parts.id() == artifact { parts } else { layer_from_parts(parts)?.to_parts() };
        Ok::<_, crate::Error>((parts.id() == artifact).then_some(parts))
    });
    let Some(parts) = unwrap_join(named.await)?? else { return Ok(None) };
    record.config = parts.config.clone();
    Ok(Some((record, parts)))
}
