//! Keys of all layers as one collection: the nearest to a direction, through Lance, with or without an index.

use std::collections::{HashMap, HashSet};
use std::io::ErrorKind;

use arrow::array::{AsArray, Float32Array, RecordBatch};
use arrow::datatypes::{Float32Type, UInt32Type};
use futures::TryStreamExt;
use lance::Dataset;
use lance::index::DatasetIndexExt;
use lance::index::vector::VectorIndexParams;
use lance_index::IndexType;
use lance_index::vector::ivf::IvfBuildParams;
use lance_index::vector::sq::builder::SQBuildParams;
use lance_linalg::distance::DistanceType;
use layerstore_core::linalg::require_finite;
use ndarray::{Array1, ArrayView2};
use serde::Serialize;

use super::handle::LayerHandle;
use super::listing::data_tables;
use super::lock;
use super::record::{LayerName, LayerRecord};
use super::root::Store;
use super::schema::Table;
use super::snapshot::Snapshot;
use super::waiting::{Waiting, storage_error};
use crate::error::{Error, Result};
use crate::layer::ArtifactId;

/// The name of the index on a table's keys.
const INDEX: &str = "key_directions";

/// A product code of 256 codewords is learned from no fewer rows.
const LEAST_ROWS: usize = 256;

/// Rows of a partition of the index.
const PARTITION_ROWS: usize = 4096;

/// Attempts at an index before the contention is reported.
const INDEX_ATTEMPTS: u32 = 5;

/// Numbers of a key that share a product code: as many as divide the key's length, and not so few that a byte a number is as good.
const PIECES: std::ops::RangeInclusive<usize> = 4..=8;

/// k-means passes over a table's keys: codewords hardly move after as many.
const PASSES: usize = 20;

/// Candidates of the index, for each key asked for, whose cosine is worked out from the key itself.
const REFINED: u32 = 8;

/// A key near a direction.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NearKey {
    /// The layers that it is a key of: several where they share an artifact.
    pub layers: Vec<LayerName>,
    /// The key's number within its layer.
    pub key: u32,
    /// The key's scale.
    pub scale: f32,
    /// The cosine of the angle between the key and the direction.
    pub cosine: f32,
}

/// A table's index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KeyIndexReport {
    /// The table of keys.
    pub table: String,
    /// How many keys it has, those of unused artifacts too.
    pub keys: u64,
    /// Partitions of the index; `None` where there are too few keys for one, and a search looks at all of them.
    pub partitions: Option<usize>,
}

impl Snapshot {
    /// Finds, for each of some directions `[directions, length]`, the `count` keys of this snapshot's layers that point most
    /// nearly along it or against it, nearest first: of layers with `length` inputs that keep their keys as f32. Of
    /// `models`, or of all.
    ///
    /// With an index ([`Store::index_keys`]) the nearest are looked for in part of the table; without one in all of it.
    ///
    /// # Errors
    /// When there is no such model, a direction is zero or not finite, no layer has keys of their length, `count` is 0, or the
    /// storage refuses.
    pub async fn nearest_keys(
        &self,
        directions: ArrayView2<'_, f32>,
        count: usize,
        models: Option<&[String]>,
    ) -> Result<Vec<Vec<NearKey>>> {
        if count == 0 {
            return Err(Error::expected("number of keys to find", 0, "at least 1"));
        }
        require_finite("the direction", directions.iter())?;
        if directions.rows().into_iter().any(|direction| direction.iter().all(|v| *v == 0.0)) {
            return Err(Error::expected("direction", "zeros", "a vector that points somewhere"));
        }
        let records = self.records().await?;
        for model in models.into_iter().flatten() {
            if records.iter().all(|record| record.model != *model) {
                return Err(self.unknown_model(model).await?);
            }
        }
        let mut layers: HashMap<ArtifactId, Vec<LayerName>> = HashMap::new();
        for record in records {
            if models.is_none_or(|models| models.contains(&record.model)) {
                let name = LayerName { model: record.model, layer: record.layer };
                layers.entry(record.artifact).or_default().push(name);
            }
        }
        let width = directions.ncols();
        let table = Table::Keys(width).name();
        let dataset = match self.shared().location.open_table(&table, None).await {
            Ok(dataset) => dataset,
            Err(lance::Error::DatasetNotFound { .. }) => return Err(self.no_such_width(width).await?),
            Err(e) => return Err(storage_error(format!("opening table '{table}'"))(e)),
        };
        let action = || format!("searching table '{table}'");
        let total = dataset.count_rows(None).during(action()).await?;
        let mut all = Vec::with_capacity(directions.nrows());
        for direction in directions.rows() {
            let along = Float32Array::from(direction.to_vec());
            let against = Float32Array::from(direction.iter().map(|v| -v).collect::<Vec<_>>());
            // Keys of other snapshots and models are in the same table: ask for more until enough are left.
            let mut asked = count;
            let nearest = loop {
                let mut found = vec![];
                for (direction, sign) in [(&along, 1.0), (&against, -1.0)] {
                    let batches = nearest(&dataset, direction, asked.min(total).max(1)).during(action()).await?;
                    for batch in &batches {
                        found.extend(near_keys(batch, sign).ok_or_else(|| unreadable(&table))?);
                    }
                }
                let nearest = nearest_of(found, &layers);
                if nearest.len() >= count || asked >= total {
                    break nearest;
                }
                asked = (4 * asked).min(total);
            };
            all.push(nearest.into_iter().take(count).collect());
        }
        Ok(all)
    }

