//! A compressed layer against the weight that it was made from, and an attention block against exact attention.

use layerstore_core::linalg::{add_outer, matmul_nt, relative_error};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, s};

use crate::error::Result;
use crate::layer::{Accuracy, Layer, VqAttentionLayer};
use crate::nn::AttentionBlock;
use crate::store::ErrorBasis;

/// Tokens that attend to each other when a block is measured: inputs do not say where sequences end.
const WINDOW: usize = 128;

/// The error of a layer, and what it is an error of.
pub(super) struct Measured {
    /// ‖ŷ − y‖ / ‖y‖ or ‖Ŵ − W‖_F / ‖W‖_F; NaN or infinite where y or W is 0.
    pub error: f64,
    pub basis: ErrorBasis,
    /// Why there are inputs, and the error is not one of outputs.
    pub note: Option<String>,
}

/// The size below which numbers of f32 have fewer bits than others, times what hides the products that add up to them.
const LEAST_OUTPUT: f64 = f32::MIN_POSITIVE as f64 * (1u64 << 24) as f64;

/// Measures ‖ŷ − y‖ / ‖y‖ over `inputs`, else ‖Ŵ − W‖_F / ‖W‖_F. Inputs that are all 0 measure nothing: NaN. Where f32 does not
/// hold the outputs, weights are measured.
pub(super) fn measure(layer: &dyn Layer, weight: ArrayView2<f32>, inputs: Option<ArrayView2<f32>>) -> Result<Measured> {
    let note = match inputs {
        Some(x) => {
            if x.iter().all(|v| *v == 0.0) {
                return Ok(Measured { error: f64::NAN, basis: ErrorBasis::Activations, note: None });
            }
            let x_of_weight = layer.weight_inputs(x)?;
            let exact = matmul_nt(x_of_weight.view(), weight);
            let product = largest(x_of_weight.view()) * largest(weight);
            if (product == 0.0 || product > LEAST_OUTPUT) && exact.iter().all(|v| v.is_finite()) {
                let approximate = layer.linear(x, Accuracy::Approximate)?.y;
                let error = relative_error(approximate.view(), exact.view());
                return Ok(Measured { error, basis: ErrorBasis::Activations, note: None });
            }
            Some(format!(
                "error: of weights, since products of inputs and weights are of a size ({product:.0e}) that f32 does not hold"
            ))
        }
        None => None,
    };
    let error = relative_error(layer.weight()?.view(), weight);
    Ok(Measured { error, basis: ErrorBasis::Weights, note })
}

fn largest(numbers: ArrayView2<f32>) -> f64 {
    numbers.iter().fold(0f32, |most, v| most.max(v.abs())).into()
}

/// What a projection makes of `inputs` `[tokens, in]`: `x · Wᵀ + b`.
pub(super) fn projected(inputs: ArrayView2<f32>, weight: ArrayView2<f32>, bias: Option<&Array1<f32>>) -> Array2<f32> {
    let mut y = matmul_nt(inputs, weight);
    if let Some(bias) = bias {
        add_outer(&mut y, bias.view());
    }
    y
}

/// ‖ŷ − y‖ / ‖y‖ of the outputs of a block's heads, y being those of exact attention, over queries, keys and values, as many
/// rows of each: each window of tokens by itself. NaN where y is 0.
pub(super) fn measure_attention(layer: &VqAttentionLayer, [q, k, v]: [&Array2<f32>; 3]) -> Result<f64> {
    let exact = AttentionBlock::new(layer.exact()?, None, None)?;
    let block = AttentionBlock::new(layer.clone(), None, None)?;
    let (mut found, mut expected) = (vec![], vec![]);
    for start in (0..q.nrows()).step_by(WINDOW) {
        let tokens = start..q.nrows().min(start + WINDOW);
        let part = |x: &Array2<f32>| x.slice(s![tokens.clone(), ..]).insert_axis(Axis(0)).to_owned();
        let (q, k, v) = (part(q), part(k), part(v));
        for (block, all) in [(&block, &mut found), (&exact, &mut expected)] {
            let y = block.attend(q.view(), k.view(), v.view(), None, None, Accuracy::Full)?;
            all.extend(y);
        }
    }
    if expected.iter().all(|v| *v == 0.0) {
        return Ok(f64::NAN);
    }
    let row = |all: &[f32]| ArrayView1::from(all).insert_axis(Axis(0)).to_owned();
    Ok(relative_error(row(&found).view(), row(&expected).view()))
}
