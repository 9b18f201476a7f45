//! Settings of a key–value layer, with AXL's names where they mean the same.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::backend::{Backend, fitted_format};
use crate::error::{Error, Result};
use crate::linalg::Ridge;
use crate::quant::RowFormat;

/// Which factorisation the keys and values come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decomposition {
    /// W = U S Vᵀ.
    Svd,
    /// W L = U S Vᵀ with L Lᵀ the inputs' covariance: the best rank-k approximation under the input distribution.
    #[default]
    WhitenedSvd,
}

/// What makes a key a hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ranking {
    /// What the key adds to the output: s·score.
    #[default]
    Contribution,
    /// How well the key matches the whitened query, whatever it adds (AXL's).
    Score,
}

/// Whether a key may be hit by its negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sides {
    /// |value| ≥ threshold.
    #[default]
    Both,
    /// value ≥ threshold (AXL's).
    Positive,
}

/// What happens to settings that a layer's shape does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnMisfit {
    /// The nearest that fit are taken, and the layer's config says so.
    #[default]
    Adapt,
    /// They are an error that names what would fit.
    Error,
}

/// How many keys a query uses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limit {
    /// This many on average over the inputs.
    Keys(f64),
    /// Those that rank at least this high.
    Threshold(f32),
    /// As few as certify this ‖ŷ − y‖ / ‖y‖ for each query by itself.
    MaxError(f64),
}

/// How a layer runs. Changing these leaves the stored arrays as they are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SearchSettings {
    #[serde(default)]
    pub ranking: Ranking,
    #[serde(default)]
    pub sides: Sides,
    /// K: the threshold is where this many keys are expected. The default, with 64, when none of the three is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_keys_per_query: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_relative_error: Option<f64>,
    /// At most this many hits a query, the highest ranked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_ids_capacity: Option<usize>,
    /// Whether a forward pass searches; if not, it uses every key.
    #[serde(default = "yes")]
    pub use_approximate_inference: bool,
    /// Whether gradients are those of the exact layer; if not, those of the pass that the settings run.
    #[serde(default = "yes")]
    pub use_straight_through_estimator: bool,
}

/// Hits a query when no limit is given.
const DEFAULT_KEYS: f64 = 64.0;

impl Default for SearchSettings {
    fn default() -> Self {
        SearchSettings {
            ranking: Ranking::default(),
            sides: Sides::default(),
            expected_keys_per_query: None,
            threshold: None,
            max_relative_error: None,
            max_ids_capacity: None,
            use_approximate_inference: true,
            use_straight_through_estimator: true,
        }
    }
}

impl SearchSettings {
    /// The limit in force for a layer of `keys` keys: the one that was set, or 64 expected keys (all, where there are fewer).
    pub fn limit(&self, keys: usize) -> Limit {
        match (self.expected_keys_per_query, self.threshold, self.max_relative_error) {
            (Some(k), ..) => Limit::Keys(k),
            (_, Some(t), _) => Limit::Threshold(t),
            (.., Some(e)) => Limit::MaxError(e),
            (None, None, None) => Limit::Keys(DEFAULT_KEYS.min(keys as f64)),
        }
    }

    /// Checks the settings by themselves.
    ///
    /// # Errors
    /// When a number is out of its range, or two limits are given.
    pub fn validate(&self) -> Result<()> {
        let given: Vec<&str> = [
            self.expected_keys_per_query.map(|_| "expected_keys_per_query"),
            self.threshold.map(|_| "threshold"),
            self.max_relative_error.map(|_| "max_relative_error"),
        ]
        .into_iter()
        .flatten()
        .collect();
        if given.len() > 1 {
            return Err(Error::expected("limits of a key–value search", given.join(" and "), "one of them"));
        }
        self.limit(usize::MAX).validate(self.sides)?;
        if self.max_ids_capacity == Some(0) {
            return Err(Error::expected("max_ids_capacity", 0, "at least 1"));
        }
        Ok(())
    }
}

impl Limit {
    pub(super) fn validate(&self, sides: Sides) -> Result<()> {
        match *self {
            Limit::Keys(k) if !(k > 0.0 && k.is_finite()) => {
                Err(Error::expected("expected_keys_per_query", k, "a positive number"))
            }
            Limit::Threshold(t) if !t.is_finite() || (t < 0.0 && sides == Sides::Both) => {
                Err(Error::expected("threshold", t, "a finite number, not negative unless sides = \"positive\""))
            }
            Limit::MaxError(e) if !(e > 0.0 && e.is_finite()) => {
                Err(Error::expected("max_relative_error", e, "a positive number"))
            }
            Limit::MaxError(_) if sides == Sides::Positive => Err(Error::expected(
                "sides",
                "\"positive\"",
                "\"both\" with max_relative_error: a one-sided search cannot promise an error",
            )),
            _ => Ok(()),
        }
    }
}

