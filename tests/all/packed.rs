//! Models whose weights another program has quantised: GGUF files and Hugging Face folders, from the command line.

use layerstore::formats::{read_array, write_array};
use ndarray::Array2;
use serde_json::{Value, json};

use crate::support::{Place, field};

const Q4_K: &str = "tests/fixtures/formats/gguf/q4_k.gguf";
const GPTQ: &str = "tests/fixtures/formats/quantized/gptq_4_g32_act";

fn layer<'a>(report: &'a Value, name: &str) -> &'a Value {
    let layers = report["layers"].as_array().unwrap();
    layers.iter().find(|layer| layer["layer"] == name).unwrap_or_else(|| panic!("{name} of {report}"))
}

/// Weights come in as they are, run, go out as the numbers that they stand for, and may be compressed again.
#[test]
fn packed_weights_are_kept_and_run() {
    let place = Place::new();
    let up = "model.layers.0.mlp.up_proj";
    let rules = place.path("rules.toml").display().to_string();
    std::fs::write(
        &rules,
        "[[rule]]\nlayers = '.*up_proj'\nmethod = 'low_rank'\nweight = { type = 'int8', group = 64 }\n",
    )
    .unwrap();
    let out = place.path("out.safetensors").display().to_string();
    for (checkpoint, format, columns, layers) in [
        (Q4_K, json!({"type": "int4", "group": 32, "symmetric": false, "minimum": true, "scales": "q4_k"}), 256, 4),
        (GPTQ, json!({"type": "int4", "group": 32, "symmetric": false, "scales": "f16"}), 128, 2),
    ] {
        let plan = place.json(&["import", checkpoint, "--model", "m", "--dry-run"]);
        let report = place.json(&["import", checkpoint, "--model", "m"]);
        assert_eq!(report["layers"].as_array().unwrap().len(), layers);
        let imported = layer(&report, up);
        assert_eq!(field(imported, "method"), "low_rank");
        assert_eq!(layer(&plan, up)["expected_bytes"], imported["stored_bytes"], "{plan} {report}");
        assert_eq!(place.json(&["show", "m", up])["config"]["weight"], format);
        // Again: all is there already.
        let again = place.json(&["import", checkpoint, "--model", "m"]);
        assert!(again["layers"].as_array().unwrap().iter().all(|layer| layer["reused"] == true), "{again}");

        let x = place.path("x.npy").display().to_string();
        write_array(&x, Array2::ones((2, columns)).view(), false).unwrap();
        let y = place.path("y.npy").display().to_string();
        let run = |model: &str| {
            place.json(&["forward", model, up, "--input", &x, "--output", &y]);
            read_array(&y).unwrap().0
        };
        let found = run("m");
        place.json(&["export", "m", "--output", &out]);
        let exported = place.json(&["import", &out, "--model", "dense"]);
        assert_eq!(field(layer(&exported, up), "method"), "dense");
        let expected = run("dense");
        assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-3 * b.abs().max(1.0)), "{found}");

        let report = place.json(&["import", checkpoint, "--model", "again", "--rules", &rules]);
        assert!(layer(&report, up)["relative_error"].as_f64().unwrap() < 0.02, "{report}");
        assert_eq!(place.json(&["show", "again", up])["config"]["weight"]["type"], "int8");
        let report = place.json(&["verify", "--deep"]);
        assert_eq!(report["corrupt"], json!([]));
    }
    let report = place.json(&["import", Q4_K, "--model", "kept", "--keep-names"]);
    layer(&report, "blk.0.ffn_up");
    // No rule can ask for what only files have.
    std::fs::write(&rules, "[[rule]]\nlayers = '.*'\nmethod = 'low_rank'\nweight = { type = 'iq4_nl' }\n").unwrap();
    place.fails(1, &["rules.toml", "iq4_nl", "not made"], &["import", Q4_K, "--model", "m", "--rules", &rules]);
}

/// Files beside a model are kept with it, seen by `show`, carried along and given back.
#[test]
fn files_of_a_model_stay_with_it() {
    let place = Place::new();
    let at = |name: &str| place.path(name).display().to_string();
    let folder = place.path("model");
    std::fs::create_dir(&folder).unwrap();
    std::fs::copy("tests/fixtures/small.safetensors", folder.join("model.safetensors")).unwrap();
    let files =
        [("config.json", "{\"model_type\": \"x\"}"), ("tokenizer.json", "{}"), ("LICENSE", ""), ("notes.txt", "no")];
    files.iter().for_each(|(name, text)| std::fs::write(folder.join(name), text).unwrap());
    let import = ["import", &at("model"), "--model", "m", "--keep", "LICENSE"];
    let plan = place.json(&[&import[..], &["--dry-run"]].concat());
    assert_eq!(plan["files"], json!(["LICENSE", "config.json", "tokenizer.json"]));
    let report = place.json(&import);
    let names: Vec<&Value> = report["files"].as_array().unwrap().iter().map(|file| &file["name"]).collect();
    assert_eq!(json!(names), plan["files"]);
    let version = report["version"].clone();
    assert_eq!(place.json(&import)["version"], version, "the same again is no change");
    place.json(&["import", &at("model"), "--model", "other"]);
    let shown = place.json(&["show", "m"]);
    let own = shown["files"].as_array().unwrap();
    assert_eq!((own.len(), &own[1]["bytes"], &shown["layers"]), (3, &json!(19), &json!(10)), "{shown}");
    // One artifact for both models.
    assert_eq!(place.json(&["show", "other"])["files"][0]["artifact"], own[1]["artifact"]);
    let table = place.run(&["show", "m", "--verify"]).out;
    assert!(table.contains("config.json, 19 B") && table.contains("bits per weight"), "{table}");
    assert_eq!(place.json(&["layers", "m"]).as_array().unwrap().len(), 10);
    assert_eq!(place.json(&["models"])[0]["files"], 3);
    place.fails(
        1,
        &["a linear layer", "file"],
        &["forward", "m", "config.json", "--input", "tests/fixtures/small-calibration.safetensors:blocks.0.up"],
    );
    // To another store, to another name, and out.
    let copied = Place::new();
    place.json(&["copy", "m", &copied.store()]);
    place.json(&["rename", "m", "n"]);
    place.json(&["gc", "--older-than", "0s", "--apply"]);
    for (place, model) in [(&place, "n"), (&copied, "m")] {
        let output = at(&format!("out-{model}"));
        place.json(&["export", model, "--output", &output]);
        for (name, text) in &files[..3] {
            assert_eq!(std::fs::read_to_string(std::path::Path::new(&output).join(name)).unwrap(), *text, "{name}");
        }
        assert_eq!(place.json(&["verify", "--deep"])["corrupt"], json!([]));
    }
    place.fails(1, &["missing.txt"], &["import", &at("model"), "--model", "m", "--keep", "missing.txt"]);
    place.fails(1, &["the model's folder"], &["import", &at("model"), "--model", "m", "--keep", "../x"]);
    std::fs::write(folder.join("config.json"), "{").unwrap();
    place.fails(1, &["config.json", "not JSON"], &["import", &at("model"), "--model", "m"]);
}
