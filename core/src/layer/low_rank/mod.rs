//! Quantised weights, and a low-rank correction of what quantising lost: `y = Ŵ x + A (B x) + b`.

mod build;
mod config;
mod correction;
mod layer;
mod method;
mod parts;
mod stored;

pub use config::{LowRankConfig, MaxBits, MaxError, Rank, Rounding, Scaling, SvdMethod};
pub use correction::{Correction, Transform};
pub use layer::LowRankLayer;

#[cfg(test)]
mod tests;
