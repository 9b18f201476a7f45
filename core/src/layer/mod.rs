//! Compressed layers: built from a weight, run in memory, turned into [`Parts`] and back.
//!
//! A layer kind knows its parts and no table; the store moves parts and knows no layer kind. Inputs are
//! `[batch, in_features]`, outputs `[batch, out_features]`, f32, and `y = x · Wᵀ + b`.

mod activation;
mod backward;
mod dense;
mod key_value;
mod low_rank;
mod module;
pub mod parts;
mod rms_norm;
mod ternary;
mod vq_attention;

use std::fmt;
use std::str::FromStr;

use ndarray::{Array1, Array2, ArrayD, ArrayView1, ArrayView2};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use activation::Activation;
pub use backward::Gradients;
pub use dense::{DType, DenseLayer};
pub use dense::{dtype_name, dtype_named, from_f32, to_f32};
pub use key_value::StoredSearch;
pub use key_value::{
    Backend, Decomposition, Hit, InputStatistics, KeyValueConfig, KeyValueLayer, Limit, QueryHits, Ranking, Refit,
    SearchSettings, Sides, ThresholdMethod, search_threshold,
};
pub use low_rank::{
    Correction, LowRankConfig, LowRankLayer, MaxBits, MaxError, Rank, Rounding, Scaling, SvdMethod, Transform,
};
pub use module::ModuleLayer;
pub use parts::{ArtifactId, Parts};
pub use rms_norm::{NormGradients, RmsNorm};
pub use ternary::{TernaryConfig, TernaryLayer};
pub use vq_attention::{AttentionBlock, Mechanism, Step, VqAttentionConfig, VqAttentionLayer};

pub use crate::quant::{ActivationFormat, ProductFormat, RowFormat, RowType};

use crate::error::{Error, Result};
pub use crate::linalg::require_finite;

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// The checkpoint's own numbers.
    Dense,
    /// Keys and values: only the components that matter to a query are used.
    KeyValue,
    /// Quantised weights and a low-rank correction of their error.
    LowRank,
    /// Weights of −1, 0 and 1.
    Ternary,
    /// Attention between projections that are layers of their own: codebooks and settings.
    VqAttention,
    /// Settings and small tensors of what is made of other layers; no rule asks for it.
    Module,
}

impl Method {
    /// Every method, in the order they are documented.
    pub const ALL: [Method; 6] =
        [Method::Dense, Method::KeyValue, Method::LowRank, Method::Ternary, Method::VqAttention, Method::Module];

    /// Those that a rule can ask for.
    pub fn of_rules() -> impl Iterator<Item = Method> {
        Method::ALL.into_iter().filter(|method| *method != Method::Module)
    }

    /// Whether such a layer stands for a weight matrix: inputs go in, and outputs come out of it alone.
    pub fn is_linear(self) -> bool {
        !matches!(self, Method::VqAttention | Method::Module)
    }

    /// The name in rules, tables and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Method::Dense => "dense",
            Method::KeyValue => "key_value",
            Method::LowRank => "low_rank",
            Method::Ternary => "ternary",
            Method::VqAttention => "vq_attention",
            Method::Module => "module",
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Method {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        Method::ALL
            .into_iter()
            .find(|m| m.as_str() == name)
            .ok_or_else(|| Error::expected("method", format!("'{name}'"), Method::ALL.map(Method::as_str).join(", ")))
    }
}

/// A method and its settings: what a rule asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "snake_case")]
pub enum MethodConfig {
    Dense,
    KeyValue(KeyValueConfig),
    LowRank(LowRankConfig),
    Ternary(TernaryConfig),
    VqAttention(VqAttentionConfig),
}

impl MethodConfig {
    /// The method alone.
    pub fn method(&self) -> Method {
        match self {
            MethodConfig::Dense => Method::Dense,
            MethodConfig::KeyValue(_) => Method::KeyValue,
            MethodConfig::LowRank(_) => Method::LowRank,
            MethodConfig::Ternary(_) => Method::Ternary,
            MethodConfig::VqAttention(_) => Method::VqAttention,
        }
    }

