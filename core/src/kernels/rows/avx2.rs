//! Sums over rows with AVX2, FMA and F16C, eight lanes at a time.
//!
//! Loops are straight code, as in [`crate::kernels::simd`].

use std::arch::x86_64::*;

use super::element::{Element, Line, SparseRow};
use crate::kernels::simd::{each, read, write};

/// Returns whether the processor has the instructions.
pub fn available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// The sum of the lanes.
#[inline(always)]
unsafe fn sum(lanes: __m256) -> f32 {
    // SAFETY: the caller has AVX2.
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
}

/// The sum of four registers.
#[inline(always)]
unsafe fn all(s: [__m256; 4]) -> __m256 {
    // SAFETY: the caller has AVX2.
    unsafe { _mm256_add_ps(_mm256_add_ps(s[0], s[1]), _mm256_add_ps(s[2], s[3])) }
}

/// See [`super::dots`].
///
/// # Safety
/// The processor has the instructions, and there are `x.len() · out.len()` elements.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn dots<T: Element>(rows: &[T], x: &[f32], out: &mut [f32]) {
    let (n, count) = (x.len(), out.len());
    let (whole, eights) = (n - n % 32, n - n % 8);
    let (mut row, x, out) = (rows.as_ptr(), x.as_ptr(), out.as_mut_ptr());
    let mut i = 0;
    while i < count {
        // SAFETY: every eight lie below `n`, the length of both.
        unsafe {
            let mut sums = [_mm256_setzero_ps(); 4];
            let mut at = 0;
            while at < whole {
                each!(lane in 4, {
                    let (a, b) = (row.wrapping_add(at + 8 * lane), x.wrapping_add(at + 8 * lane));
                    sums[lane] = _mm256_fmadd_ps(T::eight(a), read(b.cast()), sums[lane]);
                });
                at += 32;
            }
            while at < eights {
                sums[0] = _mm256_fmadd_ps(T::eight(row.wrapping_add(at)), read(x.wrapping_add(at).cast()), sums[0]);
                at += 8;
            }
            let mut rest = -0f32;
            while at < n {
                rest += read::<T>(row.wrapping_add(at).cast()).value() * read::<f32>(x.wrapping_add(at).cast());
                at += 1;
            }
            *out.wrapping_add(i) = sum(all(sums)) + rest;
            row = row.wrapping_add(n);
        }
        i += 1;
    }
}

/// See [`super::widen`].
///
/// # Safety
/// The processor has the instructions, and the lengths are equal.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn widen<T: Element>(numbers: &[T], out: &mut [f32]) {
    let n = numbers.len();
    let eights = n - n % 8;
    let (from, to) = (numbers.as_ptr(), out.as_mut_ptr());
    let mut at = 0;
    // SAFETY: every eight lie below the length of both.
    unsafe {
        while at < eights {
            write(to.wrapping_add(at).cast(), T::eight(from.wrapping_add(at)));
            at += 8;
        }
        while at < n {
            *to.wrapping_add(at) = (*from.wrapping_add(at)).value();
            at += 1;
        }
    }
}

/// See [`super::lines_of`]. What the next two calls read is asked for ahead: rows lie too far apart for the processor to guess.
///
/// # Safety
/// The processor has the instructions, and there are as many rows as lines, with sixteen numbers from `start` on.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn lines_of<T: Element>(rows: &[T], width: usize, start: usize, lines: &mut [Line]) {
    let (mut from, mut i) = (rows.as_ptr().wrapping_add(start), 0);
    let (to, count) = (lines.as_mut_ptr().cast::<f32>(), lines.len());
    while i < count {
        // SAFETY: sixteen numbers are there, and what is only prefetched need not be.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(32).cast());
            _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(48).cast());
            write(to.wrapping_add(16 * i).cast(), T::eight(from));
            write(to.wrapping_add(16 * i + 8).cast(), T::eight(from.wrapping_add(8)));
        }
        from = from.wrapping_add(width);
        i += 1;
    }
}

