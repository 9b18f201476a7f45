//! The metadata of a GGUF model, made of the files that transformers has: for the architectures `llama`, `qwen2`, `qwen3` and `bert`.

use std::collections::BTreeMap;

use layerstore_core::transformer::{Rotary, RotaryScaling};
use serde_json::Value as Json;

use super::writer::Pairs;

/// Types of tokens.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Where a word begins, in pieces of SentencePiece.
const WORD: &str = "\u{2581}";

/// The files of a model, parsed.
struct Files<'a> {
    files: &'a BTreeMap<String, bytes::Bytes>,
    config: Json,
}

/// The metadata that were made, and how the tensors are called.
pub struct Made {
    /// The metadata.
    pub pairs: Pairs,
    /// The architecture, as llama.cpp calls it.
    pub architecture: String,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys.
    pub key_heads: usize,
    /// Blocks that the configuration says.
    pub blocks: usize,
    /// Features of a token.
    pub features: usize,
    /// What the configuration says and the metadata cannot.
    pub unsaid: Vec<String>,
    /// What each frequency of the rotary positions is divided by, where that is a tensor of its own.
    pub frequency_factors: Option<Vec<f32>>,
}

impl Made {
    /// Makes the metadata of a model of this name, which has these files.
    ///
    /// # Errors
    /// When there is no configuration, or the architecture or the tokenizer is none of those that are known here.
    pub fn of(files: &BTreeMap<String, bytes::Bytes>, name: &str) -> Result<Self, String> {
        Files::new(files)?.metadata(name)
    }
}

impl<'a> Files<'a> {
    /// Reads the configuration.
    ///
    /// # Errors
    /// When there is none, or it is no JSON.
    fn new(files: &'a BTreeMap<String, bytes::Bytes>) -> Result<Self, String> {
        let mut all = Files { files, config: Json::Null };
        all.config = all.json("config.json")?.ok_or("the model has no config.json, and no metadata of a GGUF file")?;
        Ok(all)
    }

    fn json(&self, name: &str) -> Result<Option<Json>, String> {
        let Some(file) = self.files.get(name) else { return Ok(None) };
        serde_json::from_slice(file).map(Some).map_err(|e| format!("{name} is no JSON: {e}"))
    }

    fn number(&self, key: &str) -> Option<usize> {
        self.config[key].as_u64().and_then(|n| usize::try_from(n).ok())
    }

    fn required(&self, key: &str) -> Result<usize, String> {
        self.number(key).ok_or_else(|| format!("config.json: {key} is {}, expected a whole number", self.config[key]))
    }

    /// Makes the metadata of a model of this name.
    ///
    /// # Errors
    /// When the architecture or the tokenizer is none of those that are known here, or a number is missing.
    fn metadata(&self, name: &str) -> Result<Made, String> {
        let architecture = match self.config["model_type"].as_str().unwrap_or_default() {
            "llama" | "mistral" => "llama",
            "qwen2" => "qwen2",
            "qwen3" => "qwen3",
            "bert" => "bert",
            other => {
                return Err(format!(
                    "config.json: model_type is '{other}', expected llama, mistral, qwen2, qwen3 or bert: of other models the \
                     metadata of a GGUF file are needed, as import keeps them"
                ));
            }
        };
        let heads = self.required("num_attention_heads")?;
        let key_heads = self.number("num_key_value_heads").unwrap_or(heads);
        let mut pairs = Pairs::default();
        pairs.text("general.architecture", architecture);
        pairs.text("general.name", name);
        let key = |part: &str| format!("{architecture}.{part}");
        let width = self.required("hidden_size")?;
        pairs.number(&key("context_length"), self.required("max_position_embeddings")?);
        pairs.number(&key("embedding_length"), width);
        pairs.number(&key("block_count"), self.required("num_hidden_layers")?);
        pairs.number(&key("feed_forward_length"), self.required("intermediate_size")?);
        pairs.number(&key("attention.head_count"), heads);
        if architecture == "bert" {
            let epsilon = self.config["layer_norm_eps"].as_f64().unwrap_or(1e-12);
            pairs.float(&key("attention.layer_norm_epsilon"), epsilon);
            pairs.flag(&key("attention.causal"), false);
            if let Some(pooling) = self.pooling()? {
                pairs.number(&key("pooling_type"), pooling);
            }
        } else {
            pairs.number(&key("attention.head_count_kv"), key_heads);
            let epsilon = self.config["rms_norm_eps"].as_f64().ok_or("config.json: no rms_norm_eps")?;
            pairs.float(&key("attention.layer_norm_rms_epsilon"), epsilon);
            let head = self.number("head_dim").unwrap_or(width / heads.max(1));
            pairs.number(&key("rope.dimension_count"), head);
            if head * heads != width {
                pairs.number(&key("attention.key_length"), head);
                pairs.number(&key("attention.value_length"), head);
            }
            self.rope(&key, &mut pairs)?;
            pairs.number(&key("vocab_size"), self.required("vocab_size")?);
        }
        self.tokenizer(architecture, &mut pairs)?;
        Ok(Made {
            pairs,
            architecture: architecture.to_owned(),
            heads,
            key_heads,
            blocks: self.required("num_hidden_layers")?,
            features: width,
            unsaid: self.unsaid(architecture),
            frequency_factors: self.frequency_factors(width / heads.max(1))?,
        })
    }

