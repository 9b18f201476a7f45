//! AVX2 with FMA, BMI2 and F16C: Haswell and Zen, and what came after them.

use std::arch::x86_64::*;

use half::f16;

use super::simd::{Coding, Kernel, Simd, each, level_byte, read, write};

/// AVX2, FMA, BMI2 and F16C.
#[derive(Debug, Clone, Copy)]
pub struct Avx2;

/// What stays the same for a matrix.
#[derive(Clone, Copy)]
pub struct Registers {
    bits: usize,
    /// The bits of a code, in each of eight bytes.
    spread: u64,
    mask: __m256i,
    flip: __m256i,
    low: __m256,
    high: __m256,
    bytes: __m256i,
    /// Whether codes have eight bits: two products of them with bytes are more than 16 bits hold.
    wide: bool,
}

/// All bits of the first of eight lanes.
#[inline(always)]
unsafe fn first(count: usize) -> __m256i {
    // SAFETY: the caller has AVX2, as in every function here.
    unsafe {
        let numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), numbers)
    }
}

/// Eight bytes, or the first `count` of them, with zeros behind: two loads that overlap.
#[inline(always)]
unsafe fn eight(from: *const u8, count: usize) -> u64 {
    // SAFETY: no byte is read but the first `count`.
    unsafe {
        if count >= 8 {
            return read(from);
        }
        if count >= 4 {
            let (first, last): (u32, u32) = (read(from), read(from.wrapping_add(count - 4)));
            return u64::from(first) | u64::from(last) << (8 * (count - 4));
        }
        if count >= 2 {
            let (first, last): (u16, u16) = (read(from), read(from.wrapping_add(count - 2)));
            return u64::from(first) | u64::from(last) << (8 * (count - 2));
        }
        if count == 1 { u64::from(read::<u8>(from)) } else { 0 }
    }
}

#[target_feature(enable = "avx2,fma,bmi2,f16c")]
unsafe fn compiled<K: Kernel<Avx2>>(kernel: K) {
    // SAFETY: the caller's promise.
    unsafe { kernel.run() }
}

impl Simd for Avx2 {
    const NAME: &'static str = "avx2";
    const LANES: usize = 8;
    const REGISTERS: usize = 16;
    type Float = __m256;
    type Int = __m256i;
    type Coding = Registers;

    fn available() -> bool {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("f16c")
    }

    unsafe fn compiled<K: Kernel<Self>>(kernel: K) {
        // SAFETY: the caller's promise.
        unsafe { compiled(kernel) }
    }

    #[inline(always)]
    unsafe fn coding(coding: &Coding) -> Registers {
        let values: [f32; 16] = match coding.levels {
            Some(levels) => *levels,
            None => [0.0; 16],
        };
        let (mut bytes, mut i) = ([0u8; 32], 0);
        while i < 32 {
            bytes[i] = level_byte(values[i % 16]);
            i += 1;
        }
        let mask = ((1u32 << coding.bits) - 1) as u8;
        // SAFETY: each array is as long as what is read of it.
        unsafe {
            Registers {
                bits: coding.bits as usize,
                spread: u64::from(mask) * 0x0101_0101_0101_0101,
                mask: _mm256_set1_epi8(mask as i8),
                flip: _mm256_set1_epi8(coding.flip as i8),
                low: _mm256_loadu_ps(values.as_ptr()),
                high: _mm256_loadu_ps(values.as_ptr().wrapping_add(8)),
                bytes: _mm256_loadu_si256(bytes.as_ptr().cast()),
                wide: coding.bits == 8 || coding.levels.is_some(),
            }
        }
    }

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        unsafe { read(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: __m256) {
        unsafe { write(to.cast(), value) }
    }

    #[inline(always)]
    unsafe fn load_some(from: *const f32, count: usize) -> __m256 {
        unsafe { _mm256_maskload_ps(from, first(count)) }
    }

    #[inline(always)]
    unsafe fn halves(from: *const f16) -> __m256 {
        unsafe { _mm256_cvtph_ps(read(from.cast())) }
    }

    #[inline(always)]
    unsafe fn halves_some(from: *const f16, count: usize) -> __m256 {
        unsafe {
            let (low, high) =
                (eight(from.cast(), 2 * count), eight(from.wrapping_add(4).cast(), (2 * count).saturating_sub(8)));
            _mm256_cvtph_ps(_mm_set_epi64x(high as i64, low as i64))
        }
    }

    #[inline(always)]
    unsafe fn bytes_some(from: *const u8, count: usize) -> __m256 {
        unsafe {
            let bytes = _mm_cvtsi64_si128(eight(from, count) as i64);
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes))
        }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m256 {
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn fnma(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fnmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn sum(value: __m256) -> f32 {
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps::<1>(value));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    #[inline(always)]
    unsafe fn pick(value: __m256, places: *const u32) -> __m256 {
        unsafe { _mm256_permutevar8x32_ps(value, read(places.cast())) }
    }

    #[inline(always)]
    unsafe fn block<const H: usize, const FULL: bool>(from: *const u8, bytes: usize, coding: Registers) -> __m256i {
        unsafe {
            if H > 1 && FULL {
                return read(from.cast());
            }
            if FULL && coding.bits == 8 {
                return _mm256_xor_si256(read(from.cast()), coding.flip);
            }
            let each = if H > 1 { 8 } else { coding.bits };
            let mut words = [0u64; 4];
            each!(i in 4, {
                let left = bytes.saturating_sub(i * each);
                let packed = eight(from.wrapping_add(i * each), if left < each { left } else { each });
                words[i] = if H > 1 { packed } else { _pdep_u64(packed, coding.spread) };
            });
            let all = read(words.as_ptr().cast());
            if H > 1 { all } else { _mm256_xor_si256(all, coding.flip) }
        }
    }

    #[inline(always)]
    unsafe fn bytes<const H: usize, const LEVELS: bool, const PLAIN: bool>(
        block: __m256i,
        half: usize,
        coding: Registers,
    ) -> __m256i {
        unsafe {
            let codes = match (H, half) {
                (1, _) => block,
                (_, 0) => _mm256_and_si256(block, coding.mask),
                (2, _) | (4, 2) => _mm256_and_si256(_mm256_srli_epi32::<4>(block), coding.mask),
                (_, 1) => _mm256_and_si256(_mm256_srli_epi32::<2>(block), coding.mask),
                _ => _mm256_and_si256(_mm256_srli_epi32::<6>(block), coding.mask),
            };
            match LEVELS {
                true => _mm256_shuffle_epi8(coding.bytes, codes),
                false if H == 1 || PLAIN => codes,
                false => _mm256_xor_si256(codes, coding.flip),
            }
        }
    }

    // Sums of two products have to fit 16 bits.
    const IN_PLACE: bool = false;

    #[inline(always)]
    unsafe fn bytes_in_place<const H: usize>(block: __m256i, _: usize) -> __m256i {
        block
    }

    #[inline(always)]
    unsafe fn put_together<const H: usize>(sums: [__m256i; 4]) -> __m256i {
        sums[0]
    }

    #[inline(always)]
    unsafe fn values<const H: usize, const LEVELS: bool>(block: __m256i, coding: Registers) -> __m256 {
        unsafe {
            if LEVELS {
                let (low, high) =
                    (_mm256_permutevar8x32_ps(coding.low, block), _mm256_permutevar8x32_ps(coding.high, block));
                // The fourth bit of the code, where a blend looks for it.
                return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(block)));
            }
            let codes = match H {
                1 => _mm256_and_si256(block, _mm256_set1_epi32(255)),
                2 => _mm256_and_si256(_mm256_xor_si256(block, coding.flip), _mm256_set1_epi32(15)),
                _ => _mm256_and_si256(_mm256_xor_si256(block, coding.flip), _mm256_set1_epi32(3)),
            };
            _mm256_cvtepi32_ps(codes)
        }
    }