    /// A layer's full configuration: what its parts say, and how these settings run it.
    pub fn with_stored(&self, stored: &Value) -> Value {
        let mut all = stored.clone();
        if let MethodConfig::LowRank(config) = self {
            return low_rank::with_activations(all, config.activations);
        }
        if let (MethodConfig::Ternary(config), Value::Object(all)) = (self, &mut all) {
            all.insert("activations".into(), serde_json::json!(config.weights.activations));
        }
        if let (MethodConfig::KeyValue(config), Value::Object(all)) = (self, &mut all)
            && let Value::Object(search) = serde_json::json!(config.search())
        {
            all.extend(search);
        }
        all
    }

    /// Checks the settings by themselves.
    ///
    /// # Errors
    /// When a setting is out of its range, or two exclude each other.
    pub fn validate(&self) -> Result<()> {
        match self {
            MethodConfig::Dense => Ok(()),
            MethodConfig::KeyValue(config) => config.validate(),
            MethodConfig::LowRank(config) => config.validate(),
            MethodConfig::Ternary(config) => config.validate(),
            MethodConfig::VqAttention(config) => config.validate(),
        }
    }

    /// Checks the settings against a layer's shape and whether calibration inputs are at hand, before any work is done.
    ///
    /// # Errors
    /// When a group, rank or number of keys does not fit, or calibration is needed and missing.
    pub fn check(&self, out_features: usize, in_features: usize, calibrated: bool) -> Result<()> {
        self.validate()?;
        match self {
            MethodConfig::Dense => Ok(()),
            MethodConfig::KeyValue(config) => config.check(out_features, in_features),
            MethodConfig::LowRank(config) => config.check(out_features, in_features, calibrated),
            MethodConfig::Ternary(config) => config.weights.check(out_features, in_features, calibrated),
            MethodConfig::VqAttention(_) => Err(no_weight("a method for a weight", Method::VqAttention)),
        }
    }

    /// Bytes that a layer's parts will take, the bias aside; `None` where that follows from its numbers.
    ///
    /// # Errors
    /// When the settings do not fit the shape.
    pub fn expected_bytes(&self, out_features: usize, in_features: usize) -> Result<Option<usize>> {
        match self {
            MethodConfig::LowRank(config) => config.expected_bytes(out_features, in_features),
            MethodConfig::Ternary(config) => config.weights.expected_bytes(out_features, in_features),
            MethodConfig::Dense | MethodConfig::KeyValue(_) | MethodConfig::VqAttention(_) => Ok(None),
        }
    }

    /// Compresses `weight` `[out_features, in_features]` with its bias `[out_features]`, for inputs like `calibration`
    /// `[tokens, in_features]`.
    ///
    /// # Errors
    /// As [`MethodConfig::check`], and when a number is not finite or a factorisation fails. `Dense` is refused: a
    /// dense layer keeps the checkpoint's bytes and has nothing to compute, see [`DenseLayer`].
    pub fn compress(
        &self,
        weight: ArrayView2<f32>,
        bias: Option<ArrayView1<f32>>,
        calibration: Option<ArrayView2<f32>>,
    ) -> Result<Layer> {
        let (out_features, in_features) = weight.dim();
        self.check(out_features, in_features, calibration.is_some())?;
        check_inputs(weight, bias, calibration)?;
        match self {
            MethodConfig::Dense => Ok(Layer::Dense(DenseLayer::from_f32(weight, bias))),
            MethodConfig::KeyValue(config) => {
                Ok(Layer::KeyValue(KeyValueLayer::build(config, weight, bias, calibration)?))
            }
            MethodConfig::LowRank(config) => {
                Ok(Layer::LowRank(LowRankLayer::build(config, weight, bias, calibration)?))
            }
            MethodConfig::Ternary(config) => {
                Ok(Layer::Ternary(TernaryLayer::build(config, weight, bias, calibration)?))
            }
            MethodConfig::VqAttention(_) => Err(no_weight("a method for a weight", Method::VqAttention)),
        }
    }
}

