//! Names of tensors: those of llama.cpp, and those that Hugging Face's transformers has for the same ones.

use std::collections::BTreeMap;

use super::header::{self, Value};

/// What becomes of a tensor whose weights are stored in another way than transformers has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// Each head's rows lie in pairs, for rotary positions: they are put back in halves. So many heads.
    Unpermute(usize),
    /// One was added to the weights of a norm: it is taken away.
    LessOne,
}

/// A family of models whose names are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Llama,
    Bert,
}

/// How the tensors of a model are named.
#[derive(Debug)]
pub struct Names {
    architecture: String,
    /// Of each block, or one for all.
    heads: Vec<usize>,
    key_heads: Vec<usize>,
}

/// Tensors of a whole model: llama.cpp's name, and transformers'.
const LLAMA: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// Tensors of a block.
const LLAMA_BLOCK: [(&str, &str); 15] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate_inp", "mlp.gate"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];

const BERT: [(&str, &str); 4] = [
    ("token_embd", "embeddings.word_embeddings"),
    ("token_types", "embeddings.token_type_embeddings"),
    ("position_embd", "embeddings.position_embeddings"),
    ("token_embd_norm", "embeddings.LayerNorm"),
];

const BERT_BLOCK: [(&str, &str); 8] = [
    ("attn_q", "attention.self.query"),
    ("attn_k", "attention.self.key"),
    ("attn_v", "attention.self.value"),
    ("attn_output", "attention.output.dense"),
    ("attn_output_norm", "attention.output.LayerNorm"),
    ("ffn_up", "intermediate.dense"),
    ("ffn_down", "output.dense"),
    ("layer_output_norm", "output.LayerNorm"),
];

fn in_table(table: &[(&'static str, &'static str)], name: &str) -> Option<&'static str> {
    table.iter().find(|(theirs, _)| *theirs == name).map(|(_, ours)| *ours)
}

/// Returns the change for the heads of a block. For one that has no number of them it is of 0 heads, which is an error when its
/// tensor is read.
fn of_block(counts: &[usize], block: &str) -> Change {
    let count = match counts {
        [all] => Some(*all),
        each => block.parse::<usize>().ok().and_then(|block| each.get(block).copied()),
    };
    Change::Unpermute(count.unwrap_or(0))
}

impl Names {
    /// Finds out how the tensors of a model with such metadata are named.
    ///
    /// # Errors
    /// When rows have to be put in another order, and the numbers of heads cannot be told.
    pub fn of(metadata: &BTreeMap<String, Value>) -> Result<Self, String> {
        let architecture = metadata.get("general.architecture").and_then(Value::as_str).unwrap_or_default().to_owned();
        if architecture != "llama" {
            return Ok(Names { architecture, heads: vec![], key_heads: vec![] });
        }
        let count = |key: &str| {
            let key = format!("llama.attention.{key}");
            let Some(value) = metadata.get(&key) else { return Ok(None) };
            let counts: Option<Vec<usize>> = match value {
                Value::Array(values) => values.iter().map(Value::as_usize).collect(),
                value => value.as_usize().map(|count| vec![count]),
            };
            let counts = counts.filter(|counts| !counts.is_empty());
            counts
                .map(Some)
                .ok_or_else(|| format!("{key}: found {value:?}, expected a whole number, or one for each block"))
        };
        let heads = count("head_count")?.ok_or("llama.attention.head_count: found nothing, expected a whole number")?;
        let key_heads = count("head_count_kv")?.unwrap_or_else(|| heads.clone());
        Ok(Names { architecture, heads, key_heads })
    }

    /// Returns the model's architecture, as llama.cpp calls it.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// Returns whether transformers' names are known for the architecture.
    pub fn is_known(&self) -> bool {
        self.family().is_some()
    }

    /// Returns how the tensors are named of a model with the metadata of this file.
    ///
    /// # Errors
    /// When it is no GGUF file, or as [`Names::of`].
    pub fn of_file(file: &[u8]) -> Result<Self, String> {
        Names::of(&header::read(file)?.metadata)
    }

    /// Returns how the tensors of a model are named whose architecture and numbers of heads are known.
    pub fn new(architecture: &str, heads: usize, key_heads: usize) -> Self {
        Names { architecture: architecture.to_owned(), heads: vec![heads], key_heads: vec![key_heads] }
    }

