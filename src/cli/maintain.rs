//! `verify`, `repair`, `gc`, `upgrade` and `stats`.

use std::sync::Arc;
use std::time::Duration;

use indicatif::ProgressBar;
use serde::Serialize;

use super::output::{bytes, table};
use super::signals::cancel_on_interrupt;
use super::{Context, RepairArgs, VerifyArgs};
use crate::compress::{self, CalibrationFile, RepairOptions, RepairReport, RepairSource};
use crate::error::{Error, Result, counted};
use crate::store::{CorruptArtifact, DamagedMetadata, Remedy, VerifyDepth, VerifyReport};

pub async fn verify(context: &Context, args: VerifyArgs) -> Result<u8> {
    context.refuse_at("verify")?;
    let depth = match (args.quick, args.deep) {
        (true, _) => VerifyDepth::Quick,
        (_, true) => VerifyDepth::Deep,
        _ => VerifyDepth::Full,
    };
    let store = context.open_for_repair().await?;
    let bar = if context.output.is_quiet() { ProgressBar::hidden() } else { ProgressBar::new(0) };
    let seen = bar.clone();
    let report = store
        .verify_with(depth, move |done, total| {
            seen.set_length(total as u64);
            seen.set_position(done as u64);
        })
        .await?;
    bar.finish_and_clear();
    context.output.result(&report, |report| {
        let artifacts = counted(report.artifacts, "artifact", "artifacts");
        if !report.is_sound() {
            let found = findings(&report.corrupt, &report.damaged);
            return found + &format!("corrupt: {} of {artifacts}", report.corrupt.len());
        }
        let sound = match (report.artifacts, depth) {
            (1, VerifyDepth::Quick) => "1 artifact is listed, and has all its rows".to_owned(),
            (_, VerifyDepth::Quick) => format!("{artifacts} are listed, and have all their rows"),
            (1, VerifyDepth::Full) => "1 artifact is as it was written".to_owned(),
            (_, VerifyDepth::Full) => format!("{artifacts} are as they were written"),
            (1, VerifyDepth::Deep) => "1 artifact is as it was written, and runs".to_owned(),
            (_, VerifyDepth::Deep) => format!("{artifacts} are as they were written, and run"),
        };
        sound + &not_built(report)
    })?;
    Ok(u8::from(!report.is_sound()))
}

/// What is said of artifacts whose methods this program does not know.
fn not_built(report: &VerifyReport) -> String {
    let methods = report.unknown_methods.iter();
    let lines = methods.map(|(method, &artifacts)| {
        format!(
            "\nnot built: {} of method '{method}', which is not known here",
            counted(artifacts, "artifact", "artifacts")
        )
    });
    lines.collect()
}

/// Tables of what is damaged.
fn findings(corrupt: &[CorruptArtifact], damaged: &[DamagedMetadata]) -> String {
    let help = |remedies: &[Remedy]| remedies.iter().map(|r| r.describe()).collect::<Vec<_>>().join("; else ");
    let mut text = String::new();
    if !damaged.is_empty() {
        let rows = damaged.iter().map(|d| {
            let version = d.version.map_or(String::new(), |v| format!(", version {v}"));
            let what = match &d.snapshot {
                Some(name) => format!("snapshot '{name}'{version}"),
                None if d.table.is_empty() => "the lease".into(),
                None => format!("table '{}'{version}", d.table),
            };
            vec![what, d.reason.clone(), d.file.clone(), help(&d.help)]
        });
        text += &table(&["damaged", "reason", "file", "what helps"], rows);
        text += &format!("\ndamaged: {}\n\n", files(damaged));
    }
    if !corrupt.is_empty() {
        let rows = corrupt.iter().map(|c| {
            let layers: Vec<String> = c.layers.iter().map(|l| format!("{}: {}", l.model, l.layer)).collect();
            vec![c.artifact.clone(), c.reason.clone(), layers.join(", "), help(&c.help)]
        });
        text += &table(&["corrupt artifact", "reason", "used by", "what helps"], rows);
        text += "\n";
    }
    text
}

fn files(damaged: &[DamagedMetadata]) -> String {
    counted(damaged.len(), "file or snapshot", "files and snapshots")
}

