//! A graph of keys that is walked towards a query (HNSW, by usearch).
//!
//! The graph's vectors are contributions in units of how much each input varies, with one number more, which makes all
//! of them equally long: by inner product alone long vectors would be everybody's neighbours. A query has 0 there, so
//! its inner products are the contributions.

mod format;
mod options;

use std::fmt;

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis};
use usearch::Index;

pub use self::options::{GraphType, HnswOptions};
use super::flat::FlatIndex;
use super::search::{ContributionRange, IndexInfo, SearchIndex};
use super::space::{ContributionSpace, check_scales};
use crate::error::{Error, Result};
use crate::linalg::{HALF_ROUNDING, Loss, dot_f64};

/// Number of searches that may run at once; a further one scans every key instead.
const THREADS: usize = 256;

/// A walk goes on until it finds contributions below this share of the least one asked for.
const WALK_UNTIL: f32 = 0.9;

/// The exponent of the length of an f16 graph's vectors, where they are not kept as they are: numbers of a millionth of it and
/// more are normal ones.
const HALF_LENGTH: i32 = 10;

/// An index of keys and their graph.
pub struct HnswIndex {
    keys: FlatIndex,
    space: ContributionSpace,
    graph: Index,
    options: HnswOptions,
}

impl fmt::Debug for HnswIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HnswIndex").field("keys", &self.len()).field("options", &self.options).finish_non_exhaustive()
    }
}

impl HnswIndex {
    /// Builds the index of `keys` `[len, dimension]` with these `scales` `[len]`. `units` `[dimension]` say how much each
    /// input varies. Scores come from the keys as they are given, or where `keep_keys` is false as the graph keeps them.
    ///
    /// # Errors
    /// When sizes do not fit each other, a number does not fit the graph's type or is not finite, or there is no memory.
    pub fn fit(
        keys: ArrayView2<f32>,
        scales: &[f32],
        units: Option<Array1<f32>>,
        options: HnswOptions,
        keep_keys: bool,
    ) -> Result<Self> {
        options.check()?;
        let mut space = ContributionSpace::new(units, keys.ncols())?;
        check_scales(keys, scales)?;
        let mut vectors = lengthened(space.keys(keys, scales));
        if options.vectors == GraphType::F16 && !held(&vectors, HALF_ROUNDING) {
            // Another unit for every input: directions and their order stay as they are.
            let length = vectors.rows().into_iter().next().map_or(0.0, length);
            space = space.in_units_of((length.log2().floor() - f64::from(HALF_LENGTH)).exp2().recip(), keys.ncols())?;
            vectors = lengthened(space.keys(keys, scales));
            if !held(&vectors, 8.0 * HALF_ROUNDING) {
                let found = format!("a longest contribution of {length:e}");
                let expected =
                    format!("few below {:e} of it: use f32 or bf16", f64::from(HALF_LENGTH + 14).exp2().recip());
                return Err(Error::expected("numbers of an f16 graph", found, expected));
            }
        }
        // All vectors are equally long. A half leaves room for rounding to the graph's type.
        let longest = format::LONGEST / 2.0;
        let length = vectors.rows().into_iter().next().map_or(0.0, length);
        if length.is_nan() || length > longest {
            let expected = format!("at most {longest:e}");
            return Err(Error::expected("length of the longest contribution in a graph", length, expected));
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

    /// Opens a graph from [`HnswIndex::serialized`] bytes, which are checked before usearch reads them. `keys` `[len, dimension]` where
    /// they were kept.
    ///
    /// # Errors
    /// When the bytes are no graph of the type and sizes that the options and the scales say, or one that cannot be searched; when keys
    /// or units are of other sizes.
    pub fn restore(
        bytes: &[u8],
        keys: Option<Array2<f32>>,
        scales: &[f32],
        dimension: usize,
        units: Option<Array1<f32>>,
        options: HnswOptions,
    ) -> Result<Self> {
        options.check()?;
        if let Some(keys) = &keys
            && keys.dim() != (scales.len(), dimension)
        {
            let expected = format!("{:?}", (scales.len(), dimension));
            return Err(Error::expected("shape of a graph's keys", format!("{:?}", keys.dim()), expected));
        }
        let space = ContributionSpace::new(units, dimension)?;
        let expected = format::Expected {
            rows: scales.len(),
            dimensions: dimension.saturating_add(1),
            component: options.vectors,
            connectivity: options.connectivity,
        };
        format::check(bytes, &expected)?;
        let graph = Index::new(&options.native(dimension)).map_err(refused)?;
        graph.load_from_buffer(bytes).map_err(refused)?;
        graph.reserve_capacity_and_threads(scales.len(), THREADS).map_err(refused)?;
        graph.change_expansion_search(options.expansion_search);
        let keys = match keys {
            Some(keys) => keys,
            None => keys_of(&graph, &space, scales, dimension)?,
        };
        let keys = FlatIndex::new(keys, Default::default(), None)?;
        Ok(HnswIndex { keys, space, graph, options })
    }

    /// Returns the graph in usearch's own format.
    pub fn serialized(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.graph.serialized_length()];
        self.graph.save_to_buffer(&mut bytes).expect("usearch fills a buffer of the length that it asked for");
        bytes
    }

    /// Returns the keys that scores come from.
    pub fn rows(&self) -> &FlatIndex {
        &self.keys
    }

    /// Returns the units of the graph's vectors `[dimension]`.
    pub fn units(&self) -> Option<ArrayView1<'_, f32>> {
        self.space.units()
    }

    /// Returns keys with a contribution of `least` or more, or near it; `None` where usearch fails, as when all its threads are busy.
    fn walk(&self, query: &[f32], least: f32) -> Option<Vec<u32>> {
        let mut count = self.options.expansion_search.clamp(1, self.len().max(1));
        loop {
            let found = self.graph.search(query, count).ok()?;
            let last = found.distances.last().map_or(f32::NEG_INFINITY, |distance| 1.0 - distance);
            if found.keys.len() < count || count >= self.len() || last < WALK_UNTIL * least {
                return Some(found.keys.into_iter().map(|key| key as u32).collect());
            }
            count = (2 * count).min(self.len());
        }
    }
}

/// Returns whether f16 loses at most this share of vectors.
fn held(vectors: &Array2<f32>, share: f64) -> bool {
    Loss::of_halves(vectors.iter().map(|&v| f64::from(v))).within(share)
}

/// Returns the length of a vector.
fn length(vector: ArrayView1<f32>) -> f64 {
    vector.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt()
}

/// Makes all rows as long as the longest, by one more number.
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

/// Returns the keys as a graph keeps them, `[len, dimension]`; those of scale 0 are 0.
fn keys_of(graph: &Index, space: &ContributionSpace, scales: &[f32], dimension: usize) -> Result<Array2<f32>> {
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
    if let Some(units) = space.units() {
        keys /= &units.insert_axis(Axis(0));
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

    fn candidates(&self, query: ArrayView1<f32>, range: ContributionRange) -> Option<Vec<u32>> {
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
mod tests;
