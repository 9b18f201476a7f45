//! A compressed layer against the weight that it was made from, and an attention block against exact attention.

use layerstore_core::linalg::{add_outer, matmul_nt, relative_error};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, s};

use crate::error::Result;
use crate::layer::{Accuracy, Layer, VqAttentionLayer};
use crate::nn::AttentionBlock;
use crate::store::ErrorBasis;

/// Tokens that attend to each other when a block is measured: inputs do not say where sequences end.
const WINDOW: usize = 128;

/// ‖ŷ − y‖ / ‖y‖ over `inputs`, else ‖Ŵ − W‖_F / ‖W‖_F. Inputs that are all 0 measure nothing: NaN.
pub(super) fn measure(
    layer: &dyn Layer,
    weight: ArrayView2<f32>,
    inputs: Option<ArrayView2<f32>>,
) -> Result<(f64, ErrorBasis)> {
    match inputs {
        Some(x) => {
            if x.iter().all(|v| *v == 0.0) {
                return Ok((f64::NAN, ErrorBasis::Activations));
            }
            let exact = matmul_nt(layer.weight_inputs(x)?.view(), weight);
            let approximate = layer.linear(x, Accuracy::Approximate)?.y;
            Ok((relative_error(approximate.view(), exact.view()), ErrorBasis::Activations))
        }
        None => Ok((relative_error(layer.weight()?.view(), weight), ErrorBasis::Weights)),
    }
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
