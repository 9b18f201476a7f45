//! Whole models of the store, run by what their configuration says they are: language models of Llama's kind.

mod config;
mod language_model;
mod perplexity;
mod sampling;
mod tokenizer;

pub use language_model::{Generation, GenerationOptions, LanguageModel};
pub use perplexity::{Divergence, Perplexity};
pub use sampling::Sampling;
pub use tokenizer::ChatMessage;
