//! Layers that are calibrated with statistics of inputs, in place of the inputs.

use std::path::Path;

use layerstore::{ActivationsFile, Calibration, CalibrationBuilder, SecondMoment, formats, write_statistics};
use ndarray::{Array2, Axis};
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::support::{CHECKPOINT, INPUTS, Place, Ran, field};

/// Every way of using calibration: whitening and thresholds, second moments and their diagonals, GPTQ, means, a norm's inputs.
const RULES: &str = "
[[rule]]
layers = 'blocks\\.0\\.up'
method = 'key_value'
expected_keys_per_query = 12
[[rule]]
layers = 'blocks\\.1\\.up'
method = 'key_value'
expected_keys_per_query = 12
backend = { type = 'ivf_pq', clusters = 4, probes = 3, subvectors = 12, bits = 5, store_float_keys = true }
[[rule]]
layers = 'blocks\\.0\\.down'
method = 'low_rank'
weight = { type = 'int4', group = 16 }
rank = 8
scaling = 'exact'
rounding = 'gptq'
bias_correction = true
[[rule]]
layers = 'blocks\\.1\\.down'
method = 'low_rank'
weight = { type = 'int3', group = 16 }
rank = 8
scaling = 'rms'
clipping = 'mse'
[[rule]]
layers = 'blocks\\.0\\.mix'
method = 'low_rank'
weight = { type = 'int4', group = 16 }
rank = 4
scaling = 'mean_abs'
[[rule]]
layers = 'blocks\\.1\\.mix'
method = 'ternary'
rank = 4
scaling = 'exact'
norm = true
";

/// The inputs by layer.
fn inputs() -> Vec<(String, Array2<f32>)> {
    let checkpoint = formats::open(CHECKPOINT).unwrap();
    let file = ActivationsFile::open(INPUTS).unwrap();
    let all: Vec<_> = file
        .layers()
        .map(|layer| {
            let width = checkpoint.tensor(&format!("{layer}.weight")).unwrap().shape[1];
            (layer.to_owned(), file.get(layer, width).unwrap().unwrap())
        })
        .collect();
    assert_eq!(all.len(), 6);
    all
}

fn statistics(path: &Path, of: impl Fn(&Array2<f32>) -> Calibration) -> String {
    let all: Vec<(String, Calibration)> = inputs().into_iter().map(|(layer, x)| (layer, of(&x))).collect();
    write_statistics(path, &all).unwrap();
    path.display().to_string()
}

fn import(place: &Place, model: &str, rules: &str, calibration: &str) -> Value {
    let file = place.path(&format!("{model}.toml"));
    std::fs::write(&file, rules).unwrap();
    let rules = file.display().to_string();
    place.json(&["import", CHECKPOINT, "--model", model, "--rules", &rules, "--calibration", calibration])
}

/// Asserts that the compressed layers of two imports are the same, or as good.
fn assert_alike(found: &Value, expected: &Value) {
    let compressed = |report: &Value| -> Vec<Value> {
        report["layers"].as_array().unwrap().iter().filter(|l| l["method"] != "dense").cloned().collect()
    };
    let (found, expected) = (compressed(found), compressed(expected));
    assert_eq!((found.len(), expected.len()), (6, 6));
    for (found, expected) in found.iter().zip(&expected) {
        for same in ["layer", "method", "stored_bytes", "error_basis"] {
            assert_eq!(field(found, same), field(expected, same), "{found} for {expected}");
        }
        assert_eq!(found["error_basis"], "activations");
        let error = |layer: &Value| layer["relative_error"].as_f64().unwrap();
        let apart = (error(found) - error(expected)).abs() / error(expected);
        assert!(field(found, "artifact") == field(expected, "artifact") || apart <= 1e-6, "{found} for {expected}");
    }
}

