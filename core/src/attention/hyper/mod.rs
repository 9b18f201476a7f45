//! HyperAttention (Han, Jayaram, Karbasi, Mirrokni, Woodruff, Zandieh, 2023): each query meets the keys of its own bucket
//! one by one, and a sample of all keys that stands for the others.
//!
//! Buckets are runs of the tokens in the order of an angular hash, so that near ones come together. A causal attention is
//! two causal ones of the halves, and one of the second half's queries to all keys of the first, which is not causal.
//!
//! `config` has the settings, `levels` the halving, `sample` what is drawn, `part` the attention of one non-causal part, `run` puts
//! them together.

mod config;
mod levels;
mod part;
mod run;
mod sample;

pub use config::HyperAttention;
pub use sample::HyperAttentionSample;
