//! `generate` and `perplexity`: whole language models, straight from the store.

use std::sync::Arc;

use serde::Serialize;

use super::output::table;
use super::signals::cancel_on_interrupt;
use super::{Context, GenerateArgs, PerplexityArgs};
use crate::architectures::{ChatMessage, Generation, GenerationOptions, Perplexity, Sampling};
use crate::compress::Progress;
use crate::error::{Error, Result};
use crate::formats;
use crate::layer::Accuracy;
use crate::tasks::unwrap_join;

fn accuracy(exact: bool) -> Accuracy {
    if exact { Accuracy::Full } else { Accuracy::Approximate }
}

pub async fn generate(context: &Context, args: GenerateArgs) -> Result<u8> {
    let snapshot = context.snapshot().await?;
    let cancel = cancel_on_interrupt();
    let model = cancel.unless(snapshot.language_model(&args.model)).await?;
    let prompt = match args.chat {
        true => model.chat_tokens(&[ChatMessage { role: "user".into(), content: args.prompt.clone() }])?,
        false => model.tokens(&args.prompt)?,
    };
    if prompt.is_empty() {
        return Err(Error::expected("--prompt", "no tokens", "a text of one token at least"));
    }
    let options = GenerationOptions {
        max_tokens: args.max_tokens,
        sampling: Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed },
        accuracy: accuracy(args.exact),
        cancel,
    };
    let output = context.output;
    let work = move || model.generate(&prompt, &options, |text| output.piece(text));
    let generation = unwrap_join(tokio::task::spawn_blocking(work).await)??;
    context.output.ended(&generation)?;
    let Generation { tokens, prompt_tokens, prompt_seconds, seconds, .. } = &generation;
    let speed = |tokens: usize, seconds: f64| if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
    context.output.note(format!(
        "note: {prompt_tokens} tokens read at {:.1} a second, {} written at {:.1}",
        speed(*prompt_tokens, *prompt_seconds),
        tokens.len(),
        speed(tokens.len(), *seconds),
    ));
    Ok(0)
}

#[derive(Serialize)]
struct Measured {
    model: String,
    #[serde(flatten)]
    perplexity: Perplexity,
}

pub async fn perplexity(context: &Context, args: PerplexityArgs) -> Result<u8> {
    let text = formats::read_text(&args.text)?;
    let snapshot = context.snapshot().await?;
    let cancel = cancel_on_interrupt();
    let model = cancel.unless(snapshot.language_model(&args.model)).await?;
    let against = match &args.against {
        Some(other) => Some(cancel.unless(snapshot.language_model(other)).await?),
        None => None,
    };
    let tokens = model.tokens(&text)?;
    let window = args.window.min(model.context().unwrap_or(usize::MAX));
    let progress: Arc<dyn Progress> = Arc::new(context.output.progress());
    let (told, accuracy) = (progress.clone(), accuracy(args.exact));
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
