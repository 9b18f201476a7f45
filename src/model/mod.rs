//! Whole models: checkpoints read and written, rules that choose methods, calibration, compression, evaluation.

mod arrays;
mod checkpoint;
mod rules;

pub use arrays::{read_array, write_array};
pub use checkpoint::{Activations, Checkpoint, LayerSource, TensorEntry};
pub use rules::{Rule, Rules};
