//! Quantisation-aware training of ternary layers: forward passes with rounded weights and inputs, gradients as if nothing had
//! been rounded.
//!
//! Gradients pass straight through roundings (`∂round(v)/∂v = 1`), as in Keras-MatMulLess. The scale γ = mean|W| is part of the
//! graph, so that the gradient of `y = γ (x̃ · W̃ᵀ)` with respect to a weight has two parts: through W̃, and through γ.

mod glu;
mod ternary;

pub use glu::{GluGradients, GluTape, GluTraining};
pub use ternary::{TernaryGradients, TernaryTape, TernaryTraining};
