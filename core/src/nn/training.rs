//! What ternary layers do in training: forward passes with weights and inputs rounded, gradients as if they were not.
//!
//! Straight-through estimation as Keras-MML has it: `∂round(v)/∂v = 1`. The scale γ = mean|W| is part of the graph, so that
//! the gradient of `y = γ (x̃ · W̃ᵀ)` with respect to a weight has two parts: through W̃, and through γ.

use ndarray::{Array1, Array2, ArrayView2, Axis, Zip};

use super::glu::{Glu, GluConfig};
use crate::error::{Error, Result};
use crate::layer::{Activation, Layer, NormGradients, RmsNorm, TernaryConfig, TernaryLayer, compress};
use crate::linalg::{matmul, matmul_nt, require_finite};

/// Bounds of the scale of weights, and of the largest input of a row.
const SIZES: (f32, f32) = (1e-5, 1e9);

/// A `DenseMML` in training.
#[derive(Debug, Clone)]
pub struct TernaryTraining {
    /// Latent weights, `[out, in]`.
    pub kernel: Array2<f32>,
    /// `[out]`.
    pub bias: Option<Array1<f32>>,
    pub norm: RmsNorm,
    pub activation: Activation,
}

/// What a forward pass leaves for the backward one.
#[derive(Debug, Clone)]
pub struct TernaryTape {
    x: Array2<f32>,
    /// Normalised and rounded inputs.
    rounded: Array2<f32>,
    ternary: Array2<f32>,
    scale: f32,
    /// What the activation was given.
    before: Array2<f32>,
}

/// Gradients of a loss.
#[derive(Debug, Clone, PartialEq)]
pub struct TernaryGradients {
    /// `[batch, in]`.
    pub input: Array2<f32>,
    /// `[out, in]`.
    pub kernel: Array2<f32>,
    /// `[out]`.
    pub bias: Option<Array1<f32>>,
    /// `[positions, in]`.
    pub gain: Option<Array2<f32>>,
}

impl TernaryTraining {
    /// Fake-quantised: `act(γ (x̃ · W̃ᵀ) + b)` for `x` `[batch, in]`.
    ///
    /// # Errors
    /// When widths differ, or a number is not finite.
    pub fn forward(&self, x: ArrayView2<f32>) -> Result<(Array2<f32>, TernaryTape)> {
        if x.ncols() != self.kernel.ncols() {
            let expected = format!("{}, the kernel's", self.kernel.ncols());
            return Err(Error::expected("width of the input", x.ncols(), expected));
        }
        require_finite("the input", x.iter())?;
        require_finite("the kernel", self.kernel.iter())?;
        let (whole, steps_of) = whole_rows(self.norm.forward(x)?);
        let mean = self.kernel.iter().map(|w| f64::from(w.abs())).sum::<f64>() / self.kernel.len().max(1) as f64;
        let scale = (mean as f32).clamp(SIZES.0, SIZES.1);
        let steps = 1.0 / scale;
        let ternary = self.kernel.mapv(|w| (w * steps).round_ties_even().clamp(-1.0, 1.0));
        // Sums of whole numbers are exact, in whatever order: what is frozen gives the same, to the bit.
        let mut before = matmul_nt(whole.view(), ternary.view()) * scale * &steps_of;
        if let Some(bias) = &self.bias {
            before += bias;
        }
        let mut y = before.clone();
        self.activation.apply(y.view_mut());
        Ok((y, TernaryTape { x: x.to_owned(), rounded: whole * &steps_of, ternary, scale, before }))
    }

