//! Encoders of BERT's kind: what their configuration says, and where their layers are.

use std::collections::BTreeMap;

use layerstore_core::transformer::{BlockInput, Encoder, EncoderBlock, EncoderConfig, EncoderEmbedding};
use serde_json::Value;

use super::config::{float, number, required, setting};
use super::open::{GetLayer, OpenModel, attention_of, layer_norm_of, missing};
use crate::error::{Error, Result};
use crate::layer::{Activation, VqAttentionLayer};

/// Families of BERT's kind, as `model_type` has them, and whether their positions begin behind that of the padding.
const FAMILIES: [(&str, bool); 5] =
    [("bert", false), ("roberta", true), ("xlm-roberta", true), ("camembert", true), ("electra", false)];

/// What `config.json` says of an encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct BertConfig {
    /// How its blocks run.
    pub encoder: EncoderConfig,
    /// Blocks.
    pub blocks: usize,
    /// Added to the variance of a norm.
    pub epsilon: f32,
    /// Whether texts are of several kinds.
    pub has_kinds: bool,
    /// The longest text, in tokens.
    pub context: Option<usize>,
}

/// Reads the configuration of an encoder.
///
/// # Errors
/// When the family is not known, or a setting is missing or not what is run here: the message names it.
pub fn bert(config: &Value) -> Result<BertConfig> {
    let family = config["model_type"].as_str().unwrap_or_default();
    let Some((_, is_offset)) = FAMILIES.iter().find(|(name, _)| *name == family) else {
        let expected = "bert, roberta, xlm-roberta, camembert or electra";
        return Err(Error::expected("model_type of config.json", format!("'{family}'"), expected));
    };
    match &config["position_embedding_type"] {
        Value::Null => {}
        Value::String(kind) if kind == "absolute" => {}
        other => return Err(Error::expected("position_embedding_type of config.json", other, "absolute")),
    }
    let activation = match &config["hidden_act"] {
        Value::Null => Activation::Gelu,
        other => match other.as_str() {
            Some("gelu") => Activation::Gelu,
            Some("relu") => Activation::Relu,
            Some("silu" | "swish") => Activation::Silu,
            _ => return Err(Error::expected("hidden_act of config.json", other, "gelu, relu or silu")),
        },
    };
    let padding = match &config["pad_token_id"] {
        Value::Null => 1,
        other => {
            other.as_u64().ok_or_else(|| Error::expected("pad_token_id of config.json", other, "a token"))? as usize
        }
    };
    let features = required(config, "hidden_size")?;
    if let Some(other) = number(config, "embedding_size")?.filter(|size| *size != features) {
        return Err(Error::expected("embedding_size of config.json", other, format!("{features}, the hidden_size")));
    }
    let first_position = if *is_offset { padding.saturating_add(1) } else { 0 };
    let kinds = setting(config, "type_vocab_size", "a whole number", Value::as_u64)?;
    Ok(BertConfig {
        encoder: EncoderConfig { heads: required(config, "num_attention_heads")?, first_position, activation },
        has_kinds: kinds != Some(0),
        context: number(config, "max_position_embeddings")?.map(|positions| positions.saturating_sub(first_position)),
        blocks: required(config, "num_hidden_layers")?,
        epsilon: float(config, "layer_norm_eps")?.unwrap_or(1e-12) as f32,
    })
}

/// Returns whether `model_type` names a family of BERT's kind.
pub fn is_family(family: &str) -> bool {
    FAMILIES.iter().any(|(name, _)| *name == family)
}

/// What layers' names begin with where the encoder is a part of a larger model.
const PREFIXES: [&str; 7] = ["", "bert.", "roberta.", "electra.", "model.", "0.auto_model.", "auto_model."];

const KINDS: &str = "embeddings.token_type_embeddings";

/// Returns what the names of a model's layers begin with.
pub fn prefix(has: impl Fn(&str) -> bool) -> &'static str {
    let is_there = |prefix: &&&str| has(&format!("{prefix}embeddings.word_embeddings"));
    PREFIXES.iter().find(is_there).copied().unwrap_or_default()
}

