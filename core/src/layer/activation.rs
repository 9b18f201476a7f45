//! Activation functions, with Keras's names and definitions.

use ndarray::{ArrayViewMut2, Zip};
use serde::{Deserialize, Serialize};

use crate::linalg::exp;

/// An activation function: of each number by itself, but for [`Activation::Softmax`], which is of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x`.
    #[default]
    Linear,
    /// `max(x, 0)`.
    Relu,
    /// `x Φ(x)`, with the normal distribution function Φ itself, not its approximation by tanh.
    Gelu,
    /// `x σ(x)`, also called swish.
    Silu,
    /// `σ(x) = 1 / (1 + e⁻ˣ)`.
    Sigmoid,
    /// `tanh x`.
    Tanh,
    /// `1.0507 x`, or `1.0507 · 1.6733 (eˣ − 1)` below 0.
    Selu,
    /// `x`, or `eˣ − 1` below 0.
    Elu,
    /// `ln(1 + eˣ)`.
    Softplus,
    /// `x / (1 + |x|)`.
    Softsign,
    /// `eˣ`.
    Exponential,
    /// `min(max(x / 6 + 1/2, 0), 1)`.
    HardSigmoid,
    /// `eˣ` divided by its sum over the row.
    Softmax,
}

const SELU_SCALE: f64 = 1.050_700_987_355_480_5;
const SELU_ALPHA: f64 = 1.673_263_242_354_377_2;

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `x σ(x)`, to a few units in the last place, without branches.
#[inline(always)]
fn silu(x: f32) -> f32 {
    // e^−|x|, of which neither form of the quotient overflows.
    let small = exp(-x.abs());
    let above = if x >= 0.0 { x } else { x * small };
    above / (1.0 + small)
}

/// Multiplies `up` by the function of each number of `gate`, which receives the products.
#[inline(always)]
fn gated(gate: &mut [f32], up: &[f32], function: impl Fn(f32) -> f32) {
    let up = &up[..gate.len()];
    for i in 0..gate.len() {
        gate[i] = function(gate[i]) * up[i];
    }
}

/// [`gated`], compiled for wider registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn gated_avx2(gate: &mut [f32], up: &[f32], activation: Activation) {
    match activation {
        Activation::Silu => gated(gate, up, silu),
        Activation::Gelu => gated(gate, up, gelu),
        other => gated(gate, up, |x| other.eval(x)),
    }
}

/// The error function, to 5e-7: a quotient of polynomials (those of Eigen's `erf` for f32), without branches, so that a loop over
/// numbers computes several at once.
#[inline(always)]
fn erf(x: f32) -> f32 {
    let within = x.clamp(-4.0, 4.0);
    let square = within * within;
    let polynomial = |coefficients: &[f32]| coefficients.iter().fold(0f32, |sum, c| sum * square + c);
    let above = polynomial(&[
        -2.726_142_3e-10,
        2.770_681_4e-8,
        -2.101_024e-6,
        -5.692_506_4e-5,
        -7.349_906_4e-4,
        -2.954_6e-3,
        -1.609_603_3e-2,
    ]);
    let below = polynomial(&[-1.456_607_15e-5, -2.133_740_5e-4, -1.682_827e-3, -7.373_329_3e-3, -1.426_473_9e-2]);
    // From 3.92 on, the next f32 is 1.
    if x.abs() >= 3.92 { 1f32.copysign(x) } else { within * above / below }
}

