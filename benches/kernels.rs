//! Products with packed weights beside the dense f32 product, and beside candle's quantised ones. `make bench`, or
//! `cargo bench --bench kernels`.
//!
//! Weights and factors are made up, since only shapes and formats decide the time. The dense product is the fastest of
//! ndarray, faer and matrixmultiply, and of ndarray on all threads, in the same run. candle is run, in turn, by the program
//! that `LAYERSTORE_PEERS` names (`make bench` builds it from `benches/peers`). Times are medians.

mod dense;

use std::hint::black_box;
use std::process::Command;

use layerstore::layer::parts::{Codes, Parts, WeightRows};
use layerstore::layer::{Accuracy, Layer, Method, RowType};
use layerstore::quant::{Clipping, PackedMatrix, RowMatrix, WeightFormat};
use ndarray::{Array2, ArrayView2};
use serde_json::{Value, json};

use dense::{dense_on_all_threads, matrix, median, micros};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const RANK: usize = 32;

/// Name, format, and what inputs are rounded to.
const FORMATS: [(&str, &str, &str); 15] = [
    ("int4 g64", r#"{"type": "int4", "group": 64}"#, "f32"),
    ("int4 g64", r#"{"type": "int4", "group": 64}"#, "int8"),
    ("int4 g32 sym", r#"{"type": "int4", "group": 32, "symmetric": true}"#, "int8"),
    ("nf4 g64", r#"{"type": "nf4", "group": 64}"#, "f32"),
    ("nf4 g64", r#"{"type": "nf4", "group": 64}"#, "int8"),
    ("mxint4", r#"{"type": "mxint4"}"#, "int8"),
    ("int2 g64", r#"{"type": "int2", "group": 64}"#, "f32"),
    ("int2 g64", r#"{"type": "int2", "group": 64}"#, "int8"),
    ("int3 g64", r#"{"type": "int3", "group": 64}"#, "int8"),
    ("int5 g64", r#"{"type": "int5", "group": 64}"#, "int8"),
    ("int8 channel", r#"{"type": "int8", "group": "channel", "symmetric": true}"#, "f32"),
    ("int8 channel", r#"{"type": "int8", "group": "channel", "symmetric": true}"#, "int8"),
    ("ternary channel", r#"{"type": "ternary", "group": "channel"}"#, "f32"),
    ("ternary channel", r#"{"type": "ternary", "group": "channel"}"#, "int8_absmax"),
    ("bf16", r#"{"type": "bf16"}"#, "f32"),
];

fn main() -> Result<()> {
    // `cargo test` also runs bench targets: measuring is for `cargo bench` alone.
    if !std::env::args().any(|a| a == "--bench") {
        return Ok(());
    }
    let named: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wanted = |name: &str| named.is_empty() || named.iter().any(|n| name.contains(n.as_str()));
    for (out, inputs, batch) in
        [(4096, 4096, 1), (4096, 14_336, 1), (1536, 384, 1), (4096, 4096, 4), (4096, 4096, 32), (1536, 384, 32)]
    {
        let title = format!("{out} × {inputs}, batch {batch}");
        let weight = matrix(out, inputs, 1);
        let x = matrix(batch, inputs, 2);
        let dense = micros(dense_on_all_threads(weight.view(), x.view()));
        println!("\n{title}, rank {RANK}: dense f32 {dense:.1} µs");
        println!("{:<15} {:<12} {:>12} {:>16} {:>16}", "weights", "activations", "µs", "dense / ours", "MiB in memory");
        for (name, format, activations) in
            FORMATS.iter().filter(|(name, _, activations)| wanted(&format!("{name} {activations}")))
        {
            let layer = layer(weight.view(), serde_json::from_str(format)?, activations)?;
            let ours = micros(median(|| {
                black_box(layer.forward(black_box(x.view()), Accuracy::Approximate).map(|o| o.y).ok());
            }));
            let memory = layer.memory_bytes() as f64 / f64::from(1 << 20);
            println!("{name:<15} {activations:<12} {ours:>12.1} {:>16.2} {memory:>16.2}", dense / ours);
        }
        if let Some(peers) = std::env::var_os("LAYERSTORE_PEERS") {
            let output = Command::new(peers).args([out, inputs, batch].map(|n| n.to_string())).output()?;
            let Ok(times) = serde_json::from_slice::<Value>(&output.stdout) else {
                println!("candle: not for this shape");
                continue;
            };
            for (name, time) in times.as_object().ok_or("the peers' answer is no object")? {
                let time = time.as_f64().ok_or("a peer's time is no number")?;
                println!("{:<15} {:<12} {time:>12.1} {:>16.2}", format!("candle {name}"), "", dense / time);
            }
        }
    }
    Ok(())
}

fn layer(weight: ArrayView2<f32>, format: WeightFormat, activations: &str) -> Result<Layer> {
    let (out, inputs) = weight.dim();
    let packed = PackedMatrix::quantize(weight, format, Clipping::Absmax, None)?;
    let config = json!({
        "weight": format, "rank": RANK, "factors": "f16", "in_features": inputs, "out_features": out,
    });
    let mut parts = Parts::new(Method::LowRank, config.clone());
    parts.weights = Some(WeightRows {
        rows: out,
        packed: packed.stored_codes(),
        scales: packed.scale_bytes().into(),
        zeros: packed.zeros.clone().into(),
    });
    let factor = |length: usize, seed: u64| -> Result<Array2<u8>> {
        Ok(RowMatrix::new(matrix(RANK, length, seed) * 0.01, RowType::F16)?.bytes())
    };
    parts.codes.push(Codes { role: "a".into(), codes: factor(out, 3)? });
    parts.codes.push(Codes { role: "b".into(), codes: factor(inputs, 4)? });
    parts.tensors.push(layerstore::layer::parts::Tensor::vector("singular_values", &[1.0; RANK]));
    let mut running = config;
    running["activations"] = json!(activations);
    Ok(Layer::from_parts(parts)?.configured(&running)?)
}
