//! The command line, by its contract.

use layerstore::formats::{read_array, write_array};
use layerstore::{ActivationsFile, ErrorKind, Store, evaluate, formats};
use layerstore_core::linalg::{matmul_nt, relative_error};
use ndarray::s;

use crate::support::{CHECKPOINT, INPUTS, INT4, KEYS, Place, field, refused};

#[test]
fn import_lists_and_shows() {
    let place = Place::new();
    let dense = place.import("f32", None);
    assert_eq!((dense["model"].as_str(), dense["version"].as_u64()), (Some("f32"), Some(2)));
    assert_eq!(field(&dense, "dense_bytes"), field(&dense, "stored_bytes"));
    let int4 = place.import("int4", Some(INT4));
    let layer = |report: &serde_json::Value, name: &str| {
        report["layers"].as_array().unwrap().iter().find(|l| l["layer"] == name).unwrap().clone()
    };
    let up = layer(&int4, "blocks.0.up");
    assert_eq!((up["method"].as_str(), up["error_basis"].as_str()), (Some("low_rank"), Some("activations")));
    assert_eq!((up["out_features"].as_u64(), up["in_features"].as_u64()), (Some(96), Some(48)));
    assert!(up["relative_error"].as_f64().unwrap() < 0.08);
    assert!(up["stored_bytes"].as_u64().unwrap() < up["dense_bytes"].as_u64().unwrap());
    let embedding = layer(&int4, "embedding");
    assert_eq!((embedding["method"].as_str(), embedding["reused"].as_bool()), (Some("dense"), Some(true)));

    let models = place.json(&["models"]);
    assert_eq!(models.as_array().unwrap().len(), 2);
    let layers = place.json(&["layers", "int4"]);
    assert_eq!(layers.as_array().unwrap().len(), int4["layers"].as_array().unwrap().len());
    let shown = place.json(&["show", "int4", "blocks.0.up"]);
    assert_eq!(shown["config"]["rank"], 8);
    assert_eq!(field(&shown, "artifact"), field(&up, "artifact"));
    assert_eq!(shown["source"]["tensors"][0]["tensor"], "blocks.0.up.weight");
    // The tables for people hold the same names.
    assert!(place.run(&["layers", "int4"]).out.contains("blocks.1.down"));

    let stats = place.json(&["stats"]);
    assert_eq!((stats["models"].as_u64(), stats["versions"].as_u64()), (Some(2), Some(3)));
    assert!(stats["deduplicated_bytes"].as_u64().unwrap() > 0);
}

#[test]
fn likely_mistakes_are_reported() {
    let place = Place::new();
    let rules = place.path("rules.toml");
    std::fs::write(&rules, "[[rule]]\nlayers = 'block\\.0\\.up'\nmethod = 'key_value'\n").unwrap();
    let inputs = format!("{}:block.0.up", place.path("inputs.safetensors").display());
    write_array(&inputs, ndarray::Array2::ones((3, 48)).view(), false).unwrap();
    let (rules, inputs) = (rules.display().to_string(), place.path("inputs.safetensors").display().to_string());
    let args = ["import", CHECKPOINT, "--model", "m", "--rules", &rules, "--calibration", &inputs];
    let report = place.json(&args);
    assert_eq!(report["unused_rules"].as_array().unwrap().len(), 1);
    assert_eq!(report["unmatched_calibration"], serde_json::json!(["block.0.up"]));
    let said = place.run(&args).err;
    assert!(said.contains("takes no layer") && said.contains("calibration tensor 'block.0.up'"), "{said}");
}

