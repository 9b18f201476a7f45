//! Compressed layers: built from a weight by a method, run in memory, turned into [`Parts`] and back.
//!
//! Inputs are `[batch, in_features]`, outputs `[batch, out_features]`, f32, and `y = x · Wᵀ + b`.
//!
//! ```
//! use layerstore::layer::{Accuracy, Layer, LowRankConfig, Rank, compress};
//! use ndarray::Array2;
//!
//! # fn main() -> layerstore::Result<()> {
//! let weight = Array2::from_shape_fn((8, 64), |(i, j)| (((i * 64 + j) as f32).powi(2) * 0.37).sin());
//! let settings = LowRankConfig { rank: Rank::Components(4), ..LowRankConfig::default() };
//! let layer = compress(&settings, weight.view(), None, None)?;
//! let y = layer.forward(Array2::ones((1, 64)).view(), Accuracy::Approximate)?.y;
//! assert_eq!(y.dim(), (1, 8));
//! # Ok(()) }
//! ```
//!
//! | method | settings | layer |
//! |---|---|---|
//! | `dense` | [`Dense`] | [`DenseLayer`] |
//! | `key_value` | [`KeyValueConfig`] | [`KeyValueLayer`] |
//! | `low_rank` | [`LowRankConfig`] | [`LowRankLayer`] |
//! | `ternary` | [`TernaryConfig`] | [`TernaryLayer`] |
//! | `vq_attention` | [`VqAttentionConfig`] | [`VqAttentionLayer`] |
//! | `module` | | [`ModuleLayer`] |
//! | `file` | | [`FileLayer`] |
//!
//! [`Method`] and [`Layer`] are traits. A program adds a method of its own with [`register`].

#[doc(inline)]
pub use layerstore_core::index::{GraphType, HnswOptions, IndexInfo};
#[doc(inline)]
pub use layerstore_core::layer::registry::{method, methods};
#[doc(inline)]
pub use layerstore_core::layer::{
    Accuracy, Activation, ActivationFormat, ArtifactId, Backend, CodebookStep, CorrectionReport, DType, Decomposition,
    Dense, DenseLayer, ExactSource, FileLayer, Gradients, Hit, KeyValueConfig, KeyValueLayer, Layer, LayerShape, Limit,
    LowRankConfig, LowRankLayer, MaxBits, MaxError, Mechanism, Method, MethodConfig, MethodEntry, MethodKind,
    MethodName, ModuleLayer, NormGradients, OnMisfit, Output, Parts, ProductFormat, QueryHits, Rank, Ranking, Refit,
    RmsNorm, Rounding, RowFormat, RowType, Scaling, SearchReport, SearchSettings, SharedLayer, Sides, StoredAs,
    SvdMethod, TernaryConfig, TernaryLayer, ThresholdMethod, VqAttentionConfig, VqAttentionLayer, check_rows, compress,
    layer_from_parts, read_config, register, search_threshold,
};
#[doc(inline)]
pub use layerstore_core::quant::{Clipping, Group, PackedMatrix, ScaleType, WeightFormat, WeightType};

/// The arrays that [`Parts`] are made of.
pub mod parts {
    #[doc(inline)]
    pub use layerstore_core::layer::parts::{
        Codebook, Codes, Factor, Keys, Side, Tensor, WeightRows, bytes_f32, f32_bytes,
    };
}
