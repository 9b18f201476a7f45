//! `forward`, `search` and `evaluate`.

use serde::Serialize;

use super::escape;
use super::output::{bits, bytes, error, ratio, table};
use super::{Context, EvaluateArgs, ForwardArgs, LimitArgs, SearchArgs};
use crate::compress::{self, ActivationsFile};
use crate::error::{Error, Result, closest, counted};
use crate::formats;
use crate::layer::{Accuracy, KeyValueLayer, Layer, Limit, ModuleLayer, QueryHits, SharedLayer};
use crate::store::Snapshot;
use crate::tasks::unwrap_join;

/// Hits of a query that a table shows; JSON has them all.
const SHOWN_HITS: usize = 5;

#[derive(Serialize)]
struct Forwarded {
    shape: Vec<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    relative_error_bound: Option<f64>,
    /// Inputs whose error could not be certified as asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    missed_queries: Option<usize>,
    /// Outputs that are no finite numbers, where there are some.
    #[serde(skip_serializing_if = "Option::is_none")]
    not_finite: Option<usize>,
}

/// Counts outputs that are no finite numbers, and says so: inputs or sums were larger than f32 holds.
fn not_finite<'a>(context: &Context, outputs: impl ExactSizeIterator<Item = &'a f32>) -> Option<usize> {
    let all = outputs.len();
    let found = outputs.filter(|v| !v.is_finite()).count();
    if found == 0 {
        return None;
    }
    context.output.note(format!("note: {found} of {} no finite numbers", counted(all, "output is", "outputs are")));
    Some(found)
}

pub async fn forward(context: &Context, args: ForwardArgs) -> Result<u8> {
    // A place that cannot be written to is found before the work.
    args.output.as_deref().map_or(Ok(()), formats::check_output)?;
    let snapshot = context.snapshot().await?;
    let handle = snapshot.layer(&args.model, &args.layer).await?;
    if handle.record().method == ModuleLayer::METHOD {
        return forward_module(context, &snapshot, args).await;
    }
    let (x, is_vector) = formats::read_array(&args.input)?;
    let rows = x.nrows();
    let (layer, accuracy) = if args.exact {
        (compress::exact_layer(&snapshot, &handle).await?, Accuracy::Full)
    } else {
        let layer = handle.load().await?;
        match args.max_error {
            Some(asked) => (certifying(&layer, asked).map_err(|e| e.in_layer(&args.layer))?, Accuracy::Approximate),
            None => (layer, Accuracy::Approximate),
        }
    };
    let done = tokio::task::spawn_blocking(move || {
        let answer = layer.forward(x.view(), accuracy)?;
        let asks = |layer: &&KeyValueLayer| accuracy == Accuracy::Approximate && layer.asked_error().is_some();
        let found = match layer.downcast_ref::<KeyValueLayer>().filter(asks) {
            Some(layer) => {
                let report = layer.search_report(x.view())?;
                Some((report.missed_queries, layer.unkept_promise(rows, &report)))
            }
            None => None,
        };
        Ok::<_, Error>((answer, found))
    });
    let (answer, found) = unwrap_join(done.await)?.map_err(|e| e.in_layer(&args.layer))?;
    let (missed_queries, unkept) = found.unwrap_or_default();
    if let Some(note) = unkept {
        context.output.note(format!("note: {note}"));
    }
    if let Some(path) = &args.output {
        formats::write_array(path, answer.y.view(), is_vector)?;
    }
    let shape = if is_vector { vec![answer.y.ncols()] } else { answer.y.shape().to_vec() };
    let not_finite = not_finite(context, answer.y.iter());
    let relative_error_bound = answer.relative_error_bound;
    let result = Forwarded { shape, relative_error_bound, missed_queries, not_finite };
    context.output.result(&result, |r| {
        let bound = r.relative_error_bound.map_or(String::new(), |b| format!(", relative error at most {b:.4}"));
        let place = args.output.as_ref().map_or(String::new(), |p| format!(" in {}", escape::name(p)));
        let preview = if args.output.is_some() { String::new() } else { format!("\n{:.4}", answer.y) };
        let missed = r.missed_queries.filter(|missed| *missed > 0);
        let inputs = counted(rows, "input", "inputs");
        let missed = missed.map_or(String::new(), |missed| format!(", more than asked for {missed} of {inputs}"));
        format!("output of shape {:?}{place}{bound}{missed}{preview}", r.shape)
    })?;
    Ok(0)
}

