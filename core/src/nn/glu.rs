//! Gated linear units (Shazeer, 2020) on linear layers of any method.

use ndarray::{Array2, ArrayD, ArrayView2, ArrayViewD, Axis};
use serde::{Deserialize, Serialize};

use super::rows::{at_position, linear, require_shape};
use crate::error::{Error, Result};
use crate::layer::{Accuracy, Activation, SharedLayer};

/// A gated linear unit's settings, with Keras-MML's defaults.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GluConfig {
    /// Width of the outputs.
    pub units: usize,
    /// Times that the hidden width is the input's, two thirds of it, where `intermediate_size` does not say.
    pub hidden_ratio: usize,
    /// The hidden width.
    pub intermediate_size: Option<usize>,
    /// What gates pass through: `sigmoid` (GLU), `linear` (bilinear), `gelu` (GeGLU), `relu` (ReGLU), `selu` (SeGLU) or `silu`
    /// (SwiGLU).
    pub activation: Activation,
}

impl Default for GluConfig {
    fn default() -> Self {
        GluConfig { units: 0, hidden_ratio: 4, intermediate_size: None, activation: Activation::Sigmoid }
    }
}

impl GluConfig {
    /// The functions that gates may pass through.
    pub const ACTIVATIONS: [Activation; 6] = [
        Activation::Sigmoid,
        Activation::Linear,
        Activation::Relu,
        Activation::Gelu,
        Activation::Silu,
        Activation::Selu,
    ];

    /// The hidden width for inputs of a width: `hidden_ratio · 2/3` times it, rounded up to a multiple of 256, unless said.
    pub fn intermediate(&self, in_features: usize) -> usize {
        let ideal = in_features.saturating_mul(self.hidden_ratio).saturating_mul(2) / 3;
        self.intermediate_size.unwrap_or(ideal.div_ceil(256).saturating_mul(256))
    }
}

/// `y = down(act(g) · u)` with `[g | u] = gate(x)`.
#[derive(Debug, Clone)]
pub struct Glu {
    config: GluConfig,
    gate: SharedLayer,
    down: SharedLayer,
}

impl Glu {
    /// From its two layers: `gate` gives gates and what they gate side by side, twice the hidden width.
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

    /// The settings, the hidden width said.
    pub fn config(&self) -> &GluConfig {
        &self.config
    }

    /// The layer of gates and what they gate.
    pub fn gate(&self) -> &SharedLayer {
        &self.gate
    }

    /// The layer behind the gates.
    pub fn down(&self) -> &SharedLayer {
        &self.down
    }

    /// Runs it on the last dimension of `x` `[…, in_features]`.
    ///
    /// # Errors
    /// As [`Layer::forward`], and when a gain that is each position's own meets other positions.
    pub fn forward(&self, x: ArrayViewD<f32>, accuracy: Accuracy) -> Result<ArrayD<f32>> {
        let both = linear(&self.gate, x, accuracy)?;
        let shape = both.shape().to_vec();
        let gated = self.gated(super::rows::rows(both.view())?.view());
        super::rows::shaped(self.down.forward(gated.view(), accuracy)?.y, &shape)
    }

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