    /// Returns llama.cpp's name of a tensor that transformers calls so, and what [`Names::of_tensor`] would undo; none where it has none.
    pub fn of_transformers(&self, name: &str) -> Option<(String, Change)> {
        let (stem, kind) = name.rsplit_once('.')?;
        let theirs = match self.family()? {
            Family::Llama => match stem.strip_prefix("model.layers.") {
                Some(rest) => {
                    let (number, part) = rest.split_once('.')?;
                    let mut parts = LLAMA_BLOCK.iter().map(|(theirs, _)| *theirs);
                    format!("blk.{number}.{}", parts.find(|theirs| self.in_llama_block(theirs) == Some(part))?)
                }
                None => LLAMA.iter().find(|(_, ours)| *ours == stem)?.0.to_owned(),
            },
            Family::Bert => {
                let stem = stem.strip_prefix("bert.").unwrap_or(stem);
                match stem.strip_prefix("encoder.layer.") {
                    Some(rest) => {
                        let (number, part) = rest.split_once('.')?;
                        format!("blk.{number}.{}", BERT_BLOCK.iter().find(|(_, ours)| *ours == part)?.0)
                    }
                    None => BERT.iter().find(|(_, ours)| *ours == stem)?.0.to_owned(),
                }
            }
        };
        let theirs = format!("{theirs}.{kind}");
        let change = self.of_tensor(&theirs).1;
        Some((theirs, change))
    }

    /// Returns whether llama.cpp has a place for a tensor of its names: biases that an architecture does not have are none.
    pub fn has_place(&self, name: &str) -> bool {
        let part = name.strip_suffix(".bias").and_then(|stem| stem.rsplit('.').next());
        match (self.architecture.as_str(), part) {
            (_, None) | ("llama" | "bert", _) => true,
            ("qwen2", Some(part)) => matches!(part, "attn_q" | "attn_k" | "attn_v"),
            ("qwen3" | "gemma" | "gemma2" | "gemma3" | "phi3", Some(_)) => false,
            _ => true,
        }
    }

    /// Returns whether a model without a head has its embedding for one.
    pub fn ties_heads(&self) -> bool {
        self.family() == Some(Family::Llama)
    }

    fn family(&self) -> Option<Family> {
        match self.architecture.as_str() {
            "llama" | "qwen2" | "qwen3" | "gemma" | "gemma2" | "gemma3" | "phi3" => Some(Family::Llama),
            "bert" => Some(Family::Bert),
            _ => None,
        }
    }

    /// Returns transformers' name of a tensor, or its own where none is known, and what has to be undone.
    pub fn of_tensor(&self, name: &str) -> (String, Change) {
        self.translated(name).unwrap_or_else(|| (name.to_owned(), Change::None))
    }

    fn translated(&self, name: &str) -> Option<(String, Change)> {
        let (stem, kind) = name.rsplit_once('.')?;
        let family = self.family()?;
        let block = stem.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let block = block.filter(|(number, _)| number.parse::<u32>().is_ok_and(|n| n.to_string() == *number));
        let change = match block {
            Some((number, "attn_q")) if self.architecture == "llama" => Some(of_block(&self.heads, number)),
            Some((number, "attn_k")) if self.architecture == "llama" => Some(of_block(&self.key_heads, number)),
            _ if self.architecture.starts_with("gemma") && stem.ends_with("norm") && kind == "weight" => {
                Some(Change::LessOne)
            }
            _ => None,
        };
        let translated = match (family, block) {
            (Family::Llama, None) => in_table(&LLAMA, stem)?.to_owned(),
            (Family::Llama, Some((number, part))) => {
                format!("model.layers.{number}.{}", self.in_llama_block(part)?)
            }
            (Family::Bert, None) => in_table(&BERT, stem)?.to_owned(),
            (Family::Bert, Some((number, part))) => format!("encoder.layer.{number}.{}", in_table(&BERT_BLOCK, part)?),
        };
        Some((format!("{translated}.{kind}"), change.unwrap_or(Change::None)))
    }