#[test]
fn statistics_calibrate_as_the_inputs_do() {
    let place = Place::new();
    let by_inputs = import(&place, "inputs", RULES, INPUTS);
    let file = place.path("statistics.safetensors");
    let whole = statistics(&file, |x| Calibration::of(x.clone()).unwrap());
    assert_alike(&import(&place, "whole", RULES, &whole), &by_inputs);
    // Gathered a few inputs at a time.
    let streamed = statistics(&file, |x| {
        let mut builder = CalibrationBuilder::new(x.ncols(), 0);
        for some in x.axis_chunks_iter(Axis(0), 37) {
            builder.update(some).unwrap();
        }
        builder.finish().unwrap()
    });
    assert_alike(&import(&place, "streamed", RULES, &streamed), &by_inputs);
    // What was measured at import is what an evaluation on the inputs measures.
    let evaluated = place.json(&["evaluate", "streamed", "--activations", INPUTS, "--checkpoint", CHECKPOINT]);
    let mean = evaluated["mean_relative_error"].as_f64().unwrap();
    let layers = by_inputs["layers"].as_array().unwrap();
    let errors: Vec<f64> =
        layers.iter().filter(|l| l["method"] != "dense").map(|l| l["relative_error"].as_f64().unwrap()).collect();
    assert!((mean - errors.iter().sum::<f64>() / errors.len() as f64).abs() < 1e-6, "{mean} for {errors:?}");
    // The same statistics again are no work, others are.
    assert_eq!(import(&place, "again", RULES, &streamed)["written_bytes"], 0);
    let fewer = statistics(&file, |x| Calibration::of(x.slice(ndarray::s![..200, ..]).to_owned()).unwrap());
    assert!(import(&place, "fewer", RULES, &fewer)["written_bytes"].as_u64().unwrap() > 0);
    assert_eq!(place.json(&["verify"])["corrupt"], json!([]));
}

/// Statistics without a sample, or with the diagonal of the second moment alone, are enough for methods that need no more.
#[test]
fn parts_of_the_statistics() {
    let place = Place::new();
    let file = place.path("statistics.safetensors");
    let rule = |more: &str| {
        format!(
            "[[rule]]\nlayers = 'blocks\\.\\d\\..*'\nmethod = 'low_rank'\nweight = {{ type = 'int4', group = 16 }}\nrank = 8\n{more}\n"
        )
    };
    let moments = |x: &Array2<f32>, diagonal: bool| {
        let all = Calibration::of(x.clone()).unwrap();
        let second = match diagonal {
            true => SecondMoment::Diagonal(all.second_diagonal()),
            false => SecondMoment::Full(all.second_moment().unwrap().into_owned()),
        };
        let none = Array2::zeros((0, x.ncols()));
        Calibration::from_moments(all.tokens(), all.mean().clone(), all.mean_abs().clone(), second, none).unwrap()
    };
    for (model, scaling, diagonal) in [("full", "exact", false), ("diagonal", "rms", true), ("sizes", "mean_abs", true)]
    {
        let rules = rule(&format!("scaling = '{scaling}'"));
        let without = statistics(&file, |x| moments(x, diagonal));
        let by_statistics = import(&place, model, &rules, &without);
        let by_inputs = import(&place, &format!("{model}-inputs"), &rules, INPUTS);
        // Without a sample, what is measured at import is the weight's error.
        assert_eq!(by_statistics["layers"][0]["error_basis"], "weights");
        assert_eq!(by_inputs["layers"][0]["error_basis"], "activations");
        let measured = |model: &str| {
            let report = place.json(&["evaluate", model, "--activations", INPUTS, "--checkpoint", CHECKPOINT]);
            assert_eq!(report["layers"].as_array().unwrap().len(), 6);
            report["mean_relative_error"].as_f64().unwrap()
        };
        let (found, expected) = (measured(model), measured(&format!("{model}-inputs")));
        assert!((found - expected).abs() <= 1e-6 * expected, "{model}: {found} for {expected}");
    }
    let diagonal = statistics(&file, |x| moments(x, true));
    let exact = place.path("exact.toml");
    std::fs::write(&exact, rule("scaling = 'exact'")).unwrap();
    let rules = exact.display().to_string();
    let run = |rules: &str, calibration: &str, says: &[&str]| {
        let args = ["import", CHECKPOINT, "--model", "m", "--rules", rules, "--calibration", calibration];
        place.fails(1, says, &args);
    };
    run(&rules, &diagonal, &["blocks.0.down", "diagonal alone"]);
    let norm = place.path("norm.toml");
    std::fs::write(
        &norm,
        "[[rule]]\nlayers = 'blocks.*up'\nmethod = 'ternary'\nnorm = true\nrank = 2\nscaling = 'exact'\n",
    )
    .unwrap();
    let sampleless = statistics(&file, |x| moments(x, false));
    run(&norm.display().to_string(), &sampleless, &["blocks.0.up", "sample", "no rows"]);
    // Inputs of another width, and statistics where inputs are needed.
    let wide = statistics(&file, |x| Calibration::of(Array2::ones((3, x.ncols() + 1))).unwrap());
    run(&rules, &wide, &["blocks.0.down", "[97]", "[96]"]);
    place.fails(1, &["statistics", "[tokens, in_features]"], &["evaluate", "full", "--activations", &wide]);
}

