//! Settings that a rule gives.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::linalg::Ridge;
use crate::quant::{ActivationFormat, Clipping, RowType, WeightFormat};

/// Which inputs the correction is the best one for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scaling {
    /// All directions alike: the weight's own error (LQER).
    #[default]
    Identity,
    /// Each input by its mean size: a_i = E|x_i| / √(min a · max a), at least 1e-4 (L²QER).
    MeanAbs,
    /// Each input by the root of its mean square (QERA-approx).
    Rms,
    /// The calibration inputs' second moment (QERA-exact).
    Exact,
}

/// How a weight becomes a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rounding {
    /// The nearest one.
    #[default]
    Nearest,
    /// Column by column, each making up for the errors of those before it on the calibration inputs (GPTQ).
    Gptq,
}

/// How many components the correction has.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a number of components, { max_error = a number above 0 } or { max_bits = bits per weight }"
)]
pub enum Rank {
    /// So many; 0 for none.
    Components(usize),
    /// As few as bring the error, relative to the weight, down to this: both as `scaling` sees them, so that it is the
    /// outputs' error on the calibration inputs for `exact`, and the weight's own for `identity`.
    MaxError(MaxError),
    /// As many as fit: bits per weight, of everything but the bias.
    MaxBits(MaxBits),
}

/// A bound on the error, which decides the rank: `{ max_error = 0.05 }`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaxError {
    /// The largest relative error that is accepted; above 0.
    pub max_error: f64,
}

/// A bound on the size, which decides the rank: `{ max_bits = 4.85 }`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaxBits {
    /// The most bits for each weight, counting everything that is stored but the bias.
    pub max_bits: f64,
}

/// How the correction's components are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SvdMethod {
    /// From a random sketch, where the rank is small for the layer: much faster, and within 1 % of the full one's error.
    #[default]
    Randomized,
    /// From all singular values.
    Full,
}

/// A low-rank layer's settings. The defaults are int4 in groups of 64, rounded to the nearest, without a correction.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LowRankConfig {
    /// The format that the weight is quantised to.
    pub weight: WeightFormat,
    /// How scales are found.
    pub clipping: Clipping,
    /// Scales of columns beside those of groups, so that what is rounded is spread evenly (SINQ).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub dual_scaling: bool,
    /// How a weight becomes a code: the nearest, or calibrated (GPTQ).
    pub rounding: Rounding,
    /// For `rounding = "gptq"`: added to the second moment's diagonal, times the diagonal's mean.
    pub damping: f64,
    /// For `rounding = "gptq"`: round the columns with the largest inputs first.
    pub activation_order: bool,
    /// For `rounding = "gptq"`: times that every scale and code is looked at again afterwards, the others as they are.
    pub sweeps: usize,
    /// Make up for the mean error over the calibration inputs with a constant, and let everything else look at inputs
    /// less their mean.
    pub bias_correction: bool,
    /// The number of components of the correction, or what decides it.
    pub rank: Rank,
    /// What A and B are stored as.
    pub factors: RowType,
    /// What inputs are rounded to before they meet the packed weights. The correction sees them as they are, and so does
    /// everything in a pass of full accuracy.
    #[serde(skip_serializing_if = "as_they_are")]
    pub activations: ActivationFormat,
    /// Which inputs the correction is the best one for.
    pub scaling: Scaling,
    /// How the correction's components are found.
    pub svd: SvdMethod,
    /// For `scaling = "exact"`: added to the second moment's diagonal as it is.
    pub ridge_regularization: f64,
    /// For `scaling = "exact"`: added to the second moment's diagonal, times the diagonal's mean.
    pub ridge_relative: f64,
}

fn as_they_are(activations: &ActivationFormat) -> bool {
    *activations == ActivationFormat::F32
}

pub(super) fn check_activations(activations: ActivationFormat, weight: &WeightFormat) -> Result<()> {
    if weight.weight_type.is_float() && activations.rounds() {
        let found = format!("whole numbers for {}", weight.weight_type);
        return Err(Error::expected("activations", found, "\"f32\" for weights that stay floats"));
    }
    Ok(())
}

/// A stored config, and how inputs are rounded where they are.
pub(in crate::layer) fn with_activations(mut stored: Value, activations: ActivationFormat) -> Value {
    if let Value::Object(map) = &mut stored
        && !as_they_are(&activations)
    {
        map.insert("activations".into(), json!(activations));
    }
    stored
}

impl Default for LowRankConfig {
    fn default() -> Self {
        LowRankConfig {
            weight: WeightFormat::default(),
            clipping: Clipping::default(),
            dual_scaling: false,
            rounding: Rounding::default(),
            damping: 0.1,
            activation_order: false,
            sweeps: 2,
            bias_correction: false,
            rank: Rank::Components(0),
            factors: RowType::F16,
            activations: ActivationFormat::default(),
            scaling: Scaling::default(),
            svd: SvdMethod::default(),
            ridge_regularization: 0.0,
            ridge_relative: 1e-2,
        }
    }
}

impl LowRankConfig {
    /// What is added to the second moment for `scaling = "exact"`.
    pub(crate) fn ridge(&self) -> Ridge {
        Ridge { absolute: self.ridge_regularization, relative: self.ridge_relative }
    }

