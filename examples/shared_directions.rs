//! Which layers of two models share directions: a model and its child, one of whose layers was trained anew.
//!
//! ```text
//! cargo run --example shared_directions
//! ```

mod synthetic;

use std::path::Path;

use layerstore::{CalibrationFile, ImportOptions, Rules, SharedOptions, Store, formats, import, shared_directions};
use ndarray::{Array2, Axis};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Plain singular vectors: directions of the weights themselves. The inputs say which of them matter.
const RULES: &str = r#"
[[rule]]
layers = 'block\..*'
method = "key_value"
decomposition = "svd"
expected_keys_per_query = 32
"#;

const RETRAINED: &str = "block.1.mlp.up.weight";

#[tokio::main]
async fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (parent, child) = (folder.path().join("parent.safetensors"), folder.path().join("child.safetensors"));
    let inputs = folder.path().join("calibration.safetensors");
    synthetic::write_checkpoint(&parent)?;
    synthetic::write_calibration(&inputs)?;
    write_child(&parent, &child)?;
    let store = Store::create(&folder.path().join("layers").display().to_string()).await?;
    for (model, checkpoint) in [("parent", &parent), ("child", &child)] {
        let calibration = Some(CalibrationFile::open(&inputs)?);
        let options = ImportOptions { rules: Rules::parse(RULES, "rules")?, calibration, ..ImportOptions::default() };
        import(&store, formats::open(checkpoint)?, model, options).await?;
    }
    let latest = store.latest().await?;

    // The 16 strongest keys of each layer of the child, among the keys of each layer of the parent.
    let options = SharedOptions { keys: 16, least: 0.95 };
    let pairs = shared_directions(&latest, "child", "parent", options).await?;
    println!("child's layer             most like the parent's    shared keys   mean |cosine|");
    let mut seen = vec![];
    for pair in &pairs {
        if !seen.contains(&&pair.layer) {
            seen.push(&pair.layer);
            println!(
                "{:<25} {:<25} {:>4} of {:<4}  {:.4}",
                pair.layer, pair.other, pair.shared, pair.keys, pair.mean_cosine
            );
        }
    }
    let own = |layer: &str| pairs.iter().find(|p| p.layer == layer && p.other == layer);
    let (kept, lost) = (own("block.0.mlp.up").ok_or("no such pair")?, own("block.1.mlp.up").ok_or("no such pair")?);
    assert!(kept.shared > 12 && lost.shared < 4);

    // One key of the child, among the keys of all layers of the store. `Store::index_keys` would make an index first.
    let key = latest.layer("child", "block.0.attention.query").await?.key(0).await?;
    for near in latest.nearest_keys(key.view().insert_axis(Axis(0)), 3, None).await?.concat() {
        let names: Vec<String> = near.layers.iter().map(|l| format!("{}/{}", l.model, l.layer)).collect();
        println!("{:+.4}  key {:>3} of {}", near.cosine, near.key, names.join(", "));
    }
    Ok(())
}

/// The same tensors, a little further on; one of them made anew.
fn write_child(parent: &Path, child: &Path) -> Result<()> {
    let parent = formats::open(parent)?;
    let mut tensors = vec![];
    for entry in parent.tensors().values() {
        if entry.shape.len() != 2 {
            continue;
        }
        let weight = parent.matrix(entry)?;
        let mut state = 99u64;
        let noise = Array2::from_shape_fn(weight.dim(), |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
        });
        let size = |m: &Array2<f32>| m.iter().map(|v| v * v).sum::<f32>().sqrt();
        let strength = if entry.name == RETRAINED { 1.0 } else { 0.01 };
        let changed = &weight * (1.0 - strength) + &noise * (strength * size(&weight) / size(&noise));
        tensors.push((entry.name.clone(), entry.shape.clone(), changed));
    }
    let bytes: Vec<(&String, &Vec<usize>, Vec<u8>)> =
        tensors.iter().map(|(n, s, m)| (n, s, m.iter().flat_map(|v| v.to_le_bytes()).collect())).collect();
    let views = bytes.iter().map(|(name, shape, data)| {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, (*shape).clone(), data)?;
        Ok((name.as_str(), view))
    });
    let views = views.collect::<Result<Vec<_>>>()?;
    safetensors::serialize_to_file(views, None, child)?;
    Ok(())
}
