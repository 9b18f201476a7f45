//! The store: Arrow tables in one LanceDB directory that many models share, with versioned snapshots.
//!
//! Artifacts (the parts of one compressed layer) are immutable and named by their content; the catalogue says which
//! artifact is which model's which layer, and every change of it is one version. See `docs/design.md` for the tables
//! and the commit protocol.

mod address;
mod agreement;
mod append;
mod aside;
mod attention;
mod batches;
mod blocks;
mod catalogue;
mod columns;
mod compare;
mod data;
mod durable;
mod files;
mod format;
mod gc;
mod handle;
mod heal;
mod layout;
mod listing;
mod location;
mod lock;
mod memory;
mod mend;
mod metadata;
mod models;
mod module;
mod names;
mod nearest;
mod on_disk;
mod on_wait;
mod reader;
mod record;
mod relist;
mod remedy;
mod repair;
mod root;
mod scan;
mod schema;
mod settings;
mod shared;
mod single;
mod snapshot;
mod spans;
mod stats;
mod synced;
mod tables;
#[doc(hidden)]
pub mod testing;
#[cfg(test)]
mod tests;
mod trial;
mod upgrade;
mod verify;
mod versions;
mod waiting;
mod writer;

pub use attention::AttentionHandle;
pub(crate) use catalogue::Scope;
pub use compare::{ComparedLayer, ComparedModel, Comparison};
pub use files::ModelFile;
pub use format::FORMAT_VERSION;
pub use gc::GcReport;
pub use handle::LayerHandle;
pub(crate) use location::check_place;
pub use lock::Lease;
pub use metadata::DamagedMetadata;
pub use module::ModuleHandle;
pub(crate) use module::source_tensors;
pub use nearest::{KeyIndexReport, NearKey};
pub use on_wait::OnWait;
pub use reader::Reader;
pub use record::{ErrorBasis, LayerName, LayerRecord, RowLocations, Source, SourceTensor};
pub(crate) use record::{adapted, weight_bits};
pub use remedy::Remedy;
pub(crate) use repair::Repairing;
pub use root::{DEFAULT_CACHE_BYTES, Store, StoreOptions};
pub use settings::SettingChange;
pub use single::{load_backend, save_backend};
pub use snapshot::{Diff, LayerChange, LayerState, ModelSummary, Snapshot, State};
pub use stats::Stats;
pub use verify::{CorruptArtifact, VerifyDepth, VerifyReport};
pub use versions::{DeletedSnapshot, SnapshotInfo, VersionInfo};
pub(crate) use writer::check_model_name;
pub use writer::{ArtifactInfo, Provenance, Writer};
