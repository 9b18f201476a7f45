//! Ternary layers and modules from checkpoints, and from what Keras has saved, to answers.

use std::path::Path;

use layerstore::formats::{KERAS_ROOT, KerasSource, read_any_array, write_any_array};
use layerstore::layer::{Accuracy, Activation, ArtifactId, MethodConfig, RmsNorm, TernaryConfig};
use layerstore::nn::{Glu, GluConfig, Module};
use layerstore::{ErrorKind, Store, formats};
use ndarray::{Array2, ArrayD, IxDyn};
use serde_json::json;

use crate::support::{CHECKPOINT, INPUTS, Place, assert_error, field, refused};

const KERAS: [&str; 3] = ["functional", "images", "tokens"];

fn keras(name: &str) -> String {
    format!("tests/fixtures/keras/{name}.keras")
}

fn near(found: &ArrayD<f32>, expected: &ArrayD<f32>) -> bool {
    found.shape() == expected.shape()
        && found.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 1e-5 * (1.0 + b.abs()))
}

#[test]
fn models_that_keras_saved() {
    let place = Place::new();
    for name in KERAS {
        let file = keras(name);
        let plan = place.json(&["import", &file, "--model", name, "--dry-run"]);
        let report = place.json(&["import", &file, "--model", name]);
        let layers = report["layers"].as_array().unwrap();
        assert!(!layers.is_empty());
        assert_eq!(plan["layers"].as_array().unwrap().len(), layers.len());
        for (planned, layer) in plan["layers"].as_array().unwrap().iter().zip(layers) {
            assert_eq!(field(planned, "expected_bytes"), field(layer, "stored_bytes"), "{layer}");
            assert_eq!(field(planned, "method"), field(layer, "method"));
        }
        assert!(layers.iter().any(|l| l["method"] == "ternary") && layers[0]["layer"] == KERAS_ROOT);
        assert_eq!(place.json(&["import", &file, "--model", name])["written_bytes"], 0);
    }
    place.json(&["snapshot", "create", "saved"]);
    for name in KERAS {
        let arrays = format!("tests/fixtures/keras/{name}.safetensors");
        let output = place.path("y.npy").display().to_string();
        let input = format!("{arrays}:x");
        // By the binary, at a snapshot.
        let ran = place.json(&["--at", "saved", "forward", name, "model", "--input", &input, "--output", &output]);
        let (found, expected) = (read_any_array(&output).unwrap(), read_any_array(&format!("{arrays}:y")).unwrap());
        assert_eq!(ran["shape"], json!(expected.shape()));
        assert!(near(&found, &expected), "{name}: {found} for {expected}");
        // And straight from the file.
        let x = read_any_array(&input).unwrap();
        let y = KerasSource::open(Path::new(&keras(name)))
            .unwrap()
            .module()
            .forward(x.view(), Accuracy::Approximate)
            .unwrap();
        assert!(near(&y, &expected), "{name}");
    }
    // A part of it runs by itself, and a sequence may be of any length where no gain is a position's own.
    let x = place.path("x.npy").display().to_string();
    write_any_array(&x, ArrayD::from_elem(IxDyn(&[2, 11, 8]), 0.3f32).view()).unwrap();
    let ran = place.json(&["forward", "functional", "model.gru", "--input", &x]);
    assert_eq!(ran["shape"], json!([2, 11, 8]));
    place.fails(1, &["6 positions"], &["forward", "functional", "model", "--input", &x]);
    let shown = place.json(&["show", "functional", "model.lru"]);
    assert_eq!((&shown["config"]["kind"], &shown["config"]["state_dim"]), (&json!("lru"), &json!(5)));
    // All tensors come back: ternary weights times their scale, norms, eigenvalues.
    let file = place.path("functional.safetensors").display().to_string();
    let report = place.json(&["export", "functional", "--output", &file]);
    let noted = field(field(&report, "notes"), "model.proj").to_string();
    assert!(noted.contains("an RMSNorm before its weight and the activation relu after it"), "{noted}");
    assert_eq!(field(&report, "added_biases"), &json!([]));
    let checkpoint = formats::open(&file).unwrap();
    for (name, shape) in [
        ("model.proj.weight", vec![8, 8]),
        ("model.proj.bias", vec![8]),
        ("model.proj.norm.gain", vec![6, 8]),
        ("model.norm.bias", vec![6, 8]),
        ("model.lru.nu_log", vec![5]),
        ("model.block.ffn.down_dense.weight", vec![8, 10]),
        ("model.head.weight", vec![5, 8]),
    ] {
        let tensor = checkpoint.tensor(name).unwrap_or_else(|| panic!("no {name}"));
        assert_eq!(tensor.shape, shape, "{name}");
        assert!(checkpoint.bytes(tensor).unwrap().iter().any(|&b| b != 0), "{name}");
    }
    assert_eq!(place.json(&["verify"])["corrupt"], json!([]));
}

