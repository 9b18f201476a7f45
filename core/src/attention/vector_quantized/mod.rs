//! Attention whose keys are codewords, and its queries, too, if wanted: time and memory grow with the tokens and not with their
//! square (VQ attention; Transformer-VQ).
//!
//! Scores depend on a key's code alone, so all keys of a code are one: their number n and the mean of their values, whose
//! weight is exp(score + ln n). The result is exact attention over the quantised keys, up to rounding.

mod bidirectional;
mod causal;
mod settings;

pub use settings::{RelativeBias, VqAttention};
