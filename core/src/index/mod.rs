//! Indices of keys: how a key–value layer finds the keys that a query needs.
//!
//! | backend | type | search |
//! |---|---|---|
//! | `flat`, `pq` | [`FlatIndex`] | every key is scored |
//! | `ivf_pq` | [`IvfPqIndex`] | the keys of some cells are scored |
//! | `hnsw` | [`HnswIndex`] | a graph of keys is walked |
//!
//! Dependencies inside the module point one way: `search` and `space`, then `flat`, then `ivf_pq` and `hnsw`, then `key_index`.

mod flat;
mod hnsw;
mod ivf_pq;
mod key_index;
mod search;
mod space;

pub use flat::FlatIndex;
pub use hnsw::{GraphType, HnswIndex, HnswOptions};
pub use ivf_pq::IvfPqIndex;
pub use key_index::KeyIndex;
pub use search::{ContributionRange, IndexInfo, SearchIndex};
