//! A compressed layer against the weight that it was made from.

use layerstore_core::linalg::{matmul_nt, relative_error};
use ndarray::ArrayView2;

use crate::error::Result;
use crate::layer::{Accuracy, Layer};
use crate::store::ErrorBasis;

/// ‖ŷ − y‖ / ‖y‖ over `inputs`, else ‖Ŵ − W‖_F / ‖W‖_F.
pub(super) fn measure(
    layer: &dyn Layer,
    weight: ArrayView2<f32>,
    inputs: Option<ArrayView2<f32>>,
) -> Result<(f64, ErrorBasis)> {
    match inputs {
        Some(x) => {
            let exact = matmul_nt(layer.weight_inputs(x)?.view(), weight);
            let approximate = layer.linear(x, Accuracy::Approximate)?.y;
            Ok((relative_error(approximate.view(), exact.view()), ErrorBasis::Activations))
        }
        None => Ok((relative_error(layer.weight()?.view(), weight), ErrorBasis::Weights)),
    }
}
