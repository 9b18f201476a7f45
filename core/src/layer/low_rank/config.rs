//! Settings that a rule gives.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{IgnoredAny, MapAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::layer::shape::{LayerShape, bits_per_weight};
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
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Rank {
    /// So many; 0 for none.
    Components(usize),
    /// As few as bring the error, relative to the weight, down to this: both as `scaling` sees them, so that it is the
    /// outputs' error on the calibration inputs for `exact`, and the weight's own for `identity`.
    MaxError(MaxError),
    /// As many as fit: bits per weight, everything that is stored counted, the bias too.
    MaxBits(MaxBits),
}

/// A number, or a table of one bound.
impl<'de> Deserialize<'de> for Rank {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum Bound {
            MaxError(f64),
            MaxBits(f64),
        }
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Rank;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a whole number of components (0 for none), or a table { max_error = 0.05 } or { max_bits = 4.5 }",
                )
            }
            fn visit_u64<E: serde::de::Error>(self, n: u64) -> std::result::Result<Rank, E> {
                let rank = usize::try_from(n).map(Rank::Components);
                rank.map_err(|_| E::invalid_value(Unexpected::Unsigned(n), &self))
            }
            fn visit_i64<E: serde::de::Error>(self, n: i64) -> std::result::Result<Rank, E> {
                let rank = usize::try_from(n).map(Rank::Components);
                rank.map_err(|_| E::invalid_value(Unexpected::Signed(n), &self))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Rank, A::Error> {
                let bound = Bound::deserialize(MapAccessDeserializer::new(&mut map))?;
                if map.next_key::<IgnoredAny>()?.is_some() {
                    return Err(serde::de::Error::invalid_length(2, &self));
                }
                Ok(match bound {
                    Bound::MaxError(max_error) => Rank::MaxError(MaxError { max_error }),
                    Bound::MaxBits(max_bits) => Rank::MaxBits(MaxBits { max_bits }),
                })
            }
        }
        deserializer.deserialize_any(Either)
    }
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
    /// The most bits for each weight, counting everything that is stored, the bias too.
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

    /// Returns what calibration inputs are needed for; `None` where they are not. A scaling without a correction needs none.
    pub fn calibrates(&self) -> Option<&'static str> {
        let scaling = if self.rank == Rank::Components(0) { Scaling::Identity } else { self.scaling };
        match (self.rounding, scaling) {
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
        self.weight.check_made()?;
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

    pub(in crate::layer) fn check(&self, shape: LayerShape, calibrated: bool) -> Result<()> {
        let LayerShape { out_features, in_features, has_bias } = shape;
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
                let bytes = self.stored_bytes(shape, 0)?;
                let least = bits_per_weight(bytes as u64, out_features as u64, in_features as u64);
                if let Some(least) = least.filter(|least| max_bits < *least) {
                    let bias = if has_bias { " with its bias" } else { "" };
                    return Err(Error::expected(
                        "max_bits",
                        max_bits,
                        format!(
                            "at least {least:.3}, the bits of a {out_features} × {in_features} weight{bias}, without factors"
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
                format!("--calibration FILE with a tensor [tokens, {in_features}] named after this layer"),
            )),
            _ => Ok(()),
        }
    }

    /// Bytes of packed weights, scales of groups and columns, zero points, bias correction, factors for a rank and bias, as
    /// stored.
    ///
    /// # Errors
    /// When the group does not divide the row.
    pub fn stored_bytes(&self, shape: LayerShape, rank: usize) -> Result<usize> {
        let LayerShape { out_features, in_features, .. } = shape;
        let bias_correction = if self.bias_correction { 2 * out_features } else { 0 };
        let columns = if self.dual_scaling { 2 * in_features } else { 0 };
        let weight = self.weight.stored_bytes(out_features, in_features)? + columns;
        Ok(weight + bias_correction + shape.bias_bytes() + rank * self.component_bytes(out_features, in_features))
    }

    pub(in crate::layer) fn expected_bytes(&self, shape: LayerShape) -> Result<Option<usize>> {
        if matches!(self.rank, Rank::MaxError(_)) {
            return Ok(None);
        }
        let rank = self.largest_rank(shape)?;
        self.stored_bytes(shape, rank).map(Some)
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

    /// Returns the largest rank that the settings allow before anything is computed.
    ///
    /// # Errors
    /// When the group does not divide the row.
    pub fn largest_rank(&self, shape: LayerShape) -> Result<usize> {
        let LayerShape { out_features, in_features, .. } = shape;
        let largest = out_features.min(in_features);
        Ok(match self.rank {
            Rank::Components(rank) => rank,
            Rank::MaxError(_) => largest,
            Rank::MaxBits(MaxBits { max_bits }) => {
                let bytes = (max_bits * (out_features * in_features) as f64 / 8.0) as usize;
                let left = bytes.saturating_sub(self.stored_bytes(shape, 0)?);
                (left / self.component_bytes(out_features, in_features)).min(largest)
            }
        })
    }
}