    /// Returns what calibration inputs are needed for; `None` where they are not.
    pub fn calibrates(&self) -> Option<&'static str> {
        match (self.rounding, self.scaling) {
            _ if self.bias_correction => Some("bias_correction"),
            (Rounding::Gptq, _) => Some("rounding = \"gptq\""),
            (_, Scaling::MeanAbs) => Some("scaling = \"mean_abs\""),
            (_, Scaling::Rms) => Some("scaling = \"rms\""),
            (_, Scaling::Exact) => Some("scaling = \"exact\""),
            (Rounding::Nearest, Scaling::Identity) => None,
        }
    }

    /// Checks the settings by themselves.
    ///
    /// # Errors
    /// When a number is out of its range, or two settings exclude each other.
    pub fn validate(&self) -> Result<()> {
        for (name, value) in [
            ("ridge_regularization", self.ridge_regularization),
            ("ridge_relative", self.ridge_relative),
            ("damping", self.damping),
        ] {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(Error::expected(name, value, "a number of at least 0"));
            }
        }
        match self.rank {
            Rank::MaxError(MaxError { max_error }) if !(max_error > 0.0 && max_error.is_finite()) => {
                return Err(Error::expected("max_error", max_error, "a number above 0"));
            }
            Rank::MaxBits(MaxBits { max_bits }) if !(max_bits > 0.0 && max_bits.is_finite()) => {
                return Err(Error::expected("max_bits", max_bits, "a number above 0"));
            }
            _ => {}
        }
        self.clipping.check(self.weight.weight_type)?;
        if self.weight.weight_type.is_float() && self.rounding == Rounding::Gptq {
            let found = format!("\"gptq\" for {}", self.weight.weight_type);
            return Err(Error::expected("rounding", found, "\"nearest\" for weights that stay floats"));
        }
        if self.weight.weight_type.is_float() && self.dual_scaling {
            let found = format!("true for {}", self.weight.weight_type);
            return Err(Error::expected("dual_scaling", found, "false for weights that stay floats"));
        }
        check_activations(self.activations, &self.weight)
    }

    pub(in crate::layer) fn check(&self, out_features: usize, in_features: usize, calibrated: bool) -> Result<()> {
        let largest = out_features.min(in_features);
        if largest == 0 {
            return Err(Error::expected(
                "shape of a low-rank layer",
                format!("{out_features} × {in_features}"),
                "at least 1 × 1",
            ));
        }
        self.weight.group_size(in_features)?;
        match self.rank {
            Rank::Components(rank) if rank > largest => {
                let most = format!("at most {largest} for a {out_features} × {in_features} layer");
                return Err(Error::expected("rank", rank, most));
            }
            Rank::MaxBits(MaxBits { max_bits }) => {
                let least = self.bits(out_features, in_features, 0)?;
                if max_bits < least {
                    return Err(Error::expected(
                        "max_bits",
                        max_bits,
                        format!(
                            "at least {least:.3}, the bits of a {out_features} × {in_features} weight without factors"
                        ),
                    ));
                }
            }
            _ => {}
        }
        match self.calibrates() {
            Some(setting) if !calibrated => Err(Error::expected(
                format!("calibration inputs for {setting}"),
                "none",
                format!("[tokens, {in_features}] for this layer"),
            )),
            _ => Ok(()),
        }
    }

    /// Bytes of packed weights, scales of groups and columns, zero points, bias correction and factors for a rank, as stored.
    ///
    /// # Errors
    /// When the group does not divide the row.
    pub fn stored_bytes(&self, out_features: usize, in_features: usize, rank: usize) -> Result<usize> {
        let bias_correction = if self.bias_correction { 2 * out_features } else { 0 };
        let columns = if self.dual_scaling { 2 * in_features } else { 0 };
        let weight = self.weight.stored_bytes(out_features, in_features)? + columns;
        Ok(weight + bias_correction + rank * self.component_bytes(out_features, in_features))
    }

    pub(in crate::layer) fn expected_bytes(&self, out_features: usize, in_features: usize) -> Result<Option<usize>> {
        if matches!(self.rank, Rank::MaxError(_)) {
            return Ok(None);
        }
        let rank = self.largest_rank(out_features, in_features)?;
        self.stored_bytes(out_features, in_features, rank).map(Some)
    }

    fn component_bytes(&self, out_features: usize, in_features: usize) -> usize {
        // Its singular value, once with each f32 factor or once beside, and the scales of int8 rows.
        let beside = match self.factors {
            RowType::F32 => 8,
            RowType::F16 => 4,
            RowType::Int8 => 12,
        };
        (out_features + in_features) * self.factors.bytes() + beside
    }

    fn bits(&self, out_features: usize, in_features: usize, rank: usize) -> Result<f64> {
        let bytes = self.stored_bytes(out_features, in_features, rank)?;
        Ok(8.0 * bytes as f64 / (out_features * in_features) as f64)
    }

    /// Returns the largest rank that the settings allow before anything is computed.
    ///
    /// # Errors
    /// When the group does not divide the row.
    pub fn largest_rank(&self, out_features: usize, in_features: usize) -> Result<usize> {
        let largest = out_features.min(in_features);
        Ok(match self.rank {
            Rank::Components(rank) => rank,
            Rank::MaxError(_) => largest,
            Rank::MaxBits(MaxBits { max_bits }) => {
                let bytes = (max_bits * (out_features * in_features) as f64 / 8.0) as usize;
                let left = bytes.saturating_sub(self.stored_bytes(out_features, in_features, 0)?);
                (left / self.component_bytes(out_features, in_features)).min(largest)
            }
        })
    }
}
