//! Modules over linear layers of any compression method: attention with its projections, gated units, recurrent layers,
//! blocks and embeddings.
//!
//! An [`AttentionBlock`] is multi-head attention. The other modules are those of the MatMul-free language model (Zhu et al.,
//! 2024), which mixes tokens by a GRU, as Keras-MatMulLess builds it:
//!
//! | here | in Keras-MatMulLess |
//! |---|---|
//! | [`TernaryLayer`](crate::layer::TernaryLayer) | `DenseMML` |
//! | [`RmsNorm`](crate::layer::RmsNorm) | `RMSNorm` |
//! | [`Glu`] | `GLUMML`, `BilinearMML`, `GeGLUMML`, `ReGLUMML`, `SeGLUMML`, `SwiGLUMML` |
//! | [`Gru`] | `GRUCellMML`, `GRUMML` |
//! | [`GruTokenMixer`] | `AttentionMML` |
//! | [`Lru`] | `LRUCellMML`, `LRUMML` |
//! | [`TransformerBlock`] | `TransformerBlockMML` |
//! | [`TokenEmbedding`], [`Patches`], [`PatchEmbedding`] | the same |
//! | [`encode_ternary`], [`decode_ternary`] | `encode_ternary_array`, `decode_ternary_array` |
//! | [`training`] | quantisation-aware training of these layers |
//!
//! Sequences are `[batch, steps, features]`. A [`Module`] is any of the latter; [`Module::to_layers`] turns it into layers by
//! name, and [`Module::from_layers`] brings it back, so that a store keeps whole models as it keeps single layers.

#[doc(inline)]
pub use layerstore_core::nn::{
    AttentionBlock, BlockConfig, DecodingState, EmbeddingTable, Glu, GluConfig, Gru, GruConfig, GruTokenMixer, Lru,
    LruConfig, LruLayers, LruSpectrum, Module, PatchEmbedding, Patches, RnnCell, RnnOutput, SequenceConfig,
    TokenEmbedding, TransformerBlock, decode_ternary, encode_ternary, initial_state, run_sequence, run_step,
};

/// Quantisation-aware training of ternary layers: forward passes with rounded weights and inputs, gradients as if nothing had
/// been rounded.
///
/// Gradients pass straight through roundings (`∂round(v)/∂v = 1`), as in Keras-MatMulLess. The scale γ = mean|W| is part of the
/// graph, so that the gradient of `y = γ (x̃ · W̃ᵀ)` with respect to a weight has two parts: through W̃, and through γ.
pub mod training {
    #[doc(inline)]
    pub use layerstore_core::nn::training::{
        GluGradients, GluTape, GluTraining, TernaryGradients, TernaryTape, TernaryTraining,
    };
}
