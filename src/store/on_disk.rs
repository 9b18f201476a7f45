//! A key–value layer searched where it lies, by Lance's range search over its keys: only its small arrays are loaded.

use arrow::array::{AsArray, Float32Array, RecordBatch};
use arrow::datatypes::{Float32Type, UInt32Type};
use futures::TryStreamExt;
use lance::Dataset;
use lance_linalg::distance::DistanceType;
use layerstore_core::layer::StoredSearch;
use ndarray::ArrayView2;

use super::handle::LayerHandle;
use super::nearest::no_float_keys;
use super::schema::{TENSORS, Table};
use super::tables::add_rows;
use super::waiting::Waiting;
use crate::error::{Error, Result};
use crate::layer::{KeyValueConfig, Limit, Method, Parts, QueryHits};

/// Lance works out distances, 1 − score, in f32: hits are looked for this much further down, and then held to the
/// threshold.
const SLACK: f32 = 1e-4;

impl LayerHandle {
    /// Finds the hits of each row of `x` `[batch, in_features]` without the layer being loaded: Lance's range search over the
    /// table of keys, for layers that keep their keys as f32. The same hits as
    /// [`KeyValueLayer::search`](crate::layer::KeyValueLayer::search) finds, but for scores that differ in their last
    /// bits, and without a certified error.
    ///
    /// # Errors
    /// When the layer keeps no f32 keys, the width of `x` is another, the limit is an error to certify, or the storage
    /// refuses.
    pub async fn search_on_disk(&self, x: ArrayView2<'_, f32>, limit: Option<Limit>) -> Result<Vec<QueryHits>> {
        let record = self.record();
        let location = &self.shared().location;
        let table = Table::Keys(record.in_features as usize).name();
        if record.method != KeyValueConfig::NAME || !record.locations.0.contains_key(&table) {
            return Err(no_float_keys(record));
        }
        let opened = |name: String| async move {
            location.open_table(&name, None).during(format!("opening table '{name}'")).await
        };
        let action = || format!("searching table '{table}'");
        let keys = opened(table.clone()).await?;
        let mine = format!("artifact = X'{}'", record.artifact);
        let scales = scales(&keys, &mine).during(action()).await?;
        let scales = in_order(scales).ok_or_else(|| Error::Corrupt {
            artifact: record.artifact.to_string(),
            reason: format!("its keys in '{table}' are not 0, 1, 2 …"),
        })?;
        let mut small = Parts::new(record.method.clone(), record.config.clone());
        let batches = small_tensors(&opened(TENSORS.into()).await?, &mine).during("reading table 'tensors'").await?;
        add_rows(&mut small, Table::Tensors, batches)
            .map_err(|reason| Error::Corrupt { artifact: record.artifact.to_string(), reason })?;
        let count = scales.len();
        let search = StoredSearch::new(&record.config, scales, &small.tensors, limit)?;
        let centred = search.centred(x).map_err(|e| e.in_layer(&record.layer))?;
        let mut answers = Vec::with_capacity(x.nrows());
        for query in centred.rows() {
            // Lance takes no vector of zeros; its scores are 0.
            if query.iter().all(|v| *v == 0.0) {
                answers.push(search.answer((0..count as u32).map(|key| (key, 0.0)))?);
                continue;
            }
            let range = search.range();
            let mut scored: Vec<(u32, f32)> = vec![];
            for sign in [1.0, -1.0] {
                if sign < 0.0 && !range.is_some_and(|r| r.two_sided) {
                    continue;
                }
                let query = Float32Array::from_iter_values(query.iter().map(|v| sign * v));
                let least = range.map(|r| r.least - SLACK * (1.0 + r.least.abs()));
                let found = scores(&keys, &mine, &query, count, least).during(action()).await?;
                scored.extend(found.into_iter().map(|(key, score)| (key, sign * score)));
            }
            scored.sort_unstable_by_key(|(key, _)| *key);
            scored.dedup_by_key(|(key, _)| *key);
            answers.push(search.answer(scored.into_iter())?);
        }
        Ok(answers)
    }
}

/// Key and scale of every key of an artifact.
async fn scales(keys: &Dataset, mine: &str) -> lance::Result<Vec<(u32, f32)>> {
    let mut scan = keys.scan();
    scan.filter(mine)?.project(&["key", "scale"])?;
    let batches: Vec<RecordBatch> = scan.try_into_stream().await?.try_collect().await?;
    numbered(&batches, "scale")
}

/// Scales by key.
fn in_order(mut scales: Vec<(u32, f32)>) -> Option<Vec<f32>> {
    scales.sort_unstable_by_key(|(key, _)| *key);
    // Rows that were written twice come twice.
    scales.dedup_by_key(|(key, _)| *key);
    scales.into_iter().enumerate().map(|(i, (key, scale))| (key as usize == i).then_some(scale)).collect()
}

/// The tensors that a search needs.
async fn small_tensors(tensors: &Dataset, mine: &str) -> lance::Result<Vec<RecordBatch>> {
    let mut scan = tensors.scan();
    scan.filter(&format!("{mine} AND name IN ('mean', 'calibration_thresholds')"))?;
    scan.try_into_stream().await?.try_collect().await
}

/// Keys of an artifact with their scores, of at least `least`.
async fn scores(
    keys: &Dataset,
    mine: &str,
    query: &Float32Array,
    count: usize,
    least: Option<f32>,
) -> lance::Result<Vec<(u32, f32)>> {
    let mut scan = keys.scan();
    scan.prefilter(true).filter(mine)?;
    // Rows that were written twice count twice.
    scan.nearest("vector", query, 2 * count.max(1))?.distance_metric(DistanceType::Dot).use_index(false);
    scan.distance_range(None, least.map(|least| 1.0 - least)).project(&["key", "_distance"])?;
    let batches: Vec<RecordBatch> = scan.try_into_stream().await?.try_collect().await?;
    Ok(numbered(&batches, "_distance")?.into_iter().map(|(key, distance)| (key, 1.0 - distance)).collect())
}

/// Pairs of a key's number and a float.
fn numbered(batches: &[RecordBatch], name: &str) -> lance::Result<Vec<(u32, f32)>> {
    let mut all = vec![];
    for batch in batches {
        let keys = batch.column_by_name("key").and_then(|c| c.as_primitive_opt::<UInt32Type>());
        let floats = batch.column_by_name(name).and_then(|c| c.as_primitive_opt::<Float32Type>());
        let (Some(keys), Some(floats)) = (keys, floats) else {
            return Err(lance::Error::internal(format!("columns 'key' and '{name}' of other types")));
        };
        all.extend(keys.values().iter().copied().zip(floats.values().iter().copied()));
    }
    Ok(all)
}
