//! Running layers, beside the dense f32 product that they stand for. `make bench`, or `cargo bench --bench layers`.
//!
//! Keys and values are made up, since only their shapes decide the time: scales that fall as those of a trained layer
//! do, and inputs that use 64 keys on average. The dense product is the fastest of ndarray, faer and matrixmultiply in
//! the same run, one thread each for one query. Times are medians.

mod dense;

use std::hint::black_box;

use layerstore_core::layer::parts::{Codes, Keys, Parts, Tensor};
use layerstore_core::layer::{Accuracy, RowType, SharedLayer, configured, layer_from_parts};
use layerstore_core::quant::RowMatrix;
use ndarray::Array1;
use serde_json::json;

use dense::{dense, matrix, median, micros};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const KEYS_USED: f64 = 64.0;

fn main() -> Result<()> {
    // `cargo test` also runs bench targets: measuring is for `cargo bench` alone.
    if !std::env::args().any(|a| a == "--bench") {
        return Ok(());
    }
    println!("layer [out × in]   batch  dense f32       kept as  key_value       dense / key_value  memory");
    for (out, inputs, batches) in [(1536, 384, [1, 32].as_slice()), (384, 1536, &[1, 32]), (11_008, 4096, &[1])] {
        let weight = matrix(out, inputs, 1);
        let layers = [RowType::F32, RowType::F16, RowType::Int8].map(|kind| (kind, layer(out, inputs, kind)));
        for &batch in batches {
            let x = matrix(batch, inputs, 2);
            let dense = dense(weight.view(), x.view());
            for (kind, layer) in &layers {
                let layer = layer.as_ref().map_err(|e| e.to_string())?;
                let ours = median(|| {
                    black_box(layer.forward(black_box(x.view()), Accuracy::Approximate).map(|o| o.y).ok());
                });
                println!(
                    "{out:>6} × {inputs:<8}  {batch:>5}  {:>10.1} µs   {kind:<7?}  {:>10.1} µs   {:>8.2}           {:>6.2} MiB",
                    micros(dense),
                    micros(ours),
                    micros(dense) / micros(ours),
                    layer.memory_bytes() as f64 / f64::from(1 << 20),
                );
            }
        }
    }
    Ok(())
}

fn layer(out: usize, inputs: usize, kind: RowType) -> Result<SharedLayer> {
    let rank = out.min(inputs);
    let config = json!({
        "decomposition": "whitened_svd", "energy_keep": 1.0, "min_singular_value": 0.0, "ridge_regularization": 0.0,
        "ridge_relative": 0.0, "use_bias": true, "backend": {"type": "flat", "keys": kind}, "values": kind,
        "calibrated": false, "in_features": inputs, "out_features": out, "rank": rank, "truncation": 0.0,
        "key_error": 0.0, "value_error": 0.0, "rounding": 1e-6,
    });
    let scales: Vec<f32> = (0..rank).map(|i| 10.0 * (-6.0 * i as f32 / rank as f32).exp()).collect();
    // Scores of unit variance.
    let keys = matrix(rank, inputs, 3) * (3.0 / inputs as f32).sqrt() * 3f32.sqrt();
    let values = matrix(rank, out, 4) * (3.0 / out as f32).sqrt();
    let mut parts = Parts::new("key_value", config.clone());
    let vector = |name: &str, values: &[f32]| Tensor::vector(name, values);
    if kind == RowType::F32 {
        parts.keys = Some(Keys { vectors: keys, scales });
        parts.values = Some(values);
    } else {
        for (role, matrix, name) in [("keys", keys, "key_scales"), ("values", values, "value_scales")] {
            let rows = RowMatrix::new(matrix, kind)?;
            parts.codes.push(Codes { role: role.into(), codes: rows.bytes() });
            if !rows.scales().is_empty() {
                parts.tensors.push(vector(name, rows.scales()));
            }
        }
        parts.tensors.push(vector("scales", &scales));
    }
    parts.tensors.push(vector("mean", &Array1::zeros(inputs).to_vec()));
    parts.tensors.push(vector("mean_output", &Array1::zeros(out).to_vec()));
    let mut settings = config;
    settings["expected_keys_per_query"] = json!(KEYS_USED);
    Ok(configured(&layer_from_parts(parts)?, &settings)?)
}
