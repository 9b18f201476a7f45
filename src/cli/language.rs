//! `perplexity` and `bench`: whole language models, straight from the store.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use serde::Serialize;

use super::Context;
use super::output::{bytes, table};
use super::signals::cancel_on_interrupt;
use crate::architectures::{CacheType, LanguageModel, Perplexity, SpeedOptions, SpeedReport};
use crate::error::Result;
use crate::formats;
use crate::layer::{Accuracy, ActivationFormat};
use crate::store::Snapshot;
use crate::tasks::unwrap_join;
use crate::work::Progress;

/// How a model's layers are run.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Run every layer at full accuracy, whatever its settings leave out.
    #[arg(long)]
    exact: bool,
    /// Round the inputs of packed layers, whatever their settings say: int8 is faster than f32, and off by 1/255 of an input's largest
    /// number at most.
    #[arg(long, value_name = "TYPE", value_parser = activations, conflicts_with = "exact")]
    activations: Option<ActivationFormat>,
}

fn activations(given: &str) -> Result<ActivationFormat, String> {
    serde_json::from_value(given.into()).map_err(|_| "expected f32, int8 or int8_absmax".into())
}

pub(super) fn cache_type(given: &str) -> Result<CacheType, String> {
    given.parse().map_err(|_| "expected f32, f16 or int8".into())
}

impl RunArgs {
    /// Returns whether layers may leave out what matters little.
    pub fn accuracy(&self) -> Accuracy {
        if self.exact { Accuracy::Full } else { Accuracy::Approximate }
    }

    /// Returns what inputs are to be rounded to, where that was asked for.
    pub fn activations(&self) -> Option<ActivationFormat> {
        self.activations
    }

    pub(super) async fn language_model(&self, snapshot: &Snapshot, model: &str) -> Result<LanguageModel> {
        let model = snapshot.language_model(model).await?;
        self.activations.map_or(Ok(model.clone()), |activations| model.with_activations(activations))
    }
}

#[derive(Debug, Args)]
pub struct PerplexityArgs {
    model: String,
    /// The text, UTF-8.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Also measure how far the model's shares are from those of this one.
    #[arg(long, value_name = "OTHER")]
    against: Option<String>,
    /// Tokens of a window, of which the second half is counted.
    #[arg(long, value_name = "N", default_value_t = 512)]
    window: usize,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Serialize)]
struct Measured {
    model: String,
    #[serde(flatten)]
    perplexity: Perplexity,
}

pub async fn perplexity(context: &Context, args: PerplexityArgs) -> Result<u8> {
    let text = formats::read_text(&args.text)?;
    let snapshot = context.snapshot_to_run().await?;
    let cancel = cancel_on_interrupt();
    let model = cancel.unless(args.run.language_model(&snapshot, &args.model)).await?;
    let against = match &args.against {
        Some(other) => Some(cancel.unless(args.run.language_model(&snapshot, other)).await?),
        None => None,
    };
    let tokens = model.tokens(&text)?;
    let window = args.window.min(model.context().unwrap_or(usize::MAX));
    let progress: Arc<dyn Progress> = Arc::new(context.output.progress());
    let (told, accuracy) = (progress.clone(), args.run.accuracy());
    let work = move || {
        let mut begun = false;
        model.perplexity(&tokens, window, against.as_ref(), accuracy, &cancel, |done, all| {
            if !begun {
                told.started(all, all as u64);
                begun = true;
            }
            told.layer(&format!("window {done}"));
            told.layer_done(1, false);
        })
    };
    let measured = unwrap_join(tokio::task::spawn_blocking(work).await)?;
    progress.finished();
    let measured = Measured { model: args.model, perplexity: measured? };
    context.output.result(&measured, |measured| {
        let Perplexity { perplexity, tokens, windows, against } = &measured.perplexity;
        let mut rows = vec![
            vec!["model".into(), measured.model.clone()],
            vec!["perplexity".into(), format!("{perplexity:.4}")],
            vec!["tokens".into(), format!("{tokens} of {windows} windows")],
        ];
        if let Some(against) = against {
            rows.push(vec!["perplexity of the other".into(), format!("{:.4}", against.perplexity)]);
            rows.push(vec!["mean KL divergence".into(), format!("{:.6}", against.mean_kl)]);
            rows.push(vec!["99 % of KL divergences below".into(), format!("{:.6}", against.kl_99)]);
            rows.push(vec!["same likeliest token".into(), format!("{:.2} %", 100.0 * against.same_top)]);
        }
        table(&["field", "value"], rows)
    })?;
    Ok(0)
}

#[derive(Debug, Args)]
pub struct BenchArgs {
    model: String,
    /// Tokens of a prompt.
    #[arg(short, long, value_name = "N", default_value_t = 512)]
    prompt: usize,
    /// Tokens that are written one by one.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    generated: usize,
    /// How often each is measured.
    #[arg(short, long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// What keys and values are kept as: f32, f16 or int8.
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = cache_type)]
    cache_type: CacheType,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Serialize)]
struct Benched {
    model: String,
    /// The instruction set that kernels are chosen for.
    kernels: &'static str,
    threads: usize,
    prompt: usize,
    generated: usize,
    cache: CacheType,
    #[serde(flatten)]
    speed: SpeedReport,
}

pub async fn bench(context: &Context, args: BenchArgs) -> Result<u8> {
    let snapshot = context.snapshot_to_run().await?;
    let cancel = cancel_on_interrupt();
    let model = cancel.unless(args.run.language_model(&snapshot, &args.model)).await?;
    let BenchArgs { prompt, generated, rounds, cache_type: cache, .. } = args;
    let options = SpeedOptions { prompt, generated, rounds, accuracy: args.run.accuracy(), cache, cancel };
    let speed = unwrap_join(tokio::task::spawn_blocking(move || model.speed(&options)).await)??;
    let (kernels, threads) = (layerstore_core::quant::instruction_set(), layerstore_core::linalg::threads());
    let benched = Benched { model: args.model, kernels, threads, prompt, generated, cache, speed };
    context.output.result(&benched, |benched| {
        let Benched { model, kernels, threads, prompt, generated, cache, speed } = benched;
        let row = |test: String, rates: &[f64]| {
            let mean = rates.iter().sum::<f64>() / rates.len() as f64;
            let squares = rates.iter().map(|rate| (rate - mean) * (rate - mean)).sum::<f64>();
            let deviation = (squares / (rates.len().max(2) - 1) as f64).sqrt();
            let (weights, caches) = (bytes(speed.weight_bytes as u64), bytes(speed.cache_bytes as u64));
            let (threads, cache) = (threads.to_string(), format!("{caches} {cache}"));
            vec![model.clone(), weights, cache, (*kernels).into(), threads, test, format!("{mean:.2} ± {deviation:.2}")]
        };
        let rows = vec![
            row(format!("pp{prompt}"), &speed.prompt_tokens_per_second),
            row(format!("tg{generated}"), &speed.generated_tokens_per_second),
        ];
        table(&["model", "weights", "cache", "kernels", "threads", "test", "tokens/s"], rows)
    })?;
    Ok(0)
}
