//! Whole transformers over layers of any method: decoders of Llama's kind.

mod decoder;
mod kv_cache;
mod norm;
mod rotary;

pub use decoder::{Decoder, DecoderBlock, DecoderConfig, Logits};
pub use kv_cache::{BlockCache, KvCache};
pub use norm::Norm;
pub use rotary::{Angles, Rotary, RotaryScaling};

#[cfg(test)]
mod tests;
