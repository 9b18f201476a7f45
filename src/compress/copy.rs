//! A model, or a layer with what it runs with, into another store.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::layer::{ArtifactId, Method, ModuleLayer, VqAttentionConfig};
use crate::store::{LayerHandle, LayerRecord, Provenance, RowLocations, Scope, Snapshot, Store, Writer};
use crate::work::{Cancel, Progress};

/// What was copied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CopyReport {
    /// The model, which has the same name in both stores.
    pub model: String,
    /// Names of the layers that were copied.
    pub layers: Vec<String>,
    /// The version that the commit made; the latest one where the store had all of it.
    pub version: u64,
    /// Bytes of the layers' artifacts.
    pub stored_bytes: u64,
    /// Bytes of artifacts that were new to the store.
    pub written_bytes: u64,
}

/// Copies a model of a snapshot into another store, or into the same one, as one new version there.
///
/// The whole model is put in the place of what the store holds under its name. One `layer` is put beside the other layers of the model,
/// and takes with it what it runs with: an attention block its projections, and a module all layers that it is made of. One layer at a
/// time is in memory. Artifacts that the other store has are hashed there, and read from this one only where they are missing or damaged.
///
/// # Errors
/// When there is no such model or layer, an artifact cannot be read, the storage refuses, or the work is cancelled: then the store is as
/// it was.
pub async fn copy(
    snapshot: &Snapshot,
    model: &str,
    layer: Option<&str>,
    to: &Store,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<CopyReport> {
    Selected::new(snapshot, model, layer).await?.copy_into(to, progress, cancel).await
}

/// Layers of a snapshot that are to be copied.
pub(crate) struct Selected<'a> {
    snapshot: &'a Snapshot,
    model: &'a str,
    layers: Vec<LayerHandle>,
    scope: Scope<'a>,
}

impl<'a> Selected<'a> {
    /// Finds all layers of a model, or one of them with what it runs with.
    ///
    /// # Errors
    /// When there is no such model or layer, or an attention block names a layer that is not there.
    pub(crate) async fn new(snapshot: &'a Snapshot, model: &'a str, layer: Option<&'a str>) -> Result<Selected<'a>> {
        let (layers, scope) = match layer {
            None => (snapshot.handles_of(snapshot.rows(model).await?).await?, Scope::Model),
            Some(layer) => {
                let own = snapshot.layer(model, layer).await?;
                let is_module = own.record().method == ModuleLayer::METHOD;
                let scope = if is_module { Scope::Part(layer) } else { Scope::Layers };
                (with_parts(snapshot, own).await?.into_values().collect(), scope)
            }
        };
        Ok(Selected { snapshot, model, layers, scope })
    }

    /// Copies them.
    ///
    /// # Errors
    /// As [`copy`].
    pub(crate) async fn copy_into(self, to: &Store, progress: &dyn Progress, cancel: &Cancel) -> Result<CopyReport> {
        let mut writer = cancel.unless(to.writer()).await?;
        progress.started(self.layers.len(), self.layers.iter().map(|l| l.record().stored_bytes).sum());
        let added = self.add_to(&mut writer, progress, cancel).await;
        progress.finished();
        let records = added?;
        let written_bytes = writer.written_bytes();
        // The last moment at which it can be given up.
        cancel.unless(writer.ready()).await?;
        let message = format!("copied from {}, version {}", self.snapshot.uri(), self.snapshot.version());
        let version = writer.commit_in((self.model, self.scope), &records, ("copy", Some(&message))).await?;
        Ok(CopyReport {
            model: self.model.to_owned(),
            version,
            stored_bytes: records.iter().map(|r| r.stored_bytes).sum(),
            written_bytes,
            layers: records.into_iter().map(|r| r.layer).collect(),
        })
    }

    /// Adds the artifacts, and returns the rows of the catalogue that name them.
    async fn add_to(&self, writer: &mut Writer, progress: &dyn Progress, cancel: &Cancel) -> Result<Vec<LayerRecord>> {
        let artifacts: Vec<ArtifactId> = self.layers.iter().map(|handle| handle.record().artifact).collect();
        let recipes = cancel.unless(self.snapshot.recipes(&artifacts)).await?;
        let mut records = Vec::with_capacity(self.layers.len());
        for handle in &self.layers {
            let record = handle.record();
            progress.layer(&record.layer);
            let there = cancel.unless(writer.is_sound(record.artifact)).await?;
            if !there {
                let parts = cancel.unless(handle.load()).await?.to_parts();
                if parts.id() != record.artifact {
                    let reason = format!("its arrays are those of {}", parts.id());
                    return Err(
                        Error::Corrupt { artifact: record.artifact.to_string(), reason }.in_layer(&record.layer)
                    );
                }
                let provenance = Provenance {
                    // Of an artifact that the list has lost, the name says all that is known.
                    recipe: recipes.get(&record.artifact).copied().unwrap_or(record.artifact.0),
                    relative_error: record.relative_error,
                    error_basis: record.error_basis,
                };
                cancel.unless(writer.add(&parts, provenance)).await.map_err(|e| e.in_layer(&record.layer))?;
            }
            records.push(LayerRecord { locations: RowLocations::default(), ..record.clone() });
            progress.layer_done(record.stored_bytes, there);
        }
        Ok(records)
    }
}

/// Returns a layer and what it runs with, by name: of a module the layers behind it, and of attention blocks their projections.
async fn with_parts(snapshot: &Snapshot, own: LayerHandle) -> Result<BTreeMap<String, LayerHandle>> {
    let (model, layer) = (own.record().model.clone(), own.record().layer.clone());
    let mut parts = match own.record().method == ModuleLayer::METHOD {
        true => snapshot.module(&model, &layer).await?.layers().clone(),
        false => BTreeMap::from([(layer, own)]),
    };
    let blocks = parts.values().filter(|handle| handle.record().method == VqAttentionConfig::NAME);
    let blocks: Vec<String> = blocks.map(|handle| handle.record().layer.clone()).collect();
    for block in blocks {
        let block = snapshot.attention(&model, &block).await?;
        let named = block.projections().into_iter().flatten().chain(block.output());
        parts.extend(named.map(|handle| (handle.record().layer.clone(), handle.clone())));
    }
    Ok(parts)
}
