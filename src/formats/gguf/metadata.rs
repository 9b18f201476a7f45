//! The metadata of a GGUF model as files beside it: the header as it came, and what transformers reads in its place.

use std::collections::BTreeMap;

use layerstore_core::transformer::{Rotary, RotaryScaling};
use serde_json::{Map, Value as Json, json};

use super::super::side_files::SideFile;
use super::header::{self, Header, Value};
use super::tokenizer;

/// The name of the file that holds a GGUF model's metadata: a GGUF file without tensors.
pub const METADATA: &str = "metadata.gguf";

/// Returns the metadata of a file as a file of its own, without what is said of its parts.
pub fn without_tensors(file: &[u8], header: &Header) -> Vec<u8> {
    let pairs =
        header.pairs.iter().filter(|(key, _)| !key.starts_with("split.")).map(|(_, bytes)| &file[bytes.clone()]);
    let pairs: Vec<&[u8]> = pairs.collect();
    let mut all = b"GGUF".to_vec();
    all.extend(3u32.to_le_bytes());
    all.extend(0u64.to_le_bytes());
    all.extend((pairs.len() as u64).to_le_bytes());
    pairs.into_iter().for_each(|pair| all.extend(pair));
    all
}

/// What is known of a model beside its metadata.
#[derive(Debug, Default)]
pub struct Shape {
    /// Rows of the embedding.
    pub vocabulary: Option<usize>,
    /// Rows of the embedding of token types.
    pub token_types: Option<usize>,
    /// Whether the head is the embedding.
    pub is_tied: bool,
    /// Whether projections of queries have a bias.
    pub has_attention_bias: bool,
    /// What frequencies of rotary positions are divided by, where a tensor says it.
    pub frequency_factors: Option<Vec<f32>>,
}

/// Returns the files that transformers has in the place of the metadata, as far as they can be made, and notes of those that cannot.
pub fn for_transformers(metadata: &[u8], shape: &Shape) -> (Vec<SideFile>, Vec<String>) {
    let Ok(header) = header::read_all(metadata) else { return (vec![], vec![]) };
    let all = Metadata(&header.metadata);
    let (mut files, mut notes) = (vec![], vec![]);
    let mut add = |name: &str, json: &Json| {
        // A tokenizer's lines would be half of its bytes.
        let text = match name {
            "tokenizer.json" => json.to_string(),
            _ => serde_json::to_string_pretty(json).unwrap_or_default(),
        };
        files.push(SideFile::new(name, text + "\n"));
    };
    let tokens = all.tokens();
    match configuration(&all, shape, &tokens) {
        Some(mut config) => {
            if let Some(factors) = &shape.frequency_factors {
                match llama3(&all, factors) {
                    Some(scaling) => config["rope_scaling"] = scaling,
                    None => notes.push("config.json does not say how rope_freqs.weight scales positions".into()),
                }
            }
            add("config.json", &config);
        }
        None => notes.push(format!("no config.json is made of the metadata of architecture '{}'", all.architecture())),
    }
    if !tokens.is_empty() {
        add("generation_config.json", &Json::Object(tokens.clone()));
    }
    match tokenizer::of(&header.metadata) {
        Ok(Some((tokenizer, config))) => {
            add("tokenizer.json", &tokenizer);
            add("tokenizer_config.json", &config);
        }
        Ok(None) => {}
        Err(reason) => notes.push(format!("no tokenizer.json is made of the metadata: {reason}")),
    }
    (files, notes)
}

struct Metadata<'a>(&'a BTreeMap<String, Value>);

impl Metadata<'_> {
    fn architecture(&self) -> &str {
        self.0.get("general.architecture").and_then(Value::as_str).unwrap_or_default()
    }

    fn of(&self, key: &str) -> Option<&Value> {
        self.0.get(&format!("{}.{key}", self.architecture()))
    }

    fn number(&self, key: &str) -> Option<usize> {
        self.of(key).and_then(Value::as_usize)
    }

    /// A number that was written as an f32, in the digits that it takes.
    fn float(&self, key: &str) -> Option<f64> {
        self.of(key).and_then(Value::as_f64).and_then(|v| (v as f32).to_string().parse().ok())
    }

    /// The numbers of special tokens, by transformers' names.
    fn tokens(&self) -> Map<String, Json> {
        let names = [("bos", "bos"), ("eos", "eos"), ("padding", "pad")];
        let ids = names.iter().filter_map(|(theirs, ours)| {
            let id = self.0.get(&format!("tokenizer.ggml.{theirs}_token_id"))?.as_usize()?;
            Some((format!("{ours}_token_id"), json!(id)))
        });
        ids.collect()
    }
}

