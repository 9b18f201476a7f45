//! Makes keys and values of a weight.

use std::sync::Arc;

use half::f16;
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis};

use super::backend::{Backend, fitted_format};
use super::config::{Decomposition, KeyValueConfig, StoredSettings};
use super::layer::{Core, KeyValueLayer, StoredConfig};
use super::threshold::Curves;
use crate::calibration::Calibration;
use crate::error::{Error, Result};
use crate::index::{FlatIndex, HnswIndex, IvfPqIndex, KeyIndex, SearchIndex};
use crate::layer::method::Method;
use crate::linalg::{
    HALF_ROUNDING, Loss, cholesky, kept_rank, matmul_f64, matmul_nt, require_finite, solve_lower_transposed,
    spectral_norm_bound, svd, unit_of_f32, with_floor,
};
use crate::quant::{RowFormat, RowMatrix, RowType};

impl KeyValueLayer {
    /// Factors `weight` `[out, in]` for inputs like `calibration`. Settings and shapes have been checked.
    pub(super) fn build(
        config: &KeyValueConfig,
        weight: ArrayView2<f32>,
        bias: Option<ArrayView1<f32>>,
        calibration: Option<&Calibration>,
    ) -> Result<Self> {
        let inputs = Inputs::new(config, weight.ncols(), calibration)?;
        let components = Components::factor(config, weight, &inputs)?;
        Self::assemble(config, weight, bias, &inputs, components, calibration)
    }

    /// Returns the layer of these components, stored in the types that the config asks for.
    pub(super) fn assemble(
        config: &KeyValueConfig,
        weight: ArrayView2<f32>,
        bias: Option<ArrayView1<f32>>,
        inputs: &Inputs,
        components: Components,
        calibration: Option<&Calibration>,
    ) -> Result<Self> {
        let (out_features, in_features) = weight.dim();
        let keys = components.keys.mapv(|v| v as f32).as_standard_layout().to_owned();
        require_finite("the folded keys", keys.iter())?;
        let scales: Vec<f32> = components.scales.iter().map(|&s| s as f32).collect();
        check_scales(&components.scales, &scales)?;
        let rank = scales.len();
        let (backend, mut adapted) = config.backend.fitted(config.on_misfit, rank, in_features)?;
        let (value_format, more) = fitted_format(config.values, config.on_misfit, "values", rank, out_features)?;
        adapted.extend(more);
        adapted.extend(inputs.adapted.iter().cloned());
        // A wrong score moves the output by its key's scale.
        let unit = unit_of_f32(scales.iter()).unwrap_or(1.0);
        let weights: Vec<f32> = scales.iter().map(|s| (s / unit) * (s / unit)).collect();
        let float_keys = (backend.stores_float_keys() && backend.format() != F32).then(|| keys.clone());
        let index = key_index(backend, keys, &scales, &weights, inputs.spread.clone())?;
        let values = RowMatrix::in_format(components.values.mapv(|v| v as f32), value_format, &weights)?;
        let bounds = ErrorBounds::of(&components, &scales, backend, index.rows(), value_format, &values);
        let mean = inputs.mean.mapv(|v| v as f32);
        let sample = calibration.filter(|_| inputs.factor.is_some()).map(Calibration::sample);
        let sample = sample.filter(|sample| sample.nrows() > 0);
        let curves = sample.map(|x| {
            let centred = &x - &mean;
            let scores = match &float_keys {
                Some(keys) => matmul_nt(centred.view(), keys.view()),
                None => index.rows().scores(centred.view()),
            };
            Curves::measure(scores.view(), &scales)
        });
        if let Some(curves) = &curves {
            require_finite("the thresholds of the calibration inputs", curves.thresholds.iter())?;
        }
        // Of the mean as it is subtracted from queries, rounding included.
        let mean_output = weight.mapv(f64::from).dot(&mean.mapv(f64::from)).mapv(|v| v as f32);
        require_finite("the inputs' mean", mean.iter())?;
        require_finite("the output of the inputs' mean", mean_output.iter())?;
        for (what, bound) in [
            ("the norm of what was dropped", components.truncation),
            ("the error of keys", bounds.keys),
            ("the error of values", bounds.values),
            ("the error of f32 arithmetic", bounds.rounding),
        ] {
            require_finite(what, [bound].iter())?;
        }
        let stored = StoredConfig {
            settings: StoredSettings { backend, values: value_format, ..config.stored() },
            adapted,
            calibrated: inputs.factor.is_some(),
            in_features,
            out_features,
            rank,
            truncation: components.truncation,
            key_error: bounds.keys,
            value_error: bounds.values,
            rounding: bounds.rounding,
        };
        let bias = bias.map(|b| b.to_owned());
        let core = Core::new(stored, index, float_keys, scales, values, mean, mean_output, bias, curves)?;
        Self::with_settings(Arc::new(core), config.search())
    }
}

/// The format that nothing is rounded in.
const F32: RowFormat = RowFormat::Plain(RowType::F32);

