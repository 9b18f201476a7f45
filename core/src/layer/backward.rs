//! Gradients of a layer, for training through it.
//!
//! A straight-through estimator: forward passes may leave out what matters little, gradients are those of the exact layer.

use ndarray::{Array1, Array2, ArrayView2, Axis};

use super::activation::Activation;
use super::low_rank::LowRankLayer;
use super::ternary::TernaryLayer;
use super::{Accuracy, Layer, require_finite};
use crate::error::{Error, Result};
use crate::linalg::{matmul, matmul_nt};

/// What a loss's gradient with respect to a layer's output becomes on its other side.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients {
    /// `[batch, in_features]`.
    pub input: Array2<f32>,
    /// `[out_features, in_features]`.
    pub weight: Array2<f32>,
    /// `[out_features]`.
    pub bias: Array1<f32>,
}

impl Layer {
    /// The gradients for inputs `x` `[batch, in_features]` and `grad_output` `[batch, out_features]`.
    ///
    /// With G for `grad_output`: G W, Gᵀ x and Σ G over the batch, W being everything that the layer stores. A
    /// key–value layer whose settings say `use_straight_through_estimator = false` gives the gradients of the pass that
    /// its settings run instead: those of W μ + P W (x − μ), with P the projection to the values of each row's hits.
    ///
    /// # Errors
    /// When a shape is another, a value is not finite, or the layer is a tensor that is no matrix.
    pub fn backward(&self, x: ArrayView2<f32>, grad_output: ArrayView2<f32>) -> Result<Gradients> {
        if let Layer::Dense(layer) = self {
            layer.require_matrix()?;
        }
        let expected = [(x.nrows(), self.in_features()), (x.nrows(), self.out_features())];
        let found = [x.dim(), grad_output.dim()];
        if found != expected {
            return Err(Error::expected(
                "shapes of input and output gradient",
                format!("{found:?}"),
                format!("{expected:?}"),
            ));
        }
        require_finite("the input", x.iter())?;
        require_finite("the output gradient", grad_output.iter())?;
        let bias = grad_output.sum_axis(Axis(0));
        let (input, weight) = match self {
            Layer::KeyValue(layer) => layer.gradients(x, grad_output),
            Layer::LowRank(layer) => (through(layer, grad_output), matmul(grad_output.t(), x)),
            Layer::Ternary(layer) => {
                return ternary(layer, x, grad_output);
            }
            Layer::VqAttention(_) | Layer::Module(_) => {
                return Err(super::no_weight("a layer with gradients of a weight", self.method()));
            }
            Layer::Dense(layer) => (matmul(grad_output, layer.weight()?.view()), matmul(grad_output.t(), x)),
        };
        Ok(Gradients { input, weight, bias })
    }
}

/// `grad_output · (Ŵ + A B)`
fn through(layer: &LowRankLayer, grad_output: ArrayView2<f32>) -> Array2<f32> {
    let (a, b) = layer.factors();
    let corrected = matmul(matmul_nt(grad_output, a.view()).view(), b.view());
    layer.quantized_backward(grad_output) + corrected
}

