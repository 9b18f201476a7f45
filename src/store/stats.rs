//! How much a store holds.

use std::collections::{BTreeSet, HashMap};

use lance::Dataset;
use serde::Serialize;

use super::listing::disk_bytes;
use super::record::LayerRecord;
use super::shared::Shared;
use super::{catalogue, versions};
use crate::error::Result;

/// How much a store holds, as one of its versions tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Models of the version.
    pub models: u64,
    /// Layers of all models.
    pub layers: u64,
    /// Artifacts that are stored, used or not.
    pub artifacts: u64,
    /// Versions that are there.
    pub versions: u64,
    /// Snapshots: versions that have a name.
    pub snapshots: u64,
    /// Of all files; `null` where they cannot be listed.
    pub bytes: Option<u64>,
    /// What the layers took in their checkpoints.
    pub dense_bytes: u64,
    /// What layers that share an artifact would take beyond it, had each its own.
    pub deduplicated_bytes: u64,
}

/// Counts what a store holds, as a version tells.
pub async fn stats(shared: &Shared, dataset: &Dataset, records: &[LayerRecord]) -> Result<Stats> {
    let models: BTreeSet<&str> = records.iter().map(|r| r.model.as_str()).collect();
    let once: HashMap<_, u64> = records.iter().map(|r| (r.artifact, r.stored_bytes)).collect();
    Ok(Stats {
        models: models.len() as u64,
        layers: records.iter().filter(|r| !r.is_file()).count() as u64,
        artifacts: shared.data.records().await?.len() as u64,
        versions: catalogue::versions(dataset).await?.len() as u64,
        snapshots: versions::tag_names(&shared.location).await?.len() as u64,
        bytes: disk_bytes(&shared.location).await,
        dense_bytes: sum(records.iter().map(|r| r.dense_bytes)),
        deduplicated_bytes: sum(records.iter().map(|r| r.stored_bytes)).saturating_sub(sum(once.into_values())),
    })
}

/// The sum of what rows of the catalogue claim, which may be anything.
fn sum(bytes: impl Iterator<Item = u64>) -> u64 {
    bytes.fold(0, u64::saturating_add)
}
