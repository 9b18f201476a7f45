//! `attend` and `codebooks`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use ndarray::Axis;
use serde::Serialize;

use super::Context;
use super::escape;
use super::output::bytes;
use super::signals::cancel_on_interrupt;
use crate::compress::{self, Training};
use crate::error::{Error, Result, counted};
use crate::formats;
use crate::layer::Accuracy;
use crate::nn::AttentionBlock;
use crate::store::check_model_name;
use crate::tasks::unwrap_join;

#[derive(Debug, Args)]
pub struct AttendArgs {
    model: String,
    layer: String,
    /// Inputs of the query projection, or queries where the block has none: a matrix [tokens, width] of one sequence, .npy or
    /// FILE.safetensors:TENSOR, f32 or f16.
    #[arg(long, value_name = "FILE")]
    q: String,
    /// Those of keys, if they are others than of queries.
    #[arg(long, value_name = "FILE")]
    k: Option<String>,
    /// Those of values, if they are others than of keys.
    #[arg(long, value_name = "FILE")]
    v: Option<String>,
    /// Where the outputs go, .npy or FILE.safetensors:TENSOR; other tensors of the file stay.
    #[arg(long, value_name = "FILE")]
    output: Option<String>,
    /// Let each query meet each key, and use every key, or all that is stored, of the projections.
    #[arg(long)]
    exact: bool,
    /// What came before these tokens, in a .safetensors that is read where it is there, and written for the tokens that come
    /// after: for a causal block with codebooks, whose sequence is too long for one call. A state of another block is refused.
    #[arg(long, value_name = "FILE", conflicts_with = "exact")]
    state: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum CodebooksCommand {
    /// Train a block's codebooks from its inputs; a block that is not there is made.
    Train(TrainArgs),
}

#[derive(Debug, Args)]
pub struct TrainArgs {
    model: String,
    /// The attention block: one that is there, or a new name.
    layer: String,
    /// Inputs of the query projection, or queries where the block has none: a matrix [tokens, width], .npy or
    /// FILE.safetensors:TENSOR, f32 or f16.
    #[arg(long, value_name = "FILE")]
    queries: String,
    /// Those of keys, if they are others than of queries.
    #[arg(long, value_name = "FILE")]
    keys: Option<String>,
    /// Settings (TOML) of a new block, or to begin with anew: n_head, n_code and what else docs/rules.md says of vq_attention.
    #[arg(long, value_name = "FILE")]
    settings: Option<PathBuf>,
    /// Times that all tokens are gone through.
    #[arg(long, value_name = "N", default_value_t = Training::default().epochs)]
    epochs: usize,
    /// Tokens of a step.
    #[arg(long, value_name = "N", default_value_t = Training::default().batch)]
    batch: usize,
    /// Begin with k-means again, in place of the block's codewords.
    #[arg(long)]
    anew: bool,
}

#[derive(Serialize)]
struct AttendReport {
    shape: Vec<usize>,
}

pub async fn attend(context: &Context, args: AttendArgs) -> Result<u8> {
    // A place that cannot be written to is found before the work.
    args.output.as_deref().map_or(Ok(()), formats::check_output)?;
    args.state.as_deref().map_or(Ok(()), formats::check_attention_cache_output)?;
    let handle = context.snapshot().await?.attention(&args.model, &args.layer).await?;
    let q = formats::read_array(&args.q)?.0;
    let k = args.k.as_deref().map(formats::read_array).transpose()?.map_or_else(|| q.clone(), |k| k.0);
    let v = args.v.as_deref().map(formats::read_array).transpose()?.map_or_else(|| k.clone(), |v| v.0);
    let block = handle.load().await?;
    let (block, accuracy) = match args.exact {
        true => (block.exact()?, Accuracy::Full),
        false => (block, Accuracy::Approximate),
    };
    // What was stored with the block came before, unless a file says otherwise.
    let stored = || block.attention().cache().cloned();
    let mut before = match &args.state {
        None => stored(),
        Some(path) => {
            let empty = block.attention().empty_cache(1).ok_or_else(|| no_state(&block).in_layer(&args.layer))?;
            match path.exists() {
                true => Some(formats::read_attention_cache(path, &handle.id())?),
                false => stored().or(Some(empty)),
            }
        }
    };
    let done = tokio::task::spawn_blocking(move || {
        let [q, k, v] = [q, k, v].map(|x| x.insert_axis(Axis(0)));
        let y = block.attend(q.view(), k.view(), v.view(), None, before.as_mut(), accuracy)?;
        Ok::<_, Error>((y.index_axis_move(Axis(0), 0), before))
    });
    let (y, cache) = unwrap_join(done.await)?.map_err(|e| e.in_layer(&args.layer))?;
    if let Some(path) = &args.output {
        formats::write_array(path, y.view(), false)?;
    }
    if let (Some(path), Some(cache)) = (&args.state, &cache) {
        formats::write_attention_cache(path, cache, &handle.id())?;
    }
    context.output.result(&AttendReport { shape: y.shape().to_vec() }, |r| {
        let place = args.output.as_ref().map_or(String::new(), |p| format!(" in {}", escape::name(p)));
        let preview = if args.output.is_some() { String::new() } else { format!("\n{y:.4}") };
        format!("output of shape {:?}{place}{preview}", r.shape)
    })?;
    Ok(0)
}

/// The error of a block whose attention keeps no state of a sequence.
fn no_state(block: &AttentionBlock) -> Error {
    let settings = block.attention().settings();
    let found = match settings.key_codes() {
        Some(_) => "a block that is not causal".to_owned(),
        None => format!("a block of mechanism {}", serde_json::to_value(settings.mechanism).unwrap_or_default()),
    };
    Error::expected("block for --state", found, "a causal block of mechanism \"vq_qk\" or \"vq_k\"")
}

pub async fn codebooks(context: &Context, command: CodebooksCommand) -> Result<u8> {
    let CodebooksCommand::Train(args) = command;
    context.refuse_at("codebooks train")?;
    check_model_name(&args.model)?;
    let config = args.settings.as_deref().map(compress::read_attention_settings).transpose()?;
    let queries = formats::read_array(&args.queries)?.0;
    let keys = args.keys.as_deref().map(formats::read_array).transpose()?.map_or_else(|| queries.clone(), |k| k.0);
    let training = Training { config, epochs: args.epochs, batch: args.batch, anew: args.anew };
    let (progress, cancel) = (context.output.progress(), cancel_on_interrupt());
    let store = match training.config {
        Some(_) => cancel.unless(context.create()).await?,
        None => context.open().await?,
    };
    let (inputs, model, layer) = ((queries, keys), &args.model, &args.layer);
    let report = compress::train_codebooks(&store, model, layer, inputs, training, &progress, &cancel).await?;
    context.output.result(&report, |r| {
        let of = |what: &str, losses: Option<[f64; 2]>| {
            losses.map(|[first, last]| format!("loss of {what} {first:.4}, then {last:.4}"))
        };
        let losses: Vec<String> = [of("queries", r.queries), of("keys", r.keys)].into_iter().flatten().collect();
        let error = r.attention_error;
        let error = error.map_or("attention error: not measured".to_owned(), |[before, after]| {
            format!("attention error {before:.4}, then {after:.4}")
        });
        format!(
            "'{}' of '{}' at version {}: {}; {error}; {}; {} given away; {}",
            escape::name(&r.layer),
            escape::name(&r.model),
            r.version,
            counted(r.steps, "step", "steps"),
            losses.join("; "),
            counted(r.revived, "dead codeword", "dead codewords"),
            bytes(r.stored_bytes),
        )
    })?;
    Ok(0)
}
