//! Every artifact held against its name.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use serde::Serialize;

use super::record::ArtifactRecord;
use super::shared::Shared;
use super::{catalogue, versions};
use crate::error::Result;
use crate::layer::ArtifactId;
use crate::tasks::unwrap_join;

/// Artifacts hashed at once.
const AT_ONCE: usize = 2;

/// What verify found.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct VerifyReport {
    /// Artifacts looked at.
    pub artifacts: u64,
    /// Those that are not what was written.
    pub corrupt: Vec<CorruptArtifact>,
}

/// An artifact that is not what was written.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CorruptArtifact {
    /// Its name.
    pub artifact: String,
    /// What was found.
    pub reason: String,
    /// Layers of the latest version and of the snapshots that use it.
    pub layers: Vec<LayerName>,
}

/// A layer's full name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct LayerName {
    /// The model.
    pub model: String,
    /// The layer's name within it.
    pub layer: String,
}

/// Reads every artifact and hashes it. `seen` is told of each one.
///
/// # Errors
/// When the catalogue or the list of artifacts cannot be read.
pub async fn verify(shared: &Arc<Shared>, seen: Arc<dyn Fn(usize, usize) + Send + Sync>) -> Result<VerifyReport> {
    let mut users: BTreeMap<ArtifactId, BTreeSet<LayerName>> = BTreeMap::new();
    let latest = shared.latest().await?;
    let mut used: BTreeSet<u64> = versions::tags(latest.dataset()).await?.into_iter().map(|(_, v)| v).collect();
    used.insert(latest.dataset().version_id());
    for version in used {
        let dataset = catalogue::open(&shared.location, Some(version)).await?;
        for r in catalogue::rows(&shared.location, &dataset, None).await? {
            users.entry(r.artifact).or_default().insert(LayerName { model: r.model, layer: r.layer });
        }
    }
    let records = shared.data.records().await?;
    let total = records.len();
    let listed: BTreeSet<ArtifactId> = records.iter().map(|r| r.artifact).collect();
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
    for id in users.keys().filter(|id| !listed.contains(id)) {
        found.insert(*id, "the table of artifacts does not list it".into());
    }
    let corrupt = found.into_iter().map(|(id, reason)| CorruptArtifact {
        artifact: id.to_string(),
        reason,
        layers: users.remove(&id).unwrap_or_default().into_iter().collect(),
    });
    Ok(VerifyReport { artifacts: total as u64, corrupt: corrupt.collect() })
}

/// The reason why an artifact is not what was written, if so.
async fn check(shared: &Shared, record: &ArtifactRecord) -> Result<Option<String>> {
    let parts = shared.data.parts(record).await?;
    let found = tokio::task::spawn_blocking(move || parts.id()).await;
    let found = unwrap_join(found)?;
    Ok((found != record.artifact).then(|| format!("its content hashes to {found}")))
}
