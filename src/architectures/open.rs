//! A model of a snapshot, about to be put together: its files, and its layers by name.

use std::collections::{HashMap, HashSet};

use ndarray::Array1;
use serde_json::Value;

use layerstore_core::layer::parts::canonical_json;
use layerstore_core::layer::{configured, to_f32};
use layerstore_core::transformer::Norm;

use super::tokenizer::TextTokenizer;
use crate::error::{Error, Result};
use crate::layer::{
    ActivationFormat, ArtifactId, DenseLayer, Layer, Method, SharedLayer, VqAttentionConfig, VqAttentionLayer,
};
use crate::store::{LayerRecord, Snapshot};

/// A model whose files have been listed.
pub struct OpenModel<'a> {
    snapshot: &'a Snapshot,
    model: &'a str,
    files: Vec<String>,
}

impl<'a> OpenModel<'a> {
    /// Lists a model's files.
    ///
    /// # Errors
    /// When there is no such model.
    pub async fn new(snapshot: &'a Snapshot, model: &'a str) -> Result<Self> {
        let files = snapshot.files(model).await?.into_iter().map(|file| file.name).collect();
        Ok(OpenModel { snapshot, model, files })
    }

    /// Reads a file; `None` where the model has none of this name.
    async fn file(&self, name: &str) -> Result<Option<bytes::Bytes>> {
        match self.files.iter().any(|file| file == name) {
            true => self.snapshot.file(self.model, name).await.map(Some),
            false => Ok(None),
        }
    }

    /// Reads a JSON file; `None` where the model has none of this name.
    ///
    /// # Errors
    /// When it is no JSON.
    pub async fn json(&self, name: &str) -> Result<Option<Value>> {
        let Some(file) = self.file(name).await? else { return Ok(None) };
        serde_json::from_slice(&file).map(Some).map_err(|e| Error::expected(name, e, "JSON"))
    }

    /// Reads the model's `config.json`.
    ///
    /// # Errors
    /// When there is none, or it is no JSON.
    pub async fn config(&self) -> Result<Value> {
        let missing = || {
            let expected = "one stored with the model, as an import of a folder or a GGUF file keeps it";
            Error::expected(format!("config.json of model '{}'", self.model), "none", expected)
        };
        self.json("config.json").await?.ok_or_else(missing)
    }

    /// Reads the model's tokenizer; `None` where it has none.
    ///
    /// # Errors
    /// When a file is not what its name says.
    pub async fn tokenizer(&self) -> Result<Option<TextTokenizer>> {
        let Some(tokenizer) = self.file("tokenizer.json").await? else { return Ok(None) };
        let beside = self.file("tokenizer_config.json").await?;
        let template = self.file("chat_template.jinja").await?;
        TextTokenizer::new(&tokenizer, beside.as_ref(), template.as_ref()).map(Some)
    }

    /// Loads a layer.
    ///
    /// # Errors
    /// When there is none of this name.
    pub async fn layer(&self, name: &str) -> Result<SharedLayer> {
        self.snapshot.layer(self.model, name).await?.load().await
    }

    /// Returns the name of a layer's artifact: layers of one are the same, however they are called.
    ///
    /// # Errors
    /// When there is no layer of this name.
    pub async fn artifact(&self, name: &str) -> Result<(ArtifactId, Value)> {
        let handle = self.snapshot.layer(self.model, name).await?;
        Ok((handle.record().artifact, handle.record().config.clone()))
    }

    /// Returns the names of all layers.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub async fn layer_names(&self) -> Result<HashSet<String>> {
        Ok(self.snapshot.layers(self.model).await?.into_iter().map(|record| record.layer).collect())
    }

    /// Returns the names of stored attention blocks.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub async fn attentions(&self) -> Result<HashSet<String>> {
        let records = self.snapshot.layers(self.model).await?;
        let is_attention = |record: &LayerRecord| record.method == VqAttentionConfig::NAME;
        Ok(records.into_iter().filter(is_attention).map(|record| record.layer).collect())
    }

    /// Returns what names the model's layers, their settings, and its configuration.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub async fn fingerprint(&self, settings: &Value) -> Result<String> {
        let mut records = self.snapshot.layers(self.model).await?;
        records.sort_by(|a, b| a.layer.cmp(&b.layer));
        let mut hasher = blake3::Hasher::new();
        let mut add = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        add(canonical_json(settings).as_bytes());
        for LayerRecord { layer, artifact, config, .. } in &records {
            add(layer.as_bytes());
            add(&artifact.0);
            add(canonical_json(config).as_bytes());
        }
        Ok(hasher.finalize().to_string())
    }

    /// Loads layers, by name.
    ///
    /// # Errors
    /// When there is none of a name.
    pub async fn layers(&self, names: Vec<String>) -> Result<HashMap<String, SharedLayer>> {
        let mut layers = HashMap::new();
        for name in names {
            let layer = self.layer(&name).await?;
            layers.insert(name, layer);
        }
        Ok(layers)
    }
}

/// Where layers come from, by name.
pub type GetLayer<'a> = &'a dyn Fn(&str) -> Result<SharedLayer>;

/// Returns the stored attention of one of these names; `None` where there is none.
///
/// # Errors
/// When it cannot be loaded.
pub fn attention_of(names: &[String], has: &dyn Fn(&str) -> bool, layer: GetLayer) -> Result<Option<VqAttentionLayer>> {
    let Some(name) = names.iter().find(|name| has(name)) else { return Ok(None) };
    Ok(layer(name)?.downcast_ref::<VqAttentionLayer>().cloned())
}

/// Returns the error for a layer that is not there.
pub fn missing(name: &str) -> Error {
    Error::expected(format!("layer '{name}' of the model"), "none", "the layer that its configuration calls for")
}

/// Returns the gain and the bias of a layer that is a norm.
///
/// # Errors
/// When it is no dense vector.
pub fn norm_of(name: &str, layer: &SharedLayer) -> Result<(Array1<f32>, Option<Array1<f32>>)> {
    let read = || match layer.downcast_ref::<DenseLayer>() {
        Some(dense) if dense.shape().len() == 1 => {
            Ok((to_f32(dense.dtype(), dense.raw()).map(Array1::from)?, dense.stored_bias()?))
        }
        _ => Err(Error::expected("layer of a norm", layer.method(), "a dense vector")),
    };
    read().map_err(|e| e.in_layer(name))
}

/// Returns the norm by mean and variance that a layer is.
///
/// # Errors
/// When it is no dense vector with a bias.
pub fn layer_norm_of(name: &str, layer: &SharedLayer, epsilon: f32) -> Result<Norm> {
    let (gain, bias) = norm_of(name, layer)?;
    let missing = || Error::expected("bias of a norm", "none", "a vector").in_layer(name);
    Norm::layer(gain, bias.ok_or_else(missing)?, epsilon).map_err(|e| e.in_layer(name))
}

/// Returns a packed layer with its inputs rounded like this; others as they are.
///
/// # Errors
/// When the layer refuses the setting.
pub fn rounding(layer: &SharedLayer, activations: ActivationFormat) -> Result<SharedLayer> {
    let mut config = layer.config();
    // A setting that is as it is without being said is left out of a configuration.
    let pass = layer.packed_forward();
    let is_packed = pass.as_ref().is_some_and(|pass| !pass.weight.format().weight_type.is_float());
    let has_setting = config.get("activations").is_some() && pass.is_none();
    if !(is_packed || has_setting) {
        return Ok(layer.clone());
    }
    config["activations"] = serde_json::json!(activations);
    configured(layer, &config)
}
