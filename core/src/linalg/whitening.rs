//! Coordinates in which inputs have unit covariance.

use ndarray::{Array1, Array2, ArrayView2, Axis};

use super::decompose::{cholesky, solve_lower};
use super::product::matmul_f64;
use crate::error::{Error, Result};

/// The whitening of inputs with covariance R = L Lᵀ: a query x becomes z = L⁻¹ x, a key k becomes Lᵀ k, and their inner
/// product stays what it was.
///
/// AXL multiplies keys by L⁻ᵀ instead, which does not keep it.
#[derive(Debug, Clone)]
pub struct Whitening {
    factor: Array2<f64>,
}

impl Whitening {
    /// Makes the whitening of a covariance `[n, n]`.
    ///
    /// # Errors
    /// When it is not symmetric positive definite.
    pub fn new(covariance: ArrayView2<f64>) -> Result<Self> {
        Ok(Whitening { factor: cholesky(covariance)? })
    }

    /// Returns L `[n, n]`, lower triangular.
    pub fn factor(&self) -> ArrayView2<'_, f64> {
        self.factor.view()
    }

    /// Returns keys `[keys, n]` as unit vectors in whitened coordinates, and their lengths there `[keys]`. A key of
    /// length 0 stays 0.
    ///
    /// # Errors
    /// When the keys' length is another.
    pub fn keys(&self, keys: ArrayView2<f64>) -> Result<(Array2<f64>, Array1<f64>)> {
        self.check("keys", keys)?;
        let mut whitened = matmul_f64(keys, self.factor.view());
        let scales = whitened.map_axis(Axis(1), |k| k.dot(&k).sqrt());
        for (mut key, &scale) in whitened.rows_mut().into_iter().zip(&scales) {
            if scale > 0.0 {
                key /= scale;
            }
        }
        Ok((whitened, scales))
    }

    /// Returns queries `[batch, n]` in whitened coordinates.
    ///
    /// # Errors
    /// When the queries' length is another.
    pub fn queries(&self, queries: ArrayView2<f64>) -> Result<Array2<f64>> {
        self.check("queries", queries)?;
        Ok(solve_lower(self.factor.view(), queries.t()).reversed_axes().as_standard_layout().to_owned())
    }

    fn check(&self, what: &str, rows: ArrayView2<f64>) -> Result<()> {
        let n = self.factor.nrows();
        if rows.ncols() != n {
            return Err(Error::expected(format!("width of the {what} to whiten"), rows.ncols(), n));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn inner_products_are_kept(n in 1usize..6, keys in 0usize..5, seed in 0u32..1000) {
            let cell = |i: usize, j: usize, s: u32| (f64::from((i * 31 + j * 17) as u32 % 13 + s % 7) - 9.0) / 5.0;
            let a = Array2::from_shape_fn((n, n), |(i, j)| cell(i, j, seed));
            let covariance = matmul_f64(a.view(), a.t()) + Array2::<f64>::eye(n);
            let whitening = Whitening::new(covariance.view()).unwrap();
            let k = Array2::from_shape_fn((keys, n), |(i, j)| cell(j, i, seed + 1));
            let x = Array2::from_shape_fn((3, n), |(i, j)| cell(i, j, seed + 2));
            let (unit, scales) = whitening.keys(k.view()).unwrap();
            let z = whitening.queries(x.view()).unwrap();
            let scores = matmul_f64(z.view(), unit.t()) * &scales;
            let plain = matmul_f64(x.view(), k.t());
            prop_assert!((scores - plain).iter().all(|d| d.abs() < 1e-9));
        }
    }

    #[test]
    fn other_widths_are_refused() {
        let whitening = Whitening::new(Array2::eye(3).view()).unwrap();
        assert!(whitening.keys(Array2::zeros((2, 4)).view()).is_err());
        assert!(whitening.queries(Array2::zeros((2, 2)).view()).is_err());
        assert!(Whitening::new((-Array2::<f64>::eye(2)).view()).is_err());
    }
}
