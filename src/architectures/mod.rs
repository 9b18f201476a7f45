//! Whole models of the store, run by what their configuration says they are: language models of Llama's kind, and text encoders of
//! BERT's.

mod bench;
mod bert;
mod blockwise;
mod config;
mod generation;
mod language_model;
mod llama_blocks;
mod open;
mod perplexity;
mod sampling;
mod session;
mod text_encoder;
mod tokenizer;

pub(crate) use blockwise::{Block, Blockwise};
pub(crate) use tokenizer::TextTokenizer;

pub use bench::{SpeedOptions, SpeedReport};
pub use generation::{Generation, GenerationOptions};
pub use language_model::LanguageModel;
pub use layerstore_core::transformer::CacheType;
pub use perplexity::{Divergence, Perplexity};
pub use sampling::Sampling;
pub use session::Session;
pub use text_encoder::{EncodingOptions, Pooling, TextEncoder};
pub use tokenizer::ChatMessage;
