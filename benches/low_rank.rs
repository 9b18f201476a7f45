//! Low-rank layers: the error of each option at its bits per weight, and the time that compressing takes.
//! `cargo bench --bench low_rank`.
//!
//! On the 36 linear layers of all-MiniLM-L6-v2's encoder where `demo/minilm` holds it (`make demo` fetches it). Three
//! quarters of the tokens in `demo/calibration.safetensors` calibrate and the rest measure; or those of the files that
//! `LAYERSTORE_CALIBRATION` and `LAYERSTORE_EVALUATION` name. Layers are compressed without their biases; bits count everything that is stored.
//! `svd` runs the comparison of decompositions alone. Other arguments choose options by part of their name, or are settings of your own as JSON:
//! `cargo bench --bench low_rank -- '{"weight": {"type": "int3"}, "rank": 8}'`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use layerstore::layer::{Accuracy, Clipping, Layer, LowRankConfig, PackedMatrix, Rank, WeightFormat, compress};
use layerstore::{ActivationsFile, Calibration, formats};
use layerstore_core::linalg::{SketchOptions, Svd, leading_svd, matmul_nt, randomized_svd, relative_error};
use ndarray::{Array2, Axis};
use serde_json::{Value, json};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

fn options() -> Vec<(&'static str, Value)> {
    let int = |bits: u8, group: usize| json!({"type": format!("int{bits}"), "group": group, "scales": "f16"});
    let channel = |kind: &str| json!({"type": kind, "group": "channel", "symmetric": true});
    let peer = |kind: &str, rank: usize| json!({"weight": channel(kind), "clipping": "absmax", "rank": rank, "factors": "f32"});
    let gptq =
        |weight: Value, rank: Value| json!({"weight": weight, "rounding": "gptq", "scaling": "exact", "rank": rank});
    let nearest = |weight: Value, rank: usize| json!({"weight": weight, "scaling": "exact", "rank": rank});
    let small = |weight: Value| {
        let mut all = gptq(weight, json!({"max_bits": 4.85}));
        for (name, value) in [("factors", json!("int8")), ("bias_correction", json!(true)), ("sweeps", json!(4))] {
            all[name] = value;
        }
        all
    };
    let ternary = |rank: usize| {
        let mut all = gptq(json!({"type": "ternary", "scales": "f16"}), json!(rank));
        for (name, value) in [("bias_correction", json!(true)), ("activations", json!("int8_absmax"))] {
            all[name] = value;
        }
        all
    };
    vec![
        ("LQER as published: int4 channel, rank 16", peer("int4", 16)),
        ("LQER as published: int4 channel, rank 32", peer("int4", 32)),
        ("LQER as published: int8 channel, rank 16", peer("int8", 16)),
        ("LQER as published: int8 channel, rank 32", peer("int8", 32)),
        ("LQER: int4 g64 nearest, identity 32", json!({"weight": {"type": "int4"}, "rank": 32, "factors": "f32"})),
        ("int4 g64 nearest, exact 32", nearest(int(4, 64), 32)),
        ("int4 g64 nearest, rms 32", json!({"weight": int(4, 64), "scaling": "rms", "rank": 32})),
        ("int4 g64 nearest, mean_abs 32", json!({"weight": int(4, 64), "scaling": "mean_abs", "rank": 32})),
        ("nf4 g64 nearest, exact 32", nearest(json!({"type": "nf4", "scales": "f16"}), 32)),
        ("mxint4 b32 nearest, exact 32", nearest(json!({"type": "mxint4"}), 32)),
        ("int4 g64 hqq", json!({"weight": int(4, 64), "clipping": "hqq", "rank": 0})),
        ("int4 g64 nearest", json!({"weight": int(4, 64), "rank": 0})),
        ("int4 g64 sinq", json!({"weight": int(4, 64), "dual_scaling": true, "rank": 0})),
        ("nf4 g64 nearest", json!({"weight": {"type": "nf4", "scales": "f16"}, "rank": 0})),
        ("nf4 g64 sinq", json!({"weight": {"type": "nf4", "scales": "f16"}, "dual_scaling": true, "rank": 0})),
        ("int3 g64 nearest", json!({"weight": int(3, 64), "rank": 0})),
        ("int3 g64 sinq", json!({"weight": int(3, 64), "dual_scaling": true, "rank": 0})),
        ("int4 g64 gptq, int8 activations", {
            let mut all = gptq(int(4, 64), json!(0));
            all["activations"] = json!("int8");
            all
        }),
        ("int4 g64 gptq", gptq(int(4, 64), json!(0))),
        ("int4 g64 gptq, exact 32", gptq(int(4, 64), json!(32))),
        ("int4 g32 gptq, corrected to 4.85 bits", small(int(4, 32))),
        ("nf4 g64 gptq, corrected to 4.85 bits", small(json!({"type": "nf4", "scales": "f16"}))),
        ("nf4 g32 gptq, corrected to 4.85 bits", small(json!({"type": "nf4", "group": 32, "scales": "f16"}))),
        ("int5 g64 gptq", gptq(int(5, 64), json!(0))),
        ("int3 g64 nearest, exact 32", nearest(int(3, 64), 32)),
        ("int3 g64 gptq, exact 32", gptq(int(3, 64), json!(32))),
        ("int2 g32 nearest, exact 64", nearest(int(2, 32), 64)),
        ("int2 g32 gptq, exact 64", gptq(int(2, 32), json!(64))),
        ("int8 g64 nearest", json!({"weight": int(8, 64), "rank": 0})),
        ("ternary, one scale by the mean", {
            let weight = json!({"type": "ternary", "group": "tensor", "symmetric": true});
            json!({"weight": weight, "clipping": "absmean", "rank": 0, "activations": "int8_absmax"})
        }),
        ("ternary g64 gptq", ternary(0)),
        ("ternary g64 nearest, exact 64", nearest(json!({"type": "ternary", "scales": "f16"}), 64)),
        ("ternary g64 gptq, exact 64", ternary(64)),
    ]
}

