//! An attention block of a snapshot, loaded when it is first used.

use super::handle::LayerHandle;
use super::snapshot::Snapshot;
use crate::error::{Error, Result};
use crate::layer::{Method, VqAttentionConfig, VqAttentionLayer};
use crate::nn::AttentionBlock;

/// An attention block by name: its codebooks and settings, and the linear layers that it names. Making one reads rows of the
/// catalogue; [`AttentionHandle::load`] reads the arrays.
#[derive(Debug, Clone)]
pub struct AttentionHandle {
    attention: LayerHandle,
    projections: Option<[LayerHandle; 3]>,
    output: Option<LayerHandle>,
}

impl Snapshot {
    /// Returns the attention block of that name, and the layers of the same model that it names, all of this snapshot.
    ///
    /// # Errors
    /// When there is no such model or layer, the layer is no attention block, or one that it names is not there.
    pub async fn attention(&self, model: &str, layer: &str) -> Result<AttentionHandle> {
        let attention = self.layer(model, layer).await?;
        let config: VqAttentionConfig = match serde_json::from_value(attention.record().config.clone()) {
            Ok(config) if attention.record().method == VqAttentionConfig::NAME => config,
            _ => {
                let found = format!("'{layer}', a {} layer", attention.record().method);
                return Err(Error::expected("layer to attend with", found, "a vq_attention layer"));
            }
        };
        let (projections, output) = self.projections(model, layer, &config).await?;
        Ok(AttentionHandle { attention, projections, output })
    }

    /// Returns the layers that a block's settings name: Wq, Wk and Wv, and Wo.
    pub(crate) async fn projections(
        &self,
        model: &str,
        block: &str,
        config: &VqAttentionConfig,
    ) -> Result<(Option<[LayerHandle; 3]>, Option<LayerHandle>)> {
        let projections = match (&config.query, &config.key, &config.value) {
            (Some(query), Some(key), Some(value)) => Some([
                self.named(model, block, query).await?,
                self.named(model, block, key).await?,
                self.named(model, block, value).await?,
            ]),
            _ => None,
        };
        let output = match &config.output {
            Some(output) => Some(self.named(model, block, output).await?),
            None => None,
        };
        Ok((projections, output))
    }

    /// Returns a block's layer: behind the block's own name, or by its name in full.
    async fn named(&self, model: &str, block: &str, name: &str) -> Result<LayerHandle> {
        match self.layer(model, &format!("{block}.{name}")).await {
            Ok(handle) => Ok(handle),
            Err(behind) => self.layer(model, name).await.map_err(|_| behind.in_layer(block)),
        }
    }
}

impl AttentionHandle {
    /// Returns the layer that holds codebooks and settings.
    pub fn attention(&self) -> &LayerHandle {
        &self.attention
    }

    /// Returns Wq, Wk and Wv, where the block has them.
    pub fn projections(&self) -> Option<&[LayerHandle; 3]> {
        self.projections.as_ref()
    }

    /// Returns Wo, where the block has it.
    pub fn output(&self) -> Option<&LayerHandle> {
        self.output.as_ref()
    }

    /// Returns what names the block's content, in hex: a hash of the artifacts of its codebooks and settings and of its key and value
    /// projections. A state of a sequence ([`write_attention_cache`](crate::formats::write_attention_cache)) fits no block of another.
    pub fn id(&self) -> String {
        let projections = self.projections.iter().flat_map(|[_, key, value]| [key, value]);
        let mut hasher = blake3::Hasher::new();
        for handle in std::iter::once(&self.attention).chain(projections) {
            hasher.update(&handle.record().artifact.0);
        }
        hasher.finalize().to_string()
    }

    /// Loads codebooks and settings.
    ///
    /// # Errors
    /// As [`LayerHandle::load`].
    pub async fn load_attention(&self) -> Result<VqAttentionLayer> {
        let layer = self.attention.load().await?;
        let attention = layer.downcast_ref::<VqAttentionLayer>().cloned();
        attention.ok_or_else(|| Error::expected("layer to attend with", layer.method(), VqAttentionConfig::NAME))
    }

    /// Loads the block, ready to run.
    ///
    /// # Errors
    /// As [`LayerHandle::load`], and when layers do not fit each other.
    pub async fn load(&self) -> Result<AttentionBlock> {
        let projections = match &self.projections {
            Some([query, key, value]) => Some([query.load().await?, key.load().await?, value.load().await?]),
            None => None,
        };
        let output = match &self.output {
            Some(output) => Some(output.load().await?),
            None => None,
        };
        AttentionBlock::new(self.load_attention().await?, projections, output)
            .map_err(|e| e.in_layer(&self.attention.record().layer))
    }
}
