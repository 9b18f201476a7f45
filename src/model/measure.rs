//! A compressed layer against the weight that it was made from.

use ndarray::Array2;
use serde::Serialize;

use crate::error::Result;
use crate::layer::{Accuracy, Layer};
use crate::linalg::{matmul_nt, relative_error};
use crate::store::ErrorBasis;

/// ‖ŷ − y‖ / ‖y‖ over `inputs`, else ‖Ŵ − W‖_F / ‖W‖_F.
pub(super) fn measure(layer: &Layer, weight: &Array2<f32>, inputs: Option<&Array2<f32>>) -> Result<(f64, ErrorBasis)> {
    match inputs {
        Some(x) => {
            let exact = exact(layer, weight, x)?;
            let approximate = layer.linear(x.view(), Accuracy::Approximate)?.y;
            Ok((relative_error(approximate.view(), exact.view()), ErrorBasis::Activations))
        }
        None => Ok((relative_error(layer.weight()?.view(), weight.view()), ErrorBasis::Weights)),
    }
}

/// What the weight itself gives, for the inputs that it meets.
fn exact(layer: &Layer, weight: &Array2<f32>, x: &Array2<f32>) -> Result<Array2<f32>> {
    Ok(match layer {
        Layer::Ternary(layer) => matmul_nt(layer.normalized(x.view())?.view(), weight.view()),
        _ => matmul_nt(x.view(), weight.view()),
    })
}

/// What a low-rank layer's correction is good for; nothing of other layers.
#[derive(Debug, Clone, Default, Serialize)]
pub struct CorrectionReport {
    /// The error without the correction, over what the error with it is over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uncorrected_error: Option<f64>,
    /// The singular values of the error that the correction keeps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub singular_values: Option<Vec<f32>>,
}

impl CorrectionReport {
    pub(super) fn of(layer: &Layer, weight: &Array2<f32>, inputs: Option<&Array2<f32>>) -> Self {
        let (layer, inputs) = match layer {
            Layer::LowRank(layer) => (layer, inputs.cloned()),
            Layer::Ternary(layer) => (layer.core(), inputs.and_then(|x| layer.normalized(x.view()).ok())),
            _ => return CorrectionReport::default(),
        };
        let quantized = layer.quantized();
        let error = match &inputs {
            Some(x) => {
                let plain = quantized.products(x.view(), layer.activations());
                relative_error(plain.view(), matmul_nt(x.view(), weight.view()).view())
            }
            None => relative_error(quantized.dequantize().view(), weight.view()),
        };
        CorrectionReport {
            uncorrected_error: Some(error).filter(|e| e.is_finite()),
            singular_values: Some(layer.singular_values().to_vec()),
        }
    }
}
