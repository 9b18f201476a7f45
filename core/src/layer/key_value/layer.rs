//! A key–value layer in memory: its arrays, and values that follow from them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

use ndarray::{Array1, Array2, ArrayView1, Axis, CowArray, Ix2};
use serde::{Deserialize, Serialize};

use super::config::{KeyValueConfig, SearchSettings, StoredSettings};
use super::limit::{Limit, Ranking, Sides, check_keys};
use super::search::SelectLimit;
use super::threshold::{Curves, expecting};
use crate::error::{Error, Result};
use crate::index::{IndexInfo, KeyIndex, SearchIndex};
use crate::linalg::dot_f64;
use crate::quant::RowMatrix;

/// A layer whose output is retrieved: the values of the keys that match an input. Cloning shares the arrays.
#[derive(Debug, Clone)]
pub struct KeyValueLayer {
    pub(super) core: Arc<Core>,
    pub(super) settings: SearchSettings,
}

/// The stored arrays, and values that follow from them.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) config: StoredConfig,
    pub(super) index: KeyIndex,
    /// κ `[keys, in]`, where they are kept beside an index that rounds them.
    pub(super) float_keys: Option<Array2<f32>>,
    pub(super) scales: Vec<f32>,
    /// `[keys, out]`, orthonormal rows but for rounding.
    pub(super) values: RowMatrix,
    /// μ `[in]`.
    pub(super) mean: Array1<f32>,
    /// W μ `[out]`.
    pub(super) mean_output: Array1<f32>,
    pub(super) bias: Option<Array1<f32>>,
    pub(super) curves: Option<Curves>,
    /// Thresholds by expected number of keys that were computed before: every clone of the layer asks for the same.
    pub(super) thresholds: Mutex<HashMap<(u64, Ranking, Sides), f32>>,
    /// ⟨u_i, W μ⟩ `[keys]`, computed for the first query.
    pub(super) values_on_mean: OnceLock<Vec<f32>>,
    pub(super) mean_output_norm: f64,
}

/// The config of the stored arrays: settings, and facts that were measured when they were made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct StoredConfig {
    #[serde(flatten)]
    pub(super) settings: StoredSettings,
    /// Settings that did not fit the layer, and what they became.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) adapted: Vec<String>,
    /// Whether mean and covariance come from calibration inputs; if not, they are 0 and I.
    pub(super) calibrated: bool,
    pub(super) in_features: usize,
    pub(super) out_features: usize,
    /// Number of keys.
    pub(super) rank: usize,
    /// Spectral norm of the part of W that `energy_keep` and `min_singular_value` drop.
    pub(super) truncation: f64,
    /// Bound on the spectral norm of the error of `diag(s) · keys`, in the keys' units, by rounding.
    pub(super) key_error: f64,
    /// Bound on the spectral norm of the error of the values by rounding.
    pub(super) value_error: f64,
    /// Bound on the error of one output by f32 arithmetic, for an input of unit distance to the mean in the keys' units.
    pub(super) rounding: f64,
}

/// How many times the allowance for f32 arithmetic an error is before it counts; what f16 loses is a thousand times.
const BEYOND_ROUNDING: f64 = 4.0;

impl KeyValueLayer {
    pub(super) fn with_settings(core: Arc<Core>, settings: SearchSettings) -> Result<Self> {
        settings.validate()?;
        check_keys(settings.expected_keys_per_query, core.config.in_features.min(core.config.out_features))?;
        core.check(settings.limit(core.scales.len()), &settings)?;
        Ok(KeyValueLayer { core, settings })
    }