/// What is made of several layers where a linear one belongs.
fn no_weight(what: &str, found: Method) -> Error {
    let expected = match found {
        Method::VqAttention => "a linear layer: attention runs by `attend`, and its projections by themselves",
        _ => "a linear layer: a module runs with the layers that it is made of",
    };
    Error::expected(what, found, expected)
}

fn check_inputs(
    weight: ArrayView2<f32>,
    bias: Option<ArrayView1<f32>>,
    calibration: Option<ArrayView2<f32>>,
) -> Result<()> {
    let (out_features, in_features) = weight.dim();
    if let Some(bias) = bias {
        if bias.len() != out_features {
            return Err(Error::expected(
                "length of the bias",
                bias.len(),
                format!("{out_features}, the weight's rows"),
            ));
        }
        require_finite("the bias", bias.iter())?;
    }
    if let Some(inputs) = calibration
        && inputs.ncols() != in_features
    {
        return Err(Error::expected(
            "width of the calibration inputs",
            inputs.ncols(),
            format!("{in_features}, the layer's in_features"),
        ));
    }
    require_finite("the weight", weight.iter())
}

/// Whether a forward pass may leave out what matters little.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Accuracy {
    /// As the layer's settings say.
    #[default]
    Approximate,
    /// Everything that the layer stores is used.
    Full,
}

/// What a forward pass gives.
#[derive(Debug, Clone)]
pub struct Output {
    /// `[batch, out_features]`.
    pub y: Array2<f32>,
    /// Where the method can certify it: no row's ‖ŷ − y‖ / ‖y‖ (bias left out) exceeds this.
    pub relative_error_bound: Option<f64>,
}

/// A layer in memory, ready to run. Cloning shares the arrays.
#[derive(Debug, Clone)]
pub enum Layer {
    Dense(DenseLayer),
    KeyValue(KeyValueLayer),
    LowRank(LowRankLayer),
    Ternary(TernaryLayer),
    VqAttention(VqAttentionLayer),
    Module(ModuleLayer),
}

impl Layer {
    /// How the layer is compressed.
    pub fn method(&self) -> Method {
        match self {
            Layer::Dense(_) => Method::Dense,
            Layer::KeyValue(_) => Method::KeyValue,
            Layer::LowRank(_) => Method::LowRank,
            Layer::Ternary(_) => Method::Ternary,
            Layer::VqAttention(_) => Method::VqAttention,
            Layer::Module(_) => Method::Module,
        }
    }

    /// Length of an output row; for a dense tensor that is no matrix, its first dimension.
    pub fn out_features(&self) -> usize {
        match self {
            Layer::Dense(l) => l.out_features(),
            Layer::KeyValue(l) => l.out_features(),
            Layer::LowRank(l) => l.out_features(),
            Layer::Ternary(l) => l.out_features(),
            Layer::VqAttention(l) => l.out_features(),
            Layer::Module(l) => l.out_features(),
        }
    }

    /// Length of an input row; for a dense tensor that is no matrix, the product of its other dimensions.
    pub fn in_features(&self) -> usize {
        match self {
            Layer::Dense(l) => l.in_features(),
            Layer::KeyValue(l) => l.in_features(),
            Layer::LowRank(l) => l.in_features(),
            Layer::Ternary(l) => l.in_features(),
            Layer::VqAttention(l) => l.in_features(),
            Layer::Module(l) => l.in_features(),
        }
    }

    /// The full configuration: what the parts hold and how the layer runs.
    pub fn config(&self) -> Value {
        match self {
            Layer::Dense(l) => l.config(),
            Layer::KeyValue(l) => l.config(),
            Layer::LowRank(l) => l.config(),
            Layer::Ternary(l) => l.config(),
            Layer::VqAttention(l) => l.config(),
            Layer::Module(l) => l.config(),
        }
    }

