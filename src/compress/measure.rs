//! A compressed layer against the weight that it was made from.

use layerstore_core::linalg::{matmul_nt, relative_error};
use ndarray::ArrayView2;

use crate::error::Result;
use crate::layer::{Accuracy, Layer};
use crate::store::ErrorBasis;

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
