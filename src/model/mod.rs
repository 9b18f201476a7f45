//! Whole models: checkpoints read and written, rules that choose methods, calibration, compression, evaluation.

mod arrays;
mod checkpoint;
mod evaluate;
mod export;
mod import;
mod measure;
mod plan;
mod rules;
mod shared;
mod work;

pub use arrays::{read_array, write_array};
pub use checkpoint::{Activations, Checkpoint, LayerSource, TensorEntry};
pub use evaluate::{Evaluation, LayerEvaluation, evaluate, exact_layer};
pub use export::{ExportReport, export};
pub use import::{ImportOptions, ImportReport, LayerReport, import, open_inputs};
pub use measure::CorrectionReport;
pub use plan::{Plan, PlannedLayer, preview};
pub use rules::{Rule, Rules};
pub use shared::{SharedDirections, SharedOptions, shared_directions};
pub use work::{Cancel, Progress, Silent};
