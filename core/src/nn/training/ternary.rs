//! A ternary layer in quantisation-aware training.

use ndarray::{Array1, Array2, ArrayView2, Axis, Zip};

use crate::error::{Error, Result};
use crate::kernels::absmax_steps;
use crate::layer::{Activation, NormGradients, RmsNorm, TernaryConfig, TernaryLayer, compress};
use crate::linalg::{matmul, matmul_nt, require_finite};
use crate::quant::absmean_scale;

/// A ternary layer in training, Keras-MatMulLess's `DenseMML`: `y = activation(γ (x̃ · W̃ᵀ) + b)`.
#[derive(Debug, Clone)]
pub struct TernaryTraining {
    /// Weights W before rounding, `[out, in]`.
    pub kernel: Array2<f32>,
    /// Bias b, `[out]`.
    pub bias: Option<Array1<f32>>,
    /// The norm that inputs pass before they are rounded.
    pub norm: RmsNorm,
    /// The function that outputs pass through.
    pub activation: Activation,
}

/// Values of a forward pass that the backward pass needs.
#[derive(Debug, Clone)]
pub struct TernaryTape {
    /// Inputs, `[batch, in]`.
    x: Array2<f32>,
    /// Normalised and rounded inputs x̃, `[batch, in]`.
    rounded: Array2<f32>,
    /// Ternary weights W̃, `[out, in]`.
    ternary: Array2<f32>,
    /// γ.
    scale: f32,
    /// What the activation is applied to, `[batch, out]`.
    pre_activation: Array2<f32>,
}

/// The gradients of a loss with respect to the inputs and parameters of a ternary layer.
#[derive(Debug, Clone, PartialEq)]
pub struct TernaryGradients {
    /// `[batch, in]`.
    pub input: Array2<f32>,
    /// `[out, in]`.
    pub kernel: Array2<f32>,
    /// `[out]`.
    pub bias: Option<Array1<f32>>,
    /// Of the norm's gain, `[positions, in]`.
    pub gain: Option<Array2<f32>>,
}

impl TernaryTraining {
    /// Runs the layer on `x` `[batch, in]` with rounded weights and inputs: outputs `[batch, out]`, and what
    /// [`TernaryTraining::backward`] needs.
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
        let (codes, code_scales) = int8_rows(self.norm.forward(x)?);
        let mean = self.kernel.iter().map(|w| f64::from(w.abs())).sum::<f64>() / self.kernel.len().max(1) as f64;
        let scale = absmean_scale(mean);
        let inverse = 1.0 / scale;
        let ternary = self.kernel.mapv(|w| (w * inverse).round_ties_even().clamp(-1.0, 1.0));
        // Sums of whole numbers are exact, in whatever order: the frozen layer gives the same, to the bit.
        let mut pre_activation = matmul_nt(codes.view(), ternary.view()) * scale * &code_scales;
        if let Some(bias) = &self.bias {
            pre_activation += bias;
        }
        let mut y = pre_activation.clone();
        self.activation.apply(y.view_mut());
        Ok((y, TernaryTape { x: x.to_owned(), rounded: codes * &code_scales, ternary, scale, pre_activation }))
    }

    /// Returns the gradients of a loss whose gradient with respect to the outputs is `grad_output` `[batch, out]`.
    ///
    /// # Errors
    /// When the shape is another, or the activation is softmax.
    pub fn backward(&self, tape: &TernaryTape, grad_output: ArrayView2<f32>) -> Result<TernaryGradients> {
        if grad_output.dim() != tape.pre_activation.dim() {
            let (found, expected) = (format!("{:?}", grad_output.dim()), format!("{:?}", tape.pre_activation.dim()));
            return Err(Error::expected("shape of the output gradient", found, expected));
        }
        let mut grad = grad_output.to_owned();
        for (g, &v) in grad.iter_mut().zip(&tape.pre_activation) {
            *g *= self.activation.derivative(v).ok_or_else(|| {
                Error::expected("activation in training", "softmax", "a function of one number, softmax in the loss")
            })?;
        }
        let inner = matmul(grad.view(), tape.ternary.view()) * tape.scale;
        let NormGradients { input, gain, .. } = self.norm.backward(tape.x.view(), inner.view())?;
        // Through W̃ = round(W / γ), where γ cancels against the γ of the product, and through that γ = mean|W|.
        let product = matmul(grad.t(), tape.rounded.view());
        let mut kernel = &product * tape.scale;
        if self.kernel.iter().any(|w| *w != 0.0) {
            let pairs = product.iter().zip(&tape.ternary);
            let scale_gradient: f64 = pairs.map(|(p, t)| f64::from(*p) * f64::from(*t)).sum();
            let per_weight = (scale_gradient / self.kernel.len() as f64) as f32;
            Zip::from(&mut kernel).and(&self.kernel).for_each(|to, &w| {
                *to += per_weight * if w == 0.0 { 0.0 } else { w.signum() };
            });
        }
        let bias = self.bias.is_some().then(|| grad.sum_axis(Axis(0)));
        Ok(TernaryGradients { input, kernel, bias, gain })
    }

    /// Returns the layer as it is stored and run: ternary weights and their scale, norm, bias and activation.
    ///
    /// # Errors
    /// When a number is not finite, or a shape does not fit.
    pub fn freeze(&self) -> Result<TernaryLayer> {
        let bias = self.bias.as_ref().map(|bias| bias.view());
        let layer = compress(&TernaryConfig::default(), self.kernel.view(), bias, None)?;
        Ok(layer.with_norm(Some(self.norm.clone()))?.with_activation(self.activation))
    }
}

/// Rounds each row to int8 by its largest magnitude: returns the codes, and their scales `[rows, 1]`.
fn int8_rows(mut x: Array2<f32>) -> (Array2<f32>, Array2<f32>) {
    let mut scales = Array2::zeros((x.nrows(), 1));
    for (mut row, scale) in x.rows_mut().into_iter().zip(&mut scales) {
        let largest = row.iter().fold(0f32, |largest, v| largest.max(v.abs()));
        let inverse = absmax_steps(largest);
        row.mapv_inplace(|v| (v * inverse).round_ties_even().clamp(-128.0, 127.0));
        *scale = 1.0 / inverse;
    }
    (x, scales)
}
