//! Products of a vector with rows of numbers in few bits, eight lanes at a time where the machine has them.
//!
//! Rows are contiguous and of one length. [`dots`] is one inner product a row, [`accumulate`] a weighted sum of some of
//! them. Each has a portable form, which is also the reference that the tests hold the fast one to.

use half::{bf16, f16};

/// A number that rows are made of.
pub trait Element: Copy + Send + Sync {
    /// Its value, before a row's scale.
    fn value(self) -> f32;
    /// Eight of them.
    ///
    /// # Safety
    /// `from` has eight elements, and the machine has AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn eight(from: *const Self) -> std::arch::x86_64::__m256;
}

impl Element for f32 {
    fn value(self) -> f32 {
        self
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn eight(from: *const f32) -> std::arch::x86_64::__m256 {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm256_loadu_ps(from) }
    }
}

impl Element for f16 {
    fn value(self) -> f32 {
        self.to_f32()
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn eight(from: *const f16) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps};
        // SAFETY: the caller's promise; an f16 is its 16 bits.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
}

impl Element for bf16 {
    fn value(self) -> f32 {
        self.to_f32()
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn eight(from: *const bf16) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::{_mm_loadu_si128, _mm256_castsi256_ps, _mm256_cvtepu16_epi32, _mm256_slli_epi32};
        // SAFETY: the caller's promise; a bf16 is the upper half of a float.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())))) }
    }
}

impl Element for i8 {
    fn value(self) -> f32 {
        f32::from(self)
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn eight(from: *const i8) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::{_mm_loadl_epi64, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps};
        // SAFETY: the caller's promise.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
    }
}

/// `out[i] = ⟨row i, x⟩` for `rows` of `x.len()` elements each.
///
/// # Panics
/// When the lengths do not fit.
pub fn dots<T: Element>(rows: &[T], x: &[f32], out: &mut [f32]) {
    assert_eq!(rows.len(), x.len() * out.len(), "elements of rows");
    #[cfg(target_arch = "x86_64")]
    if x86::available() {
        // SAFETY: the features are there.
        return unsafe { x86::dots(rows, x, out) };
    }
    portable::dots(rows, x, out);
}

/// `y += Σ weight · row[start..]`, over pairs of a row's number and its weight, for rows of `width` elements: as many of
/// each as `y` has.
///
/// # Panics
/// When a row is not there, or is shorter than that.
pub fn accumulate<T: Element>(rows: &[T], width: usize, start: usize, picks: &[(u32, f32)], y: &mut [f32]) {
    let count = rows.len().checked_div(width).unwrap_or(0);
    assert!(start + y.len() <= width, "columns that are not there");
    assert!(y.is_empty() || picks.iter().all(|&(row, _)| (row as usize) < count), "a row that is not there");
    #[cfg(target_arch = "x86_64")]
    if x86::available() {
        // SAFETY: the features are there.
        return unsafe { x86::accumulate(rows, width, start, picks, y) };
    }
    portable::accumulate(rows, width, start, picks, y);
}

/// Sixteen numbers of a row, within one line of a cache.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub struct Line(pub [f32; 16]);

/// Sixteen numbers of each row of `width`, from the `start`th on, or what is left of them, as floats.
///
/// # Panics
/// When there are not as many lines as rows.
pub fn lines_of<T: Element>(rows: &[T], width: usize, start: usize, lines: &mut [Line]) {
    assert!(start < width && rows.len() == width * lines.len(), "lines of rows");
    #[cfg(target_arch = "x86_64")]
    if x86::available() && width - start >= 16 {
        // SAFETY: the features are there, and sixteen numbers of each row.
        return unsafe { x86::lines_of(rows, width, start, lines) };
    }
    portable::lines_of(rows, width, start, lines);
}

/// `y[q] = Σ weight · line`, over the pairs `picks[q]` of a line's number and its weight.
///
/// # Safety
/// Every line that is picked is there, and `y` is as long as `picks`.
pub unsafe fn sum_lines(lines: &[Line], picks: &[Vec<(u32, f32)>], y: &mut [Line]) {
    #[cfg(target_arch = "x86_64")]
    if x86::available() {
        // SAFETY: the features are there, and the caller's promise.
        return unsafe { x86::sum_lines(lines, picks, y) };
    }
    portable::sum_lines(lines, picks, y);
}