/// A layer's weight, its inputs to calibrate with and to measure with, and the exact outputs of these.
struct Case {
    weight: Array2<f32>,
    calibration: Array2<f32>,
    inputs: Array2<f32>,
    outputs: Array2<f32>,
}

fn main() -> Result<()> {
    // `cargo test` also runs bench targets: measuring is for `cargo bench` alone.
    if !std::env::args().any(|a| a == "--bench") {
        return Ok(());
    }
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    if wanted.is_empty() || wanted.iter().any(|w| w == "svd") {
        decompositions()?;
    }
    let checkpoint = Path::new("demo/minilm/model.safetensors");
    let named = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let calibration = named("LAYERSTORE_CALIBRATION").unwrap_or_else(|| "demo/calibration.safetensors".into());
    if !checkpoint.exists() || !calibration.exists() {
        println!("low_rank: left out, since {} is not there; run `make demo` first", checkpoint.display());
        return Ok(());
    }
    let cases = cases(checkpoint, &calibration, named("LAYERSTORE_EVALUATION").as_deref())?;
    println!(
        "all-MiniLM-L6-v2, means over {} layers: relative error of outputs on tokens not calibrated with",
        cases.len()
    );
    println!("option                                         bits    uncorrected   corrected   seconds in all");
    let given = wanted.iter().filter(|w| w.starts_with('{'));
    let given = given.map(|text| Ok((text.as_str(), serde_json::from_str(text)?))).collect::<Result<Vec<_>>>()?;
    for (name, settings) in options().into_iter().chain(given) {
        if !wanted.is_empty() && !wanted.iter().any(|w| name.contains(w.as_str())) {
            continue;
        }
        let config: LowRankConfig = serde_json::from_value(settings)?;
        let (mut bytes, mut weights, mut plain, mut corrected, mut seconds) = (0u64, 0usize, 0.0, 0.0, 0.0);
        for case in &cases {
            let started = Instant::now();
            let calibration = Calibration::of(case.calibration.clone())?;
            let layer = compress(&config, case.weight.view(), None, Some(&calibration))?;
            seconds += started.elapsed().as_secs_f64();
            bytes += layer.to_parts().stored_bytes();
            weights += case.weight.len();
            let without = matmul_nt(case.inputs.view(), layer.quantized().dequantize().view());
            plain += relative_error(without.view(), case.outputs.view());
            let y = layer.forward(case.inputs.view(), Accuracy::Approximate)?.y;
            corrected += relative_error(y.view(), case.outputs.view());
        }
        let count = cases.len() as f64;
        println!(
            "{name:<44} {:>6.3}         {:.4}      {:.4}         {seconds:>6.1}",
            8.0 * bytes as f64 / weights as f64,
            plain / count,
            corrected / count,
        );
    }
    Ok(())
}

