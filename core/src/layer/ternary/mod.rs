//! Ternary weights: `y = f(Ŵ q(norm(x)) + A (B norm(x)) + b)` with Ŵ = γ · {−1, 0, 1} and q the rounding to int8
//! (BitNet b1.58, Keras-MatMulLess's `DenseMML`).

mod config;

use ndarray::{Array1, Array2, ArrayD, ArrayView1, ArrayView2, ArrayViewMut2, Axis, CowArray, Ix2};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

pub use config::TernaryConfig;

use super::activation::Activation;
use super::low_rank::{LowRankConfig, LowRankLayer};
use super::method::{Method, read_config};
use super::name::MethodName;
use super::parts::{Parts, Tensor, f32_bytes};
use super::rms_norm::RmsNorm;
use super::shape::LayerShape;
use super::traits::{Accuracy, CorrectionReport, ExactSource, Gradients, Layer, Output, SharedLayer};
use crate::calibration::Calibration;
use crate::error::{Error, Result};
use crate::linalg::matmul;
use crate::quant::{ActivationFormat, PackedForward, PackedMatrix};

/// A layer of ternary weights, with a norm before the product and an activation after it. Cloning shares the arrays.
#[derive(Debug, Clone)]
pub struct TernaryLayer {
    /// Weights, low-rank correction and bias.
    low_rank: LowRankLayer,
    norm: Option<std::sync::Arc<RmsNorm>>,
    activation: Activation,
}

/// Settings that the stored config has beside those of the weights.
#[derive(Serialize, Deserialize)]
struct OwnConfig {
    norm: bool,
    activation: Activation,
    #[serde(default = "int8_absmax")]
    activations: ActivationFormat,
}

fn int8_absmax() -> ActivationFormat {
    ActivationFormat::Int8Absmax
}

impl TernaryLayer {
    /// Makes `weight` `[out, in]` ternary. Settings and shapes have been checked.
    pub(super) fn build(
        config: &TernaryConfig,
        weight: ArrayView2<f32>,
        bias: Option<ArrayView1<f32>>,
        calibration: Option<&Calibration>,
    ) -> Result<Self> {
        let norm = config.norm.then(RmsNorm::default);
        let normalized = match (&norm, calibration) {
            (Some(norm), Some(inputs)) => Some(inputs.mapped(|x| norm.forward(x))?),
            _ => None,
        };
        let low_rank = config.weights.compress(weight, bias, normalized.as_ref().or(calibration))?;
        TernaryLayer { low_rank, norm: None, activation: config.activation }.with_norm(norm)
    }

    /// Returns the layer of weights `[out, in]` that are ternary already, times a scale.
    ///
    /// # Errors
    /// When a weight is none of −1, 0 and 1, a number is not finite, or the bias has another length.
    pub fn from_ternary(weights: ArrayView2<i8>, scale: f32, bias: Option<Array1<f32>>) -> Result<Self> {
        let packed = PackedMatrix::from_ternary(weights, scale)?;
        let low_rank = LowRankLayer::of_weight(packed, bias)?.with_activations(int8_absmax())?;
        Ok(TernaryLayer { low_rank, norm: None, activation: Activation::Linear })
    }

    /// Returns the layer with another norm, or none, before its product.
    ///
    /// # Errors
    /// When the norm is for another width.
    pub fn with_norm(self, norm: Option<RmsNorm>) -> Result<Self> {
        let inputs = self.in_features();
        if let Some(found) = norm.as_ref().and_then(RmsNorm::features).filter(|&found| found != inputs) {
            return Err(Error::expected("width of a layer's norm", found, format!("{inputs}, its in_features")));
        }
        Ok(TernaryLayer { norm: norm.map(std::sync::Arc::new), ..self })
    }

    /// Returns the layer with another activation after its product.
    pub fn with_activation(self, activation: Activation) -> Self {
        TernaryLayer { activation, ..self }
    }

    /// Returns the layer with its inputs rounded in another way.
    ///
    /// # Errors
    /// As [`LowRankLayer::with_activations`].
    pub fn with_activations(self, activations: ActivationFormat) -> Result<Self> {
        Ok(TernaryLayer { low_rank: self.low_rank.with_activations(activations)?, ..self })
    }

    /// Returns the weights, low-rank correction and bias.
    pub fn low_rank(&self) -> &LowRankLayer {
        &self.low_rank
    }

    /// Returns the norm that inputs pass first, where there is one.
    pub fn norm(&self) -> Option<&RmsNorm> {
        self.norm.as_deref()
    }

    /// Returns the activation that outputs pass through.
    pub fn activation(&self) -> Activation {
        self.activation
    }

    /// Returns `x` `[batch, in_features]` normalised: the inputs that the weights meet, before they are rounded.
    ///
    /// # Errors
    /// As [`RmsNorm::forward`].
    pub fn normalized(&self, x: ArrayView2<f32>) -> Result<Array2<f32>> {
        match &self.norm {
            Some(norm) => norm.forward(x),
            None => Ok(x.to_owned()),
        }
    }

