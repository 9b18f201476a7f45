//! `models`, `layers`, `show`, `remove`, `rename`, `snapshot`, `restore`, `log` and `diff`.

use std::collections::BTreeSet;

use serde::Serialize;

use super::escape;
use super::output::{bits, bytes, error, measured_over, ratio, table, time};
use super::settings::{changes, pair};
use super::{Context, SnapshotCommand};
use crate::error::Result;
use crate::store::{LayerRecord, LayerState, ModelFile, ModelSummary, SnapshotInfo};

pub async fn models(context: &Context) -> Result<u8> {
    let models = context.snapshot().await?.models().await?;
    context.output.result(&models, |models| {
        let rows = models.iter().map(|m| {
            let methods: Vec<String> = m.methods.iter().map(|(method, n)| format!("{n} {method}")).collect();
            vec![
                m.model.clone(),
                m.layers.to_string(),
                methods.join(", "),
                if m.files > 0 { m.files.to_string() } else { String::new() },
                bytes(m.stored_bytes),
                ratio(m.dense_bytes, m.stored_bytes),
                time(m.created_at),
            ]
        });
        table(&["model", "layers", "methods", "files", "stored", "ratio", "time (UTC)"], rows)
    })?;
    Ok(0)
}

pub async fn layers(context: &Context, model: &str) -> Result<u8> {
    let layers = context.snapshot().await?.layers(model).await?;
    context.output.result(&layers, |layers| {
        let rows = layers.iter().map(|l| {
            vec![
                l.layer.clone(),
                l.method.to_string(),
                format!("{} × {}", l.out_features, l.in_features),
                error(l.relative_error),
                measured_over(l.relative_error, l.error_basis).into(),
                bytes(l.stored_bytes),
                ratio(l.dense_bytes, l.stored_bytes),
                bits(l.bits_per_weight()),
                l.artifact.to_string()[..12].to_owned(),
            ]
        });
        table(&["layer", "method", "shape", "error", "over", "stored", "ratio", "bits", "artifact"], rows)
    })?;
    Ok(0)
}

/// A row of the catalogue, and what follows from it.
#[derive(Serialize)]
struct Shown<'a> {
    #[serde(flatten)]
    record: &'a LayerRecord,
    bits_per_weight: Option<f64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    notes: Vec<String>,
}

pub async fn show(context: &Context, model: &str, layer: &str) -> Result<u8> {
    let handle = context.snapshot().await?.layer(model, layer).await?;
    if context.verify_loads {
        handle.load().await?;
    }
    let record = handle.record();
    let shown = Shown { record, bits_per_weight: record.bits_per_weight(), notes: record.notes() };
    context.output.result(&shown, |shown| {
        let r = shown.record;
        let over = match measured_over(r.relative_error, r.error_basis) {
            "" => String::new(),
            over => format!(" over {over}"),
        };
        let mut rows = vec![
            vec!["model".into(), r.model.clone()],
            vec!["layer".into(), r.layer.clone()],
            vec!["method".into(), r.method.to_string()],
            vec!["shape".into(), format!("{} × {}", r.out_features, r.in_features)],
            vec!["error".into(), format!("{}{over}", error(r.relative_error))],
            vec!["dense".into(), bytes(r.dense_bytes)],
            vec!["stored".into(), format!("{} ({})", bytes(r.stored_bytes), ratio(r.dense_bytes, r.stored_bytes))],
            vec!["bits per weight".into(), bits(shown.bits_per_weight)],
            vec!["artifact".into(), r.artifact.to_string()],
            vec!["time (UTC)".into(), time(r.created_at)],
            vec!["file".into(), r.source.file.clone()],
        ];
        rows.extend(
            r.source.tensors.iter().map(|t| vec!["tensor".into(), format!("{} {} {:?}", t.tensor, t.dtype, t.shape)]),
        );
        rows.extend(shown.notes.iter().map(|note| vec!["note".into(), note.clone()]));
        if let Some(config) = r.config.as_object() {
            rows.extend(config.iter().map(|(key, value)| vec![format!("config.{key}"), value.to_string()]));
        }
        table(&["field", "value"], rows)
    })?;
    Ok(0)
}

/// A model, and what belongs to it beside its layers.
#[derive(Serialize)]
struct ShownModel {
    #[serde(flatten)]
    summary: ModelSummary,
    bits_per_weight: Option<f64>,
    sources: BTreeSet<String>,
    files: Vec<ModelFile>,
}