#[test]
fn a_dry_run_says_what_an_import_does() {
    let place = Place::new();
    let more = "[[rule]]\nlayers = 'blocks\\.0\\.up'\nmethod = 'low_rank'\nrank = { max_bits = 9 }\nfactors = 'int8'\n\
                bias_correction = true\nrounding = 'gptq'\nweight = { type = 'nf4', group = 16, scales = 'f16' }\n\
                [[rule]]\nlayers = 'blocks\\.1\\.up'\nmethod = 'low_rank'\nrank = { max_error = 0.05 }\n\
                scaling = 'rms'\nweight = { type = 'int3', group = 'channel' }\n";
    let rules = format!("{more}{}", std::fs::read_to_string(INT4).unwrap());
    std::fs::write(place.path("rules.toml"), rules).unwrap();
    let rules = place.path("rules.toml").display().to_string();
    let args = ["import", CHECKPOINT, "--model", "m", "--rules", &rules, "--calibration", INPUTS];
    let plan = place.json(&[&args[..], &["--dry-run"]].concat());
    assert!(!place.path("layers").exists(), "a dry run made a store");
    let done = place.json(&args);
    let (plan, done) = (plan["layers"].as_array().unwrap(), done["layers"].as_array().unwrap());
    assert_eq!(plan.len(), done.len());
    for (expected, found) in plan.iter().zip(done) {
        for same in ["layer", "method"] {
            assert_eq!(field(expected, same), field(found, same));
        }
        let by_error = found["layer"] == "blocks.1.up";
        assert_eq!(expected["expected_bytes"].is_null(), by_error);
        if !by_error {
            assert_eq!(field(expected, "expected_bytes"), field(found, "stored_bytes"), "{found}");
            assert_eq!(field(expected, "bits_per_weight"), field(found, "bits_per_weight"));
        }
        // As many bits as were asked for, counted as everywhere.
        let bits = field(found, "bits_per_weight").as_f64().unwrap();
        assert!(found["layer"] != "blocks.0.up" || (8.6..=9.0).contains(&bits), "{found}");
        let shown = place.json(&["show", "m", found["layer"].as_str().unwrap()]);
        assert_eq!(field(&shown, "bits_per_weight"), bits);
    }
    let rule_of = |layer: &str| plan.iter().find(|l| l["layer"] == layer).unwrap()["rule"].clone();
    assert!(rule_of("blocks.0.up").as_str().unwrap().starts_with("line 1: blocks"));
    assert!(rule_of("blocks.0.down").as_str().unwrap().starts_with("line 15: blocks"));
    // Errors on the inputs that calibrated are called so.
    let human = place.run(&args);
    assert!(human.out.contains("calibration") && !human.out.contains("activations"), "{}", human.out);
    assert!(place.run(&["show", "m", "blocks.0.up"]).out.contains("over calibration"));
    assert!(place.run(&["layers", "m"]).out.contains("calibration"));
    let human = place.run(&[&args[..], &["--dry-run"]].concat());
    assert!(human.out.contains("nothing has been stored") && human.out.contains("by its numbers"), "{}", human.out);
    let measured = place.json(&["evaluate", "m", "--activations", INPUTS, "--checkpoint", CHECKPOINT]);
    let measured = measured["layers"].as_array().unwrap();
    assert_eq!(measured.iter().filter(|l| l["method"] == "low_rank").count(), 6);
    for layer in measured.iter().filter(|l| l["method"] == "low_rank") {
        let error = |name: &str| layer[name].as_f64().unwrap();
        assert!(error("relative_error") < error("uncorrected_error"), "{layer}");
        let values: Vec<f64> =
            layer["singular_values"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        assert!(values.is_sorted_by(|a, b| a >= b) && !values.is_empty(), "{layer}");
        assert!(error("bits_per_weight") > 2.0);
    }
}

#[test]
fn a_second_import_writes_nothing() {
    let place = Place::new();
    for rules in [INT4, KEYS] {
        let first = place.import("m", Some(rules));
        let data = || -> Vec<_> {
            crate::support::files(&place.path("layers"))
                .into_iter()
                .filter(|f| f.to_string_lossy().contains("/data/"))
                .collect()
        };
        let before = data();
        assert!(!before.is_empty());
        let second = place.import("m", Some(rules));
        assert_eq!(second["written_bytes"], 0);
        assert_eq!(field(&second, "version"), field(&first, "version"));
        let layers = second["layers"].as_array().unwrap();
        assert!(layers.len() == 10 && layers.iter().all(|l| l["reused"] == true));
        assert_eq!(data(), before);
    }
}

#[test]
fn export_gives_the_checkpoint_back() {
    let place = Place::new();
    place.import("f32", None);
    place.import("int4", Some(INT4));
    place.import("keys", Some(KEYS));
    let original = formats::open(CHECKPOINT).unwrap();
    for (model, tolerance) in [("f32", 0.0), ("keys", 1e-2), ("int4", 0.2)] {
        let path = place.path(&format!("{model}.safetensors"));
        let report = place.json(&["export", model, "--output", path.to_str().unwrap()]);
        assert_eq!(report["bytes"].as_u64().unwrap(), path.metadata().unwrap().len());
        let back = formats::open(&path).unwrap();
        assert_eq!(back.metadata(), original.metadata());
        assert!(!original.tensors().is_empty());
        assert_eq!(back.tensors().len(), original.tensors().len());
        let mut lossy = 0;
        for tensor in original.tensors().values() {
            let found = back.tensor(&tensor.name).unwrap();
            assert_eq!((found.dtype, &found.shape), (tensor.dtype, &tensor.shape), "{}", tensor.name);
            let compressed = model != "f32" && tensor.name.starts_with("blocks") && tensor.shape.len() == 2;
            if compressed {
                let error = relative_error(back.matrix(found).unwrap().view(), original.matrix(tensor).unwrap().view());
                assert!(error < tolerance, "{model} {}: {error}", tensor.name);
                lossy += 1;
            } else {
                assert_eq!(back.bytes(found).unwrap(), original.bytes(tensor).unwrap(), "{model} {}", tensor.name);
            }
        }
        assert_eq!(lossy, if model == "f32" { 0 } else { 6 }, "{model}");
    }
}

#[test]
fn forward_search_and_evaluate() {
    let place = Place::new();
    place.import("f32", None);
    place.import("int4", Some(INT4));
    place.import("keys", Some(KEYS));
    let layer = "blocks.1.up";
    let checkpoint = formats::open(CHECKPOINT).unwrap();
    let w = checkpoint.matrix(checkpoint.tensor("blocks.1.up.weight").unwrap()).unwrap();
    let b = checkpoint.vector(checkpoint.tensor("blocks.1.up.bias").unwrap()).unwrap();
    let x = ActivationsFile::open(INPUTS).unwrap().get(layer, 48).unwrap().unwrap();
    let few = x.slice(s![..12, ..]);
    let exact = matmul_nt(few, w.view()) + &b;
    let at = |name: &str| place.path(name).display().to_string();
    write_array(&at("x.npy"), few, false).unwrap();
    write_array(&at("v.npy"), x.slice(s![..1, ..]), true).unwrap();

    let run = |model: &str, input: &str, more: &[&str]| {
        let output = at("y.npy");
        let report =
            place.json(&[&["forward", model, layer, "--input", &at(input), "--output", &output], more].concat());
        (report, read_array(&output).unwrap())
    };
    let (report, (y, is_vector)) = run("f32", "x.npy", &[]);
    assert_eq!((report["shape"].clone(), is_vector), (serde_json::json!([12, 96]), false));
    assert!(relative_error(y.view(), exact.view()) < 1e-6);
    let (report, (y, is_vector)) = run("int4", "v.npy", &[]);
    assert_eq!((report["shape"].clone(), is_vector), (serde_json::json!([96]), true));
    assert!(relative_error(y.view(), exact.slice(s![..1, ..])) < 0.1);
    // Exact: the dense weights that another model of the store has, and every key.
    for model in ["int4", "keys"] {
        let (_, (y, _)) = run(model, "x.npy", &["--exact"]);
        assert!(relative_error(y.view(), exact.view()) < 1e-5, "{model}");
    }
    let (report, (y, _)) = run("keys", "x.npy", &[]);
    let bound = report["relative_error_bound"].as_f64().unwrap();
    assert_eq!(y.dim(), exact.dim());
    for (y, e) in y.rows().into_iter().zip(exact.rows()) {
        let bare = &e - &b;
        let error = (&y - &e).mapv(|v| v * v).sum().sqrt() / bare.mapv(|v| v * v).sum().sqrt();
        assert!(f64::from(error) <= bound && error > 1e-4);
    }

    let search = |more: &[&str]| place.json(&[&["search", "keys", layer, "--input", &at("x.npy")], more].concat());
    let hits = |answer: &serde_json::Value| {
        answer.as_array().unwrap().iter().map(|q| q["hits"].as_array().unwrap().len()).sum::<usize>()
    };
    assert!(hits(&search(&["--keys", "4"])) < hits(&search(&["--keys", "24"])));
    assert_eq!(hits(&search(&["--threshold", "0"])), 12 * 48);
    let within = search(&["--max-error", "0.2"]);
    assert_eq!(within.as_array().unwrap().len(), 12);
    for query in within.as_array().unwrap() {
        assert!(query["certified_error"].as_f64().unwrap() <= 0.2);
        let contribution = |h: &serde_json::Value| h["contribution"].as_f64().unwrap().abs();
        let found = query["hits"].as_array().unwrap();
        assert!(found.len() > 1 && found.windows(2).all(|w| contribution(&w[0]) >= contribution(&w[1])));
    }

    let stored = place.json(&["evaluate", "int4", "--activations", INPUTS]);
    let given = place.json(&["evaluate", "int4", "--activations", INPUTS, "--checkpoint", CHECKPOINT]);
    assert_eq!(stored["mean_relative_error"], given["mean_relative_error"]);
    assert_eq!(stored["layers"].as_array().unwrap().len(), 6);
    assert!(stored["mean_relative_error"].as_f64().unwrap() < 0.08);
    let keys = place.json(&["evaluate", "keys", "--activations", INPUTS]);
    let first = &keys["layers"][0];
    assert!(first["mean_certified_error"].as_f64() > Some(0.0) && first["mean_keys"].as_f64() > Some(5.0));
}

/// Activations that cannot be used are all found before a layer is loaded.
#[tokio::test(flavor = "multi_thread")]
async fn unusable_activations_are_found_before_the_work() {
    let place = Place::new();
    place.import("int4", Some(INT4));
    let inputs = formats::open(INPUTS).unwrap();
    let poisoned = |name: &str, changes: &[(&str, f32)]| {
        let path = place.path(name);
        let all: Vec<_> = inputs
            .tensors()
            .values()
            .map(|tensor| {
                let (mut x, change) = (inputs.matrix(tensor).unwrap(), changes.iter().find(|c| c.0 == tensor.name));
                match change {
                    Some((_, 0.0)) => x = x.slice_move(s![.., 1..]),
                    Some((_, value)) => x[[1, 2]] = *value,
                    None => {}
                }
                let bytes: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).collect();
                (tensor.name.clone(), x.shape().to_vec(), bytes)
            })
            .collect();
        assert!(changes.iter().all(|change| all.iter().any(|(name, ..)| name == change.0)));
        let views = all.iter().map(|(name, shape, bytes)| {
            let view = safetensors::tensor::TensorView::new(layerstore::layer::DType::F32, shape.clone(), bytes);
            (name, view.unwrap())
        });
        safetensors::serialize_to_file(views, None, &path).unwrap();
        path
    };
    let store = Store::open(&place.store()).await.unwrap();
    let latest = store.latest().await.unwrap();
    let measured = async |path: &std::path::Path| {
        let activations = ActivationsFile::open(path).unwrap();
        evaluate(&latest, "int4", activations, Some(formats::open(CHECKPOINT).unwrap())).await
    };
    let last = poisoned("last.safetensors", &[("blocks.1.up", f32::NAN)]);
    let says = ["layer 'blocks.1.up': tensor 'blocks.1.up' of last.safetensors holds NaN at index 50"];
    refused(measured(&last).await, ErrorKind::InvalidInput, &says);
    let changes =
        [("blocks.0.down", 0.0), ("blocks.0.mix", f32::INFINITY), ("blocks.1.down", 0.0), ("blocks.1.up", f32::NAN)];
    let many = poisoned("many.safetensors", &changes);
    let says = [
        "found 4 things",
        "'blocks.0.down'",
        "95]",
        "expected [tokens, 96]",
        "inf at index 50",
        "'blocks.1.down'",
        "NaN",
    ];
    refused(measured(&many).await, ErrorKind::InvalidInput, &says);
    assert_eq!(store.cached_bytes().await, 0, "a layer was loaded");
    // Weights to compare with that are not there are told with them.
    let activations = ActivationsFile::open(&last).unwrap();
    let says = ["found 7 things", "holds NaN", "none in the store", "'blocks.0.up'"];
    refused(evaluate(&latest, "int4", activations, None).await, ErrorKind::InvalidInput, &says);
    assert_eq!(measured(std::path::Path::new(INPUTS)).await.unwrap().layers.len(), 6);
    assert!(store.cached_bytes().await > 0);
}