    /// The gradients for the one with respect to the output, `[batch, out]`.
    ///
    /// # Errors
    /// When the shape is another, or the activation has no slope of its own.
    pub fn backward(&self, tape: &TernaryTape, grad_output: ArrayView2<f32>) -> Result<TernaryGradients> {
        if grad_output.dim() != tape.before.dim() {
            let (found, expected) = (format!("{:?}", grad_output.dim()), format!("{:?}", tape.before.dim()));
            return Err(Error::expected("shape of the output gradient", found, expected));
        }
        let mut grad = grad_output.to_owned();
        for (g, &v) in grad.iter_mut().zip(&tape.before) {
            *g *= self.activation.slope(v).ok_or_else(|| {
                Error::expected("activation in training", "softmax", "a function of one number, softmax in the loss")
            })?;
        }
        let inner = matmul(grad.view(), tape.ternary.view()) * tape.scale;
        let NormGradients { input, gain, .. } = self.norm.backward(tape.x.view(), inner.view())?;
        // Through the ternary weights, which are W times 1/γ, and through γ, which their product is multiplied with.
        let product = matmul(grad.t(), tape.rounded.view());
        let mut kernel = &product * tape.scale;
        if tape.scale > SIZES.0 && tape.scale < SIZES.1 {
            let pairs = product.iter().zip(&tape.ternary);
            let through: f64 = pairs.map(|(p, t)| f64::from(*p) * f64::from(*t)).sum();
            let share = (through / self.kernel.len() as f64) as f32;
            Zip::from(&mut kernel).and(&self.kernel).for_each(|to, &w| {
                *to += share * if w == 0.0 { 0.0 } else { w.signum() };
            });
        }
        let bias = self.bias.is_some().then(|| grad.sum_axis(Axis(0)));
        Ok(TernaryGradients { input, kernel, bias, gain })
    }

    /// The layer as it is stored and run: ternary weights, their scale, norm, bias and activation.
    ///
    /// # Errors
    /// When a number is not finite, or a shape does not fit.
    pub fn freeze(&self) -> Result<TernaryLayer> {
        let bias = self.bias.as_ref().map(|bias| bias.view());
        let layer = compress(&TernaryConfig::default(), self.kernel.view(), bias, None)?;
        Ok(layer.with_norm(Some(self.norm.clone()))?.with_activation(self.activation))
    }
}

/// Each row in 127ths of its largest number, rounded to whole ones, and what they are times of, `[rows, 1]`.
fn whole_rows(mut x: Array2<f32>) -> (Array2<f32>, Array2<f32>) {
    let mut sizes = Array2::zeros((x.nrows(), 1));
    for (mut row, size) in x.rows_mut().into_iter().zip(&mut sizes) {
        let most = row.iter().fold(0f32, |most, v| most.max(v.abs()));
        let steps = 127.0 / most.clamp(SIZES.0, SIZES.1);
        row.mapv_inplace(|v| (v * steps).round_ties_even().clamp(-128.0, 127.0));
        *size = 1.0 / steps;
    }
    (x, sizes)
}

/// A gated linear unit in training.
#[derive(Debug, Clone)]
pub struct GluTraining {
    /// Of gates and what they gate, side by side.
    pub gate: TernaryTraining,
    pub down: TernaryTraining,
    /// What gates pass through.
    pub activation: Activation,
}

/// What a GLU's forward pass leaves.
#[derive(Debug, Clone)]
pub struct GluTape {
    gate: TernaryTape,
    down: TernaryTape,
    both: Array2<f32>,
}

/// Gradients of a GLU.
#[derive(Debug, Clone, PartialEq)]
pub struct GluGradients {
    /// `[batch, in]`.
    pub input: Array2<f32>,
    pub gate: TernaryGradients,
    pub down: TernaryGradients,
}

impl GluTraining {
    /// Fake-quantised, for `x` `[batch, in]`.
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

    /// The gradients for the one with respect to the output.
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
                let slope = self.activation.slope(gate).ok_or_else(|| {
                    Error::expected("activation of a GLU in training", "softmax", "a function of one number")
                })?;
                grad[i] = inner[i] * value * slope;
                grad[hidden + i] = inner[i] * self.activation.of(gate);
            }
        }
        let gate = self.gate.backward(&tape.gate, grad.view())?;
        Ok(GluGradients { input: gate.input.clone(), gate, down })
    }

    /// The layer as it is stored and run.
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
