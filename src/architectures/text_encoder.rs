//! Text encoders of a snapshot: texts to vectors.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use layerstore_core::transformer::Encoder;
use ndarray::{Array1, Array2, ArrayView2, Axis};
use serde::Serialize;
use serde_json::Value;

use super::bert::{bert, encoder};
use super::open::{OpenModel, rounding};
use super::tokenizer::TextTokenizer;
use crate::error::{Error, Result};
use crate::layer::{Accuracy, ActivationFormat};
use crate::store::Snapshot;
use crate::work::Cancel;

/// Texts that are worked on between two looks whether to stop.
const AT_ONCE: usize = 16;

/// How the features of a text's tokens become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// Those of the first token.
    Cls,
    /// Those of the last token.
    Last,
}

impl fmt::Display for Pooling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Pooling::Mean => "mean",
            Pooling::Cls => "cls",
            Pooling::Last => "last",
        })
    }
}

impl FromStr for Pooling {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        [Pooling::Mean, Pooling::Cls, Pooling::Last]
            .into_iter()
            .find(|pooling| pooling.to_string() == name)
            .ok_or_else(|| Error::expected("pooling", format!("'{name}'"), "mean, cls or last"))
    }
}

/// A text encoder, ready to run: its layers of any method, straight from the store. Cloning shares them.
#[derive(Debug, Clone)]
pub struct TextEncoder {
    encoder: Arc<Encoder>,
    tokenizer: Option<Arc<TextTokenizer>>,
    pooling: Pooling,
    normalize: bool,
}

/// How texts are encoded.
#[derive(Debug, Clone, Default)]
pub struct EncodingOptions {
    /// Whether the layers run as their settings say, or at full accuracy.
    pub accuracy: Accuracy,
    /// Stops between some texts when the caller asks.
    pub cancel: Cancel,
}

impl Snapshot {
    /// Opens a model as a text encoder: its `config.json` says which layers make it up, `1_Pooling/config.json` how the features of
    /// tokens become a vector, and `modules.json` whether that has a length of 1; without those files it is the mean, of length 1.
    /// All layers are loaded.
    ///
    /// # Errors
    /// When there is no such model, its configuration is missing or of a kind that is not run here, or a layer is missing or does not
    /// fit: the message says which.
    pub async fn encoder(&self, model: &str) -> Result<TextEncoder> {
        let opened = OpenModel::new(self, model).await?;
        let config = bert(&opened.config().await?)?;
        let pooling = opened.json("1_Pooling/config.json").await?;
        let normalize = match opened.json("modules.json").await? {
            Some(modules) => {
                let kinds = modules.as_array().into_iter().flatten().filter_map(|module| module["type"].as_str());
                kinds.filter(|kind| kind.ends_with(".Normalize")).count() > 0
            }
            None => true,
        };
        let encoder = encoder(&opened, &config).await?;
        let asked = opened.json("sentence_bert_config.json").await?;
        let asked = asked.and_then(|settings| settings["max_seq_length"].as_u64()).map(|n| n as usize);
        let tokenizer = match opened.tokenizer().await? {
            Some(tokenizer) => {
                let limit = asked.or(tokenizer.limit()).unwrap_or(usize::MAX).min(encoder.context());
                Some(Arc::new(tokenizer.cut_at(limit)?))
            }
            None => None,
        };
        let pooling = pooling.as_ref().map_or(Ok(Pooling::Mean), pooling_of)?;
        Ok(TextEncoder { encoder: Arc::new(encoder), tokenizer, pooling, normalize })
    }
}

/// Reads the pooling of sentence-transformers.
fn pooling_of(config: &Value) -> Result<Pooling> {
    let is = |key: &str| config[format!("pooling_mode_{key}")] == true;
    let known = [("mean_tokens", Pooling::Mean), ("cls_token", Pooling::Cls), ("lasttoken", Pooling::Last)];
    let found: Vec<Pooling> = known.iter().filter(|(key, _)| is(key)).map(|(_, pooling)| *pooling).collect();
    let others: Vec<&str> =
        ["max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens"].into_iter().filter(|key| is(key)).collect();
    match (&found[..], &others[..]) {
        ([pooling], []) => Ok(*pooling),
        _ => {
            let found = format!("{} known ones, and {others:?}", found.len());
            Err(Error::expected(
                "pooling of 1_Pooling/config.json",
                found,
                "one of mean_tokens, cls_token and lasttoken",
            ))
        }
    }
}