    /// `y = x · Wᵀ + b` for `x` `[batch, in_features]`; of a ternary layer with the norm before it and the activation after
    /// it, if it has them.
    ///
    /// # Errors
    /// When the width of `x` is another, a value is not finite, or the layer is a tensor that is no matrix.
    pub fn forward(&self, x: ArrayView2<f32>, accuracy: Accuracy) -> Result<Output> {
        let mut output = self.linear(x, accuracy)?;
        if let Some(bias) = self.bias()? {
            crate::linalg::add_outer(&mut output.y, bias.view());
        }
        if let Layer::Ternary(layer) = self {
            layer.activate(output.y.view_mut());
        }
        Ok(output)
    }

    /// [`Layer::forward`] for one input `[in_features]`.
    ///
    /// # Errors
    /// As [`Layer::forward`].
    pub fn forward_vector(&self, x: ArrayView1<f32>, accuracy: Accuracy) -> Result<Array1<f32>> {
        let y = self.forward(x.insert_axis(ndarray::Axis(0)), accuracy)?.y;
        Ok(y.index_axis_move(ndarray::Axis(0), 0))
    }

    /// `x · Wᵀ`, bias and activation left out: what relative errors are measured on.
    ///
    /// # Errors
    /// As [`Layer::forward`].
    pub fn linear(&self, x: ArrayView2<f32>, accuracy: Accuracy) -> Result<Output> {
        match self {
            Layer::Dense(layer) => layer.require_matrix()?,
            Layer::VqAttention(_) | Layer::Module(_) => return Err(no_weight("a layer to run", self.method())),
            Layer::KeyValue(_) | Layer::LowRank(_) | Layer::Ternary(_) => {}
        }
        if x.ncols() != self.in_features() {
            return Err(Error::expected(
                "width of the input",
                x.ncols(),
                format!("{}, the layer's in_features", self.in_features()),
            ));
        }
        require_finite("the input", x.iter())?;
        match self {
            Layer::Dense(l) => l.linear(x),
            Layer::KeyValue(l) => Ok(l.linear(x, accuracy)),
            Layer::LowRank(l) => Ok(Output { y: l.linear(x, accuracy), relative_error_bound: None }),
            Layer::Ternary(l) => Ok(Output { y: l.linear(x, accuracy)?, relative_error_bound: None }),
            Layer::VqAttention(_) | Layer::Module(_) => Err(no_weight("a layer to run", self.method())),
        }
    }

    /// The bias `[out_features]`, if the layer has one.
    ///
    /// # Errors
    /// When a dense layer's bias is of a dtype that cannot be computed with.
    pub fn bias(&self) -> Result<Option<Array1<f32>>> {
        match self {
            Layer::Dense(l) => l.bias(),
            Layer::KeyValue(l) => Ok(l.bias().cloned()),
            Layer::LowRank(l) => Ok(l.bias().cloned()),
            Layer::Ternary(l) => Ok(l.core().bias().cloned()),
            Layer::VqAttention(_) | Layer::Module(_) => Ok(None),
        }
    }

    /// The bias as it is stored, whether a forward pass adds it or not.
    ///
    /// # Errors
    /// As [`Layer::bias`].
    pub fn stored_bias(&self) -> Result<Option<Array1<f32>>> {
        match self {
            Layer::KeyValue(l) => Ok(l.stored_bias().cloned()),
            other => other.bias(),
        }
    }

