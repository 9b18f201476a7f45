//! Whole models: checkpoints read and written, rules that choose methods, calibration, compression, evaluation.

mod arrays;
mod attention;
mod attention_cache;
mod checkpoint;
mod codebooks;
mod evaluate;
mod export;
mod import;
mod keras;
mod measure;
mod plan;
mod rules;
mod shared;
mod work;

pub use arrays::{read_any_array, read_array, write_any_array, write_array};
pub use attention_cache::{read_attention_cache, write_attention_cache};
pub use checkpoint::{Activations, Checkpoint, LayerSource, TensorEntry};
pub use codebooks::{Training, TrainingReport, train_codebooks};
pub use evaluate::{Evaluation, LayerEvaluation, evaluate, exact_layer};
pub use export::{ExportReport, export};
pub use import::{ImportOptions, ImportReport, LayerReport, import, open_inputs};
pub use keras::{KERAS_ROOT, import_keras, is_keras, open_keras, preview_keras};
pub use measure::CorrectionReport;
pub use plan::{Plan, PlannedLayer, preview};
pub use rules::{Rule, Rules, read_attention_settings};
pub use shared::{SharedDirections, SharedOptions, shared_directions};
pub use work::{Cancel, Progress, Silent};