/// Returns a key–value layer that uses as few keys as certify a relative error.
fn certifying(layer: &SharedLayer, asked: f64) -> Result<SharedLayer> {
    let Some(found) = layer.downcast_ref::<KeyValueLayer>() else {
        return Err(no_error_asked(layer.method().as_str()));
    };
    Ok(found.certifying(asked)?.shared())
}

fn no_error_asked(method: &str) -> Error {
    Error::expected("layer for --max-error", format!("a {method} layer"), "a key_value layer")
}

/// Runs a module with all that it is made of.
async fn forward_module(context: &Context, snapshot: &Snapshot, args: ForwardArgs) -> Result<u8> {
    if args.max_error.is_some() {
        return Err(no_error_asked(ModuleLayer::METHOD).in_layer(&args.layer));
    }
    let module = snapshot.module(&args.model, &args.layer).await?.load().await?;
    let x = formats::read_any_array(&args.input)?;
    let accuracy = if args.exact { Accuracy::Full } else { Accuracy::Approximate };
    let done = tokio::task::spawn_blocking(move || module.forward(x.view(), accuracy)).await;
    let y = unwrap_join(done)?.map_err(|e| e.in_layer(&args.layer))?;
    if let Some(path) = &args.output {
        formats::write_any_array(path, y.view())?;
    }
    let (shape, not_finite) = (y.shape().to_vec(), not_finite(context, y.iter()));
    let result = Forwarded { shape, relative_error_bound: None, missed_queries: None, not_finite };
    context.output.result(&result, |r| match &args.output {
        Some(path) => format!("output of shape {:?} in {}", r.shape, escape::name(path)),
        None => format!("output of shape {:?}\n{y:.4}", r.shape),
    })?;
    Ok(0)
}

#[derive(Serialize)]
struct Searched {
    query: usize,
    #[serde(flatten)]
    answer: QueryHits,
}

pub async fn search(context: &Context, args: SearchArgs) -> Result<u8> {
    let handle = context.snapshot().await?.layer(&args.model, &args.layer).await?;
    let (x, _) = formats::read_array(&args.input)?;
    let limit = match args.limit {
        LimitArgs { keys: Some(k), .. } => Some(Limit::Keys(k)),
        LimitArgs { threshold: Some(t), .. } => Some(Limit::Threshold(t)),
        LimitArgs { max_error: Some(e), .. } => Some(Limit::MaxError(e)),
        _ => None,
    };
    let answers = if args.on_disk {
        handle.search_on_disk(x.view(), limit).await?
    } else {
        let layer = handle.load().await?;
        let Some(layer) = layer.downcast_ref::<KeyValueLayer>().cloned() else {
            return Err(Error::expected(
                "layer to search",
                format!("'{}', a {} layer", args.layer, handle.record().method),
                "a key_value layer",
            ));
        };
        let asked = match limit {
            Some(Limit::MaxError(asked)) => Some(asked),
            Some(_) => None,
            None => layer.asked_error(),
        };
        let answers = tokio::task::spawn_blocking(move || layer.search(x.view(), limit)).await;
        let answers = unwrap_join(answers)?.map_err(|e| e.in_layer(&args.layer))?;
        if let Some(asked) = asked {
            let kept = |answer: &&QueryHits| answer.certified_error.is_some_and(|bound| bound <= asked * (1.0 + 1e-9));
            let missed = answers.len() - answers.iter().filter(kept).count();
            if missed > 0 {
                let all = counted(answers.len(), "query", "queries");
                context.output.note(format!("note: an error of {asked} is certified for all but {missed} of {all}"));
            }
        }
        answers
    };
    let results: Vec<Searched> =
        answers.into_iter().enumerate().map(|(query, answer)| Searched { query, answer }).collect();
    context.output.result(&results, |results| {
        let rows = results.iter().map(|r| {
            let first: Vec<String> =
                r.answer.hits.iter().take(SHOWN_HITS).map(|h| format!("{} ({:+.3})", h.key, h.contribution)).collect();
            vec![
                r.query.to_string(),
                format!("{:.4}", r.answer.threshold),
                error(r.answer.certified_error),
                r.answer.hits.len().to_string(),
                first.join("  "),
            ]
        });
        table(&["query", "threshold", "certified error", "hits", "first keys (contribution)"], rows)
    })?;
    Ok(0)
}

