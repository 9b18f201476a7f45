//! What an import tells afterwards.

use serde::Serialize;

use crate::layer::{CorrectionReport, MethodName, SearchReport};
use crate::store::{ErrorBasis, ModelFile};

/// What became of one layer.
#[derive(Debug, Clone, Serialize)]
pub struct LayerReport {
    /// The layer's name.
    pub layer: String,
    /// The method that it is compressed by.
    pub method: MethodName,
    /// Length of an input row.
    pub in_features: u64,
    /// Length of an output row.
    pub out_features: u64,
    /// The artifact's name, in hex.
    pub artifact: String,
    /// ‖ŷ − y‖ / ‖y‖ over the calibration inputs where the layer had some, else ‖Ŵ − W‖ / ‖W‖; `None` where there is no such
    /// number. On the inputs that the layer was made for it is less than on others, which [`evaluate`](super::evaluate()) measures.
    pub relative_error: Option<f64>,
    /// What the error is measured on.
    pub error_basis: ErrorBasis,
    /// Bytes in the checkpoint, bias included.
    pub dense_bytes: u64,
    /// Bytes of the artifact's arrays.
    pub stored_bytes: u64,
    /// Stored bits for each weight, the bias and everything else counted; `null` in JSON for layers without weights.
    pub bits_per_weight: Option<f64>,
    /// What its correction gains; empty for layers that were not made anew, and for methods without one.
    #[serde(flatten)]
    pub correction: CorrectionReport,
    /// What its search finds for the calibration inputs, where its settings have it certify an error; empty for others, and for
    /// layers that were not made anew.
    #[serde(flatten)]
    pub search: SearchReport,
    /// What was adapted to the layer, and what of its settings or inputs was not used; empty where all is as the rule says.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Whether the store had it already.
    pub reused: bool,
    /// Time that the layer took, in seconds.
    pub seconds: f64,
}

/// What became of a model.
#[derive(Debug, Clone, Serialize)]
pub struct ImportReport {
    /// The model.
    pub model: String,
    /// The version that the commit made; the latest one where nothing had changed.
    pub version: u64,
    /// What became of each layer.
    pub layers: Vec<LayerReport>,
    /// The files that are kept with the model.
    pub files: Vec<ModelFile>,
    /// Bytes in the checkpoint, of all layers and files.
    pub dense_bytes: u64,
    /// Bytes that layers and files take, those counted that the store had already; one artifact of several layers counts once.
    pub stored_bytes: u64,
    /// Bytes of parts that were new to the store.
    pub written_bytes: u64,
    /// Patterns of rules that took no layer, with their lines: likely mistakes.
    pub unused_rules: Vec<String>,
    /// Calibration tensors that are named after no layer of the source: likely mistakes too.
    pub unmatched_calibration: Vec<String>,
    /// What was left out of the checkpoint, and what it says that an import does not do.
    pub notes: Vec<String>,
}

/// What became of layers that were compressed and not committed.
#[derive(Debug, Clone, Serialize)]
pub struct CompressReport {
    /// What became of each layer.
    pub layers: Vec<LayerReport>,
    /// Bytes of parts that were new to the store.
    pub written_bytes: u64,
}
