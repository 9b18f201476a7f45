//! The backends of a key–value layer beside each other: recall against a scan of every f32 key at the same threshold,
//! error, time of one query and memory. `cargo bench --bench backends`.
//!
//! On six layers of all-MiniLM-L6-v2, one of each kind and block, where `demo/minilm` holds it (`make demo` fetches it).
//! Three quarters of the tokens in `demo/calibration.safetensors` calibrate and the rest are the queries; or another
//! file's tokens are, which `LAYERSTORE_EVALUATION` names. Times are medians of single queries, in one run.

use std::collections::HashSet;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::Instant;

use layerstore::layer::{Accuracy, KeyValueConfig, KeyValueLayer, Layer, Limit, compress};
use layerstore::{ActivationsFile, Calibration, formats};
use layerstore_core::linalg::{matmul_nt, relative_error};
use ndarray::{Array2, ArrayView2, Axis, s};
use serde_json::json;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const LAYERS: [&str; 6] = [
    "encoder.layer.0.attention.self.query",
    "encoder.layer.1.attention.self.key",
    "encoder.layer.2.attention.self.value",
    "encoder.layer.3.attention.output.dense",
    "encoder.layer.4.intermediate.dense",
    "encoder.layer.5.output.dense",
];

const KEYS: [f64; 3] = [32.0, 64.0, 128.0];

const QUERIES: usize = 128;

fn backends() -> Vec<(&'static str, serde_json::Value)> {
    let pq = json!({"type": "pq", "subvectors": 96, "codewords": 256});
    let ivf = json!({"type": "ivf_pq", "clusters": 16, "probes": 8, "subvectors": 96});
    let hnsw = json!({"type": "hnsw"});
    let with = |base: &serde_json::Value, name: &str, value: serde_json::Value| {
        let mut changed = base.clone();
        changed[name] = value;
        changed
    };
    vec![
        ("flat f32", json!({"type": "flat"})),
        ("flat f16", json!({"type": "flat", "keys": "f16"})),
        ("flat int8", json!({"type": "flat", "keys": "int8"})),
        ("pq 96 × 256", pq.clone()),
        ("pq 96 × 256, refined", with(&pq, "store_float_keys", json!(true))),
        ("ivf_pq 8 of 16 cells", ivf.clone()),
        ("ivf_pq 8 of 16, refined", with(&ivf, "store_float_keys", json!(true))),
        ("ivf_pq 14 of 16, refined", with(&with(&ivf, "store_float_keys", json!(true)), "probes", json!(14))),
        ("hnsw f32", hnsw.clone()),
        ("hnsw f16", with(&hnsw, "vectors", json!("f16"))),
        ("hnsw bf16", with(&hnsw, "vectors", json!("bf16"))),
    ]
}

/// A layer's weight, the layer that scans every f32 key, and the tokens to calibrate with and to ask.
struct Case {
    weight: Array2<f32>,
    exact: KeyValueLayer,
    calibration: Array2<f32>,
    queries: Array2<f32>,
}

