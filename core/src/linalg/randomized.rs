//! The leading part of an SVD from a random sketch, at a fraction of a full one's cost.

use ndarray::{Array1, Array2, ArrayView2};

use super::decompose::{Svd, leading_svd, orthonormal};
use super::normal::normal_matrix;
use super::product::{matmul, matmul_f64};
use crate::error::{Error, Result};

/// Settings of a randomised range finder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SketchOptions {
    /// Number of random directions beyond those asked for.
    pub oversampling: usize,
    /// Number of power iterations, each a product with the matrix and its transpose: the more, the more accurate the result where
    /// singular values fall slowly.
    pub power_iterations: usize,
    /// Seed of the random directions.
    pub seed: u64,
}

impl Default for SketchOptions {
    fn default() -> Self {
        SketchOptions { oversampling: 16, power_iterations: 3, seed: 0 }
    }
}

/// A matrix known by its products alone.
pub trait LinearOperator {
    /// Returns the number of rows and of columns.
    fn shape(&self) -> (usize, usize);
    /// Returns `M · x` for `x` `[columns, n]`.
    fn apply(&self, x: ArrayView2<f64>) -> Array2<f64>;
    /// Returns `Mᵀ · x` for `x` `[rows, n]`.
    fn apply_transposed(&self, x: ArrayView2<f64>) -> Array2<f64>;
}

impl LinearOperator for ArrayView2<'_, f64> {
    fn shape(&self) -> (usize, usize) {
        self.dim()
    }

    fn apply(&self, x: ArrayView2<f64>) -> Array2<f64> {
        matmul_f64(self.reborrow(), x)
    }

    fn apply_transposed(&self, x: ArrayView2<f64>) -> Array2<f64> {
        matmul_f64(self.t(), x)
    }
}

/// Products in f32: the sketch is made orthonormal in f64 after each, so that its error does not grow.
impl LinearOperator for ArrayView2<'_, f32> {
    fn shape(&self) -> (usize, usize) {
        self.dim()
    }

    fn apply(&self, x: ArrayView2<f64>) -> Array2<f64> {
        matmul(self.reborrow(), x.mapv(|v| v as f32).view()).mapv(f64::from)
    }

    fn apply_transposed(&self, x: ArrayView2<f64>) -> Array2<f64> {
        matmul(self.t(), x.mapv(|v| v as f32).view()).mapv(f64::from)
    }
}

/// Approximates the `k` leading singular triplets by a randomised range finder with power iterations (Halko, Martinsson and
/// Tropp, 2011, algorithms 4.4 and 5.1). The same seed gives the same triplets.
///
/// # Errors
/// When `k` exceeds the smaller side, or a value is not finite.
pub fn randomized_svd(matrix: &dyn LinearOperator, k: usize, sketch: SketchOptions) -> Result<Svd> {
    let (rows, columns) = matrix.shape();
    if k > rows.min(columns) {
        let most = format!("at most {} for a {rows} × {columns} matrix", rows.min(columns));
        return Err(Error::expected("rank", k, most));
    }
    if k == 0 {
        return Ok(Svd { u: Array2::zeros((rows, 0)), s: Array1::zeros(0), vt: Array2::zeros((0, columns)) });
    }
    let width = (k + sketch.oversampling).min(rows.min(columns));
    let mut range = orthonormal(matrix.apply(normal_matrix(columns, width, sketch.seed).view()).view())?;
    for _ in 0..sketch.power_iterations {
        let back = orthonormal(matrix.apply_transposed(range.view()).view())?;
        range = orthonormal(matrix.apply(back.view()).view())?;
    }
    // (Qᵀ M)ᵀ = Mᵀ Q.
    let small = matrix.apply_transposed(range.view()).reversed_axes();
    let found = leading_svd(small.view(), k)?;
    Ok(Svd { u: matmul_f64(range.view(), found.u.view()), ..found })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::svd;
    use proptest::prelude::*;

    fn falling(rows: usize, columns: usize, seed: u64) -> Array2<f64> {
        let (mut a, b) = (normal_matrix(rows, columns, seed), normal_matrix(columns, columns, seed + 1));
        a.columns_mut().into_iter().enumerate().for_each(|(j, mut c)| c *= 1.0 / (1.0 + j as f64).sqrt());
        a.dot(&b)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// What is left after the leading part is within 1 % of what the full SVD leaves.
        #[test]
        fn leaves_no_more_than_the_full_svd(rows in 20usize..90, columns in 20usize..90, k in 0usize..9, seed in 0u64..999) {
            let matrix = falling(rows, columns, seed);
            let left = |found: &Svd| (&matrix - &(&found.u * &found.s).dot(&found.vt)).mapv(|v| v * v).sum().sqrt();
            let full = svd(matrix.view()).unwrap().truncated(k);
            let found = randomized_svd(&matrix.view(), k, SketchOptions::default()).unwrap();
            prop_assert!(left(&found) <= 1.01 * left(&full), "{} {}", left(&found), left(&full));
            let narrow = matrix.mapv(|v| v as f32);
            let in_f32 = randomized_svd(&narrow.view(), k, SketchOptions::default()).unwrap();
            prop_assert!(left(&in_f32) <= 1.01 * left(&full));
            prop_assert!(found.s.iter().zip(&full.s).all(|(a, b)| (a - b).abs() <= 0.02 * b));
            let again = randomized_svd(&matrix.view(), k, SketchOptions::default()).unwrap();
            prop_assert_eq!(again.vt, found.vt);
        }
    }

    #[test]
    fn bad_requests_are_refused() {
        let matrix = Array2::<f64>::eye(3);
        assert!(
            randomized_svd(&matrix.view(), 4, SketchOptions::default()).unwrap_err().to_string().contains("at most 3")
        );
        let nan = Array2::from_elem((3, 3), f64::NAN);
        assert!(randomized_svd(&nan.view(), 1, SketchOptions::default()).is_err());
        let zero = Array2::<f64>::zeros((4, 3));
        assert!(randomized_svd(&zero.view(), 2, SketchOptions::default()).unwrap().s.iter().all(|s| *s == 0.0));
    }
}