pub async fn show_model(context: &Context, model: &str, verify: bool) -> Result<u8> {
    let snapshot = context.snapshot().await?;
    let records = snapshot.layers(model).await?;
    let files = snapshot.files(model).await?;
    if verify {
        for file in &files {
            snapshot.file(model, &file.name).await?;
        }
        for record in &records {
            snapshot.handle(record.clone()).load().await?;
        }
    }
    let summary = snapshot.summary(model).await?;
    // An artifact of several layers is stored once.
    let mut seen = BTreeSet::new();
    let once: Vec<&LayerRecord> =
        records.iter().filter(|r| r.bits_per_weight().is_some() && seen.insert(r.artifact)).collect();
    let weights: u64 = once.iter().map(|r| r.in_features * r.out_features).sum();
    let stored: u64 = once.iter().map(|r| r.stored_bytes).sum();
    let shown = ShownModel {
        bits_per_weight: (weights > 0).then(|| 8.0 * stored as f64 / weights as f64),
        sources: records.iter().map(|r| r.source.file.clone()).filter(|file| !file.is_empty()).collect(),
        summary,
        files,
    };
    context.output.result(&shown, |shown| {
        let ModelSummary { model, layers, methods, files: _, dense_bytes, stored_bytes, created_at } = &shown.summary;
        let methods: Vec<String> = methods.iter().map(|(method, n)| format!("{n} {method}")).collect();
        let mut rows = vec![
            vec!["model".into(), model.clone()],
            vec!["layers".into(), format!("{layers}: {}", methods.join(", "))],
            vec!["dense".into(), bytes(*dense_bytes)],
            vec!["stored".into(), format!("{} ({})", bytes(*stored_bytes), ratio(*dense_bytes, *stored_bytes))],
            vec!["bits per weight".into(), bits(shown.bits_per_weight)],
            vec!["time (UTC)".into(), time(*created_at)],
        ];
        rows.extend(shown.sources.iter().map(|source| vec!["source".into(), source.clone()]));
        rows.extend(
            shown.files.iter().map(|file| vec!["file".into(), format!("{}, {}", file.name, bytes(file.bytes))]),
        );
        table(&["field", "value"], rows)
    })?;
    Ok(0)
}

#[derive(Serialize)]
struct Changed<'a> {
    model: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    version: u64,
}

pub async fn remove(context: &Context, model: &str) -> Result<u8> {
    context.refuse_at("remove")?;
    let version = context.open().await?.remove_model(model).await?;
    context.output.result(&Changed { model, name: None, version }, |c| {
        format!("'{}' is removed, at version {}; gc frees what no kept version uses", escape::name(c.model), c.version)
    })?;
    Ok(0)
}

pub async fn rename(context: &Context, model: &str, name: &str) -> Result<u8> {
    context.refuse_at("rename")?;
    let version = context.open().await?.rename_model(model, name).await?;
    context.output.result(&Changed { model, name: Some(name), version }, |c| {
        format!("'{}' is named '{}', at version {}", escape::name(c.model), escape::name(name), c.version)
    })?;
    Ok(0)
}

pub async fn snapshot(context: &Context, command: SnapshotCommand) -> Result<u8> {
    match &command {
        // The version to name.
        SnapshotCommand::Create { .. } => {}
        SnapshotCommand::List => context.refuse_at("snapshot list")?,
        SnapshotCommand::Delete { .. } => context.refuse_at("snapshot delete")?,
    }
    let store = context.open().await?;
    let one = |s: &SnapshotInfo| format!("{} is version {}", s.name, s.version);
    match command {
        SnapshotCommand::Create { name } => {
            let created = match &context.at {
                Some(at) => store.create_snapshot_at(&name, at).await?,
                None => store.create_snapshot(&name).await?,
            };
            context.output.result(&created, one)?;
        }
        SnapshotCommand::Delete { name } => {
            context.output.result(&store.delete_snapshot(&name).await?, |s| match s.version {
                Some(version) => format!("deleted; {} was version {version}", s.name),
                None => format!("deleted; the file of {} named no version", s.name),
            })?;
        }
        SnapshotCommand::List => context.output.result(&store.snapshots().await?, |snapshots| {
            let rows = snapshots.iter().map(|s| vec![s.name.clone(), s.version.to_string(), time(s.time)]);
            table(&["snapshot", "version", "time (UTC)"], rows)
        })?,
    }
    Ok(0)
}

pub async fn restore(context: &Context, name: &str) -> Result<u8> {
    context.refuse_at("restore")?;
    let restored = context.open().await?.restore(name).await?;
    context.output.result(&restored, |r| format!("restored {}, as version {}", r.name, r.version))?;
    Ok(0)
}

pub async fn log(context: &Context) -> Result<u8> {
    context.refuse_at("log")?;
    let log = context.open().await?.log().await?;
    context.output.result(&log, |log| {
        let rows = log.iter().map(|v| {
            vec![
                v.version.to_string(),
                time(v.time),
                v.operation.clone(),
                v.snapshots.join(", "),
                v.message.clone().unwrap_or_default(),
            ]
        });
        table(&["version", "time (UTC)", "operation", "snapshots", "message"], rows)
    })?;
    Ok(0)
}

pub async fn diff(context: &Context, old: &str, new: &str) -> Result<u8> {
    context.refuse_at("diff")?;
    let store = context.open().await?;
    let diff = store.at(old).await?.diff(&store.at(new).await?).await?;
    context.output.result(&diff, |diff| {
        let whole = |sign: &str, l: &LayerState| {
            vec![
                sign.to_owned(),
                l.model.clone(),
                l.layer.clone(),
                l.state.method.to_string(),
                bytes(l.state.stored_bytes),
                error(l.state.relative_error),
                String::new(),
            ]
        };
        let mut rows: Vec<Vec<String>> = diff.added.iter().map(|l| whole("+", l)).collect();
        rows.extend(diff.removed.iter().map(|l| whole("-", l)));
        rows.extend(diff.changed.iter().map(|c| {
            vec![
                "~".into(),
                c.model.clone(),
                c.layer.clone(),
                pair(c.before.method.to_string(), c.after.method.to_string()),
                pair(bytes(c.before.stored_bytes), bytes(c.after.stored_bytes)),
                pair(error(c.before.relative_error), error(c.after.relative_error)),
                changes(&c.settings),
            ]
        }));
        if rows.is_empty() {
            "no difference".into()
        } else {
            table(&["", "model", "layer", "method", "stored", "error", "settings"], rows)
        }
    })?;
    Ok(0)
}
