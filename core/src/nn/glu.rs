//! Gated linear units (Shazeer, 2020) on linear layers of any method.

use ndarray::{Array2, ArrayD, ArrayView2, ArrayViewD, Axis};
use serde::{Deserialize, Serialize};

use super::shape::{at_position, flatten_rows, forward_linear, require_shape, unflatten_rows};
use crate::error::{Error, Result};
use crate::layer::{Accuracy, Activation, SharedLayer};

/// Settings of a gated linear unit, with Keras-MatMulLess's defaults.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GluConfig {
    /// Width of the outputs.
    pub units: usize,
    /// The hidden width is `hidden_ratio · 2/3` times the input's, where `intermediate_size` is not given.
    pub hidden_ratio: usize,
    /// The hidden width, where it does not follow from `hidden_ratio`.
    pub intermediate_size: Option<usize>,
    /// The function that gates pass through: `sigmoid` (GLU), `linear` (bilinear), `gelu` (GeGLU), `relu` (ReGLU), `selu` (SeGLU) or `silu`
    /// (SwiGLU).
    pub activation: Activation,
}

impl Default for GluConfig {
    fn default() -> Self {
        GluConfig { units: 0, hidden_ratio: 4, intermediate_size: None, activation: Activation::Sigmoid }
    }
}

impl GluConfig {
    /// The functions that gates can pass through.
    pub const ACTIVATIONS: [Activation; 6] = [
        Activation::Sigmoid,
        Activation::Linear,
        Activation::Relu,
        Activation::Gelu,
        Activation::Silu,
        Activation::Selu,
    ];

    /// Returns the hidden width for inputs of width `in_features`: `intermediate_size`, or `hidden_ratio · 2/3` times
    /// `in_features`, rounded up to a multiple of 256.
    pub fn intermediate(&self, in_features: usize) -> usize {
        let ideal = in_features.saturating_mul(self.hidden_ratio).saturating_mul(2) / 3;
        self.intermediate_size.unwrap_or(ideal.div_ceil(256).saturating_mul(256))
    }
}

/// A gated linear unit: `y = down(activation(g) · u)` with `[g | u] = gate(x)`.
#[derive(Debug, Clone)]
pub struct Glu {
    config: GluConfig,
    gate: SharedLayer,
    down: SharedLayer,
}

impl Glu {
    /// Returns the unit of two layers: `gate` gives g and u side by side, `[2 · hidden, in_features]`, and `down` is
    /// `[units, hidden]`.
    ///
    /// # Errors
    /// When the layers do not fit each other or the settings.
    pub fn new(config: GluConfig, gate: SharedLayer, down: SharedLayer) -> Result<Self> {
        if !GluConfig::ACTIVATIONS.contains(&config.activation) {
            let found = format!("{:?}", config.activation).to_lowercase();
            return Err(Error::expected("activation of a GLU", found, "sigmoid, linear, relu, gelu, silu or selu"));
        }
        let hidden = config.intermediate(gate.in_features());
        require_shape("a GLU's gate_dense", &gate, hidden.saturating_mul(2), gate.in_features())?;
        require_shape("a GLU's down_dense", &down, config.units, hidden)?;
        Ok(Glu { config: GluConfig { intermediate_size: Some(hidden), ..config }, gate, down })
    }

    /// Returns the settings, with `intermediate_size` given.
    pub fn config(&self) -> &GluConfig {
        &self.config
    }

    /// Returns the layer of g and u, `[2 · hidden, in_features]`.
    pub fn gate(&self) -> &SharedLayer {
        &self.gate
    }

    /// Returns the layer that outputs come from, `[units, hidden]`.
    pub fn down(&self) -> &SharedLayer {
        &self.down
    }

    /// Runs the unit on the last dimension of `x` `[…, in_features]`: `[…, units]`.
    ///
    /// # Errors
    /// As [`Layer::forward`](crate::layer::Layer::forward), and when `x` has not the positions that a layer's norm is for.
    pub fn forward(&self, x: ArrayViewD<f32>, accuracy: Accuracy) -> Result<ArrayD<f32>> {
        let both = forward_linear(&self.gate, x, accuracy)?;
        let shape = both.shape().to_vec();
        let gated = self.gated(flatten_rows(both.view())?.view());
        unflatten_rows(self.down.forward(gated.view(), accuracy)?.y, &shape)
    }

    /// Runs the unit on inputs `[batch, in_features]` at one position of a sequence.
    pub(super) fn step(&self, x: ArrayView2<f32>, position: usize, accuracy: Accuracy) -> Result<Array2<f32>> {
        let both = at_position(&self.gate, position)?.forward(x, accuracy)?.y;
        Ok(self.down.forward(self.gated(both.view()).view(), accuracy)?.y)
    }

    fn gated(&self, both: ArrayView2<f32>) -> Array2<f32> {
        let (gates, values) = both.split_at(Axis(1), both.ncols() / 2);
        let mut gates = gates.to_owned();
        self.config.activation.apply(gates.view_mut());
        gates * values
    }
}
