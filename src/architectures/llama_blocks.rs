//! The layers of a decoder of Llama's kind, by transformers' names.

use std::collections::BTreeMap;

use layerstore_core::transformer::{BlockInput, DecoderBlock, Norm};

use super::config::LlamaConfig;
use super::open::{GetLayer, norm_of};
use crate::error::Result;
use crate::layer::VqAttentionLayer;

/// The table of tokens.
pub const EMBEDDING: &str = "model.embed_tokens";

/// The norm behind the last block.
pub const NORM: &str = "model.norm";

/// From features to logits, where it is not the embedding.
pub const HEAD: &str = "lm_head";

fn of(block: usize, part: &str) -> String {
    format!("model.layers.{block}.{part}")
}

/// Returns the names of a block's linear layers, by what they have for inputs.
pub fn names(block: usize) -> BTreeMap<BlockInput, Vec<String>> {
    let all = |parts: &[&str]| parts.iter().map(|part| of(block, part)).collect();
    BTreeMap::from([
        (BlockInput::Attention, all(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])),
        (BlockInput::AttentionOutput, all(&["self_attn.o_proj"])),
        (BlockInput::FeedForward, all(&["mlp.gate_proj", "mlp.up_proj"])),
        (BlockInput::FeedForwardOutput, all(&["mlp.down_proj"])),
    ])
}

/// Returns the names of all of a block's layers.
pub fn all_names(config: &LlamaConfig, block: usize) -> Vec<String> {
    let norms: &[&str] = match config.has_head_norms {
        true => &["input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"],
        false => &["input_layernorm", "post_attention_layernorm"],
    };
    names(block).into_values().flatten().chain(norms.iter().map(|part| of(block, part))).collect()
}

/// Returns the name that the attention of a block has, where it is stored.
pub fn attention(block: usize) -> String {
    of(block, "self_attn")
}

/// Puts a block together, its attention exact or stored.
///
/// # Errors
/// When a layer is missing, or a norm is no vector.
pub fn block(
    config: &LlamaConfig,
    number: usize,
    attention: Option<VqAttentionLayer>,
    layer: GetLayer,
) -> Result<DecoderBlock> {
    let get = |part: &str| layer(&of(number, part));
    let norm = |part: &str| {
        let name = of(number, part);
        let (gain, _) = norm_of(&name, &layer(&name)?)?;
        Ok(Norm::rms(gain, config.epsilon))
    };
    let head_norm = |part: &str| config.has_head_norms.then(|| norm(part)).transpose();
    Ok(DecoderBlock {
        attention_norm: norm("input_layernorm")?,
        query: get("self_attn.q_proj")?,
        key: get("self_attn.k_proj")?,
        value: get("self_attn.v_proj")?,
        output: get("self_attn.o_proj")?,
        query_norm: head_norm("self_attn.q_norm")?,
        key_norm: head_norm("self_attn.k_norm")?,
        attention,
        feed_forward_norm: norm("post_attention_layernorm")?,
        gate: get("mlp.gate_proj")?,
        up: get("mlp.up_proj")?,
        down: get("mlp.down_proj")?,
    })
}