fn main() -> Result<()> {
    // `cargo test` also runs bench targets: measuring is for `cargo bench` alone.
    if !std::env::args().any(|a| a == "--bench") {
        return Ok(());
    }
    let (checkpoint, calibration) =
        (Path::new("demo/minilm/model.safetensors"), Path::new("demo/calibration.safetensors"));
    if !checkpoint.exists() || !calibration.exists() {
        println!("backends: left out, since {} is not there; run `make demo` first", checkpoint.display());
        return Ok(());
    }
    let (checkpoint, calibration) = (formats::open(checkpoint)?, ActivationsFile::open(calibration)?);
    let evaluation =
        std::env::var_os("LAYERSTORE_EVALUATION").map(PathBuf::from).map(ActivationsFile::open).transpose()?;
    let cases = LAYERS.iter().map(|name| {
        let tensor = checkpoint.tensor(&format!("{name}.weight")).ok_or("a layer is not in the checkpoint")?;
        let weight = checkpoint.matrix(tensor)?;
        let inputs = |a: &ActivationsFile| -> Result<Array2<f32>> {
            Ok(a.get(name, weight.ncols())?.ok_or("a layer has no calibration tokens")?)
        };
        let all = inputs(&calibration)?;
        let (calibration, queries) = match &evaluation {
            Some(evaluation) => (all, inputs(evaluation)?),
            None => {
                let (a, b) = all.view().split_at(Axis(0), all.nrows() * 3 / 4);
                (a.to_owned(), b.to_owned())
            }
        };
        let step = (queries.nrows() / QUERIES).max(1);
        let queries = queries.slice(s![..;step, ..]).as_standard_layout().into_owned();
        let exact = layer(&json!({"type": "flat"}), weight.view(), calibration.view())?;
        Ok(Case { weight, exact, calibration, queries })
    });
    let cases: Vec<Case> = cases.collect::<Result<_>>()?;
    println!("six layers of all-MiniLM-L6-v2: means over them; recall at the same threshold");
    println!("backend                     stored      memory  keys   recall   error    µs a query   flat f32 / it");
    let mut flat = vec![0.0; KEYS.len()];
    for (name, settings) in backends() {
        let layers: Vec<KeyValueLayer> =
            cases.iter().map(|c| layer(&settings, c.weight.view(), c.calibration.view())).collect::<Result<_>>()?;
        let stored = layers.iter().map(|l| l.to_parts().stored_bytes()).sum::<u64>() as f64;
        let memory = layers.iter().map(|l| l.memory_bytes()).sum::<usize>() / layers.len();
        for (place, &keys) in KEYS.iter().enumerate() {
            let (mut found, mut all, mut error, mut micros) = (0u32, 0u32, 0.0, 0.0);
            for (case, layer) in cases.iter().zip(&layers) {
                let exact = case.exact.search(case.queries.view(), Some(Limit::Keys(keys)))?;
                let limit = Limit::Threshold(exact.first().ok_or("no queries")?.threshold);
                let ours = layer.search(case.queries.view(), Some(limit))?;
                for (exact, ours) in exact.iter().zip(&ours) {
                    let ours: HashSet<u32> = ours.hits.iter().map(|hit| hit.key).collect();
                    all += exact.hits.len() as u32;
                    found += exact.hits.iter().filter(|hit| ours.contains(&hit.key)).count() as u32;
                }
                let mut settings = layer.settings().clone();
                settings.expected_keys_per_query = None;
                settings.threshold = exact.first().map(|e| e.threshold);
                let running = layer.with_search(settings)?;
                let y = running.forward(case.queries.view(), Accuracy::Approximate)?.y;
                error += relative_error(y.view(), matmul_nt(case.queries.view(), case.weight.view()).view());
                micros += one_query(&running, case.queries.view());
            }
            let count = cases.len() as f64;
            if name == "flat f32" {
                flat[place] = micros;
            }
            println!(
                "{name:<24} {:>6.2} MiB  {:>6.2} MiB  {keys:>4}   {:.4}   {:.4}   {:>8.1}     {:>6.2}",
                stored / count / f64::from(1 << 20),
                memory as f64 / f64::from(1 << 20),
                f64::from(found) / f64::from(all),
                error / count,
                micros / count,
                flat[place] / micros,
            );
        }
    }
    Ok(())
}

fn layer(backend: &serde_json::Value, weight: ArrayView2<f32>, calibration: ArrayView2<f32>) -> Result<KeyValueLayer> {
    let config: KeyValueConfig = serde_json::from_value(json!({"backend": backend}))?;
    Ok(compress(&config, weight, None, Some(&Calibration::of(calibration.to_owned())?))?)
}

/// The median time of a forward pass on one row, in µs.
fn one_query(layer: &dyn Layer, queries: ArrayView2<f32>) -> f64 {
    let mut times = vec![];
    for _ in 0..3 {
        for row in queries.axis_chunks_iter(Axis(0), 1) {
            let started = Instant::now();
            black_box(layer.forward(black_box(row), Accuracy::Approximate).map(|o| o.y).ok());
            times.push(started.elapsed());
        }
    }
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e6
}
