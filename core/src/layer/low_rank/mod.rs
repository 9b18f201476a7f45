//! Quantised weights, and a low-rank correction of what quantising lost: `y = Ŵ x + A (B x) + b`.

mod config;
mod correction;

use std::sync::Arc;

use half::f16;
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, CowArray, Ix2, s};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

pub(super) use config::with_activations;
pub use config::{LowRankConfig, MaxBits, MaxError, Rank, Rounding, Scaling, SvdMethod};
pub use correction::{Correction, Transform};

use super::check::check_lengths;
use super::method::{Method, read_config, settings_in};
use super::name::MethodName;
use super::parts::{Codes, Factor, Parts, Side, Tensor, WeightRows};
use super::shape::LayerShape;
use super::traits::{Accuracy, CorrectionReport, ExactSource, Gradients, Layer, Output, SharedLayer, check_rows};
use crate::calibration::Calibration;
use crate::error::{Error, Result};
use crate::linalg::{Loss, Ridge, matmul, matmul_nt, relative_error, require_finite, unit_of, with_floor};
use crate::quant::{ActivationFormat, Calibrated, PackedMatrix, RowMatrix, RowType, WeightFormat};

/// Rows dequantised at a time in a forward pass: a few hundred KiB, so that the weight is never whole in memory.
const BLOCK_ROWS: usize = 64;

/// Damping beside that of the settings, where the second moment is singular with it.
const GPTQ_FLOORS: [f64; 2] = [1e-2, 1e-1];

/// Ridges beside those of the settings, likewise.
const RIDGE_FLOORS: [f64; 3] = [1e-6, 1e-4, 1e-2];

/// A low-rank layer.
#[derive(Debug, Clone)]
pub struct LowRankLayer {
    inner: Arc<Inner>,
    activations: ActivationFormat,
}

#[derive(Debug)]
struct Inner {
    config: StoredConfig,
    weight: PackedMatrix,
    /// Columns of A as rows, `[rank, out]`.
    a: RowMatrix,
    /// `[rank, in]`.
    b: RowMatrix,
    singular_values: Vec<f32>,
    /// The output bias correction `(W − Ŵ − A B) E[x]`, `[1, out]`.
    bias_correction: Option<RowMatrix>,
    bias: Option<Array1<f32>>,
}

/// What the arrays are, and how they came to be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct StoredConfig {
    weight: WeightFormat,
    rank: usize,
    #[serde(default = "f32_factors", skip_serializing_if = "is_f32")]
    factors: RowType,
    in_features: usize,
    out_features: usize,
    /// The rule's other settings, for whoever reads the catalogue.
    #[serde(flatten)]
    made: Map<String, Value>,
}

/// The statistics that a layer is made for: of the inputs as they are, or less their mean where a bias makes up for it.
struct Inputs<'a> {
    calibration: &'a Calibration,
    centred: bool,
}

impl<'a> Inputs<'a> {
    fn new(calibration: &'a Calibration, config: &LowRankConfig) -> Self {
        // With the mean error made up for, what varies is what is left to get right.
        Inputs { calibration, centred: config.bias_correction }
    }

    /// `[in, in]`.
    fn second(&self) -> Result<CowArray<'a, f64, Ix2>> {
        if self.centred { self.calibration.covariance() } else { self.calibration.second_moment() }
    }

    /// Its diagonal, `[in]`.
    fn squares(&self) -> Array1<f64> {
        if self.centred { self.calibration.variance() } else { self.calibration.second_diagonal() }
    }

    /// Returns T, and what had to be added to the diagonal beside the ridge.
    fn transform(&self, config: &LowRankConfig) -> Result<(Transform, Option<f64>)> {
        Ok(match config.scaling {
            Scaling::Identity => (Transform::Identity, None),
            Scaling::MeanAbs => (Transform::mean_abs(self.calibration.mean_abs().clone()), None),
            Scaling::Rms => (Transform::rms(self.squares()), None),
            Scaling::Exact => {
                let second = config.ridge().added_to(self.second()?.into_owned());
                with_floor(second.view(), &RIDGE_FLOORS, Transform::exact)?
            }
        })
    }
}

/// Returns numbers as they weigh errors, in a unit in which f32 holds them.
fn as_importance(squares: &Array1<f64>) -> Vec<f32> {
    let unit = unit_of(squares.fold(0f64, |most, v| most.max(*v))).unwrap_or(1.0);
    squares.iter().map(|&v| (v / unit) as f32).collect()
}

/// The share of an output bias correction, and the share of the outputs, that it may lose as f16.
const LOST_BY_SHIFT: (f64, f64) = (1.0 / 256.0, 1.0 / 4096.0);