#[test]
fn snapshots_restore_log_and_diff() {
    let place = Place::new();
    place.import("m", None);
    place.json(&["snapshot", "create", "dense"]);
    let int4 = place.json(&[
        "import",
        CHECKPOINT,
        "--model",
        "m",
        "--rules",
        INT4,
        "--calibration",
        INPUTS,
        "--message",
        "four bits",
    ]);
    place.import("other", None);
    let method = |at: &[&str]| place.json(&[at, &["show", "m", "blocks.0.up"]].concat())["method"].clone();
    assert_eq!(
        (method(&[]), method(&["--at", "dense"]), method(&["--at", "3"])),
        ("low_rank".into(), "dense".into(), "low_rank".into())
    );
    assert_eq!(place.json(&["--at", "dense", "models"]).as_array().unwrap().len(), 1);

    let diff = place.json(&["diff", "dense", "3"]);
    assert_eq!(diff["changed"].as_array().unwrap().len(), 6);
    assert_eq!(
        (diff["changed"][0]["before"]["method"].as_str(), diff["changed"][0]["after"]["method"].as_str()),
        (Some("dense"), Some("low_rank"))
    );
    assert_eq!(
        place.json(&["diff", "3", "4"])["added"].as_array().unwrap().len(),
        int4["layers"].as_array().unwrap().len()
    );

    let restored = place.json(&["restore", "dense"]);
    assert_eq!(restored["version"], 5);
    assert_eq!(method(&[]), "dense");
    assert_eq!(place.json(&["diff", "dense", "5"]), serde_json::json!({"added": [], "removed": [], "changed": []}));
    let log = place.json(&["log"]);
    let said = |version: usize, field: &str| log[5 - version][field].clone();
    assert_eq!((said(3, "message"), said(3, "operation")), ("four bits".into(), "import m".into()));
    assert_eq!((said(5, "operation"), said(2, "snapshots")), ("restore dense".into(), serde_json::json!(["dense"])));

    assert_eq!(place.json(&["snapshot", "list"])[0]["name"], "dense");
    place.fails(1, &["'dense' exists already", "version 2"], &["snapshot", "create", "dense"]);
    place.json(&["snapshot", "delete", "dense"]);
    place.fails(1, &["no snapshot named 'dense'"], &["--at", "dense", "models"]);
    place.fails(1, &["no snapshot named 'dense'"], &["snapshot", "delete", "dense"]);
}

