//! `W x` as retrieval: the layer's components are keys, a query uses those that matter to it.
//!
//! With μ and C the inputs' mean and covariance, C + ridge·I = L Lᵀ and z = L⁻¹(x − μ):
//!
//! * `svd`: W = U S Vᵀ, key k_i = S_i v_i, Lᵀk_i = s_i k̃_i with ‖k̃_i‖ = 1;
//! * `whitened_svd`: W L = U S Vᵀ, k̃_i = v_i, s_i = S_i.
//!
//! score_i = ⟨k̃_i, z⟩ has unit variance, contribution c_i = s_i·score_i, and y = b + W μ + Σ c_i u_i exactly. The
//! whitening is folded into the stored key once, κ_i = L⁻ᵀk̃_i, so score_i = ⟨κ_i, x − μ⟩ and a query is never whitened.
//! The u_i are orthonormal, so the squared error of leaving keys out is Σ c_i² over them: each answer's error is known.
//!
//! After AXL's `ApproximateLinear`, which multiplies keys by L⁻ᵀ where Lᵀ is right, forgets s_i, and keeps one sign only.

mod answer;
mod backend;
mod build;
mod config;
mod parts;
mod search;
mod stored;
mod threshold;
mod train;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, CowArray, Ix2};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

pub use backend::Backend;
pub use build::InputStatistics;
pub use config::{Decomposition, KeyValueConfig, Limit, OnMisfit, Ranking, SearchSettings, Sides};
pub use search::{Hit, QueryHits};
pub use stored::StoredSearch;
pub use threshold::{ThresholdMethod, search_threshold};
pub use train::Refit;

use self::answer::Answer;
use self::search::{SelectLimit, rank_hits};
use self::threshold::{Curves, expecting};
use super::{Accuracy, Method, Output, read_config, require_finite};
use crate::error::{Error, Result};
use crate::index::{IndexInfo, KeyIndex, SearchIndex};
use crate::linalg::{dot_f64, matmul};
use crate::quant::{RowFormat, RowMatrix};

/// From this batch on, kept contributions may go through one matrix product instead of a gather for each row.
const PRODUCT_FROM: usize = 8;

/// And where they are more than one key in so many: a gather touches only the hits, at a fraction of a product's speed.
const PRODUCT_SHARE: usize = 2;

/// Below this many multiply-adds one thread is enough.
const PARALLEL_FROM: usize = 1 << 17;

/// A key–value layer.
#[derive(Debug, Clone)]
pub struct KeyValueLayer {
    core: Arc<Core>,
    settings: SearchSettings,
}

/// What is stored, and what follows from it.
#[derive(Debug)]
struct Core {
    config: StoredConfig,
    index: KeyIndex,
    /// κ `[keys, in]`, where they are kept beside an index that rounds them.
    float_keys: Option<Array2<f32>>,
    scales: Vec<f32>,
    /// `[keys, out]`, orthonormal rows but for rounding.
    values: RowMatrix,
    /// μ `[in]`.
    mean: Array1<f32>,
    /// W μ `[out]`.
    mean_output: Array1<f32>,
    bias: Option<Array1<f32>>,
    curves: Option<Curves>,
    /// Thresholds for K that were worked out before: every handle of the layer asks for the same.
    thresholds: Mutex<HashMap<(u64, Ranking, Sides), f32>>,
    /// ⟨u_i, W μ⟩ `[keys]`, worked out for the first query.
    values_on_mean: OnceLock<Vec<f32>>,
    mean_output_norm: f64,
}