    #[inline(always)]
    unsafe fn following<const H: usize>(block: __m256i) -> __m256i {
        unsafe {
            match H {
                1 => _mm256_srli_epi32::<8>(block),
                2 => _mm256_srli_epi32::<4>(block),
                _ => _mm256_srli_epi32::<2>(block),
            }
        }
    }

    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }

    #[inline(always)]
    unsafe fn zeros() -> __m256i {
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    unsafe fn load_bytes(from: *const i8) -> __m256i {
        unsafe { read(from.cast()) }
    }

    #[inline(always)]
    unsafe fn splat_bytes(from: *const i8) -> __m256i {
        unsafe { _mm256_set1_epi32(read(from.cast())) }
    }

    #[inline(always)]
    unsafe fn dot(codes: __m256i, x: __m256i, sum: __m256i, coding: Registers) -> __m256i {
        unsafe {
            let products = if coding.wide {
                // The lower seven bits and the eighth by themselves: sums of two of either's products fit 16 bits.
                let (eighth, ones) = (_mm256_set1_epi8(-128), _mm256_set1_epi16(1));
                let low = _mm256_maddubs_epi16(_mm256_andnot_si256(eighth, codes), x);
                let high = _mm256_maddubs_epi16(_mm256_and_si256(eighth, codes), x);
                _mm256_add_epi32(_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones))
            } else {
                _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1))
            };
            _mm256_add_epi32(sum, products)
        }
    }

    #[inline(always)]
    unsafe fn dot_halves<const H: usize, const LEVELS: bool>(
        halves: [__m256i; 4],
        x: *const i8,
        coding: Registers,
    ) -> __m256i {
        unsafe {
            if H == 1 || LEVELS {
                let mut sum = Self::zeros();
                each!(half in H, {
                    sum = Self::dot(halves[half], Self::load_bytes(x.wrapping_add(half * 4 * Self::LANES)), sum, coding);
                });
                return sum;
            }
            // Two codes of four bits, or four of two, each times 128: sums of two such products fit 16 bits.
            let mut sums = _mm256_maddubs_epi16(halves[0], Self::load_bytes(x));
            each!(half in H, {
                if half > 0 {
                    let x = Self::load_bytes(x.wrapping_add(half * 4 * Self::LANES));
                    sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(halves[half], x));
                }
            });
            _mm256_madd_epi16(sums, _mm256_set1_epi16(1))
        }
    }

    #[inline(always)]
    unsafe fn to_float(value: __m256i) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(value) }
    }

    #[inline(always)]
    unsafe fn sum_whole(value: __m256i) -> i64 {
        unsafe {
            let low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(value));
            let four = _mm256_add_epi64(low, _mm256_cvtepi32_epi64(_mm256_extracti128_si256::<1>(value)));
            let two = _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256::<1>(four));
            _mm_cvtsi128_si64(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two)))
        }
    }
}