#[inline(always)]
fn gelu(x: f32) -> f32 {
    x * 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

impl Activation {
    /// Every function, in the order in which they are documented.
    pub const ALL: [Activation; 13] = [
        Activation::Linear,
        Activation::Relu,
        Activation::Gelu,
        Activation::Silu,
        Activation::Sigmoid,
        Activation::Tanh,
        Activation::Selu,
        Activation::Elu,
        Activation::Softplus,
        Activation::Softsign,
        Activation::Exponential,
        Activation::HardSigmoid,
        Activation::Softmax,
    ];

    /// Returns the function of one number; for [`Activation::Softmax`], which is of a row, `eˣ`.
    pub fn eval(self, x: f32) -> f32 {
        match self {
            Activation::Linear => return x,
            Activation::Relu => return x.max(0.0),
            Activation::Gelu => return gelu(x),
            // Computed in f32: the error is a few units in the last place.
            Activation::Silu => return silu(x),
            Activation::Sigmoid => return 1.0 / (1.0 + (-x).exp()),
            Activation::Tanh => return x.tanh(),
            _ => {}
        }
        let x = f64::from(x);
        let y = match self {
            Activation::Selu if x > 0.0 => SELU_SCALE * x,
            Activation::Selu => SELU_SCALE * SELU_ALPHA * x.exp_m1(),
            Activation::Elu => {
                if x > 0.0 {
                    x
                } else {
                    x.exp_m1()
                }
            }
            Activation::Softplus => x.max(0.0) + (-x.abs()).exp().ln_1p(),
            Activation::Softsign => x / (1.0 + x.abs()),
            Activation::HardSigmoid => (x / 6.0 + 0.5).clamp(0.0, 1.0),
            _ => x.exp(),
        };
        y as f32
    }

    /// Returns the derivative at a number; `None` for [`Activation::Softmax`], whose derivative is a matrix.
    pub fn derivative(self, x: f32) -> Option<f32> {
        let x = f64::from(x);
        let y = match self {
            Activation::Linear => 1.0,
            Activation::Relu => {
                if x > 0.0 {
                    1.0
                } else {
                    0.0
                }
            }
            Activation::Gelu => {
                let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
                0.5 * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2)) + x * density
            }
            Activation::Silu => sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x))),
            Activation::Sigmoid => sigmoid(x) * (1.0 - sigmoid(x)),
            Activation::Tanh => 1.0 - x.tanh().powi(2),
            Activation::Selu if x > 0.0 => SELU_SCALE,
            Activation::Selu => SELU_SCALE * SELU_ALPHA * x.exp(),
            Activation::Elu => {
                if x > 0.0 {
                    1.0
                } else {
                    x.exp()
                }
            }
            Activation::Softplus => sigmoid(x),
            Activation::Softsign => (1.0 + x.abs()).powi(-2),
            Activation::Exponential => x.exp(),
            Activation::HardSigmoid => {
                if x.abs() < 3.0 {
                    1.0 / 6.0
                } else {
                    0.0
                }
            }
            Activation::Softmax => return None,
        };
        Some(y as f32)
    }

    /// Replaces each number of `gate` by its function times that of `up` in the same place.
    ///
    /// # Panics
    /// When `up` is shorter, or for [`Activation::Softmax`], which is of a row.
    pub fn gate(self, gate: &mut [f32], up: &[f32]) {
        assert!(self != Activation::Softmax, "a function of one number");
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the features are there.
            return unsafe { gated_avx2(gate, up, self) };
        }
        gated(gate, up, |x| self.eval(x));
    }

    /// Applies the function to each row, in place.
    pub fn apply(self, mut rows: ArrayViewMut2<f32>) {
        match self {
            Activation::Linear => {}
            // By themselves, so that their loops are compiled to vectors.
            Activation::Gelu => rows.mapv_inplace(gelu),
            Activation::Silu => rows.mapv_inplace(silu),
            Activation::Softmax => {
                for mut row in rows.rows_mut() {
                    let largest = row.iter().fold(f32::NEG_INFINITY, |largest, &v| largest.max(v));
                    row.mapv_inplace(|v| (v - largest).exp());
                    let sum: f32 = row.sum();
                    row.mapv_inplace(|v| v / sum);
                }
            }
            _ => Zip::from(&mut rows).for_each(|v| *v = self.eval(*v)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array2, array};

    #[test]
    fn derivatives_are_those_of_the_functions() {
        for activation in Activation::ALL.into_iter().filter(|a| *a != Activation::Softmax) {
            for x in [-4.3f32, -1.1, -0.2, 0.3, 0.9, 2.7] {
                let step = 1e-2f32;
                let difference = (activation.eval(x + step) - activation.eval(x - step)) / (2.0 * step);
                let derivative = activation.derivative(x).unwrap();
                assert!(
                    (derivative - difference).abs() <= 2e-3 * (1.0 + derivative.abs()),
                    "{activation:?} at {x}: {derivative} for {difference}"
                );
            }
        }
        assert_eq!(Activation::Softmax.derivative(0.0), None);
    }

    /// Against the definition in f64.
    #[test]
    fn gelu_is_near_its_definition() {
        let exact = |x: f32| {
            let x = f64::from(x);
            x * 0.5 * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2))
        };
        let mut rows = Array2::from_shape_fn((1, 200_001), |(_, i)| (i as f32 - 100_000.0) / 8000.0);
        let x = rows.clone();
        Activation::Gelu.apply(rows.view_mut());
        for (&x, &y) in x.iter().zip(&rows) {
            assert_eq!(y, Activation::Gelu.eval(x));
            let apart = (f64::from(y) - exact(x)).abs();
            assert!(apart <= 5e-7 * f64::from(x.abs().max(1.0)), "{x}: {y}, {apart} apart");
        }
        for (x, y) in [(0.0, 0.0), (1e-30, 0.5e-30), (300.0, 300.0), (-300.0, 0.0)] {
            assert!((Activation::Gelu.eval(x) - y).abs() <= 1e-7 * y, "{x}");
        }
    }

    #[test]
    fn gates_are_products() {
        for activation in Activation::ALL.into_iter().filter(|a| *a != Activation::Softmax) {
            let mut gate: Vec<f32> = (0..1001).map(|i| (i as f32 - 500.0) / 9.0).collect();
            let up: Vec<f32> = (0..1001).map(|i| (i % 7) as f32 - 3.0).collect();
            let expected: Vec<f32> = gate.iter().zip(&up).map(|(g, u)| activation.eval(*g) * u).collect();
            activation.gate(&mut gate, &up);
            for (found, expected) in gate.iter().zip(expected) {
                assert!(
                    (found - expected).abs() <= 1e-6 * expected.abs().max(1e-30),
                    "{activation:?} {found} {expected}"
                );
            }
        }
        for i in -20_000..20_000 {
            let x = i as f32 / 240.0;
            let expected = f64::from(x) / (1.0 + (-f64::from(x)).exp());
            let found = f64::from(Activation::Silu.eval(x));
            assert!((found - expected).abs() <= 5e-7 * expected.abs().max(1e-36), "{x}: {found} for {expected}");
        }
    }

    #[test]
    fn large_inputs_give_finite_outputs() {
        for activation in Activation::ALL {
            let mut rows = array![[-200.0f32, 0.0, 80.0]];
            activation.apply(rows.view_mut());
            assert!(rows.iter().all(|v| v.is_finite()), "{activation:?} {rows}");
        }
        let mut rows = array![[1000.0f32, 1000.0], [0.0, 2f32.ln()]];
        Activation::Softmax.apply(rows.view_mut());
        assert!((rows - array![[0.5, 0.5], [1.0 / 3.0, 2.0 / 3.0]]).iter().all(|d: &f32| d.abs() < 1e-6));
    }
}