/// The randomised SVD beside the full one, on the error of an int4 weight, and the time that a large layer takes.
fn decompositions() -> Result<()> {
    for n in [1024, 4096] {
        let mut state = 1u64;
        // Sums of uniform numbers: close to normal, as weights are.
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
        };
        let weight = Array2::from_shape_simple_fn((n, n), || (0..4).map(|_| uniform()).sum::<f32>());
        let packed = PackedMatrix::quantize(weight.view(), WeightFormat::default(), Clipping::Mse, None)?;
        let error = &weight - &packed.dequantize();
        let squared: f64 = error.iter().map(|&v| f64::from(v).powi(2)).sum();
        let left = |kept: &Svd| (squared - kept.s.iter().map(|s| s * s).sum::<f64>()).sqrt();
        let started = Instant::now();
        let sketched = randomized_svd(&error.view(), 32, SketchOptions::default())?;
        let fast = started.elapsed().as_secs_f64();
        let started = Instant::now();
        let full = leading_svd(error.mapv(f64::from).view(), 32)?;
        let slow = started.elapsed().as_secs_f64();
        let started = Instant::now();
        let settings = LowRankConfig { rank: Rank::Components(32), ..LowRankConfig::default() };
        compress(&settings, weight.view(), None, None)?;
        println!(
            "{n} × {n}, rank 32: randomised SVD {fast:.2} s, full {slow:.2} s ({:.0}×); error left {:.5}× the full one's; int4 g64 with rank 32, all of it: {:.2} s",
            slow / fast,
            left(&sketched) / left(&full),
            started.elapsed().as_secs_f64(),
        );
    }
    Ok(())
}

fn cases(checkpoint: &Path, calibration: &Path, evaluation: Option<&Path>) -> Result<Vec<Case>> {
    let (checkpoint, calibration) = (formats::open(checkpoint)?, ActivationsFile::open(calibration)?);
    let evaluation = evaluation.map(ActivationsFile::open).transpose()?;
    let parts = [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ];
    let names = (0..6).flat_map(|block| parts.map(|part| format!("encoder.layer.{block}.{part}")));
    let case = |name: String| {
        let tensor = checkpoint.tensor(&format!("{name}.weight")).ok_or("a layer is not in the checkpoint")?;
        let weight = checkpoint.matrix(tensor)?;
        let inputs = |a: &ActivationsFile| -> Result<Array2<f32>> {
            Ok(a.get(&name, weight.ncols())?.ok_or("a layer has no calibration tokens")?)
        };
        let all = inputs(&calibration)?;
        let (calibration, inputs) = match &evaluation {
            Some(evaluation) => (all, inputs(evaluation)?),
            None => {
                let (a, b) = all.view().split_at(Axis(0), all.nrows() * 3 / 4);
                (a.to_owned(), b.to_owned())
            }
        };
        let outputs = matmul_nt(inputs.view(), weight.view());
        Ok(Case { weight, calibration, inputs, outputs })
    };
    names.map(case).collect()
}
