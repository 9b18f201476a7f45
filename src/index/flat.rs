//! Every key scanned, exactly: the right default for a layer's few thousand orthogonal keys.

use ndarray::{Array2, ArrayView2};

use super::SearchIndex;
use crate::linalg::matmul_nt;

/// Keys as rows of one f32 matrix.
#[derive(Debug, Clone)]
pub struct FlatIndex {
    keys: Array2<f32>,
}

impl FlatIndex {
    /// An index over `keys` `[len, dimension]`.
    pub fn new(keys: Array2<f32>) -> Self {
        FlatIndex { keys }
    }
}

impl SearchIndex for FlatIndex {
    fn len(&self) -> usize {
        self.keys.nrows()
    }

    fn dimension(&self) -> usize {
        self.keys.ncols()
    }

    fn scores(&self, queries: ArrayView2<f32>) -> Array2<f32> {
        matmul_nt(queries, self.keys.view())
    }

    fn keys(&self) -> ArrayView2<'_, f32> {
        self.keys.view()
    }
}