impl TextEncoder {
    /// Returns the same encoder with another pooling.
    pub fn with_pooling(&self, pooling: Pooling) -> Self {
        TextEncoder { pooling, ..self.clone() }
    }

    /// Returns the same encoder, whose vectors have a length of 1, or not.
    pub fn with_normalize(&self, normalize: bool) -> Self {
        TextEncoder { normalize, ..self.clone() }
    }

    /// Returns the same encoder, its packed layers' inputs rounded like this whatever their own settings say. Layers whose weights are
    /// floats run as they do.
    ///
    /// # Errors
    /// When a layer refuses the setting.
    pub fn with_activations(&self, activations: ActivationFormat) -> Result<Self> {
        let encoder = self.encoder.with_layers(|layer| rounding(layer, activations))?;
        Ok(TextEncoder { encoder: Arc::new(encoder), ..self.clone() })
    }

    /// Returns how the features of tokens become a vector.
    pub fn pooling(&self) -> Pooling {
        self.pooling
    }

    /// Returns the length of a vector.
    pub fn features(&self) -> usize {
        self.encoder.features()
    }

    /// Returns the memory that the layers take, in bytes.
    pub fn memory_bytes(&self) -> usize {
        self.encoder.memory_bytes()
    }

    /// Returns the tokens of a text, with those that the tokenizer puts around it, cut off where the model's files say.
    ///
    /// # Errors
    /// When the model has no tokenizer.
    pub fn tokens(&self, text: &str) -> Result<Vec<u32>> {
        let missing = || Error::expected("tokenizer of the model", "none", "a tokenizer.json beside it");
        self.tokenizer.as_deref().ok_or_else(missing)?.encode(text, true)
    }

    /// Returns the features `[tokens, features]` of each text's tokens.
    ///
    /// # Errors
    /// When a text is empty or too long, or a token is not known.
    pub fn features_of(&self, texts: &[&[u32]], accuracy: Accuracy) -> Result<Vec<Array2<f32>>> {
        self.encoder.forward(texts, accuracy)
    }

    /// Returns a vector for each text, `[texts, features]`. `each` is told how many are done.
    ///
    /// # Errors
    /// When the model has no tokenizer, or the work is cancelled.
    pub fn encode<T: AsRef<str>>(
        &self,
        texts: &[T],
        options: &EncodingOptions,
        mut each: impl FnMut(usize),
    ) -> Result<Array2<f32>> {
        let mut vectors = Array2::zeros((texts.len(), self.features()));
        for (number, some) in texts.chunks(AT_ONCE).enumerate() {
            if options.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let tokens = some.iter().map(|text| self.tokens(text.as_ref())).collect::<Result<Vec<_>>>()?;
            let tokens: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
            for (place, features) in self.encoder.forward(&tokens, options.accuracy)?.into_iter().enumerate() {
                vectors.row_mut(number * AT_ONCE + place).assign(&self.pooled(features.view()));
            }
            each(number * AT_ONCE + some.len());
        }
        Ok(vectors)
    }

    /// One vector of the features of a text's tokens.
    fn pooled(&self, features: ArrayView2<f32>) -> Array1<f32> {
        let mut vector = match self.pooling {
            Pooling::Mean => features.mean_axis(Axis(0)).unwrap_or_default(),
            Pooling::Cls => features.row(0).to_owned(),
            Pooling::Last => features.row(features.nrows() - 1).to_owned(),
        };
        if self.normalize {
            let length = vector.iter().map(|v| v * v).sum::<f32>().sqrt();
            vector /= length.max(1e-12);
        }
        vector
    }
}