    /// What llama.cpp does otherwise than the configuration says.
    fn unsaid(&self, architecture: &str) -> Vec<String> {
        let mut all = vec![];
        let activations: &[&str] = if architecture == "bert" { &["gelu"] } else { &["silu", "swish"] };
        let activation = self.config["hidden_act"].as_str().unwrap_or(activations[0]);
        if !activations.contains(&activation) {
            all.push(format!("the activation {activation}: llama.cpp runs {} with {architecture}", activations[0]));
        }
        let is_on = self.config["use_sliding_window"].as_bool();
        let always = self.config["model_type"].as_str() == Some("mistral");
        let window = self.number("sliding_window").filter(|_| is_on.unwrap_or(always));
        let context = self.number("max_position_embeddings").unwrap_or(usize::MAX);
        if let Some(window) = window.filter(|window| *window < context) {
            all.push(format!("windows of {window} tokens: llama.cpp's {architecture} sees all tokens"));
        }
        all
    }

    /// What Llama 3.1's frequencies are divided by.
    fn frequency_factors(&self, width: usize) -> Result<Option<Vec<f32>>, String> {
        let scaling = self.scaling();
        if scaling["rope_type"].as_str().or_else(|| scaling["type"].as_str()) != Some("llama3") {
            return Ok(None);
        }
        let number = |key: &str| {
            scaling[key].as_f64().ok_or_else(|| format!("config.json: {key} of its positions is {}", scaling[key]))
        };
        let base = self.config["rope_theta"].as_f64().or_else(|| scaling["rope_theta"].as_f64()).unwrap_or(10000.0);
        let head = self.number("head_dim").unwrap_or(width);
        let settings = RotaryScaling::Llama3 {
            factor: number("factor")?,
            original: number("original_max_position_embeddings")? as usize,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
        };
        let rotary = |scaling| Rotary::new(head, base, scaling).map_err(|e| e.to_string());
        let (plain, scaled) = (rotary(RotaryScaling::None)?, rotary(settings)?);
        Ok(Some(plain.frequencies().iter().zip(scaled.frequencies()).map(|(plain, scaled)| plain / scaled).collect()))
    }

    /// What is said of positions beyond those of the training.
    fn scaling(&self) -> &Json {
        match self.config["rope_scaling"].is_object() {
            true => &self.config["rope_scaling"],
            // Newer configurations have all of it in one table.
            false => &self.config["rope_parameters"],
        }
    }

    /// The rotary positions.
    fn rope(&self, key: &impl Fn(&str) -> String, pairs: &mut Pairs) -> Result<(), String> {
        let scaling = self.scaling();
        let nested = &self.config["rope_parameters"]["rope_theta"];
        let base = self.config["rope_theta"].as_f64().or_else(|| nested.as_f64());
        pairs.float(&key("rope.freq_base"), base.unwrap_or(10000.0));
        let kind = scaling["rope_type"].as_str().or_else(|| scaling["type"].as_str()).unwrap_or("default");
        match kind {
            // Of llama3 a tensor says it.
            "default" | "llama3" => {}
            "linear" | "yarn" => {
                pairs.text(&key("rope.scaling.type"), kind);
                pairs.float(&key("rope.scaling.factor"), scaling["factor"].as_f64().unwrap_or(1.0));
                if let Some(original) = scaling["original_max_position_embeddings"].as_u64() {
                    pairs.number(&key("rope.scaling.original_context_length"), original as usize);
                }
            }
            other => {
                return Err(format!(
                    "config.json: positions are scaled as '{other}', expected default, linear, yarn or llama3"
                ));
            }
        }
        Ok(())
    }

    /// How an encoder's outputs become one: 1 by their mean, 2 by the first of them.
    fn pooling(&self) -> Result<Option<usize>, String> {
        let Some(pooling) = self.json("1_Pooling/config.json")? else { return Ok(None) };
        let is = |key: &str| pooling[key].as_bool() == Some(true);
        Ok(match () {
            () if is("pooling_mode_mean_tokens") => Some(1),
            () if is("pooling_mode_cls_token") => Some(2),
            () => None,
        })
    }

