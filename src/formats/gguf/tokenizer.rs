//! The tokenizer of a GGUF model as the `tokenizer.json` of Hugging Face's tokenizers.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value as Json, json};

use super::header::Value;

/// Where a word begins, in pieces of SentencePiece.
const WORD: &str = "\u{2581}";

/// The words of Llama 3's tokenizer.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The words of Qwen2's.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Types of tokens.
const CONTROL: usize = 3;
const USER_DEFINED: usize = 4;

/// What the metadata say of a tokenizer.
struct Tokenizer<'a> {
    metadata: &'a BTreeMap<String, Value>,
    tokens: Vec<&'a str>,
    types: Vec<usize>,
}

/// Returns the `tokenizer.json` and the `tokenizer_config.json` of a model; none where it has no tokens.
///
/// # Errors
/// When its kind is not known here: what it is.
pub fn of(metadata: &BTreeMap<String, Value>) -> Result<Option<(Json, Json)>, String> {
    let array = |key: &str| metadata.get(&format!("tokenizer.ggml.{key}")).and_then(Value::as_array);
    let Some(tokens) = array("tokens") else { return Ok(None) };
    let tokens: Option<Vec<&str>> = tokens.iter().map(Value::as_str).collect();
    let tokens = tokens.ok_or("its tokens are no texts")?;
    let types = array("token_type").unwrap_or_default().iter().map(|kind| kind.as_usize().unwrap_or(1)).collect();
    let tokenizer = Tokenizer { metadata, tokens, types };
    let json = match tokenizer.text("model") {
        "gpt2" => tokenizer.byte_pairs()?,
        "llama" => tokenizer.sentence_pieces()?,
        "bert" => tokenizer.word_pieces(),
        other => return Err(format!("its kind is '{other}', where gpt2, llama and bert are known")),
    };
    Ok(Some((json, tokenizer.configuration())))
}

