//! Language models of a snapshot: built from their layers, their configuration and their tokenizer.

use std::sync::Arc;
use std::time::Instant;

use layerstore_core::transformer::{CacheType, Continuation, Decoder, KvCache, Logits, Norm};
use ndarray::Array2;
use serde::Serialize;
use serde_json::Value;

use super::config::{LlamaConfig, llama};
use super::llama_blocks;
use super::open::{OpenModel, missing, norm_of, rounding};
use super::sampling::{Sampler, Sampling};
use super::tokenizer::{ChatMessage, TextTokenizer};
use crate::error::{Error, Result};
use crate::layer::{Accuracy, ActivationFormat};
use crate::store::Snapshot;
use crate::work::Cancel;

/// Tokens of a prompt that are read at a time.
const PIECE: usize = 512;

/// Tokens that a cache has room for before they are there.
const MOST_RESERVED: usize = 4096;

/// A language model, ready to run: its layers of any method, straight from the store. Cloning shares them.
#[derive(Debug, Clone)]
pub struct LanguageModel {
    decoder: Arc<Decoder>,
    config: Arc<LlamaConfig>,
    tokenizer: Option<Arc<TextTokenizer>>,
    /// Tokens that end a text.
    ends: Vec<u32>,
}

/// How a text is gone on with.
#[derive(Debug, Clone)]
pub struct GenerationOptions {
    /// Tokens that are added at most.
    pub max_tokens: usize,
    /// How each is chosen.
    pub sampling: Sampling,
    /// Whether the layers run as their settings say, or at full accuracy.
    pub accuracy: Accuracy,
    /// What keys and values of the tokens so far are kept as.
    pub cache: CacheType,
    /// Stops between two tokens when the caller asks.
    pub cancel: Cancel,
}

impl Default for GenerationOptions {
    fn default() -> Self {
        GenerationOptions {
            max_tokens: 128,
            sampling: Sampling::default(),
            accuracy: Accuracy::Approximate,
            cache: CacheType::F32,
            cancel: Cancel::new(),
        }
    }
}

/// What was added to a text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Generation {
    /// The text that was added.
    pub text: String,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Tokens of the text before.
    pub prompt_tokens: usize,
    /// Whether the model ended the text by itself.
    pub ended: bool,
    /// Time that the text before took, in seconds.
    pub prompt_seconds: f64,
    /// Time that what was added took, in seconds.
    pub seconds: f64,
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
        Ok(LanguageModel { decoder: Arc::new(decoder), config: Arc::new(config), tokenizer, ends })
    }
}

/// Finds the layers of a decoder by transformers' names, and loads them.
async fn decoder(model: &OpenModel<'_>, config: &LlamaConfig) -> Result<Decoder> {
    // As many as there are layers for: the number is the configuration's.
    let mut blocks = vec![];
    for number in 0..config.blocks {
        let layers = model.layers(llama_blocks::all_names(config, number)).await?;
        blocks
            .push(llama_blocks::block(config, number, &|name| layers.get(name).cloned().ok_or_else(|| missing(name)))?);
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
        Ok(LanguageModel { decoder: Arc::new(decoder), ..self.clone() })
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

    /// Goes on with tokens, one after another, until the model ends the text, or `max_tokens` are there. `each` is told each token's
    /// text, in pieces of whole characters.
    ///
    /// # Errors
    /// When there are no tokens, the text would be longer than the model's context, or the work is cancelled.
    pub fn generate(
        &self,
        prompt: &[u32],
        options: &GenerationOptions,
        mut each: impl FnMut(&str),
    ) -> Result<Generation> {
        if let Some(context) = self.config.context.filter(|context| prompt.len() > *context) {
            let expected = format!("at most {context}, the model's context");
            return Err(Error::expected("tokens of the prompt", prompt.len(), expected));
        }
        let room = self.config.context.map_or(usize::MAX, |context| context - prompt.len());
        let (mut cache, mut sampler) = (self.decoder.cache(options.cache), Sampler::new(options.sampling.clone()));
        let (limit, accuracy, mut logits) = (options.max_tokens.min(room), options.accuracy, vec![]);
        cache.expect(prompt.len());
        cache.reserve(prompt.len() + limit.min(MOST_RESERVED));
        let started = Instant::now();
        self.read(prompt, &mut cache, accuracy, &mut logits, &options.cancel)?;
        let prompt_seconds = started.elapsed().as_secs_f64();
        let started = Instant::now();
        let (mut tokens, mut text, mut ended) = (vec![], String::new(), false);
        while tokens.len() < limit {
            if options.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let token = sampler.choose(&logits);
            if self.ends.contains(&token) {
                ended = true;
                break;
            }
            tokens.push(token);
            if self.tokenizer.is_some() {
                let all = self.text(&tokens)?;
                // What is half a character is told with the rest of it.
                if let Some(more) = all.strip_prefix(&text).filter(|more| !more.ends_with('\u{fffd}')) {
                    each(more);
                    text = all;
                }
            }
            if tokens.len() < limit {
                self.read(&[token], &mut cache, accuracy, &mut logits, &options.cancel)?;
            }
        }
        let text = if self.tokenizer.is_some() { self.text(&tokens)? } else { String::new() };
        let seconds = started.elapsed().as_secs_f64();
        Ok(Generation { text, tokens, prompt_tokens: prompt.len(), ended, prompt_seconds, seconds })
    }

    /// Reads tokens that follow those in the cache; the logits of what comes next replace what is in `logits`.
    fn read(
        &self,
        tokens: &[u32],
        cache: &mut KvCache,
        accuracy: Accuracy,
        logits: &mut Vec<f32>,
        cancel: &Cancel,
    ) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::expected("tokens of the prompt", "none", "one at least"));
        }
        // In pieces, so that a long prompt can be given up.
        for tokens in tokens.chunks(PIECE) {
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            self.decoder.forward_into(&mut [Continuation { tokens, cache }], Logits::Last, accuracy, logits)?;
        }
        Ok(())
    }
}
