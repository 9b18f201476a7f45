//! The table of LQER-Qwix's README, made again: how far a small transformer's logits are off for int4 and int8 weights,
//! without and with a correction of rank 16 and 32. Beside each row what the peer gave (where the fixture has it), and
//! below it this project's best within the same bytes.
//!
//! `cargo run --example lqer_table` runs the peer's own model and tokens, from the fixtures of the tests; every layer
//! comes from a store. What needs calibration is calibrated with the float model's inputs for other, random tokens.

mod peer;

use std::collections::BTreeMap;
use std::path::Path;

use layerstore::{CalibrationFile, ImportOptions, Rules, Store, formats, import};
use ndarray::{Array2, Array3, Axis};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use peer::Peer;

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/golden/lqer_qwix");

/// Sequences of random tokens that calibrate.
const SEQUENCES: usize = 400;

#[tokio::main]
async fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = std::fs::read(Path::new(FIXTURES).join("transformer_fp.safetensors"))?;
    let fixture = SafeTensors::deserialize(&file)?;
    let checkpoint = folder.path().join("model.safetensors");
    write_checkpoint(&fixture, &checkpoint)?;
    let tokens = matrix(&fixture, "in.tokens")?;
    let store = Store::create(&folder.path().join("layers").display().to_string()).await?;
    let float = model(&store, &checkpoint, "float", "", None).await?.0;
    let logits = float.transformer(&tokens)?;
    let calibration = folder.path().join("calibration.safetensors");
    calibrate(&float, matrix(&fixture, "w.embed/embedding")?.nrows(), tokens.ncols(), &calibration)?;

    println!("the peer's transformer, 13 layers; absolute error of its logits");
    println!(
        "                                                bits/weight      max     mean   gain (max, mean)   peer (max, mean)"
    );
    for (bits, rank) in [(8, 16), (8, 32), (4, 16), (4, 32)] {
        let channel = format!("{{ type = 'int{bits}', group = 'channel', symmetric = true }}");
        let peers = |rank: usize| {
            rule(&format!("weight = {channel}\nclipping = 'absmax'\nfactors = 'f32'\nsvd = 'full'\nrank = {rank}"))
        };
        let (plain, ..) = model(&store, &checkpoint, "ptq", &peers(0), None).await?;
        let plain = errors(&plain.transformer(&tokens)?, &logits);
        let (lqer, used) = model(&store, &checkpoint, "lqer", &peers(rank), None).await?;
        let lqer = errors(&lqer.transformer(&tokens)?, &logits);
        let published = published(&format!("transformer_int{bits}_r{rank}.safetensors"))?;
        show(&format!("int{bits}, rank {rank}: LQER"), used, lqer, plain, published);
        // The same bytes, spent otherwise: the widest integers that fit, and components for what is left.
        let widest = (bits..=8).rev().find(|&b| f64::from(b) + 0.5 + 0.3 <= used).unwrap_or(bits);
        let ours = rule(&format!(
            "weight = {{ type = 'int{widest}', group = 32, scales = 'f16' }}\nrounding = 'gptq'\nscaling = 'exact'\nrank = {{ max_bits = {used:.4} }}\nfactors = 'int8'"
        ));
        let (ours, used) = model(&store, &checkpoint, "ours", &ours, Some(&calibration)).await?;
        let ours = errors(&ours.transformer(&tokens)?, &logits);
        show(&format!("    int{widest} g32 gptq, exact correction"), used, ours, plain, None);
    }
    Ok(())
}

fn rule(settings: &str) -> String {
    format!(
        "[[rule]]\nlayers = 'block_\\d+\\..*\\.(query|key|value|out|fc1|fc2)|output'\nmethod = 'low_rank'\n{settings}\n"
    )
}

/// Imports the checkpoint under these rules and opens it from a snapshot; with it, the bits per weight of the least layer
/// that a rule took.
async fn model(
    store: &Store,
    checkpoint: &Path,
    name: &str,
    rules: &str,
    calibration: Option<&Path>,
) -> Result<(Peer, f64)> {
    let options = ImportOptions {
        rules: Rules::parse(rules, "rules.toml")?,
        calibration: calibration.map(CalibrationFile::open).transpose()?,
        ..ImportOptions::default()
    };
    let report = import(store, formats::open(checkpoint)?, name, options).await?;
    let taken = report.layers.iter().filter(|l| l.method.as_str() == "low_rank");
    let bits = taken.filter_map(|l| l.bits_per_weight).fold(f64::INFINITY, f64::min);
    Ok((Peer::open(&store.latest().await?, name).await?, bits))
}

