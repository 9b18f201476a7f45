//! A key–value layer in memory: its arrays, and what follows from them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

use ndarray::{Array1, Array2, ArrayView1, Axis, CowArray, Ix2};
use serde::{Deserialize, Serialize};

use super::backend::Backend;
use super::config::{
    Decomposition, KeyValueConfig, Limit, OnMisfit, Ranking, SearchSettings, Sides, check_keys,
};
use super::search::SelectLimit;
use super::threshold::{Curves, expecting};
use crate::error::{Error, Result};
use crate::index::{IndexInfo, KeyIndex, SearchIndex};
use crate::linalg::dot_f64;
use crate::quant::{RowFormat, RowMatrix};

/// A key–value layer.
#[derive(Debug, Clone)]
pub struct KeyValueLayer {
    pub(super) core: Arc<Core>,
    pub(super) settings: SearchSettings,
}

/// What is stored, and what follows from it.
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
    /// Thresholds for K that were worked out before: every handle of the layer asks for the same.
    pub(super) thresholds: Mutex<HashMap<(u64, Ranking, Sides), f32>>,
    /// ⟨u_i, W μ⟩ `[keys]`, worked out for the first query.
    pub(super) values_on_mean: OnceLock<Vec<f32>>,
    pub(super) mean_output_norm: f64,
}

/// The settings that the arrays depend on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct StoredConfig {
    pub(super) decomposition: Decomposition,
    pub(super) energy_keep: f64,
    pub(super) min_singular_value: f64,
    pub(super) ridge_regularization: f64,
    pub(super) ridge_relative: f64,
    pub(super) use_bias: bool,
    pub(super) backend: Backend,
    pub(super) values: RowFormat,
    /// Settings that did not fit the layer, and what was taken.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) adapted: Vec<String>,
    /// Whether mean and covariance come from calibration inputs, or are 0 and I.
    pub(super) calibrated: bool,
    pub(super) in_features: usize,
    pub(super) out_features: usize,
    /// Keys kept.
    pub(super) rank: usize,
    /// Spectral norm of the part of W that `energy_keep` and `min_singular_value` cut off.
    pub(super) truncation: f64,
    /// Bound on the norm of what rounding the keys, in their units, adds to `diag(s) · keys`.
    pub(super) key_error: f64,
    /// Bound on the norm of what rounding the values adds to them.
    pub(super) value_error: f64,
    /// f32 rounding of one output, for an input of unit distance to the mean in the keys' units.
    pub(super) rounding: f64,
}

impl KeyValueLayer {
    pub(super) fn with_settings(core: Arc<Core>, settings: SearchSettings) -> Result<Self> {
        settings.validate()?;
        check_keys(settings.expected_keys_per_query, core.config.in_features.min(core.config.out_features))?;
        core.check(settings.limit(core.scales.len()), &settings)?;
        Ok(KeyValueLayer { core, settings })
    }

    /// The keys times their scales, `[keys, in_features]`.
    pub(super) fn scaled_keys(&self) -> Array2<f32> {
        &self.keys() * &ArrayView1::from(&self.core.scales).insert_axis(Axis(1))
    }

    /// Number of keys.
    pub fn rank(&self) -> usize {
        self.core.scales.len()
    }

    /// How the layer runs.
    pub fn settings(&self) -> &SearchSettings {
        &self.settings
    }

    /// What finds the keys, and the memory that it takes.
    pub fn index(&self) -> IndexInfo {
        self.core.index.as_search_index().info()
    }

    /// Whether all keys together are the weight that the layer was made of, but for f32 rounding: nothing was cut off,
    /// and keys and values are stored as f32.
    pub fn holds_its_weight(&self) -> bool {
        let config = &self.core.config;
        config.backend.stores_float_keys() && config.truncation == 0.0 && config.value_error == 0.0
    }

    /// The folded keys κ as they are used, `[keys, in_features]`: borrowed where they are stored as f32.
    pub fn keys(&self) -> CowArray<'_, f32, Ix2> {
        let rows = self.core.index.rows();
        match (rows.rows().floats(), rows.units()) {
            (Some(keys), None) => keys.into(),
            _ => rows.reconstruct().into(),
        }
    }

    /// The scales s, `[keys]`.
    pub fn scales(&self) -> &[f32] {
        &self.core.scales
    }

    /// The values u as they are used, `[keys, out_features]`: borrowed where they are stored as f32.
    pub fn values(&self) -> CowArray<'_, f32, Ix2> {
        self.core.values.floats().map_or_else(|| self.core.values.to_f32().into(), Into::into)
    }

    /// The same arrays, run with other settings.
    ///
    /// # Errors
    /// When the settings are out of range or exclude each other.
    pub fn with_search(&self, settings: SearchSettings) -> Result<Self> {
        Self::with_settings(self.core.clone(), settings)
    }

    /// The settings that the layer was built with and runs with: what a rule would say.
    pub fn key_value_config(&self) -> KeyValueConfig {
        let (stored, search) = (&self.core.config, &self.settings);
        KeyValueConfig {
            decomposition: stored.decomposition,
            energy_keep: stored.energy_keep,
            min_singular_value: stored.min_singular_value,
            ridge_regularization: stored.ridge_regularization,
            ridge_relative: stored.ridge_relative,
            use_bias: stored.use_bias,
            backend: stored.backend,
            values: stored.values,
            on_misfit: OnMisfit::Adapt,
            ranking: search.ranking,
            sides: search.sides,
            expected_keys_per_query: search.expected_keys_per_query,
            threshold: search.threshold,
            max_relative_error: search.max_relative_error,
            max_ids_capacity: search.max_ids_capacity,
            use_approximate_inference: search.use_approximate_inference,
            use_straight_through_estimator: search.use_straight_through_estimator,
        }
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

    /// ⟨u_i, W μ⟩.
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

    /// Whether a query can be limited like this.
    pub(super) fn check(&self, limit: Limit, settings: &SearchSettings) -> Result<()> {
        limit.validate(settings.sides)?;
        self.config.backend.check_limit(limit)?;
        match limit {
            Limit::Keys(k) => check_keys(Some(k), self.config.in_features.min(self.config.out_features)),
            _ => Ok(()),
        }
    }

    /// A checked limit, with K as a threshold: from the calibration inputs where the layer has them, else for normal
    /// scores.
    pub(super) fn resolve(&self, limit: Limit, settings: &SearchSettings) -> SelectLimit {
        SelectLimit::resolve(limit, |k| {
            let mut known = self.thresholds.lock().unwrap_or_else(|e| e.into_inner());
            let asked = (k.to_bits(), settings.ranking, settings.sides);
            let work_out = || expecting(k, &self.scales, self.curves.as_ref(), settings.ranking, settings.sides);
            *known.entry(asked).or_insert_with(work_out)
        })
    }
}
