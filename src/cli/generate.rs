//! `generate`: texts gone on with by a language model, straight from the store.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::Context;
use super::language::{RunArgs, cache_type};
use super::signals::cancel_on_interrupt;
use crate::architectures::{CacheType, ChatMessage, Generation, GenerationOptions, LanguageModel, Sampling, Session};
use crate::error::{Error, Result};
use crate::formats;
use crate::staged;
use crate::tasks::unwrap_join;

#[derive(Debug, Args)]
pub struct GenerateArgs {
    model: String,
    /// The text to go on with.
    #[arg(long, value_name = "TEXT", required_unless_present = "prompts")]
    prompt: Option<String>,
    /// Texts to go on with at once, one a line, UTF-8; what is added to each is printed when all are done.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompts: Option<PathBuf>,
    /// Write it as the message of a conversation, by the model's chat template.
    #[arg(long)]
    chat: bool,
    /// How many tokens are added at most.
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,
    /// Draw tokens, from shares that this makes flatter or steeper; 0 takes the likeliest.
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = temperature)]
    temperature: f32,
    /// Draw from so many of the likeliest tokens; 0 for all.
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Draw from the likeliest tokens that have this share together.
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = share)]
    top_p: f32,
    /// Of the draws; of several texts, that of the first, and each next one has the next.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// What keys and values of the tokens so far are kept as: f16 takes half the memory of f32, int8 a quarter.
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = cache_type)]
    cache_type: CacheType,
    /// A .safetensors in which keys and values are kept: read where it is there, and as far as the prompt begins as the text in it does;
    /// written at the end. One of another model is refused.
    #[arg(long, value_name = "FILE", conflicts_with = "prompts")]
    prompt_cache: Option<PathBuf>,
    #[command(flatten)]
    run: RunArgs,
}

/// A number from 0 on.
fn temperature(given: &str) -> Result<f32, String> {
    given.parse().ok().filter(|t: &f32| t.is_finite() && *t >= 0.0).ok_or_else(|| "expected a number from 0 on".into())
}

/// A number above 0, and 1 at most.
fn share(given: &str) -> Result<f32, String> {
    given.parse().ok().filter(|p| *p > 0.0 && *p <= 1.0).ok_or_else(|| "expected a number above 0, at most 1".into())
}

#[derive(Serialize)]
struct Generated {
    prompt: String,
    #[serde(flatten)]
    generation: Generation,
}

#[derive(Serialize)]
struct AllGenerated {
    generations: Vec<Generated>,
}

pub async fn generate(context: &Context, args: GenerateArgs) -> Result<u8> {
    args.prompt_cache.as_deref().map_or(Ok(()), staged::probe)?;
    let texts = match (&args.prompt, &args.prompts) {
        (Some(prompt), _) => vec![prompt.clone()],
        (None, Some(file)) => lines(file)?,
        (None, None) => vec![],
    };
    let snapshot = context.snapshot_to_run().await?;
    let cancel = cancel_on_interrupt();
    let model = cancel.unless(args.run.language_model(&snapshot, &args.model)).await?;
    let tokens = |text: &String| match args.chat {
        true => model.chat_tokens(&[ChatMessage { role: "user".into(), content: text.clone() }]),
        false => model.tokens(text),
    };
    let prompts = texts.iter().map(tokens).collect::<Result<Vec<_>>>()?;
    if let Some(place) = prompts.iter().position(Vec::is_empty) {
        let what = if args.prompts.is_some() { format!("line {} of --prompts", place + 1) } else { "--prompt".into() };
        return Err(Error::expected(what, "no tokens", "a text of one token at least"));
    }
    let options = GenerationOptions {
        max_tokens: args.max_tokens,
        sampling: Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed },
        accuracy: args.run.accuracy(),
        cache: args.cache_type,
        cancel,
    };
    let output = context.output;
    if args.prompts.is_some() {
        let work = move || model.generate_all(&prompts, &options, |_, _| ());
        let generations = unwrap_join(tokio::task::spawn_blocking(work).await)??;
        note_speed(context, &generations);
        let pairs = texts.into_iter().zip(generations);
        let all =
            AllGenerated { generations: pairs.map(|(prompt, generation)| Generated { prompt, generation }).collect() };
        context.output.result(&all, |all| {
            let one = |Generated { prompt, generation }: &Generated| format!("> {prompt}\n{}\n", generation.text);
            all.generations.iter().map(one).collect::<Vec<_>>().join("\n")
        })?;
        return Ok(0);
    }
    let (cache, prompt) = (args.prompt_cache.clone(), prompts.concat());
    let work = move || {
        let mut session = begin(&model, cache.as_deref(), options.cache)?;
        let generation = model.generate_in(&mut session, &prompt, &options, |text| output.piece(text))?;
        cache.map_or(Ok(()), |path| session.save(&path))?;
        Ok::<_, Error>(generation)
    };
    let generation = unwrap_join(tokio::task::spawn_blocking(work).await)??;
    context.output.ended(&generation)?;
    note_speed(context, std::slice::from_ref(&generation));
    Ok(0)
}

/// Texts, one a line.
fn lines(file: &Path) -> Result<Vec<String>> {
    let lines: Vec<String> = formats::read_text(file)?.lines().map(str::to_owned).collect();
    match lines.is_empty() {
        true => Err(Error::expected(format!("texts of {}", file.display()), "none", "one text a line")),
        false => Ok(lines),
    }
}

/// Reads the session of a file that is there, whose keys and values have to be kept as they are to be, or begins one.
fn begin(model: &LanguageModel, file: Option<&Path>, kind: CacheType) -> Result<Session> {
    let there = file.filter(|file| std::fs::metadata(file).is_ok_and(|there| there.len() > 0));
    let Some(file) = there else { return Ok(model.session(kind)) };
    let session = model.open_session(file)?;
    match session.kind() == kind {
        true => Ok(session),
        false => {
            let expected = format!("{kind}, as --cache-type says");
            Err(Error::expected(format!("keys and values of {}", file.display()), session.kind(), expected))
        }
    }
}

/// Says how fast texts that were gone on with at once were read and written.
fn note_speed(context: &Context, generations: &[Generation]) {
    let Some(first) = generations.first() else { return };
    let all = |of: fn(&Generation) -> usize| generations.iter().map(of).sum::<usize>();
    let (read, cached) = (all(|g| g.prompt_tokens - g.cached_tokens), all(|g| g.cached_tokens));
    let written = all(|g| g.tokens.len());
    let speed = |tokens: usize, seconds: f64| if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
    let there = if cached > 0 { format!(", {cached} were there") } else { String::new() };
    context.output.note(format!(
        "note: {read} tokens read at {:.1} a second{there}, {written} written at {:.1}",
        speed(read, first.prompt_seconds),
        speed(written, first.seconds),
    ));
}
