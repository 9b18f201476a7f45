//! Nearest codewords of many vectors.

use ndarray::{Array1, Array2, ArrayView2, s};

use crate::linalg::{product_into, unit_of_f32};

/// Vectors at a time.
const BLOCK: usize = 128;

/// The nearest row of `words` `[codes, dim]` to each of `x`, the first of equally near ones, by ‖c‖² − 2⟨x, c⟩.
pub fn nearest_rows(words: ArrayView2<f32>, x: ArrayView2<f32>, codes: &mut [u32]) {
    if let Some(unit) = unit_of_f32(words.iter()) {
        // In units in which f32 holds the words' squares.
        let (words, x) = (&words * (1.0 / unit), &x * (1.0 / unit));
        return nearest_rows(words.view(), x.view(), codes);
    }
    let norms: Array1<f32> = words.rows().into_iter().map(|word| word.dot(&word)).collect();
    let mut products = Array2::<f32>::zeros((BLOCK.min(x.nrows()), words.nrows()));
    for (block, codes) in codes.chunks_mut(BLOCK).enumerate() {
        let x = x.slice(s![block * BLOCK..block * BLOCK + codes.len(), ..]);
        let mut products = products.slice_mut(s![..codes.len(), ..]);
        product_into(products.view_mut(), x, words.reversed_axes(), -2.0, false);
        for (code, mut row) in codes.iter_mut().zip(products.rows_mut()) {
            row += &norms;
            *code = first_least(row.as_slice().expect("rows of an owned array are contiguous"));
        }
    }
}

/// Where the first of the smallest numbers is.
fn first_least(numbers: &[f32]) -> u32 {
    // Sixteen at a time: one would wait for itself.
    let (lines, rest) = numbers.as_chunks::<16>();
    let mut least = [f32::INFINITY; 16];
    for line in lines {
        least.iter_mut().zip(line).for_each(|(least, number)| *least = if number < least { *number } else { *least });
    }
    let least = least.iter().chain(rest).fold(f32::INFINITY, |least, number| least.min(*number));
    numbers.iter().position(|number| *number == least).unwrap_or(0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// As near as the nearest by the definition; the same one where numbers are small and whole.
        #[test]
        fn nearest_by_definition(rows in 1usize..200, codes in 1usize..40, width in 1usize..20, seed in any::<u64>()) {
            let whole = |i: usize, j: usize, salt: u64| {
                let mixed = (seed ^ salt).wrapping_add((i * 131 + j) as u64).wrapping_mul(6_364_136_223_846_793_005);
                (mixed >> 60) as f32 - 8.0
            };
            let words = Array2::from_shape_fn((codes, width), |(i, j)| whole(i, j, 1));
            let x = Array2::from_shape_fn((rows, width), |(i, j)| whole(i, j, 2));
            let mut found = vec![u32::MAX; rows];
            nearest_rows(words.view(), x.view(), &mut found);
            for (row, found) in x.rows().into_iter().zip(found) {
                let distance = |word: ndarray::ArrayView1<f32>| (&word - &row).mapv(|d| d * d).sum();
                let distances: Vec<f32> = words.rows().into_iter().map(distance).collect();
                let least = distances.iter().copied().fold(f32::INFINITY, f32::min);
                prop_assert_eq!(found as usize, distances.iter().position(|d| *d == least).unwrap());
            }
        }
    }
}
