//! One layer as a store of its own: to hand on, or to keep a backend between runs.

use chrono::Utc;

use super::change::{Scope, not_alone};
use super::handle::LayerHandle;
use super::record::{ErrorBasis, LayerRecord, Source};
use super::root::{Store, StoreOptions};
use super::row_locations::RowLocations;
use super::writer::Provenance;
use crate::error::{Error, Result};
use crate::layer::{Layer, Parts, SharedLayer};

/// What model and layer are called in a store that [`save_backend`] made.
const NAME: &str = "layer";

/// Writes a layer into a store of its own at `uri`, made where there is none. Saving again there adds a version.
///
/// # Errors
/// When the place holds something else than a store of one layer, or the storage refuses.
pub async fn save_backend(layer: &dyn Layer, uri: &str) -> Result<()> {
    let parts = layer.to_parts();
    let bytes = parts.stored_bytes();
    let record = LayerRecord {
        model: NAME.into(),
        layer: NAME.into(),
        method: layer.method(),
        in_features: layer.in_features() as u64,
        out_features: layer.out_features() as u64,
        artifact: parts.id(),
        relative_error: None,
        error_basis: ErrorBasis::Weights,
        dense_bytes: 4 * layer.in_features() as u64 * layer.out_features() as u64,
        stored_bytes: bytes,
        config: layer.config(),
        source: Source::default(),
        created_at: Utc::now(),
        locations: RowLocations::default(),
    };
    save(record, parts, uri, StoreOptions::default()).await
}

/// Loads the layer of a store that [`save_backend`] or [`LayerHandle::copy_to`] made, as it was, settings included.
///
/// # Errors
/// When there is no store, it holds not exactly one layer, or the layer cannot be read.
pub async fn load_backend(uri: &str) -> Result<SharedLayer> {
    let store = Store::open(uri).await?;
    let snapshot = store.latest().await?;
    let mut records = snapshot.records().await?;
    match (records.pop(), records.len()) {
        (Some(record), 0) => snapshot.handle(record).load().await,
        (last, others) => Err(Error::expected(
            format!("layers in {uri}"),
            others + usize::from(last.is_some()),
            "one: open a store of many as a store",
        )),
    }
}

impl LayerHandle {
    /// Copies this layer, with its names, into a store of its own at `uri`, and nothing that it runs with: [`copy`](crate::copy) takes
    /// an attention block's projections along, and a module's layers, and copies into stores that hold something.
    ///
    /// # Errors
    /// As [`save_backend`], and when the layer cannot be read.
    pub async fn copy_to(&self, uri: &str) -> Result<()> {
        let record = LayerRecord { locations: RowLocations::default(), ..self.record().clone() };
        let options = StoreOptions { on_wait: self.shared().location.on_wait().cloned(), ..StoreOptions::default() };
        save(record, self.load().await?.to_parts(), uri, options).await
    }
}

async fn save(record: LayerRecord, parts: Parts, uri: &str, options: StoreOptions) -> Result<()> {
    let store = Store::create_with(uri, options).await?;
    // Before anything is written there; the commit asks again.
    let held = store.latest().await?.records().await?;
    if let Some(other) = held.iter().find(|r| (&r.model, &r.layer) != (&record.model, &record.layer)) {
        return Err(not_alone(uri, other, (&record.model, &[record.layer.as_str()])));
    }
    let mut writer = store.writer().await?;
    // It was made elsewhere: its name says all that is known.
    let provenance =
        Provenance { recipe: parts.id().0, relative_error: record.relative_error, error_basis: record.error_basis };
    writer.add(&parts, provenance).await.map_err(|e| e.in_layer(&record.layer))?;
    let model = record.model.clone();
    writer.commit_in((&model, Scope::Alone), &[record], ("copy", None)).await?;
    Ok(())
}