    fn in_llama_block(&self, part: &str) -> Option<&'static str> {
        let has_feed_forward_norms = matches!(self.architecture.as_str(), "gemma2" | "gemma3");
        match (self.architecture.as_str(), part) {
            ("phi3", "ffn_up") => Some("mlp.gate_up_proj"),
            (_, "ffn_norm") if has_feed_forward_norms => Some("pre_feedforward_layernorm"),
            (_, "post_attention_norm" | "post_ffw_norm") if !has_feed_forward_norms => None,
            _ => in_table(&LLAMA_BLOCK, part),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(architecture: &str) -> Names {
        let count = |key: &str, n| (format!("{architecture}.attention.{key}"), Value::Unsigned(n));
        let architecture = ("general.architecture".to_owned(), Value::Text(architecture.to_owned()));
        Names::of(&[architecture, count("head_count", 9), count("head_count_kv", 3)].into()).unwrap()
    }

    #[test]
    fn heads_have_to_be_known() {
        let of = |heads: Option<Value>, key_heads: Option<Value>| {
            let architecture = ("general.architecture".to_owned(), Value::Text("llama".into()));
            let heads = heads.map(|value| ("llama.attention.head_count".to_owned(), value));
            let key_heads = key_heads.map(|value| ("llama.attention.head_count_kv".to_owned(), value));
            Names::of(&[Some(architecture), heads, key_heads].into_iter().flatten().collect())
        };
        let each = Value::Array(vec![Value::Unsigned(4), Value::Unsigned(8)]);
        let names = of(Some(Value::Unsigned(8)), Some(each.clone())).unwrap();
        let change = |name: &str| names.of_tensor(name).1;
        assert_eq!(change("blk.1.attn_q.weight"), Change::Unpermute(8));
        assert_eq!(change("blk.0.attn_k.weight"), Change::Unpermute(4));
        assert_eq!(change("blk.1.attn_k.weight"), Change::Unpermute(8));
        assert_eq!(change("blk.2.attn_k.weight"), Change::Unpermute(0));
        assert!(of(None, None).unwrap_err().contains("head_count: found nothing"));
        for wrong in [Value::Text("4".into()), Value::Float(4.0), Value::Array(vec![]), Value::Long(2000)] {
            assert!(of(Some(wrong.clone()), None).is_err() && of(Some(each.clone()), Some(wrong)).is_err());
        }
    }

    #[test]
    fn names_come_back() {
        for (architecture, tensors) in [
            ("llama", &["token_embd.weight", "blk.3.attn_q.weight", "blk.0.ffn_norm.weight", "output.weight"][..]),
            ("gemma2", &["blk.1.ffn_norm.weight", "blk.1.post_attention_norm.weight", "output_norm.weight"]),
            ("phi3", &["blk.1.ffn_up.weight", "blk.2.attn_qkv.weight"]),
            ("bert", &["blk.5.layer_output_norm.bias", "token_types.weight"]),
        ] {
            let names = names(architecture);
            for theirs in tensors {
                let (ours, change) = names.of_tensor(theirs);
                assert_ne!(ours, *theirs);
                assert_eq!(names.of_transformers(&ours), Some(((*theirs).to_owned(), change)), "{architecture} {ours}");
            }
        }
        assert_eq!(names("bert").of_transformers("bert.pooler.dense.weight"), None);
        assert_eq!(names("llama").of_transformers("model.layers.0.other.weight"), None);
    }

    #[test]
    fn names_are_those_of_transformers() {
        for (architecture, theirs, ours, change) in [
            ("llama", "token_embd.weight", "model.embed_tokens.weight", Change::None),
            ("llama", "output.weight", "lm_head.weight", Change::None),
            ("llama", "blk.12.attn_q.weight", "model.layers.12.self_attn.q_proj.weight", Change::Unpermute(9)),
            ("llama", "blk.0.attn_k.weight", "model.layers.0.self_attn.k_proj.weight", Change::Unpermute(3)),
            ("llama", "blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight", Change::None),
            ("llama", "blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight", Change::None),
            ("llama", "rope_freqs.weight", "rope_freqs.weight", Change::None),
            ("llama", "blk.01.attn_q.weight", "blk.01.attn_q.weight", Change::None),
            ("qwen2", "blk.3.attn_q.bias", "model.layers.3.self_attn.q_proj.bias", Change::None),
            ("qwen3", "blk.3.attn_q_norm.weight", "model.layers.3.self_attn.q_norm.weight", Change::None),
            ("phi3", "blk.1.ffn_up.weight", "model.layers.1.mlp.gate_up_proj.weight", Change::None),
            ("gemma", "blk.1.ffn_norm.weight", "model.layers.1.post_attention_layernorm.weight", Change::LessOne),
            ("gemma2", "blk.1.ffn_norm.weight", "model.layers.1.pre_feedforward_layernorm.weight", Change::LessOne),
            ("bert", "blk.5.layer_output_norm.bias", "encoder.layer.5.output.LayerNorm.bias", Change::None),
            ("bert", "token_types.weight", "embeddings.token_type_embeddings.weight", Change::None),
            ("rwkv7", "token_embd.weight", "token_embd.weight", Change::None),
        ] {
            assert_eq!(names(architecture).of_tensor(theirs), (ours.to_owned(), change), "{architecture} {theirs}");
        }
    }
}