fn show(name: &str, bits: f64, found: (f64, f64), plain: (f64, f64), published: Option<(f64, f64)>) {
    let gain = |found: f64, plain: f64| 100.0 * (plain - found) / plain;
    let beside = published.map_or(String::new(), |(most, mean)| format!("{most:>8.5} {mean:>8.5}"));
    println!(
        "{name:<48}{bits:>10.2}   {:>8.5} {:>8.5}   {:>6.1} % {:>5.1} %   {beside}",
        found.0,
        found.1,
        gain(found.0, plain.0),
        gain(found.1, plain.1),
    );
}

/// The largest and the mean absolute difference.
fn errors(found: &Array3<f32>, exact: &Array3<f32>) -> (f64, f64) {
    let off: Vec<f64> = found.iter().zip(exact).map(|(a, b)| f64::from((a - b).abs())).collect();
    (off.iter().copied().fold(0.0, f64::max), off.iter().sum::<f64>() / off.len() as f64)
}

/// What the peer itself gave.
fn published(file: &str) -> Result<Option<(f64, f64)>> {
    let index: Value = serde_json::from_str(&std::fs::read_to_string(Path::new(FIXTURES).join("index.json"))?)?;
    let cases = index["cases"].as_array().ok_or("the index has no cases")?;
    let found = cases.iter().find(|case| case["file"] == file);
    let number = |case: &Value, name: &str| case["metrics"][name].as_f64();
    Ok(found.and_then(|case| Some((number(case, "lqer_max_abs_error")?, number(case, "lqer_mean_abs_error")?))))
}

/// The float model's inputs of each layer, for random tokens.
fn calibrate(float: &Peer, vocabulary: usize, length: usize, path: &Path) -> Result<()> {
    let mut state = 1u64;
    let tokens = Array2::from_shape_simple_fn((SEQUENCES, length), || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocabulary as u64) as f64
    });
    let mut inputs: BTreeMap<String, Vec<Array2<f32>>> = BTreeMap::new();
    float.transformer_with(&tokens, |layer, x| inputs.entry(layer.to_owned()).or_default().push(x.clone()))?;
    let mut tensors = vec![];
    for (layer, parts) in inputs {
        let views: Vec<_> = parts.iter().map(|p| p.view()).collect();
        let all = ndarray::concatenate(Axis(0), &views)?;
        tensors.push((layer, all.shape().to_vec(), all.iter().flat_map(|v| v.to_le_bytes()).collect()));
    }
    write(&tensors, path)
}

/// The peer's parameters as a checkpoint: kernels as `[out, in]` weights of layers, the rest as it is.
fn write_checkpoint(fixture: &SafeTensors, path: &Path) -> Result<()> {
    let mut tensors = vec![];
    for (name, tensor) in fixture.iter() {
        let Some(name) = name.strip_prefix("w.") else { continue };
        let (name, shape, numbers) = match name.strip_suffix("/kernel") {
            Some(layer) => {
                let weight = matrix(fixture, &format!("w.{layer}/kernel"))?.reversed_axes();
                (format!("{layer}.weight"), weight.shape().to_vec(), weight.iter().copied().collect())
            }
            None => (name.to_owned(), tensor.shape().to_vec(), numbers(&tensor)?),
        };
        let bytes = numbers.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect();
        tensors.push((name.replace('/', "."), shape, bytes));
    }
    write(&tensors, path)
}

fn write(tensors: &[(String, Vec<usize>, Vec<u8>)], path: &Path) -> Result<()> {
    let views =
        tensors.iter().map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)));
    let views: Vec<_> = views.collect::<Result<_>>()?;
    Ok(std::fs::write(path, safetensors::serialize(views, None)?)?)
}

fn matrix(fixture: &SafeTensors, name: &str) -> Result<Array2<f64>> {
    let tensor = fixture.tensor(name)?;
    let [rows, columns] = tensor.shape() else { return Err(format!("{name} is no matrix").into()) };
    Ok(Array2::from_shape_vec((*rows, *columns), numbers(&tensor)?)?)
}

fn numbers(tensor: &TensorView) -> Result<Vec<f64>> {
    let data = tensor.data();
    Ok(match tensor.dtype() {
        Dtype::F32 => data.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
        Dtype::F64 => data.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
        Dtype::I32 => data.as_chunks::<4>().0.iter().map(|b| f64::from(i32::from_le_bytes(*b))).collect(),
        Dtype::I64 => data.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
        other => return Err(format!("numbers of type {other:?}").into()),
    })
}
