//! Two versions of a model in one store: named, compared, run beside each other, and taken back.
//!
//! ```text
//! cargo run --example snapshots
//! ```

mod synthetic;

use std::path::Path;

use layerstore::layer::Accuracy;
use layerstore::{CalibrationFile, Diff, ImportOptions, ImportReport, Rules, State, Store, formats, import};
use ndarray::Array2;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const MODEL: &str = "synthetic";
const LAYER: &str = "block.0.attention.query";

/// A careful first version: one byte a weight.
const FIRST: &str = r#"
[[rule]]
layers = 'block\..*'
method = "low_rank"
weight = { type = "int8", group = "channel" }
"#;

/// The second goes down to four bits in the attention, with rounding that looks at the inputs; the rest is as it was.
const SECOND: &str = r#"
[[rule]]
layers = 'block\.\d+\.attention\..*'
method = "low_rank"
weight = { type = "nf4", group = 32, scales = "f16" }
rounding = "gptq"
bias_correction = true

[[rule]]
layers = 'block\..*'
method = "low_rank"
weight = { type = "int8", group = "channel" }
"#;

#[tokio::main]
async fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    synthetic::write_checkpoint(&folder.path().join("model.safetensors"))?;
    synthetic::write_calibration(&folder.path().join("calibration.safetensors"))?;
    let store = Store::create(&folder.path().join("layers").display().to_string()).await?;

    let report = import_with(&store, folder.path(), FIRST, "int8 everywhere").await?;
    println!("version {}: {} bytes", report.version, report.stored_bytes);
    // A name for this version. gc keeps every version that has one.
    let snapshot = store.create_snapshot("v1").await?;
    println!("snapshot '{}' is version {}", snapshot.name, snapshot.version);

    let report = import_with(&store, folder.path(), SECOND, "4 bits in the attention").await?;
    let reused = report.layers.iter().filter(|l| l.reused).count();
    println!(
        "version {}: {} bytes, {reused} of {} layers were in the store already",
        report.version,
        report.stored_bytes,
        report.layers.len()
    );

    // Both versions are open at once, and stay what they are whatever is committed meanwhile.
    let old = store.at("v1").await?;
    let new = store.latest().await?;
    println!("\nwhat changed since 'v1':");
    print(&old.diff(&new).await?);

    let before = old.layer(MODEL, LAYER).await?;
    let after = new.layer(MODEL, LAYER).await?;
    let x = Array2::from_shape_fn((1, 128), |(_, j)| (j as f32 * 0.37).cos());
    let y_before = before.forward(x.view(), Accuracy::Approximate).await?.y;
    let y_after = after.forward(x.view(), Accuracy::Approximate).await?.y;
    let change = relative_error(&y_after, &y_before);
    println!("\n'{LAYER}' answers differ by {change:.4} between the two");

    // Going back is a new version too, so it can itself be undone.
    let restored = store.restore("v1").await?;
    let back = store.latest().await?.layer(MODEL, LAYER).await?;
    let same = back.record().artifact == before.record().artifact;
    println!("restored 'v1' as version {}; the layer is the same artifact as in 'v1': {same}", restored.version);

    println!("\nlog, newest first:");
    for entry in store.log().await? {
        let message = entry.message.unwrap_or_default();
        println!("  {:>2}  {:<18} {:<24} {}", entry.version, entry.operation, message, entry.snapshots.join(", "));
    }
    Ok(())
}

async fn import_with(store: &Store, folder: &Path, rules: &str, message: &str) -> Result<ImportReport> {
    let options = ImportOptions {
        rules: Rules::parse(rules, "snapshots.rs")?,
        calibration: Some(CalibrationFile::open(folder.join("calibration.safetensors"))?),
        message: Some(message.to_owned()),
        ..ImportOptions::default()
    };
    let checkpoint = formats::open(folder.join("model.safetensors"))?;
    Ok(import(store, checkpoint, MODEL, options).await?)
}

fn print(diff: &Diff) {
    let state = |s: &State| {
        let error = s.relative_error.map_or("unknown".into(), |e| format!("{e:.4}"));
        format!("{} bytes at error {error}", s.stored_bytes)
    };
    for layer in &diff.added {
        println!("  + {}: {}", layer.layer, state(&layer.state));
    }
    for layer in &diff.removed {
        println!("  - {}: {}", layer.layer, state(&layer.state));
    }
    for layer in &diff.changed {
        println!("  ~ {}: {}, now {}", layer.layer, state(&layer.before), state(&layer.after));
    }
}

/// Returns ‖found − expected‖ / ‖expected‖.
fn relative_error(found: &Array2<f32>, expected: &Array2<f32>) -> f64 {
    let norm = |a: &Array2<f32>| a.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    norm(&(found - expected)) / norm(expected)
}
