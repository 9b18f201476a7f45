//! Imports a checkpoint by a rules file, tells how far it is, and prints what became of each layer.
//!
//! ```text
//! cargo run --example import_with_rules                                  # a made-up model in a temporary store
//! cargo run --example import_with_rules -- CHECKPOINT RULES STORE MODEL [CALIBRATION]
//! ```

mod synthetic;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use comfy_table::{CellAlignment, Table, presets};
use layerstore::{ErrorBasis, ImportOptions, ImportReport, Progress, Store, formats, import};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const USAGE: &str = "\
usage: import_with_rules [CHECKPOINT RULES STORE MODEL [CALIBRATION]]

  CHECKPOINT   a .safetensors file, a .index.json of shards, or a folder that holds either
  RULES        a TOML file: which layers are compressed how
  STORE        the store's directory or object-store URI, made where it does not exist
  MODEL        the name to import the checkpoint under
  CALIBRATION  a .safetensors file of inputs, tensors [tokens, in_features] named after layers

Without arguments a made-up model is imported into a temporary store.";

const RULES: &str = r#"
[[rule]]
layers = 'block\.\d+\.attention\..*'
method = "low_rank"
weight = { type = "nf4", group = 32, scales = "f16" }
rounding = "gptq"            # codes that compensate for each other's errors on the calibration inputs
bias_correction = true

# Keys and values are floats here: what shrinks is the work of a query, which uses 32 keys on average.
[[rule]]
layers = 'block\.\d+\.mlp\..*'
method = "key_value"
energy_keep = 0.99           # drop the components that hold the last 1 % of the energy
expected_keys_per_query = 32
"#;

#[tokio::main]
async fn main() -> ExitCode {
    // A name that is not UTF-8 is not found later, with a message that shows it.
    let args: Vec<String> = std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    let outcome = match args.as_slice() {
        [] => demonstration().await,
        [checkpoint, rules, store, model] => run(checkpoint, rules, None, store, model).await,
        [checkpoint, rules, store, model, calibration] => run(checkpoint, rules, Some(calibration), store, model).await,
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

/// The same on files that are made up here.
async fn demonstration() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    synthetic::write_checkpoint(&at("model.safetensors"))?;
    synthetic::write_calibration(&at("calibration.safetensors"))?;
    std::fs::write(at("rules.toml"), RULES)?;
    let text = |name: &str| at(name).display().to_string();
    let calibration = text("calibration.safetensors");
    run(&text("model.safetensors"), &text("rules.toml"), Some(&calibration), &text("layers"), "synthetic").await
}

async fn run(checkpoint: &str, rules: &str, calibration: Option<&str>, store: &str, model: &str) -> Result<()> {
    let checkpoint = formats::open(Path::new(checkpoint))?;
    let store = Store::create(store).await?;
    let options = ImportOptions {
        message: Some("from the example import_with_rules".into()),
        progress: Arc::new(Printer::default()),
        ..ImportOptions::from_files(Some(Path::new(rules)), calibration.map(Path::new))?
    };
    let report = import(&store, checkpoint, model, options).await?;
    print(&report);
    Ok(())
}

/// Progress goes to standard error, so that standard output holds the table alone.
#[derive(Default)]
struct Printer {
    layers: AtomicUsize,
    done: AtomicUsize,
}

impl Progress for Printer {
    fn started(&self, layers: usize, bytes: u64) {
        self.layers.store(layers, Ordering::Relaxed);
        eprintln!("importing {layers} layers, {bytes} bytes");
    }

    fn layer(&self, name: &str) {
        let number = self.done.load(Ordering::Relaxed) + 1;
        eprint!("[{number}/{}] {name} ...", self.layers.load(Ordering::Relaxed));
    }

    fn layer_done(&self, _bytes: u64, skipped: bool) {
        self.done.fetch_add(1, Ordering::Relaxed);
        eprintln!("{}", if skipped { " in the store already" } else { " done" });
    }
}

fn print(report: &ImportReport) {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header(["layer", "method", "error", "measured on", "bytes", "dense / stored"]);
    for layer in &report.layers {
        table.add_row([
            layer.layer.clone(),
            layer.method.to_string(),
            layer.relative_error.map_or("-".into(), |e| format!("{e:.4}")),
            measured_on(layer.error_basis).into(),
            layer.stored_bytes.to_string(),
            ratio(layer.dense_bytes, layer.stored_bytes),
        ]);
    }
    let (stored, total) = (report.stored_bytes.to_string(), ratio(report.dense_bytes, report.stored_bytes));
    table.add_row(["all", "", "", "", stored.as_str(), total.as_str()]);
    for place in [2, 4, 5] {
        if let Some(column) = table.column_mut(place) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    println!("model '{}', version {}\n{table}", report.model, report.version);
    // What the store held already, for this or another model, is not written again.
    println!("{} bytes were new to the store", report.written_bytes);
    for rule in &report.unused_rules {
        eprintln!("warning: a rule took no layer: {rule}");
    }
}

/// The inputs that an import has are those that it calibrates with.
fn measured_on(basis: ErrorBasis) -> &'static str {
    match basis {
        ErrorBasis::Activations => "calibration",
        ErrorBasis::Weights => "weights",
    }
}

fn ratio(dense: u64, stored: u64) -> String {
    if stored == 0 { "-".into() } else { format!("{:.2}", dense as f64 / stored as f64) }
}