    /// Returns the keys that a pass of full accuracy uses, `[keys, in_features]`: those of f32 where they are stored.
    pub(super) fn full_keys(&self) -> CowArray<'_, f32, Ix2> {
        self.core.float_keys.as_ref().map_or_else(|| self.keys(), |keys| keys.view().into())
    }

    /// Returns [`KeyValueLayer::full_keys`] times their scales, `[keys, in_features]`.
    pub(super) fn scaled_keys(&self) -> Array2<f32> {
        &self.full_keys() * &ArrayView1::from(&self.core.scales).insert_axis(Axis(1))
    }

    /// Returns (W − Ŵ) μ `[out_features]`, for the weight W that the layer was made of and the one that its keys and values stand
    /// for; `None` where it is no more than the rounding of f32.
    pub(super) fn mean_error(&self) -> Option<Array1<f32>> {
        let core = &*self.core;
        let mut error = core.mean_output.mapv(f64::from);
        let (keys, values) = (self.full_keys(), self.values());
        for ((key, value), &scale) in keys.rows().into_iter().zip(values.rows()).zip(&core.scales) {
            let along: f64 = key.iter().zip(&core.mean).map(|(k, m)| f64::from(*k) * f64::from(*m)).sum();
            let contribution = f64::from(scale) * along;
            error.zip_mut_with(&value, |e, u| *e -= contribution * f64::from(*u));
        }
        let distance = core.index.rows().length(core.mean.view());
        let rounding = core.config.rounding * distance + f64::from(f32::EPSILON) * core.mean_output_norm;
        let norm = error.dot(&error).sqrt();
        (norm > BEYOND_ROUNDING * rounding).then(|| error.mapv(|e| e as f32))
    }

    /// Returns the number of keys.
    pub fn rank(&self) -> usize {
        self.core.scales.len()
    }

    /// Returns the settings of how the layer runs.
    pub fn settings(&self) -> &SearchSettings {
        &self.settings
    }

    /// Returns the index that finds keys, and the memory that it takes.
    pub fn index(&self) -> IndexInfo {
        self.core.index.as_search_index().info()
    }

    /// Returns whether all keys together stand for the weight that the layer was made of, but for f32 rounding: nothing
    /// was dropped, and keys and values are stored as f32.
    pub fn holds_its_weight(&self) -> bool {
        let config = &self.core.config;
        config.settings.backend.stores_float_keys() && config.truncation == 0.0 && config.value_error == 0.0
    }

    /// Returns the folded keys κ as they are used, `[keys, in_features]`: borrowed where they are stored as f32.
    pub fn keys(&self) -> CowArray<'_, f32, Ix2> {
        let rows = self.core.index.rows();
        match (rows.rows().floats(), rows.units()) {
            (Some(keys), None) => keys.into(),
            _ => rows.reconstruct().into(),
        }
    }

    /// Returns the scales s, `[keys]`.
    pub fn scales(&self) -> &[f32] {
        &self.core.scales
    }

    /// Returns the values u as they are used, `[keys, out_features]`: borrowed where they are stored as f32.
    pub fn values(&self) -> CowArray<'_, f32, Ix2> {
        self.core.values.floats().map_or_else(|| self.core.values.to_f32().into(), Into::into)
    }

    /// Returns the layer run with other settings. The arrays are shared.
    ///
    /// # Errors
    /// When the settings are out of range or exclude each other.
    pub fn with_search(&self, settings: SearchSettings) -> Result<Self> {
        Self::with_settings(self.core.clone(), settings)
    }

    /// Returns the layer run with as few keys as certify a relative error, in the place of its own limit. The arrays are shared.
    ///
    /// # Errors
    /// When the error is out of range.
    pub fn certifying(&self, max_relative_error: f64) -> Result<Self> {
        self.with_search(SearchSettings {
            expected_keys_per_query: None,
            threshold: None,
            max_relative_error: Some(max_relative_error),
            use_approximate_inference: true,
            ..self.settings.clone()
        })
    }

    /// Returns the settings that the layer was built with and runs with, as a rule would give them.
    pub fn key_value_config(&self) -> KeyValueConfig {
        KeyValueConfig::of_parts(&self.core.config.settings, &self.settings)
    }
}

impl Core {
    #[allow(clippy::too_many_arguments)] // Private, and each is one stored array.
    pub(super) fn new(
        config: StoredConfig,
        index: KeyIndex,
        float_keys: Option<Array2<f32>>,
        scales: Vec<f32>,
        values: RowMatrix,
        mean: Array1<f32>,
        mean_output: Array1<f32>,
        bias: Option<Array1<f32>>,
        curves: Option<Curves>,
    ) -> Result<Self> {
        let (rank, inputs, outputs) = (config.rank, config.in_features, config.out_features);
        let float_shape = float_keys.as_ref().map_or((rank, inputs), Array2::dim);
        let found = [
            index.rows().len(),
            index.rows().dimension(),
            float_shape.0,
            float_shape.1,
            scales.len(),
            values.rows(),
            values.columns(),
            mean.len(),
            mean_output.len(),
            bias.as_ref().map_or(outputs, |b| b.len()),
        ];
        let expected = [rank, inputs, rank, inputs, rank, rank, outputs, inputs, outputs, outputs];
        if found != expected {
            return Err(Error::expected(
                "lengths of keys, float keys, scales, values, mean, mean output and bias",
                format!("{found:?}"),
                format!("{expected:?}"),
            ));
        }
        Ok(Core {
            values_on_mean: OnceLock::new(),
            mean_output_norm: mean_output.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt(),
            config,
            index,
            float_keys,
            scales,
            values,
            mean,
            mean_output,
            bias,
            curves,
            thresholds: Mutex::default(),
        })
    }

