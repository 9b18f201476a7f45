//! Attention: softmax(scale · q kᵀ) v, exactly and approximated.
//!
//! | item | subject |
//! |---|---|
//! | [`exact()`], [`exact_gradients()`] | every query meets every visible key, a tile at a time (FlashAttention) |
//! | [`VqAttention`] | keys, and queries if wanted, are replaced by codewords (Transformer-VQ) |
//! | [`HyperAttention`] | keys of a query's own hash bucket, and a sample of the others |
//!
//! Arrays are `[batch, heads, tokens, dim]`, f32. The number of query heads may be a whole multiple of the number of key heads: that
//! many consecutive query heads share one head of keys and values (grouped-query attention). In causal attention query i of n
//! sees key j of m where j ≤ i + m − n: the last query is at the last key.
//!
//! Dependencies inside the module point one way: `mask`, then `shape`, `output` and `softmax`, then `exact`; `codebook` and `cache`,
//! then `compressed` and `window`, then `vector_quantized`; `hyper` and `gradients` stand on `exact`.

mod cache;
mod codebook;
mod compressed;
mod exact;
mod gather;
mod gradients;
mod hyper;
mod mask;
mod output;
mod shape;
mod softmax;
mod vector_quantized;
mod window;

pub use cache::CompressedCache;
pub use codebook::{AttentionCodebook, CodebookUpdate};
pub use exact::exact;
pub use gradients::{AttentionGradients, exact_gradients};
pub use hyper::{HyperAttention, HyperAttentionSample};
pub use mask::AttentionMask;
pub use output::AttentionOutput;
pub(crate) use softmax::OnlineSoftmax;
pub use vector_quantized::{RelativeBias, VqAttention};

#[cfg(test)]
mod tests;
