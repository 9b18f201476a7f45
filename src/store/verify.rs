//! Holding every artifact against its name.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use serde::Serialize;

use super::Store;
use super::record::ArtifactRecord;
use crate::error::Result;
use crate::layer::ArtifactId;

/// Artifacts hashed at once.
const AT_ONCE: usize = 2;

/// What verify found.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct VerifyReport {
    /// Artifacts looked at.
    pub artifacts: u64,
    pub corrupt: Vec<CorruptArtifact>,
}

/// An artifact that is not what was written.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CorruptArtifact {
    pub artifact: String,
    pub reason: String,
    /// Layers of the latest version and of the snapshots that use it.
    pub layers: Vec<LayerName>,
}

/// A layer's full name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct LayerName {
    pub model: String,
    pub layer: String,
}

/// Reads every artifact and hashes it. `seen` is told of each one.
pub async fn verify(store: &Store, seen: Arc<dyn Fn(usize, usize) + Send + Sync>) -> Result<VerifyReport> {
    let mut users: BTreeMap<ArtifactId, BTreeSet<LayerName>> = BTreeMap::new();
    let mut snapshots = vec![store.latest().await?];
    for snapshot in store.snapshots().await? {
        snapshots.push(store.at(&snapshot.name).await?);
    }
    for snapshot in snapshots {
        for r in snapshot.records().await? {
            users.entry(r.artifact).or_default().insert(LayerName { model: r.model, layer: r.layer });
        }
    }
    let records = store.inner.data.records().await?;
    let total = records.len();
    let listed: BTreeSet<ArtifactId> = records.iter().map(|r| r.artifact).collect();
    let checks = futures::stream::iter(records.into_iter().enumerate().map(|(place, record)| {
        let (store, seen) = (store.clone(), seen.clone());
        async move {
            let artifact = record.artifact;
            let checked = check(&store, &record).await;
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
async fn check(store: &Store, record: &ArtifactRecord) -> Result<Option<String>> {
    let parts = store.inner.data.parts(record).await?;
    let found = tokio::task::spawn_blocking(move || parts.id()).await;
    let found = super::joined(found)?;
    Ok((found != record.artifact).then(|| format!("its content hashes to {found}")))
}