/// See [`super::sum_lines`]. Eight sums at a time stay in registers: none waits for the one before.
///
/// # Safety
/// The processor has the instructions; and as [`super::sum_lines`].
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn sum_lines(lines: &[Line], weights: &[Vec<(u32, f32)>], y: &mut [Line]) {
    let (lines, y) = (lines.as_ptr(), y.as_mut_ptr().cast::<f32>());
    let mut q = 0;
    while q < weights.len() {
        // SAFETY: the lines are there, each of two times eight numbers, and `y` has one for each list.
        unsafe {
            let weights = &*weights.as_ptr().wrapping_add(q);
            let (pairs, count) = (weights.as_ptr(), weights.len());
            let mut low = [_mm256_setzero_ps(); 4];
            let mut high = low;
            let mut i = 0;
            while i + 4 <= count {
                each!(lane in 4, {
                    let (number, weight) = *pairs.wrapping_add(i + lane);
                    let (line, weight) = (lines.wrapping_add(number as usize).cast::<f32>(), _mm256_set1_ps(weight));
                    low[lane] = _mm256_fmadd_ps(read(line.cast()), weight, low[lane]);
                    high[lane] = _mm256_fmadd_ps(read(line.wrapping_add(8).cast()), weight, high[lane]);
                });
                i += 4;
            }
            while i < count {
                let (number, weight) = *pairs.wrapping_add(i);
                let (line, weight) = (lines.wrapping_add(number as usize).cast::<f32>(), _mm256_set1_ps(weight));
                low[0] = _mm256_fmadd_ps(read(line.cast()), weight, low[0]);
                high[0] = _mm256_fmadd_ps(read(line.wrapping_add(8).cast()), weight, high[0]);
                i += 1;
            }
            write(y.wrapping_add(16 * q).cast(), all(low));
            write(y.wrapping_add(16 * q + 8).cast(), all(high));
        }
        q += 1;
    }
}

/// See [`super::accumulate`]. Many rows at a time: `y` is read and written once for all of them.
///
/// # Safety
/// The processor has the instructions, and the rows are there, with as many numbers from `start` on as `y` has.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn accumulate<T: Element>(rows: &[T], width: usize, start: usize, weights: &SparseRow, y: &mut [f32]) {
    let (rows, count) = (rows.as_ptr().wrapping_add(start), weights.len());
    let mut i = 0;
    // SAFETY: the caller's promise.
    unsafe {
        while i + 8 <= count {
            add::<T, 8>(rows, width, weights.as_ptr().wrapping_add(i), y);
            i += 8;
        }
        while i + 4 <= count {
            add::<T, 4>(rows, width, weights.as_ptr().wrapping_add(i), y);
            i += 4;
        }
        while i < count {
            add::<T, 1>(rows, width, weights.as_ptr().wrapping_add(i), y);
            i += 1;
        }
    }
}

/// Adds `N` rows, 1, 4 or 8.
#[inline(always)]
unsafe fn add<T: Element, const N: usize>(rows: *const T, width: usize, pairs: *const (u32, f32), y: &mut [f32]) {
    let (n, y) = (y.len(), y.as_mut_ptr());
    let eights = n - n % 8;
    // SAFETY: every eight lie below `n`, the length of each row's part and of `y`.
    unsafe {
        let (mut from, mut weights) = ([rows; N], [0f32; N]);
        each!(four in N.div_ceil(4), {
            each!(one in 4, {
                let i = 4 * four + one;
                if i < N {
                    from[i] = rows.wrapping_add((*pairs.wrapping_add(i)).0 as usize * width);
                    weights[i] = (*pairs.wrapping_add(i)).1;
                }
            });
        });
        let mut at = 0;
        while at < eights {
            let mut lanes = read(y.wrapping_add(at).cast());
            each!(four in N.div_ceil(4), {
                each!(one in 4, {
                    let i = 4 * four + one;
                    if i < N {
                        lanes = _mm256_fmadd_ps(T::eight(from[i].wrapping_add(at)), _mm256_set1_ps(weights[i]), lanes);
                    }
                });
            });
            write(y.wrapping_add(at).cast(), lanes);
            at += 8;
        }
        while at < n {
            let mut sum = -0f32;
            each!(four in N.div_ceil(4), {
                each!(one in 4, {
                    let i = 4 * four + one;
                    if i < N {
                        sum += weights[i] * (*from[i].wrapping_add(at)).value();
                    }
                });
            });
            *y.wrapping_add(at) += sum;
            at += 1;
        }
    }
}