pub async fn repair(context: &Context, args: RepairArgs) -> Result<u8> {
    context.refuse_at("repair")?;
    let mut sources = Vec::with_capacity(args.from.len());
    for place in &args.from {
        sources.push(RepairSource::open(place).await?);
    }
    let options = RepairOptions {
        sources,
        calibration: args.calibration.as_deref().map(CalibrationFile::open).transpose()?,
        progress: Arc::new(context.output.progress()),
        cancel: cancel_on_interrupt(),
    };
    let report = compress::repair(&context.open_for_repair().await?, options).await?;
    context.output.result(&report, repaired)?;
    Ok(u8::from(!report.is_sound()))
}

fn repaired(report: &RepairReport) -> String {
    let mut text = String::new();
    if !report.mended.is_empty() {
        let rows = report.mended.iter().map(|m| {
            let layers: Vec<String> = m.layers.iter().map(|l| format!("{}: {}", l.model, l.layer)).collect();
            vec![m.artifact.clone(), m.from.clone(), layers.join(", ")]
        });
        text += &(table(&["mended artifact", "from", "used by"], rows) + "\n");
    }
    if !report.set_aside.is_empty() {
        text += &(table(&["file set aside"], report.set_aside.iter().map(|file| vec![file.clone()])) + "\n");
    }
    if !report.tried.is_empty() {
        let rows = report.tried.iter().map(|t| vec![t.artifact.clone(), t.from.clone(), t.reason.clone()]);
        text += &(table(&["corrupt artifact", "not from", "because"], rows) + "\n");
    }
    text += &findings(&report.corrupt, &report.damaged);
    let left = match report.is_sound() {
        true => "nothing is damaged any more".to_owned(),
        false => {
            let corrupt = counted(report.corrupt.len(), "artifact", "artifacts");
            format!("still damaged: {corrupt}, {}", files(&report.damaged))
        }
    };
    let (listed, written, mended) = (report.listed.len(), report.written.len(), report.mended.len());
    let artifacts = counted(report.artifacts, "artifact", "artifacts");
    text + &format!("{artifacts}: {listed} listed again, {written} written again, {mended} mended; {left}")
}

pub async fn gc(context: &Context, older_than: Duration, apply: bool) -> Result<u8> {
    context.refuse_at("gc")?;
    let cancel = cancel_on_interrupt();
    let store = context.open().await?;
    // Given up in order, so that a lease is given back.
    let report = tokio::select! {
        report = store.gc(older_than, apply) => report?,
        () = cancel.cancelled() => return Err(Error::Cancelled),
    };
    context.output.result(&report, |report| {
        let found = format!(
            "{} and {} that nothing reaches, {}",
            counted(report.artifacts, "artifact", "artifacts"),
            counted(report.stray_rows, "stray row", "stray rows"),
            bytes(report.reclaimable_bytes)
        );
        if apply {
            format!("{found}; the store is {} smaller", bytes(report.removed_bytes))
        } else {
            format!("{found}; nothing was removed, add --apply to do so")
        }
    })?;
    Ok(0)
}

/// What an upgrade did, as JSON.
#[derive(Serialize)]
struct Upgraded {
    from: u32,
    to: u32,
}

pub async fn upgrade(context: &Context) -> Result<u8> {
    context.refuse_at("upgrade")?;
    let store = context.open().await?;
    let upgraded = Upgraded { from: store.format().await?, to: store.upgrade().await? };
    context.output.result(&upgraded, |Upgraded { from, to }| match from == to {
        true => format!("the store is of format {to} already"),
        false => format!("the store is of format {to}, and was of format {from}"),
    })?;
    Ok(0)
}

pub async fn stats(context: &Context) -> Result<u8> {
    let stats = context.snapshot().await?.stats().await?;
    context.output.result(&stats, |s| {
        table(
            &["", ""],
            [
                vec!["models".into(), s.models.to_string()],
                vec!["layers".into(), s.layers.to_string()],
                vec!["artifacts".into(), s.artifacts.to_string()],
                vec!["versions".into(), s.versions.to_string()],
                vec!["snapshots".into(), s.snapshots.to_string()],
                vec!["on disk".into(), s.bytes.map_or("unknown".into(), bytes)],
                vec!["dense".into(), bytes(s.dense_bytes)],
                vec!["saved by sharing".into(), bytes(s.deduplicated_bytes)],
            ],
        )
    })?;
    Ok(0)
}
