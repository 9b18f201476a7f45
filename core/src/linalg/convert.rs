//! Conversions to and from [`nalgebra`], at the crate's edge: layers take and give `ndarray` arrays, and a caller whose matrices are
//! nalgebra's converts them here. Values are copied; shapes are kept.
//!
//! ```
//! use layerstore_core::linalg::{from_dmatrix, matmul_nt, to_dmatrix};
//! use nalgebra::DMatrix;
//!
//! // A weight [out, in] and inputs [batch, in] that a program has as nalgebra matrices.
//! let weight = DMatrix::from_fn(3, 4, |i, j| (i as f32 - j as f32) / 4.0);
//! let inputs = DMatrix::from_fn(2, 4, |i, j| (1 + i + j) as f32);
//! let y = matmul_nt(from_dmatrix(&inputs).view(), from_dmatrix(&weight).view());
//! assert_eq!(to_dmatrix(y.view()), &inputs * weight.transpose());
//! ```

use nalgebra::{DMatrix, DVector, Scalar};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2};

/// Copies a nalgebra matrix (column-major) into a row-major array of the same shape.
pub fn from_dmatrix<T: Scalar + Copy>(matrix: &DMatrix<T>) -> Array2<T> {
    Array2::from_shape_fn(matrix.shape(), |(i, j)| matrix[(i, j)])
}

/// Copies an array into a nalgebra matrix of the same shape.
pub fn to_dmatrix<T: Scalar + Copy>(array: ArrayView2<T>) -> DMatrix<T> {
    DMatrix::from_fn(array.nrows(), array.ncols(), |i, j| array[[i, j]])
}

/// Copies a nalgebra vector into a one-dimensional array.
pub fn from_dvector<T: Scalar + Copy>(vector: &DVector<T>) -> Array1<T> {
    Array1::from_iter(vector.iter().copied())
}

/// Copies a one-dimensional array into a nalgebra vector.
pub fn to_dvector<T: Scalar + Copy>(array: ArrayView1<T>) -> DVector<T> {
    DVector::from_iterator(array.len(), array.iter().copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips() {
        let a = Array2::from_shape_fn((2, 3), |(i, j)| (10 * i + j) as f32);
        let m = to_dmatrix(a.view());
        assert_eq!(m[(1, 2)], 12.0);
        assert_eq!(from_dmatrix(&m), a);
        let v = Array1::from(vec![1.0, 2.0]);
        assert_eq!(from_dvector(&to_dvector(v.view())), v);
    }
}
