//! Quantises a weight, and corrects what that lost.

use ndarray::{Array1, ArrayView1, ArrayView2, Axis, CowArray, Ix2};
use serde_json::{Map, Value, json};

use super::config::{LowRankConfig, Rank, Rounding, Scaling};
use super::correction::{Correction, Transform};
use super::layer::LowRankLayer;
use super::stored::{Inner, StoredConfig};
use crate::calibration::Calibration;
use crate::error::Result;
use crate::layer::method::Method;
use crate::layer::shape::LayerShape;
use crate::linalg::{Loss, Ridge, matmul, require_finite, unit_of, with_floor};
use crate::quant::{Calibrated, PackedMatrix, RowMatrix, RowType};

/// Damping beside that of the settings, where the second moment is singular with it.
const GPTQ_FLOORS: [f64; 2] = [1e-2, 1e-1];

/// Ridges beside those of the settings, likewise.
const RIDGE_FLOORS: [f64; 3] = [1e-6, 1e-4, 1e-2];

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

/// Quantises `weight` `[out, in]` and corrects it. Settings and shapes have been checked.
///
/// # Errors
/// When a format cannot hold the numbers, or a decomposition fails.
pub fn build(
    config: &LowRankConfig,
    weight: ArrayView2<f32>,
    bias: Option<ArrayView1<f32>>,
    calibration: Option<&Calibration>,
) -> Result<LowRankLayer> {
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
    LowRankLayer::new(Inner { config, weight: packed, a, b, singular_values, bias_correction, bias })?
        .with_activations(activations)
}
