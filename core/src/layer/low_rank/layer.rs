//! Layers of packed weights with a correction, and how they run.

use std::sync::Arc;

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, s};
use serde_json::{Map, Value, json};

use super::config::{LowRankConfig, check_activations, with_activations};
use super::parts::to_parts;
use super::stored::{Inner, Running, StoredConfig};
use crate::error::{Error, Result};
use crate::layer::method::{Method, read_config};
use crate::layer::name::MethodName;
use crate::layer::parts::Parts;
use crate::layer::traits::{
    Accuracy, CorrectionReport, ExactSource, Gradients, Layer, Output, SharedLayer, check_rows,
};
use crate::linalg::{matmul, matmul_nt, relative_error, require_finite};
use crate::quant::{ActivationFormat, Correction, PackedForward, PackedMatrix, RowMatrix, RowType};

/// Rows dequantised at a time in a forward pass: a few hundred KiB, so that the weight is never whole in memory.
const BLOCK_ROWS: usize = 64;

/// A low-rank layer.
#[derive(Debug, Clone)]
pub struct LowRankLayer {
    inner: Arc<Inner>,
    activations: ActivationFormat,
}

impl LowRankLayer {
    /// Returns a layer of weights that are packed already, as in a file of another program, without a correction.
    ///
    /// # Errors
    /// When the bias has another length than the outputs, or a number that is not finite.
    pub fn of_weight(weight: PackedMatrix, bias: Option<Array1<f32>>) -> Result<Self> {
        let (out_features, in_features) = (weight.nrows(), weight.ncols());
        let factors = RowType::F16;
        let config =
            StoredConfig { weight: weight.format(), rank: 0, factors, in_features, out_features, made: Map::new() };
        let none = |length: usize| RowMatrix::new(Array2::zeros((0, length)), factors);
        let (a, b) = (none(out_features)?, none(in_features)?);
        if let Some(bias) = &bias {
            require_finite("the bias", bias.iter())?;
        }
        Self::new(Inner { config, weight, a, b, singular_values: vec![], bias_correction: None, bias })
    }

    /// Returns a layer of these arrays, whose inputs are floats.
    ///
    /// # Errors
    /// When their lengths are not those of the config.
    pub(super) fn new(inner: Inner) -> Result<Self> {
        let Inner { config, weight, a, b, singular_values, bias_correction, bias } = &inner;
        let (rank, outputs, inputs) = (config.rank, config.out_features, config.in_features);
        let found = [
            weight.nrows(),
            weight.ncols(),
            a.rows(),
            a.columns(),
            b.rows(),
            b.columns(),
            singular_values.len(),
            bias_correction.as_ref().map_or(outputs, |c| c.columns()),
            bias.as_ref().map_or(outputs, |b| b.len()),
        ];
        let expected = [outputs, inputs, rank, outputs, rank, inputs, rank, outputs, outputs];
        if found != expected {
            return Err(Error::expected(
                "lengths of weight, factors, bias correction and bias",
                format!("{found:?}"),
                format!("{expected:?}"),
            ));
        }
        Ok(LowRankLayer { inner: Arc::new(inner), activations: ActivationFormat::default() })
    }

    /// Returns the quantised weight, without its correction.
    pub fn quantized(&self) -> &PackedMatrix {
        &self.inner.weight
    }

    /// Returns the correction: columns of A as rows `[rank, out]`, and B `[rank, in]`.
    pub fn factors(&self) -> (Array2<f32>, Array2<f32>) {
        (self.inner.a.to_f32(), self.inner.b.to_f32())
    }

    /// Returns the singular values of the error that the correction keeps, descending: `[rank]`.
    pub fn singular_values(&self) -> &[f32] {
        &self.inner.singular_values
    }

    /// Returns what inputs are rounded to before they meet the packed weights.
    pub fn activations(&self) -> ActivationFormat {
        self.activations
    }

    /// Returns the same layer, its inputs rounded like this.
    ///
    /// # Errors
    /// When the weights stay floats, and inputs are to be int8.
    pub fn with_activations(&self, activations: ActivationFormat) -> Result<Self> {
        check_activations(activations, &self.inner.config.weight)?;
        Ok(LowRankLayer { inner: self.inner.clone(), activations })
    }

    /// `x · (Ŵ + A B)ᵀ` and the output bias correction, for a checked `x`, straight from the codes.
    pub(in crate::layer) fn packed_product(&self, x: ArrayView2<f32>, accuracy: Accuracy) -> Array2<f32> {
        let activations = if accuracy == Accuracy::Full { ActivationFormat::F32 } else { self.activations };
        let (mut y, correction) = self.inner.weight.products_beside(x, activations, || self.correction(x));
        y += &correction;
        y
    }

    /// Returns `x · (A B)ᵀ` and the output bias correction.
    fn correction(&self, x: ArrayView2<f32>) -> Array2<f32> {
        let inner = &*self.inner;
        let mut y = match &inner.bias_correction {
            Some(row) => row.to_f32().broadcast((x.nrows(), self.out_features())).expect("one row").to_owned(),
            None => Array2::zeros((x.nrows(), self.out_features())),
        };
        if inner.config.rank > 0 {
            let picks = |row: ArrayView1<f32>| (0u32..).zip(row.iter().copied()).collect();
            let picks: Vec<Vec<(u32, f32)>> = inner.b.products(x).rows().into_iter().map(picks).collect();
            inner.a.accumulate_on_this_thread(&picks, y.view_mut());
        }
        y
    }

    /// `grad_output · (Ŵ + A B)`.
    pub(in crate::layer) fn input_gradient(&self, grad_output: ArrayView2<f32>) -> Array2<f32> {
        let (a, b) = self.factors();
        let corrected = matmul(matmul_nt(grad_output, a.view()).view(), b.view());
        self.quantized_backward(grad_output) + corrected
    }

