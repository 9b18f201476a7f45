//! Modules, and layers that were made in memory, saved and opened by name.

use std::collections::BTreeMap;

use chrono::Utc;
use layerstore_core::layer::registry;

use super::change::{Scope, is_part};
use super::handle::LayerHandle;
use super::record::{ErrorBasis, LayerRecord, Source, SourceTensor};
use super::root::Store;
use super::row_locations::RowLocations;
use super::snapshot::Snapshot;
use super::writer::{Provenance, check_layer_name, check_model_name};
use crate::error::{Error, ErrorKind, Result};
use crate::layer::{ArtifactId, Layer, SharedLayer};
use crate::nn::Module;

/// A module by name: the layers that it is made of. Making one reads rows of the catalogue; [`ModuleHandle::load`] reads the
/// arrays.
#[derive(Debug, Clone)]
pub struct ModuleHandle {
    name: String,
    layers: BTreeMap<String, LayerHandle>,
}

impl Snapshot {
    /// Returns the module of that name with all that is behind it, such as `block.ffn` behind `block`: a model, or a part of one. A
    /// linear layer is a module, too.
    ///
    /// # Errors
    /// When there is no such model or layer.
    pub async fn module(&self, model: &str, name: &str) -> Result<ModuleHandle> {
        let own = self.layer(model, name).await?;
        let mut layers = BTreeMap::from([(name.to_owned(), own)]);
        let parts = self.layers(model).await?.into_iter().filter(|r| r.layer != name && is_part(&r.layer, name));
        let parts: Vec<LayerRecord> = parts.collect();
        self.shared().data.open_ahead(&parts).await?;
        layers.extend(parts.into_iter().map(|record| (record.layer.clone(), self.handle(record))));
        Ok(ModuleHandle { name: name.to_owned(), layers })
    }
}

impl ModuleHandle {
    /// Returns the layers that it is made of, by name.
    pub fn layers(&self) -> &BTreeMap<String, LayerHandle> {
        &self.layers
    }

    /// Loads the module, ready to run. Layers come from the store's cache, or are read now.
    ///
    /// # Errors
    /// As [`LayerHandle::load`], and when layers do not fit each other.
    pub async fn load(&self) -> Result<Module> {
        let mut loaded = BTreeMap::new();
        for (name, handle) in &self.layers {
            loaded.insert(name.clone(), handle.load().await?);
        }
        Module::from_layers(&self.name, &loaded)
    }
}

impl Store {
    /// Saves a module as layers of `model`, in the place of whatever was there under its name, as one new version. Other
    /// layers of the model stay as they are, also those that are saved at the same time.
    ///
    /// # Errors
    /// As [`Store::save_layers`].
    pub async fn save_module(&self, model: &str, name: &str, module: &Module, message: Option<&str>) -> Result<u64> {
        self.save_layers(model, name, &module.to_layers(name), message).await
    }

    /// Saves layers by name, in the place of the layer `prefix` and of those behind it, as one new version.
    ///
    /// # Errors
    /// When a name is not `prefix` or behind it, or is there twice, or the storage refuses: then nothing has changed.
    pub async fn save_layers(
        &self,
        model: &str,
        prefix: &str,
        layers: &[(String, SharedLayer)],
        message: Option<&str>,
    ) -> Result<u64> {
        check_model_name(model)?;
        check_layer_name(prefix)?;
        if let Some((name, _)) = layers.iter().find(|(name, _)| !is_part(name, prefix)) {
            return Err(Error::expected("layer to save", format!("'{name}'"), format!("'{prefix}', or one behind it")));
        }
        self.save_in((model, Scope::Part(prefix)), layers, message).await
    }

    /// Saves layers by name, each in the place of the model's layer of that name, as one new version. Other layers of the model stay
    /// as they are. A model that is not there is made.
    ///
    /// # Errors
    /// When there are no layers, a name is none or there twice, the model's layer of a name has another shape, or the storage refuses:
    /// then nothing has changed.
    pub async fn replace_layers(
        &self,
        model: &str,
        layers: &[(String, SharedLayer)],
        message: Option<&str>,
    ) -> Result<u64> {
        check_model_name(model)?;
        if layers.is_empty() {
            return Err(Error::expected("layers to save", "none", "one at least"));
        }
        let there = match self.latest().await?.rows(model).await {
            Ok(rows) => rows,
            Err(e) if e.kind() == ErrorKind::NotFound => vec![],
            Err(e) => return Err(e),
        };
        for (name, layer) in layers {
            check_layer_name(name)?;
            let shape = (layer.out_features() as u64, layer.in_features() as u64);
            if let Some(old) =
                there.iter().find(|old| old.layer == *name && (old.out_features, old.in_features) != shape)
            {
                let expected = format!("{:?}, as the model's layer has", (old.out_features, old.in_features));
                return Err(Error::expected("shape of the layer", format!("{shape:?}"), expected).in_layer(name));
            }
        }
        self.save_in((model, Scope::Layers), layers, message).await
    }

    async fn save_in(
        &self,
        (model, scope): (&str, Scope<'_>),
        layers: &[(String, SharedLayer)],
        message: Option<&str>,
    ) -> Result<u64> {
        let mut writer = self.writer().await?;
        let mut records = Vec::with_capacity(layers.len());
        for (name, layer) in layers {
            let parts = layer.to_parts();
            let id = parts.id();
            let provenance = Provenance { recipe: id.0, relative_error: None, error_basis: ErrorBasis::Weights };
            writer.add(&parts, provenance).await.map_err(|e| e.in_layer(name))?;
            let tensors = source_tensors(name, &**layer, id)?;
            records.push(LayerRecord {
                model: model.to_owned(),
                layer: name.clone(),
                method: layer.method(),
                in_features: layer.in_features() as u64,
                out_features: layer.out_features() as u64,
                artifact: id,
                relative_error: None,
                error_basis: ErrorBasis::Weights,
                dense_bytes: tensors.iter().map(|t| 4 * t.shape.iter().product::<usize>() as u64).sum(),
                stored_bytes: parts.stored_bytes(),
                config: layer.config(),
                source: Source { tensors, ..Source::default() },
                created_at: Utc::now(),
                locations: RowLocations::default(),
            });
        }
        writer.commit_in((model, scope), &records, ("save", message)).await
    }
}

/// Returns the tensors that an export makes of a layer that came from no checkpoint: as if it had come from one of f32.
pub fn source_tensors(name: &str, layer: &dyn Layer, id: ArtifactId) -> Result<Vec<SourceTensor>> {
    let tensor = |part: &str, shape: Vec<usize>| {
        let tensor = format!("{name}.{part}");
        let mut hasher = blake3::Hasher::new();
        hasher.update(&id.0);
        hasher.update(part.as_bytes());
        SourceTensor {
            tensor,
            dtype: "F32".into(),
            shape,
            hash: hasher.finalize().to_hex().to_string(),
            stored_as: None,
        }
    };
    let mut tensors = vec![];
    if registry::is_linear(&layer.method()) {
        tensors.push(tensor("weight", vec![layer.out_features(), layer.in_features()]));
        tensors.extend(layer.stored_bias()?.map(|bias| tensor("bias", vec![bias.len()])));
    }
    tensors.extend(layer.own_tensors().into_iter().map(|(part, array)| tensor(&part, array.shape().to_vec())));
    Ok(tensors)
}
