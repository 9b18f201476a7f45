//! Attention: softmax(scale · q kᵀ) v, exactly and approximated.
//!
//! | item | subject |
//! |---|---|
//! | [`exact()`], [`exact_gradients()`] | every query meets every visible key, a tile at a time (FlashAttention) |
//! | [`VqAttention`] | keys, and queries if wanted, are replaced by codewords (Transformer-VQ) |
//! | [`HyperAttention`] | keys of a query's own hash bucket, and a sample of the others |
//!
//! Arrays are `[batch, heads, tokens, dim]`, f32. The number of query heads may be a whole multiple of the number of key heads: that
//! many consecutive query heads share one head of keys and values (grouped-query attention). In causal attention query i sees key j
//! where j ≤ i.

#[doc(inline)]
pub use layerstore_core::attention::{
    AttentionCodebook, AttentionGradients, AttentionMask, AttentionOutput, CodebookUpdate, CompressedCache,
    HyperAttention, HyperAttentionSample, RelativeBias, VqAttention, exact, exact_gradients,
};