/// `out = numbers`, as floats.
///
/// # Panics
/// When the lengths differ.
pub fn widen<T: Element>(numbers: &[T], out: &mut [f32]) {
    assert_eq!(numbers.len(), out.len(), "numbers to widen");
    #[cfg(target_arch = "x86_64")]
    if x86::available() {
        // SAFETY: the features are there.
        return unsafe { x86::widen(numbers, out) };
    }
    portable::widen(numbers, out);
}

mod portable {
    use super::{Element, Line};

    pub fn lines_of<T: Element>(rows: &[T], width: usize, start: usize, lines: &mut [Line]) {
        for (line, row) in lines.iter_mut().zip(rows.chunks_exact(width)) {
            line.0.iter_mut().zip(&row[start..]).for_each(|(to, from)| *to = from.value());
        }
    }

    pub fn sum_lines(lines: &[Line], picks: &[Vec<(u32, f32)>], y: &mut [Line]) {
        for (y, picks) in y.iter_mut().zip(picks) {
            y.0 = [0.0; 16];
            for &(line, weight) in picks {
                y.0.iter_mut().zip(&lines[line as usize].0).for_each(|(y, v)| *y += weight * v);
            }
        }
    }

    pub fn dots<T: Element>(rows: &[T], x: &[f32], out: &mut [f32]) {
        for (i, out) in out.iter_mut().enumerate() {
            let row = &rows[i * x.len()..(i + 1) * x.len()];
            *out = row.iter().zip(x).map(|(a, b)| a.value() * b).sum();
        }
    }

    pub fn widen<T: Element>(numbers: &[T], out: &mut [f32]) {
        out.iter_mut().zip(numbers).for_each(|(o, v)| *o = v.value());
    }

