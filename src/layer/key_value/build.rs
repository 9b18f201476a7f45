//! Making keys and values from a weight.

use std::sync::Arc;

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis};

use super::config::{Backend, Decomposition, KeyValueConfig};
use super::threshold::Curves;
use super::{Core, KeyValueLayer, StoredConfig};
use crate::error::{Error, Result};
use crate::index::{FlatIndex, SearchIndex};
use crate::layer::{check_inputs, require_finite};
use crate::linalg::{Moments, cholesky, kept_rank, matmul_f64, solve_lower_transposed, spectral_norm_bound, svd};
use crate::quant::{RowMatrix, RowType};

/// What is known of a layer's inputs without the inputs themselves.
#[derive(Debug, Clone, PartialEq)]
pub struct InputStatistics {
    /// μ `[in_features]`.
    pub mean: Array1<f64>,
    /// C `[in_features, in_features]`, symmetric positive definite once the config's ridge is added.
    pub covariance: Array2<f64>,
}

impl KeyValueLayer {
    /// Factors `weight` `[out_features, in_features]` for inputs with these statistics. Thresholds for K assume normal
    /// scores, since no inputs are at hand to measure them on.
    ///
    /// # Errors
    /// When a setting is out of its range, a shape does not fit, a number is not finite, or the covariance is not
    /// positive definite.
    pub fn from_statistics(
        config: &KeyValueConfig,
        weight: ArrayView2<f32>,
        bias: Option<ArrayView1<f32>>,
        statistics: &InputStatistics,
    ) -> Result<Self> {
        let (out_features, in_features) = weight.dim();
        config.validate()?;
        config.check(out_features, in_features)?;
        check_inputs(weight, bias, None)?;
        let found = (statistics.mean.len(), statistics.covariance.dim());
        if found != (in_features, (in_features, in_features)) {
            return Err(Error::expected(
                "shapes of mean and covariance",
                format!("{found:?}"),
                format!("({in_features}, ({in_features}, {in_features}))"),
            ));
        }
        if let Some((index, value)) = statistics.mean.iter().enumerate().find(|(_, v)| !v.is_finite()) {
            return Err(Error::NotFinite { what: "the inputs' mean".into(), value: *value, index });
        }
        let covariance = config.ridge().added_to(statistics.covariance.clone());
        Self::factor(config, weight, bias, statistics.mean.clone(), Some(covariance), None)
    }

    /// Factors `weight` `[out, in]` for inputs like `calibration`. Settings and shapes have been checked.
    pub(in crate::layer) fn build(
        config: &KeyValueConfig,
        weight: ArrayView2<f32>,
        bias: Option<ArrayView1<f32>>,
        calibration: Option<ArrayView2<f32>>,
    ) -> Result<Self> {
        let (mean, covariance) = match calibration {
            Some(inputs) => {
                let moments = Moments::of(inputs)?;
                (moments.mean, Some(config.ridge().added_to(moments.covariance)))
            }
            None => (Array1::zeros(weight.ncols()), None),
        };
        Self::factor(config, weight, bias, mean, covariance, calibration)
    }

