//! Rows of a matrix by their numbers.

use ndarray::{Array2, ArrayView2};

/// Returns the rows of `matrix` that `numbers` name, in their order.
///
/// # Panics
/// When there is no row of a number.
pub(super) fn gather_rows(matrix: ArrayView2<f32>, numbers: &[u32]) -> Array2<f32> {
    let mut rows = Array2::zeros((numbers.len(), matrix.ncols()));
    rows.rows_mut().into_iter().zip(numbers).for_each(|(mut row, &number)| row.assign(&matrix.row(number as usize)));
    rows
}
