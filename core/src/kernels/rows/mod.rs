//! Inner products and sums of rows of numbers: floats, half floats and bytes.
//!
//! Rows are contiguous and of one length. [`dots`] is one inner product a row, [`accumulate`] a weighted sum of some of them.
//! Each has a portable form, which is also the reference that the tests hold the fast one to.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod element;
mod portable;

use bytemuck::Pod;

pub use element::{Element, Line, SparseRow};

/// Computes `out[i] = ⟨row i, x⟩` for `rows` of `x.len()` elements each.
///
/// # Panics
/// When the lengths do not fit.
pub fn dots<T: Element>(rows: &[T], x: &[f32], out: &mut [f32]) {
    assert_eq!(Some(rows.len()), x.len().checked_mul(out.len()), "elements of rows");
    #[cfg(target_arch = "x86_64")]
    if avx2::available() {
        // SAFETY: the features are there, and so many rows.
        return unsafe { avx2::dots(rows, x, out) };
    }
    portable::dots(rows, x, out);
}

/// Computes `y += Σ weight · row[start..]`, over pairs of a row's number and its weight, for rows of `width` elements: as many of
/// each as `y` has.
///
/// # Panics
/// When a row is not there, or is shorter than that.
pub fn accumulate<T: Element>(rows: &[T], width: usize, start: usize, weights: &SparseRow, y: &mut [f32]) {
    let count = rows.len().checked_div(width).unwrap_or(0);
    assert!(start <= width && y.len() <= width - start, "columns that are not there");
    assert!(y.is_empty() || weights.iter().all(|&(row, _)| (row as usize) < count), "a row that is not there");
    #[cfg(target_arch = "x86_64")]
    if avx2::available() && !y.is_empty() {
        // SAFETY: the features are there, and so are the rows and their columns.
        return unsafe { avx2::accumulate(rows, width, start, weights, y) };
    }
    portable::accumulate(rows, width, start, weights, y);
}

/// Copies sixteen numbers of each row of `width`, from the `start`th on, or what is left of them, as floats.
///
/// # Panics
/// When there are not as many lines as rows.
pub fn lines_of<T: Element>(rows: &[T], width: usize, start: usize, lines: &mut [Line]) {
    assert!(start < width && Some(rows.len()) == width.checked_mul(lines.len()), "lines of rows");
    #[cfg(target_arch = "x86_64")]
    if avx2::available() && width - start >= 16 {
        // SAFETY: the features are there, and sixteen numbers of each row.
        return unsafe { avx2::lines_of(rows, width, start, lines) };
    }
    portable::lines_of(rows, width, start, lines);
}

/// Computes `y[q] = Σ weight · line`, over the pairs `weights[q]` of a line's number and its weight.
///
/// # Safety
/// Every line that is named is there, and `y` is as long as `weights`.
pub unsafe fn sum_lines(lines: &[Line], weights: &[Vec<(u32, f32)>], y: &mut [Line]) {
    #[cfg(target_arch = "x86_64")]
    if avx2::available() {
        // SAFETY: the features are there, and the caller's promise.
        return unsafe { avx2::sum_lines(lines, weights, y) };
    }
    portable::sum_lines(lines, weights, y);
}

/// Writes numbers as floats.
///
/// # Panics
/// When the lengths differ.
pub fn widen<T: Element>(numbers: &[T], out: &mut [f32]) {
    assert_eq!(numbers.len(), out.len(), "numbers to widen");
    #[cfg(target_arch = "x86_64")]
    if avx2::available() {
        // SAFETY: the features are there, and the lengths are equal.
        return unsafe { avx2::widen(numbers, out) };
    }
    portable::widen(numbers, out);
}

/// Writes numbers that lie in bytes, wherever those begin, as floats.
///
/// # Panics
/// When the lengths differ.
pub fn widen_bytes<T: Element + Pod>(bytes: &[u8], out: &mut [f32]) {
    assert_eq!(Some(bytes.len()), out.len().checked_mul(size_of::<T>()), "bytes of numbers to widen");
    match bytemuck::try_cast_slice(bytes) {
        Ok(numbers) => widen::<T>(numbers, out),
        Err(_) => {
            let numbers = bytes.chunks_exact(size_of::<T>());
            out.iter_mut().zip(numbers).for_each(|(o, b)| *o = bytemuck::pod_read_unaligned::<T>(b).value());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};
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