    /// The tokens, and how a text is divided into them.
    fn tokenizer(&self, architecture: &str, pairs: &mut Pairs) -> Result<(), String> {
        let tokenizer = self.json("tokenizer.json")?.ok_or("the model has no tokenizer.json")?;
        let settings = self.json("tokenizer_config.json")?.unwrap_or_default();
        let vocabulary =
            tokenizer["model"]["vocab"].as_object().ok_or("tokenizer.json: its model has no vocabulary")?;
        let added = tokenizer["added_tokens"].as_array().map(Vec::as_slice).unwrap_or_default();
        let id = |value: &Json| value.as_u64().and_then(|id| usize::try_from(id).ok()).filter(|id| *id < 1 << 24);
        let ids = vocabulary.values().map(&id).chain(added.iter().map(|token| id(&token["id"])));
        let most = ids.max().flatten().ok_or("tokenizer.json: it has no tokens")?;
        // Rows of the embedding that no token has.
        let count = (most + 1).max(self.number("vocab_size").unwrap_or(0));
        let mut tokens: Vec<String> = (0..count).map(|id| format!("[PAD{id}]")).collect();
        let mut types = vec![UNUSED; count];
        for (token, number) in vocabulary {
            let Some(id) = id(number) else {
                return Err(format!("tokenizer.json: the number of '{token}' is {number}"));
            };
            if types[id] != UNUSED {
                return Err(format!("tokenizer.json: '{token}' and '{}' have the same number, {id}", tokens[id]));
            }
            (tokens[id], types[id]) = (token.clone(), NORMAL);
        }
        for token in added {
            if let (Some(id), Some(text)) = (id(&token["id"]), token["content"].as_str()) {
                let special = token["special"].as_bool() == Some(true);
                (tokens[id], types[id]) = (text.to_owned(), if special { CONTROL } else { USER_DEFINED });
            }
        }
        let model = &tokenizer["model"];
        let bytes = model["byte_fallback"].as_bool() == Some(true);
        match model["type"].as_str().unwrap_or_default() {
            "BPE" if bytes => self.sentence_pieces(model, &mut tokens, &mut types, pairs)?,
            "BPE" => byte_pairs(&tokenizer, pairs)?,
            "WordPiece" if architecture == "bert" => {
                word_pieces(&mut tokens, &types, pairs);
                pairs.number("tokenizer.ggml.token_type_count", self.number("type_vocab_size").unwrap_or(2));
            }
            other => return Err(format!("tokenizer.json: its model is '{other}', expected BPE, or WordPiece of bert")),
        }
        pairs.texts("tokenizer.ggml.tokens", tokens.iter().map(String::as_str));
        pairs.numbers("tokenizer.ggml.token_type", &types);
        self.special(&settings, (added, vocabulary), (architecture, count), pairs)?;
        let begins = settings["add_bos_token"].as_bool().or_else(|| begins_with_special(&tokenizer, &settings));
        if let Some(begins) = begins.filter(|_| architecture != "bert") {
            pairs.flag("tokenizer.ggml.add_bos_token", begins);
        }
        let template = settings["chat_template"].as_str().map(str::to_owned);
        let file = self.files.get("chat_template.jinja").and_then(|file| String::from_utf8(file.to_vec()).ok());
        if let Some(template) = template.or(file) {
            pairs.text("tokenizer.chat_template", &template);
        }
        Ok(())
    }

    /// The numbers of special tokens.
    fn special(
        &self,
        settings: &Json,
        (added, vocabulary): (&[Json], &serde_json::Map<String, Json>),
        (architecture, count): (&str, usize),
        pairs: &mut Pairs,
    ) -> Result<(), String> {
        let generation = self.json("generation_config.json")?.unwrap_or_default();
        let of_text = |text: &str| {
            let named = added.iter().find(|token| token["content"].as_str() == Some(text)).map(|token| &token["id"]);
            named.or_else(|| vocabulary.get(text)).and_then(Json::as_u64)
        };
        let text = |value: &Json| value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned);
        let named = [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"), ("sep", "seperator")];
        let named = named.into_iter().chain([("cls", "cls"), ("mask", "mask")]);
        let named = named.filter(|(ours, _)| architecture != "bert" || !matches!(*ours, "bos" | "eos"));
        for (ours, theirs) in named {
            // A model may end with several tokens; the first is the one of the header.
            let first = |value: &Json| value.as_u64().or_else(|| value[0].as_u64());
            let key = format!("{ours}_token_id");
            let id = text(&settings[format!("{ours}_token")])
                .and_then(|text| of_text(&text))
                .or_else(|| first(&self.config[&key]))
                .or_else(|| first(&generation[&key]));
            let id = id.or_else(|| of_text(&format!("[{}]", ours.to_uppercase())).filter(|_| architecture == "bert"));
            let Some(id) = id else { continue };
            if id >= count as u64 {
                return Err(format!("{ours}_token_id is {id}, of {count} tokens"));
            }
            pairs.number(&format!("tokenizer.ggml.{theirs}_token_id"), id as usize);
            // What llama.cpp puts around a text for BERT.
            match (architecture, ours) {
                ("bert", "cls") => pairs.number("tokenizer.ggml.bos_token_id", id as usize),
                ("bert", "sep") => pairs.number("tokenizer.ggml.eos_token_id", id as usize),
                _ => {}
            }
        }
        Ok(())
    }

