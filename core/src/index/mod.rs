//! How a key–value layer finds the keys that a query needs.

mod flat;
mod hnsw;
mod ivf_pq;

pub use flat::FlatIndex;
pub use hnsw::{GraphType, HnswIndex, HnswOptions};
pub use ivf_pq::IvfPqIndex;

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis};
use serde::Serialize;

use crate::error::Result;

/// Which keys a search is after.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Range {
    /// The least contribution, scale · ⟨key, query⟩; the least |contribution| where both sides count.
    pub least: f32,
    pub two_sided: bool,
}

/// What an index is, for reports.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct IndexInfo {
    pub backend: &'static str,
    pub keys: usize,
    pub dimension: usize,
    /// Memory of keys, codes, cells and graphs.
    pub memory_bytes: usize,
}

/// Inner products of queries with the keys of one layer.
///
/// A backend answers for every key, or proposes those that may matter; which of them are hits is the layer's decision,
/// since it ranks by contribution as well as by score and certifies what it drops.
pub trait SearchIndex: Send + Sync {
    /// Number of keys.
    fn len(&self) -> usize;

    /// Length of a key.
    fn dimension(&self) -> usize;

    /// `⟨key, query⟩` of every pair: queries `[batch, dimension]` to scores `[batch, len]`.
    fn scores(&self, queries: ArrayView2<f32>) -> Array2<f32>;

    /// `⟨key, query⟩` of some keys, for a query `[dimension]`.
    fn scores_of(&self, query: ArrayView1<f32>, keys: &[u32]) -> Vec<f32>;

    /// The keys that may lie in the range of a query `[dimension]`, ascending: some that do may be missing. `None` where
    /// every key is to be looked at.
    fn candidates(&self, query: ArrayView1<f32>, range: Range) -> Option<Vec<u32>> {
        let _ = (query, range);
        None
    }

    /// The keys as the index knows them, `[len, dimension]`.
    fn reconstruct(&self) -> Array2<f32>;

    /// What the index is, and what it takes.
    fn info(&self) -> IndexInfo;

    /// Forgets all keys.
    ///
    /// # Errors
    /// When the backend refuses.
    fn reset(&mut self) -> Result<()>;

    /// Whether there are no keys.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The index of a layer.
#[derive(Debug)]
pub enum KeyIndex {
    /// Every key scanned, whatever it is kept as.
    Flat(FlatIndex),
    IvfPq(IvfPqIndex),
    Hnsw(HnswIndex),
}

impl KeyIndex {
    /// The keys that scores come from.
    pub fn rows(&self) -> &FlatIndex {
        match self {
            KeyIndex::Flat(index) => index,
            KeyIndex::IvfPq(index) => index.rows(),
            KeyIndex::Hnsw(index) => index.rows(),
        }
    }

    /// The index as what all backends are.
    pub fn as_search_index(&self) -> &dyn SearchIndex {
        match self {
            KeyIndex::Flat(index) => index,
            KeyIndex::IvfPq(index) => index,
            KeyIndex::Hnsw(index) => index,
        }
    }
}

/// Where cells and graphs live: keys times their scales, so that an inner product is a contribution, in units of how
/// much each input varies, so that directions in which inputs vary little do not decide which keys are near.
#[derive(Debug, Clone, PartialEq)]
struct Space {
    units: Option<Array1<f32>>,
}

impl Space {
    fn keys(&self, keys: ArrayView2<f32>, scales: &[f32]) -> Array2<f32> {
        let mut keys = &keys * &ArrayView1::from(scales).insert_axis(Axis(1));
        if let Some(units) = &self.units {
            keys *= &units.view().insert_axis(Axis(0));
        }
        keys
    }

    fn query(&self, query: ArrayView1<f32>) -> Vec<f32> {
        match &self.units {
            Some(units) => (&query / units).to_vec(),
            None => query.to_vec(),
        }
    }
}
