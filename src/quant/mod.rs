//! Weight quantisers: what a weight matrix becomes when its numbers are stored in a few bits.

mod integer;
mod packing;

pub use integer::{Group, IntegerFormat, PackedMatrix, WeightType};
pub use packing::{pack_nibbles, unpack_nibbles};
