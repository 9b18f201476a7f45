//! AVX-512 with VNNI, VBMI and GFNI: Ice Lake and Zen 4, and what came after them.

use std::arch::x86_64::*;

use half::f16;

use super::simd::{Coding, Kernel, Simd, each, level_byte, read, write};

/// AVX-512 F and BW, VNNI, VBMI and GFNI.
#[derive(Debug, Clone, Copy)]
pub struct Avx512;

/// What stays the same for a matrix.
#[derive(Clone, Copy)]
pub struct Registers {
    bits: u32,
    /// Brings the bytes of eight codes into each eight bytes.
    spread: __m512i,
    /// Where each of eight codes starts, in bits.
    starts: __m512i,
    mask: __m512i,
    flip: __m512i,
    /// What codes of up to four bits stand for; those of two bits again and again.
    values: __m512,
    /// The same as bytes.
    bytes: __m512i,
}

/// The matrix that picks the code at a place of a byte: bit i of a product is that of the matrix's byte 7 − i with the byte.
#[inline(always)]
unsafe fn picked(bits: usize, place: usize) -> __m512i {
    let (mut matrix, mut bit) = (0u64, 0);
    while bit < bits {
        matrix |= 1 << (bits * place + bit + 8 * (7 - bit));
        bit += 1;
    }
    // SAFETY: the caller's promise.
    unsafe { _mm512_set1_epi64(matrix as i64) }
}

/// The sum of the four quarters of a register.
#[inline(always)]
unsafe fn folded(value: __m512) -> __m128 {
    // SAFETY: the caller's promise.
    unsafe {
        let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(value)));
        let half = _mm256_add_ps(_mm512_castps512_ps256(value), upper);
        _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half))
    }
}

/// The lowest `count` bits.
#[inline(always)]
fn first(count: usize) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi,gfni")]
unsafe fn compiled<K: Kernel<Avx512>>(kernel: K) {
    // SAFETY: the caller's promise.
    unsafe { kernel.run() }
}

impl Simd for Avx512 {
    const NAME: &'static str = "avx512";
    const LANES: usize = 16;
    const REGISTERS: usize = 32;
    type Float = __m512;
    type Int = __m512i;
    type Coding = Registers;

