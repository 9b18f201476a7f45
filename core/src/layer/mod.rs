//! Compressed layers: built from a weight by a method, run in memory, turned into [`Parts`] and back.
//!
//! Inputs are `[batch, in_features]`, outputs `[batch, out_features]`, f32, and `y = x · Wᵀ + b`. [`Method`] and [`Layer`] are
//! traits; [`registry`] lists the methods, and nothing else matches on them. A layer knows its parts and no table; the store
//! moves parts and knows no method.

mod activation;
mod check;
mod dense;
mod file;
mod key_value;
mod low_rank;
mod method;
mod module;
mod name;
pub mod parts;
pub mod registry;
mod rms_norm;
mod shape;
mod stored_as;
mod ternary;
mod traits;
mod vq_attention;

pub use activation::Activation;
pub use dense::{DType, Dense, DenseLayer, dtype_name, dtype_named, from_f32, holds, to_f32};
pub use file::FileLayer;
pub use key_value::{
    Backend, Decomposition, Hit, KeyValueConfig, KeyValueLayer, Limit, OnMisfit, QueryHits, Ranking, Refit, ScoreRange,
    SearchSettings, Sides, StoredSearch, ThresholdMethod, search_threshold,
};
pub use low_rank::{
    Correction, LowRankConfig, LowRankLayer, MaxBits, MaxError, Rank, Rounding, Scaling, SvdMethod, Transform,
};
pub use method::{Method, MethodConfig, MethodKind, compress, read_config};
pub use module::ModuleLayer;
pub use name::MethodName;
pub use parts::{ArtifactId, Parts};
pub use registry::{MethodEntry, layer_from_parts, register};
pub use rms_norm::{NormGradients, RmsNorm};
pub use shape::{LayerShape, bits_per_weight};
pub use stored_as::StoredAs;
pub use ternary::{TernaryConfig, TernaryLayer};
pub use traits::{
    Accuracy, CorrectionReport, ExactSource, Gradients, Layer, Output, SearchReport, SharedLayer, check_rows,
    configured, no_weight,
};
pub(crate) use vq_attention::batch_in_heads;
pub use vq_attention::{CodebookStep, Mechanism, VqAttentionConfig, VqAttentionLayer};

pub use crate::quant::{ActivationFormat, ProductFormat, RowFormat, RowType};

#[cfg(test)]
mod tests;
