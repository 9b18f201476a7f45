//! Texts gone on with, token by token.

use std::time::Instant;

use layerstore_core::transformer::{CacheType, Continuation, KvCache, Logits};
use serde::Serialize;

use super::language_model::LanguageModel;
use super::sampling::{Sampler, Sampling};
use super::session::Session;
use crate::error::{Error, Result};
use crate::layer::Accuracy;
use crate::work::Cancel;

/// Tokens of a prompt that are read at a time.
const PIECE: usize = 512;

/// Tokens that a cache has room for before they are there.
const MOST_RESERVED: usize = 4096;

/// How a text is gone on with.
#[derive(Debug, Clone)]
pub struct GenerationOptions {
    /// Tokens that are added at most.
    pub max_tokens: usize,
    /// How each is chosen.
    pub sampling: Sampling,
    /// Whether the layers run as their settings say, or at full accuracy.
    pub accuracy: Accuracy,
    /// What keys and values of the tokens so far are kept as; of a [`Session`] that has begun, what its own are.
    pub cache: CacheType,
    /// Stops between two tokens when the caller asks.
    pub cancel: Cancel,
}

impl Default for GenerationOptions {
    fn default() -> Self {
        GenerationOptions {
            max_tokens: 128,
            sampling: Sampling::default(),
            accuracy: Accuracy::Approximate,
            cache: CacheType::F32,
            cancel: Cancel::new(),
        }
    }
}

/// What was added to a text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Generation {
    /// The text that was added.
    pub text: String,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Tokens of the text before.
    pub prompt_tokens: usize,
    /// Those of them whose keys and values were there already, from a session.
    pub cached_tokens: usize,
    /// Whether the model ended the text by itself.
    pub ended: bool,
    /// Time that the text before took, in seconds; of texts that were gone on with at once, that of all of them.
    pub prompt_seconds: f64,
    /// Time that what was added took, in seconds, likewise.
    pub seconds: f64,
}

/// A text that is being written.
struct Writing {
    sampler: Sampler,
    limit: usize,
    tokens: Vec<u32>,
    /// Bytes of text that were told, and the tokens before those whose text may still change.
    told: Told,
    ended: bool,
}

/// What of a text was told.
#[derive(Default)]
struct Told {
    /// Tokens from here on are decoded: their text follows that of tokens before, and what follows it hangs on them.
    from: usize,
    /// Of these, the text is told.
    to: usize,
}

impl Writing {
    fn is_done(&self) -> bool {
        self.ended || self.tokens.len() >= self.limit
    }

    /// Chooses the next token; `None` where the text is at its end.
    fn choose(&mut self, model: &LanguageModel, logits: &[f32], each: &mut dyn FnMut(&str)) -> Result<Option<u32>> {
        if self.is_done() {
            return Ok(None);
        }
        let token = self.sampler.choose(logits);
        if model.ends(token) {
            self.ended = true;
            return Ok(None);
        }
        self.tokens.push(token);
        if model.has_tokenizer() {
            let Told { from, to } = self.told;
            let before = model.text(&self.tokens[from..to])?;
            let all = model.text(&self.tokens[from..])?;
            // What is half a character is told with the rest of it.
            if let Some(more) = all.strip_prefix(&before).filter(|more| !more.is_empty() && !more.ends_with('\u{fffd}'))
            {
                each(more);
                self.told = Told { from: to, to: self.tokens.len() };
            }
        }
        Ok((!self.is_done()).then_some(token))
    }
}

impl LanguageModel {
    /// Goes on with tokens, one after another, until the model ends the text, or `max_tokens` are there. `each` is told each token's
    /// text, in pieces of whole characters.
    ///
    /// # Errors
    /// When there are no tokens, the text would be longer than the model's context, or the work is cancelled.
    pub fn generate(&self, prompt: &[u32], options: &GenerationOptions, each: impl FnMut(&str)) -> Result<Generation> {
        self.generate_in(&mut self.session(options.cache), prompt, options, each)
    }

    /// Goes on with tokens as [`LanguageModel::generate`] does, in a session: as many of the prompt's first tokens as the session holds
    /// already are not read again, and what it holds beyond them is forgotten. Afterwards it holds the prompt and what was added to it.
    ///
    /// # Errors
    /// As [`LanguageModel::generate`], the session then holds the tokens that were read; and when the session is of another model.
    pub fn generate_in(
        &self,
        session: &mut Session,
        prompt: &[u32],
        options: &GenerationOptions,
        mut each: impl FnMut(&str),
    ) -> Result<Generation> {
        session.check(self)?;
        let mut writing = self.begin(prompt, options, 0)?;
        let mut logits = vec![];
        let cached = session.keep(prompt);
        session.cache.expect(prompt.len());
        session.cache.reserve(prompt.len() - cached + writing.limit.min(MOST_RESERVED));
        let started = Instant::now();
        self.read(session, &prompt[cached..], options, &mut logits)?;
        let prompt_seconds = started.elapsed().as_secs_f64();
        let started = Instant::now();
        while let Some(token) = writing.choose(self, &logits, &mut each)? {
            self.read(session, &[token], options, &mut logits)?;
        }
        self.end(writing, prompt.len(), cached, [prompt_seconds, started.elapsed().as_secs_f64()])
    }

