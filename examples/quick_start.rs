//! From a checkpoint to a layer that runs from the store.
//!
//! ```text
//! cargo run --example quick_start
//! ```

use std::path::Path;

use layerstore::layer::Accuracy;
use layerstore::{ImportOptions, Rules, Store, formats, import};
use ndarray::Array2;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// The first rule whose pattern matches the whole of a layer's name decides. What no rule takes stays dense.
const RULES: &str = r#"
[[rule]]
layers = '.*\.up'
method = "low_rank"                                    # quantised weights
weight = { type = "nf4", group = 32, scales = "f16" }  # 32 weights of a row share a scale
dual_scaling = true                                    # and columns have scales, too
"#;

#[tokio::main]
async fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let weight = Array2::from_shape_fn((128, 256), |(i, j)| ((i * 256 + j) as f32 * 0.61).sin() / 16.0);
    let file = folder.path().join("model.safetensors");
    write_checkpoint(&file, &weight)?;

    // A store is a directory; `create` opens it where it exists already. An import is one commit: all of it or nothing.
    let store = Store::create(&folder.path().join("layers").display().to_string()).await?;
    let options = ImportOptions { rules: Rules::parse(RULES, "quick_start.rs")?, ..ImportOptions::default() };
    let report = import(&store, formats::open(&file)?, "tiny", options).await?;
    println!("imported '{}' as version {} of the store", report.model, report.version);
    for layer in &report.layers {
        let method = layer.method.as_str();
        println!("  {:<8} {method:<8} {:>6} bytes, dense {:>6}", layer.layer, layer.stored_bytes, layer.dense_bytes);
    }

    // Opening a layer reads one row of the catalogue. Its arrays are read when it first runs, and then kept in a cache.
    let layer = store.latest().await?.layer("tiny", "mlp.up").await?;
    // Inputs come in batches `[batch, in_features]`: one vector is a batch of one.
    let x = Array2::from_shape_fn((1, 256), |(_, j)| (j as f32 * 0.37).cos());
    let y = layer.forward(x.view(), Accuracy::Approximate).await?.y;

    let exact = x.dot(&weight.t());
    println!("forward of one vector: {:?} -> {:?}", x.shape(), y.shape());
    println!("relative error to the dense weight: {:.4}", relative_error(&y, &exact));
    Ok(())
}

/// A checkpoint of two layers: `mlp.up`, a matrix, and `norm`, a vector, which no rule ever compresses.
fn write_checkpoint(path: &Path, weight: &Array2<f32>) -> Result<()> {
    let up: Vec<u8> = weight.iter().flat_map(|v| v.to_le_bytes()).collect();
    let norm: Vec<u8> = [1f32; 256].iter().flat_map(|v| v.to_le_bytes()).collect();
    let tensors = [
        ("mlp.up.weight", TensorView::new(Dtype::F32, vec![128, 256], &up)?),
        ("norm.weight", TensorView::new(Dtype::F32, vec![256], &norm)?),
    ];
    Ok(safetensors::serialize_to_file(tensors, None, path)?)
}

/// Returns ‖found − expected‖ / ‖expected‖.
fn relative_error(found: &Array2<f32>, expected: &Array2<f32>) -> f64 {
    let norm = |a: &Array2<f32>| a.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    norm(&(found - expected)) / norm(expected)
}
