//! `import` and `export`.

use std::sync::Arc;

use super::output::{bits, bytes, error, measured_over, ratio, table};
use super::signals::cancel_on_interrupt;
use super::summary::{FEW_LAYERS, summary};
use super::{Context, ImportArgs};
use crate::compress::{
    self, CalibrationFile, CalibrationInputs, CalibrationText, ImportOptions, ImportReport, Plan, Rules,
};
use crate::error::{Result, closest, counted};
use crate::formats;
use crate::store::{Store, check_model_name, check_place};

pub async fn import(context: &Context, args: ImportArgs) -> Result<u8> {
    context.refuse_at("import")?;
    // Everything that can be wrong with the arguments is found before a store is made.
    check_model_name(&args.model)?;
    check_place(&context.store, &context.storage_options)?;
    let rules = args.rules.as_deref().map(Rules::open).transpose()?.unwrap_or_default();
    let calibration = args.calibration.as_deref().map(CalibrationFile::open).transpose()?;
    let source =
        formats::open_with(&args.checkpoint, formats::OpenOptions { keep_names: args.keep_names, keep: args.keep })?;
    let calibration_text = match &args.calibration_text {
        Some(file) => {
            let inputs = if args.calibration_inputs == "dense" {
                CalibrationInputs::Dense
            } else {
                CalibrationInputs::Compressed
            };
            Some(CalibrationText { text: formats::read_text(file)?, tokens: args.calibration_tokens, inputs })
        }
        None => None,
    };
    if args.dry_run {
        Store::check_create(&context.store, context.options()).await?;
        let promise = calibration_text.as_ref().map(|text| compress::promised(source.clone(), text)).transpose()?;
        let calibration = promise.or(calibration);
        let plan =
            tokio::task::block_in_place(|| compress::preview(source.clone(), &rules, calibration.as_ref(), true))?;
        context.output.result(&plan, planned)?;
        note_unused(context, &plan.unused_rules);
        note_all(context, &plan.notes);
        return Ok(0);
    }
    let options = ImportOptions {
        rules,
        calibration,
        calibration_text,
        message: args.message,
        progress: Arc::new(context.output.progress()),
        cancel: cancel_on_interrupt(),
    };
    let cancel = options.cancel.clone();
    let prepared = compress::Prepared::new(source, &args.model, options).await?;
    let store = cancel.unless(context.create()).await?;
    let report = prepared.import_into(&store).await?;
    context.output.result(&report, |report| human(report, args.all))?;
    // Behind the table, where they are seen.
    note_unused(context, &report.unused_rules);
    if let Some(name) = report.unmatched_calibration.first() {
        let more = and_more(report.unmatched_calibration.len());
        let near = closest(name, report.layers.iter().map(|l| l.layer.as_str()), 1).concat();
        context.output.note(format!(
            "note: calibration tensor '{name}'{more}: no layer of this checkpoint has the name; the closest is '{near}'"
        ));
    }
    note_all(context, &report.notes);
    note_layers(
        context,
        report.layers.iter().flat_map(|l| l.notes.iter().map(|note| (l.layer.as_str(), note.as_str()))),
    );
    Ok(0)
}

fn note_all(context: &Context, notes: &[String]) {
    for note in notes {
        context.output.note(format!("note: {note}"));
    }
}

/// Says what was noted of layers, each text once.
pub(super) fn note_layers<'a>(context: &Context, notes: impl Iterator<Item = (&'a str, &'a str)>) {
    let mut by_text: Vec<(&str, &str, usize)> = vec![];
    for (layer, text) in notes {
        match by_text.iter_mut().find(|(_, known, _)| *known == text) {
            Some((_, _, count)) => *count += 1,
            None => by_text.push((layer, text, 1)),
        }
    }
    for (layer, text, count) in by_text {
        context.output.note(format!("note: layer '{layer}'{}: {text}", and_more(count)));
    }
}

/// Says how many there are beside the first, which was named.
fn and_more(count: usize) -> String {
    if count > 1 { format!(" and {} more", count - 1) } else { String::new() }
}

fn note_unused(context: &Context, rules: &[String]) {
    for rule in rules {
        context.output.note(format!("note: the rule at {rule} takes no layer of this checkpoint"));
    }
}

fn planned(plan: &Plan) -> String {
    let rows = plan.layers.iter().map(|l| {
        vec![
            l.layer.clone(),
            l.rule.clone().unwrap_or_default(),
            l.method.to_string(),
            format!("{} × {}", l.out_features, l.in_features),
            if l.calibrated { "yes".into() } else { String::new() },
            l.expected_bytes.map_or("by its numbers".into(), bytes),
            bits(l.bits_per_weight),
            l.expected_bytes.map_or(String::new(), |expected| ratio(l.dense_bytes, expected)),
        ]
    });
    let layers = table(&["layer", "rule", "method", "shape", "calibrated", "bytes", "bits", "ratio"], rows);
    let dense = plan.layers.iter().map(|l| l.dense_bytes).sum();
    let known: Option<Vec<u64>> = plan.layers.iter().map(|l| l.expected_bytes).collect();
    let total = known.map_or("some of them by their numbers".to_owned(), |all| bytes(all.iter().sum()));
    let count = with_files(counted(plan.layers.len(), "layer", "layers"), plan.files.len());
    format!("{layers}\n{count}, {total} from {}; nothing has been stored", bytes(dense))
}

/// A number of layers, and of the files beside them, if there are any.
fn with_files(layers: String, files: usize) -> String {
    match files {
        0 => layers,
        count => format!("{layers} and {}", counted(count, "file", "files")),
    }
}

fn human(report: &ImportReport, all: bool) -> String {
    let layers = match all || report.layers.len() <= FEW_LAYERS {
        true => each(report),
        false => summary(&report.layers),
    };
    format!(
        "{layers}\n{} at version {}: {}, {} from {} ({}), {} new\n",
        report.model,
        report.version,
        with_files(counted(report.layers.len(), "layer", "layers"), report.files.len()),
        bytes(report.stored_bytes),
        bytes(report.dense_bytes),
        ratio(report.dense_bytes, report.stored_bytes),
        bytes(report.written_bytes),
    )
}

/// A row for each layer.
fn each(report: &ImportReport) -> String {
    let rows = report.layers.iter().map(|l| {
        vec![
            l.layer.clone(),
            l.method.to_string(),
            format!("{} × {}", l.out_features, l.in_features),
            error(l.relative_error),
            l.correction.uncorrected_error.map_or(String::new(), |e| error(Some(e))),
            measured_over(l.relative_error, l.error_basis).into(),
            bytes(l.stored_bytes),
            ratio(l.dense_bytes, l.stored_bytes),
            bits(l.bits_per_weight),
            if l.reused { "yes".into() } else { String::new() },
            format!("{:.2} s", l.seconds),
        ]
    });
    table(
        &["layer", "method", "shape", "error", "uncorrected", "over", "stored", "ratio", "bits", "reused", "time"],
        rows,
    )
}