/// Rules are for the layers of floats that such a model has.
#[test]
fn rules_take_layers_of_floats() {
    let place = Place::new();
    let rules = place.path("rules.toml");
    std::fs::write(
        &rules,
        "[[rule]]\nlayers = '.*_gate|model\\.head|model\\.proj'\nmethod = 'low_rank'\nrank = 2\nweight = { type = 'int8', group = 'channel' }\n",
    )
    .unwrap();
    let args = ["import", &keras("functional"), "--model", "m", "--rules", &rules.display().to_string()];
    let report = place.json(&args);
    let method = |name: &str| {
        let layers = report["layers"].as_array().unwrap();
        layers.iter().find(|l| l["layer"] == name).unwrap()["method"].as_str().unwrap().to_owned()
    };
    assert_eq!(method("model.head"), "low_rank");
    assert_eq!((method("model.proj"), method("model.block.attention.kernel")), ("ternary".into(), "ternary".into()));
    assert_eq!(place.json(&args)["written_bytes"], 0);
    let output = place.path("y.npy").display().to_string();
    let arrays = "tests/fixtures/keras/functional.safetensors";
    place.json(&["forward", "m", "model", "--input", &format!("{arrays}:x"), "--output", &output]);
    let (found, expected) = (read_any_array(&output).unwrap(), read_any_array(&format!("{arrays}:y")).unwrap());
    assert_eq!(found.shape(), expected.shape());
    assert!(!near(&found, &expected));
    assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 0.1), "{found} for {expected}");
}

#[test]
fn files_that_keras_did_not_save() {
    let place = Place::new();
    let file = place.path("bad.keras");
    let whole = std::fs::read(keras("tokens")).unwrap();
    let open = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        KerasSource::open(&file)
    };
    for length in (0..whole.len()).step_by(whole.len() / 60) {
        refused(open(&whole[..length]), ErrorKind::InvalidInput, &["bad.keras"]);
    }
    // A byte that is another is noticed, since the archive has sums of its parts, or it says nothing of the model: a date.
    let artifacts = |source: &KerasSource| -> Vec<(String, ArtifactId)> {
        let layers = source.module().to_layers(KERAS_ROOT).into_iter();
        layers.map(|(name, layer)| (name, layer.to_parts().id())).collect()
    };
    let expected = artifacts(&open(&whole).unwrap());
    let (mut noticed, mut changed) = (0, 0);
    for at in (0..whole.len()).step_by(whole.len() / 160) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x55;
        changed += 1;
        match open(&bytes) {
            Ok(source) => assert_eq!(artifacts(&source), expected, "byte {at}"),
            Err(error) => {
                assert_error(&error, ErrorKind::InvalidInput, &["bad.keras"]);
                noticed += 1;
            }
        }
    }
    assert!(2 * noticed > changed, "{noticed} of {changed}");
    // A class that is not known, a chain that is none.
    let with = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = whole.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        let mut bytes = whole.clone();
        bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
        open(&bytes)
    };
    // Its sum is another.
    let other = with("\"class_name\": \"LRUMML\"", "\"class_name\": \"GRUMMM\"");
    refused(other, ErrorKind::InvalidInput, &["bad.keras", "config.json"]);
    place.fails(1, &["bad.keras"], &["import", &file.display().to_string(), "--model", "m"]);
    place.fails(1, &["none.keras"], &["import", "none.keras", "--model", "m"]);
    std::fs::write(&file, b"PK\x05\x06\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0").unwrap();
    place.fails(1, &["no config.json"], &["import", &file.display().to_string(), "--model", "m"]);
}

#[test]
fn ternary_layers_by_rules() {
    let place = Place::new();
    let rules = |name: &str, settings: &str| {
        let path = place.path(name);
        std::fs::write(&path, format!("[[rule]]\nlayers = 'blocks\\.\\d+\\..*'\nmethod = 'ternary'\n{settings}\n"))
            .unwrap();
        path.display().to_string()
    };
    let import = |model: &str, rules: &str| {
        place.json(&["import", CHECKPOINT, "--model", model, "--rules", rules, "--calibration", INPUTS])
    };
    let plain = rules("plain.toml", "");
    let fitted = rules(
        "fitted.toml",
        "group = 'channel'\nclipping = 'mse'\nrank = 8\nscaling = 'exact'\nrounding = 'gptq'\nnorm = true",
    );
    let error = |report: &serde_json::Value| {
        let layers = report["layers"].as_array().unwrap().iter();
        let errors = layers.filter(|l| l["method"] == "ternary").map(|l| l["relative_error"].as_f64().unwrap());
        errors.collect::<Vec<_>>()
    };
    place.import("f32", None);
    let (first, second) = (import("plain", &plain), import("fitted", &fitted));
    let (plain, fitted) = (error(&first), error(&second));
    assert!(!plain.is_empty() && plain.len() == fitted.len());
    assert!(plain.iter().zip(&fitted).all(|(p, f)| f < p && *p < 0.8), "{plain:?} {fitted:?}");
    let evaluation = place.json(&["evaluate", "fitted", "--activations", INPUTS]);
    let mut evaluated: Vec<f64> = evaluation["layers"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|l| l["method"] == "ternary")
        .map(|l| l["relative_error"].as_f64().unwrap())
        .collect();
    let mut imported = fitted.clone();
    evaluated.sort_by(f64::total_cmp);
    imported.sort_by(f64::total_cmp);
    assert_eq!(evaluated.len(), imported.len());
    assert!(evaluated.iter().zip(&imported).all(|(a, b)| (a - b).abs() < 1e-9), "{evaluated:?} {imported:?}");
    place.fails(
        1,
        &["blocks.0.down", "at most 48"],
        &["import", CHECKPOINT, "--model", "m", "--rules", &rules("bad.toml", "rank = 4000")],
    );
}

