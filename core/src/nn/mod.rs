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

mod attention_block;
mod block;
mod embedding;
mod from_layers;
mod glu;
mod gru;
mod lru;
mod module;
mod recurrence;
mod shape;
mod ternary_code;
mod to_layers;
mod token_mixer;
pub mod training;

pub use attention_block::AttentionBlock;
pub use block::{BlockConfig, TransformerBlock};
pub use embedding::{EmbeddingTable, PatchEmbedding, Patches, TokenEmbedding};
pub use glu::{Glu, GluConfig};
pub use gru::{Gru, GruConfig};
pub use lru::{Lru, LruConfig, LruLayers, LruSpectrum};
pub use module::{DecodingState, Module};
pub use recurrence::{RnnCell, RnnOutput, SequenceConfig, initial_state, run_sequence, run_step};
pub use ternary_code::{decode_ternary, encode_ternary};
pub use token_mixer::GruTokenMixer;

#[cfg(test)]
mod tests;