    /// `covariance` has its ridge.
    fn factor(
        config: &KeyValueConfig,
        weight: ArrayView2<f32>,
        bias: Option<ArrayView1<f32>>,
        mean: Array1<f64>,
        covariance: Option<Array2<f64>>,
        calibration: Option<ArrayView2<f32>>,
    ) -> Result<Self> {
        let (out_features, in_features) = weight.dim();
        let w = weight.mapv(f64::from);
        let calibrated = covariance.is_some();
        let spread = covariance.as_ref().map(|c| c.diag().mapv(|v| v.sqrt() as f32));
        let factor = covariance.map(|c| cholesky(c.view())).transpose()?;
        let factored = match (&factor, config.decomposition) {
            (Some(l), Decomposition::WhitenedSvd) => svd(matmul_f64(w.view(), l.view()).view())?,
            _ => svd(w.view())?,
        };
        let singular = factored.s.to_vec();
        let rank = kept_rank(&singular, config.energy_keep, config.min_singular_value);
        if rank == 0 {
            return Err(Error::expected(
                "min_singular_value",
                config.min_singular_value,
                format!("at most {}, the layer's largest singular value", singular.first().copied().unwrap_or(0.0)),
            ));
        }
        let kept = factored.truncated(rank);
        // Right singular vectors as rows, whitened or plain; then κ and s as the module says.
        let (folded, scales): (Array2<f64>, Vec<f64>) = match (&factor, config.decomposition) {
            (Some(l), Decomposition::WhitenedSvd) => {
                (solve_lower_transposed(l.view(), kept.vt.t()).reversed_axes(), kept.s.to_vec())
            }
            (Some(l), Decomposition::Svd) => {
                let keys = &kept.vt * &kept.s.view().insert_axis(Axis(1));
                let scales: Vec<f64> =
                    matmul_f64(keys.view(), l.view()).rows().into_iter().map(|k| k.dot(&k).sqrt()).collect();
                let folded = Array2::from_shape_fn(keys.dim(), |(i, j)| {
                    if scales[i] > 0.0 { keys[[i, j]] / scales[i] } else { kept.vt[[i, j]] }
                });
                (folded, scales)
            }
            (None, _) => (kept.vt.clone(), kept.s.to_vec()),
        };
        let truncation = if rank == singular.len() {
            0.0
        } else {
            let stored =
                matmul_f64((&kept.u * &Array1::from(scales.clone()).view().insert_axis(Axis(0))).view(), folded.view());
            svd((&w - &stored).view())?.s[0]
        };
        let keys = folded.mapv(|v| v as f32).as_standard_layout().to_owned();
        require_finite("the folded keys", keys.iter())?;
        let scales: Vec<f32> = scales.iter().map(|&s| s as f32).collect();
        let Backend::Flat { keys: kind } = config.backend;
        let index = FlatIndex::new(keys, kind, spread.filter(|_| kind == RowType::Int8))?;
        let values = RowMatrix::new(kept.u.t().mapv(|v| v as f32), config.values)?;
        let scaled = |keys: &Array2<f64>| keys * &Array1::from(scales.clone()).mapv(f64::from).insert_axis(Axis(1));
        let used = index.reconstruct().mapv(f64::from);
        let key_error = match kind {
            RowType::F32 => 0.0,
            RowType::F16 | RowType::Int8 => {
                let error = scaled(&(&used - &folded));
                spectral_norm_bound(in_units(error, &index).view())
            }
        };
        let value_error = match config.values {
            RowType::F32 => 0.0,
            RowType::F16 | RowType::Int8 => spectral_norm_bound((values.to_f32().mapv(f64::from) - kept.u.t()).view()),
        };
        let rounding =
            in_units(scaled(&used), &index).iter().map(|v| v * v).sum::<f64>().sqrt() * f64::from(f32::EPSILON);
        let mean32 = mean.mapv(|v| v as f32);
        let curves =
            calibration.map(|inputs| Curves::measure(index.scores((&inputs - &mean32).view()).view(), &scales));
        // Of the mean as it is subtracted from queries, rounding included.
        let mean_output = w.dot(&mean32.mapv(f64::from)).mapv(|v| v as f32);
        let stored = StoredConfig {
            decomposition: config.decomposition,
            energy_keep: config.energy_keep,
            min_singular_value: config.min_singular_value,
            ridge_regularization: config.ridge_regularization,
            ridge_relative: config.ridge_relative,
            use_bias: config.use_bias,
            backend: config.backend,
            values: config.values,
            calibrated,
            in_features,
            out_features,
            rank,
            truncation,
            key_error,
            value_error,
            rounding,
        };
        let core = Core::new(stored, index, scales, values, mean32, mean_output, bias.map(|b| b.to_owned()), curves)?;
        Self::with_settings(Arc::new(core), config.search())
    }
}

/// Rows `[keys, in]` in the units that the index keeps keys in.
fn in_units(rows: Array2<f64>, index: &FlatIndex) -> Array2<f64> {
    match index.units() {
        Some(units) => rows * &units.mapv(f64::from).insert_axis(Axis(0)),
        None => rows,
    }
}
