//! A graph of keys that is walked towards a query (HNSW, by usearch).
//!
//! The graph's vectors are contributions in units of how much each input varies, with one number more, which makes all
//! of them equally long: by inner product alone long vectors would be everybody's neighbours. A query has 0 there, so
//! its inner products are the contributions.

use std::fmt;

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis};
use serde::{Deserialize, Serialize};
use usearch::{Index, IndexOptions, MetricKind, ScalarKind};

use super::{FlatIndex, IndexInfo, Range, SearchIndex, Space};
use crate::error::{Error, Result};
use crate::linalg::dot_f64;

/// Searches at once; one more looks at every key.
const THREADS: usize = 256;

/// The walk goes on until it finds contributions of less than this share of the least one asked for.
const PAST: f32 = 0.9;

/// What the graph keeps numbers as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GraphType {
    #[default]
    F32,
    F16,
    Bf16,
}

impl GraphType {
    fn scalar(self) -> ScalarKind {
        match self {
            GraphType::F32 => ScalarKind::F32,
            GraphType::F16 => ScalarKind::F16,
            GraphType::Bf16 => ScalarKind::BF16,
        }
    }
}

/// How a graph is made and walked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HnswOptions {
    pub vectors: GraphType,
    /// Neighbours of a key.
    pub connectivity: usize,
    /// Keys looked at while one is added.
    pub expansion_add: usize,
    /// Keys looked at in a search, at least.
    pub expansion_search: usize,
}

impl HnswOptions {
    fn native(self, dimension: usize) -> IndexOptions {
        IndexOptions {
            dimensions: dimension + 1,
            metric: MetricKind::IP,
            quantization: self.vectors.scalar(),
            connectivity: self.connectivity,
            expansion_add: self.expansion_add,
            expansion_search: self.expansion_search,
            multi: false,
        }
    }
}

/// Keys and their graph.
pub struct HnswIndex {
    keys: FlatIndex,
    space: Space,
    graph: Index,
    options: HnswOptions,
}

impl fmt::Debug for HnswIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HnswIndex").field("keys", &self.len()).field("options", &self.options).finish_non_exhaustive()
    }
}

impl HnswIndex {
    /// Builds the graph of `keys` `[len, dimension]` with these `scales` `[len]`. `units` `[dimension]` say how much each
    /// input varies. Scores come from the keys as they are given, or where `keep_keys` is false as the graph keeps them.
    ///
    /// # Errors
    /// When a number does not fit the graph's type, or there is no memory.
    pub fn fit(
        keys: ArrayView2<f32>,
        scales: &[f32],
        units: Option<Array1<f32>>,
        options: HnswOptions,
        keep_keys: bool,
    ) -> Result<Self> {
        let space = Space { units };
        let vectors = lengthened(space.keys(keys, scales));
        let largest = vectors.iter().fold(0f32, |most, v| most.max(v.abs()));
        if options.vectors == GraphType::F16 && largest > half::f16::MAX.to_f32() {
            return Err(Error::expected(
                "largest number of an f16 graph",
                largest,
                format!("at most {}", half::f16::MAX),
            ));
        }
        let graph = Index::new(&options.native(keys.ncols())).map_err(refused)?;
        graph.reserve_capacity_and_threads(keys.nrows(), THREADS).map_err(refused)?;
        // One after another: the same keys give the same graph.
        for (key, vector) in vectors.rows().into_iter().enumerate() {
            graph.add(key as u64, vector.to_slice().expect("standard layout")).map_err(refused)?;
        }
        let keys = if keep_keys { keys.to_owned() } else { keys_of(&graph, &space, scales, keys.ncols())? };
        let keys = FlatIndex::new(keys, Default::default(), None)?;
        Ok(HnswIndex { keys, space, graph, options })
    }

