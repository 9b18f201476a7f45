//! The method `key_value`, and its layers as [`Layer`]s.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis};
use serde_json::{Map, Value, json};

use super::config::KeyValueConfig;
use super::layer::KeyValueLayer;
use crate::calibration::Calibration;
use crate::error::Result;
use crate::layer::method::{Method, read_config};
use crate::layer::name::MethodName;
use crate::layer::parts::Parts;
use crate::layer::shape::LayerShape;
use crate::layer::traits::{Accuracy, ExactSource, Gradients, Layer, Output, SearchReport, SharedLayer, check_rows};
use crate::linalg::matmul;

impl Method for KeyValueConfig {
    const NAME: &'static str = "key_value";
    const MEASURED: &'static [&'static str] = &["key_error", "rounding", "truncation", "value_error"];
    type Layer = KeyValueLayer;

    fn validate(&self) -> Result<()> {
        self.validate()
    }

    fn check(&self, shape: LayerShape, _calibrated: bool) -> Result<()> {
        self.check(shape.out_features, shape.in_features)
    }

    fn unusable(&self, calibration: &Calibration) -> Option<&'static str> {
        calibration.vanishes(true)
    }

    fn compress(
        &self,
        weight: ArrayView2<f32>,
        bias: Option<ArrayView1<f32>>,
        calibration: Option<&Calibration>,
    ) -> Result<KeyValueLayer> {
        KeyValueLayer::build(self, weight, bias, calibration)
    }

    fn from_parts(parts: Parts) -> Result<KeyValueLayer> {
        KeyValueLayer::read_parts(parts)
    }

    fn with_stored(&self, stored: &Value) -> Value {
        merged(stored.clone(), json!(self.search()))
    }
}

impl Layer for KeyValueLayer {
    fn method(&self) -> MethodName {
        MethodName::new(KeyValueConfig::NAME)
    }

    fn out_features(&self) -> usize {
        self.core.config.out_features
    }

    fn in_features(&self) -> usize {
        self.core.config.in_features
    }

    fn config(&self) -> Value {
        merged(json!(self.core.config), json!(self.settings))
    }

    fn to_parts(&self) -> Parts {
        self.written_parts()
    }

    fn memory_bytes(&self) -> usize {
        let core = &*self.core;
        core.index.as_search_index().info().memory_bytes
            + core.float_keys.as_ref().map_or(0, |k| 4 * k.len())
            + core.values.memory_bytes()
            + 4 * (core.mean.len() + core.mean_output.len() + 7 * core.scales.len())
    }

    fn configured(&self, config: &Value) -> Result<Option<SharedLayer>> {
        Ok(Some(self.with_search(read_config(KeyValueConfig::NAME, config)?)?.shared()))
    }

    fn product(&self, x: ArrayView2<f32>, accuracy: Accuracy) -> Result<Output> {
        Ok(self.retrieved_product(x, accuracy))
    }

    fn bias(&self) -> Result<Option<Array1<f32>>> {
        Ok(self.core.bias.clone().filter(|_| self.core.config.settings.use_bias))
    }

    fn stored_bias(&self) -> Result<Option<Array1<f32>>> {
        Ok(self.core.bias.clone())
    }

    /// Returns (W − Ŵ) μ: keys see inputs less their mean μ, whose output W μ is stored.
    fn offset(&self) -> Result<Option<Array1<f32>>> {
        Ok(self.mean_error())
    }

    fn approximations(&self) -> Vec<String> {
        let searches = self.settings.use_approximate_inference;
        searches.then(|| "keys that its search does not find are left out".to_owned()).into_iter().collect()
    }

    /// Returns Σ s_i u_i κ_iᵀ.
    fn weight(&self) -> Result<Array2<f32>> {
        Ok(matmul(self.values().t(), self.scaled_keys().view()))
    }

    fn rows(&self, indices: &[u32]) -> Result<Array2<f32>> {
        check_rows(indices, self.out_features())?;
        let indices: Vec<usize> = indices.iter().map(|&i| i as usize).collect();
        Ok(matmul(self.values().select(Axis(1), &indices).t(), self.scaled_keys().view()))
    }

    fn gradients(&self, x: ArrayView2<f32>, grad_output: ArrayView2<f32>) -> Result<Gradients> {
        let (input, weight) = self.input_and_weight_gradients(x, grad_output);
        Ok(Gradients { input, weight, bias: grad_output.sum_axis(Axis(0)) })
    }

    fn exact_source(&self) -> ExactSource {
        if self.holds_its_weight() { ExactSource::Layer } else { ExactSource::DenseOrLayer }
    }

    fn search_report(&self, inputs: ArrayView2<f32>) -> Result<SearchReport> {
        self.searched(inputs)
    }
}

fn merged(config: Value, more: Value) -> Value {
    let mut all = match config {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    if let Value::Object(more) = more {
        all.extend(more);
    }
    Value::Object(all)
}
