//! Models into the store and out of it: rules that choose methods, calibration, import, evaluation, export.

mod arranged;
mod attention;
mod calibration;
mod codebooks;
mod copy;
mod evaluate;
mod export;
mod import;
mod items;
mod measurable;
mod measure;
mod misfits;
mod plan;
mod preflight;
mod preview;
mod recipe;
mod reference;
mod repair;
mod rules;
mod shared;
mod unapplied;

pub use calibration::{ActivationsFile, CalibrationFile, write_statistics};
pub use codebooks::{Training, TrainingReport, train_codebooks};
pub(crate) use copy::Selected;
pub use copy::{CopyReport, copy};
pub use evaluate::{Evaluation, LayerEvaluation, evaluate};
pub use export::{ExportDtype, ExportFormat, ExportOptions, ExportReport, export};
pub(crate) use import::Prepared;
pub use import::{ImportOptions, ImportReport, LayerReport, import};
pub use measurable::UnmeasuredLayer;
pub use preview::{Plan, PlannedLayer, preview};
pub use reference::exact_layer;
pub use repair::{FailedSource, MendedArtifact, RepairOptions, RepairReport, RepairSource, repair};
pub use rules::{Rule, Rules, read_attention_settings};
pub use shared::{SharedDirections, SharedOptions, shared_directions};