    pub fn accumulate<T: Element>(rows: &[T], width: usize, start: usize, picks: &[(u32, f32)], y: &mut [f32]) {
        for &(row, weight) in picks {
            let row = &rows[row as usize * width + start..][..y.len()];
            y.iter_mut().zip(row).for_each(|(y, v)| *y += weight * v.value());
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Element, Line};

    pub fn available() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn sum(lanes: __m256) -> f32 {
        let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn dots<T: Element>(rows: &[T], x: &[f32], out: &mut [f32]) {
        let n = x.len();
        let whole = n - n % 32;
        let eights = n - n % 8;
        for (i, out) in out.iter_mut().enumerate() {
            let row = &rows[i * n..(i + 1) * n];
            let mut sums = [_mm256_setzero_ps(); 4];
            // SAFETY: every eight lie below `n`, the length of both.
            unsafe {
                for at in (0..whole).step_by(32) {
                    for (lane, sum) in sums.iter_mut().enumerate() {
                        let (a, b) = (row.as_ptr().add(at + 8 * lane), x.as_ptr().add(at + 8 * lane));
                        *sum = _mm256_fmadd_ps(T::eight(a), _mm256_loadu_ps(b), *sum);
                    }
                }
                for at in (whole..eights).step_by(8) {
                    let (a, b) = (row.as_ptr().add(at), x.as_ptr().add(at));
                    sums[0] = _mm256_fmadd_ps(T::eight(a), _mm256_loadu_ps(b), sums[0]);
                }
            }
            let lanes = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
            let rest: f32 = row[eights..].iter().zip(&x[eights..]).map(|(a, b)| a.value() * b).sum();
            *out = sum(lanes) + rest;
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn widen<T: Element>(numbers: &[T], out: &mut [f32]) {
        let eights = numbers.len() - numbers.len() % 8;
        for at in (0..eights).step_by(8) {
            // SAFETY: every eight lie below the length of both.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(at), T::eight(numbers.as_ptr().add(at))) }
        }
        out[eights..].iter_mut().zip(&numbers[eights..]).for_each(|(o, v)| *o = v.value());
    }

    /// What the next two calls read is asked for ahead: rows lie too far apart for the machine to guess.
    ///
    /// # Safety
    /// Every row has sixteen numbers from `start` on.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn lines_of<T: Element>(rows: &[T], width: usize, start: usize, lines: &mut [Line]) {
        let mut from = rows.as_ptr().wrapping_add(start);
        for line in lines {
            // SAFETY: sixteen numbers are there, and what is only prefetched need not be.
            unsafe {
                _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(32).cast());
                _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(48).cast());
                _mm256_store_ps(line.0.as_mut_ptr(), T::eight(from));
                _mm256_store_ps(line.0.as_mut_ptr().add(8), T::eight(from.add(8)));
            }
            from = from.wrapping_add(width);
        }
    }

    /// Eight sums at a time stay in registers: none waits for the one before.
    ///
    /// # Safety
    /// As [`super::sum_lines`].
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn sum_lines(lines: &[Line], picks: &[Vec<(u32, f32)>], y: &mut [Line]) {
        let lines = lines.as_ptr();
        for (y, picks) in y.iter_mut().zip(picks) {
            let mut low = [_mm256_setzero_ps(); 4];
            let mut high = low;
            let (fours, rest) = picks.as_chunks::<4>();
            for picks in fours {
                for i in 0..4 {
                    let weight = _mm256_set1_ps(picks[i].1);
                    // SAFETY: the line is there, and is of two times eight numbers.
                    unsafe {
                        let line = lines.add(picks[i].0 as usize).cast::<f32>();
                        low[i] = _mm256_fmadd_ps(_mm256_load_ps(line), weight, low[i]);
                        high[i] = _mm256_fmadd_ps(_mm256_load_ps(line.add(8)), weight, high[i]);
                    }
                }
            }
            for &(line, weight) in rest {
                let weight = _mm256_set1_ps(weight);
                // SAFETY: as above.
                unsafe {
                    let line = lines.add(line as usize).cast::<f32>();
                    low[0] = _mm256_fmadd_ps(_mm256_load_ps(line), weight, low[0]);
                    high[0] = _mm256_fmadd_ps(_mm256_load_ps(line.add(8)), weight, high[0]);
                }
            }
            let all = |s: [__m256; 4]| _mm256_add_ps(_mm256_add_ps(s[0], s[1]), _mm256_add_ps(s[2], s[3]));
            // SAFETY: `y` is of two times eight numbers.
            unsafe {
                _mm256_store_ps(y.0.as_mut_ptr(), all(low));
                _mm256_store_ps(y.0.as_mut_ptr().add(8), all(high));
            }
        }
    }

    /// Four rows at a time, so that `y` is read and written a quarter as often.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn accumulate<T: Element>(rows: &[T], width: usize, start: usize, picks: &[(u32, f32)], y: &mut [f32]) {
        // Many rows at a time: `y` is read and written once for all of them.
        let (eights, rest) = picks.as_chunks::<8>();
        let (fours, rest) = rest.as_chunks::<4>();
        let (ones, _) = rest.as_chunks::<1>();
        for picks in eights {
            add(rows, width, start, picks, y);
        }
        for picks in fours {
            add(rows, width, start, picks, y);
        }
        for picks in ones {
            add(rows, width, start, picks, y);
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn add<T: Element, const N: usize>(rows: &[T], width: usize, start: usize, picks: &[(u32, f32); N], y: &mut [f32]) {
        let n = y.len();
        let eights = n - n % 8;
        let starts = picks.map(|(row, _)| &rows[row as usize * width + start..][..n]);
        let weights = picks.map(|(_, weight)| _mm256_set1_ps(weight));
        for at in (0..eights).step_by(8) {
            // SAFETY: every eight lie below `n`, the length of each row's part and of `y`.
            unsafe {
                let mut lanes = _mm256_loadu_ps(y.as_ptr().add(at));
                for (row, weight) in starts.iter().zip(&weights) {
                    lanes = _mm256_fmadd_ps(T::eight(row.as_ptr().add(at)), *weight, lanes);
                }
                _mm256_storeu_ps(y.as_mut_ptr().add(at), lanes);
            }
        }
        for at in eights..n {
            y[at] += picks.iter().zip(&starts).map(|((_, weight), row)| weight * row[at].value()).sum::<f32>();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn agree<T: Element>(elements: &[T], width: usize, x: &[f32], picks: &[(u32, f32)]) -> Result<(), TestCaseError> {
        let rows = elements.len() / width;
        let rows_of = &elements[..rows * width];
        let size = rows_of.iter().map(|v| v.value().abs()).fold(1f32, f32::max) * width as f32;
        let (mut fast, mut slow) = (vec![0f32; rows], vec![0f32; rows]);
        dots(rows_of, x, &mut fast);
        portable::dots(rows_of, x, &mut slow);
        prop_assert!(fast.iter().zip(&slow).all(|(a, b)| (a - b).abs() <= 1e-5 * size), "{:?} {:?}", fast, slow);
        let (mut fast, mut slow) = (vec![0f32; rows_of.len()], vec![0f32; rows_of.len()]);
        widen(rows_of, &mut fast);
        portable::widen(rows_of, &mut slow);
        prop_assert_eq!(fast, slow);
        let picks: Vec<(u32, f32)> = picks.iter().map(|&(row, weight)| (row % rows as u32, weight)).collect();
        let size = size * picks.len().max(1) as f32;
        let lines: Vec<Line> =
            (0..rows).map(|row| Line(std::array::from_fn(|i| rows_of[row * width + i % width].value()))).collect();
        let batch = vec![picks.clone(), vec![], picks.iter().rev().copied().collect()];
        let (mut fast, mut slow) = (vec![Line([7.0; 16]); 3], vec![Line([7.0; 16]); 3]);
        // SAFETY: picks are taken modulo `rows`.
        unsafe { sum_lines(&lines, &batch, &mut fast) };
        portable::sum_lines(&lines, &batch, &mut slow);
        let pairs = fast.iter().zip(&slow).flat_map(|(fast, slow)| fast.0.iter().zip(&slow.0));
        prop_assert!(pairs.clone().all(|(a, b)| (a - b).abs() <= 1e-5 * size), "{:?}", pairs.collect::<Vec<_>>());
        // Whole rows, and a part of each.
        for part in [0..width, width / 3..width - width / 4] {
            let (mut fast, mut slow) = (x[part.clone()].to_vec(), x[part.clone()].to_vec());
            accumulate(rows_of, width, part.start, &picks, &mut fast);
            portable::accumulate(rows_of, width, part.start, &picks, &mut slow);
            prop_assert!(fast.iter().zip(&slow).all(|(a, b)| (a - b).abs() <= 1e-5 * size), "{:?} {:?}", fast, slow);
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn fast_and_portable_agree(
            width in 1usize..80,
            bytes in proptest::collection::vec(any::<i8>(), 80..700),
            picks in proptest::collection::vec((0u32..50, -1f32..1.0), 0..11),
            seed in 0u32..100,
        ) {
            let x: Vec<f32> = (0..width).map(|i| ((i as u32 * 37 + seed) % 19) as f32 / 9.0 - 1.0).collect();
            agree(&bytes, width, &x, &picks)?;
            let halves: Vec<f16> = bytes.iter().map(|&b| f16::from_f32(f32::from(b) / 7.0)).collect();
            agree(&halves, width, &x, &picks)?;
            let brains: Vec<bf16> = bytes.iter().map(|&b| bf16::from_f32(f32::from(b) / 7.0)).collect();
            agree(&brains, width, &x, &picks)?;
            let floats: Vec<f32> = bytes.iter().map(|&b| f32::from(b) / 7.0).collect();
            agree(&floats, width, &x, &picks)?;
        }
    }

    #[test]
    fn nothing_at_all() {
        dots::<i8>(&[], &[], &mut []);
        accumulate::<i8>(&[], 0, 0, &[], &mut []);
        let mut y = [1.0, 2.0];
        accumulate::<f32>(&[], 2, 0, &[], &mut y);
        assert_eq!(y, [1.0, 2.0]);
    }
}
