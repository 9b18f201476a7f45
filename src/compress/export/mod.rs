//! A model of the store as files that other programs open.

mod compressed_tensors;
mod content;
mod folder;
mod gguf;
mod model;
mod options;
mod outline;
mod peft;
mod run;
mod tensor;

pub use options::{ExportDtype, ExportFormat, ExportOptions, ExportReport};
pub use run::export;