    /// Returns ⟨u_i, W μ⟩, `[keys]`.
    pub(super) fn values_on_mean(&self) -> &[f32] {
        self.values_on_mean.get_or_init(|| match self.values.floats() {
            Some(floats) => {
                let contiguous = "standard layout";
                let mean = self.mean_output.as_slice().expect(contiguous);
                let of = |u: ArrayView1<f32>| dot_f64(u.to_slice().expect(contiguous), mean) as f32;
                floats.rows().into_iter().map(|u| of(u.reborrow())).collect()
            }
            None => self.values.products(self.mean_output.view().insert_axis(Axis(0))).into_raw_vec_and_offset().0,
        })
    }

    /// Checks that a query can be limited by `limit`.
    ///
    /// # Errors
    /// When the limit is out of its range, or the backend cannot keep it.
    pub(super) fn check(&self, limit: Limit, settings: &SearchSettings) -> Result<()> {
        limit.validate(settings.sides)?;
        self.config.settings.backend.check_limit(limit)?;
        match limit {
            Limit::Keys(k) => check_keys(Some(k), self.config.in_features.min(self.config.out_features)),
            _ => Ok(()),
        }
    }

    /// Returns a checked limit with its expected number of keys as a threshold: by calibration inputs where the layer has them,
    /// else for standard normal scores.
    pub(super) fn resolve(&self, limit: Limit, settings: &SearchSettings) -> SelectLimit {
        SelectLimit::resolve(limit, |k| {
            let mut known = self.thresholds.lock().unwrap_or_else(|e| e.into_inner());
            let asked = (k.to_bits(), settings.ranking, settings.sides);
            let compute = || expecting(k, &self.scales, self.curves.as_ref(), settings.ranking, settings.sides);
            *known.entry(asked).or_insert_with(compute)
        })
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;
    use crate::layer::parts::canonical_json;
    use crate::layer::{Layer, Method, compress};

    const SETTINGS: &str = r#"{
        "decomposition": "svd", "energy_keep": 0.9, "min_singular_value": 0.25, "ridge_regularization": 0.001,
        "ridge_relative": 0.5, "use_bias": false,
        "backend": {"type": "pq", "subvectors": 2, "codewords": 9, "seed": 7, "store_float_keys": true},
        "values": "f16", "ranking": "score", "expected_keys_per_query": 2.0, "max_ids_capacity": 11,
        "use_approximate_inference": false, "use_straight_through_estimator": false}"#;

    const STORED: &str = concat!(
        r#"{"adapted":["backend codewords: 9 to 3"],"#,
        r#""backend":{"codewords":3,"seed":7,"store_float_keys":true,"subvectors":2,"type":"pq"},"#,
        r#""calibrated":false,"decomposition":"svd","energy_keep":0.9,"in_features":4,"key_error":0.0,"#,
        r#""min_singular_value":0.25,"out_features":3,"rank":3,"ridge_regularization":0.001,"ridge_relative":0.5,"#,
        r#""rounding":0.0,"truncation":0.0,"use_bias":false,"value_error":0.0,"values":"f16"}"#,
    );

    /// The stored config is part of an artifact's name.
    #[test]
    fn config_json_stays_as_it_is() {
        let settings: KeyValueConfig = serde_json::from_str(SETTINGS).unwrap();
        let weight = Array2::from_shape_fn((3, 4), |(i, j)| f32::from(u8::from(i == j)));
        let layer = compress(&settings, weight.view(), None, None).unwrap();
        let parts = layer.to_parts();
        assert_eq!(serde_json::from_value::<StoredConfig>(parts.config.clone()).unwrap(), layer.core.config);
        // What was measured differs in its last bits between processors.
        let mut config = parts.config;
        for measured in KeyValueConfig::MEASURED {
            assert!(config[*measured].is_number());
            config[*measured] = 0.0.into();
        }
        assert_eq!(canonical_json(&config), STORED);
        let mut fitted = settings.clone();
        fitted.backend = layer.core.config.settings.backend;
        assert_eq!(layer.key_value_config(), fitted);
        let all = layer.config();
        assert_eq!(serde_json::from_value::<SearchSettings>(all.clone()).unwrap(), settings.search());
        assert_eq!(all.as_object().unwrap().len(), 17 + 6);
    }
}
