//! Settings of a key–value layer, with AXL's names where they mean the same.

use serde::{Deserialize, Serialize};

use super::backend::{Backend, OnMisfit, fitted_format};
use super::limit::{Limit, Ranking, Sides, check_keys};
use crate::error::{Error, Result};
use crate::linalg::Ridge;
use crate::quant::RowFormat;

/// The factorisation that keys and values come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decomposition {
    /// W = U S Vᵀ.
    Svd,
    /// W L = U S Vᵀ, where L Lᵀ is the covariance of the inputs: the best rank-k approximation under the input distribution.
    #[default]
    WhitenedSvd,
}

/// Defines [`KeyValueConfig`], and a struct of its own for the settings of each of its two parts.
///
/// The settings are listed once here, since serde cannot flatten a struct into one that refuses unknown keys. Each has the
/// value that it takes where a rule does not give it.
macro_rules! key_value_settings {
    (
        stored { $($(#[$stored_meta:meta])* $stored:ident: $stored_type:ty = $stored_default:expr,)* }
        fitting { $($(#[$fitting_meta:meta])* $fitting:ident: $fitting_type:ty = $fitting_default:expr,)* }
        search { $($(#[$search_meta:meta])* $search:ident: $search_type:ty = $search_default:expr,)* }
    ) => {
        /// Settings of a key–value layer as a rule gives them: what is stored, and how the layer runs.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct KeyValueConfig {
            $($(#[$stored_meta])* pub $stored: $stored_type,)*
            $($(#[$fitting_meta])* pub $fitting: $fitting_type,)*
            $($(#[$search_meta])* pub $search: $search_type,)*
        }

        impl Default for KeyValueConfig {
            fn default() -> Self {
                KeyValueConfig {
                    $($stored: $stored_default,)*
                    $($fitting: $fitting_default,)*
                    $($search: $search_default,)*
                }
            }
        }

        /// Settings that the stored arrays depend on. All of them are stored.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        pub(super) struct StoredSettings {
            $($(#[$stored_meta])* pub(super) $stored: $stored_type,)*
        }

        /// Settings of how a layer runs. Changing them leaves the stored arrays as they are.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct SearchSettings {
            $($(#[$search_meta])* pub $search: $search_type,)*
        }

        impl Default for SearchSettings {
            fn default() -> Self {
                SearchSettings { $($search: $search_default,)* }
            }
        }

        impl KeyValueConfig {
            /// Returns the settings that the stored arrays depend on.
            pub(super) fn stored(&self) -> StoredSettings {
                StoredSettings { $($stored: self.$stored,)* }
            }

            /// Returns the settings of how the layer runs.
            pub fn search(&self) -> SearchSettings {
                SearchSettings { $($search: self.$search,)* }
            }

            /// Returns the settings that both parts make up, which fit the layer.
            pub(super) fn of_parts(stored: &StoredSettings, search: &SearchSettings) -> Self {
                KeyValueConfig {
                    $($stored: stored.$stored,)*
                    $($fitting: $fitting_default,)*
                    $($search: search.$search,)*
                }
            }
        }
    };
}

key_value_settings! {
    stored {
        /// The factorisation that keys and values come from.
        decomposition: Decomposition = Decomposition::WhitenedSvd,
        /// Share of Σs² that is kept: components are dropped, smallest first, while the others hold it.
        energy_keep: f64 = 1.0,
        /// Least singular value of a component that is kept.
        min_singular_value: f64 = 0.0,
        /// Number that is added to the covariance's diagonal, whatever the inputs' size.
        ridge_regularization: f64 = 0.0,
        /// Share of the mean of the covariance's diagonal that is added to the diagonal.
        ridge_relative: f64 = 1e-2,
        /// Whether a forward pass adds the bias; it is stored in any case.
        use_bias: bool = true,
        /// How keys are stored and found.
        backend: Backend = Backend::default(),
        /// How values are stored.
        values: RowFormat = RowFormat::default(),
    }
    fitting {
        /// What happens to settings of `backend` and `values` that do not fit the layer's shape.
        on_misfit: OnMisfit = OnMisfit::Adapt,
    }
    search {
        /// The value that keys are ranked by.
        ranking: Ranking = Ranking::Contribution,
        /// Whether keys with a negative value are hits, too.
        sides: Sides = Sides::Both,
        /// Number of keys that a query uses on average over the inputs; the threshold follows from it. Of this limit and the
        /// next two, one may be given; where none is, it is this one, with 64.
        #[serde(skip_serializing_if = "Option::is_none")]
        expected_keys_per_query: Option<f64> = None,
        /// Least ranking value of a hit.
        #[serde(skip_serializing_if = "Option::is_none")]
        threshold: Option<f32> = None,
        /// Largest ‖ŷ − y‖ / ‖y‖ that a query's keys have to certify.
        #[serde(skip_serializing_if = "Option::is_none")]
        max_relative_error: Option<f64> = None,
        /// Largest number of hits of a query; the highest ranked are kept.
        #[serde(skip_serializing_if = "Option::is_none")]
        max_ids_capacity: Option<usize> = None,
        /// Whether a forward pass searches; if not, it uses every key.
        use_approximate_inference: bool = true,
        /// Whether gradients are those of the exact layer; if not, those of the pass that the settings run.
        use_straight_through_estimator: bool = true,
    }
}

/// Expected keys of a query where no limit is given.
const DEFAULT_KEYS: f64 = 64.0;

impl SearchSettings {
    /// Returns the limit for a layer of `keys` keys: the one that is set, or 64 expected keys (all, where there are fewer).
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

impl KeyValueConfig {
    /// Returns what is added to the covariance's diagonal.
    pub(crate) fn ridge(&self) -> Ridge {
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

    /// Checks the settings against a weight's shape.
    ///
    /// # Errors
    /// When the shape is empty, more keys are expected than there are, or, with [`OnMisfit::Error`], `backend` or `values` do
    /// not fit.
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

    const DEFAULT: &str = concat!(
        r#"{"decomposition":"whitened_svd","energy_keep":1.0,"min_singular_value":0.0,"ridge_regularization":0.0,"#,
        r#""ridge_relative":0.01,"use_bias":true,"backend":{"type":"flat","keys":"f32"},"values":"f32","#,
        r#""on_misfit":"adapt","ranking":"contribution","sides":"both","use_approximate_inference":true,"#,
        r#""use_straight_through_estimator":true}"#,
    );

    const FULL: &str = concat!(
        r#"{"decomposition":"svd","energy_keep":0.9,"min_singular_value":0.25,"ridge_regularization":0.001,"#,
        r#""ridge_relative":0.5,"use_bias":false,"#,
        r#""backend":{"type":"pq","subvectors":2,"codewords":9,"seed":7,"store_float_keys":true},"#,
        r#""values":{"type":"pq","subvectors":3,"codewords":5,"seed":2},"on_misfit":"error","ranking":"score","#,
        r#""sides":"positive","expected_keys_per_query":3.5,"threshold":0.5,"max_relative_error":0.125,"#,
        r#""max_ids_capacity":11,"use_approximate_inference":false,"use_straight_through_estimator":false}"#,
    );

    const FULL_SEARCH: &str = concat!(
        r#"{"ranking":"score","sides":"positive","expected_keys_per_query":3.5,"threshold":0.5,"#,
        r#""max_relative_error":0.125,"max_ids_capacity":11,"use_approximate_inference":false,"#,
        r#""use_straight_through_estimator":false}"#,
    );

    /// Rules, recipes and stored configs hold this JSON.
    #[test]
    fn json_stays_as_it_is() {
        let json = |config: &KeyValueConfig| serde_json::to_string(config).unwrap();
        assert_eq!(json(&KeyValueConfig::default()), DEFAULT);
        assert_eq!(serde_json::from_str::<KeyValueConfig>("{}").unwrap(), KeyValueConfig::default());
        let full: KeyValueConfig = serde_json::from_str(FULL).unwrap();
        assert_eq!(json(&full), FULL);
        assert_eq!(serde_json::to_string(&full.search()).unwrap(), FULL_SEARCH);
        assert_eq!(serde_json::from_str::<SearchSettings>(FULL_SEARCH).unwrap(), full.search());
        // The catalogue's config has more keys than a search reads.
        assert_eq!(serde_json::from_str::<SearchSettings>(FULL).unwrap(), full.search());
        let parts = KeyValueConfig::of_parts(&full.stored(), &full.search());
        assert_eq!(parts, KeyValueConfig { on_misfit: OnMisfit::Adapt, ..full });
        let message = serde_json::from_str::<KeyValueConfig>(r#"{"energy":1}"#).unwrap_err().to_string();
        assert!(
            message.contains("unknown field `energy`, expected one of `decomposition`, `energy_keep`"),
            "{message}"
        );
    }
}