    /// From [`HnswIndex::serialized`] bytes, which must be the bytes that were written: usearch trusts them. `keys`
    /// `[len, dimension]` where they were kept.
    ///
    /// # Errors
    /// When the graph is of another type or size than the options and the scales say.
    pub fn restore(
        bytes: &[u8],
        keys: Option<Array2<f32>>,
        scales: &[f32],
        dimension: usize,
        units: Option<Array1<f32>>,
        options: HnswOptions,
    ) -> Result<Self> {
        let found = Index::metadata_from_buffer(bytes).map_err(refused)?;
        let expected = options.native(dimension);
        let same = (found.dimensions, found.metric, found.quantization)
            == (expected.dimensions as u64, expected.metric, expected.quantization);
        if !same {
            return Err(Error::expected(
                "graph of keys",
                format!("{} numbers a vector, of {:?} by {:?}", found.dimensions, found.quantization, found.metric),
                format!("{}, of {:?} by {:?}", expected.dimensions, expected.quantization, expected.metric),
            ));
        }
        let graph = Index::new(&expected).map_err(refused)?;
        graph.load_from_buffer(bytes).map_err(refused)?;
        if graph.size() != scales.len() {
            return Err(Error::expected("keys of a graph", graph.size(), scales.len()));
        }
        graph.reserve_capacity_and_threads(scales.len(), THREADS).map_err(refused)?;
        graph.change_expansion_search(options.expansion_search);
        let space = Space { units };
        let keys = match keys {
            Some(keys) => keys,
            None => keys_of(&graph, &space, scales, dimension)?,
        };
        let keys = FlatIndex::new(keys, Default::default(), None)?;
        Ok(HnswIndex { keys, space, graph, options })
    }

    /// The graph in usearch's own format.
    pub fn serialized(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.graph.serialized_length()];
        self.graph.save_to_buffer(&mut bytes).expect("usearch fills a buffer of the length that it asked for");
        bytes
    }

    /// The keys that scores come from.
    pub fn rows(&self) -> &FlatIndex {
        &self.keys
    }

    /// What the graph's vectors are in units of `[dimension]`.
    pub fn units(&self) -> Option<ArrayView1<'_, f32>> {
        self.space.units.as_ref().map(|u| u.view())
    }

    /// Keys with a contribution of `least` or more, or near it; `None` where usearch cannot say.
    fn walk(&self, query: &[f32], least: f32) -> Option<Vec<u32>> {
        let mut count = self.options.expansion_search.clamp(1, self.len().max(1));
        loop {
            let found = self.graph.search(query, count).ok()?;
            let last = found.distances.last().map_or(f32::NEG_INFINITY, |distance| 1.0 - distance);
            if found.keys.len() < count || count >= self.len() || last < PAST * least {
                return Some(found.keys.into_iter().map(|key| key as u32).collect());
            }
            count = (2 * count).min(self.len());
        }
    }
}

/// Rows of one length: the longest row's, by one more number.
fn lengthened(rows: Array2<f32>) -> Array2<f32> {
    let squares: Vec<f64> = rows
        .rows()
        .into_iter()
        .map(|row| {
            let row = row.to_slice().expect("standard layout");
            dot_f64(row, row)
        })
        .collect();
    let longest = squares.iter().fold(0f64, |most, &square| most.max(square));
    let missing = Array1::from_iter(squares.iter().map(|square| (longest - square).max(0.0).sqrt() as f32));
    ndarray::concatenate![Axis(1), rows, missing.insert_axis(Axis(1))].as_standard_layout().into_owned()
}

/// The keys as a graph keeps them, `[len, dimension]`: those of scale 0 are 0.
fn keys_of(graph: &Index, space: &Space, scales: &[f32], dimension: usize) -> Result<Array2<f32>> {
    let mut keys = Array2::zeros((scales.len(), dimension));
    let mut vector = vec![0f32; dimension + 1];
    for (key, &scale) in scales.iter().enumerate() {
        if graph.get(key as u64, &mut vector).map_err(refused)? != 1 {
            return Err(Error::expected("graph of keys", format!("no key {key}"), format!("{} keys", scales.len())));
        }
        if scale != 0.0 {
            keys.row_mut(key).iter_mut().zip(&vector).for_each(|(k, v)| *k = v / scale);
        }
    }
    if let Some(units) = &space.units {
        keys /= &units.view().insert_axis(Axis(0));
    }
    Ok(keys)
}

fn refused(e: impl fmt::Display) -> Error {
    Error::Numeric(format!("usearch: {e}"))
}

impl SearchIndex for HnswIndex {
    fn len(&self) -> usize {
        self.keys.len()
    }

    fn dimension(&self) -> usize {
        self.keys.dimension()
    }

    fn scores(&self, queries: ArrayView2<f32>) -> Array2<f32> {
        self.keys.scores(queries)
    }

    fn scores_of(&self, query: ArrayView1<f32>, keys: &[u32]) -> Vec<f32> {
        self.keys.scores_of(query, keys)
    }