/// Returns the type that an output bias correction `[out, 1]` is kept as: f16, unless too much of it would be lost.
fn shift_type(mean_error: ArrayView2<f32>, weight: ArrayView2<f32>, calibration: &Calibration) -> RowType {
    let loss = Loss::of_halves(mean_error.iter().map(|&v| f64::from(v)));
    // Of outputs, if inputs are independent of each other.
    let squares = calibration.second_diagonal();
    let outputs: f64 = weight
        .rows()
        .into_iter()
        .map(|row| row.iter().zip(&squares).map(|(&w, square)| f64::from(w).powi(2) * square).sum::<f64>())
        .sum();
    let held = loss.within(LOST_BY_SHIFT.0) || loss.lost <= LOST_BY_SHIFT.1.powi(2) * outputs;
    if held { RowType::F16 } else { RowType::F32 }
}

fn f32_factors() -> RowType {
    RowType::F32
}

fn is_f32(factors: &RowType) -> bool {
    *factors == RowType::F32
}

/// What the catalogue keeps of how a layer runs.
#[derive(Deserialize)]
struct Running {
    #[serde(default)]
    activations: ActivationFormat,
}

impl LowRankLayer {
    /// Quantises `weight` `[out, in]` and corrects it. Settings and shapes have been checked.
    pub(in crate::layer) fn build(
        config: &LowRankConfig,
        weight: ArrayView2<f32>,
        bias: Option<ArrayView1<f32>>,
        calibration: Option<&Calibration>,
    ) -> Result<Self> {
        let (out_features, in_features) = weight.dim();
        let mut adapted = vec![];
        if config.rank == Rank::Components(0) && config.scaling != Scaling::Identity {
            adapted.push("scaling: not used, rank is 0".to_owned());
        }
        let calibration = calibration.filter(|_| config.calibrates().is_some());
        let unusable = calibration.and_then(|calibration| config.unusable(calibration));
        adapted.extend(unusable.map(|reason| format!("calibration: not used, {reason}")));
        let calibration = calibration.filter(|_| unusable.is_none());
        let inputs = calibration.map(|c| Inputs::new(c, config));
        let packed = match (&inputs, config.rounding) {
            (Some(inputs), Rounding::Gptq) => {
                let damped = Ridge { absolute: 0.0, relative: config.damping }.added_to(inputs.second()?.into_owned());
                let how = Calibrated {
                    activation_order: config.activation_order,
                    sweeps: config.sweeps,
                    dual_scaling: config.dual_scaling,
                };
                let (packed, floor) = with_floor(damped.view(), &GPTQ_FLOORS, |damped| {
                    PackedMatrix::quantize_calibrated(weight, config.weight, config.clipping, damped, how)
                })?;
                adapted.extend(floor.map(|floor| format!("damping: {} to {}", config.damping, config.damping + floor)));
                packed
            }
            _ => {
                let importance = inputs.as_ref().map(Inputs::squares);
                let importance = importance.map(|squares| as_importance(&squares));
                let quantize = if config.dual_scaling { PackedMatrix::quantize_dual } else { PackedMatrix::quantize };
                quantize(weight, config.weight, config.clipping, importance.as_deref())?
            }
        };
        let (transform, floor) = match &inputs {
            Some(inputs) => inputs.transform(config)?,
            None => (Transform::Identity, None),
        };
        let ridge = config.ridge_relative;
        adapted.extend(floor.map(|floor| format!("ridge_relative: {ridge} to {}", ridge + floor)));
        let error = &weight - &packed.dequantize();
        let (corrects_bias, activations) = (config.bias_correction, config.activations);
        let shape = LayerShape { out_features, in_features, has_bias: bias.is_some() };
        let correction = Correction::of(error.view(), weight, config, config.largest_rank(shape)?, &transform)?;
        let mut made = match json!(config) {
            Value::Object(map) => map,
            _ => Map::new(),
        };
        for own in ["weight", "rank", "factors", "activations"] {
            made.remove(own);
        }
        if !adapted.is_empty() {
            made.insert("adapted".into(), json!(adapted));
        }
        let config = StoredConfig {
            weight: config.weight,
            rank: correction.singular_values.len(),
            factors: config.factors,
            in_features,
            out_features,
            made,
        };
        let (a, b) = (RowMatrix::new(correction.a, config.factors)?, RowMatrix::new(correction.b, config.factors)?);
        let bias_correction = match calibration {
            Some(calibration) if corrects_bias => {
                let kept = packed.dequantize() + matmul(a.to_f32().t(), b.to_f32().view());
                let mean = calibration.mean().mapv(|v| v as f32).insert_axis(Axis(1));
                let mean_error = matmul((&weight - &kept).view(), mean.view());
                require_finite("the output bias correction", mean_error.iter())?;
                let kind = shift_type(mean_error.view(), weight, calibration);
                Some(RowMatrix::new(mean_error.reversed_axes(), kind)?)
            }
            _ => None,
        };
        let (singular_values, bias) = (correction.singular_values, bias.map(|b| b.to_owned()));
        Self::new(Inner { config, weight: packed, a, b, singular_values, bias_correction, bias })?
            .with_activations(activations)
    }

