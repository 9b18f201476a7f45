//! Quantisers: what a weight matrix, or the rows of keys and values, become when their numbers are kept in a few bits.

mod dual;
mod format;
mod fused;
mod gptq;
mod half_quadratic;
mod kernels;
mod kmeans;
mod nearest;
mod packed;
mod packing;
mod product;
mod quantizer;
mod rows;
mod trits;

pub use kmeans::{kmeans, nearest};
pub use nearest::nearest_rows;

pub use dual::column_scales;
pub use format::{Group, ScaleType, WeightFormat, WeightType};
pub use fused::Activations;
pub use gptq::Calibrated;
pub use packed::PackedMatrix;
pub use packing::{pack, unpack};
pub use product::{ProductFormat, ProductQuantizer};
pub use quantizer::{Clipping, Grid, NORMAL_FLOAT, Quantizer};
pub use rows::{RowFormat, RowMatrix, RowType};
