//! The instruction sets that kernels are compiled for, and which of them this processor has.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::LazyLock;

#[cfg(target_arch = "x86_64")]
use super::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use super::avx512::Avx512;
use super::expand;
use super::inputs::{Inputs, Kind};
use super::packed::Rows;
use super::portable::Portable;
use super::simd::Simd;
use super::tile;

/// The kernels of one device. Each [`Simd`] is one; what is no set of vector registers (AMX's tiles, a graphics processor)
/// implements this by itself.
pub trait Isa: Debug + Send + Sync {
    /// Returns the name that figures are quoted with.
    fn name(&self) -> &'static str;

    /// Returns whether this computer has it.
    fn available(&self) -> bool;

    /// Returns how many lanes inputs are laid out for, at most 16.
    fn lanes(&self) -> usize;

    /// Computes `out[v · stride + i] = ⟨row i of the range, input v⟩`.
    ///
    /// # Safety
    /// The device is [available](Isa::available), the rows are there, the inputs are laid out for its lanes and the matrix, and
    /// are of this kind. There is room for what is written, and nobody else uses it.
    unsafe fn products(&self, m: &Rows, x: &Inputs, kind: Kind, rows: Range<usize>, out: *mut f32, stride: usize);

    /// Writes the numbers that rows stand for, each row in the order that inputs are laid out in as floats, `stride` apart.
    ///
    /// # Safety
    /// The device is [available](Isa::available), and the rows are there.
    unsafe fn expand(&self, m: &Rows, rows: Range<usize>, stride: usize, out: &mut [f32]);
}

impl<S: Simd + Debug> Isa for S {
    fn name(&self) -> &'static str {
        S::NAME
    }

    fn available(&self) -> bool {
        S::available()
    }

    fn lanes(&self) -> usize {
        S::LANES
    }

    unsafe fn products(&self, m: &Rows, x: &Inputs, kind: Kind, rows: Range<usize>, out: *mut f32, stride: usize) {
        // SAFETY: the caller's promise.
        unsafe { tile::products::<S>(m, x, kind, rows, (out, stride)) }
    }

    unsafe fn expand(&self, m: &Rows, rows: Range<usize>, stride: usize, out: &mut [f32]) {
        // SAFETY: the caller's promise.
        unsafe { expand::expand::<S>(m, rows, stride, out) }
    }
}

/// All of them, the fastest first.
static ALL: &[&dyn Isa] = &[
    #[cfg(target_arch = "x86_64")]
    &Avx512,
    #[cfg(target_arch = "x86_64")]
    &Avx2,
    &Portable,
];

/// Returns those that this computer has, the fastest first.
pub fn available() -> impl Iterator<Item = &'static dyn Isa> {
    ALL.iter().copied().filter(|isa| isa.available())
}

/// Returns the fastest that this computer has.
pub fn best() -> &'static dyn Isa {
    static BEST: LazyLock<&dyn Isa> = LazyLock::new(|| available().next().unwrap_or(&Portable));
    *BEST
}