    /// The weight that the layer stands for, `[out_features, in_features]`, everything stored counted.
    ///
    /// # Errors
    /// When the layer is a dense tensor that is no matrix, or of a dtype that cannot be computed with.
    pub fn weight(&self) -> Result<Array2<f32>> {
        match self {
            Layer::Dense(l) => Ok(l.weight()?.clone()),
            Layer::KeyValue(l) => Ok(l.weight()),
            Layer::LowRank(l) => Ok(l.weight()),
            Layer::Ternary(l) => Ok(l.core().weight()),
            Layer::VqAttention(_) | Layer::Module(_) => Err(no_weight("a layer with a weight", self.method())),
        }
    }

    /// What a layer has beside weight and bias, by name: a ternary layer's norm (`norm.gain` and `norm.bias`), a module's own
    /// tensors.
    pub fn own_tensors(&self) -> Vec<(String, ArrayD<f32>)> {
        match self {
            Layer::Ternary(layer) => {
                let norm = layer.norm();
                let arrays = [("norm.gain", norm.and_then(RmsNorm::gain)), ("norm.bias", norm.and_then(RmsNorm::bias))];
                arrays.into_iter().filter_map(|(name, array)| Some((name.into(), array?.clone().into_dyn()))).collect()
            }
            Layer::Module(layer) => layer.tensors().iter().map(|(name, array)| (name.clone(), array.clone())).collect(),
            _ => vec![],
        }
    }

    /// The stored form.
    pub fn to_parts(&self) -> Parts {
        match self {
            Layer::Dense(l) => l.to_parts(),
            Layer::KeyValue(l) => l.to_parts(),
            Layer::LowRank(l) => l.to_parts(),
            Layer::Ternary(l) => l.to_parts(),
            Layer::VqAttention(l) => l.to_parts(),
            Layer::Module(l) => l.to_parts(),
        }
    }

    /// A layer from its stored form, run as its defaults say until [`Layer::configured`].
    ///
    /// # Errors
    /// When an array is missing, or its shape does not follow from the config.
    pub fn from_parts(parts: Parts) -> Result<Self> {
        match parts.method {
            Method::Dense => Ok(Layer::Dense(DenseLayer::from_parts(parts)?)),
            Method::KeyValue => Ok(Layer::KeyValue(KeyValueLayer::from_parts(parts)?)),
            Method::LowRank => Ok(Layer::LowRank(LowRankLayer::from_parts(parts)?)),
            Method::Ternary => Ok(Layer::Ternary(TernaryLayer::from_parts(parts)?)),
            Method::VqAttention => Ok(Layer::VqAttention(VqAttentionLayer::from_parts(parts)?)),
            Method::Module => Ok(Layer::Module(ModuleLayer::from_parts(parts)?)),
        }
    }

    /// The same arrays, run as `config` (a full configuration, as the catalogue keeps it) says.
    ///
    /// # Errors
    /// When the settings are not valid for the layer.
    pub fn configured(&self, config: &Value) -> Result<Self> {
        match self {
            Layer::Dense(_) | Layer::VqAttention(_) | Layer::Module(_) => Ok(self.clone()),
            Layer::Ternary(l) => Ok(Layer::Ternary(l.configured(config)?)),
            Layer::LowRank(l) => Ok(Layer::LowRank(l.configured(config)?)),
            Layer::KeyValue(l) => Ok(Layer::KeyValue(l.configured(config)?)),
        }
    }

    /// Memory that the arrays take, in bytes.
    pub fn memory_bytes(&self) -> usize {
        match self {
            Layer::Dense(l) => l.memory_bytes(),
            Layer::KeyValue(l) => l.memory_bytes(),
            Layer::LowRank(l) => l.memory_bytes(),
            Layer::Ternary(l) => l.memory_bytes(),
            Layer::VqAttention(l) => l.memory_bytes(),
            Layer::Module(l) => l.memory_bytes(),
        }
    }
}

/// A stored config as the type a layer kind reads it into.
pub fn read_config<T: serde::de::DeserializeOwned>(method: Method, config: &Value) -> Result<T> {
    T::deserialize(config).map_err(|e| {
        Error::expected(format!("stored config of a {method} layer"), e, "the settings that this version writes")
    })
}