/// Puts keys `[keys, in]` into the index of a backend. `weights` say how much an error of each key counts, and `spread` is the
/// standard deviation of each input.
fn key_index(
    backend: Backend,
    keys: Array2<f32>,
    scales: &[f32],
    weights: &[f32],
    spread: Option<Array1<f32>>,
) -> Result<KeyIndex> {
    let format = backend.format();
    // Types of few bits keep keys in units of the spread, f16 where it would lose too much of them as they are.
    let units = match format {
        RowFormat::Plain(RowType::F32) => None,
        RowFormat::Plain(RowType::F16)
            if spread.is_none() || halves_hold(keys.view(), scales, spread.as_ref(), None, HALF_ROUNDING) =>
        {
            None
        }
        _ => spread.clone(),
    };
    if format == RowFormat::Plain(RowType::F16)
        && !halves_hold(keys.view(), scales, spread.as_ref(), units.as_ref(), LOST_BY_HALVES)
    {
        let most = keys.iter().fold(0f32, |most, v| most.max(v.abs()));
        return Err(Error::expected(
            "keys to store as f16",
            format!("numbers of at most {most:e}"),
            "numbers that f16 holds: use keys = \"f32\" or \"int8\"",
        ));
    }
    Ok(match (backend, backend.graph()) {
        (_, Some(options)) => {
            KeyIndex::Hnsw(HnswIndex::fit(keys.view(), scales, spread, options, backend.stores_float_keys())?)
        }
        (Backend::IvfPq { clusters, probes, seed, .. }, _) => {
            let codes = FlatIndex::in_format(keys.clone(), format, weights, units)?;
            let cells = (clusters, probes);
            KeyIndex::IvfPq(IvfPqIndex::fit(codes, keys.view(), scales, spread, cells, seed)?)
        }
        _ => KeyIndex::Flat(FlatIndex::in_format(keys, format, weights, units)?),
    })
}

/// The share of scores that keys may lose as f16, where no unit makes it less.
const LOST_BY_HALVES: f64 = 4.0 * HALF_ROUNDING;

/// Returns whether f16 keys `[keys, in]` multiplied with `units` lose at most this share, for inputs of this spread.
fn halves_hold(
    keys: ArrayView2<f32>,
    scales: &[f32],
    spread: Option<&Array1<f32>>,
    units: Option<&Array1<f32>>,
    share: f64,
) -> bool {
    let mut loss = Loss::default();
    for (key, &scale) in keys.rows().into_iter().zip(scales) {
        for (j, &v) in key.iter().enumerate() {
            let unit = units.map_or(1.0, |units| f64::from(units[j]));
            let weight = f64::from(scale) * spread.map_or(1.0, |spread| f64::from(spread[j])) / unit;
            let wanted = f64::from(v) * unit;
            loss.add(wanted * weight, f16::from_f64(wanted).to_f64() * weight);
        }
    }
    loss.within(share)
}

/// Checks that f32 holds the scales of components.
///
/// # Errors
/// When one is beyond it, or the largest is too small to be a normal number.
fn check_scales(wanted: &[f64], scales: &[f32]) -> Result<()> {
    require_finite("the components' scales", scales.iter())?;
    let most = wanted.iter().fold(0f64, |most, s| most.max(*s));
    if most > 0.0 && most < f64::from(f32::MIN_POSITIVE) {
        return Err(Error::expected(
            "largest scale of a layer's components",
            format!("{most:e}"),
            format!("0, or at least {:e}", f32::MIN_POSITIVE),
        ));
    }
    Ok(())
}

/// Bounds on the errors of stored keys and values, as [`StoredConfig`] has them.
struct ErrorBounds {
    keys: f64,
    values: f64,
    rounding: f64,
}

impl ErrorBounds {
    /// Compares the components with what `index` and `values` keep of them.
    fn of(
        components: &Components,
        scales: &[f32],
        backend: Backend,
        index: &FlatIndex,
        value_format: RowFormat,
        values: &RowMatrix,
    ) -> Self {
        let scales = Array1::from_iter(scales.iter().map(|&s| f64::from(s)));
        let scaled = |keys: &Array2<f64>| keys * &scales.view().insert_axis(Axis(1));
        let used = index.reconstruct().mapv(f64::from);
        let keys = match backend.format() == F32 && backend.stores_float_keys() {
            true => 0.0,
            false => spectral_norm_bound(in_units_of(scaled(&(&used - &components.keys)), index).view()),
        };
        let value_error = match value_format == F32 {
            true => 0.0,
            false => spectral_norm_bound((values.to_f32().mapv(f64::from) - &components.values).view()),
        };
        let squared: f64 = in_units_of(scaled(&used), index).iter().map(|v| v * v).sum();
        ErrorBounds { keys, values: value_error, rounding: squared.sqrt() * f64::from(f32::EPSILON) }
    }
}