#[test]
fn gc_keeps_what_is_reached() {
    let place = Place::new();
    place.import("m", Some(KEYS));
    place.json(&["snapshot", "create", "keys"]);
    place.import("m", Some(INT4));
    place.import("m", None);
    // Everything is recent.
    assert_eq!(place.json(&["gc"])["artifacts"], 0);
    let dry = place.json(&["gc", "--older-than", "0s"]);
    assert_eq!((dry["artifacts"].as_u64(), dry["removed_bytes"].as_u64()), (Some(6), Some(0)));
    assert!(dry["reclaimable_bytes"].as_u64().unwrap() > 10_000);
    let done = place.json(&["gc", "--older-than", "0s", "--apply"]);
    assert!(done["removed_bytes"].as_u64().unwrap() > 10_000, "{done}");
    place.fails(1, &["version 3 is not in the store"], &["--at", "3", "models"]);
    // The snapshot and the latest are whole, and what was collected can be made again.
    assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]));
    assert!(place.json(&["evaluate", "m", "--activations", INPUTS])["mean_relative_error"].as_f64().unwrap() < 1e-6);
    assert!(place.json(&["--at", "keys", "evaluate", "m", "--activations", INPUTS, "--checkpoint", CHECKPOINT])["mean_relative_error"].as_f64().unwrap() < 0.5);
    let again = place.import("m", Some(INT4));
    assert!(again["written_bytes"].as_u64().unwrap() > 0);
    // Now it is the six dense layers that nothing reaches.
    assert_eq!(place.json(&["gc", "--older-than", "0s", "--apply"])["artifacts"], 6);
    assert_eq!(place.json(&["gc", "--older-than", "0s", "--apply"])["artifacts"], 0);
    assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]));
}