    /// Packed weights as they are, without a correction.
    pub(in crate::layer) fn of_weight(weight: PackedMatrix, bias: Option<Array1<f32>>) -> Result<Self> {
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

    fn new(inner: Inner) -> Result<Self> {
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
        config::check_activations(activations, &self.inner.config.weight)?;
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

    pub(in crate::layer) fn from_parts(mut parts: Parts) -> Result<Self> {
        let mut config: StoredConfig = read_config(LowRankConfig::NAME, &parts.config)?;
        // A way to run it, which the catalogue's config has beside: no part of what is stored.
        config.made.remove("activations");
        let (outputs, inputs) = (config.out_features, config.in_features);
        check_lengths(outputs, inputs)?;
        let rows = parts
            .weights
            .as_ref()
            .ok_or_else(|| Error::expected("parts of a low-rank layer", "no weight rows", "weight rows"))?;
        let weight = PackedMatrix::from_fields(
            config.weight,
            (outputs, inputs),
            rows.packed.clone(),
            &rows.scales,
            rows.zeros.to_vec(),
        )?;
        let weight = match parts.tensor("column_scales") {
            Some(scales) => {
                let scales = RowMatrix::from_bytes(RowType::F16, (1, inputs), &scales.data, &[])?;
                weight.with_column_scales(scales.to_f32().into_raw_vec_and_offset().0)?
            }
            None => weight,
        };
        let mut singular_values = match parts.tensor("singular_values") {
            Some(values) => values.to_vector()?.to_vec(),
            None => vec![],
        };
        let mut factor = |side: Side, length: usize| -> Result<RowMatrix> {
            if config.rank == 0 {
                return RowMatrix::new(Array2::zeros((0, length)), config.factors);
            }
            let missing = || Error::expected("parts of a low-rank layer", format!("no factor {}", side.as_str()), "it");
            if config.factors == RowType::F32 {
                let place = parts.factors.iter().position(|f| f.side == side).ok_or_else(missing)?;
                let factor = parts.factors.swap_remove(place);
                singular_values = factor.singular_values;
                return RowMatrix::new(factor.vectors, RowType::F32);
            }
            let codes = parts.codes.iter().find(|codes| codes.role == side.as_str()).ok_or_else(missing)?;
            if codes.codes.dim() != (config.rank, length * config.factors.bytes()) {
                let expected = format!("{:?}", (config.rank, length * config.factors.bytes()));
                return Err(Error::expected("bytes of a factor", format!("{:?}", codes.codes.dim()), expected));
            }
            let scales = match parts.tensor(&format!("{}_scales", side.as_str())) {
                Some(scales) => scales.to_vector()?.to_vec(),
                None => vec![],
            };
            let bytes = codes.codes.as_standard_layout();
            let bytes = bytes.as_slice().expect("standard layout");
            RowMatrix::from_bytes(config.factors, (config.rank, length), bytes, &scales)
        };
        let (a, b) = (factor(Side::A, outputs)?, factor(Side::B, inputs)?);
        let bias_correction = parts
            .tensor("shift")
            .map(|t| {
                let kind = if t.dtype == "F32" { RowType::F32 } else { RowType::F16 };
                RowMatrix::from_bytes(kind, (1, outputs), &t.data, &[])
            })
            .transpose()?;
        let bias = parts.tensor("bias").map(Tensor::to_vector).transpose()?;
        Self::new(Inner { config, weight, a, b, singular_values, bias_correction, bias })
    }
}

impl Method for LowRankConfig {
    const NAME: &'static str = "low_rank";
    type Layer = LowRankLayer;

    fn validate(&self) -> Result<()> {
        self.validate()
    }

    fn check(&self, shape: LayerShape, calibrated: bool) -> Result<()> {
        self.check(shape, calibrated)
    }

    fn expected_bytes(&self, shape: LayerShape) -> Result<Option<usize>> {
        self.expected_bytes(shape)
    }

    fn unusable(&self, calibration: &Calibration) -> Option<&'static str> {
        calibration.vanishes(self.bias_correction)
    }

    fn compress(
        &self,
        weight: ArrayView2<f32>,
        bias: Option<ArrayView1<f32>>,
        calibration: Option<&Calibration>,
    ) -> Result<LowRankLayer> {
        LowRankLayer::build(self, weight, bias, calibration)
    }

    fn from_parts(parts: Parts) -> Result<LowRankLayer> {
        LowRankLayer::from_parts(parts)
    }

    fn with_stored(&self, stored: &Value) -> Value {
        with_activations(stored.clone(), self.activations)
    }

    fn from_config(config: &Map<String, Value>) -> Result<Self> {
        let stored: StoredConfig = read_config(LowRankConfig::NAME, &Value::Object(config.clone()))?;
        let Running { activations } = read_config(LowRankConfig::NAME, &Value::Object(config.clone()))?;
        let made: LowRankConfig = settings_in(&stored.made)?;
        let StoredConfig { weight, rank, factors, .. } = stored;
        let settings = LowRankConfig { weight, rank: Rank::Components(rank), factors, activations, ..made };
        settings.validate()?;
        Ok(settings)
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

    /// Returns the output bias correction.
    fn offset(&self) -> Result<Option<Array1<f32>>> {
        Ok(self.inner.bias_correction.as_ref().map(|row| row.to_f32().into_iter().collect()))
    }

    fn approximations(&self) -> Vec<String> {
        let rounds = self.activations.rounds();
        rounds.then(|| "inputs are rounded to whole numbers".to_owned()).into_iter().collect()
    }

    fn weight(&self) -> Result<Array2<f32>> {
        let (a, b) = self.factors();
        Ok(self.inner.weight.dequantize() + matmul(a.t(), b.view()))
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

    fn exact_source(&self) -> ExactSource {
        ExactSource::Dense
    }

    fn correction_report(&self, weight: ArrayView2<f32>, inputs: Option<ArrayView2<f32>>) -> CorrectionReport {
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
        let inner = &*self.inner;
        let mut parts = Parts::new(LowRankConfig::NAME, json!(inner.config));
        parts.weights = Some(WeightRows {
            rows: inner.weight.nrows(),
            packed: inner.weight.stored_codes(),
            scales: inner.weight.scale_bytes().into(),
            zeros: inner.weight.zeros().to_vec().into(),
        });
        for (side, rows) in [(Side::A, &inner.a), (Side::B, &inner.b)] {
            if inner.config.rank == 0 {
                continue;
            }
            match rows.floats() {
                Some(vectors) => parts.factors.push(Factor {
                    side,
                    singular_values: inner.singular_values.clone(),
                    vectors: vectors.to_owned(),
                }),
                None => {
                    parts.codes.push(Codes { role: side.as_str().into(), codes: rows.bytes() });
                    if !rows.scales().is_empty() {
                        parts.tensors.push(Tensor::vector(&format!("{}_scales", side.as_str()), rows.scales()));
                    }
                }
            }
        }
        if !parts.codes.is_empty() {
            parts.tensors.push(Tensor::vector("singular_values", &inner.singular_values));
        }
        if !inner.weight.column_scales().is_empty() {
            let halves = inner.weight.column_scales().iter().flat_map(|&s| f16::from_f32(s).to_le_bytes());
            let (data, shape) = (halves.collect::<Vec<u8>>().into(), vec![self.in_features()]);
            parts.tensors.push(Tensor { name: "column_scales".into(), dtype: "F16".into(), shape, data });
        }
        if let Some(correction) = &inner.bias_correction {
            let data = correction.bytes().into_raw_vec_and_offset().0.into();
            let shape = vec![self.out_features()];
            let dtype = if correction.floats().is_some() { "F32" } else { "F16" };
            parts.tensors.push(Tensor { name: "shift".into(), dtype: dtype.into(), shape, data });
        }
        if let Some(bias) = &inner.bias {
            parts.tensors.push(Tensor::vector("bias", &bias.to_vec()));
        }
        parts
    }

    fn memory_bytes(&self) -> usize {
        let inner = &*self.inner;
        let bias_correction = inner.bias_correction.as_ref().map_or(0, RowMatrix::memory_bytes);
        let factors =
            inner.a.memory_bytes() + inner.b.memory_bytes() + 4 * inner.singular_values.len() + bias_correction;
        inner.weight.memory_bytes() + factors + 4 * inner.bias.as_ref().map_or(0, Array1::len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{MethodConfig, bits_per_weight, compress, configured, layer_from_parts};
    use crate::linalg::relative_error;
    use crate::quant::{Clipping, Group, ScaleType, WeightType};
    use proptest::prelude::*;

    fn sample(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
        let mut state = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        Array2::from_shape_fn((rows, columns), |(_, j)| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) as f32 / (1u32 << 31) as f32 * 2.0 - 1.0) * (1.0 + 3.0 * (j % 4) as f32)
        })
    }

    fn built(config: &LowRankConfig, w: &Array2<f32>, x: &Array2<f32>) -> LowRankLayer {
        let calibration = Calibration::of(x.clone()).unwrap();
        compress(config, w.view(), Some(Array1::ones(w.nrows()).view()), Some(&calibration)).unwrap()
    }

    fn configs() -> impl Strategy<Value = LowRankConfig> {
        use WeightType::{Bf16, Int, MxInt, Nf4};
        let types = prop::sample::select(vec![Int(2), Int(3), Int(4), Int(8), Nf4, MxInt(4), Bf16]);
        let factors = prop::sample::select(vec![RowType::F32, RowType::F16, RowType::Int8]);
        let scalings = prop::sample::select(vec![Scaling::Identity, Scaling::MeanAbs, Scaling::Rms, Scaling::Exact]);
        (types, factors, scalings, any::<[bool; 5]>(), 0usize..3).prop_map(
            |(weight_type, factors, scaling, [symmetric, gptq, half, bias_correction, dual], rank)| {
                let scales = if half { ScaleType::F16 } else { ScaleType::F32 };
                LowRankConfig {
                    weight: WeightFormat { weight_type, group: Group::Size(4), symmetric, scales },
                    rounding: if gptq && !weight_type.is_float() { Rounding::Gptq } else { Rounding::Nearest },
                    rank: Rank::Components(rank),
                    factors,
                    scaling,
                    bias_correction,
                    dual_scaling: dual && !weight_type.is_float(),
                    ..LowRankConfig::default()
                }
            },
        )
    }

    proptest! {
        /// The forward pass is the reference product with the weight the layer stands for, and parts bring it back, of
        /// as many bytes as its settings say.
        #[test]
        fn forward_is_the_stored_weight(config in configs(), out in 2usize..150, seed in 0u64..100) {
            let (w, x) = (sample(out, 12, seed), sample(30, 12, seed + 1));
            let layer = built(&config, &w, &x);
            let y = layer.forward(x.view(), Accuracy::Approximate).unwrap().y;
            let mut reference = x.dot(&layer.weight().unwrap().t()) + 1.0;
            if config.bias_correction {
                // Over the calibration inputs nothing is left of the mean error.
                let mean = |y: &Array2<f32>| y.mean_axis(Axis(0)).unwrap();
                let off = mean(&(x.dot(&w.t()) + 1.0)) - mean(&reference);
                reference += &off;
            }
            // The bias correction is kept in f16.
            let allowed = if config.bias_correction { 1e-3 } else { 1e-5 };
            prop_assert!(relative_error(y.view(), reference.view()) < allowed);
            let parts = layer.to_parts();
            let back = layer_from_parts(parts.clone()).unwrap();
            prop_assert_eq!(back.to_parts(), parts.clone());
            prop_assert_eq!(back.forward(x.view(), Accuracy::Full).unwrap().y, y);
            let Rank::Components(rank) = config.rank else { unreachable!() };
            let shape = LayerShape { out_features: out, in_features: 12, has_bias: true };
            let expected = config.stored_bytes(shape, rank).unwrap();
            prop_assert_eq!(parts.stored_bytes() as usize, expected);
        }

        /// Each component helps, all of them make up the whole error, and `exact` beats the others on its inputs.
        #[test]
        fn correction_is_the_best_of_its_rank(seed in 0u64..60) {
            let (w, x) = (sample(10, 16, seed), sample(200, 16, seed + 1));
            let exact_output = x.dot(&w.t());
            let error = |scaling, rank| {
                let config = LowRankConfig {
                    rank: Rank::Components(rank),
                    scaling,
                    ridge_relative: 1e-6,
                    factors: RowType::F32,
                    // Which rounds alike for all scalings.
                    clipping: Clipping::Absmax,
                    weight: WeightFormat { group: Group::Size(16), symmetric: true, ..WeightFormat::default() },
                    ..LowRankConfig::default()
                };
                let layer = built(&config, &w, &x);
                relative_error(layer.linear(x.view(), Accuracy::Approximate).unwrap().y.view(), exact_output.view())
            };
            for rank in [1, 3, 6] {
                for other in [Scaling::Identity, Scaling::MeanAbs, Scaling::Rms] {
                    prop_assert!(error(Scaling::Exact, rank) <= error(other, rank) * 1.001, "{:?}", other);
                }
                prop_assert!(error(Scaling::Exact, rank) <= error(Scaling::Exact, rank - 1) * 1.001);
            }
            for scaling in [Scaling::Identity, Scaling::MeanAbs, Scaling::Rms, Scaling::Exact] {
                prop_assert!(error(scaling, 10) < 1e-5);
            }
        }

        /// A rank by error is the smallest that does, one by bits the largest that fits.
        #[test]
        fn ranks_follow_from_targets(seed in 0u64..40, max_error in 0.01f64..0.1, more in 0f64..20.0) {
            let (w, x) = (sample(24, 16, seed), sample(100, 16, seed + 1));
            let base = LowRankConfig { weight: WeightFormat { group: Group::Channel, ..WeightFormat::default() }, factors: RowType::F32, ridge_relative: 0.0, ridge_regularization: 1e-9, scaling: Scaling::Exact, ..LowRankConfig::default() };
            let rank_of = |layer: &LowRankLayer| layer.singular_values().len();
            let error = |rank| {
                let layer = built(&LowRankConfig { rank, ..base.clone() }, &w, &x);
                let y = layer.linear(x.view(), Accuracy::Approximate).unwrap().y;
                (rank_of(&layer), relative_error(y.view(), x.dot(&w.t()).view()))
            };
            let (rank, found) = error(Rank::MaxError(MaxError { max_error }));
            prop_assert!(found <= max_error * 1.001, "{} {}", found, max_error);
            prop_assert!(rank == 0 || error(Rank::Components(rank - 1)).1 > max_error * 0.999);
            let shape = LayerShape { out_features: 24, in_features: 16, has_bias: true };
            let bits = |rank| bits_per_weight(base.stored_bytes(shape, rank).unwrap() as u64, 24, 16).unwrap();
            let max_bits = bits(0) + more;
            let limited = LowRankConfig { rank: Rank::MaxBits(MaxBits { max_bits }), ..base.clone() };
            let layer = built(&limited, &w, &x);
            let rank = rank_of(&layer);
            // Of all that is stored, the bias too.
            let found = bits_per_weight(layer.to_parts().stored_bytes(), 24, 16).unwrap();
            prop_assert_eq!(found, bits(rank));
            prop_assert!(found <= max_bits + 1e-9 && (rank == 16 || bits(rank + 1) > max_bits - 0.1));
        }
    }

    /// The same error whatever the size of inputs and weights, or a refusal.
    #[test]
    fn sizes_do_not_matter() {
        let normal = |rows, seed| crate::linalg::normal_matrix(rows, 64, seed).mapv(|v| v as f32);
        let (w, x) = (normal(64, 1) * 0.02, normal(256, 2) + 0.5);
        for scaling in [Scaling::Identity, Scaling::MeanAbs, Scaling::Rms, Scaling::Exact] {
            for (factors, gptq, bias_correction) in [
                (RowType::F16, false, false),
                (RowType::F16, true, true),
                (RowType::F32, false, true),
                (RowType::Int8, false, false),
            ] {
                let config = LowRankConfig {
                    scaling,
                    factors,
                    bias_correction,
                    rounding: if gptq { Rounding::Gptq } else { Rounding::Nearest },
                    rank: Rank::Components(8),
                    ..LowRankConfig::default()
                };
                let error = |weights: f32, inputs: f32| {
                    let (w, x) = (&w * weights, &x * inputs);
                    let layer = compress(&config, w.view(), None, Some(&Calibration::of(x.clone())?))?;
                    let back = layer_from_parts(layer.to_parts()).unwrap();
                    let y = back.linear(x.view(), Accuracy::Approximate)?.y;
                    Ok::<_, Error>(relative_error(y.view(), matmul_nt(x.view(), w.view()).view()))
                };
                let plain = error(1.0, 1.0).unwrap();
                for inputs in [1e-12, 1e-6, 1e-5, 1e-3, 1e3, 1e6, 1e7, 1e15] {
                    let found = error(1.0, inputs).unwrap();
                    assert!((found / plain - 1.0).abs() < 0.05, "{config:?} inputs × {inputs}: {found} {plain}");
                }
                for weights in [1e-12, 1e-9, 1e-5, 1e6, 1e12] {
                    match error(weights, 1.0) {
                        Ok(found) => {
                            assert!((found / plain - 1.0).abs() < 0.05, "{config:?} × {weights}: {found} {plain}")
                        }
                        Err(e) => assert!(
                            factors == RowType::F16 && e.to_string().contains("f16"),
                            "{config:?} × {weights}: {e}"
                        ),
                    }
                }
            }
        }
    }

    /// Inputs that say nothing, or too little: the layer is what it is without them, and says so; or is made with a floor.
    #[test]
    fn statistics_that_vanish_are_not_used() {
        let normal = |rows, seed| crate::linalg::normal_matrix(rows, 64, seed).mapv(|v| v as f32);
        let w = normal(32, 1);
        let base = LowRankConfig { rank: Rank::Components(4), ..LowRankConfig::default() };
        let uncalibrated = compress(&base, w.view(), None, None).unwrap().weight().unwrap();
        let (zeros, ones) = (Array2::zeros((16, 64)), Array2::ones((100, 64)));
        let of = |config: &LowRankConfig, x: &Array2<f32>| {
            let calibration = Calibration::of(x.clone()).unwrap();
            let layer = compress(config, w.view(), None, Some(&calibration)).unwrap();
            let back = layer_from_parts(layer.to_parts()).unwrap();
            assert_eq!(back.to_parts(), layer.to_parts());
            (config.unusable(&calibration), layer)
        };
        let gptq = || LowRankConfig { rounding: Rounding::Gptq, ..base.clone() };
        for (config, x) in [
            (gptq(), &zeros),
            (LowRankConfig { bias_correction: true, ..gptq() }, &zeros),
            (LowRankConfig { scaling: Scaling::Exact, ..base.clone() }, &zeros),
            (LowRankConfig { scaling: Scaling::Rms, ..base.clone() }, &zeros),
            (LowRankConfig { scaling: Scaling::MeanAbs, ..base.clone() }, &zeros),
            (LowRankConfig { bias_correction: true, ..gptq() }, &ones),
            (LowRankConfig { bias_correction: true, ..gptq() }, &Array2::ones((1, 64))),
            (LowRankConfig { bias_correction: true, scaling: Scaling::Exact, ..base.clone() }, &ones),
        ] {
            let (reason, layer) = of(&config, x);
            assert_eq!(layer.weight().unwrap(), uncalibrated, "{config:?}");
            let noted = layer.config()["adapted"][0].as_str().unwrap().to_owned();
            assert!(noted.contains("not used") && noted.contains(reason.unwrap()), "{noted}");
        }
        for (config, says) in [
            (LowRankConfig { damping: 0.0, ..gptq() }, "damping: 0 to 0.01"),
            (LowRankConfig { damping: 0.0, bias_correction: true, ..gptq() }, "damping: 0 to 0.01"),
            (LowRankConfig { scaling: Scaling::Exact, ridge_relative: 0.0, ..base.clone() }, "ridge_relative: 0 to"),
        ] {
            let (reason, layer) = of(&config, &normal(8, 2));
            assert!(
                reason.is_none() && layer.config()["adapted"][0].as_str().unwrap().starts_with(says),
                "{}",
                layer.config()
            );
            assert!(relative_error(layer.weight().unwrap().view(), w.view()) < 0.2);
        }
        let alone = LowRankConfig { scaling: Scaling::Rms, ..LowRankConfig::default() };
        assert_eq!(of(&alone, &normal(8, 2)).1.config()["adapted"], json!(["scaling: not used, rank is 0"]));
        // What needs no help is not noted.
        assert!(of(&gptq(), &normal(8, 2)).1.config().get("adapted").is_none());
        assert!(
            of(&LowRankConfig { scaling: Scaling::Exact, ..base }, &Array2::ones((100, 64)))
                .1
                .config()
                .get("adapted")
                .is_none()
        );
    }

    /// How inputs are rounded is no part of the artifact: the catalogue says it.
    #[test]
    fn activations_are_a_matter_of_running() {
        let (w, x) = (sample(24, 64, 1), sample(5, 64, 2));
        let config =
            LowRankConfig { activations: ActivationFormat::Int8, rank: Rank::Components(3), ..Default::default() };
        let (rounded, plain) =
            (built(&config, &w, &x), built(&LowRankConfig { activations: ActivationFormat::F32, ..config }, &w, &x));
        assert_eq!(rounded.to_parts(), plain.to_parts());
        assert_eq!(rounded.config()["activations"], "int8");
        let back = configured(&layer_from_parts(plain.to_parts()).unwrap(), &rounded.config()).unwrap();
        let run = |layer: &dyn Layer, accuracy| layer.forward(x.view(), accuracy).unwrap().y;
        assert_eq!(run(&*back, Accuracy::Approximate), run(&rounded, Accuracy::Approximate));
        assert_eq!(run(&*back, Accuracy::Full), run(&plain, Accuracy::Approximate));
        let off = relative_error(run(&*back, Accuracy::Approximate).view(), run(&plain, Accuracy::Full).view());
        assert!(off > 0.0 && off < 0.01, "{off}");
        let floats = LowRankConfig {
            weight: WeightFormat { weight_type: WeightType::Bf16, ..Default::default() },
            activations: ActivationFormat::Int8,
            ..Default::default()
        };
        assert!(MethodConfig::from(floats).validate().unwrap_err().to_string().contains("stay floats"));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let w = sample(6, 8, 1);
        let refuse = |config: LowRankConfig, expected: &str| {
            let message = MethodConfig::from(config).compress(w.view(), None, None).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        };
        let fits = LowRankConfig {
            weight: WeightFormat { group: Group::Size(8), ..WeightFormat::default() },
            rank: Rank::Components(2),
            ..LowRankConfig::default()
        };
        refuse(LowRankConfig { rank: Rank::Components(7), ..fits.clone() }, "at most 6");
        let of_bits = |max_bits| LowRankConfig { rank: Rank::MaxBits(MaxBits { max_bits }), ..fits.clone() };
        refuse(of_bits(4.0), "at least 9");
        // A bias of 6 numbers is 4 bits more for each of 48 weights.
        let shape = LayerShape { out_features: 6, in_features: 8, has_bias: true };
        assert!(Method::check(&of_bits(12.9), LayerShape { has_bias: false, ..shape }, false).is_ok());
        let message = Method::check(&of_bits(12.9), shape, false).unwrap_err().to_string();
        assert!(message.contains("at least 13.000, the bits of a 6 × 8 weight with its bias"), "{message}");
        refuse(LowRankConfig { rank: Rank::MaxError(MaxError { max_error: 0.0 }), ..fits.clone() }, "above 0");
        for scaling in [Scaling::Exact, Scaling::Rms, Scaling::MeanAbs] {
            refuse(LowRankConfig { scaling, ..fits.clone() }, "calibration");
        }
        refuse(LowRankConfig { rounding: Rounding::Gptq, ..fits.clone() }, "calibration inputs for rounding");
        refuse(
            LowRankConfig { weight: WeightFormat { group: Group::Size(3), ..fits.weight }, ..fits.clone() },
            "divisor",
        );
        refuse(LowRankConfig { ridge_relative: -1.0, ..fits.clone() }, "at least 0");
        let floats = WeightFormat { weight_type: WeightType::F16, ..fits.weight };
        refuse(LowRankConfig { weight: floats, rounding: Rounding::Gptq, ..fits.clone() }, "stay floats");
        refuse(LowRankConfig { weight: floats, dual_scaling: true, ..fits }, "stay floats");
    }

    /// The defaults need no inputs and fit layers of few outputs.
    #[test]
    fn defaults_have_no_correction() {
        let layer = compress(&LowRankConfig::default(), sample(3, 64, 1).view(), None, None).unwrap();
        let config = layer.config();
        assert_eq!((layer.singular_values().len(), &config["rank"]), (0, &json!(0)));
        assert!(config.get("adapted").is_none());
    }

    #[test]
    fn ranks_are_numbers_or_targets() {
        let read = |text: &str| serde_json::from_str::<LowRankConfig>(text).map(|c| c.rank);
        assert_eq!(read(r#"{"rank": 4}"#).unwrap(), Rank::Components(4));
        assert_eq!(read(r#"{"rank": {"max_bits": 4.5}}"#).unwrap(), Rank::MaxBits(MaxBits { max_bits: 4.5 }));
        for (bad, says) in [
            ("-1", "integer `-1`, expected a whole number"),
            ("4.5", "floating point `4.5`, expected a whole number"),
            ("\"all\"", "{ max_error = 0.05 }"),
            ("{\"max_bit\": 3}", "expected `max_error` or `max_bits`"),
            ("{\"max_bits\": \"few\"}", "string \"few\""),
            ("{\"max_bits\": 3, \"max_error\": 0.1}", "invalid length 2, expected a whole number"),
            ("{}", "map"),
        ] {
            let message = read(&format!(r#"{{"rank": {bad}}}"#)).unwrap_err().to_string();
            assert!(message.contains(says), "{bad}: {message}");
        }
        for rank in [Rank::Components(0), Rank::MaxError(MaxError { max_error: 0.5 })] {
            let text = serde_json::to_string(&LowRankConfig { rank, ..LowRankConfig::default() }).unwrap();
            assert_eq!(read(&text).unwrap(), rank, "{text}");
        }
    }
}