/// Statistics of the inputs, as the factorisation uses them.
#[derive(Debug)]
pub(super) struct Inputs {
    /// μ `[in]`.
    pub mean: Array1<f64>,
    /// Cholesky factor L of the covariance with its ridge, `[in, in]`; none where it is I.
    pub factor: Option<Array2<f64>>,
    /// Standard deviation of each input, `[in]`; none where nothing is known of them.
    spread: Option<Array1<f32>>,
    /// What the statistics made necessary, as [`StoredConfig`] has it.
    adapted: Vec<String>,
}

/// Ridges beside those of the settings, where the covariance is singular with them.
const RIDGE_FLOORS: [f64; 3] = [1e-6, 1e-4, 1e-2];

impl Inputs {
    /// Returns the statistics of calibration inputs, with the config's ridge added; without inputs, or where they tell nothing, mean 0
    /// and covariance I.
    pub fn new(config: &KeyValueConfig, in_features: usize, calibration: Option<&Calibration>) -> Result<Self> {
        let unknown = |adapted| Inputs { mean: Array1::zeros(in_features), factor: None, spread: None, adapted };
        let Some(calibration) = calibration else { return Ok(unknown(vec![])) };
        if let Some(reason) = config.unusable(calibration) {
            return Ok(unknown(vec![format!("calibration: not used, {reason}")]));
        }
        let covariance = config.ridge().added_to(calibration.covariance()?.into_owned());
        let with_diagonal = |c: ArrayView2<f64>| Ok((c.diag().to_owned(), cholesky(c)?));
        let ((diagonal, factor), floor) = with_floor(covariance.view(), &RIDGE_FLOORS, with_diagonal)?;
        let spread = diagonal.mapv(|v| v.sqrt() as f32);
        require_finite("the spread of the inputs with its ridge", spread.iter())?;
        let ridge = config.ridge_relative;
        let adapted = floor.map(|floor| format!("ridge_relative: {ridge} to {}", ridge + floor)).into_iter().collect();
        Ok(Inputs { mean: calibration.mean().clone(), factor: Some(factor), spread: Some(spread), adapted })
    }
}

/// Keys and values in f64: `W = Σ s_i u_i κ_iᵀ` but for what was dropped.
#[derive(Debug)]
pub(super) struct Components {
    /// κ `[keys, in]`.
    pub keys: Array2<f64>,
    /// s `[keys]`.
    pub scales: Vec<f64>,
    /// u `[keys, out]`, orthonormal rows.
    pub values: Array2<f64>,
    /// Spectral norm of what was dropped, or a bound on it.
    pub truncation: f64,
}

impl Components {
    fn factor(config: &KeyValueConfig, weight: ArrayView2<f32>, inputs: &Inputs) -> Result<Self> {
        let w = weight.mapv(f64::from);
        let factored = match (&inputs.factor, config.decomposition) {
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
        let (keys, scales) = match (&inputs.factor, config.decomposition) {
            (Some(l), Decomposition::WhitenedSvd) => {
                (solve_lower_transposed(l.view(), kept.vt.t()).reversed_axes(), kept.s.to_vec())
            }
            (Some(_), Decomposition::Svd) => {
                let keys = &kept.vt * &kept.s.view().insert_axis(Axis(1));
                standardized(keys, inputs)
            }
            (None, _) => (kept.vt.clone(), kept.s.to_vec()),
        };
        let truncation = if rank == singular.len() {
            0.0
        } else {
            let stored =
                matmul_f64((&kept.u * &Array1::from(scales.clone()).view().insert_axis(Axis(0))).view(), keys.view());
            svd((&w - &stored).view())?.s[0]
        };
        let values = kept.u.t().as_standard_layout().to_owned();
        Ok(Components { keys, scales, values, truncation })
    }
}

/// Divides keys by scales so that their scores have unit variance over the inputs, and returns both. A key whose score is the
/// same for all inputs keeps its direction, at unit length, and has scale 0.
pub(super) fn standardized(mut keys: Array2<f64>, inputs: &Inputs) -> (Array2<f64>, Vec<f64>) {
    let lengths = |rows: &Array2<f64>| -> Vec<f64> { rows.rows().into_iter().map(|k| k.dot(&k).sqrt()).collect() };
    let scales = match &inputs.factor {
        Some(l) => lengths(&matmul_f64(keys.view(), l.view())),
        None => lengths(&keys),
    };
    for (mut key, &scale) in keys.rows_mut().into_iter().zip(&scales) {
        let length = if scale > 0.0 { scale } else { key.dot(&key).sqrt() };
        if length > 0.0 {
            key /= length;
        }
    }
    (keys, scales)
}

/// Returns rows `[keys, in]` in the units that the index keeps keys in.
fn in_units_of(rows: Array2<f64>, index: &FlatIndex) -> Array2<f64> {
    match index.units() {
        Some(units) => rows * &units.mapv(f64::from).insert_axis(Axis(0)),
        None => rows,
    }
}
