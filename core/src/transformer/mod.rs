//! Whole transformers over layers of any method: decoders of Llama's kind, and encoders of BERT's.
//!
//! Dependencies inside the module point one way: `rotary`, `norm`, `kv_cache` and `linears`, then `config` and `attention`, then
//! `decoder_block`, then `decoder` and `encoder`, then `saved_cache`.

mod attention;
mod config;
mod decoder;
mod decoder_block;
mod encoder;
mod kv_cache;
mod linears;
mod norm;
mod rotary;
mod saved_cache;

pub use config::DecoderConfig;
pub use decoder::{Continuation, Decoder, Logits};
pub use decoder_block::{BlockInput, DecoderBlock, Observe, RunningBlock};
pub use encoder::{Encoder, EncoderBlock, EncoderConfig, EncoderEmbedding, RunningEncoderBlock};
pub use kv_cache::{CacheType, KvCache};
pub use norm::Norm;
pub use rotary::{Angles, Rotary, RotaryScaling};

#[cfg(test)]
mod tests;
