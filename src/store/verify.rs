//! Every version of every table opened, and every artifact held against its name.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use serde::Serialize;

use super::agreement::{DataTables, Names};
use super::catalogue;
use super::metadata::{self, DamagedMetadata};
use super::record::{ArtifactRecord, LayerName, RowLocations};
use super::schema::LAYERS;
use super::shared::Shared;
use crate::error::Result;
use crate::layer::ArtifactId;
use crate::tasks::unwrap_join;

/// Artifacts hashed at once.
const AT_ONCE: usize = 2;

/// What verify found.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct VerifyReport {
    /// Artifacts that are listed, or that a version names.
    pub artifacts: u64,
    /// Those that are not what was written, or that a table lacks which should have them.
    pub corrupt: Vec<CorruptArtifact>,
    /// Versions of tables, and snapshots, that cannot be opened; left out of JSON where there are none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub damaged: Vec<DamagedMetadata>,
}

impl VerifyReport {
    /// Returns whether nothing was found.
    pub fn is_sound(&self) -> bool {
        self.corrupt.is_empty() && self.damaged.is_empty()
    }
}

/// An artifact that is not what was written.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CorruptArtifact {
    /// Its name.
    pub artifact: String,
    /// What was found.
    pub reason: String,
    /// Layers that use it, in any version that is there.
    pub layers: Vec<LayerName>,
}

/// Opens every version of every table, and reads every artifact and hashes it. `seen` is told of each one.
///
/// # Errors
/// When the latest version of the catalogue, or of the list of artifacts, cannot be read.
pub async fn verify(shared: &Arc<Shared>, seen: Arc<dyn Fn(usize, usize) + Send + Sync>) -> Result<VerifyReport> {
    let location = &shared.location;
    // The catalogue first, then the list, then the data: an import at work writes them the other way round.
    let latest = shared.latest().await?.dataset().version_id();
    let (mut damaged, versions) = metadata::damaged(location).await?;
    let mut users: BTreeMap<ArtifactId, BTreeSet<LayerName>> = BTreeMap::new();
    let mut named = Names::default();
    for version in versions.into_iter().rev() {
        let read = async {
            let dataset = catalogue::open(location, Some(version)).await?;
            for (artifact, layer) in named.add(&dataset).await? {
                users.entry(artifact).or_default().insert(layer);
            }
            // Whatever else a row holds.
            catalogue::rows(location, &dataset, None).await
        };
        match read.await {
            Ok(_) => {}
            Err(e) if version == latest => return Err(e),
            Err(e) => damaged.push(DamagedMetadata {
                table: LAYERS.into(),
                version: Some(version),
                snapshot: None,
                file: format!("{}/data", location.table_uri(LAYERS)),
                reason: e.to_string(),
            }),
        }
    }
    let records = shared.data.records().await?;
    let total = records.len();
    let listed: BTreeMap<ArtifactId, RowLocations> =
        records.iter().map(|r| (r.artifact, r.locations.clone())).collect();
    let checks = futures::stream::iter(records.into_iter().enumerate().map(|(place, record)| {
        let (shared, seen) = (shared.clone(), seen.clone());
        async move {
            let artifact = record.artifact;
            let checked = check(&shared, &record).await;
            seen(place + 1, total);
            let reason = checked.unwrap_or_else(|e| Some(e.to_string()));
            Ok::<_, crate::Error>(reason.map(|reason| (artifact, reason)))
        }
    }));
    let mut found: BTreeMap<ArtifactId, String> =
        checks.buffer_unordered(AT_ONCE).try_filter_map(|c| async { Ok(c) }).try_collect().await?;
    let mut unlisted = 0;
    for (id, _) in named.iter().filter(|(id, _)| !listed.contains_key(id)) {
        found.insert(*id, "the table of artifacts does not list it".into());
        unlisted += 1;
    }
    let mut tables = DataTables::of(location);
    for (id, locations) in &listed {
        let lack = match named.get(id) {
            Some(user) if !locations.as_many_rows(&user.locations) => {
                Some(format!("{user} and the table of artifacts say other numbers of rows"))
            }
            _ => tables.lack(*id, locations, true).await.unwrap_or_else(|e| Some(e.to_string())),
        };
        if let Some(lack) = lack {
            found.entry(*id).or_insert(lack);
        }
    }
    if !found.is_empty() || !damaged.is_empty() {
        // gc may have removed it meanwhile.
        let latest = catalogue::open(location, None).await?;
        let versions: BTreeSet<u64> = catalogue::versions(&latest).await?.into_iter().collect();
        damaged.retain(|d| {
            d.table != LAYERS
                || d.snapshot.is_some()
                || d.version.is_none_or(|v| v >= latest.version_id() || versions.contains(&v))
        });
        let mut named = Names::default();
        named.add_readable(location, versions).await;
        let listed: BTreeSet<ArtifactId> = shared.data.records().await?.into_iter().map(|r| r.artifact).collect();
        found.retain(|id, _| named.has(id) || listed.contains(id));
    }
    let corrupt = found.into_iter().map(|(id, reason)| CorruptArtifact {
        artifact: id.to_string(),
        reason,
        layers: users.remove(&id).unwrap_or_default().into_iter().collect(),
    });
    Ok(VerifyReport { artifacts: total as u64 + unlisted, corrupt: corrupt.collect(), damaged })
}

/// The reason why an artifact is not what was written, if so.
async fn check(shared: &Shared, record: &ArtifactRecord) -> Result<Option<String>> {
    let parts = shared.data.parts(record).await?;
    let found = tokio::task::spawn_blocking(move || parts.id()).await;
    let found = unwrap_join(found)?;
    Ok((found != record.artifact).then(|| format!("its content hashes to {found}")))
}