/// The settings that the arrays depend on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct StoredConfig {
    decomposition: Decomposition,
    energy_keep: f64,
    min_singular_value: f64,
    ridge_regularization: f64,
    ridge_relative: f64,
    use_bias: bool,
    backend: Backend,
    values: RowFormat,
    /// Settings that did not fit the layer, and what was taken.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    adapted: Vec<String>,
    /// Whether mean and covariance come from calibration inputs, or are 0 and I.
    calibrated: bool,
    in_features: usize,
    out_features: usize,
    /// Keys kept.
    rank: usize,
    /// Spectral norm of the part of W that `energy_keep` and `min_singular_value` cut off.
    truncation: f64,
    /// Bound on the norm of what rounding the keys, in their units, adds to `diag(s) · keys`.
    key_error: f64,
    /// Bound on the norm of what rounding the values adds to them.
    value_error: f64,
    /// f32 rounding of one output, for an input of unit distance to the mean in the keys' units.
    rounding: f64,
}

impl KeyValueLayer {
    fn with_settings(core: Arc<Core>, settings: SearchSettings) -> Result<Self> {
        settings.validate()?;
        config::check_keys(settings.expected_keys_per_query, core.config.in_features.min(core.config.out_features))?;
        core.check(settings.limit(core.scales.len()), &settings)?;
        Ok(KeyValueLayer { core, settings })
    }

    /// What the settings let through.
    fn limit(&self) -> SelectLimit {
        self.core.resolve(self.settings.limit(self.rank()), &self.settings)
    }

    /// Length of an output row.
    pub fn out_features(&self) -> usize {
        self.core.config.out_features
    }

