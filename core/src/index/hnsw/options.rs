//! How a graph of keys is built and searched.

use serde::{Deserialize, Serialize};
use usearch::{IndexOptions, MetricKind, ScalarKind};

use crate::error::{Error, Result};

/// The number type of a graph's vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GraphType {
    /// 32-bit floats.
    #[default]
    F32,
    /// 16-bit floats of IEEE 754.
    F16,
    /// 16-bit floats with the exponent of an f32.
    Bf16,
}

impl GraphType {
    /// Returns usearch's name of the type.
    fn scalar(self) -> ScalarKind {
        match self {
            GraphType::F32 => ScalarKind::F32,
            GraphType::F16 => ScalarKind::F16,
            GraphType::Bf16 => ScalarKind::BF16,
        }
    }
}

/// How a graph is built and searched (Malkov and Yashunin, 2016, whose M, efConstruction and ef these are).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HnswOptions {
    /// Number type of the graph's vectors.
    pub vectors: GraphType,
    /// Neighbours of a key, at least 2; at the lowest level there are twice as many.
    pub connectivity: usize,
    /// Keys looked at while one is added.
    pub expansion_add: usize,
    /// Keys looked at in a search, at least.
    pub expansion_search: usize,
}

impl HnswOptions {
    /// Refuses a connectivity that usearch would replace by its own, or cannot use.
    pub(super) fn check(self) -> Result<()> {
        match self.connectivity >= 2 {
            true => Ok(()),
            false => Err(Error::expected("connectivity", self.connectivity, "at least 2")),
        }
    }

    /// Returns usearch's options for keys of length `dimension`, whose vectors have one number more.
    pub(super) fn native(self, dimension: usize) -> IndexOptions {
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
