//! Kernels: products straight from packed weights, and sums over rows of keys and values.
//!
//! A kernel sees plain slices and a small description of them ([`CodeFormat`], [`PackedRows`]); it knows no matrix type, and
//! whoever has one describes it. Lengths are checked when rows are described, so that safe code cannot make a kernel read
//! past them.
//!
//! # One algorithm, a file per instruction set
//!
//! The stored rows are what the loops read: it is the inputs that are brought into the order in which a register's lanes meet
//! the codes (`layout`, `inputs`). The loops (`tile`, `many`, `expand`) are written once, over the trait `simd::Simd`, and
//! are compiled for each of its implementations: `avx512`, `avx2`, `portable`. The reference is the dequantised matrix and a
//! plain product; the tests hold every instruction set to it.
//!
//! # Devices
//!
//! `Isa` is what a layer's product is handed to, chosen once by what the processor says of itself (`isa::best`). Adding one
//! is a file and a line in the list in `isa.rs`: a set of vector registers implements `Simd` and is an `Isa` by it; AMX, whose
//! registers are tiles, or a graphics processor, implements `Isa` by itself.
//!
//! # What the compiler may not decide
//!
//! See `simd`: whatever is called in a loop is inlined always, and `make check-kernels` disassembles the loops as built under
//! three profiles and fails on a call inside them.

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod expand;
mod fused;
mod inputs;
mod isa;
mod layout;
mod many;
mod packed;
mod portable;
mod products;
mod rows;
mod simd;
mod tile;

pub use activations::ActivationFormat;
pub(crate) use activations::absmax_steps;
#[cfg(test)]
pub use isa::{Isa, available, best};

/// Returns the name of the instruction set that this computer's kernels use.
pub fn instruction_set() -> &'static str {
    isa::best().name()
}

pub use fused::{FusedProduct, MOST_FUSED, SharedInputs, fused_products, plan};
pub use layout::Plan;
pub use packed::{CodeFormat, GroupNumbers, Offsets, PackedRows, Weights};
pub use products::Matrix;
#[cfg(test)]
pub use products::rounded;
pub use rows::{Element, Line, SparseRow, accumulate, dots, lines_of, sum_lines, widen, widen_bytes};
