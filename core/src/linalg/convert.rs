//! Conversions to and from `nalgebra`, for callers whose arrays are nalgebra's. Values are copied; shapes are kept.

use nalgebra::{DMatrix, DVector};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2};

/// A nalgebra matrix (column-major) as a row-major array of the same shape.
pub fn from_dmatrix(matrix: &DMatrix<f32>) -> Array2<f32> {
    Array2::from_shape_fn(matrix.shape(), |(i, j)| matrix[(i, j)])
}

/// An array as a nalgebra matrix of the same shape.
pub fn to_dmatrix(array: ArrayView2<f32>) -> DMatrix<f32> {
    DMatrix::from_fn(array.nrows(), array.ncols(), |i, j| array[[i, j]])
}

/// A nalgebra vector as a one-dimensional array.
pub fn from_dvector(vector: &DVector<f32>) -> Array1<f32> {
    Array1::from_iter(vector.iter().copied())
}

/// A one-dimensional array as a nalgebra vector.
pub fn to_dvector(array: ArrayView1<f32>) -> DVector<f32> {
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
