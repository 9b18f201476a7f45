//! `verify`, `gc` and `stats`.

use std::time::Duration;

use indicatif::ProgressBar;

use super::Context;
use super::output::{bytes, table};
use crate::error::{Result, counted};

pub async fn verify(context: &Context) -> Result<u8> {
    context.refuse_at("verify")?;
    let store = context.open().await?;
    let bar = if context.output.is_quiet() { ProgressBar::hidden() } else { ProgressBar::new(0) };
    let seen = bar.clone();
    let report = store
        .verify(move |done, total| {
            seen.set_length(total as u64);
            seen.set_position(done as u64);
        })
        .await?;
    bar.finish_and_clear();
    context.output.result(&report, |report| {
        if report.is_sound() {
            return match report.artifacts {
                1 => "1 artifact is as it was written".to_owned(),
                n => format!("{n} artifacts are as they were written"),
            };
        }
        let mut text = String::new();
        if !report.damaged.is_empty() {
            let rows = report.damaged.iter().map(|d| {
                let version = d.version.map_or(String::new(), |v| format!(", version {v}"));
                let what = match &d.snapshot {
                    Some(name) => format!("snapshot '{name}'{version}"),
                    None => format!("table '{}'{version}", d.table),
                };
                vec![what, d.reason.clone(), d.file.clone()]
            });
            text += &table(&["damaged", "reason", "file"], rows);
            text += &format!(
                "\ndamaged: {}\n\n",
                counted(report.damaged.len(), "version or snapshot", "versions and snapshots")
            );
        }
        let rows = report.corrupt.iter().map(|c| {
            let layers: Vec<String> = c.layers.iter().map(|l| format!("{}: {}", l.model, l.layer)).collect();
            vec![c.artifact.clone(), c.reason.clone(), layers.join(", ")]
        });
        if !report.corrupt.is_empty() {
            text += &table(&["corrupt artifact", "reason", "used by"], rows);
            text += "\n";
        }
        text + &format!("corrupt: {} of {}", report.corrupt.len(), counted(report.artifacts, "artifact", "artifacts"))
    })?;
    Ok(u8::from(!report.is_sound()))
}

pub async fn gc(context: &Context, older_than: Duration, apply: bool) -> Result<u8> {
    context.refuse_at("gc")?;
    let report = context.open().await?.gc(older_than, apply).await?;
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
