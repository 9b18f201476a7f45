//! `import` and `export`.

use std::path::Path;
use std::sync::Arc;

use super::output::{bytes, error, ratio, table};
use super::{Context, ImportArgs};
use crate::error::Result;
use crate::model::{self, Cancel, ImportOptions, ImportReport};
use crate::store::{Store, check_model_name};

/// A request to stop that Ctrl-C makes.
fn cancel_on_interrupt() -> Cancel {
    let cancel = Cancel::new();
    let asked = cancel.clone();
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            asked.cancel();
        }
    });
    cancel
}

pub async fn import(context: &Context, args: ImportArgs) -> Result<u8> {
    context.refuse_at("import")?;
    // Everything that can be wrong with the arguments is found before a store is made.
    check_model_name(&args.model)?;
    let (checkpoint, rules, calibration) =
        model::open_inputs(&args.checkpoint, args.rules.as_deref(), args.calibration.as_deref())?;
    model::check(&checkpoint, &rules, calibration.as_ref())?;
    let options = ImportOptions {
        rules,
        calibration,
        message: args.message,
        progress: Arc::new(context.output.progress()),
        cancel: cancel_on_interrupt(),
    };
    let store = Store::create(&context.store).await?;
    let report = model::import(&store, Arc::new(checkpoint), &args.model, options).await?;
    for rule in &report.unused_rules {
        context.output.note(format!("note: the rule at {rule} takes no layer of this checkpoint"));
    }
    if let Some(name) = report.unmatched_calibration.first() {
        let count = report.unmatched_calibration.len();
        let others = if count > 1 { format!(" and {} others", count - 1) } else { String::new() };
        context
            .output
            .note(format!("note: calibration tensor '{name}'{others}: no layer of this checkpoint has the name"));
    }
    context.output.result(&report, human)?;
    Ok(0)
}

fn human(report: &ImportReport) -> String {
    let rows = report.layers.iter().map(|l| {
        vec![
            l.layer.clone(),
            l.method.to_string(),
            format!("{} × {}", l.out_features, l.in_features),
            error(l.relative_error),
            l.error_basis.as_str().into(),
            bytes(l.stored_bytes),
            ratio(l.dense_bytes, l.stored_bytes),
            if l.reused { "yes".into() } else { String::new() },
            format!("{:.2} s", l.seconds),
        ]
    });
    let layers = table(&["layer", "method", "shape", "error", "over", "stored", "ratio", "reused", "time"], rows);
    format!(
        "{layers}\n{} at version {}: {} layers, {} from {} ({}), {} new\n",
        report.model,
        report.version,
        report.layers.len(),
        bytes(report.stored_bytes),
        bytes(report.dense_bytes),
        ratio(report.dense_bytes, report.stored_bytes),
        bytes(report.written_bytes),
    )
}

pub async fn export(context: &Context, model: &str, output: &Path) -> Result<u8> {
    let snapshot = context.snapshot().await?;
    let progress = Arc::new(context.output.progress());
    let report = model::export(&snapshot, model, output, progress, cancel_on_interrupt()).await?;
    context.output.result(&report, |r| format!("{} layers, {} in {}", r.layers, bytes(r.bytes), output.display()))?;
    Ok(0)
}
