//! What is stored of a layer.

use ndarray::Array1;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::quant::{ActivationFormat, PackedMatrix, RowMatrix, RowType, WeightFormat};

/// The arrays of a layer.
#[derive(Debug)]
pub struct Inner {
    pub config: StoredConfig,
    pub weight: PackedMatrix,
    /// Columns of A as rows, `[rank, out]`.
    pub a: RowMatrix,
    /// `[rank, in]`.
    pub b: RowMatrix,
    pub singular_values: Vec<f32>,
    /// The output bias correction `(W − Ŵ − A B) E[x]`, `[1, out]`.
    pub bias_correction: Option<RowMatrix>,
    pub bias: Option<Array1<f32>>,
}

/// What the arrays are, and how they came to be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoredConfig {
    pub weight: WeightFormat,
    pub rank: usize,
    #[serde(default = "f32_factors", skip_serializing_if = "is_f32")]
    pub factors: RowType,
    pub in_features: usize,
    pub out_features: usize,
    /// The rule's other settings, for whoever reads the catalogue.
    #[serde(flatten)]
    pub made: Map<String, Value>,
}

fn f32_factors() -> RowType {
    RowType::F32
}

fn is_f32(factors: &RowType) -> bool {
    *factors == RowType::F32
}

/// What the catalogue keeps of how a layer runs.
#[derive(Deserialize)]
pub struct Running {
    #[serde(default)]
    pub activations: ActivationFormat,
}
