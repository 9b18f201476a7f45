//! Quantisers: weight matrices, and rows of keys and values, whose numbers are kept in a few bits.
//!
//! A [`WeightFormat`] says what a weight's code is and who shares a scale; its [`Quantizer`] rounds. A [`PackedMatrix`] holds
//! the codes, and a [`RowMatrix`] rows that are used one by one. Products with both are the kernels'.

mod dual;
mod fit;
mod format;
mod fused;
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
mod row_format;
mod row_sums;
mod rows;
mod scales;
mod trits;

pub use kmeans::{kmeans, nearest};
pub use nearest::nearest_rows;
pub use packed_products::instruction_set;

pub use crate::kernels::ActivationFormat;
pub use crate::kernels::Plan;
pub(crate) use crate::kernels::{MOST_FUSED, SharedInputs};
pub use dual::column_scales;
pub use format::{Group, WeightFormat, WeightType};
pub(crate) use fused::forward_packed;
pub use fused::{Correction, PackedForward};
pub use gptq::Calibrated;
pub use packed::PackedMatrix;
pub use packing::{pack, unpack};
pub use product::{ProductFormat, ProductQuantizer};
pub use quantizer::{Clipping, FP4, IQ4_NL, NORMAL_FLOAT, QuantParams, Quantizer};
pub(crate) use quantizer::{F8_E4M3, F8_E5M2, absmean_scale};
pub use row_format::{RowFormat, RowType};
pub use rows::RowMatrix;
pub use scales::{Nested, ScaleType};

#[cfg(test)]
mod products_tests;
