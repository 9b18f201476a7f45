//! A gated linear unit in quantisation-aware training.

use ndarray::{Array2, ArrayView2, Axis};

use super::ternary::{TernaryGradients, TernaryTape, TernaryTraining};
use crate::error::{Error, Result};
use crate::layer::{Activation, Layer};
use crate::nn::glu::{Glu, GluConfig};

/// A gated linear unit in training: `y = down(activation(g) · u)` with `[g | u] = gate(x)`.
#[derive(Debug, Clone)]
pub struct GluTraining {
    /// The layer of g and u, `[2 · hidden, in]`.
    pub gate: TernaryTraining,
    /// The layer that outputs come from, `[out, hidden]`.
    pub down: TernaryTraining,
    /// The function that gates pass through.
    pub activation: Activation,
}

/// Values of a gated unit's forward pass that the backward pass needs.
#[derive(Debug, Clone)]
pub struct GluTape {
    gate: TernaryTape,
    down: TernaryTape,
    /// `[g | u]`, `[batch, 2 · hidden]`.
    both: Array2<f32>,
}

/// The gradients of a loss with respect to the inputs and parameters of a gated unit.
#[derive(Debug, Clone, PartialEq)]
pub struct GluGradients {
    /// `[batch, in]`.
    pub input: Array2<f32>,
    /// Of the layer of g and u.
    pub gate: TernaryGradients,
    /// Of the layer that outputs come from.
    pub down: TernaryGradients,
}

impl GluTraining {
    /// Runs the unit on `x` `[batch, in]` with rounded weights and inputs: outputs `[batch, out]`, and what
    /// [`GluTraining::backward`] needs.
    ///
    /// # Errors
    /// As [`TernaryTraining::forward`].
    pub fn forward(&self, x: ArrayView2<f32>) -> Result<(Array2<f32>, GluTape)> {
        let (both, gate) = self.gate.forward(x)?;
        let (gates, values) = both.view().split_at(Axis(1), both.ncols() / 2);
        let mut gated = gates.to_owned();
        self.activation.apply(gated.view_mut());
        gated *= &values;
        let (y, down) = self.down.forward(gated.view())?;
        Ok((y, GluTape { gate, down, both }))
    }

    /// Returns the gradients of a loss whose gradient with respect to the outputs is `grad_output` `[batch, out]`.
    ///
    /// # Errors
    /// As [`TernaryTraining::backward`].
    pub fn backward(&self, tape: &GluTape, grad_output: ArrayView2<f32>) -> Result<GluGradients> {
        let down = self.down.backward(&tape.down, grad_output)?;
        let hidden = tape.both.ncols() / 2;
        let mut grad = Array2::zeros(tape.both.dim());
        for ((mut grad, both), inner) in grad.rows_mut().into_iter().zip(tape.both.rows()).zip(down.input.rows()) {
            for i in 0..hidden {
                let (gate, value) = (both[i], both[hidden + i]);
                let derivative = self.activation.derivative(gate).ok_or_else(|| {
                    Error::expected("activation of a GLU in training", "softmax", "a function of one number")
                })?;
                grad[i] = inner[i] * value * derivative;
                grad[hidden + i] = inner[i] * self.activation.eval(gate);
            }
        }
        let gate = self.gate.backward(&tape.gate, grad.view())?;
        Ok(GluGradients { input: gate.input.clone(), gate, down })
    }

    /// Returns the unit as it is stored and run.
    ///
    /// # Errors
    /// As [`TernaryTraining::freeze`] and [`Glu::new`].
    pub fn freeze(&self) -> Result<Glu> {
        let config = GluConfig {
            units: self.down.kernel.nrows(),
            intermediate_size: Some(self.down.kernel.ncols()),
            activation: self.activation,
            ..GluConfig::default()
        };
        Glu::new(config, self.gate.freeze()?.shared(), self.down.freeze()?.shared())
    }
}
