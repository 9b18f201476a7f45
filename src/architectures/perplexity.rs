//! How well a language model foretells a text, and how far it is from another one, by llama.cpp's definitions.

use layerstore_core::transformer::{CacheType, Logits};
use ndarray::ArrayView1;
use serde::Serialize;

use super::language_model::LanguageModel;
use crate::error::{Error, Result};
use crate::layer::Accuracy;
use crate::work::Cancel;

/// Tokens whose logits are in memory at a time.
const PIECE: usize = 64;

/// How well a model foretells a text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Perplexity {
    /// e to the mean of −log p of the tokens that are counted.
    pub perplexity: f64,
    /// Tokens that are counted: of each window, those of its second half.
    pub tokens: usize,
    /// Windows that the text is divided into.
    pub windows: usize,
    /// How far the model is from the other one, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub against: Option<Divergence>,
}

/// How far a model's shares are from those of another, over the same tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Divergence {
    /// The other's perplexity.
    pub perplexity: f64,
    /// The mean of Σ q · log(q / p), q being the other's shares.
    pub mean_kl: f64,
    /// What 99 % of them are below.
    pub kl_99: f64,
    /// The share of tokens that both find likeliest.
    pub same_top: f64,
}

impl LanguageModel {
    /// Measures the perplexity of a text in windows of so many tokens, and with `against` the divergence from another model of the
    /// same tokens. A last window that is not full is left out, unless it is the only one.
    ///
    /// # Errors
    /// When the text has fewer than 4 tokens, the models do not have the same tokens, or the work is cancelled.
    pub fn perplexity(
        &self,
        tokens: &[u32],
        window: usize,
        against: Option<&LanguageModel>,
        accuracy: Accuracy,
        cancel: &Cancel,
        mut each: impl FnMut(usize, usize),
    ) -> Result<Perplexity> {
        if tokens.len() < 4 || window < 4 {
            let found = format!("{} in windows of {window}", tokens.len());
            return Err(Error::expected("tokens to measure a model on", found, "4 at least"));
        }
        if let Some(other) = against.filter(|other| other.vocabulary() != self.vocabulary()) {
            let expected = format!("{}, as the other has", self.vocabulary());
            return Err(Error::expected("tokens that the model to compare with knows", other.vocabulary(), expected));
        }
        let windows: Vec<&[u32]> = match tokens.len() < window {
            true => vec![tokens],
            false => tokens.chunks_exact(window).collect(),
        };
        let (mut own, mut others, mut divergences, mut same) = (vec![], vec![], vec![], 0usize);
        for (number, tokens) in windows.iter().enumerate() {
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            // In pieces: logits of a whole window would take much memory.
            let mut caches = [Some(self), against].map(|model| model.map(|m| m.decoder().cache(CacheType::F32)));
            caches.iter_mut().flatten().for_each(|cache| cache.expect(tokens.len() - 1));
            for (piece, read) in tokens[..tokens.len() - 1].chunks(PIECE).enumerate() {
                let mut of = |model: Option<&LanguageModel>, place: usize| {
                    let Some((model, cache)) = model.zip(caches[place].as_mut()) else { return Ok(None) };
                    // Tokens of the first half have little to go by.
                    let wanted = if (piece + 1) * PIECE < tokens.len() / 2 { Logits::Last } else { Logits::All };
                    model.decoder().forward(read, cache, wanted, accuracy).map(Some)
                };
                let (Some(logits), other) = (of(Some(self), 0)?, of(against, 1)?) else { continue };
                for row in 0..read.len() {
                    let place = piece * PIECE + row + 1;
                    if place < tokens.len() / 2 {
                        continue;
                    }
                    let token = tokens[place] as usize;
                    let p = log_shares(logits.row(row));
                    own.push(-p[token]);
                    if let Some(other) = &other {
                        let q = log_shares(other.row(row));
                        others.push(-q[token]);
                        divergences.push(q.iter().zip(&p).map(|(q, p)| q.exp() * (q - p)).sum::<f64>());
                        same += usize::from(place_of_most(&q) == place_of_most(&p));
                    }
                }
            }
            each(number + 1, windows.len());
        }
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let against = (!divergences.is_empty()).then(|| {
            let mean_kl = mean(&divergences);
            divergences.sort_by(f64::total_cmp);
            let place = (divergences.len() * 99 / 100).min(divergences.len() - 1);
            Divergence {
                perplexity: mean(&others).exp(),
                mean_kl,
                kl_99: divergences[place],
                same_top: same as f64 / divergences.len() as f64,
            }
        });
        Ok(Perplexity { perplexity: mean(&own).exp(), tokens: own.len(), windows: windows.len(), against })
    }
}

/// The logarithms of the shares that logits give.
fn log_shares(logits: ArrayView1<f32>) -> Vec<f64> {
    let most = logits.iter().fold(f32::NEG_INFINITY, |most, v| most.max(*v));
    let sum: f64 = logits.iter().map(|v| f64::from(v - most).exp()).sum();
    let log = f64::from(most) + sum.ln();
    logits.iter().map(|v| f64::from(*v) - log).collect()
}

fn place_of_most(values: &[f64]) -> usize {
    let mut best = 0;
    for (place, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = place;
        }
    }
    best
}