    /// `grad_output · Ŵ`, a block of rows dequantised at a time.
    fn quantized_backward(&self, grad_output: ArrayView2<f32>) -> Array2<f32> {
        let weight = &self.inner.weight;
        let mut input = Array2::zeros((grad_output.nrows(), weight.ncols()));
        let mut block = Array2::zeros((BLOCK_ROWS, weight.ncols()));
        for start in (0..weight.nrows()).step_by(BLOCK_ROWS) {
            let end = (start + BLOCK_ROWS).min(weight.nrows());
            for row in start..end {
                let mut target = block.row_mut(row - start);
                weight.dequantize_row(row, target.as_slice_mut().expect("rows of an owned array are contiguous"));
            }
            input += &matmul(grad_output.slice(s![.., start..end]), block.slice(s![..end - start, ..]));
        }
        input
    }
}

impl Correction for LowRankLayer {
    fn of(&self, x: ArrayView2<f32>) -> Array2<f32> {
        self.correction(x)
    }
}

impl Layer for LowRankLayer {
    fn method(&self) -> MethodName {
        MethodName::new(LowRankConfig::NAME)
    }

    fn out_features(&self) -> usize {
        self.inner.config.out_features
    }

    fn in_features(&self) -> usize {
        self.inner.config.in_features
    }

    fn config(&self) -> Value {
        with_activations(json!(self.inner.config), self.activations)
    }

    fn configured(&self, config: &Value) -> Result<Option<SharedLayer>> {
        let running: Running = read_config(LowRankConfig::NAME, config)?;
        Ok(Some(self.with_activations(running.activations)?.shared()))
    }

    fn product(&self, x: ArrayView2<f32>, accuracy: Accuracy) -> Result<Output> {
        Ok(Output { y: self.packed_product(x, accuracy), relative_error_bound: None })
    }

    fn bias(&self) -> Result<Option<Array1<f32>>> {
        Ok(self.inner.bias.clone())
    }

    fn packed_forward(&self) -> Option<PackedForward<'_>> {
        let Inner { weight, bias, bias_correction, config, .. } = &*self.inner;
        let is_corrected = config.rank > 0 || bias_correction.is_some();
        Some(PackedForward {
            weight,
            activations: self.activations,
            correction: is_corrected.then_some(self as &dyn Correction),
            bias: bias.as_ref(),
        })
    }

    /// Returns the output bias correction.
    fn offset(&self) -> Result<Option<Array1<f32>>> {
        Ok(self.inner.bias_correction.as_ref().map(|row| row.to_f32().into_iter().collect()))
    }

    fn approximations(&self) -> Vec<String> {
        let rounds = self.activations.rounds();
        rounds.then(|| "inputs are rounded to whole numbers".to_owned()).into_iter().collect()
    }

    fn weight(&self) -> Result<Array2<f32>> {
        let weight = self.inner.weight.dequantize();
        // Nothing is added where there is no correction: 0 less than 0 stays so.
        if self.inner.config.rank == 0 {
            return Ok(weight);
        }
        let (a, b) = self.factors();
        Ok(weight + matmul(a.t(), b.view()))
    }

    fn rows(&self, indices: &[u32]) -> Result<Array2<f32>> {
        check_rows(indices, self.out_features())?;
        let inner = &*self.inner;
        let mut rows = Array2::zeros((indices.len(), self.in_features()));
        for (mut row, &index) in rows.rows_mut().into_iter().zip(indices) {
            inner.weight.dequantize_row(index as usize, row.as_slice_mut().expect("rows of an owned array"));
        }
        if inner.config.rank > 0 {
            let (a, b) = self.factors();
            let indices: Vec<usize> = indices.iter().map(|&i| i as usize).collect();
            rows += &matmul(a.select(Axis(1), &indices).t(), b.view());
        }
        Ok(rows)
    }

    fn gradients(&self, x: ArrayView2<f32>, grad_output: ArrayView2<f32>) -> Result<Gradients> {
        Ok(Gradients {
            input: self.input_gradient(grad_output),
            weight: matmul(grad_output.t(), x),
            bias: grad_output.sum_axis(Axis(0)),
        })
    }

    fn input_gradients(&self, _: ArrayView2<f32>, grad_output: ArrayView2<f32>) -> Result<Array2<f32>> {
        Ok(self.input_gradient(grad_output))
    }

    fn exact_source(&self) -> ExactSource {
        ExactSource::Dense
    }

    fn correction_report(&self, weight: ArrayView2<f32>, inputs: Option<ArrayView2<f32>>) -> CorrectionReport {
        if self.inner.config.rank == 0 {
            return CorrectionReport::default();
        }
        let error = match inputs {
            Some(x) => {
                let plain = self.inner.weight.products(x, self.activations);
                relative_error(plain.view(), matmul_nt(x, weight).view())
            }
            None => relative_error(self.inner.weight.dequantize().view(), weight),
        };
        CorrectionReport {
            uncorrected_error: Some(error).filter(|e| e.is_finite()),
            singular_values: Some(self.inner.singular_values.clone()),
        }
    }

    fn to_parts(&self) -> Parts {
        to_parts(&self.inner)
    }

    fn memory_bytes(&self) -> usize {
        let inner = &*self.inner;
        let bias_correction = inner.bias_correction.as_ref().map_or(0, RowMatrix::memory_bytes);
        let factors =
            inner.a.memory_bytes() + inner.b.memory_bytes() + 4 * inner.singular_values.len() + bias_correction;
        inner.weight.memory_bytes() + factors + 4 * inner.bias.as_ref().map_or(0, Array1::len)
    }
}
