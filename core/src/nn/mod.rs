//! Layers without products of floats: Keras-MatMulLess's, on linear layers of any method.
//!
//! | here | in Keras-MML |
//! |---|---|
//! | [`TernaryLayer`](crate::layer::TernaryLayer) | `DenseMML` |
//! | [`RmsNorm`](crate::layer::RmsNorm) | `RMSNorm` |
//! | [`Glu`] | `GLUMML`, `BilinearMML`, `GeGLUMML`, `ReGLUMML`, `SeGLUMML`, `SwiGLUMML` |
//! | [`Gru`] | `GRUCellMML`, `GRUMML`, `AttentionMML` |
//! | [`Lru`] | `LRUCellMML`, `LRUMML` |
//! | [`TransformerBlock`] | `TransformerBlockMML` |
//! | [`TokenEmbedding`], [`Patches`], [`PatchEmbedding`] | the same |
//! | [`encode_ternary`], [`decode_ternary`] | `encode_ternary_array`, `decode_ternary_array` |
//! | [`training`] | what these layers do in training |
//!
//! Sequences are `[batch, steps, features]`. A [`Module`] is any of these; it turns itself into layers by name and back, so
//! that a store keeps whole models as it keeps single layers.

mod assemble;
mod block;
mod embedding;
mod encoding;
mod glu;
mod gru;
mod lru;
mod module;
mod recurrence;
mod rows;
pub mod training;

pub use block::{BlockConfig, TransformerBlock};
pub use embedding::{PatchEmbedding, Patches, Table, TokenEmbedding};
pub use encoding::{decode_ternary, encode_ternary};
pub use glu::{Glu, GluConfig};
pub use gru::{Gru, GruConfig};
pub use lru::{Lru, LruConfig, LruLayers, LruSpectrum};
pub use module::{Decoding, Module};
pub use recurrence::{Cell, Ran, SequenceConfig, run, start, step};

#[cfg(test)]
mod tests;
