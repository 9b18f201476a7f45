//! How fast a language model reads prompts and writes tokens, as llama-bench measures it.

use std::time::Instant;

use layerstore_core::transformer::{CacheType, Continuation, Logits};
use serde::Serialize;

use super::language_model::LanguageModel;
use crate::error::{Error, Result};
use crate::layer::Accuracy;
use crate::work::Cancel;

/// Tokens, and rounds, that are measured at most.
const MOST: usize = 1 << 20;

/// What is measured.
#[derive(Debug, Clone)]
pub struct SpeedOptions {
    /// Tokens of a prompt.
    pub prompt: usize,
    /// Tokens that are written one by one.
    pub generated: usize,
    /// How often each is measured.
    pub rounds: usize,
    /// Whether the layers run as their settings say, or at full accuracy.
    pub accuracy: Accuracy,
    /// What keys and values are kept as.
    pub cache: CacheType,
    /// Stops between two pieces of the work when the caller asks.
    pub cancel: Cancel,
}

impl Default for SpeedOptions {
    fn default() -> Self {
        SpeedOptions {
            prompt: 512,
            generated: 128,
            rounds: 5,
            accuracy: Accuracy::Approximate,
            cache: CacheType::F16,
            cancel: Cancel::new(),
        }
    }
}

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SpeedReport {
    /// Tokens of a prompt that are read in a second, of each round.
    pub prompt_tokens_per_second: Vec<f64>,
    /// Tokens that are written in a second, of each round.
    pub generated_tokens_per_second: Vec<f64>,
    /// Bytes that the layers take in memory.
    pub weight_bytes: usize,
    /// Bytes that keys and values of the longest text took.
    pub cache_bytes: usize,
}

impl LanguageModel {
    /// Measures the speed of prompts and of writing; the first round is not counted. Tokens are made up: which they are does not
    /// matter to the time.
    ///
    /// # Errors
    /// When a number is 0, a text would be longer than the model's context, or the work is cancelled.
    pub fn speed(&self, options: &SpeedOptions) -> Result<SpeedReport> {
        let SpeedOptions { prompt, generated, rounds, accuracy, cache, ref cancel } = *options;
        let numbers = [prompt, generated, rounds];
        if numbers.iter().any(|number| !(1..=MOST).contains(number)) {
            let expected = format!("numbers from 1 to {MOST}");
            return Err(Error::expected(
                "tokens of a prompt, tokens to write, and rounds",
                format!("{numbers:?}"),
                expected,
            ));
        }
        if let Some(context) = self.context().filter(|context| prompt.max(generated) > *context) {
            let expected = format!("at most {context}, the model's context");
            return Err(Error::expected("tokens to measure with", prompt.max(generated), expected));
        }
        let decoder = self.decoder();
        let token = |place: usize| (place * 37 % self.vocabulary()) as u32;
        let tokens: Vec<u32> = (0..prompt.max(generated)).map(token).collect();
        let (mut read, mut written, mut cache_bytes, mut logits) = (vec![], vec![], 0, vec![]);
        for round in 0..=rounds {
            let since = Instant::now();
            let mut own = decoder.cache(cache);
            let mut step = |tokens: &[u32], own: &mut _| match cancel.is_cancelled() {
                true => Err(Error::Cancelled),
                false => {
                    let text = Continuation { tokens, cache: own };
                    decoder.forward_into(&mut [text], Logits::Last, accuracy, &mut logits)
                }
            };
            for tokens in tokens[..prompt].chunks(512) {
                step(tokens, &mut own)?;
            }
            let reading = since.elapsed().as_secs_f64();
            cache_bytes = cache_bytes.max(own.memory_bytes());
            let mut own = decoder.cache(cache);
            own.reserve(generated);
            let since = Instant::now();
            for token in &tokens[..generated] {
                step(&[*token], &mut own)?;
            }
            if round > 0 {
                read.push(prompt as f64 / reading);
                written.push(generated as f64 / since.elapsed().as_secs_f64());
            }
            cache_bytes = cache_bytes.max(own.memory_bytes());
        }
        Ok(SpeedReport {
            prompt_tokens_per_second: read,
            generated_tokens_per_second: written,
            weight_bytes: self.memory_bytes(),
            cache_bytes,
        })
    }
}