#[test]
fn wrong_use_and_unknown_names() {
    let place = Place::new();
    for reads in ["models", "log", "stats", "verify", "gc"] {
        place.fails(1, &["not a layer store", "does not exist"], &[reads]);
        assert!(!place.path("layers").exists(), "{reads} made the directory that it should have read");
    }
    place.import("m", Some(KEYS));
    place.import("q", Some(INT4));
    write_array(&place.path("x.npy").display().to_string(), ndarray::Array2::zeros((2, 48)).view(), false).unwrap();
    write_array(&place.path("narrow.npy").display().to_string(), ndarray::Array2::zeros((2, 7)).view(), false).unwrap();
    let x = place.path("x.npy").display().to_string();
    let narrow = place.path("narrow.npy").display().to_string();
    for (args, says) in [
        (vec!["nonsense"], "nonsense"),
        (vec!["import", CHECKPOINT], "--model"),
        (vec!["forward", "m", "blocks.0.up"], "--input"),
        (vec!["search", "m", "l", "--input", "x", "--keys", "1", "--threshold", "1"], "cannot be used with"),
        (vec!["--at", "1", "import", CHECKPOINT, "--model", "x"], "a command that reads a version"),
        (vec!["gc", "--older-than", "soon"], "soon"),
    ] {
        place.fails(2, &[says], &args);
    }
    place.fails(1, &["no model named 'n'", "m, q"], &["layers", "n"]);
    place.fails(1, &["no model named 'n'"], &["show", "n", "blocks.0.up"]);
    place.fails(1, &["no layer named 'blocks.0.upp'", "blocks.0.up"], &["show", "m", "blocks.0.upp"]);
    place.fails(1, &["version 99 is not in the store"], &["--at", "99", "models"]);
    place.fails(1, &["found 7", "48"], &["forward", "m", "blocks.0.up", "--input", &narrow]);
    place.fails(1, &["found 7", "48"], &["search", "m", "blocks.0.up", "--input", &narrow]);
    place.fails(1, &["a low_rank layer", "key_value"], &["search", "q", "blocks.0.up", "--input", &x]);
    place.fails(1, &["at most 48"], &["search", "m", "blocks.0.up", "--input", &x, "--keys", "1000"]);
    place.fails(1, &["shape [48]", "matrix"], &["forward", "m", "blocks.0.norm", "--input", &x]);
    place.fails(1, &["none in the store"], &["forward", "q", "blocks.0.up", "--input", &x, "--exact"]);
    place.fails(1, &["none in the store", "--checkpoint"], &["evaluate", "q", "--activations", INPUTS]);
    place.fails(1, &["'a b' is not a valid snapshot name"], &["snapshot", "create", "a b"]);
    place.fails(1, &["a number stands for a version"], &["snapshot", "create", "12"]);
    place.fails(1, &["not a valid model name"], &["import", CHECKPOINT, "--model", ""]);
    place.fails(1, &[".safetensors"], &["export", "m", "--output", "x.bin"]);
    place.fails(2, &["a store in memory ends with the command"], &["copy", "m", "memory://x"]);
}

