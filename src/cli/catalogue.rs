//! `models`, `layers`, `show`, `snapshot`, `restore`, `log` and `diff`.

use super::output::{bytes, error, ratio, table, time};
use super::{Context, SnapshotCommand};
use crate::error::Result;
use crate::store::{LayerState, SnapshotInfo};

pub async fn models(context: &Context) -> Result<u8> {
    let models = context.snapshot().await?.models().await?;
    context.output.result(&models, |models| {
        let rows = models.iter().map(|m| {
            let methods: Vec<String> = m.methods.iter().map(|(method, n)| format!("{n} {method}")).collect();
            vec![
                m.model.clone(),
                m.layers.to_string(),
                methods.join(", "),
                bytes(m.stored_bytes),
                ratio(m.dense_bytes, m.stored_bytes),
                time(m.created_at),
            ]
        });
        table(&["model", "layers", "methods", "stored", "ratio", "time (UTC)"], rows)
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
                bytes(l.stored_bytes),
                ratio(l.dense_bytes, l.stored_bytes),
                l.artifact.to_string()[..12].to_owned(),
            ]
        });
        table(&["layer", "method", "shape", "error", "stored", "ratio", "artifact"], rows)
    })?;
    Ok(0)
}

pub async fn show(context: &Context, model: &str, layer: &str) -> Result<u8> {
    let handle = context.snapshot().await?.layer(model, layer).await?;
    if context.verify_loads {
        handle.load().await?;
    }
    context.output.result(handle.record(), |r| {
        let mut rows = vec![
            vec!["model".into(), r.model.clone()],
            vec!["layer".into(), r.layer.clone()],
            vec!["method".into(), r.method.to_string()],
            vec!["shape".into(), format!("{} × {}", r.out_features, r.in_features)],
            vec!["error".into(), format!("{} over {}", error(r.relative_error), r.error_basis.as_str())],
            vec!["stored".into(), format!("{} ({})", bytes(r.stored_bytes), ratio(r.dense_bytes, r.stored_bytes))],
            vec!["artifact".into(), r.artifact.to_string()],
            vec!["time (UTC)".into(), time(r.created_at)],
            vec!["file".into(), r.source.file.clone()],
        ];
        rows.extend(
            r.source.tensors.iter().map(|t| vec!["tensor".into(), format!("{} {} {:?}", t.tensor, t.dtype, t.shape)]),
        );
        if let Some(config) = r.config.as_object() {
            rows.extend(config.iter().map(|(key, value)| vec![format!("config.{key}"), value.to_string()]));
        }
        table(&["field", "value"], rows)
    })?;
    Ok(0)
}

pub async fn snapshot(context: &Context, command: SnapshotCommand) -> Result<u8> {
    context.refuse_at("snapshot")?;
    let store = context.open().await?;
    let one = |s: &SnapshotInfo| format!("{} is version {}", s.name, s.version);
    match command {
        SnapshotCommand::Create { name } => context.output.result(&store.create_snapshot(&name).await?, one)?,
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
            ]
        };
        let mut rows: Vec<Vec<String>> = diff.added.iter().map(|l| whole("+", l)).collect();
        rows.extend(diff.removed.iter().map(|l| whole("-", l)));
        rows.extend(diff.changed.iter().map(|c| {
            let pair = |a: String, b: String| if a == b { a } else { format!("{a} → {b}") };
            vec![
                "~".into(),
                c.model.clone(),
                c.layer.clone(),
                pair(c.before.method.to_string(), c.after.method.to_string()),
                pair(bytes(c.before.stored_bytes), bytes(c.after.stored_bytes)),
                pair(error(c.before.relative_error), error(c.after.relative_error)),
            ]
        }));
        if rows.is_empty() {
            "no difference".into()
        } else {
            table(&["", "model", "layer", "method", "stored", "error"], rows)
        }
    })?;
    Ok(0)
}
