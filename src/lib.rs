//! An embedded store for compressed neural-network layers.
//!
//! A checkpoint's layers become keys and values, or quantised weights, with a low-rank correction where one is asked for;
//! their parts are Arrow tables in one LanceDB directory that many models share; snapshots name versions of the whole; a
//! layer opens lazily, by model and layer name, at any version, and runs from the store.
//!
//! ```
//! use layerstore::layer::Accuracy;
//! use layerstore::{ImportOptions, Rules, Store, formats, import};
//! use ndarray::Array2;
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let folder = folder.path();
//! // A checkpoint of one layer, [out_features, in_features]. Any safetensors checkpoint will do.
//! let weight = Array2::from_shape_fn((8, 64), |(i, j)| (((i * 64 + j) as f32).powi(2) * 0.37).sin());
//! let file = folder.join("model.safetensors");
//! formats::write_array(&format!("{}:encoder.dense.weight", file.display()), weight.view(), false)?;
//!
//! let rules = Rules::parse("[[rule]]\nlayers = 'encoder\\..*'\nmethod = 'low_rank'", "rules.toml")?;
//! let store = Store::create(&folder.join("layers").display().to_string()).await?;
//! let options = ImportOptions { rules, ..ImportOptions::default() };
//! let report = import(&store, formats::open(&file)?, "demo", options).await?;
//! assert!(report.stored_bytes < report.dense_bytes);
//! store.create_snapshot("first").await?;
//!
//! let layer = store.at("first").await?.layer("demo", "encoder.dense").await?;
//! let x = Array2::from_shape_fn((1, 64), |(_, j)| (j as f32 * 0.37).cos());
//! let y = layer.forward(x.view(), Accuracy::Approximate).await?.y;
//! let dense = x.dot(&weight.t());
//! let norm = |a: &Array2<f32>| a.iter().map(|v| v * v).sum::<f32>().sqrt();
//! assert!(norm(&(&y - &dense)) < 0.1 * norm(&dense));
//! # Ok(()) }
//! ```
//!
//! # Where things are
//!
//! The crate root has the store ([`Store`], its [`Snapshot`]s and handles), the work on whole models ([`import`],
//! [`evaluate`], [`export`], [`copy`], [`repair`], [`train_codebooks`], [`shared_directions`]) with its options and reports, the
//! statistics that layers are calibrated with ([`Calibration`]), language models and text encoders that run whole
//! ([`LanguageModel`], [`TextEncoder`]), and
//! [`Error`].
//!
//! | module | contents |
//! |---|---|
//! | [`layer`] | layers, the methods that make them, and their settings |
//! | [`nn`] | modules over layers, such as gated units, recurrent layers and attention blocks |
//! | [`attention`] | attention over arrays |
//! | [`formats`] | model files and arrays, read and written |
//! | [`blocking`] | the store and the work on models without async |
//!
//! Every type that a public signature names can be named through these paths, or is one of `std`, `ndarray`, `serde`,
//! `serde_json`, `bytes`, `chrono` or `safetensors`. The one exception is [`Store::lancedb`], the door to the tables.

// These panic where standard output or error is full or closed.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod architectures;
#[doc(hidden)]
pub mod cli;
mod compress;
mod staged;
mod store;
mod tasks;

pub mod attention;
pub mod blocking;
pub mod formats;
pub mod layer;
pub mod nn;
mod work;

#[doc(inline)]
pub use layerstore_core::{Calibration, CalibrationBuilder, Error, ErrorKind, Result, SecondMoment};

pub use architectures::{
    CacheType, ChatMessage, Divergence, EncodingOptions, Generation, GenerationOptions, LanguageModel, Perplexity,
    Pooling, Sampling, Session, SpeedOptions, SpeedReport, TextEncoder,
};
pub use compress::{
    ActivationsFile, CalibrateOptions, CalibrateReport, CalibrationFile, CalibrationInputs, CalibrationText,
    CompressReport, CopyReport, Evaluation, ExportDtype, ExportFormat, ExportOptions, ExportReport, FailedSource,
    ImportOptions, ImportReport, LayerEvaluation, LayerReport, MendedArtifact, Plan, PlannedLayer, RepairOptions,
    RepairReport, RepairSource, Rule, Rules, SharedDirections, SharedOptions, Training, TrainingReport,
    UnmeasuredLayer, calibrate, compress_layers, copy, evaluate, exact_layer, export, import, preview,
    read_attention_settings, repair, shared_directions, train_codebooks, write_statistics,
};
#[doc(hidden)]
pub use store::testing;
pub use store::{
    ArtifactInfo, AttentionHandle, ComparedLayer, ComparedModel, Comparison, CorruptArtifact, DEFAULT_CACHE_BYTES,
    DamagedMetadata, DeletedSnapshot, Diff, DiskCacheOptions, ErrorBasis, FORMAT_VERSION, GcReport, KeyIndexReport,
    LayerChange, LayerHandle, LayerName, LayerRecord, LayerState, Lease, ModelFile, ModelSummary, ModuleHandle,
    NearKey, OnWait, Provenance, Reader, Remedy, RowLocations, SettingChange, Snapshot, SnapshotInfo, Source,
    SourceTensor, State, Stats, StorageOptions, Store, StoreOptions, VerifyDepth, VerifyReport, VersionInfo, Writer,
    load_backend, save_backend,
};

pub use work::{Cancel, Progress, Silent};

// The rest of the package names errors by this path.
use layerstore_core::error;