    async fn no_such_width(&self, width: usize) -> Result<Error> {
        let tables = data_tables(&self.shared().location).await?;
        let widths = tables.into_iter().filter_map(|(_, t)| if let Table::Keys(d) = t { Some(d) } else { None });
        // Of this one there is a folder, perhaps, and no version.
        let mut widths: Vec<usize> = widths.filter(|of| *of != width).collect();
        widths.sort_unstable();
        let known = match widths.is_empty() {
            true => "no layer of the store keeps f32 keys".to_owned(),
            false => format!("a length of keys in the store: {}", list(&widths)),
        };
        Ok(Error::expected("length of the direction", width, known))
    }
}

/// Keys of these layers, each once, nearest first.
fn nearest_of(mut found: Vec<(ArtifactId, NearKey)>, layers: &HashMap<ArtifactId, Vec<LayerName>>) -> Vec<NearKey> {
    found.sort_by(|a, b| b.1.cosine.abs().total_cmp(&a.1.cosine.abs()).then(a.1.key.cmp(&b.1.key)));
    // The same row may be among the nearest both ways; rows of unfinished imports have no layer.
    let mut seen = HashSet::new();
    let once = found.into_iter().filter(|(artifact, near)| seen.insert((*artifact, near.key)));
    once.filter_map(|(artifact, near)| Some(NearKey { layers: layers.get(&artifact)?.clone(), ..near })).collect()
}

fn list(widths: &[usize]) -> String {
    widths.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

impl Store {
    /// Makes the index of every table of keys that has enough of them, or makes it anew, by cosine: Lance's IVF-PQ, or IVF-SQ
    /// where no number from 4 to 8 divides the keys' length. [`Snapshot::nearest_keys`] uses it, and any notebook. Keys that come
    /// later are looked at one by one until the next call. `progress` is told of each table before its index is made. Of two
    /// calls at once, also of two processes, the later waits for the earlier.
    ///
    /// # Errors
    /// When the storage refuses, or gc is at work.
    pub async fn index_keys(&self, progress: impl Fn(&str, usize)) -> Result<Vec<KeyIndexReport>> {
        let location = &self.shared().location;
        let _guards = (lock::importing(location).await?, lock::indexing(location).await?);
        let mut reports = vec![];
        'tables: for (name, table) in data_tables(location).await? {
            let Table::Keys(width) = table else { continue };
            let action = || format!("indexing table '{name}'");
            let mut attempt = 1;
            let (rows, partitions) = loop {
                let mut dataset = match location.open_for_write(&name).await {
                    Ok(dataset) => dataset,
                    // Whoever began it was killed before its first version.
                    Err(lance::Error::DatasetNotFound { .. }) => continue 'tables,
                    Err(e) => return Err(storage_error(action())(e)),
                };
                let rows = dataset.count_rows(None).during(action()).await?;
                let partitions = (rows >= LEAST_ROWS).then_some((rows / PARTITION_ROWS).max(1));
                let Some(some) = partitions else { break (rows, None) };
                if attempt == 1 {
                    check_temporary()?;
                    progress(&name, rows);
                }
                let params = index_of(width, some);
                let made = dataset.create_index(&["vector"], IndexType::Vector, Some(INDEX.into()), &params, true);
                match made.into_future().caught().await {
                    Ok(_) => break (rows, partitions),
                    // Where there are no locks, or another program holds to none: on what it has made.
                    Err(lance::Error::RetryableCommitConflict { .. } | lance::Error::CommitConflict { .. })
                        if attempt < INDEX_ATTEMPTS =>
                    {
                        attempt += 1;
                    }
                    Err(e) => return Err(storage_error(action())(e)),
                }
            };
            reports.push(KeyIndexReport { table: name, keys: rows as u64, partitions });
        }
        Ok(reports)
    }
}

