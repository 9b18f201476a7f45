//! The MatMul-free gated recurrent unit (Zhu et al., 2024, as Keras-MatMulLess builds it), whose gates depend on inputs alone.

use ndarray::{Array2, Array3, ArrayView1, ArrayView2, ArrayView3, s};
use serde::{Deserialize, Serialize};

use super::recurrence::{RnnCell, RnnOutput, SequenceConfig, run_sequence, run_step};
use super::shape::require_shape;
use crate::error::{Error, Result};
use crate::layer::{Accuracy, Activation, SharedLayer};

/// Settings of a GRU, with Keras-MatMulLess's defaults.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GruConfig {
    /// Width of state and outputs.
    pub units: usize,
    /// Whether all layers are ternary: the kernel gives the data gates, too. If not, data gates and outputs have dense layers.
    pub fully_mml: bool,
    /// Heads that the state is divided into. They decide its shape `[heads, units / heads]`, and no number.
    pub num_heads: usize,
    /// The function that candidate states pass through.
    pub activation: Activation,
    /// The function that forget and data gates pass through.
    pub recurrent_activation: Activation,
    /// How sequences are run.
    #[serde(flatten)]
    pub sequence: SequenceConfig,
}

impl Default for GruConfig {
    fn default() -> Self {
        GruConfig {
            units: 0,
            fully_mml: false,
            num_heads: 1,
            activation: Activation::Silu,
            recurrent_activation: Activation::Sigmoid,
            sequence: SequenceConfig::default(),
        }
    }
}

/// A gated recurrent unit: `h = f · h₋₁ + (1 − f) · c`, `y = output_gate(g · h)`.
///
/// Forget gates f, candidates c and data gates g are projections of the input alone: `[f | c | g]` of the kernel, or `[f | c]` of
/// the kernel and g of a layer of its own.
#[derive(Debug, Clone)]
pub struct Gru {
    config: GruConfig,
    kernel: SharedLayer,
    data_gate: Option<SharedLayer>,
    output_gate: SharedLayer,
}

impl Gru {
    /// Returns the GRU of these layers: `kernel` gives f, c and, without a `data_gate`, g side by side.
    ///
    /// # Errors
    /// When the layers do not fit each other or the settings, or heads do not divide the units.
    pub fn new(
        config: GruConfig,
        kernel: SharedLayer,
        data_gate: Option<SharedLayer>,
        output_gate: SharedLayer,
    ) -> Result<Self> {
        let (units, heads) = (config.units, config.num_heads);
        if units == 0 || heads == 0 || !units.is_multiple_of(heads) {
            let found = format!("{units} and {heads}");
            return Err(Error::expected("units and num_heads of a GRU", found, "at least 1, heads that divide units"));
        }
        if config.fully_mml == data_gate.is_some() {
            let found = if data_gate.is_some() { "one" } else { "none" };
            let expected = if config.fully_mml { "none: fully_mml has it in the kernel" } else { "one" };
            return Err(Error::expected("data_gate of a GRU", found, expected));
        }
        let inputs = kernel.in_features();
        let gates = if config.fully_mml { 3 } else { 2 };
        require_shape("a GRU's kernel", &kernel, units.saturating_mul(gates), inputs)?;
        if let Some(gate) = &data_gate {
            require_shape("a GRU's data_gate", gate, units, inputs)?;
        }
        require_shape("a GRU's output_gate", &output_gate, units, units)?;
        Ok(Gru { config, kernel, data_gate, output_gate })
    }

    /// Returns the settings.
    pub fn config(&self) -> &GruConfig {
        &self.config
    }

    /// Returns the layer of forget gates and candidates, `[2 · units, in_features]`, or of data gates, too,
    /// `[3 · units, in_features]`.
    pub fn kernel(&self) -> &SharedLayer {
        &self.kernel
    }

    /// Returns the layer of data gates, `[units, in_features]`, where they have one of their own.
    pub fn data_gate(&self) -> Option<&SharedLayer> {
        self.data_gate.as_ref()
    }

    /// Returns the layer that outputs come from, `[units, units]`.
    pub fn output_gate(&self) -> &SharedLayer {
        &self.output_gate
    }

    /// Runs sequences `[batch, steps, in_features]` as the settings say, from `state` `[batch, heads, units / heads]`, or from
    /// zeros. A step whose `mask` `[batch, steps]` is false leaves the state as it is.
    ///
    /// # Errors
    /// As [`run_sequence`].
    pub fn forward(
        &self,
        x: ArrayView3<f32>,
        state: Option<ArrayView3<f32>>,
        mask: Option<ArrayView2<bool>>,
        accuracy: Accuracy,
    ) -> Result<RnnOutput> {
        run_sequence(self, self.config.sequence, x, state, mask, accuracy)
    }

    /// Runs one step for inputs `[batch, in_features]`: returns outputs `[batch, units]`, and replaces the state by the next one.
    ///
    /// # Errors
    /// As [`run_step`].
    pub fn step(&self, x: ArrayView2<f32>, state: &mut Array3<f32>, accuracy: Accuracy) -> Result<Array2<f32>> {
        run_step(self, x, state, accuracy)
    }
}

impl RnnCell for Gru {
    fn in_features(&self) -> usize {
        self.kernel.in_features()
    }

    fn out_features(&self) -> usize {
        self.config.units
    }

    fn state_shape(&self) -> (usize, usize) {
        (self.config.num_heads, self.config.units / self.config.num_heads)
    }

    /// Returns `[f | c | g]`, `[rows, 3 · units]`.
    fn input_projection(&self, x: ArrayView2<f32>, accuracy: Accuracy) -> Result<Array2<f32>> {
        let units = self.config.units;
        let from_kernel = self.kernel.forward(x, accuracy)?.y;
        let mut all = match &self.data_gate {
            None => from_kernel,
            Some(gate) => {
                let mut all = Array2::zeros((x.nrows(), 3 * units));
                all.slice_mut(s![.., ..2 * units]).assign(&from_kernel);
                all.slice_mut(s![.., 2 * units..]).assign(&gate.forward(x, accuracy)?.y);
                all
            }
        };
        let GruConfig { activation, recurrent_activation, .. } = self.config;
        recurrent_activation.apply(all.slice_mut(s![.., ..units]));
        activation.apply(all.slice_mut(s![.., units..2 * units]));
        recurrent_activation.apply(all.slice_mut(s![.., 2 * units..]));
        Ok(all)
    }

    fn hidden_len(&self) -> usize {
        self.config.units
    }

    fn update(&self, projected: ArrayView1<f32>, state: &mut [f32], hidden: &mut [f32]) {
        let units = self.config.units;
        let projected = projected.to_slice().expect("rows of an owned array");
        let (forget, rest) = projected.split_at(units);
        let (candidate, data) = rest.split_at(units);
        let gates = forget.iter().zip(candidate).zip(data);
        for ((h, hidden), ((f, c), g)) in state.iter_mut().zip(hidden).zip(gates) {
            *h = f * *h + (1.0 - f) * c;
            *hidden = g * *h;
        }
    }

    fn output_projection(
        &self,
        hidden: ArrayView2<f32>,
        _: ArrayView2<f32>,
        accuracy: Accuracy,
    ) -> Result<Array2<f32>> {
        Ok(self.output_gate.forward(hidden, accuracy)?.y)
    }
}