/// Of a ternary layer, inputs that are rounded being taken as they are.
fn ternary(layer: &TernaryLayer, x: ArrayView2<f32>, grad_output: ArrayView2<f32>) -> Result<Gradients> {
    let normalized = layer.normalized(x)?;
    let mut grad_output = grad_output.to_owned();
    if layer.activation() != Activation::Linear {
        let mut before = layer.core().linear(normalized.view(), Accuracy::Full);
        if let Some(bias) = layer.core().bias() {
            before += bias;
        }
        for (g, &y) in grad_output.iter_mut().zip(&before) {
            *g *= layer.activation().slope(y).ok_or_else(|| {
                Error::expected("activation of a layer with gradients", "softmax", "a function of one number")
            })?;
        }
    }
    let inner = through(layer.core(), grad_output.view());
    let input = match layer.norm() {
        Some(norm) => norm.backward(x, inner.view())?.input,
        None => inner,
    };
    let weight = matmul(grad_output.t(), normalized.view());
    Ok(Gradients { input, weight, bias: grad_output.sum_axis(Axis(0)) })
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;
    use proptest::prelude::*;

    use crate::layer::{Accuracy, KeyValueConfig, Layer, LowRankConfig, MethodConfig, Rank, SearchSettings};
    use crate::linalg::relative_error;

    fn sample(rows: usize, columns: usize, seed: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, columns), |(i, j)| {
            ((i * 7919 + j * 104_729 + seed * 31) % 1009) as f32 / 500.0 - 1.0
        })
    }

    fn methods() -> [MethodConfig; 3] {
        let low_rank = LowRankConfig { rank: Rank::Components(1), ..LowRankConfig::default() };
        [
            MethodConfig::Dense,
            MethodConfig::KeyValue(KeyValueConfig { expected_keys_per_query: Some(2.0), ..KeyValueConfig::default() }),
            MethodConfig::LowRank(LowRankConfig {
                weight: serde_json::from_str(r#"{"type":"int8","group":"channel"}"#).unwrap(),
                ..low_rank
            }),
        ]
    }

    proptest! {
        /// Whatever a forward pass leaves out, the gradients are those of the layer that is stored.
        #[test]
        fn gradients_are_those_of_the_exact_layer(out in 2usize..9, inputs in 2usize..9, batch in 1usize..6, seed in 0usize..500) {
            let (w, x, g) = (sample(out, inputs, seed), sample(batch, inputs, seed + 1), sample(batch, out, seed + 2));
            for method in methods() {
                let calibration = sample(20, inputs, seed + 3);
                let layer = method.compress(w.view(), None, Some(calibration.view())).unwrap();
                let found = layer.backward(x.view(), g.view()).unwrap();
                let stored = layer.weight().unwrap();
                prop_assert!(relative_error(found.input.view(), g.dot(&stored).view()) < 1e-4, "{:?}", method);
                prop_assert!(relative_error(found.weight.view(), g.t().dot(&x).view()) < 1e-4, "{:?}", method);
                prop_assert!((found.bias - g.sum_axis(ndarray::Axis(0))).iter().all(|d| d.abs() < 1e-5));
            }
        }

        /// Without the estimator: what a small change of the input changes in the approximate output.
        #[test]
        fn without_it_they_are_those_of_the_approximate_pass(out in 3usize..9, inputs in 3usize..9, seed in 0usize..500) {
            let (w, x, g) = (sample(out, inputs, seed), sample(2, inputs, seed + 1), sample(2, out, seed + 2));
            let calibration = sample(30, inputs, seed + 3);
            let layer = methods()[1].compress(w.view(), None, Some(calibration.view())).unwrap();
            let Layer::KeyValue(layer) = layer else { panic!() };
            let settings = SearchSettings { use_straight_through_estimator: false, ..layer.settings().clone() };
            let layer = Layer::KeyValue(layer.with_search(settings).unwrap());
            let gradient = layer.backward(x.view(), g.view()).unwrap().input;
            let step = sample(2, inputs, seed + 4) * 1e-4;
            let run = |x: &Array2<f32>| layer.forward(x.view(), Accuracy::Approximate).unwrap().y.mapv(f64::from);
            let (before, after) = (run(&x), run(&(&x + &step)));
            let changed = ((after - before) * g.mapv(f64::from)).sum();
            let foretold = (gradient.mapv(f64::from) * step.mapv(f64::from)).sum();
            // A key may pass the threshold on the way; else the output is linear.
            let hits = |x: &Array2<f32>| match &layer {
                Layer::KeyValue(l) => l.search(x.view(), None).unwrap().iter().map(|q| {
                    let mut keys: Vec<u32> = q.hits.iter().map(|h| h.key).collect();
                    keys.sort_unstable();
                    keys
                }).collect::<Vec<_>>(),
                _ => vec![],
            };
            if hits(&x) == hits(&(&x + &step)) {
                prop_assert!((changed - foretold).abs() < 2e-5, "{} {}", changed, foretold);
            }
        }
    }

    #[test]
    fn other_shapes_are_refused() {
        let layer = MethodConfig::Dense.compress(sample(3, 2, 1).view(), None, None).unwrap();
        assert!(layer.backward(sample(4, 2, 1).view(), sample(4, 2, 1).view()).is_err());
        assert!(layer.backward(sample(4, 2, 1).view(), sample(3, 3, 1).view()).is_err());
        let nan = Array2::from_elem((1, 3), f32::NAN);
        assert!(layer.backward(sample(1, 2, 1).view(), nan.view()).is_err());
    }
}