/// Tries whether Lance could put there what it sorts on the way.
fn check_temporary() -> Result<()> {
    let folder = std::env::temp_dir();
    let probe = folder.join(format!(".layerstore.{}.probe", std::process::id()));
    match std::fs::create_dir(&probe).and_then(|()| std::fs::remove_dir(&probe)) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => {
            Err(Error::file(folder, format!("nothing can be made there, where temporary files go (TMPDIR): {e}")))
        }
        _ => Ok(()),
    }
}

/// Returns the index of keys of this length: a product code of a byte for each piece of as many numbers as divide them, or
/// a byte for each number.
fn index_of(width: usize, partitions: usize) -> VectorIndexParams {
    match PIECES.rev().find(|piece| width.is_multiple_of(*piece)) {
        Some(piece) => VectorIndexParams::ivf_pq(partitions, 8, width / piece, DistanceType::Cosine, PASSES),
        None => {
            let (cells, codes) = (IvfBuildParams::new(partitions), SQBuildParams::default());
            VectorIndexParams::with_ivf_sq_params(DistanceType::Cosine, cells, codes)
        }
    }
}

impl LayerHandle {
    /// Reads one f32 key of the layer, `[in_features]`, by itself.
    ///
    /// # Errors
    /// When the layer keeps no f32 keys, or has no such key.
    pub async fn key(&self, key: u32) -> Result<Array1<f32>> {
        let layer = self.record();
        let table = Table::Keys(layer.in_features as usize).name();
        let kept = layer.locations.0.get(&table).ok_or_else(|| no_float_keys(layer))?;
        let dataset = self.shared().location.open_table(&table, None);
        let dataset = dataset.during(format!("opening table '{table}'")).await?;
        let read = async {
            let mut scan = dataset.scan();
            scan.filter(&format!("artifact = X'{}' AND key = {key}", layer.artifact))?.project(&["vector"])?;
            scan.try_into_stream().await?.try_collect::<Vec<RecordBatch>>().await
        };
        let batches = read.during(format!("reading table '{table}'")).await?;
        let found = batches.iter().find(|b| b.num_rows() > 0).ok_or_else(|| {
            Error::expected("key", key, format!("less than {}, the number of the layer's keys", kept.rows))
        })?;
        let vectors = found.column(0).as_fixed_size_list_opt().ok_or_else(|| unreadable(&table))?;
        let first = vectors.value(0);
        let numbers = first.as_primitive_opt::<Float32Type>().ok_or_else(|| unreadable(&table))?;
        Ok(Array1::from(numbers.values().to_vec()))
    }
}

/// Returns the error of a layer whose keys Lance cannot search.
pub fn no_float_keys(layer: &LayerRecord) -> Error {
    Error::expected(
        format!("keys of layer '{}'", layer.layer),
        match layer.config.get("backend") {
            Some(backend) => format!("none as f32, with backend {backend}"),
            None => format!("none: it is a {} layer", layer.method),
        },
        "a key_value layer that keeps them: backend \"flat\" with keys \"f32\", or store_float_keys = true",
    )
}

fn unreadable(table: &str) -> Error {
    let message = "its columns are of other types".into();
    Error::Storage { action: format!("searching table '{table}'"), message, source: None }
}

async fn nearest(dataset: &Dataset, direction: &Float32Array, count: usize) -> lance::Result<Vec<RecordBatch>> {
    let mut scan = dataset.scan();
    scan.nearest("vector", direction, count)?.distance_metric(DistanceType::Cosine).refine(REFINED);
    scan.project(&["artifact", "key", "scale", "_distance"])?;
    scan.try_into_stream().await?.try_collect().await
}

/// The rows of a search, with the artifact that each belongs to.
fn near_keys(batch: &RecordBatch, sign: f32) -> Option<Vec<(ArtifactId, NearKey)>> {
    let artifacts = batch.column_by_name("artifact")?.as_fixed_size_binary_opt()?;
    let keys = batch.column_by_name("key")?.as_primitive_opt::<UInt32Type>()?;
    let scales = batch.column_by_name("scale")?.as_primitive_opt::<Float32Type>()?;
    let distances = batch.column_by_name("_distance")?.as_primitive_opt::<Float32Type>()?;
    let row = |i: usize| {
        let artifact = ArtifactId(artifacts.value(i).try_into().ok()?);
        let cosine = sign * (1.0 - distances.value(i));
        Some((artifact, NearKey { layers: vec![], key: keys.value(i), scale: scales.value(i), cosine }))
    };
    (0..batch.num_rows()).map(row).collect()
}