/// Weights and inputs whose products f32 does not hold are measured by the weights, and a note says so; sizes that it holds are
/// measured as those near 1.
#[test]
fn products_beyond_f32_are_told() {
    let place = Place::new();
    let rules = place.path("rules.toml").display().to_string();
    let noise = |rows: usize, seed: usize| {
        Array2::from_shape_fn((rows, 64), |(i, j)| ((i * 7919 + j * 104_729 + seed * 31) % 1009) as f32 / 500.0 - 1.0)
    };
    let write = |path: &Path, name: &str, matrix: Array2<f32>| {
        let bytes: Vec<u8> = matrix.iter().flat_map(|v| v.to_le_bytes()).collect();
        let view = TensorView::new(safetensors::Dtype::F32, matrix.shape().to_vec(), &bytes).unwrap();
        safetensors::serialize_to_file([(name, view)], None, path).unwrap();
    };
    for method in ["low_rank", "key_value"] {
        std::fs::write(&rules, format!("[[rule]]\nlayers = '.*'\nmethod = '{method}'\n")).unwrap();
        let run = |weights: f32, inputs: f32| {
            let (checkpoint, x) = (place.path("w.safetensors"), place.path("x.safetensors"));
            write(&checkpoint, "l.weight", noise(16, 1) * weights);
            write(&x, "l", noise(64, 2) * inputs);
            let (checkpoint, x) = (checkpoint.display().to_string(), x.display().to_string());
            let args = ["import", &checkpoint, "--model", "m", "--rules", &rules, "--calibration", &x];
            place.run(&[&["--format", "json"], &args[..]].concat())
        };
        let layer = |ran: &Ran| serde_json::from_str::<Value>(&ran.out).expect(&ran.err)["layers"][0].clone();
        let plain = field(&layer(&run(1.0, 1.0)), "relative_error").as_f64().unwrap();
        for (weights, inputs) in [(1e-30, 1e10), (1e15, 1e15), (1e-10, 1e-10)] {
            let layer = layer(&run(weights, inputs));
            let found = field(&layer, "relative_error").as_f64().unwrap();
            assert!((found - plain).abs() <= 0.02 * plain + 1e-6, "{method} {weights} {inputs}: {layer}");
            assert_eq!(layer["error_basis"], "activations");
        }
        for (weights, inputs) in [(1e-30, 1e-30), (1e-22, 1e-22), (1e20, 1e20)] {
            let ran = run(weights, inputs);
            // Keys hold the inputs' size, and their scales that of outputs.
            if method == "key_value" {
                assert!(ran.code == 1 && ran.err.contains("layer 'l'"), "{weights} {inputs}: {} {}", ran.out, ran.err);
                continue;
            }
            let layer = layer(&ran);
            assert!(layer["relative_error"].as_f64().unwrap() < 0.2, "{weights} {inputs}: {layer}");
            assert_eq!(layer["error_basis"], "weights", "{layer}");
            assert!(layer["notes"].to_string().contains("f32 does not hold"), "{layer}");
        }
    }
}