    /// Length of an input row.
    pub fn in_features(&self) -> usize {
        self.core.config.in_features
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

    pub(super) fn configured(&self, config: &Value) -> Result<Self> {
        self.with_search(read_config(Method::KeyValue, config)?)
    }

    pub(super) fn config(&self) -> Value {
        let mut all = match json!(self.core.config) {
            Value::Object(map) => map,
            _ => Map::new(),
        };
        if let Value::Object(map) = json!(self.settings) {
            all.extend(map);
        }
        Value::Object(all)
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

    pub(super) fn bias(&self) -> Option<&Array1<f32>> {
        self.stored_bias().filter(|_| self.core.config.use_bias)
    }

    pub(super) fn stored_bias(&self) -> Option<&Array1<f32>> {
        self.core.bias.as_ref()
    }

    /// The hits of each row of `x` `[batch, in_features]`, under `limit` or the layer's own settings.
    ///
    /// # Errors
    /// When the width of `x` is another, a value is not finite, or the limit is out of range.
    pub fn search(&self, x: ArrayView2<f32>, limit: Option<Limit>) -> Result<Vec<QueryHits>> {
        if x.ncols() != self.in_features() {
            return Err(Error::expected(
                "width of the query",
                x.ncols(),
                format!("{}, the layer's in_features", self.in_features()),
            ));
        }
        require_finite("the query", x.iter())?;
        let limit = match limit {
            Some(limit) => {
                self.core.check(limit, &self.settings)?;
                self.core.resolve(limit, &self.settings)
            }
            None => self.limit(),
        };
        let centred = &x - &self.core.mean;
        let answers = self.core.answers(centred.view(), &self.settings, limit).into_iter().map(|mut answer| {
            rank_hits(&mut answer.hits, &self.settings);
            QueryHits { threshold: answer.threshold, certified_error: answer.bound, hits: answer.hits }
        });
        Ok(answers.collect())
    }

    /// `x · Wᵀ` for a checked `x`.
    pub(super) fn linear(&self, x: ArrayView2<f32>, accuracy: Accuracy) -> Output {
        let core = &*self.core;
        let (batch, keys, outputs) = (x.nrows(), core.scales.len(), core.config.out_features);
        let centred = &x - &core.mean;
        let mut y = Array2::zeros((batch, outputs));
        y += &core.mean_output;
        if accuracy == Accuracy::Full || !self.settings.use_approximate_inference {
            let (contributions, bounds) = core.every_contribution(centred.view());
            y += &core.values.weighted(contributions.view());
            return Output { y, relative_error_bound: worst(bounds.into_iter()) };
        }
        // A batch enters the pool of threads once, and its parts are shared out in there.
        let answers = match batch {
            0 | 1 => self.gathered(centred.view(), &mut y),
            _ => rayon::scope(|_| self.gathered(centred.view(), &mut y)),
        };
        if many(&answers, keys) {
            let mut contributions = Array2::zeros((batch, keys));
            for (mut row, answer) in contributions.rows_mut().into_iter().zip(&answers) {
                answer.hits.iter().for_each(|hit| row[hit.key as usize] = hit.contribution);
            }
            y += &core.values.weighted(contributions.view());
        }
        Output { y, relative_error_bound: worst(answers.iter().map(|answer| answer.bound)) }
    }

    /// The answers to centred queries, their values added to `y` where there are not too [`many`].
    fn gathered(&self, centred: ArrayView2<f32>, y: &mut Array2<f32>) -> Vec<Answer> {
        let core = &*self.core;
        let answers = core.answers(centred, &self.settings, self.limit());
        let outputs = y.ncols();
        if outputs == 0 || many(&answers, core.scales.len()) {
            return answers;
        }
        let picks = |answer: &Answer| answer.hits.iter().map(|hit| (hit.key, hit.contribution)).collect::<Vec<_>>();
        let picks: Vec<Vec<(u32, f32)>> = answers.iter().map(picks).collect();
        let used: usize = picks.iter().map(Vec::len).sum();
        if answers.len() > 1 && used * outputs >= PARALLEL_FROM {
            core.values.accumulate_batch(&picks, y.view_mut());
        } else {
            let rows = y.as_slice_mut().expect("a fresh array is contiguous");
            rows.chunks_mut(outputs).zip(&picks).for_each(|(y, picks)| core.values.accumulate(picks, y));
        }
        answers
    }

    /// Σ s_i u_i κ_iᵀ, `[out, in]`.
    pub(super) fn weight(&self) -> Array2<f32> {
        let scaled = &self.keys() * &ArrayView1::from(&self.core.scales).insert_axis(Axis(1));
        matmul(self.values().t(), scaled.view())
    }

    pub(super) fn memory_bytes(&self) -> usize {
        let core = &*self.core;
        core.index.as_search_index().info().memory_bytes
            + core.float_keys.as_ref().map_or(0, |k| 4 * k.len())
            + core.values.memory_bytes()
            + 4 * (core.mean.len() + core.mean_output.len() + 7 * core.scales.len())
    }
}

/// Whether one product of matrices takes less time than gathering all hits.
fn many(answers: &[Answer], keys: usize) -> bool {
    let used: usize = answers.iter().map(|answer| answer.hits.len()).sum();
    used * PRODUCT_SHARE >= answers.len() * keys && answers.len() >= PRODUCT_FROM
}

/// The largest bound, where there is one for every row.
fn worst(mut bounds: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    bounds.try_fold(0f64, |worst, bound| Some(worst.max(bound?)))
}

impl Core {
    #[allow(clippy::too_many_arguments)] // Private, and each is one stored array.
    fn new(
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
    fn values_on_mean(&self) -> &[f32] {
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
    fn check(&self, limit: Limit, settings: &SearchSettings) -> Result<()> {
        limit.validate(settings.sides)?;
        self.config.backend.check_limit(limit)?;
        match limit {
            Limit::Keys(k) => config::check_keys(Some(k), self.config.in_features.min(self.config.out_features)),
            _ => Ok(()),
        }
    }

    /// A checked limit, with K as a threshold: from the calibration inputs where the layer has them, else for normal
    /// scores.
    fn resolve(&self, limit: Limit, settings: &SearchSettings) -> SelectLimit {
        SelectLimit::resolve(limit, |k| {
            let mut known = self.thresholds.lock().unwrap_or_else(|e| e.into_inner());
            let asked = (k.to_bits(), settings.ranking, settings.sides);
            let work_out = || expecting(k, &self.scales, self.curves.as_ref(), settings.ranking, settings.sides);
            *known.entry(asked).or_insert_with(work_out)
        })
    }
}

#[cfg(test)]
mod tests;
