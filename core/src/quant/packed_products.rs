//! Products with packed matrices: what the kernels are told of them.

use ndarray::{Array2, ArrayView1, ArrayView2};

use super::format::WeightType;
use super::packed::PackedMatrix;
use super::quantizer::{FP4, IQ4_NL, MXFP4, NORMAL_FLOAT};
#[cfg(test)]
use crate::kernels::Isa;
use crate::kernels::{ActivationFormat, CodeFormat, Matrix, Offsets, PackedRows, Weights};

/// Returns the name of the instruction set that products with packed matrices use on this computer.
pub fn instruction_set() -> &'static str {
    crate::kernels::instruction_set()
}

/// What [`MXFP4`] is divided by: its largest is 12, and ten times each are whole 127ths.
const MXFP4_UNIT: f32 = 12.7;

static MXFP4_LEVELS: [f32; 16] = divided(&MXFP4, MXFP4_UNIT);
static IQ4_NL_LEVELS: [f32; 16] = divided(&IQ4_NL, 127.0);

const fn divided(levels: &[f32; 16], unit: f32) -> [f32; 16] {
    let mut all = *levels;
    let mut i = 0;
    while i < 16 {
        all[i] = levels[i] / unit;
        i += 1;
    }
    all
}

/// The format of codes that stand for these numbers times `unit`.
fn levels(levels: &'static [f32; 16], unit: f32) -> CodeFormat {
    CodeFormat { bits: 4, signed: false, levels: Some(levels), unit, zero: 0 }
}

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

    /// Hands the matrix, and inputs that are in its columns' order or multiplied with their scales, to the kernels.
    fn with_kernels<T>(&self, x: ArrayView2<f32>, run: impl FnOnce(Matrix, ArrayView2<f32>) -> T) -> T {
        assert_eq!(x.ncols(), self.ncols(), "width of the inputs");
        let decode = |row: usize, out: &mut [f32]| self.decode(row, out);
        let matrix = Matrix::new((self.nrows(), self.ncols()), self.weights(), &decode);
        match (self.column_scales(), self.order()) {
            ([], []) => run(matrix, x),
            ([], order) => {
                let mut ordered = Array2::zeros(x.raw_dim());
                for (row, mut ordered) in x.rows().into_iter().zip(ordered.rows_mut()) {
                    ordered.iter_mut().zip(order).for_each(|(value, &column)| *value = row[column as usize]);
                }
                run(matrix, ordered.view())
            }
            (scales, _) => run(matrix, (&x * &ArrayView1::from(scales)).view()),
        }
    }

    /// Returns the rows as kernels read them; `None` where they do not, or where inputs have to be brought into another order or be
    /// multiplied first.
    pub(super) fn packed_rows(&self) -> Option<PackedRows<'_>> {
        match self.weights() {
            Weights::Packed(rows) if self.column_scales().is_empty() && self.order().is_empty() => Some(rows),
            _ => None,
        }
    }

    fn weights(&self) -> Weights<'_> {
        let codes = match self.format().weight_type {
            WeightType::F16 => return bytemuck::try_cast_slice(self.packed()).map_or(Weights::Other, Weights::F16),
            WeightType::Bf16 => return bytemuck::try_cast_slice(self.packed()).map_or(Weights::Other, Weights::Bf16),
            WeightType::Nf4 => levels(&NORMAL_FLOAT, 1.0),
            WeightType::Fp4 => levels(&FP4, 1.0),
            WeightType::MxFp4 => levels(&MXFP4_LEVELS, MXFP4_UNIT),
            WeightType::Iq4Nl => levels(&IQ4_NL_LEVELS, 127.0),
            WeightType::F8E4M3 | WeightType::F8E5M2 => return Weights::Other,
            WeightType::Ternary => CodeFormat { bits: 2, signed: false, levels: None, unit: 1.0, zero: 1 },
            WeightType::Int(bits) | WeightType::MxInt(bits) => {
                let signed = !self.format().has_zeros() && !self.format().minimum;
                CodeFormat { bits: bits.into(), signed, levels: None, unit: 1.0, zero: 0 }
            }
        };
        let shape = (self.nrows(), self.ncols());
        let [scales, minimums] = self.group_numbers();
        let offsets = match (self.zeros(), minimums.is_empty()) {
            ([], true) => Offsets::Same,
            (zeros, true) => Offsets::Zeros(zeros),
            (_, false) => Offsets::Minimums(minimums),
        };
        let rows = PackedRows::new(codes, shape, self.packed(), scales, offsets);
        Weights::Packed(rows.expect("lengths that were checked when the matrix was made"))
    }
}
