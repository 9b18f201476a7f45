//! `embed`: texts to vectors, by an encoder straight from the store.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use serde::Serialize;

use super::Context;
use super::escape;
use super::language::RunArgs;
use super::signals::cancel_on_interrupt;
use crate::architectures::{EncodingOptions, Pooling};
use crate::error::{Error, Result};
use crate::formats;
use crate::tasks::unwrap_join;
use crate::work::Progress;

#[derive(Debug, Args)]
pub struct EmbedArgs {
    model: String,
    /// The texts, one a line, UTF-8; empty lines are refused.
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// Where the vectors [texts, features] go: .npy or FILE.safetensors:TENSOR.
    #[arg(long, value_name = "FILE")]
    output: String,
    /// How the features of a text's tokens become a vector, whatever the model's files say: mean, cls or last.
    #[arg(long, value_name = "POOLING", value_parser = pooling)]
    pooling: Option<Pooling>,
    /// Leave vectors as long as they come, whatever the model's files say.
    #[arg(long)]
    no_normalize: bool,
    #[command(flatten)]
    run: RunArgs,
}

fn pooling(given: &str) -> Result<Pooling, String> {
    given.parse().map_err(|_| "expected mean, cls or last".into())
}

#[derive(Serialize)]
struct Embedded {
    model: String,
    texts: usize,
    features: usize,
    pooling: Pooling,
    output: String,
    seconds: f64,
}

pub async fn embed(context: &Context, args: EmbedArgs) -> Result<u8> {
    formats::check_output(&args.output)?;
    let text = formats::read_text(&args.input)?;
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    if let Some(place) = lines.iter().position(|line| line.trim().is_empty()) {
        let found = format!("an empty line {}", place + 1);
        return Err(Error::expected(format!("texts of {}", args.input.display()), found, "one text a line"));
    }
    if lines.is_empty() {
        return Err(Error::expected(format!("texts of {}", args.input.display()), "none", "one text a line"));
    }
    let snapshot = context.snapshot_to_run().await?;
    let cancel = cancel_on_interrupt();
    let mut model = cancel.unless(snapshot.encoder(&args.model)).await?;
    if let Some(pooling) = args.pooling {
        model = model.with_pooling(pooling);
    }
    if args.no_normalize {
        model = model.with_normalize(false);
    }
    if let Some(activations) = args.run.activations() {
        model = model.with_activations(activations)?;
    }
    let (pooling, texts) = (model.pooling(), lines.len());
    let progress: Arc<dyn Progress> = Arc::new(context.output.progress());
    let (told, options) = (progress.clone(), EncodingOptions { accuracy: args.run.accuracy(), cancel });
    let since = std::time::Instant::now();
    let work = move || {
        told.started(lines.len(), lines.len() as u64);
        let mut before = 0;
        model.encode(&lines, &options, |done| {
            told.layer(&format!("text {done}"));
            (before..done).for_each(|_| told.layer_done(1, false));
            before = done;
        })
    };
    let vectors = unwrap_join(tokio::task::spawn_blocking(work).await)?;
    progress.finished();
    let vectors = vectors?;
    formats::write_array(&args.output, vectors.view(), false)?;
    let seconds = since.elapsed().as_secs_f64();
    let embedded =
        Embedded { model: args.model, texts, features: vectors.ncols(), pooling, output: args.output, seconds };
    context.output.result(&embedded, |embedded| {
        let Embedded { texts, features, output, seconds, .. } = embedded;
        let speed = *texts as f64 / seconds.max(1e-9);
        format!("{texts} vectors of {features} in {}, {speed:.1} texts a second", escape::name(output))
    })?;
    Ok(0)
}
