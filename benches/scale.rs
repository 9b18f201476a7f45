//! A store of many models: opening it and finding a layer, listing a model, importing one more layer, and naming a version. Each is done
//! by a program of its own, some times over, the store being opened anew each time.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use chrono::Utc;
use layerstore::layer::{DenseLayer, Layer};
use layerstore::{ArtifactInfo, ErrorBasis, LayerRecord, Provenance, RowLocations, Source, Store};
use ndarray::Array2;
use serde::{Deserialize, Serialize};

use super::{Result, median, name};

/// Layers of the store, unless `LAYERSTORE_SCALE` says another number.
const LAYERS: usize = 100_000;
const LAYERS_OF_MODEL: usize = 200;
/// Models whose artifacts one writer adds.
const MODELS_AT_ONCE: usize = 50;
const ROUNDS: usize = 11;
/// A version that is asked for by its name.
const SNAPSHOT: &str = "measured";

/// What a program found.
#[derive(Serialize, Deserialize)]
struct Found {
    first: f64,
    others: Vec<f64>,
    peak_mib: f64,
    read_mib: f64,
}

pub async fn scale(folder: &Path) -> Result<()> {
    let layers = std::env::var("LAYERSTORE_SCALE").ok().map_or(Ok(LAYERS), |n| n.parse())?;
    let models = layers / LAYERS_OF_MODEL;
    // A store that is kept is measured again without being made.
    let kept = std::env::var("LAYERSTORE_SCALE_STORE").ok();
    let uri = kept.clone().unwrap_or_else(|| folder.join("many").display().to_string());
    if !is_made(&uri, models).await {
        let started = Instant::now();
        make(&uri, models).await?;
        let each = started.elapsed().as_secs_f64() / models as f64;
        println!("{layers} layers in {models} models, a commit each: {:.0} ms a model", 1e3 * each);
    }
    let store = Store::open(&uri).await?;
    // A store that was made larger has that of the smaller one.
    if store.snapshots().await?.iter().any(|snapshot| snapshot.name == SNAPSHOT) {
        store.delete_snapshot(SNAPSHOT).await?;
    }
    store.create_snapshot(SNAPSHOT).await?;
    drop(store);
    for (what, said) in [
        ("resolve", "open and resolve one layer"),
        ("list", "open and list one model"),
        ("import", "open and import one more layer"),
        ("snapshot", "open and create a snapshot"),
        ("resolve-at", "open, and resolve one layer at a snapshot"),
    ] {
        let models = models.to_string();
        let run = Command::new(std::env::current_exe()?).args(["--bench", "--scale", what, &uri, &models]).output()?;
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let Found { first, others, peak_mib, read_mib } = serde_json::from_slice(&run.stdout)?;
        let others = others.into_iter().map(|ms| Duration::from_secs_f64(ms / 1e3)).collect();
        println!(
            "{said}: {:.1} ms, the program's first time {first:.1} ms; at most {peak_mib:.0} MiB of memory, {read_mib:.1} MiB read \
             each time",
            median(others)
        );
    }
    Ok(())
}

fn provenance(number: usize) -> Provenance {
    let recipe = *blake3::hash(&number.to_le_bytes()).as_bytes();
    Provenance { recipe, relative_error: Some(0.0), error_basis: ErrorBasis::Weights }
}

fn record(model: &str, layer: String, made: &ArtifactInfo) -> LayerRecord {
    LayerRecord {
        model: model.to_owned(),
        layer,
        method: made.method.clone(),
        in_features: 4,
        out_features: 2,
        artifact: made.artifact,
        relative_error: made.relative_error,
        error_basis: made.error_basis,
        dense_bytes: made.stored_bytes,
        stored_bytes: made.stored_bytes,
        config: made.config.clone(),
        source: Source::default(),
        created_at: Utc::now(),
        locations: RowLocations::default(),
    }
}

/// A small matrix that no other number gives.
fn matrix(number: usize) -> Array2<f32> {
    Array2::from_shape_fn((2, 4), |(row, column)| (number >> (8 * (4 * row + column)) & 0xff) as f32)
}

async fn add(writer: &mut layerstore::Writer, number: usize) -> Result<ArtifactInfo> {
    let parts = DenseLayer::from_f32(matrix(number).view(), None).to_parts();
    writer.add(&parts, provenance(number)).await?;
    Ok(writer.made_by(&provenance(number).recipe).await?.ok_or("the artifact is not there")?.clone())
}

/// Whether a store has so many models.
async fn is_made(uri: &str, models: usize) -> bool {
    let names = async { Store::open(uri).await?.latest().await?.models().await };
    names.await.is_ok_and(|names| names.len() >= models)
}

async fn make(uri: &str, models: usize) -> Result<()> {
    let store = Store::create(uri).await?;
    // One that was begun is gone on with.
    let begun = store.latest().await?.models().await?.len();
    for first in (begun..models).step_by(MODELS_AT_ONCE) {
        let some = first..(first + MODELS_AT_ONCE).min(models);
        let mut writer = store.writer().await?;
        let mut made = vec![];
        for number in some.start * LAYERS_OF_MODEL..some.end * LAYERS_OF_MODEL {
            made.push(add(&mut writer, number).await?);
        }
        writer.flush().await?;
        drop(writer);
        for (model, made) in some.zip(made.chunks(LAYERS_OF_MODEL)) {
            let model = format!("model-{model}");
            let records: Vec<_> = made.iter().enumerate().map(|(i, made)| record(&model, name(i), made)).collect();
            store.writer().await?.commit(&model, &records, None).await?;
        }
    }
    Ok(())
}

/// Does one thing in a store some times over, and prints how long it took, the most memory of the program, and what it read.
pub async fn measure(what: &str, uri: &str, models: &str) -> Result<()> {
    let models: usize = models.parse()?;
    let mut times = vec![];
    for round in 0..=ROUNDS {
        let model = format!("model-{}", (round * 7919) % models);
        let started = Instant::now();
        once(what, uri, &model).await?;
        times.push(started.elapsed().as_secs_f64() * 1e3);
    }
    let field = |file: &str, key: &str| -> Result<f64> {
        let text = std::fs::read_to_string(file)?;
        let line = text.lines().find_map(|line| line.strip_prefix(key)).ok_or("no such field")?;
        Ok(line.split_whitespace().next().ok_or("no number")?.parse()?)
    };
    let found = Found {
        first: times[0],
        others: times.split_off(1),
        peak_mib: field("/proc/self/status", "VmHWM:")? / 1024.0,
        read_mib: field("/proc/self/io", "rchar:")? / f64::from(1 << 20) / (ROUNDS + 1) as f64,
    };
    println!("{}", serde_json::to_string(&found)?);
    Ok(())
}

async fn once(what: &str, uri: &str, model: &str) -> Result<()> {
    let store = Store::open(uri).await?;
    let layer = name(model.len() * 7);
    match what {
        "resolve" => _ = store.latest().await?.layer(model, &layer).await?,
        "list" => assert!(store.latest().await?.layers(model).await?.len() >= LAYERS_OF_MODEL),
        "import" => {
            let mut writer = store.writer().await?;
            let number = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos() as usize;
            let made = add(&mut writer, number).await?;
            writer.commit_layers(model, &[record(model, format!("added.{number}"), &made)], None).await?;
        }
        "snapshot" => {
            let number = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos();
            store.create_snapshot(&format!("s{number}")).await?;
        }
        _ => {
            store.at(SNAPSHOT).await?.layer(model, &layer).await?;
        }
    }
    Ok(())
}