/// Saving a module replaces what was there under its name, and nothing else.
#[tokio::test]
async fn modules_are_saved_beside_other_layers() {
    let place = Place::new();
    let store = Store::create(&place.store()).await.unwrap();
    let linear = |out: usize, inputs: usize, seed: usize| {
        let kernel = Array2::from_shape_fn((out, inputs), |(i, j)| ((i * 31 + j * 17 + seed) % 13) as f32 / 6.0 - 1.0);
        let config = TernaryConfig { norm: true, ..TernaryConfig::default() };
        MethodConfig::from(config).compress(kernel.view(), None, None).unwrap()
    };
    let glu = |hidden: usize| {
        let config = GluConfig {
            units: 6,
            intermediate_size: Some(hidden),
            activation: Activation::Silu,
            ..GluConfig::default()
        };
        Module::Glu(Glu::new(config, linear(2 * hidden, 6, 1), linear(6, hidden, 2)).unwrap())
    };
    let norm = Module::RmsNorm(RmsNorm::new(Some(Array2::ones((1, 6))), None).unwrap());
    let both = |hidden: usize| Module::Sequential(vec![("ffn".into(), glu(hidden)), ("norm".into(), norm.clone())]);
    store.save_module("m", "net", &both(8), Some("first")).await.unwrap();
    store.save_module("m", "nets", &norm, None).await.unwrap();
    store.create_snapshot("first").await.unwrap();
    store.save_module("m", "net", &glu(4), None).await.unwrap();
    let x = ArrayD::from_shape_fn(IxDyn(&[2, 3, 6]), |i| (i[0] + 2 * i[1] + i[2]) as f32 - 4.0);
    let run = |module: &Module| module.forward(x.view(), Accuracy::Approximate).unwrap();
    let latest = store.latest().await.unwrap();
    let names: Vec<String> = latest.layers("m").await.unwrap().into_iter().map(|r| r.layer).collect();
    assert_eq!(names, ["net", "net.down_dense", "net.gate_dense", "nets"]);
    assert_eq!(run(&latest.module("m", "net").await.unwrap().load().await.unwrap()), run(&glu(4)));
    let first = store.at("first").await.unwrap().module("m", "net").await.unwrap();
    assert_eq!(first.layers().len(), 5);
    assert_eq!(run(&first.load().await.unwrap()), run(&both(8)));
    // A linear layer is a module, too; what is not there is named.
    let gate = latest.module("m", "net.gate_dense").await.unwrap().load().await.unwrap();
    assert!(matches!(gate, Module::Linear(_)));
    refused(latest.module("m", "net.ffn").await, ErrorKind::NotFound, &["net.gate_dense"]);
    let stray = vec![("other".to_owned(), linear(2, 2, 1))];
    refused(store.save_layers("m", "net", &stray, None).await, ErrorKind::InvalidInput, &["'net'"]);
    let twice = vec![("net".to_owned(), linear(2, 2, 1)), ("net".to_owned(), linear(2, 2, 2))];
    refused(store.save_layers("m", "net", &twice, None).await, ErrorKind::InvalidInput, &["twice"]);
    assert_eq!(store.latest().await.unwrap().layers("m").await.unwrap().len(), 4);
    // What a module lacks is found when it is loaded, with its name.
    let part: Vec<_> =
        both(8).to_layers("half").into_iter().filter(|(name, _)| name != "half.ffn.down_dense").collect();
    store.save_layers("m", "half", &part, None).await.unwrap();
    let half = store.latest().await.unwrap().module("m", "half").await.unwrap();
    refused(half.load().await, ErrorKind::InvalidInput, &["half.ffn.down_dense"]);
    // Runs that have no weight of their own say so.
    let own = store.latest().await.unwrap().layer("m", "net").await.unwrap();
    let ran = own.forward(Array2::zeros((1, 6)).view(), Accuracy::Full).await;
    refused(ran, ErrorKind::InvalidInput, &["module"]);
}