#[test]
fn a_dry_run_is_refused_where_the_import_would_be() {
    let place = Place::on_disk();
    let import = ["import", CHECKPOINT, "--model", "m"];
    let dry: Vec<&str> = import.into_iter().chain(["--dry-run"]).collect();
    place.json(&dry);
    assert!(!place.path("layers").exists());
    place.import("m", None);
    place.json(&dry);
    std::fs::remove_dir_all(place.path("layers/layers.lance")).unwrap();
    for args in [&import[..], &dry] {
        place.fails(1, &["table 'artifacts'"], args);
    }
    std::fs::remove_dir_all(place.path("layers")).unwrap();
    std::fs::create_dir(place.path("layers")).unwrap();
    std::fs::write(place.path("layers/letter.txt"), "mine").unwrap();
    for args in [&import[..], &dry] {
        place.fails(1, &["letter.txt", "an empty or new directory"], args);
    }
}

#[test]
fn shards_are_one_checkpoint() {
    let place = Place::new();
    let original = formats::open(CHECKPOINT).unwrap();
    let folder = place.path("sharded");
    std::fs::create_dir(&folder).unwrap();
    let mut map = serde_json::Map::new();
    for half in 0..2usize {
        let file = format!("model-{:05}-of-00002.safetensors", half + 1);
        let of_half = original.tensors().values().enumerate().filter(|(i, _)| i % 2 == half);
        let bytes: Vec<_> = of_half.map(|(_, t)| (t, original.bytes(t).unwrap())).collect();
        let tensors: Vec<_> = bytes
            .iter()
            .map(|(t, bytes)| {
                let view = safetensors::tensor::TensorView::new(t.dtype, t.shape.clone(), bytes);
                (t.name.clone(), view.unwrap())
            })
            .collect();
        assert!(!tensors.is_empty());
        map.extend(tensors.iter().map(|(name, _)| (name.clone(), file.clone().into())));
        safetensors::serialize_to_file(tensors, None, &folder.join(&file)).unwrap();
    }
    let index = folder.join("model.safetensors.index.json");
    std::fs::write(&index, serde_json::json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();
    let whole = place.import("whole", None);
    for (model, path) in [("folder", &folder), ("index", &index)] {
        let report = place.json(&["import", path.to_str().unwrap(), "--model", model]);
        assert_eq!(report["written_bytes"], 0);
        assert_eq!(field(&report, "dense_bytes"), field(&whole, "dense_bytes"));
    }
    let output = place.path("back.safetensors");
    place.json(&["export", "index", "--output", output.to_str().unwrap()]);
    let back = formats::open(&output).unwrap();
    assert_eq!(back.tensors().len(), original.tensors().len());
    for tensor in original.tensors().values() {
        let found = back.bytes(back.tensor(&tensor.name).unwrap()).unwrap();
        assert_eq!(found, original.bytes(tensor).unwrap(), "{}", tensor.name);
    }
    // A shard that is missing is named.
    std::fs::remove_file(folder.join("model-00002-of-00002.safetensors")).unwrap();
    place.fails(1, &["model-00002-of-00002.safetensors"], &["import", folder.to_str().unwrap(), "--model", "m"]);
}
