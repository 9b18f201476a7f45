//! Texts that a model has read, kept so that it can go on with them; in memory, or in a file.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use layerstore_core::layer::parts::Tensor;
use layerstore_core::layer::{dtype_name, dtype_named};
use layerstore_core::transformer::{CacheType, KvCache};
use safetensors::tensor::TensorView;

use super::language_model::LanguageModel;
use crate::error::{Error, Result};
use crate::formats::{SafetensorsSource, TensorSource};
use crate::layer::DType;
use crate::staged;

/// The metadata that names the model whose keys and values a file holds.
const MODEL: &str = "layerstore:session";

/// What keys and values are kept as.
const KIND: &str = "layerstore:cache";

/// The hash of tokens, keys and values.
const HASH: &str = "layerstore:blake3";

/// The tensor of the text's tokens.
const TOKENS: &str = "tokens";

/// A text that a language model has read: its tokens, and their keys and values.
#[derive(Debug, Clone, PartialEq)]
pub struct Session {
    pub(super) tokens: Vec<u32>,
    pub(super) cache: KvCache,
    /// Of the model.
    fingerprint: String,
}

impl Session {
    /// Returns the text's tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Returns what keys and values are kept as.
    pub fn kind(&self) -> CacheType {
        self.cache.kind()
    }

    /// Returns the bytes that keys and values take.
    pub fn memory_bytes(&self) -> usize {
        self.cache.memory_bytes()
    }

    /// Refuses to go on in a session of another model, or of this one with other layers or settings.
    pub(super) fn check(&self, model: &LanguageModel) -> Result<()> {
        match self.fingerprint == model.fingerprint() {
            true => Ok(()),
            false => Err(Error::expected(
                "session",
                "one of another model, or of this one with other layers or other activations",
                "one of this model",
            )),
        }
    }

    /// Forgets all tokens but those that `prompt` begins with; one at least is left to be read. Returns how many are kept.
    pub(super) fn keep(&mut self, prompt: &[u32]) -> usize {
        let same = self.tokens.iter().zip(prompt).take_while(|(own, other)| own == other).count();
        self.cache.truncate(same.min(prompt.len().saturating_sub(1)));
        self.tokens.truncate(self.cache.len());
        self.tokens.len()
    }

    /// Writes the session to a safetensors file, which [`LanguageModel::open_session`] reads; the file appears whole or not at all.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let wrong = |e: safetensors::SafeTensorError| Error::file(path, e.to_string());
        let tokens: Vec<u8> = self.tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        let tensors = self.cache.to_tensors();
        let mut views = BTreeMap::new();
        let tokens = TensorView::new(DType::U32, vec![self.tokens.len()], &tokens).map_err(wrong)?;
        views.insert(TOKENS, tokens);
        for Tensor { name, dtype, shape, data } in &tensors {
            let view = TensorView::new(dtype_named(dtype)?, shape.clone(), data).map_err(wrong)?;
            views.insert(name, view);
        }
        let about = HashMap::from([
            (MODEL.to_owned(), self.fingerprint.clone()),
            (KIND.to_owned(), self.cache.kind().to_string()),
            (HASH.to_owned(), hash(views.iter().map(|(name, view)| (*name, view.data())))),
        ]);
        staged::write(path, |staged| safetensors::serialize_to_file(views, Some(about), staged).map_err(wrong))?;
        Ok(())
    }
}

/// Returns the hash of tensors, which come by name.
fn hash<'a>(tensors: impl Iterator<Item = (&'a str, &'a [u8])>) -> String {
    let mut hasher = blake3::Hasher::new();
    for (name, data) in tensors {
        hasher.update(name.as_bytes()).update(&[0]).update(&(data.len() as u64).to_le_bytes()).update(data);
    }
    hasher.finalize().to_hex().to_string()
}

impl LanguageModel {
    /// Returns a session of no tokens, whose keys and values are kept like this.
    pub fn session(&self, kind: CacheType) -> Session {
        Session { tokens: vec![], cache: self.decoder().cache(kind), fingerprint: self.fingerprint().to_owned() }
    }

    /// Reads a session that [`Session::save`] wrote.
    ///
    /// # Errors
    /// When the file cannot be read, is damaged or no session, or is one of another model, or of this one with other layers or settings.
    pub fn open_session(&self, path: &Path) -> Result<Session> {
        let file = SafetensorsSource::open_file(path)?;
        match file.metadata().get(MODEL) {
            Some(found) if found == self.fingerprint() => {}
            Some(_) => {
                let reason = "the session in it is of another model, or of this one with other layers or other \
                              activations; expected one of this model, or no file, to begin one";
                return Err(Error::file(path, reason));
            }
            None => {
                return Err(Error::file(path, "there is no session in it; expected one, or no file, to begin one"));
            }
        }
        let all = file.tensors().iter().map(|(name, info)| Ok((name.as_str(), file.bytes(info)?)));
        let all = all.collect::<Result<Vec<_>>>()?;
        if file.metadata().get(HASH) != Some(&hash(all.iter().map(|(name, data)| (*name, &**data)))) {
            let reason = "found other bytes in the session than were written; expected a session as it was saved, or no \
                          file, to begin one";
            return Err(Error::file(path, reason));
        }
        let kind: CacheType = file.metadata().get(KIND).map_or("", String::as_str).parse()?;
        let get = |name: &str| {
            let tensor = file.tensors().get(name);
            let read = |info: &crate::formats::TensorInfo| {
                let (dtype, shape) = (dtype_name(info.dtype), info.shape.clone());
                Ok::<_, Error>(Tensor {
                    name: name.to_owned(),
                    dtype,
                    shape,
                    data: file.bytes(info)?.into_owned().into(),
                })
            };
            tensor.map(read).transpose()
        };
        let read = || {
            let tokens = get(TOKENS)?.filter(|tokens| tokens.dtype == "U32" && tokens.shape.len() == 1);
            let tokens = tokens.ok_or_else(|| Error::expected("tensor 'tokens'", "none", "U32 [tokens]"))?;
            let tokens: Vec<u32> = tokens.data.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
            if let Some(token) = tokens.iter().find(|token| **token as usize >= self.vocabulary()) {
                let expected = format!("below {}", self.vocabulary());
                return Err(Error::expected("token of the session", token, expected));
            }
            let cache = self.decoder().cache_from_tensors(kind, tokens.len(), get)?;
            Ok(Session { tokens, cache, fingerprint: self.fingerprint().to_owned() })
        };
        read().map_err(|e| match e {
            Error::Io { .. } | Error::File { .. } => e,
            other => Error::file(path, other.to_string()),
        })
    }
}
