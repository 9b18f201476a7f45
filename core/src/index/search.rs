//! What all indices of keys have in common.

use ndarray::{Array2, ArrayView1, ArrayView2};
use serde::Serialize;

use crate::error::Result;

/// The contributions that a search is after.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ContributionRange {
    /// The least contribution, scale · ⟨key, query⟩; the least |contribution| where both sides count.
    pub least: f32,
    /// Whether keys of large negative contributions count as those of large positive ones.
    pub two_sided: bool,
}

/// Size and backend of an index, for reports.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct IndexInfo {
    /// Name of the backend, as in rules.
    pub backend: &'static str,
    /// Number of keys.
    pub keys: usize,
    /// Length of a key.
    pub dimension: usize,
    /// Memory of keys, codes, cells and graphs.
    pub memory_bytes: usize,
}

/// Inner products of queries with the keys of one layer.
///
/// A backend answers for every key, or proposes those that may matter; which of them are hits is the layer's decision,
/// since it ranks by contribution as well as by score and certifies what it drops.
pub trait SearchIndex: Send + Sync {
    /// Returns the number of keys.
    fn len(&self) -> usize;

    /// Returns the length of a key.
    fn dimension(&self) -> usize;

    /// Returns `⟨key, query⟩` of every pair: queries `[batch, dimension]` to scores `[batch, len]`.
    fn scores(&self, queries: ArrayView2<f32>) -> Array2<f32>;

    /// Returns `⟨key, query⟩` of some keys, for a query `[dimension]`.
    fn scores_of(&self, query: ArrayView1<f32>, keys: &[u32]) -> Vec<f32>;

    /// Returns the keys that may lie in the range of a query `[dimension]`, ascending; some that do may be missing. `None` where
    /// every key is to be looked at.
    fn candidates(&self, query: ArrayView1<f32>, range: ContributionRange) -> Option<Vec<u32>> {
        let _ = (query, range);
        None
    }

    /// Returns the keys as the index has them, `[len, dimension]`.
    fn reconstruct(&self) -> Array2<f32>;

    /// Returns the backend and sizes.
    fn info(&self) -> IndexInfo;

    /// Removes all keys.
    ///
    /// # Errors
    /// When the backend refuses.
    fn reset(&mut self) -> Result<()>;

    /// Returns whether there are no keys.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
