//! How a key–value layer finds the keys that a query needs.

mod flat;

pub use flat::FlatIndex;

use ndarray::{Array2, ArrayView2};

/// Inner products of queries with the keys of one layer.
///
/// A backend answers for every key; which of them are hits is the layer's decision, since it ranks by contribution as
/// well as by score and certifies what it drops.
pub trait SearchIndex: Send + Sync {
    /// Number of keys.
    fn len(&self) -> usize;

    /// Length of a key.
    fn dimension(&self) -> usize;

    /// `⟨key, query⟩` of every pair: queries `[batch, dimension]` to scores `[batch, len]`.
    fn scores(&self, queries: ArrayView2<f32>) -> Array2<f32>;

    /// The keys as the index knows them, `[len, dimension]`.
    fn reconstruct(&self) -> Array2<f32>;

    /// Whether there are no keys.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
