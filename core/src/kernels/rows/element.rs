//! The numbers that rows are made of, and their weights.

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
use crate::kernels::simd::read;

/// A sparse row of weights: numbers of rows with the weight of each.
pub type SparseRow = [(u32, f32)];

/// Sixteen numbers of a row, within one line of a cache.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub struct Line(pub [f32; 16]);

/// A number that rows are made of.
pub trait Element: Copy + Send + Sync {
    /// Returns its value, before a row's scale.
    fn value(self) -> f32;
    /// Loads eight of them.
    ///
    /// # Safety
    /// `from` has eight elements, and the processor has AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn eight(from: *const Self) -> std::arch::x86_64::__m256;
}

impl Element for f32 {
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn eight(from: *const f32) -> std::arch::x86_64::__m256 {
        // SAFETY: the caller's promise.
        unsafe { read(from.cast()) }
    }
}

impl Element for f16 {
    /// In a few operations of its own: `half` asks for the processor's features each time.
    #[inline(always)]
    fn value(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let size = bits & 0x7fff;
        // As a float with the exponent of f16, and then with that of f32: 2¹¹² is between the two.
        let value = f32::from_bits(size << 13) * f32::from_bits((127 + 112) << 23);
        // Infinity, and NaN, which is quiet.
        let special = f32::INFINITY.to_bits() | size << 13 | if size > 0x7c00 { 1 << 22 } else { 0 };
        let bits_of = if size >= 0x7c00 { special } else { value.to_bits() };
        f32::from_bits(bits_of | (bits & 0x8000) << 16)
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn eight(from: *const f16) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::_mm256_cvtph_ps;
        // SAFETY: the caller's promise; an f16 is its 16 bits.
        unsafe { _mm256_cvtph_ps(read(from.cast())) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn value(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn eight(from: *const bf16) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::{_mm256_castsi256_ps, _mm256_cvtepu16_epi32, _mm256_slli_epi32};
        // SAFETY: the caller's promise; a bf16 is the upper half of a float.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(read(from.cast())))) }
    }
}

impl Element for i8 {
    #[inline(always)]
    fn value(self) -> f32 {
        f32::from(self)
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn eight(from: *const i8) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::{_mm_cvtsi64_si128, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps};
        // SAFETY: the caller's promise.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(read(from.cast())))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_floats_are_those_of_half() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (f16::from_bits(bits).value(), f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{bits:04x}");
            let (ours, theirs) = (bf16::from_bits(bits).value(), bf16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{bits:04x}");
        }
    }
}
