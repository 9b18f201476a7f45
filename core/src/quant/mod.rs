//! Quantisers: what a weight matrix, or the rows of keys and values, become when their numbers are kept in a few bits.

mod dual;
mod format;
mod gptq;
mod half_quadratic;
mod kmeans;
mod nearest;
mod packed;
mod packed_products;
mod packing;
mod product;
mod quantizer;
mod round;
mod rows;
mod trits;

pub use kmeans::{kmeans, nearest};
pub use nearest::nearest_rows;

pub use crate::kernels::ActivationFormat;
pub use dual::column_scales;
pub use format::{Group, ScaleType, WeightFormat, WeightType};
pub use gptq::Calibrated;
pub use packed::PackedMatrix;
pub use packing::{pack, unpack};
pub use product::{ProductFormat, ProductQuantizer};
pub use quantizer::{Clipping, NORMAL_FLOAT, QuantParams, Quantizer};
pub use rows::{RowFormat, RowMatrix, RowType};

#[cfg(test)]
mod products_tests;