/// Returns the `config.json` of a model; none where the architecture is not known, or has what no configuration says.
fn configuration(all: &Metadata, shape: &Shape, tokens: &Map<String, Json>) -> Option<Json> {
    let architecture = all.architecture();
    let mut config = Map::new();
    let mut set = |key: &str, value: Option<Json>| {
        if let Some(value) = value {
            config.insert(key.to_owned(), value);
        }
    };
    let (model_type, class, activation) = match architecture {
        "llama" => ("llama", "LlamaForCausalLM", "silu"),
        "qwen2" => ("qwen2", "Qwen2ForCausalLM", "silu"),
        "qwen3" => ("qwen3", "Qwen3ForCausalLM", "silu"),
        "gemma" => ("gemma", "GemmaForCausalLM", "gelu_pytorch_tanh"),
        "phi3" => ("phi3", "Phi3ForCausalLM", "silu"),
        "bert" => ("bert", "BertModel", "gelu"),
        _ => return None,
    };
    // A mixture of experts is of another class.
    if all.number("expert_count").is_some_and(|count| count > 0) {
        return None;
    }
    set("model_type", Some(json!(model_type)));
    set("architectures", Some(json!([class])));
    set("hidden_act", Some(json!(activation)));
    set("hidden_size", Some(json!(all.number("embedding_length")?)));
    set("intermediate_size", Some(json!(all.number("feed_forward_length")?)));
    set("num_hidden_layers", Some(json!(all.number("block_count")?)));
    let heads = all.number("attention.head_count")?;
    set("num_attention_heads", Some(json!(heads)));
    set("max_position_embeddings", all.number("context_length").map(|n| json!(n)));
    let vocabulary = shape.vocabulary.or_else(|| all.number("vocab_size"));
    set("vocab_size", vocabulary.map(|n| json!(n)));
    if architecture == "bert" {
        set("layer_norm_eps", all.float("attention.layer_norm_epsilon").map(|v| json!(v)));
        set("type_vocab_size", shape.token_types.map(|n| json!(n)));
    } else {
        set("num_key_value_heads", Some(json!(all.number("attention.head_count_kv").unwrap_or(heads))));
        let head = all.number("attention.key_length").filter(|_| architecture != "phi3");
        set("head_dim", head.map(|n| json!(n)));
        set("rms_norm_eps", all.float("attention.layer_norm_rms_epsilon").map(|v| json!(v)));
        set("rope_theta", Some(json!(all.float("rope.freq_base").unwrap_or(10000.0))));
        set("rope_scaling", scaling(all));
        let window = all.number("attention.sliding_window").filter(|n| *n > 0);
        set("sliding_window", window.map(|n| json!(n)));
        set("tie_word_embeddings", Some(json!(shape.is_tied)));
        if architecture == "llama" || architecture == "qwen3" {
            set("attention_bias", Some(json!(shape.has_attention_bias)));
        }
        if architecture == "gemma" {
            set("hidden_activation", Some(json!(activation)));
        }
    }
    tokens.iter().for_each(|(key, id)| set(key, Some(id.clone())));
    Some(Json::Object(config))
}

/// Returns the settings of Llama 3.1's positions that give these factors, if there are any.
fn llama3(all: &Metadata, factors: &[f32]) -> Option<Json> {
    let base = all.float("rope.freq_base").unwrap_or(10000.0);
    let factor = factors.iter().fold(1f32, |most, factor| most.max(*factor));
    let plain = Rotary::new(2 * factors.len(), base, RotaryScaling::None).ok()?;
    // The lengths of training texts that are in use.
    [8192, 4096, 2048, 16384, 32768].into_iter().find_map(|original| {
        let (low, high) = (1.0, 4.0);
        let scaling =
            RotaryScaling::Llama3 { factor: f64::from(factor), original, low_freq_factor: low, high_freq_factor: high };
        let scaled = Rotary::new(2 * factors.len(), base, scaling).ok()?;
        let found = plain.frequencies().iter().zip(scaled.frequencies()).map(|(plain, scaled)| plain / scaled);
        let same = found.zip(factors).all(|(found, factor)| (found - factor).abs() <= 1e-3 * factor);
        same.then(|| {
            json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original,
            })
        })
    })
}

fn scaling(all: &Metadata) -> Option<Json> {
    let factor = all.float("rope.scaling.factor")?;
    match all.of("rope.scaling.type")?.as_str()? {
        "linear" => Some(json!({ "rope_type": "linear", "factor": factor })),
        "yarn" => {
            let original = all.number("rope.scaling.original_context_length");
            let mut scaling = json!({ "rope_type": "yarn", "factor": factor });
            if let Some(original) = original {
                scaling["original_max_position_embeddings"] = json!(original);
            }
            Some(scaling)
        }
        _ => None,
    }
}
