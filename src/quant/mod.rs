//! Quantisers: what a weight matrix, or the rows of keys and values, become when their numbers are kept in a few bits.

mod integer;
mod kernels;
mod kmeans;
mod packing;
mod product;
mod rows;

pub(crate) use kmeans::{kmeans, nearest};

pub use integer::{Group, IntegerFormat, PackedMatrix, WeightType};
pub use packing::{pack_nibbles, unpack_nibbles};
pub use product::{ProductFormat, ProductQuantizer};
pub use rows::{RowFormat, RowMatrix, RowType};