/// Settings that a rule gives: what is stored, and how it runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyValueConfig {
    #[serde(default)]
    pub decomposition: Decomposition,
    /// Components are kept until they hold this share of Σs².
    #[serde(default = "one")]
    pub energy_keep: f64,
    /// Components with a smaller singular value are dropped.
    #[serde(default)]
    pub min_singular_value: f64,
    /// Added to the covariance's diagonal as it is.
    #[serde(default = "default_ridge")]
    pub ridge_regularization: f64,
    /// Added to the covariance's diagonal, times the diagonal's mean.
    #[serde(default = "default_ridge_relative")]
    pub ridge_relative: f64,
    /// Whether a forward pass adds the bias; it is stored in any case.
    #[serde(default = "yes")]
    pub use_bias: bool,
    #[serde(default)]
    pub backend: Backend,
    #[serde(default)]
    pub values: RowFormat,
    /// What happens to settings of `backend` and `values` that the layer's shape does not allow.
    #[serde(default)]
    pub on_misfit: OnMisfit,
    // The fields of SearchSettings, spelled out: serde cannot flatten and refuse unknown names at once.
    #[serde(default)]
    pub ranking: Ranking,
    #[serde(default)]
    pub sides: Sides,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_keys_per_query: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_relative_error: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_ids_capacity: Option<usize>,
    #[serde(default = "yes")]
    pub use_approximate_inference: bool,
    #[serde(default = "yes")]
    pub use_straight_through_estimator: bool,
}

impl Default for KeyValueConfig {
    fn default() -> Self {
        serde_json::from_value(Value::Object(Map::new())).expect("every field has a default")
    }
}

impl KeyValueConfig {
    /// The part that decides how the layer runs.
    pub fn search(&self) -> SearchSettings {
        SearchSettings {
            ranking: self.ranking,
            sides: self.sides,
            expected_keys_per_query: self.expected_keys_per_query,
            threshold: self.threshold,
            max_relative_error: self.max_relative_error,
            max_ids_capacity: self.max_ids_capacity,
            use_approximate_inference: self.use_approximate_inference,
            use_straight_through_estimator: self.use_straight_through_estimator,
        }
    }

    /// What is added to the covariance.
    pub fn ridge(&self) -> Ridge {
        Ridge { absolute: self.ridge_regularization, relative: self.ridge_relative }
    }

    /// Checks the settings by themselves.
    ///
    /// # Errors
    /// When a number is out of its range, or two limits are given.
    pub fn validate(&self) -> Result<()> {
        if !(self.energy_keep > 0.0 && self.energy_keep <= 1.0) {
            return Err(Error::expected("energy_keep", self.energy_keep, "a share above 0 and at most 1"));
        }
        for (name, value) in [
            ("min_singular_value", self.min_singular_value),
            ("ridge_regularization", self.ridge_regularization),
            ("ridge_relative", self.ridge_relative),
        ] {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(Error::expected(name, value, "a number of at least 0"));
            }
        }
        if let RowFormat::Product(format) = self.values {
            format.validate()?;
        }
        self.backend.validate()?;
        self.search().validate()?;
        self.backend.check_limit(self.search().limit(usize::MAX))
    }

    pub fn check(&self, out_features: usize, in_features: usize) -> Result<()> {
        let keys = out_features.min(in_features);
        if keys == 0 {
            return Err(Error::expected(
                "shape of a key–value layer",
                format!("{out_features} × {in_features}"),
                "at least 1 × 1",
            ));
        }
        check_keys(self.expected_keys_per_query, keys)?;
        self.backend.fitted(self.on_misfit, keys, in_features)?;
        fitted_format(self.values, self.on_misfit, "values", keys, out_features)?;
        Ok(())
    }
}

pub(super) fn check_keys(expected: Option<f64>, keys: usize) -> Result<()> {
    match expected {
        Some(k) if k > keys as f64 => {
            Err(Error::expected("expected_keys_per_query", k, format!("at most {keys}, the layer's keys")))
        }
        _ => Ok(()),
    }
}

fn yes() -> bool {
    true
}

fn one() -> f64 {
    1.0
}

fn default_ridge() -> f64 {
    1e-6
}

fn default_ridge_relative() -> f64 {
    1e-2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_exclude_each_other() {
        let both =
            KeyValueConfig { threshold: Some(1.0), expected_keys_per_query: Some(4.0), ..KeyValueConfig::default() };
        assert!(both.validate().unwrap_err().to_string().contains("one of them"));
        assert!(KeyValueConfig::default().validate().is_ok());
        let one_sided =
            KeyValueConfig { max_relative_error: Some(0.1), sides: Sides::Positive, ..KeyValueConfig::default() };
        assert!(one_sided.validate().is_err());
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(
                KeyValueConfig { expected_keys_per_query: Some(bad), ..KeyValueConfig::default() }.validate().is_err()
            );
        }
        assert!(
            KeyValueConfig { expected_keys_per_query: Some(9.0), ..KeyValueConfig::default() }.check(8, 20).is_err()
        );
    }

    #[test]
    fn reads_back_what_it_writes() {
        let config = KeyValueConfig { max_relative_error: Some(0.25), ..KeyValueConfig::default() };
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<KeyValueConfig>(&text).unwrap(), config);
        assert!(serde_json::from_str::<KeyValueConfig>(r#"{"energy":1}"#).is_err());
        assert!(
            serde_json::from_str::<KeyValueConfig>(r#"{"backend":{"type":"annoy"}}"#)
                .unwrap_err()
                .to_string()
                .contains("flat")
        );
    }
}