    fn from_parts(parts: Parts) -> Result<Self> {
        let own: OwnConfig = read_config(TernaryConfig::NAME, &parts.config)?;
        let matrix = |name: &str| -> Result<Option<Array2<f32>>> {
            let Some(tensor) = parts.tensor(name) else { return Ok(None) };
            let array = tensor.to_array()?.into_dimensionality();
            array.map(Some).map_err(|_| {
                Error::expected(format!("shape of {name}"), format!("{:?}", tensor.shape), "[positions, features]")
            })
        };
        let norm = match own.norm {
            true => Some(RmsNorm::new(matrix("norm_gain")?, matrix("norm_bias")?)?),
            false => None,
        };
        let low_rank = <LowRankConfig as Method>::from_parts(parts)?.with_activations(own.activations)?;
        TernaryLayer { low_rank, norm: None, activation: own.activation }.with_norm(norm)
    }
}

impl Method for TernaryConfig {
    const NAME: &'static str = "ternary";
    type Layer = TernaryLayer;

    fn validate(&self) -> Result<()> {
        self.validate()
    }

    fn check(&self, shape: LayerShape, calibrated: bool) -> Result<()> {
        Method::check(&self.weights, shape, calibrated)
    }

    fn expected_bytes(&self, shape: LayerShape) -> Result<Option<usize>> {
        Method::expected_bytes(&self.weights, shape)
    }

    fn unusable(&self, calibration: &Calibration) -> Option<&'static str> {
        // What the weights meet.
        let normalized = match self.norm {
            true => calibration.mapped(|x| RmsNorm::default().forward(x)).ok(),
            false => None,
        };
        Method::unusable(&self.weights, normalized.as_ref().unwrap_or(calibration))
    }

    fn compress(
        &self,
        weight: ArrayView2<f32>,
        bias: Option<ArrayView1<f32>>,
        calibration: Option<&Calibration>,
    ) -> Result<TernaryLayer> {
        TernaryLayer::build(self, weight, bias, calibration)
    }

    fn from_parts(parts: Parts) -> Result<TernaryLayer> {
        TernaryLayer::from_parts(parts)
    }

    fn with_stored(&self, stored: &Value) -> Value {
        with_entries(stored.clone(), json!({"activations": self.weights.activations}))
    }

    fn from_config(config: &Map<String, Value>) -> Result<Self> {
        let OwnConfig { norm, activation, activations } =
            read_config(TernaryConfig::NAME, &Value::Object(config.clone()))?;
        let weights = LowRankConfig { activations, ..LowRankConfig::from_config(config)? };
        let settings = TernaryConfig { norm, activation, weights };
        settings.validate()?;
        Ok(settings)
    }
}

impl Layer for TernaryLayer {
    fn method(&self) -> MethodName {
        MethodName::new(TernaryConfig::NAME)
    }

    fn out_features(&self) -> usize {
        self.low_rank.out_features()
    }

    fn in_features(&self) -> usize {
        self.low_rank.in_features()
    }

    fn config(&self) -> Value {
        let own = OwnConfig {
            norm: self.norm.is_some(),
            activation: self.activation,
            activations: self.low_rank.activations(),
        };
        with_entries(self.low_rank.config(), json!(own))
    }

    fn configured(&self, config: &Value) -> Result<Option<SharedLayer>> {
        let own: OwnConfig = read_config(TernaryConfig::NAME, config)?;
        Ok(Some(self.clone().with_activations(own.activations)?.shared()))
    }

    fn product(&self, x: ArrayView2<f32>, accuracy: Accuracy) -> Result<Output> {
        let y = match &self.norm {
            Some(norm) => self.low_rank.packed_product(norm.forward(x)?.view(), accuracy),
            None => self.low_rank.packed_product(x, accuracy),
        };
        Ok(Output { y, relative_error_bound: None })
    }

    fn bias(&self) -> Result<Option<Array1<f32>>> {
        self.low_rank.bias()
    }

