//! Ternary weights: `y = f(Ŵ q(norm(x)) + A (B norm(x)) + b)` with Ŵ = γ · {−1, 0, 1} and q the rounding to int8
//! (BitNet b1.58, Keras-MML's `DenseMML`).

mod config;

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut2};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use config::TernaryConfig;

use super::activation::Activation;
use super::low_rank::LowRankLayer;
use super::parts::{Parts, Tensor, f32_bytes};
use super::rms_norm::RmsNorm;
use super::{Accuracy, Method, read_config};
use crate::error::{Error, Result};
use crate::quant::{ActivationFormat, PackedMatrix};

/// A ternary layer. Cloning shares the arrays.
#[derive(Debug, Clone)]
pub struct TernaryLayer {
    /// Weights, correction and bias.
    core: LowRankLayer,
    norm: Option<std::sync::Arc<RmsNorm>>,
    activation: Activation,
}

/// What the stored config says beside the weights'.
#[derive(Serialize, Deserialize)]
struct Around {
    norm: bool,
    activation: Activation,
    #[serde(default = "as_trained")]
    activations: ActivationFormat,
}

fn as_trained() -> ActivationFormat {
    ActivationFormat::Int8Absmax
}

impl TernaryLayer {
    /// Ternary weights for `weight` `[out, in]`. Settings and shapes have been checked.
    pub(super) fn build(
        config: &TernaryConfig,
        weight: ArrayView2<f32>,
        bias: Option<ArrayView1<f32>>,
        calibration: Option<ArrayView2<f32>>,
    ) -> Result<Self> {
        let norm = config.norm.then(RmsNorm::default);
        let inputs = match (&norm, calibration) {
            (Some(norm), Some(inputs)) => Some(norm.forward(inputs)?),
            (None, Some(inputs)) => Some(inputs.to_owned()),
            (_, None) => None,
        };
        let inputs = inputs.as_ref().map(|inputs| inputs.view());
        let core = LowRankLayer::build(&config.weights, weight, bias, inputs)?;
        TernaryLayer { core, norm: None, activation: config.activation }.with_norm(norm)
    }

    /// Weights `[out, in]` that are ternary already, times a scale.
    ///
    /// # Errors
    /// When a weight is none of −1, 0 and 1, a number is not finite, or the bias has another length.
    pub fn from_ternary(weights: ArrayView2<i8>, scale: f32, bias: Option<Array1<f32>>) -> Result<Self> {
        let packed = PackedMatrix::from_ternary(weights, scale)?;
        let core = LowRankLayer::of_weight(packed, bias)?.with_activations(as_trained())?;
        Ok(TernaryLayer { core, norm: None, activation: Activation::Linear })
    }

    /// The same layer, its inputs normalised first.
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

    /// The same layer, its outputs passed through a function.
    pub fn with_activation(self, activation: Activation) -> Self {
        TernaryLayer { activation, ..self }
    }

    /// The same layer, its inputs rounded like this.
    ///
    /// # Errors
    /// As [`LowRankLayer::with_activations`].
    pub fn with_activations(self, activations: ActivationFormat) -> Result<Self> {
        Ok(TernaryLayer { core: self.core.with_activations(activations)?, ..self })
    }

    /// Length of an output row.
    pub fn out_features(&self) -> usize {
        self.core.out_features()
    }

    /// Length of an input row.
    pub fn in_features(&self) -> usize {
        self.core.in_features()
    }

    /// Weights and correction.
    pub fn core(&self) -> &LowRankLayer {
        &self.core
    }

    /// What inputs are normalised by.
    pub fn norm(&self) -> Option<&RmsNorm> {
        self.norm.as_deref()
    }

    /// What outputs are passed through.
    pub fn activation(&self) -> Activation {
        self.activation
    }

    /// The inputs that the weights meet, before rounding.
    ///
    /// # Errors
    /// As [`RmsNorm::forward`].
    pub fn normalized(&self, x: ArrayView2<f32>) -> Result<Array2<f32>> {
        match &self.norm {
            Some(norm) => norm.forward(x),
            None => Ok(x.to_owned()),
        }
    }

    /// Without bias and activation, for a checked `x`.
    pub(super) fn linear(&self, x: ArrayView2<f32>, accuracy: Accuracy) -> Result<Array2<f32>> {
        Ok(match &self.norm {
            Some(norm) => self.core.linear(norm.forward(x)?.view(), accuracy),
            None => self.core.linear(x, accuracy),
        })
    }

    pub(super) fn activate(&self, y: ArrayViewMut2<f32>) {
        self.activation.apply(y);
    }

    pub(super) fn config(&self) -> Value {
        let around =
            Around { norm: self.norm.is_some(), activation: self.activation, activations: self.core.activations() };
        with_entries(self.core.config(), json!(around))
    }

    pub(super) fn configured(&self, config: &Value) -> Result<Self> {
        let around: Around = read_config(Method::Ternary, config)?;
        self.clone().with_activations(around.activations)
    }

    pub(super) fn to_parts(&self) -> Parts {
        let mut parts = self.core.to_parts();
        parts.method = Method::Ternary;
        // How inputs are rounded is a way to run it: it is the catalogue's.
        let mut around =
            json!(Around { norm: self.norm.is_some(), activation: self.activation, activations: as_trained() });
        around.as_object_mut().expect("a struct is an object").remove("activations");
        parts.config = with_entries(parts.config, around);
        let norm = self.norm.as_deref();
        for (name, array) in [("norm_gain", norm.and_then(RmsNorm::gain)), ("norm_bias", norm.and_then(RmsNorm::bias))]
        {
            let Some(array) = array else { continue };
            let data = f32_bytes(array.as_slice().unwrap_or_default());
            parts.tensors.push(Tensor { name: name.into(), dtype: "F32".into(), shape: array.shape().to_vec(), data });
        }
        parts
    }

    pub(super) fn from_parts(parts: Parts) -> Result<Self> {
        let around: Around = read_config(Method::Ternary, &parts.config)?;
        let matrix = |name: &str| -> Result<Option<Array2<f32>>> {
            let Some(tensor) = parts.tensor(name) else { return Ok(None) };
            let array = tensor.to_array()?.into_dimensionality();
            array.map(Some).map_err(|_| {
                Error::expected(format!("shape of {name}"), format!("{:?}", tensor.shape), "[positions, features]")
            })
        };
        let norm = match around.norm {
            true => Some(RmsNorm::new(matrix("norm_gain")?, matrix("norm_bias")?)?),
            false => None,
        };
        let core = LowRankLayer::from_parts(parts)?.with_activations(around.activations)?;
        TernaryLayer { core, norm: None, activation: around.activation }.with_norm(norm)
    }

    pub(super) fn memory_bytes(&self) -> usize {
        let norm = self.norm.as_deref();
        let numbers = |array: Option<&Array2<f32>>| array.map_or(0, Array2::len);
        self.core.memory_bytes() + 4 * (numbers(norm.and_then(RmsNorm::gain)) + numbers(norm.and_then(RmsNorm::bias)))
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
