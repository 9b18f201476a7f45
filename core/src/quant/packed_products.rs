//! Products with packed matrices: what the kernels are told of them.

use ndarray::{Array2, ArrayView1, ArrayView2};

use super::format::WeightType;
use super::packed::PackedMatrix;
use super::quantizer::NORMAL_FLOAT;
#[cfg(test)]
use crate::kernels::Isa;
use crate::kernels::{ActivationFormat, CodeFormat, Matrix, PackedRows, Weights};

impl PackedMatrix {
    /// Returns `x · Ŵᵀ` `[batch, rows]` for `x` `[batch, columns]`.
    ///
    /// # Panics
    /// When the width of `x` is another.
    pub fn products(&self, x: ArrayView2<f32>, activations: ActivationFormat) -> Array2<f32> {
        self.products_beside(x, activations, || ()).0
    }

    /// Returns [`PackedMatrix::products`], and what one of the threads did beside them.
    ///
    /// # Panics
    /// When the width of `x` is another.
    pub fn products_beside<T: Send>(
        &self,
        x: ArrayView2<f32>,
        activations: ActivationFormat,
        beside: impl FnOnce() -> T + Send,
    ) -> (Array2<f32>, T) {
        self.with_kernels(x, |matrix, x| matrix.products_beside(x, activations, beside))
    }

    /// [`PackedMatrix::products`] with the kernels of one device, on all threads or on this one.
    #[cfg(test)]
    pub(super) fn products_on(
        &self,
        isa: &dyn Isa,
        x: ArrayView2<f32>,
        activations: ActivationFormat,
        shared: bool,
    ) -> Array2<f32> {
        self.with_kernels(x, |matrix, x| matrix.products_on(isa, x, activations, shared, || ()).0)
    }

    /// Hands the matrix, and inputs that are multiplied with the columns' scales, to the kernels.
    fn with_kernels<T>(&self, x: ArrayView2<f32>, run: impl FnOnce(Matrix, ArrayView2<f32>) -> T) -> T {
        assert_eq!(x.ncols(), self.ncols(), "width of the inputs");
        let decode = |row: usize, out: &mut [f32]| self.decode(row, out);
        let matrix = Matrix::new((self.nrows(), self.ncols()), self.weights(), &decode);
        match self.column_scales() {
            [] => run(matrix, x),
            scales => run(matrix, (&x * &ArrayView1::from(scales)).view()),
        }
    }

    fn weights(&self) -> Weights<'_> {
        let codes = match self.format().weight_type {
            WeightType::F16 => return bytemuck::try_cast_slice(self.packed()).map_or(Weights::Other, Weights::F16),
            WeightType::Bf16 => return bytemuck::try_cast_slice(self.packed()).map_or(Weights::Other, Weights::Bf16),
            WeightType::Nf4 => CodeFormat { bits: 4, signed: false, levels: Some(&NORMAL_FLOAT), zero: 0 },
            WeightType::Ternary => CodeFormat { bits: 2, signed: false, levels: None, zero: 1 },
            WeightType::Int(bits) | WeightType::MxInt(bits) => {
                CodeFormat { bits: bits.into(), signed: !self.format().has_zeros(), levels: None, zero: 0 }
            }
        };
        let shape = (self.nrows(), self.ncols());
        let rows = PackedRows::new(codes, shape, self.packed(), self.scales(), self.zeros());
        Weights::Packed(rows.expect("lengths that were checked when the matrix was made"))
    }
}
