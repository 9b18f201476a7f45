//! The index of a layer, of any backend.

use super::flat::FlatIndex;
use super::hnsw::HnswIndex;
use super::ivf_pq::IvfPqIndex;
use super::search::SearchIndex;

/// The index of a layer.
#[derive(Debug)]
pub enum KeyIndex {
    /// Scores every key, whatever it is stored as.
    Flat(FlatIndex),
    /// Product codes in cells.
    IvfPq(IvfPqIndex),
    /// A graph of keys.
    Hnsw(HnswIndex),
}

impl KeyIndex {
    /// Returns the keys that scores come from.
    pub fn rows(&self) -> &FlatIndex {
        match self {
            KeyIndex::Flat(index) => index,
            KeyIndex::IvfPq(index) => index.rows(),
            KeyIndex::Hnsw(index) => index.rows(),
        }
    }

    /// Returns the index by what all backends have in common.
    pub fn as_search_index(&self) -> &dyn SearchIndex {
        match self {
            KeyIndex::Flat(index) => index,
            KeyIndex::IvfPq(index) => index,
            KeyIndex::Hnsw(index) => index,
        }
    }
}
