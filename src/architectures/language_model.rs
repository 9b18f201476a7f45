//! Language models of a snapshot: built from their layers, their configuration and their tokenizer.

use std::sync::Arc;

use layerstore_core::transformer::{CacheType, Decoder, Logits, Norm};
use ndarray::Array2;
use serde_json::Value;

use super::config::{LlamaConfig, llama};
use super::llama_blocks;
use super::open::{OpenModel, attention_of, missing, norm_of, rounding};
use super::tokenizer::{ChatMessage, TextTokenizer};
use crate::error::{Error, Result};
use crate::layer::{Accuracy, ActivationFormat};
use crate::store::Snapshot;

/// A language model, ready to run: its layers of any method, straight from the store. Cloning shares them.
#[derive(Debug, Clone)]
pub struct LanguageModel {
    decoder: Arc<Decoder>,
    config: Arc<LlamaConfig>,
    tokenizer: Option<Arc<TextTokenizer>>,
    /// Tokens that end a text.
    ends: Vec<u32>,
    /// Names all that keys and values depend on.
    fingerprint: String,
}

impl Snapshot {
    /// Opens a model as a language model: its `config.json` says which layers make it up, and how. All of them are loaded.
    ///
    /// # Errors
    /// When there is no such model, its configuration is missing or of a kind that is not run here, or a layer is missing or does not
    /// fit: the message says which.
    pub async fn language_model(&self, model: &str) -> Result<LanguageModel> {
        let opened = OpenModel::new(self, model).await?;
        let settings = opened.config().await?;
        let config = llama(&settings)?;
        let generation = opened.json("generation_config.json").await?.unwrap_or_default();
        let decoder = decoder(&opened, &config).await?;
        let tokenizer = opened.tokenizer().await?.map(Arc::new);
        let ends = [&generation["eos_token_id"], &settings["eos_token_id"]].into_iter().find(|ids| !ids.is_null());
        let ends = ends.map_or(vec![], |ids| match ids.as_array() {
            Some(ids) => ids.iter().filter_map(Value::as_u64).map(|id| id as u32).collect(),
            None => ids.as_u64().map(|id| id as u32).into_iter().collect(),
        });
        let fingerprint = opened.fingerprint(&settings).await?;
        Ok(LanguageModel { decoder: Arc::new(decoder), config: Arc::new(config), tokenizer, ends, fingerprint })
    }
}

/// Finds the layers of a decoder by transformers' names, and loads them.
async fn decoder(model: &OpenModel<'_>, config: &LlamaConfig) -> Result<Decoder> {
    // As many as there are layers for: the number is the configuration's.
    let (mut blocks, attentions) = (vec![], model.attentions().await?);
    for number in 0..config.blocks {
        let mut names = llama_blocks::all_names(config, number);
        names.extend(attentions.iter().filter(|name| **name == llama_blocks::attention(number)).cloned());
        let layers = model.layers(names).await?;
        let get = |name: &str| layers.get(name).cloned().ok_or_else(|| missing(name));
        let attention = attention_of(&[llama_blocks::attention(number)], &|name| attentions.contains(name), &get)?;
        blocks.push(llama_blocks::block(config, number, attention, &get)?);
    }
    let embedding = model.layer(llama_blocks::EMBEDDING).await?;
    // A head of its own, tied or not, is a layer, too.
    let head = match model.artifact(llama_blocks::HEAD).await {
        Err(Error::UnknownLayer { .. }) if config.is_tied => embedding.clone(),
        Ok(artifact) if artifact == model.artifact(llama_blocks::EMBEDDING).await? => embedding.clone(),
        _ => model.layer(llama_blocks::HEAD).await?,
    };
    let (gain, _) = norm_of(llama_blocks::NORM, &model.layer(llama_blocks::NORM).await?)?;
    Decoder::new(config.decoder.clone(), embedding, blocks, Norm::rms(gain, config.epsilon), head)
}

impl LanguageModel {
    /// Returns the decoder, to be run token by token.
    pub(crate) fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Returns the same model, its packed layers' inputs rounded like this whatever their own settings say: whole numbers of 8 bits
    /// are faster. Layers whose weights are floats run as they do.
    ///
    /// # Errors
    /// When a layer refuses the setting.
    pub fn with_activations(&self, activations: ActivationFormat) -> Result<Self> {
        let decoder = self.decoder.with_layers(|layer| rounding(layer, activations))?;
        let fingerprint = format!("{} {}", self.fingerprint, serde_json::json!(activations));
        Ok(LanguageModel { decoder: Arc::new(decoder), fingerprint, ..self.clone() })
    }

    /// Returns the memory that the layers take, in bytes.
    pub fn memory_bytes(&self) -> usize {
        self.decoder.memory_bytes()
    }

    /// Returns the longest text that the model was made for, in tokens, where its configuration says it.
    pub fn context(&self) -> Option<usize> {
        self.config.context
    }

    /// Returns the number of tokens that the model knows.
    pub fn vocabulary(&self) -> usize {
        self.decoder.vocabulary()
    }

    /// Returns whether a token ends a text.
    pub(super) fn ends(&self, token: u32) -> bool {
        self.ends.contains(&token)
    }

    /// Returns whether there is a tokenizer.
    pub(super) fn has_tokenizer(&self) -> bool {
        self.tokenizer.is_some()
    }

    /// Returns what names all that keys and values depend on: the layers and their settings.
    pub(super) fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn tokenizer(&self) -> Result<&TextTokenizer> {
        self.tokenizer
            .as_deref()
            .ok_or_else(|| Error::expected("tokenizer of the model", "none", "a tokenizer.json beside it"))
    }

    /// Returns the tokens of a text, with those that the tokenizer puts around it.
    ///
    /// # Errors
    /// When the model has no tokenizer.
    pub fn tokens(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer()?.encode(text, true)
    }

    /// Returns the text of tokens.
    ///
    /// # Errors
    /// When the model has no tokenizer.
    pub fn text(&self, tokens: &[u32]) -> Result<String> {
        self.tokenizer()?.decode(tokens)
    }

    /// Returns the tokens of a conversation, up to where the model is to answer.
    ///
    /// # Errors
    /// When the model has no tokenizer, or no chat template that can be followed.
    pub fn chat_tokens(&self, messages: &[ChatMessage]) -> Result<Vec<u32>> {
        let tokenizer = self.tokenizer()?;
        // The template writes special tokens itself.
        tokenizer.encode(&tokenizer.chat(messages)?, false)
    }

    /// Returns the logits `[tokens, vocabulary]` of what follows each of these tokens.
    ///
    /// # Errors
    /// When there are none, or one is not known.
    pub fn logits(&self, tokens: &[u32], accuracy: Accuracy) -> Result<Array2<f32>> {
        self.decoder.forward(tokens, &mut self.decoder.cache(CacheType::F32), Logits::All, accuracy)
    }
}
