//! Attention blocks from a checkpoint to answers, by the binary and by the library.

use std::collections::BTreeMap;

use layerstore::formats::{read_array, write_array};
use layerstore::layer::{Accuracy, DType, VqAttentionLayer};
use layerstore::{Store, formats};
use layerstore_core::linalg::relative_error;
use ndarray::{Array2, ArrayView2, Axis, concatenate, s};
use safetensors::tensor::TensorView;

use crate::support::{Place, field};

const WIDTH: usize = 16;

const RULES: &str = r#"
[[rule]]
layers = 'blocks\.\d+\.attention'
method = "vq_attention"
mechanism = "vq_k"
n_head = 4
n_kv_head = 2
n_code = 24
block_len = 8
query = "q"
key = "k"
value = "v"
output = "out"

[[rule]]
layers = '.*\.attention\.(q|out)'
method = "low_rank"
weight = { type = "int8", group = "channel" }
rank = 2
"#;

fn sample(rows: usize, columns: usize, seed: usize) -> Array2<f32> {
    Array2::from_shape_fn((rows, columns), |(i, j)| {
        ((i * 7919 + j * 104_729 + i * j * 31 + seed * 613) % 1009) as f32 / 500.0 - 1.0
    })
}

fn write(place: &Place, name: &str, tensors: &BTreeMap<String, Array2<f32>>) -> String {
    let path = place.path(name);
    let views = tensors.iter().map(|(name, array)| {
        let bytes = bytemuck::cast_slice(array.as_slice().unwrap());
        (name.as_str(), TensorView::new(DType::F32, array.shape().to_vec(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &path).unwrap();
    path.display().to_string()
}

/// A checkpoint of two blocks, inputs for all projections, and rules.
fn inputs(place: &Place) -> (String, String, String) {
    let (mut weights, mut activations) = (BTreeMap::new(), BTreeMap::new());
    for block in 0..2 {
        for (place, (name, rows)) in [("q", WIDTH), ("k", 8), ("v", 8), ("out", WIDTH)].into_iter().enumerate() {
            let layer = format!("blocks.{block}.attention.{name}");
            weights.insert(format!("{layer}.weight"), sample(rows, WIDTH, 10 * block + place));
            activations.insert(layer, sample(90, WIDTH, 100 + block));
        }
    }
    let rules = place.path("rules.toml");
    std::fs::write(&rules, RULES).unwrap();
    (
        write(place, "model.safetensors", &weights),
        write(place, "inputs.safetensors", &activations),
        rules.display().to_string(),
    )
}

fn array(place: &Place, name: &str, x: ArrayView2<f32>) -> String {
    let path = place.path(name).display().to_string();
    write_array(&path, x, false).unwrap();
    path
}

#[test]
fn blocks_are_imported_attended_with_and_trained() {
    let place = Place::new();
    let (checkpoint, activations, rules) = inputs(&place);
    let import = ["import", &checkpoint, "--model", "m", "--rules", &rules, "--calibration", &activations];
    let plan = place.json(&[&import[..], &["--dry-run"]].concat());
    let done = place.json(&import);
    let of = |report: &serde_json::Value, name: &str| {
        report["layers"].as_array().unwrap().iter().find(|l| l["layer"] == name).unwrap().clone()
    };
    let block = of(&done, "blocks.1.attention");
    assert_eq!((block["method"].as_str(), block["in_features"].as_u64()), (Some("vq_attention"), Some(WIDTH as u64)));
    assert!(block["bits_per_weight"].is_null() && of(&plan, "blocks.1.attention")["bits_per_weight"].is_null());
    assert_eq!(field(&of(&plan, "blocks.1.attention"), "expected_bytes"), field(&block, "stored_bytes"));
    let error = block["relative_error"].as_f64().unwrap();
    assert!(error > 0.0 && error < 0.9, "{error}");
    assert_eq!(of(&done, "blocks.1.attention.q")["method"], "low_rank");
    assert_eq!(of(&done, "blocks.1.attention.k")["method"], "dense");
    let again = place.json(&import);
    assert_eq!(
        (again["written_bytes"].as_u64(), of(&again, "blocks.0.attention")["reused"].as_bool()),
        (Some(0), Some(true))
    );

    // One call, or several that hand on a state, or exact attention.
    let x = sample(50, WIDTH, 7);
    let attend = |name: &str, x: ArrayView2<f32>, more: &[&str]| {
        let (input, output) = (array(&place, "x.npy", x), place.path(name).display().to_string());
        let args = ["attend", "m", "blocks.0.attention", "--q", &input, "--output", &output];
        let answer = place.json(&[&args[..], more].concat());
        assert_eq!(answer["shape"], serde_json::json!([x.nrows(), WIDTH]));
        read_array(&output).unwrap().0
    };
    let whole = attend("whole.npy", x.view(), &[]);
    let state = place.path("state.safetensors").display().to_string();
    let first = attend("first.npy", x.slice(s![..21, ..]), &["--state", &state]);
    let second = attend("second.npy", x.slice(s![21.., ..]), &["--state", &state]);
    assert!(relative_error(concatenate![Axis(0), first, second].view(), whole.view()) < 1e-5);
    let exact = attend("exact.npy", x.view(), &["--exact"]);
    let from_exact = relative_error(whole.view(), exact.view());
    assert!(from_exact > 1e-3 && from_exact < 0.9, "{from_exact}");

    // Training is a new version; the old one answers as before.
    place.json(&["snapshot", "create", "before"]);
    let queries = array(&place, "queries.npy", sample(400, WIDTH, 8).view());
    let report = place.json(&[
        "codebooks",
        "train",
        "m",
        "blocks.0.attention",
        "--queries",
        &queries,
        "--epochs",
        "4",
        "--batch",
        "100",
    ]);
    assert_eq!(report["steps"].as_u64(), Some(16));
    let losses = report["keys"].as_array().unwrap();
    assert!(losses[1].as_f64().unwrap() < losses[0].as_f64().unwrap(), "{report}");
    assert_ne!(attend("after.npy", x.view(), &[]), whole);
    assert_eq!(attend("before.npy", x.view(), &["--at", "before"]), whole);

    // Blocks are measured as the import measures them, against the checkpoint or dense layers of the store.
    place.json(&["import", &checkpoint, "--model", "dense"]);
    for more in [&["--checkpoint", &checkpoint][..], &[]] {
        let evaluation = place.json(&[&["evaluate", "m", "--activations", &activations], more].concat());
        assert_eq!(evaluation["layers"].as_array().unwrap().len(), 10);
        assert_eq!(evaluation["unmeasured"], serde_json::json!([]));
        let found = of(&evaluation, "blocks.1.attention");
        assert!((found["relative_error"].as_f64().unwrap() - error).abs() < 1e-6, "{found} for {block}");
        assert_eq!((found["tokens"].as_u64(), &found["bits_per_weight"]), (Some(90), &serde_json::Value::Null));
        let errors = evaluation["layers"].as_array().unwrap().iter().map(|l| l["relative_error"].as_f64().unwrap());
        assert!((evaluation["mean_relative_error"].as_f64().unwrap() - errors.sum::<f64>() / 10.0).abs() < 1e-12);
    }
    // What is no weight is left out where weights are what is asked for.
    let exported = place.path("exported.safetensors").display().to_string();
    place.json(&["export", "m", "--output", &exported]);
    assert_eq!(formats::open(&exported).unwrap().layers().len(), 8);
    assert_eq!(place.json(&["verify"])["corrupt"].as_array().unwrap().len(), 0);

    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let store = Store::open(&place.store()).await.unwrap();
        let handle = store.at("before").await.unwrap().attention("m", "blocks.0.attention").await.unwrap();
        assert_eq!(handle.projections().unwrap()[1].record().layer, "blocks.0.attention.k");
        let block = handle.load().await.unwrap();
        let batch = x.view().insert_axis(Axis(0));
        let y = block.attend(batch, batch, batch, None, None, Accuracy::Approximate).unwrap();
        assert_eq!(y.index_axis(Axis(0), 0), whole);
        // The layer by itself, as any other.
        let layer = store.latest().await.unwrap().layer("m", "blocks.0.attention").await.unwrap();
        let layer = layer.load().await.unwrap();
        let layer = layer.downcast_ref::<VqAttentionLayer>().unwrap();
        assert_eq!(layer.keys().unwrap().codewords().dim(), (2, 24, 4));
    });
}

/// Layers of a model that an evaluation has no inputs for are in its answer, each with the reason.
#[test]
fn what_is_not_measured_is_named() {
    let place = Place::new();
    let (checkpoint, activations, rules) = inputs(&place);
    place.json(&["import", &checkpoint, "--model", "m", "--rules", &rules, "--calibration", &activations]);
    let settings = place.path("settings.toml");
    std::fs::write(&settings, "n_head = 2\nn_code = 8\n").unwrap();
    let queries = array(&place, "queries.npy", sample(60, WIDTH, 1).view());
    let train = ["codebooks", "train", "m", "free", "--queries", &queries, "--settings"];
    place.json(&[&train[..], &[settings.to_str().unwrap()]].concat());
    let some = [(0, "q", 90), (0, "k", 90), (1, "q", 90), (1, "k", 90), (1, "v", 45)];
    let some = some
        .into_iter()
        .map(|(block, name, rows)| (format!("blocks.{block}.attention.{name}"), sample(rows, WIDTH, 100 + block)));
    let some = write(&place, "some.safetensors", &some.collect());
    let evaluate = ["evaluate", "m", "--activations", &some, "--checkpoint", &checkpoint];
    let found = place.json(&evaluate);
    assert_eq!(found["layers"].as_array().unwrap().len(), 5);
    let none = "no activations have its name";
    let expected = [
        ("blocks.0.attention", format!("its projection 'blocks.0.attention.v' is not measured: {none}")),
        ("blocks.0.attention.out", none.to_owned()),
        ("blocks.0.attention.v", none.to_owned()),
        ("blocks.1.attention", "its projections have [90, 90, 45] activations, not as many each".to_owned()),
        ("blocks.1.attention.out", none.to_owned()),
        ("free", "its inputs are queries and keys themselves, of which activations files hold none".to_owned()),
    ];
    let listed = found["unmeasured"].as_array().unwrap().iter();
    let listed: Vec<_> =
        listed.map(|l| (l["layer"].as_str().unwrap(), l["reason"].as_str().unwrap().to_owned())).collect();
    assert_eq!(listed, expected);
    assert_eq!(found["unmeasured"][0]["method"], "vq_attention");
    let shown = place.run(&evaluate).out;
    assert!(shown.contains("5 measured layers") && shown.contains("not measured: 6 layers"), "{shown}");
    for (layer, reason) in expected {
        assert!(shown.contains(layer) && shown.contains(&reason), "{shown}");
    }
}

/// A block takes the layers along that it names, behind its name or elsewhere.
#[test]
fn a_block_is_copied_with_its_projections() {
    let place = Place::new();
    let (checkpoint, activations, rules) = inputs(&place);
    place.json(&["import", &checkpoint, "--model", "m", "--rules", &rules, "--calibration", &activations]);
    let settings = place.path("settings.toml");
    let named = ["query", "key", "value"].map(|key| format!("{key} = 'blocks.0.attention.{}'\n", &key[..1]));
    std::fs::write(&settings, format!("n_head = 4\nn_kv_head = 2\nn_code = 8\n{}", named.concat())).unwrap();
    let (settings, queries) =
        (settings.display().to_string(), array(&place, "queries.npy", sample(60, WIDTH, 1).view()));
    place.json(&["codebooks", "train", "m", "own", "--queries", &queries, "--settings", &settings, "--epochs", "1"]);

    let to = Place::new();
    let x = array(&place, "x.npy", sample(20, WIDTH, 7).view());
    let block = |block: &str| ["q", "k", "v"].map(|name| format!("{block}.{name}"));
    for (name, parts, more) in [
        ("blocks.1.attention", block("blocks.1.attention"), Some("blocks.1.attention.out")),
        ("own", block("blocks.0.attention"), None),
    ] {
        let copied = place.json(&["copy", "m", name, &to.store()]);
        let mut expected: Vec<&str> = parts.iter().map(String::as_str).chain(more).chain([name]).collect();
        expected.sort_unstable();
        assert_eq!(copied["layers"], serde_json::json!(expected));
        let answer = |place: &Place| {
            let output = place.path("y.npy").display().to_string();
            place.json(&["attend", "m", name, "--q", &x, "--output", &output]);
            read_array(&output).unwrap().0
        };
        assert_eq!(answer(&to), answer(&place));
    }
    // All of the second block, and of the first what the other block runs with.
    assert_eq!(to.json(&["layers", "m"]).as_array().unwrap().len(), 9);
    let said = place.run(&["copy", "m", "own", &to.store()]).out;
    assert!(said.contains("layer 'own' of 'm', with 3 that it runs with, is in "), "{said}");
}

#[test]
fn a_block_of_its_own_is_trained_from_queries_and_keys() {
    let place = Place::new();
    let settings = place.path("settings.toml");
    std::fs::write(&settings, "n_head = 2\nn_code = 8\nblock_len = 4\n").unwrap();
    let settings = settings.display().to_string();
    let queries = array(&place, "queries.npy", sample(60, 12, 1).view());
    let keys = array(&place, "keys.npy", sample(50, 12, 2).view());
    let train = ["codebooks", "train", "free", "attention", "--queries", &queries, "--keys", &keys];
    place.fails(1, &["not a layer store"], &train);
    let made = place.json(&[&train[..], &["--settings", &settings, "--epochs", "2", "--batch", "16"]].concat());
    assert_eq!((made["steps"].as_u64(), made["version"].as_u64()), (Some(8), Some(2)));
    let shown = place.json(&["show", "free", "attention"]);
    assert_eq!((shown["config"]["d_k"].as_u64(), shown["config"]["causal"].as_bool()), (Some(6), Some(true)));
    let x = array(&place, "x.npy", sample(9, 12, 3).view());
    assert_eq!(place.json(&["attend", "free", "attention", "--q", &x])["shape"], serde_json::json!([9, 12]));
    // Trained further, from where it was.
    place.fails(1, &["epochs", "at least 1"], &[&train[..], &["--epochs", "0"]].concat());
    let further = place.json(&[&train[..], &["--epochs", "1"]].concat());
    assert!(
        further["queries"][0].as_f64().unwrap() < 1.05 * made["queries"][1].as_f64().unwrap(),
        "{further} after {made}"
    );

    // One that names layers of a model has their lengths, Wv's too.
    let (checkpoint, _, _) = inputs(&place);
    place.json(&["import", &checkpoint, "--model", "m"]);
    let named =
        "n_head = 4\nn_kv_head = 1\nn_code = 8\nquery = 'attention.q'\nkey = 'attention.k'\nvalue = 'attention.v'\n";
    std::fs::write(place.path("named.toml"), named).unwrap();
    let named = place.path("named.toml").display().to_string();
    let wide = array(&place, "wide.npy", sample(60, WIDTH, 1).view());
    place.fails(
        1,
        &["outputs of the projections"],
        &["codebooks", "train", "m", "blocks.0", "--queries", &wide, "--settings", &named],
    );
    let fitting = std::fs::read_to_string(&named)
        .unwrap()
        .replace("n_kv_head = 1", "n_kv_head = 2")
        .replace("attention.v", "attention.k");
    std::fs::write(&named, fitting).unwrap();
    place.json(&["codebooks", "train", "m", "blocks.0", "--queries", &wide, "--settings", &named]);
    assert_eq!(place.json(&["attend", "m", "blocks.0", "--q", &wide])["shape"], serde_json::json!([60, WIDTH]));

    let narrow = array(&place, "narrow.npy", sample(9, 7, 3).view());
    place.fails(1, &["width of queries", "7"], &["attend", "free", "attention", "--q", &narrow]);
    place.fails(1, &["no layer named"], &["attend", "free", "other", "--q", &x]);
    place.fails(1, &["vq_attention"], &["forward", "free", "attention", "--input", &x]);
    std::fs::write(place.path("bad.toml"), "n_head = 2\nn_kode = 8\n").unwrap();
    let bad = place.path("bad.toml").display().to_string();
    place.fails(1, &["line 2", "n_kode"], &[&train[..], &["--settings", &bad]].concat());
    std::fs::write(place.path("state.safetensors"), b"nonsense").unwrap();
    let state = place.path("state.safetensors").display().to_string();
    place.fails(1, &["state.safetensors"], &["attend", "free", "attention", "--q", &x, "--state", &state]);
}

#[test]
fn rules_for_blocks_that_do_not_fit_are_refused() {
    let place = Place::new();
    let (checkpoint, activations, _) = inputs(&place);
    let refuse = |from: &str, to: &str, calibrated: bool, says: &str| {
        assert!(RULES.contains(from), "{from}");
        std::fs::write(place.path("other.toml"), RULES.replace(from, to)).unwrap();
        let rules = place.path("other.toml").display().to_string();
        let mut args = vec!["import", &checkpoint, "--model", "m", "--rules", &rules];
        if calibrated {
            args.extend(["--calibration", &activations]);
        }
        place.fails(1, &[says], &args);
    };
    refuse("", "", false, "calibration inputs for codebooks");
    refuse("key = \"k\"", "key = \"keys\"", true, "no matrix 'blocks.0.attention.keys'");
    refuse("n_head = 4", "n_head = 6", true, "outputs of the projections");
    refuse("n_head = 4", "n_head = 4\nd_k = 5", true, "d_k");
    refuse("n_code = 24", "n_code = 91", true, "91 for 90 vectors");
    refuse("n_code = 24", "n_code = 9223372036854775807", true, "for 90 vectors");
    refuse("n_head = 4", "n_head = 9223372036854775807", true, "divisor of n_head");
    refuse(
        "mechanism = \"vq_k\"",
        "mechanism = \"hyper\"\nhyper = { sample_size = 99999999999 }",
        true,
        "sample_size: found 99999999999, expected at most 65536",
    );
    refuse("value = \"v\"", "", true, "all three");
    assert!(!place.path("layers").exists() || place.json(&["models"]).as_array().unwrap().is_empty());
}