/// Returns the names of a block's linear layers, by what they have for inputs.
pub fn names(prefix: &str, block: usize) -> BTreeMap<BlockInput, Vec<String>> {
    let all = |parts: &[&str]| parts.iter().map(|part| of(prefix, block, part)).collect();
    BTreeMap::from([
        (BlockInput::Attention, all(&["attention.self.query", "attention.self.key", "attention.self.value"])),
        (BlockInput::AttentionOutput, all(&["attention.output.dense"])),
        (BlockInput::FeedForward, all(&["intermediate.dense"])),
        (BlockInput::FeedForwardOutput, all(&["output.dense"])),
    ])
}

fn of(prefix: &str, block: usize, part: &str) -> String {
    format!("{prefix}encoder.layer.{block}.{part}")
}

/// Puts the embedding together; the kinds of text may be missing.
///
/// # Errors
/// When a layer is missing.
pub fn embedding(prefix: &str, config: &BertConfig, layer: GetLayer) -> Result<EncoderEmbedding> {
    let norm = format!("{prefix}embeddings.LayerNorm");
    Ok(EncoderEmbedding {
        tokens: layer(&format!("{prefix}embeddings.word_embeddings"))?,
        positions: layer(&format!("{prefix}embeddings.position_embeddings"))?,
        kinds: if config.has_kinds { Some(layer(&format!("{prefix}{KINDS}"))?) } else { None },
        norm: layer_norm_of(&norm, &layer(&norm)?, config.epsilon)?,
    })
}

/// Returns the names that the attention of a block may have, where it is stored.
pub fn attentions(prefix: &str, block: usize) -> [String; 2] {
    ["attention", "attention.self"].map(|part| of(prefix, block, part))
}

/// Puts a block together, its attention exact or stored.
///
/// # Errors
/// When a layer is missing, or a norm is no vector with a bias.
pub fn block(
    prefix: &str,
    config: &BertConfig,
    number: usize,
    attention: Option<VqAttentionLayer>,
    layer: GetLayer,
) -> Result<EncoderBlock> {
    let get = |part: &str| layer(&of(prefix, number, part));
    let norm = |part: &str| {
        let name = of(prefix, number, part);
        layer_norm_of(&name, &layer(&name)?, config.epsilon)
    };
    Ok(EncoderBlock {
        query: get("attention.self.query")?,
        key: get("attention.self.key")?,
        value: get("attention.self.value")?,
        attention,
        attention_output: get("attention.output.dense")?,
        attention_norm: norm("attention.output.LayerNorm")?,
        intermediate: get("intermediate.dense")?,
        output: get("output.dense")?,
        output_norm: norm("output.LayerNorm")?,
    })
}

/// Finds the layers of an encoder by transformers' names, and loads them.
///
/// # Errors
/// When a layer is missing or does not fit: the message says which.
pub async fn encoder(model: &OpenModel<'_>, config: &BertConfig) -> Result<Encoder> {
    let all = model.layer_names().await?;
    let prefix = prefix(|name| all.contains(name));
    let mut names: Vec<String> =
        ["word_embeddings", "position_embeddings", "LayerNorm"].map(|part| format!("{prefix}embeddings.{part}")).into();
    names.extend(config.has_kinds.then(|| format!("{prefix}{KINDS}")));
    let layers = model.layers(names).await?;
    let get = |name: &str| layers.get(name).cloned().ok_or_else(|| missing(name));
    let embedding = embedding(prefix, config, &get)?;
    let (mut blocks, attentions) = (vec![], model.attentions().await?);
    for number in 0..config.blocks {
        let norms = ["attention.output.LayerNorm", "output.LayerNorm"].map(|part| of(prefix, number, part));
        let own = self::attentions(prefix, number);
        let stored = own.iter().filter(|name| attentions.contains(*name)).cloned();
        let names = self::names(prefix, number).into_values().flatten().chain(norms).chain(stored);
        let layers = model.layers(names.collect()).await?;
        let get = |name: &str| layers.get(name).cloned().ok_or_else(|| missing(name));
        let attention = attention_of(&own, &|name| attentions.contains(name), &get)?;
        blocks.push(block(prefix, config, number, attention, &get)?);
    }
    Encoder::new(config.encoder, embedding, blocks)
}
