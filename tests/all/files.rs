//! What belongs to a checkpoint, where outputs go, and what a command says of both.

use std::path::Path;
#[cfg(target_os = "linux")]
use std::process::Stdio;

use layerstore::formats::{read_array, write_array};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use crate::support::{CHECKPOINT, Place};
#[cfg(target_os = "linux")]
use crate::support::{INPUTS, INT4};

/// Writes a checkpoint of f32 matrices, each of one value.
fn save(path: &Path, tensors: &[(&str, [usize; 2], f32)]) {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|(_, [r, c], v)| v.to_le_bytes().repeat(r * c)).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), bytes)| (*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

fn names(report: &serde_json::Value) -> Vec<String> {
    report["layers"].as_array().unwrap().iter().map(|l| l["layer"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn what_does_not_belong_to_a_checkpoint_is_left_out_and_named() {
    let place = Place::new();
    let folder = place.path("checkpoint");
    std::fs::create_dir(&folder).unwrap();
    let at = folder.to_str().unwrap();
    save(&folder.join("model-00001-of-00002.safetensors"), &[("a.weight", [4, 4], 1.0), ("old.weight", [4, 4], 1.0)]);
    place.fails(1, &["found 1 of 2 shards", "number 2 is missing"], &["import", at, "--model", "m"]);
    save(&folder.join("model-00002-of-00002.safetensors"), &[("b.weight", [4, 4], 2.0)]);
    save(&folder.join("optimizer.safetensors"), &[("a.exp_avg", [4, 4], 0.0)]);
    let args = ["import", at, "--model", "m"];
    let report = place.json(&args);
    assert_eq!(names(&report), ["a", "b", "old"]);
    assert!(report["notes"][0].as_str().unwrap().contains("'optimizer.safetensors' is left out"), "{report}");
    let index = json!({"weight_map": {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}});
    std::fs::write(folder.join("unet.safetensors.index.json"), index.to_string()).unwrap();
    let report = place.json(&args);
    assert_eq!(names(&report), ["a", "b"]);
    assert_eq!(report["notes"].as_array().unwrap().len(), 2);
    let said = place.run(&args).err;
    assert!(said.contains("note: 'optimizer.safetensors' is left out") && said.contains("'old.weight'"), "{said}");
}

#[test]
fn all_misfits_are_found_before_any_work() {
    let place = Place::new();
    let checkpoint = place.path("m.safetensors");
    let fine = ("a.weight", [64, 64], 1.0);
    save(
        &checkpoint,
        &[fine, ("b.weight", [64, 100], 1.0), ("c.weight", [8, 64], 1.0), ("d.weight", [64, 64], f32::NAN)],
    );
    let rules = place.path("r.toml");
    std::fs::write(&rules, "[[rule]]\nlayers = '.*'\nmethod = 'low_rank'\nrank = 16\n").unwrap();
    let args = ["import", checkpoint.to_str().unwrap(), "--model", "m", "--rules", rules.to_str().unwrap()];
    for more in [&[][..], &["--dry-run"]] {
        place.fails(1, &["layer 'b'", "layer 'c'", "layer 'd'", "NaN"], &[&args[..], more].concat());
        assert!(!place.path("layers").exists());
    }
    save(&checkpoint, &[fine, ("d.weight", [64, 64], 1.0)]);
    let inputs = place.path("c.safetensors");
    save(&inputs, &[("a", [4, 64], f32::INFINITY), ("d", [4, 64], f32::NAN)]);
    let calibrated = [&args[..], &["--calibration", inputs.to_str().unwrap()]].concat();
    for more in [&[][..], &["--dry-run"]] {
        place.fails(1, &["layer 'a'", "layer 'd'", "NaN", "inf"], &[&calibrated[..], more].concat());
    }
    place.json(&args);
}

#[test]
fn outputs_keep_what_is_there() {
    let place = Place::new();
    place.import("m", None);
    let at = |name: &str| place.path(name).display().to_string();
    let (file, x) = (at("f.safetensors"), at("f.safetensors:x"));
    write_array(&x, ndarray::Array2::ones((2, 48)).view(), false).unwrap();
    let forward = |output: &str| ["forward", "m", "blocks.0.up", "--input", &x, "--output", output].map(str::to_owned);
    let run = |output: &str| place.json(&forward(output).each_ref().map(String::as_str));
    run(&format!("{file}:y"));
    assert_eq!(read_array(&x).unwrap().0, ndarray::Array2::<f32>::ones((2, 48)));
    assert_eq!(read_array(&format!("{file}:y")).unwrap().0.dim(), (2, 96));
    run(&at(&format!("{}.npy", "n".repeat(251))));
    // A place that cannot be written to is found before the layer is looked for.
    for output in [at("none/y.npy"), at(&format!("{}.npy", "n".repeat(252))), at("no.txt")] {
        let ran = place.run(&["forward", "m", "no such layer", "--input", &x, "--output", &output]);
        assert!(ran.code == 1 && !ran.err.contains("no such layer"), "{}", ran.err);
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::{PermissionsExt, symlink};
        symlink("f.safetensors", place.path("link.safetensors")).unwrap();
        std::fs::set_permissions(place.path("f.safetensors"), std::fs::Permissions::from_mode(0o600)).unwrap();
        place.json(&["export", "m", "--output", &at("link.safetensors")]);
        assert!(place.path("link.safetensors").is_symlink());
        assert_eq!(place.path("f.safetensors").metadata().unwrap().permissions().mode() & 0o777, 0o600);
        place.json(&["export", "m", "--output", &at("new.safetensors")]);
        assert_eq!(place.path("new.safetensors").metadata().unwrap().permissions().mode() & 0o400, 0o400);
    }
}

/// Tables, locks and statistics are of one directory, however it is written.
#[cfg(unix)]
#[test]
fn a_store_has_one_address() {
    let place = Place::new();
    std::fs::create_dir_all(place.path("real/deep")).unwrap();
    std::fs::create_dir(place.path("home")).unwrap();
    std::os::unix::fs::symlink("real/deep", place.path("link")).unwrap();
    let root = place.folder.path().display();
    let run = |store: &str, args: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_layerstore"));
        command.args(["--format", "json", "--quiet"]).args(args).current_dir(env!("CARGO_MANIFEST_DIR"));
        let done = command.env("LAYERSTORE_URI", store).env("HOME", place.path("home")).output().unwrap();
        assert!(done.status.success(), "{store}: {}", String::from_utf8_lossy(&done.stderr));
        serde_json::from_slice::<serde_json::Value>(&done.stdout).unwrap()
    };
    for (address, expected) in [
        (format!("{root}/link/../st"), "real/st"),
        ("~/s".to_owned(), "home/s"),
        (format!("file://{root}/a%20b"), "a b"),
        (format!("file:{root}/x"), "x"),
        (format!("file://localhost{root}/y"), "y"),
    ] {
        run(&address, &["import", CHECKPOINT, "--model", "m"]);
        let stats = run(place.path(expected).to_str().unwrap(), &["stats"]);
        assert!(stats["models"] == 1 && stats["bytes"].as_u64().unwrap() > 0, "{address}");
        assert!(place.path(expected).join("layerstore.lock").exists(), "{address}");
    }
    assert!(!place.path("st").exists() && !Path::new("~").exists());
}

#[cfg(target_os = "linux")]
#[test]
fn what_nobody_hears_fails_nothing() {
    let place = Place::new();
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let import = ["import", CHECKPOINT, "--model", "m", "--rules", INT4, "--calibration", INPUTS];
    let done = place.command(&import).stdout(Stdio::null()).stderr(full()).status().unwrap();
    assert_eq!(done.code(), Some(0));
    assert_eq!(place.json(&["models"]).as_array().unwrap().len(), 1);
    assert_eq!(place.command(&["layers", "none"]).stderr(full()).status().unwrap().code(), Some(1));
    // A reader that goes away.
    let mut child = place.command(&["layers", "m"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn names_are_escaped_where_they_are_printed() {
    let place = Place::new();
    let file = place.path("m.safetensors");
    save(&file, &[("a\u{1b}[2J\nb\u{202e}c.weight", [4, 4], 1.0), ("d\u{1b}.weight", [4, 4], f32::NAN)]);
    let file = file.display().to_string();
    let hidden = |text: &str| text.contains(['\u{1b}', '\u{202e}']);
    let refused = place.run(&["import", &file, "--model", "m"]);
    assert!(refused.code == 1 && !hidden(&refused.err) && refused.err.contains(r"d\u{1b}"), "{}", refused.err);
    save(Path::new(&file), &[("a\u{1b}[2J\nb\u{202e}c.weight", [4, 4], 1.0)]);
    for args in [&["import", &file, "--model", "m"][..], &["layers", "m"], &["--format", "json", "layers", "m"]] {
        let ran = place.run(args);
        assert!(ran.code == 0 && !hidden(&ran.out) && !hidden(&ran.err), "{}", ran.out);
    }
    assert_eq!(place.json(&["layers", "m"])[0]["layer"], "a\u{1b}[2J\nb\u{202e}c");
}

/// What is said of the whole checkpoint is stored once, and exported.
#[test]
fn metadata_is_stored_once() {
    let place = Place::new();
    let file = place.path("m.safetensors");
    let bytes = 1f32.to_le_bytes();
    let names: Vec<String> = (0..20).map(|i| format!("t{i}")).collect();
    let views = names.iter().map(|name| (name, TensorView::new(Dtype::F32, vec![1], &bytes).unwrap()));
    let tags = "x".repeat(10_000);
    let metadata = std::collections::HashMap::from([("tags".to_owned(), tags.clone())]);
    safetensors::serialize_to_file(views, Some(metadata), &file).unwrap();
    place.json(&["import", file.to_str().unwrap(), "--model", "m"]);
    assert_eq!(place.json(&["layers", "m"]).to_string().matches(&tags).count(), 1);
    let output = place.path("o.safetensors");
    place.json(&["export", "m", "--output", output.to_str().unwrap()]);
    assert_eq!(layerstore::formats::open(&output).unwrap().metadata()["tags"], tags);
}
