//! The tokenizer and the chat template that are stored with a model.

use bytes::Bytes;
use minijinja::{Environment, Error as TemplateError, ErrorKind as TemplateErrorKind};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokenizers::{Tokenizer, TruncationParams};

use crate::error::{Error, Result};

/// A message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// Who says it, as the model's template calls them: `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// Texts to tokens, and back.
#[derive(Debug)]
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    /// The `tokenizer_config.json`.
    config: Value,
    template: Option<String>,
    limit: Option<usize>,
}

impl TextTokenizer {
    /// Reads a `tokenizer.json`, and what lies beside it.
    ///
    /// # Errors
    /// When a file is not what its name says.
    pub fn new(tokenizer: &Bytes, config: Option<&Bytes>, template: Option<&Bytes>) -> Result<Self> {
        let wrong = |what: &str, e: String| Error::expected(what, e, "what tokenizers reads");
        let mut tokenizer = Tokenizer::from_bytes(tokenizer).map_err(|e| wrong("tokenizer.json", e.to_string()))?;
        // Texts are neither filled up nor cut off unless somebody asks for it.
        let limit = tokenizer.get_truncation().map(|truncation| truncation.max_length);
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| wrong("tokenizer.json", e.to_string()))?;
        let config: Value = match config {
            Some(config) => {
                serde_json::from_slice(config).map_err(|e| wrong("tokenizer_config.json", e.to_string()))?
            }
            None => Value::Null,
        };
        let template = match template {
            Some(template) => Some(String::from_utf8_lossy(template).into_owned()),
            None => config["chat_template"].as_str().map(str::to_owned),
        };
        Ok(TextTokenizer { tokenizer, config, template, limit })
    }

    /// Returns the length that the tokenizer's file has texts cut off at.
    pub fn limit(&self) -> Option<usize> {
        self.limit
    }

    /// Returns the same tokenizer, which cuts texts off at so many tokens, those around them counted.
    ///
    /// # Errors
    /// When fewer tokens are left than are put around each text.
    pub fn cut_at(mut self, tokens: usize) -> Result<Self> {
        let truncation = TruncationParams { max_length: tokens, ..TruncationParams::default() };
        let cut = self.tokenizer.with_truncation(Some(truncation)).map(drop);
        cut.map_err(|e| Error::expected("tokens to cut texts off at", tokens, format!("room for special ones: {e}")))?;
        Ok(self)
    }

    /// Returns a text's tokens, with those that the tokenizer puts around it.
    ///
    /// # Errors
    /// When the tokenizer refuses the text.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoded = self.tokenizer.encode_fast(text, special);
        let encoded =
            encoded.map_err(|e| Error::expected("text to divide into tokens", e, "one that the tokenizer takes"))?;
        Ok(encoded.get_ids().to_vec())
    }

    /// Returns the text of tokens, without special ones.
    ///
    /// # Errors
    /// When the tokenizer refuses them.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        let text = self.tokenizer.decode(tokens, true);
        text.map_err(|e| Error::expected("tokens to make text of", e, "those of the tokenizer"))
    }

    /// Returns a conversation as the model's template writes it, up to where the model is to answer.
    ///
    /// # Errors
    /// When the model has no template, or it cannot be followed.
    pub fn chat(&self, messages: &[ChatMessage]) -> Result<String> {
        let Some(template) = &self.template else {
            return Err(Error::expected("chat template of the model", "none", "one beside its tokenizer"));
        };
        let mut environment = Environment::new();
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.add_function("raise_exception", |message: String| -> std::result::Result<String, TemplateError> {
            Err(TemplateError::new(TemplateErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| chrono::Utc::now().format(&format).to_string());
        let token = |name: &str| {
            let token = &self.config[name];
            token.as_str().or_else(|| token["content"].as_str()).unwrap_or_default().to_owned()
        };
        let context = minijinja::context! {
            messages => messages,
            add_generation_prompt => true,
            bos_token => token("bos_token"),
            eos_token => token("eos_token"),
        };
        let written = environment.render_str(template, context);
        written.map_err(|e| Error::expected("chat template of the model", format!("{e:#}"), "one that can be followed"))
    }
}