pub async fn evaluate(context: &Context, args: EvaluateArgs) -> Result<u8> {
    let snapshot = context.snapshot().await?;
    let activations = ActivationsFile::open(&args.activations)?;
    let checkpoint = args.checkpoint.map(formats::open).transpose()?;
    let evaluation = compress::evaluate(&snapshot, &args.model, activations, checkpoint).await?;
    if let Some(name) = evaluation.unmatched_activations.first() {
        let layers = snapshot.layers(&args.model).await?;
        let near = closest(name, layers.iter().map(|l| l.layer.as_str()), 1).concat();
        context.output.note(format!(
            "note: the model has no layer for {} of activations, such as '{name}'; the closest name is '{near}'",
            counted(evaluation.unmatched_activations.len(), "tensor", "tensors"),
        ));
    }
    for layer in evaluation.layers.iter().filter(|l| l.search.missed_queries.is_some_and(|missed| missed > 0)) {
        let missed = layer.search.missed_queries.unwrap_or_default();
        let floor = layer.search.error_floor.map_or("no bound for one".to_owned(), |floor| format!("up to {floor:.4}"));
        context.output.note(format!(
            "note: layer '{}': its max_relative_error is missed by {missed} of {}; with every key: {floor}",
            layer.layer,
            counted(layer.tokens, "input", "inputs")
        ));
    }
    context.output.result(&evaluation, |evaluation| {
        let rows = evaluation.layers.iter().map(|l| {
            vec![
                l.layer.clone(),
                l.method.to_string(),
                error(l.relative_error),
                l.correction.uncorrected_error.map_or(String::new(), |e| format!("{e:.4}")),
                l.correction.singular_values.as_ref().map_or(String::new(), |s| s.len().to_string()),
                l.search.mean_keys.map_or(String::new(), |k| format!("{k:.1}")),
                l.search.mean_certified_error.map_or(String::new(), |e| format!("{e:.4}")),
                bytes(l.stored_bytes),
                ratio(l.dense_bytes, l.stored_bytes),
                bits(l.bits_per_weight),
            ]
        });
        let head = ["layer", "method", "error", "uncorrected", "rank", "keys", "certified", "stored", "ratio", "bits"];
        let measured = counted(evaluation.layers.len(), "measured layer", "measured layers");
        let mean = error(evaluation.mean_relative_error);
        let mean = format!("mean relative error of {measured} over these activations: {mean}\n");
        let unmeasured =
            evaluation.unmeasured.iter().map(|l| vec![l.layer.clone(), l.method.to_string(), l.reason.clone()]);
        let unmeasured = match evaluation.unmeasured.len() {
            0 => String::new(),
            left => format!(
                "\nnot measured: {}\n{}",
                counted(left, "layer", "layers"),
                table(&["layer", "method", "why"], unmeasured)
            ),
        };
        format!("{}\n{mean}{unmeasured}", table(&head, rows))
    })?;
    Ok(0)
}
