//! `nearest`, `shared` and `index`: keys of all layers as one collection.

use serde::Serialize;

use super::output::table;
use super::signals::cancel_on_interrupt;
use super::{Context, NearestArgs, SharedArgs};
use crate::compress::{self, SharedOptions};
use crate::error::{Error, Result, counted};
use crate::formats;
use crate::store::NearKey;

#[derive(Serialize)]
struct Nearest {
    query: usize,
    nearest: Vec<NearKey>,
}

pub async fn nearest(context: &Context, args: NearestArgs) -> Result<u8> {
    let snapshot = context.snapshot().await?;
    let directions = match (&args.of[..], &args.input) {
        ([model, layer, key], None) => {
            let key = key.parse().map_err(|_| Error::expected("key", format!("'{key}'"), "its number"))?;
            let key = snapshot.layer(model, layer).await?.key(key).await?;
            key.insert_axis(ndarray::Axis(0))
        }
        ([], Some(input)) => formats::read_array(input)?.0,
        (of, input) => {
            let names = counted(of.len(), "name", "names");
            let found = format!("{names}{}", if input.is_some() { " and --input" } else { "" });
            let expected = "MODEL LAYER KEY, or --input FILE".into();
            return Err(Error::Usage { option: "what to look for".into(), found, expected });
        }
    };
    let models = (!args.among.is_empty()).then_some(&args.among[..]);
    let found = snapshot.nearest_keys(directions.view(), args.count, models).await?;
    let results: Vec<_> = found.into_iter().enumerate().map(|(query, nearest)| Nearest { query, nearest }).collect();
    context.output.result(&results, |results| {
        let rows = results.iter().flat_map(|r| {
            r.nearest.iter().map(|near| {
                let names: Vec<String> = near.layers.iter().map(|l| format!("{}/{}", l.model, l.layer)).collect();
                vec![
                    r.query.to_string(),
                    format!("{:+.4}", near.cosine),
                    names.join(", "),
                    near.key.to_string(),
                    format!("{:.3e}", near.scale),
                ]
            })
        });
        table(&["query", "cosine", "layer", "key", "scale"], rows)
    })?;
    Ok(0)
}

pub async fn shared(context: &Context, args: SharedArgs) -> Result<u8> {
    let snapshot = context.snapshot().await?;
    if !(0.0..=1.0).contains(&args.least) {
        return Err(Error::expected("--least", args.least, "a cosine between 0 and 1"));
    }
    if args.keys == 0 {
        return Err(Error::expected("--keys", 0, "at least 1"));
    }
    let options = SharedOptions { keys: args.keys, least: args.least };
    let mut pairs = compress::shared_directions(&snapshot, &args.model, &args.other, options).await?;
    pairs.truncate(args.count);
    context.output.result(&pairs, |pairs| {
        let rows = pairs.iter().map(|p| {
            vec![
                p.layer.clone(),
                p.other.clone(),
                format!("{} of {}", p.shared, p.keys),
                format!("{:.4}", p.mean_cosine),
            ]
        });
        table(&["layer", "other", "shared keys", "mean |cosine|"], rows)
    })?;
    Ok(0)
}

pub async fn index(context: &Context) -> Result<u8> {
    context.refuse_at("index")?;
    let note = |name: &str, keys: usize| context.output.note(format!("{name}: {}", counted(keys, "key", "keys")));
    let cancel = cancel_on_interrupt();
    let store = context.open().await?;
    // Given up in order, so that what Lance has sorted on the way is removed.
    let reports = cancel.unless(store.index_keys(note)).await?;
    context.output.result(&reports, |reports| {
        if reports.is_empty() {
            return "no table of float keys, and so nothing to index".to_owned();
        }
        let rows = reports.iter().map(|r| {
            let made = r.partitions.map_or("none: too few keys".to_owned(), |n| counted(n, "partition", "partitions"));
            vec![r.table.clone(), r.keys.to_string(), made]
        });
        table(&["table", "keys", "index"], rows)
    })?;
    Ok(0)
}
