//! Which layers of two models share directions.

use layerstore_core::linalg::matmul_nt;
use ndarray::{Array2, Axis};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::layer::{KeyValueConfig, KeyValueLayer, Method};
use crate::store::Snapshot;
use crate::tasks::unwrap_join;

/// How layers are compared for shared directions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SharedOptions {
    /// Keys of a layer that are looked for in others, those of the largest scale.
    pub keys: usize,
    /// A direction is shared where |cosine| is at least this.
    pub least: f32,
}

impl Default for SharedOptions {
    fn default() -> Self {
        SharedOptions { keys: 64, least: 0.9 }
    }
}

/// How much of one layer is in another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SharedDirections {
    /// A layer of the first model.
    pub layer: String,
    /// A layer of the other model.
    pub other: String,
    /// Keys of `layer` that were looked for.
    pub keys: usize,
    /// Those with a key of `other` at |cosine| of `least` or more.
    pub shared: usize,
    /// |cosine| with the nearest key of `other`, on average.
    pub mean_cosine: f64,
}

/// Compares each key–value layer of `model` with each of `other` with as many inputs, most alike first: the keys of the
/// largest scale, and how near the nearest key of the other layer points, either way.
///
/// Keys of whitened layers are directions as inputs of their own distribution see them: two models calibrated on
/// different inputs differ in them even where their weights agree.
///
/// # Errors
/// When there is no such model, one has no key–value layers, no two have as many inputs, or a layer cannot be read.
pub async fn shared_directions(
    snapshot: &Snapshot,
    model: &str,
    other: &str,
    options: SharedOptions,
) -> Result<Vec<SharedDirections>> {
    let (ours, theirs) =
        (directions(snapshot, model, Some(options.keys)).await?, directions(snapshot, other, None).await?);
    let compared = tokio::task::spawn_blocking(move || {
        let mut all = vec![];
        for (layer, a) in &ours {
            for (other, b) in theirs.iter().filter(|(_, b)| a.ncols() == b.ncols()) {
                let cosines = matmul_nt(a.view(), b.view());
                let nearest: Vec<f32> =
                    cosines.rows().into_iter().map(|row| row.iter().fold(0f32, |most, c| most.max(c.abs()))).collect();
                all.push(SharedDirections {
                    layer: layer.clone(),
                    other: other.clone(),
                    keys: nearest.len(),
                    shared: nearest.iter().filter(|c| **c >= options.least).count(),
                    mean_cosine: nearest.iter().map(|c| f64::from(*c)).sum::<f64>() / nearest.len().max(1) as f64,
                });
            }
        }
        all.sort_by(|a, b| b.mean_cosine.total_cmp(&a.mean_cosine));
        all
    });
    let compared = unwrap_join(compared.await)?;
    if compared.is_empty() {
        return Err(Error::expected(
            format!("layers of '{model}' and '{other}'"),
            "none of one width",
            "key_value layers with as many inputs",
        ));
    }
    Ok(compared)
}

/// Keys of unit length by layer, all or those of the largest scale.
async fn directions(snapshot: &Snapshot, model: &str, most: Option<usize>) -> Result<Vec<(String, Array2<f32>)>> {
    let mut all = vec![];
    for handle in snapshot.handles(model).await? {
        if handle.record().method != KeyValueConfig::NAME {
            continue;
        }
        if let Some(layer) = handle.load().await?.downcast_ref::<KeyValueLayer>() {
            all.push((handle.record().layer.clone(), unit_keys(layer, most)));
        }
    }
    match all.is_empty() {
        true => Err(Error::expected(format!("layers of model '{model}'"), "no keys", "key_value layers")),
        false => Ok(all),
    }
}

fn unit_keys(layer: &KeyValueLayer, most: Option<usize>) -> Array2<f32> {
    let mut order: Vec<usize> = (0..layer.rank()).collect();
    order.sort_by(|&a, &b| layer.scales()[b].total_cmp(&layer.scales()[a]));
    order.truncate(most.unwrap_or(usize::MAX));
    let mut keys = layer.keys().select(Axis(0), &order);
    for mut key in keys.rows_mut() {
        let length = key.dot(&key).sqrt();
        if length > 0.0 {
            key /= length;
        }
    }
    keys
}
