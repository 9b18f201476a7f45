//! Language models of a snapshot: built from their layers, their configuration and their tokenizer.

use std::sync::Arc;
use std::time::Instant;

use layerstore_core::transformer::{Decoder, DecoderBlock, KvCache, Logits, Norm};
use ndarray::{Array1, Array2, ArrayView1};
use serde::Serialize;
use serde_json::Value;

use super::config::{LlamaConfig, llama};
use super::sampling::{Sampler, Sampling};
use super::tokenizer::{ChatMessage, TextTokenizer};
use crate::compress::Cancel;
use crate::error::{Error, Result};
use crate::layer::{Accuracy, DenseLayer, SharedLayer};
use crate::store::Snapshot;

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
    /// Stops between two tokens when the caller asks.
    pub cancel: Cancel,
}

impl Default for GenerationOptions {
    fn default() -> Self {
        GenerationOptions {
            max_tokens: 128,
            sampling: Sampling::default(),
            accuracy: Accuracy::Approximate,
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
        let files = self.files(model).await?;
        let has = |name: &str| files.iter().any(|file| file.name == name);
        if !has("config.json") {
            let expected = "one stored with the model, as an import of a folder or a GGUF file keeps it";
            return Err(Error::expected(format!("config.json of model '{model}'"), "none", expected));
        }
        let json = |name: &'static str| async move {
            let file = self.file(model, name).await?;
            serde_json::from_slice::<Value>(&file).map_err(|e| Error::expected(name, e, "JSON"))
        };
        let settings = json("config.json").await?;
        let config = llama(&settings)?;
        let generation = match has("generation_config.json") {
            true => json("generation_config.json").await?,
            false => Value::Null,
        };
        let decoder = decoder(self, model, &config).await?;
        let tokenizer = match has("tokenizer.json") {
            true => {
                let read = |name: &'static str| async move {
                    if has(name) { self.file(model, name).await.map(Some) } else { Ok(None) }
                };
                let tokenizer = self.file(model, "tokenizer.json").await?;
                let (beside, template) = (read("tokenizer_config.json").await?, read("chat_template.jinja").await?);
                let read = TextTokenizer::new(&tokenizer, beside.as_ref(), template.as_ref());
                Some(Arc::new(read?))
            }
            false => None,
        };
        let ends = [&generation["eos_token_id"], &settings["eos_token_id"]].into_iter().find(|ids| !ids.is_null());
        let ends = ends.map_or(vec![], |ids| match ids.as_array() {
            Some(ids) => ids.iter().filter_map(Value::as_u64).map(|id| id as u32).collect(),
            None => ids.as_u64().map(|id| id as u32).into_iter().collect(),
        });
        Ok(LanguageModel { decoder: Arc::new(decoder), config: Arc::new(config), tokenizer, ends })
    }
}

/// Finds the layers of a decoder by transformers' names, and loads them.
async fn decoder(snapshot: &Snapshot, model: &str, config: &LlamaConfig) -> Result<Decoder> {
    let load = |name: String| async move { snapshot.layer(model, &name).await?.load().await };
    let norm = |name: String| async move {
        let layer = load(name.clone()).await?;
        let gain = vector(&layer).map_err(|e| e.in_layer(&name))?;
        Ok::<_, Error>(Norm::rms(gain, config.epsilon))
    };
    // As many as there are layers for: the number is the configuration's.
    let mut blocks = vec![];
    for number in 0..config.blocks {
        let of = |part: &str| format!("model.layers.{number}.{part}");
        let (mut query_norm, mut key_norm) = (None, None);
        if config.has_head_norms {
            query_norm = Some(norm(of("self_attn.q_norm")).await?);
            key_norm = Some(norm(of("self_attn.k_norm")).await?);
        }
        blocks.push(DecoderBlock {
            attention_norm: norm(of("input_layernorm")).await?,
            query: load(of("self_attn.q_proj")).await?,
            key: load(of("self_attn.k_proj")).await?,
            value: load(of("self_attn.v_proj")).await?,
            output: load(of("self_attn.o_proj")).await?,
            query_norm,
            key_norm,
            feed_forward_norm: norm(of("post_attention_layernorm")).await?,
            gate: load(of("mlp.gate_proj")).await?,
            up: load(of("mlp.up_proj")).await?,
            down: load(of("mlp.down_proj")).await?,
        });
    }
    let embedding = load("model.embed_tokens".into()).await?;
    // A head of its own, tied or not, is a layer, too.
    let head = match load("lm_head".into()).await {
        Err(Error::UnknownLayer { .. }) if config.is_tied => embedding.clone(),
        head => head?,
    };
    let last = norm("model.norm".into()).await?;
    Decoder::new(config.decoder.clone(), embedding, blocks, last, head)
}

/// The numbers of a layer that is a vector.
fn vector(layer: &SharedLayer) -> Result<Array1<f32>> {
    match layer.downcast_ref::<DenseLayer>() {
        Some(dense) if dense.shape().len() == 1 => {
            layerstore_core::layer::to_f32(dense.dtype(), dense.raw()).map(Array1::from)
        }
        _ => Err(Error::expected("layer of a norm", layer.method(), "a dense vector")),
    }
}

impl LanguageModel {
    /// Returns the decoder, to be run token by token.
    pub(crate) fn decoder(&self) -> &Decoder {
        &self.decoder
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
        self.decoder.forward(tokens, &mut self.decoder.cache(), Logits::All, accuracy)
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
        let (mut cache, mut sampler) = (self.decoder.cache(), Sampler::new(options.sampling.clone()));
        let started = Instant::now();
        let mut logits = self.decoder.forward(prompt, &mut cache, Logits::Last, options.accuracy)?;
        let prompt_seconds = started.elapsed().as_secs_f64();
        let started = Instant::now();
        let (mut tokens, mut text, mut ended) = (vec![], String::new(), false);
        while tokens.len() < options.max_tokens.min(room) {
            if options.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let token = sampler.choose(row(logits.row(0)));
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
            if tokens.len() < options.max_tokens.min(room) {
                logits = self.next(token, &mut cache, options.accuracy)?;
            }
        }
        let text = if self.tokenizer.is_some() { self.text(&tokens)? } else { String::new() };
        let seconds = started.elapsed().as_secs_f64();
        Ok(Generation { text, tokens, prompt_tokens: prompt.len(), ended, prompt_seconds, seconds })
    }

    fn next(&self, token: u32, cache: &mut KvCache, accuracy: Accuracy) -> Result<Array2<f32>> {
        self.decoder.forward(&[token], cache, Logits::Last, accuracy)
    }
}

fn row(row: ArrayView1<'_, f32>) -> &'_ [f32] {
    row.to_slice().unwrap_or_default()
}