    /// Goes on with several texts at once: each weight is read once for a token of all of them. Each is what
    /// [`LanguageModel::generate`] makes of it, to rounding; the draws of text N are those of the seed plus N. `each` is told which text
    /// a piece belongs to.
    ///
    /// # Errors
    /// As [`LanguageModel::generate`].
    pub fn generate_all(
        &self,
        prompts: &[Vec<u32>],
        options: &GenerationOptions,
        mut each: impl FnMut(usize, &str),
    ) -> Result<Vec<Generation>> {
        let begin = |(number, prompt): (usize, &Vec<u32>)| self.begin(prompt, options, number as u64);
        let mut writings = prompts.iter().enumerate().map(begin).collect::<Result<Vec<_>>>()?;
        let mut caches: Vec<KvCache> = vec![];
        let (mut logits, mut next) = (vec![], vec![]);
        let started = Instant::now();
        for (number, (prompt, writing)) in prompts.iter().zip(&mut writings).enumerate() {
            let mut session = self.session(options.cache);
            session.cache.expect(prompt.len());
            session.cache.reserve(prompt.len() + writing.limit.min(MOST_RESERVED));
            self.read(&mut session, prompt, options, &mut logits)?;
            next.push(writing.choose(self, &logits, &mut |text| each(number, text))?);
            caches.push(session.cache);
        }
        let prompt_seconds = started.elapsed().as_secs_f64();
        let started = Instant::now();
        let vocabulary = self.vocabulary();
        while next.iter().any(Option::is_some) {
            if options.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let pairs = next.iter().zip(&mut caches).enumerate();
            let going = pairs.filter_map(|(number, (token, cache))| token.as_ref().map(|token| (number, token, cache)));
            let (mut numbers, mut texts) = (vec![], vec![]);
            for (number, token, cache) in going {
                numbers.push(number);
                texts.push(Continuation { tokens: std::slice::from_ref(token), cache });
            }
            self.decoder().forward_into(&mut texts, Logits::Last, options.accuracy, &mut logits)?;
            for (number, logits) in numbers.into_iter().zip(logits.chunks_exact(vocabulary)) {
                next[number] = writings[number].choose(self, logits, &mut |text| each(number, text))?;
            }
        }
        let seconds = [prompt_seconds, started.elapsed().as_secs_f64()];
        let end = |(writing, prompt): (Writing, &Vec<u32>)| self.end(writing, prompt.len(), 0, seconds);
        writings.into_iter().zip(prompts).map(end).collect()
    }

    /// Checks a prompt, and begins the text that follows it.
    fn begin(&self, prompt: &[u32], options: &GenerationOptions, number: u64) -> Result<Writing> {
        if prompt.is_empty() {
            return Err(Error::expected("tokens of the prompt", "none", "one at least"));
        }
        if let Some(context) = self.context().filter(|context| prompt.len() > *context) {
            let expected = format!("at most {context}, the model's context");
            return Err(Error::expected("tokens of the prompt", prompt.len(), expected));
        }
        let room = self.context().map_or(usize::MAX, |context| context - prompt.len());
        let seed = options.sampling.seed.wrapping_add(number);
        Ok(Writing {
            sampler: Sampler::new(Sampling { seed, ..options.sampling.clone() }),
            limit: options.max_tokens.min(room),
            tokens: vec![],
            told: Told::default(),
            ended: false,
        })
    }

    fn end(
        &self,
        writing: Writing,
        prompt_tokens: usize,
        cached_tokens: usize,
        seconds: [f64; 2],
    ) -> Result<Generation> {
        let Writing { tokens, ended, .. } = writing;
        let text = if self.has_tokenizer() { self.text(&tokens)? } else { String::new() };
        let [prompt_seconds, seconds] = seconds;
        Ok(Generation { text, tokens, prompt_tokens, cached_tokens, ended, prompt_seconds, seconds })
    }

    /// Reads tokens that follow those of the session; the logits of what comes next replace what is in `logits`.
    fn read(
        &self,
        session: &mut Session,
        tokens: &[u32],
        options: &GenerationOptions,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        // In pieces, so that a long prompt can be given up.
        for tokens in tokens.chunks(PIECE) {
            if options.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let text = Continuation { tokens, cache: &mut session.cache };
            let read = self.decoder().forward_into(&mut [text], Logits::Last, options.accuracy, logits);
            if read.is_ok() {
                session.tokens.extend_from_slice(tokens);
            }
            session.tokens.truncate(session.cache.len());
            read?;
        }
        Ok(())
    }
}