    fn candidates(&self, query: ArrayView1<f32>, range: Range) -> Option<Vec<u32>> {
        let mut query = self.space.query(query);
        // Of length 1: f16 holds it, whatever the query.
        let length = dot_f64(&query, &query).sqrt() as f32;
        if !(length > 0.0 && length.is_finite()) {
            return None;
        }
        query.iter_mut().for_each(|v| *v /= length);
        query.push(0.0);
        let least = range.least / length;
        let mut keys = self.walk(&query, least)?;
        if range.two_sided {
            query.iter_mut().for_each(|v| *v = -*v);
            keys.extend(self.walk(&query, least)?);
        }
        keys.sort_unstable();
        keys.dedup();
        Some(keys)
    }

    fn reconstruct(&self) -> Array2<f32> {
        self.keys.reconstruct()
    }

    fn info(&self) -> IndexInfo {
        let memory_bytes = self.keys.memory_bytes() + self.graph.memory_usage();
        IndexInfo { backend: "hnsw", memory_bytes, ..self.keys.info() }
    }

    fn reset(&mut self) -> Result<()> {
        self.graph.reset().map_err(refused)?;
        self.keys.reset()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(rows: usize, columns: usize, seed: usize) -> Array2<f32> {
        let cell = |i: usize, j: usize| ((i * 7919 + j * 104_729 + seed * 31) % 1009) as f32 / 500.0 - 1.0;
        Array2::from_shape_fn((rows, columns), |(i, j)| cell(i, j))
    }

    fn options(vectors: GraphType) -> HnswOptions {
        HnswOptions { vectors, connectivity: 8, expansion_add: 64, expansion_search: 32 }
    }

    #[test]
    fn finds_most_keys_of_a_range_and_comes_back() {
        let keys = sample(300, 16, 1);
        let scales: Vec<f32> = (0..300).map(|i| 3.0 / (1.0 + i as f32 * 0.05)).collect();
        let units = Array1::from_shape_fn(16, |j| 0.5 + j as f32 * 0.1);
        let queries = sample(20, 16, 5);
        for vectors in [GraphType::F32, GraphType::F16, GraphType::Bf16] {
            let fitted = || HnswIndex::fit(keys.view(), &scales, Some(units.clone()), options(vectors), false).unwrap();
            let index = fitted();
            let bytes = index.serialized();
            assert_eq!(bytes, fitted().serialized(), "the same keys give the same graph");
            let rounding = if vectors == GraphType::F32 { 1e-5 } else { 2e-2 };
            assert!((&index.reconstruct() - &keys).iter().all(|d| d.abs() < rounding));
            let back = HnswIndex::restore(&bytes, None, &scales, 16, Some(units.clone()), options(vectors)).unwrap();
            assert_eq!(back.reconstruct(), index.reconstruct());
            for two_sided in [true, false] {
                let (mut found, mut all) = (0, 0);
                for query in queries.rows() {
                    let range = Range { least: 2.0, two_sided };
                    let candidates = index.candidates(query, range).unwrap();
                    assert_eq!(candidates, back.candidates(query, range).unwrap());
                    let scores = index.scores(query.insert_axis(Axis(0)));
                    assert_eq!(index.scores_of(query, &[3, 9]), [scores[[0, 3]], scores[[0, 9]]]);
                    for (key, (score, scale)) in scores.iter().zip(&scales).enumerate() {
                        let contribution = score * scale;
                        if (if two_sided { contribution.abs() } else { contribution }) >= range.least {
                            all += 1;
                            found += usize::from(candidates.binary_search(&(key as u32)).is_ok());
                        }
                    }
                }
                assert!(all > 100 && found as f64 >= 0.95 * f64::from(all), "{found} of {all}");
            }
        }
    }

    #[test]
    fn graphs_of_another_kind_are_refused() {
        let (keys, scales) = (sample(10, 4, 1), vec![1.0; 10]);
        let index = HnswIndex::fit(keys.view(), &scales, None, options(GraphType::F32), true).unwrap();
        let bytes = index.serialized();
        let restored = |scales: &[f32], dimension, kind| {
            HnswIndex::restore(&bytes, Some(keys.clone()), scales, dimension, None, options(kind))
        };
        assert!(restored(&scales, 4, GraphType::F32).is_ok());
        assert!(restored(&scales[1..], 4, GraphType::F32).is_err());
        assert!(restored(&scales, 5, GraphType::F32).is_err());
        assert!(restored(&scales, 4, GraphType::F16).is_err());
        let huge = sample(3, 4, 1) * 1e6;
        assert!(HnswIndex::fit(huge.view(), &scales[..3], None, options(GraphType::F16), true).is_err());
        let mut index = index;
        index.reset().unwrap();
        assert!(index.is_empty() && index.dimension() == 4);
    }
}