impl Tokenizer<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(&format!("tokenizer.ggml.{key}"))
    }

    fn text(&self, key: &str) -> &str {
        self.get(key).and_then(Value::as_str).unwrap_or_default()
    }

    fn is(&self, key: &str, default: bool) -> bool {
        self.get(key).and_then(Value::as_bool).unwrap_or(default)
    }

    /// A special token: its text and number.
    fn special(&self, name: &str) -> Option<(&str, usize)> {
        let id = self.get(&format!("{name}_token_id"))?.as_usize()?;
        Some((self.tokens.get(id)?, id))
    }

    fn kind(&self, id: usize) -> usize {
        self.types.get(id).copied().unwrap_or(1)
    }

    fn vocabulary(&self, text: impl Fn(usize, &str) -> String) -> Map<String, Json> {
        // Of tokens of one text the first counts.
        let mut all = Map::new();
        for (id, token) in self.tokens.iter().enumerate() {
            all.entry(text(id, token)).or_insert_with(|| json!(id));
        }
        all
    }

    /// Tokens that are found before a text is divided.
    fn added(&self) -> Vec<Json> {
        let all = self.tokens.iter().enumerate().filter(|(id, _)| matches!(self.kind(*id), CONTROL | USER_DEFINED));
        let added = all.map(|(id, token)| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": self.kind(id) == CONTROL,
            })
        });
        added.collect()
    }

    /// What is put around a text: its beginning and its end, where the metadata say so.
    fn around(&self, begins: bool, ends: bool) -> Json {
        let first = self.special("bos").filter(|_| self.is("add_bos_token", begins));
        let last = self.special("eos").filter(|_| self.is("add_eos_token", ends));
        self.template(first, last)
    }

    fn template(&self, first: Option<(&str, usize)>, last: Option<(&str, usize)>) -> Json {
        if first.is_none() && last.is_none() {
            return Json::Null;
        }
        let special = |token: &Option<(&str, usize)>, of: usize| {
            token.map(|(text, _)| json!({ "SpecialToken": { "id": text, "type_id": of } }))
        };
        let text = |name: &str, of: usize| Some(json!({ "Sequence": { "id": name, "type_id": of } }));
        let single: Vec<Json> = [special(&first, 0), text("A", 0), special(&last, 0)].into_iter().flatten().collect();
        let second = match self.text("model") {
            "bert" => [None, text("B", 1), special(&last, 1)],
            _ => [special(&first, 1), text("B", 1), special(&last, 1)],
        };
        let pair: Vec<Json> = single.iter().cloned().chain(second.into_iter().flatten()).collect();
        let tokens: Map<String, Json> = [first, last]
            .into_iter()
            .flatten()
            .map(|(text, id)| (text.to_owned(), json!({ "id": text, "ids": [id], "tokens": [text] })))
            .collect();
        json!({ "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens })
    }

    fn json(&self, normalizer: Json, pre_tokenizer: Json, post_processor: Json, decoder: Json, model: Json) -> Json {
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": self.added(), "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer, "post_processor": post_processor, "decoder": decoder, "model": model,
        })
    }

    /// Byte pairs over bytes as letters, as GPT-2 has them.
    fn byte_pairs(&self) -> Result<Json, String> {
        let merges = self.get("merges").and_then(Value::as_array).ok_or("it has no merges")?;
        let merges: Vec<&str> = merges.iter().filter_map(Value::as_str).collect();
        let bytes = |by_words: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": by_words });
        let words = |pattern: &str| {
            let split =
                json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
            json!({ "type": "Sequence", "pretokenizers": [split, bytes(false)] })
        };
        let digits = json!({ "type": "Digits", "individual_digits": true });
        let (pre, normalizer, ignores_merges) = match self.text("pre") {
            "" | "default" | "gpt-2" => (bytes(true), Json::Null, false),
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" => {
                (json!({ "type": "Sequence", "pretokenizers": [digits, bytes(true)] }), Json::Null, false)
            }
            "llama-bpe" | "llama3" | "llama-v3" | "llama-v3.2" => (words(LLAMA3), Json::Null, true),
            "qwen2" | "deepseek-r1-qwen" => (words(QWEN2), json!({ "type": "NFC" }), false),
            other => return Err(format!("it divides words as '{other}' does, which is not known here")),
        };
        let decoder = json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true });
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": ignores_merges,
            "vocab": self.vocabulary(|_, token| token.to_owned()), "merges": merges,
        });
        Ok(self.json(normalizer, pre, self.around(false, false), decoder, model))
    }

    /// Pieces of SentencePiece as byte pairs, merged by their scores.
    fn sentence_pieces(&self) -> Result<Json, String> {
        let scores = self.get("scores").and_then(Value::as_array).ok_or("it has no scores")?;
        let scores: Vec<f64> = scores.iter().map(|score| score.as_f64().unwrap_or_default()).collect();
        if scores.len() != self.tokens.len() {
            return Err(format!("{} scores for {} tokens", scores.len(), self.tokens.len()));
        }
        let numbers: HashMap<&str, usize> = self.tokens.iter().enumerate().map(|(id, token)| (*token, id)).collect();
        let mut merges: Vec<(f64, &str, &str)> = vec![];
        for (token, score) in self.tokens.iter().zip(scores) {
            let mut own: Vec<(usize, usize, &str, &str)> = token
                .char_indices()
                .skip(1)
                .filter_map(|(at, _)| {
                    let (left, right) = token.split_at(at);
                    Some((*numbers.get(left)?, *numbers.get(right)?, left, right))
                })
                .collect();
            own.sort_by_key(|(left, right, ..)| (*left, *right));
            merges.extend(own.into_iter().map(|(_, _, left, right)| (score, left, right)));
        }
        let lengths = |(_, left, right): &(f64, &str, &str)| (left.chars().count(), right.chars().count());
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| lengths(b).cmp(&lengths(a))));
        let merges: Vec<[&str; 2]> = merges.into_iter().map(|(_, left, right)| [left, right]).collect();
        let prefixed = self.is("add_space_prefix", true);
        let replace = |from: &str, to: &str| json!({ "type": "Replace", "pattern": { "String": from }, "content": to });
        let prepend = prefixed.then(|| json!({ "type": "Prepend", "prepend": WORD }));
        let normalizers: Vec<Json> = prepend.into_iter().chain([replace(" ", WORD)]).collect();
        let mut decoders = vec![replace(WORD, " "), json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })];
        if prefixed {
            decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
        }
        let unknown = self.special("unknown").map(|(text, _)| text);
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": self.vocabulary(|_, token| token.to_owned()), "merges": merges,
        });
        let normalizer = json!({ "type": "Sequence", "normalizers": normalizers });
        let decoder = json!({ "type": "Sequence", "decoders": decoders });
        Ok(self.json(normalizer, Json::Null, self.around(true, false), decoder, model))
    }

    /// BERT's word pieces, of which llama.cpp marks those that begin a word, and BERT those that do not.
    fn word_pieces(&self) -> Json {
        let vocabulary = self.vocabulary(|id, token| match token.strip_prefix(WORD) {
            Some(word) => word.to_owned(),
            None if self.kind(id) == CONTROL => token.to_owned(),
            None => format!("##{token}"),
        });
        let unknown = self.special("unknown").map_or("[UNK]", |(text, _)| text);
        let model = json!({
            "type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        });
        let normalizer = json!({
            "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
            "lowercase": true,
        });
        let first = self.special("cls").or_else(|| self.special("bos"));
        let last = self.special("seperator").or_else(|| self.special("separator")).or_else(|| self.special("eos"));
        let decoder = json!({ "type": "WordPiece", "prefix": "##", "cleanup": true });
        self.json(normalizer, json!({ "type": "BertPreTokenizer" }), self.template(first, last), decoder, model)
    }

    fn configuration(&self) -> Json {
        let mut config = Map::new();
        config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        config.insert("clean_up_tokenization_spaces".into(), json!(false));
        let names =
            [("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad"), ("cls", "cls"), ("mask", "mask")];
        for (theirs, ours) in names {
            if let Some((text, _)) = self.special(theirs) {
                config.insert(format!("{ours}_token"), json!(text));
            }
        }
        if let Some((text, _)) = self.special("seperator").or_else(|| self.special("separator")) {
            config.insert("sep_token".into(), json!(text));
        }
        if let Some(template) = self.metadata.get("tokenizer.chat_template").and_then(Value::as_str) {
            config.insert("chat_template".into(), json!(template));
        }
        let architecture = self.metadata.get("general.architecture").and_then(Value::as_str).unwrap_or_default();
        let length = self.metadata.get(&format!("{architecture}.context_length")).and_then(Value::as_usize);
        if let Some(length) = length {
            config.insert("model_max_length".into(), json!(length));
        }
        Json::Object(config)
    }
}