    fn packed_forward(&self) -> Option<PackedForward<'_>> {
        let is_product = self.norm.is_none() && self.activation == Activation::Linear;
        is_product.then(|| self.low_rank.packed_forward()).flatten()
    }

    fn offset(&self) -> Result<Option<Array1<f32>>> {
        self.low_rank.offset()
    }

    fn nonlinearities(&self) -> Vec<String> {
        let norm = self.norm.as_ref().map(|_| "an RMSNorm before its weight".to_owned());
        let activation = match (self.activation, json!(self.activation)) {
            (Activation::Linear, _) => None,
            (_, name) => Some(format!("the activation {} after it", name.as_str().unwrap_or_default())),
        };
        norm.into_iter().chain(activation).collect()
    }

    fn approximations(&self) -> Vec<String> {
        self.low_rank.approximations()
    }

    fn activate(&self, y: ArrayViewMut2<f32>) {
        self.activation.apply(y);
    }

    fn weight(&self) -> Result<Array2<f32>> {
        self.low_rank.weight()
    }

    fn rows(&self, indices: &[u32]) -> Result<Array2<f32>> {
        self.low_rank.rows(indices)
    }

    /// A straight-through estimator: rounded inputs count as they were.
    fn gradients(&self, x: ArrayView2<f32>, grad_output: ArrayView2<f32>) -> Result<Gradients> {
        let normalized = self.normalized(x)?;
        let mut grad_output = grad_output.to_owned();
        if self.activation != Activation::Linear {
            let mut pre_activation = self.low_rank.packed_product(normalized.view(), Accuracy::Full);
            if let Some(bias) = self.low_rank.bias()? {
                pre_activation += &bias;
            }
            for (g, &y) in grad_output.iter_mut().zip(&pre_activation) {
                *g *= self.activation.derivative(y).ok_or_else(|| {
                    Error::expected("activation of a layer with gradients", "softmax", "a function of one number")
                })?;
            }
        }
        let inner = self.low_rank.input_gradient(grad_output.view());
        let input = match &self.norm {
            Some(norm) => norm.backward(x, inner.view())?.input,
            None => inner,
        };
        let weight = matmul(grad_output.t(), normalized.view());
        Ok(Gradients { input, weight, bias: grad_output.sum_axis(Axis(0)) })
    }

    fn own_tensors(&self) -> Vec<(String, ArrayD<f32>)> {
        let norm = self.norm.as_deref();
        let arrays = [("norm.gain", norm.and_then(RmsNorm::gain)), ("norm.bias", norm.and_then(RmsNorm::bias))];
        arrays.into_iter().filter_map(|(name, array)| Some((name.into(), array?.clone().into_dyn()))).collect()
    }

    fn weight_inputs<'a>(&self, x: ArrayView2<'a, f32>) -> Result<CowArray<'a, f32, Ix2>> {
        match &self.norm {
            Some(norm) => Ok(norm.forward(x)?.into()),
            None => Ok(x.into()),
        }
    }

    fn positions(&self) -> usize {
        self.norm.as_deref().map_or(1, RmsNorm::positions)
    }

    fn at_position(&self, position: usize) -> Result<Option<SharedLayer>> {
        match self.norm.as_deref() {
            Some(norm) if norm.positions() > 1 => {
                Ok(Some(self.clone().with_norm(Some(norm.at_position(position)?))?.shared()))
            }
            _ => Ok(None),
        }
    }

    fn exact_source(&self) -> ExactSource {
        // A dense layer has neither norm nor activation: where there is one, its output is another.
        match self.norm.is_none() && self.activation == Activation::Linear {
            true => ExactSource::Dense,
            false => ExactSource::Layer,
        }
    }

    fn correction_report(&self, weight: ArrayView2<f32>, inputs: Option<ArrayView2<f32>>) -> CorrectionReport {
        // The caller has run the layer on these inputs: the norm takes them.
        let inputs = inputs.and_then(|x| self.weight_inputs(x).ok());
        self.low_rank.correction_report(weight, inputs.as_ref().map(|x| x.view()))
    }

    fn to_parts(&self) -> Parts {
        let mut parts = self.low_rank.to_parts();
        parts.method = self.method();
        // How inputs are rounded is a setting of running, which the catalogue keeps.
        let mut own =
            json!(OwnConfig { norm: self.norm.is_some(), activation: self.activation, activations: int8_absmax() });
        own.as_object_mut().expect("a struct is an object").remove("activations");
        parts.config = with_entries(parts.config, own);
        let norm = self.norm.as_deref();
        for (name, array) in [("norm_gain", norm.and_then(RmsNorm::gain)), ("norm_bias", norm.and_then(RmsNorm::bias))]
        {
            let Some(array) = array else { continue };
            let data = f32_bytes(array.as_slice().unwrap_or_default());
            parts.tensors.push(Tensor { name: name.into(), dtype: "F32".into(), shape: array.shape().to_vec(), data });
        }
        parts
    }

    fn memory_bytes(&self) -> usize {
        let norm = self.norm.as_deref();
        let numbers = |array: Option<&Array2<f32>>| array.map_or(0, Array2::len);
        self.low_rank.memory_bytes()
            + 4 * (numbers(norm.and_then(RmsNorm::gain)) + numbers(norm.and_then(RmsNorm::bias)))
    }
}

fn with_entries(mut config: Value, more: Value) -> Value {
    if let (Value::Object(all), Value::Object(more)) = (&mut config, more) {
        all.extend(more);
    }
    config
}

#[cfg(test)]
mod tests;