    /// Byte pairs with bytes as tokens, as SentencePiece has them: scores are the order of the merges.
    fn sentence_pieces(
        &self,
        model: &Json,
        tokens: &mut [String],
        types: &mut [i32],
        pairs: &mut Pairs,
    ) -> Result<(), String> {
        let mut scores = vec![-1e4f32; tokens.len()];
        let places: BTreeMap<String, usize> =
            tokens.iter().enumerate().map(|(id, token)| (token.clone(), id)).collect();
        for (rank, (left, right)) in merges(model)?.into_iter().enumerate() {
            if let Some(&id) = places.get(&format!("{left}{right}")) {
                // The earliest merge that makes it.
                scores[id] = scores[id].max(-(rank as f32));
            }
        }
        let unknown = model["unk_token"].as_str();
        for (token, kind) in tokens.iter().zip(types.iter_mut()) {
            let is_byte = token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
            match *kind {
                NORMAL if is_byte => *kind = BYTE,
                NORMAL | CONTROL if Some(token.as_str()) == unknown => *kind = UNKNOWN,
                _ => {}
            }
        }
        pairs.text("tokenizer.ggml.model", "llama");
        pairs.text("tokenizer.ggml.pre", "default");
        pairs.floats("tokenizer.ggml.scores", &scores);
        Ok(())
    }
}

/// The merges of byte pairs.
fn merges(model: &Json) -> Result<Vec<(String, String)>, String> {
    let all = model["merges"].as_array().ok_or("tokenizer.json: its model has no merges")?;
    let pair = |merge: &Json| match merge {
        Json::String(text) => text.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned())),
        merge => Some((merge[0].as_str()?.to_owned(), merge[1].as_str()?.to_owned())),
    };
    let all: Option<Vec<(String, String)>> = all.iter().map(pair).collect();
    let all = all.ok_or("tokenizer.json: a merge is no pair of texts")?;
    let known = |piece: &String| model["vocab"].get(piece).is_some();
    match all.iter().find(|(left, right)| !known(left) || !known(right)) {
        Some((left, right)) => {
            Err(format!("tokenizer.json: a merge of '{left}' and '{right}', which are no tokens both"))
        }
        None => Ok(all),
    }
}

/// Byte pairs over bytes as letters, as GPT-2 has them.
fn byte_pairs(tokenizer: &Json, pairs: &mut Pairs) -> Result<(), String> {
    let before = tokenizer["pre_tokenizer"].to_string();
    let has = |part: &str| before.contains(part);
    let pre = match () {
        () if has(r"\\p{N}{1,3}") => "llama-bpe",
        () if has("\"Split\"") && has(r"|\\p{N}|") => "qwen2",
        () if has("\"Split\"") || !has("\"ByteLevel\"") => {
            return Err("tokenizer.json: it divides words in a way that is not known here".into());
        }
        () if has("\"Digits\"") => "smollm",
        () => "gpt-2",
    };
    let all: Vec<String> =
        merges(&tokenizer["model"])?.into_iter().map(|(left, right)| format!("{left} {right}")).collect();
    pairs.text("tokenizer.ggml.model", "gpt2");
    pairs.text("tokenizer.ggml.pre", pre);
    pairs.texts("tokenizer.ggml.merges", all.iter().map(String::as_str));
    Ok(())
}

/// BERT's word pieces, marked as llama.cpp marks them: where a word begins.
fn word_pieces(tokens: &mut [String], types: &[i32], pairs: &mut Pairs) {
    for (token, kind) in tokens.iter_mut().zip(types) {
        match (token.strip_prefix("##"), *kind) {
            (_, CONTROL) => {}
            (Some(rest), _) => *token = rest.to_owned(),
            (None, _) => *token = format!("{WORD}{token}"),
        }
    }
    pairs.text("tokenizer.ggml.model", "bert");
    pairs.text("tokenizer.ggml.pre", "default");
}

/// Whether a text's tokens begin with the one for that, as the template around it says.
fn begins_with_special(tokenizer: &Json, settings: &Json) -> Option<bool> {
    let bos = settings["bos_token"].as_str().or_else(|| settings["bos_token"]["content"].as_str())?;
    let after = &tokenizer["post_processor"];
    let one = std::slice::from_ref(after);
    let all = after["processors"].as_array().map_or(one, Vec::as_slice);
    Some(all.iter().any(|template| template["single"][0]["SpecialToken"]["id"].as_str() == Some(bos)))
}
