//! `calibrate`: statistics of a model's inputs, from a text that it reads.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use serde::Serialize;

use super::Context;
use super::escape;
use super::output::bytes;
use super::signals::cancel_on_interrupt;
use crate::compress::{self, CalibrateOptions, CalibrateReport};
use crate::error::{Result, counted};
use crate::formats;

#[derive(Debug, Args)]
pub struct CalibrateArgs {
    model: String,
    /// The text, UTF-8.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Where the statistics go, a .safetensors that import --calibration takes.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Tokens of the text that are read at most.
    #[arg(long, value_name = "N", default_value_t = CalibrateOptions::default().tokens)]
    tokens: usize,
    /// Inputs of each layer that are kept as they are, in windows of 128: key_value layers need some, and errors are measured on them.
    #[arg(long, value_name = "N", default_value_t = CalibrateOptions::default().sample)]
    sample: usize,
}

#[derive(Serialize)]
struct Calibrated {
    model: String,
    output: PathBuf,
    #[serde(flatten)]
    report: CalibrateReport,
}

pub async fn calibrate(context: &Context, args: CalibrateArgs) -> Result<u8> {
    let text = formats::read_text(&args.text)?;
    let options = CalibrateOptions {
        tokens: args.tokens,
        sample: args.sample,
        progress: Arc::new(context.output.progress()),
        cancel: cancel_on_interrupt(),
    };
    let snapshot = context.snapshot().await?;
    let report = compress::calibrate(&snapshot, &args.model, &text, &args.output, options).await?;
    let calibrated = Calibrated { model: args.model, output: args.output, report };
    context.output.result(&calibrated, |calibrated| {
        let CalibrateReport { tokens, layers, statistics, bytes: size } = calibrated.report;
        format!(
            "statistics of {} in {}: {} shared by {}, {}",
            counted(tokens, "token", "tokens"),
            escape::name(&calibrated.output.display().to_string()),
            statistics,
            counted(layers, "layer", "layers"),
            bytes(size),
        )
    })?;
    Ok(0)
}