    fn available() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("gfni")
    }

    unsafe fn compiled<K: Kernel<Self>>(kernel: K) {
        // SAFETY: the caller's promise.
        unsafe { compiled(kernel) }
    }

    #[inline(always)]
    unsafe fn coding(coding: &Coding) -> Registers {
        let bits = coding.bits;
        let (mut spread, mut starts, mut bytes, mut values) = ([0u8; 64], [0u8; 64], [0u8; 64], [0f32; 16]);
        let mut i = 0;
        while i < 64 {
            let place = i % 8;
            let last = bits as usize - 1;
            spread[i] = (i / 8 * bits as usize + if place < last { place } else { last }) as u8;
            starts[i] = (place * bits as usize) as u8;
            bytes[i] = match coding.levels {
                Some(levels) => level_byte(levels[i % 16]),
                None => 0,
            };
            i += 1;
        }
        i = 0;
        while i < 16 {
            values[i] = match coding.levels {
                Some(levels) => levels[i],
                None => ((i & ((1 << bits) - 1)) ^ coding.flip as usize) as f32,
            };
            i += 1;
        }
        // SAFETY: the caller's promise; each array is as long as a register.
        unsafe {
            Registers {
                bits,
                spread: _mm512_loadu_si512(spread.as_ptr().cast()),
                starts: _mm512_loadu_si512(starts.as_ptr().cast()),
                mask: _mm512_set1_epi8(((1u32 << bits) - 1) as u8 as i8),
                flip: _mm512_set1_epi8(coding.flip as i8),
                values: _mm512_loadu_ps(values.as_ptr()),
                bytes: _mm512_loadu_si512(bytes.as_ptr().cast()),
            }
        }
    }

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: the caller's promise, as in every function here.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        unsafe { read(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: __m512) {
        unsafe { write(to.cast(), value) }
    }

    #[inline(always)]
    unsafe fn load_some(from: *const f32, count: usize) -> __m512 {
        unsafe { _mm512_maskz_loadu_ps(first(count) as u16, from) }
    }

    #[inline(always)]
    unsafe fn halves(from: *const f16) -> __m512 {
        unsafe { _mm512_cvtph_ps(read(from.cast())) }
    }

    #[inline(always)]
    unsafe fn halves_some(from: *const f16, count: usize) -> __m512 {
        unsafe {
            let halves = _mm512_maskz_loadu_epi16(first(count) as u32, from.cast());
            _mm512_cvtph_ps(_mm512_castsi512_si256(halves))
        }
    }

    #[inline(always)]
    unsafe fn bytes_some(from: *const u8, count: usize) -> __m512 {
        unsafe {
            let bytes = _mm512_castsi512_si128(_mm512_maskz_loadu_epi8(first(count), from.cast()));
            _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))
        }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn fnma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fnmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn sum(value: __m512) -> f32 {
        unsafe {
            // In the order of `sums`.
            let two = _mm512_add_ps(value, _mm512_shuffle_ps::<0b01_00_11_10>(value, value));
            let one = _mm512_add_ps(two, _mm512_shuffle_ps::<0b10_11_00_01>(two, two));
            _mm_cvtss_f32(folded(one))
        }
    }

    #[inline(always)]
    unsafe fn sums([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        unsafe {
            let first = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let second = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            let (first, second) = (_mm512_castps_pd(first), _mm512_castps_pd(second));
            let all = _mm512_add_ps(
                _mm512_castpd_ps(_mm512_unpacklo_pd(first, second)),
                _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)),
            );
            let mut sums = [0f32; 4];
            write(sums.as_mut_ptr().cast(), folded(all));
            sums
        }
    }

    #[inline(always)]
    unsafe fn pick(value: __m512, places: *const u32) -> __m512 {
        unsafe { _mm512_permutexvar_ps(read(places.cast()), value) }
    }

    #[inline(always)]
    unsafe fn block<const H: usize, const FULL: bool>(from: *const u8, bytes: usize, coding: Registers) -> __m512i {
        unsafe {
            if H > 1 {
                return match FULL {
                    true => read(from.cast()),
                    false => _mm512_maskz_loadu_epi8(first(bytes), from.cast()),
                };
            }
            if coding.bits == 8 && FULL {
                return _mm512_xor_si512(read(from.cast()), coding.flip);
            }
            // Never past the block: the next row may not be there.
            let most = 8 * coding.bits as usize;
            let packed = _mm512_maskz_loadu_epi8(first(if bytes < most { bytes } else { most }), from.cast());
            let eights = _mm512_permutexvar_epi8(coding.spread, packed);
            let codes = _mm512_and_si512(_mm512_multishift_epi64_epi8(coding.starts, eights), coding.mask);
            _mm512_xor_si512(codes, coding.flip)
        }
    }

    #[inline(always)]
    unsafe fn bytes<const H: usize, const LEVELS: bool, const PLAIN: bool>(
        block: __m512i,
        half: usize,
        coding: Registers,
    ) -> __m512i {
        unsafe {
            let codes = match (H, half) {
                (1, _) => block,
                (_, 0) if PLAIN || LEVELS => _mm512_and_si512(block, coding.mask),
                // Shift, mask and flip in one, as a product with a matrix of bits.
                (2, _) if PLAIN || LEVELS => _mm512_gf2p8affine_epi64_epi8::<0>(block, picked(4, half)),
                (2, _) => _mm512_gf2p8affine_epi64_epi8::<8>(block, picked(4, half)),
                (_, _) if PLAIN || LEVELS => _mm512_gf2p8affine_epi64_epi8::<0>(block, picked(2, half)),
                (_, _) => _mm512_gf2p8affine_epi64_epi8::<2>(block, picked(2, half)),
            };
            if LEVELS { _mm512_shuffle_epi8(coding.bytes, codes) } else { codes }
        }
    }

    const IN_PLACE: bool = true;

    #[inline(always)]
    unsafe fn bytes_in_place<const H: usize>(block: __m512i, half: usize) -> __m512i {
        let mask = match H {
            1 => return block,
            2 => 0x0f << (4 * half),
            _ => 0x03 << (2 * half),
        };
        unsafe { _mm512_and_si512(block, _mm512_set1_epi8(mask as u8 as i8)) }
    }

    #[inline(always)]
    unsafe fn put_together<const H: usize>(sums: [__m512i; 4]) -> __m512i {
        // What is shifted out is 0 in every sum.
        unsafe {
            match H {
                1 => sums[0],
                2 => _mm512_add_epi32(sums[0], _mm512_srai_epi32::<4>(sums[1])),
                _ => {
                    let low = _mm512_add_epi32(sums[0], _mm512_srai_epi32::<2>(sums[1]));
                    let high = _mm512_add_epi32(_mm512_srai_epi32::<4>(sums[2]), _mm512_srai_epi32::<6>(sums[3]));
                    _mm512_add_epi32(low, high)
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn values<const H: usize, const LEVELS: bool>(block: __m512i, coding: Registers) -> __m512 {
        unsafe {
            match H {
                1 if !LEVELS => _mm512_cvtepi32_ps(_mm512_and_si512(block, _mm512_set1_epi32(255))),
                // Only the lowest four bits of a place count, and what two bits stand for is there four times.
                _ => _mm512_permutexvar_ps(block, coding.values),
            }
        }
    }

    #[inline(always)]
    unsafe fn following<const H: usize>(block: __m512i) -> __m512i {
        unsafe {
            match H {
                1 => _mm512_srli_epi32::<8>(block),
                2 => _mm512_srli_epi32::<4>(block),
                _ => _mm512_srli_epi32::<2>(block),
            }
        }
    }

    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }

    #[inline(always)]
    unsafe fn zeros() -> __m512i {
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn load_bytes(from: *const i8) -> __m512i {
        unsafe { read(from.cast()) }
    }

    #[inline(always)]
    unsafe fn write_columns(from: *const u8, to: *mut u8, stride: usize) {
        unsafe {
            let mut fours = [[Self::zeros(); 4]; 4];
            each!(a in 4, {
                let mut rows = [Self::zeros(); 4];
                each!(b in 4, {
                    rows[b] = read(from.wrapping_add(64 * (4 * a + b)));
                });
                let (low, high) = (_mm512_unpacklo_epi32(rows[0], rows[1]), _mm512_unpackhi_epi32(rows[0], rows[1]));
                let (low2, high2) = (_mm512_unpacklo_epi32(rows[2], rows[3]), _mm512_unpackhi_epi32(rows[2], rows[3]));
                // In each quarter q the four rows' lane 4q, 4q + 1, 4q + 2, 4q + 3.
                fours[a] = [
                    _mm512_unpacklo_epi64(low, low2),
                    _mm512_unpackhi_epi64(low, low2),
                    _mm512_unpacklo_epi64(high, high2),
                    _mm512_unpackhi_epi64(high, high2),
                ];
            });
            each!(j in 4, {
                let [a, b, c, d] = [fours[0][j], fours[1][j], fours[2][j], fours[3][j]];
                let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
                let (even2, odd2) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
                write(to.wrapping_add(j * stride), _mm512_shuffle_i32x4::<0x88>(even, even2));
                write(to.wrapping_add((4 + j) * stride), _mm512_shuffle_i32x4::<0x88>(odd, odd2));
                write(to.wrapping_add((8 + j) * stride), _mm512_shuffle_i32x4::<0xdd>(even, even2));
                write(to.wrapping_add((12 + j) * stride), _mm512_shuffle_i32x4::<0xdd>(odd, odd2));
            });
        }
    }

    #[inline(always)]
    unsafe fn splat_bytes(from: *const i8) -> __m512i {
        unsafe { _mm512_set1_epi32(read(from.cast())) }
    }

    #[inline(always)]
    unsafe fn dot(codes: __m512i, x: __m512i, sum: __m512i, _: Registers) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(sum, codes, x) }
    }

    #[inline(always)]
    unsafe fn dot_halves<const H: usize, const LEVELS: bool>(
        halves: [__m512i; 4],
        x: *const i8,
        coding: Registers,
    ) -> __m512i {
        unsafe {
            let mut sum = Self::zeros();
            each!(half in H, {
                sum = Self::dot(halves[half], Self::load_bytes(x.wrapping_add(half * 4 * Self::LANES)), sum, coding);
            });
            sum
        }
    }

    #[inline(always)]
    unsafe fn to_float(value: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(value) }
    }

    #[inline(always)]
    unsafe fn sum_whole(value: __m512i) -> i64 {
        unsafe {
            let low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(value));
            let high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64::<1>(value));
            _mm512_reduce_add_epi64(_mm512_add_epi64(low, high))
        }
    }
}
