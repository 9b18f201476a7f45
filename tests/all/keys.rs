//! Keys: their backends in a store, searched on disk, across layers, and by themselves.

use layerstore::formats::write_array;
use std::collections::HashSet;
use std::time::Duration;

use layerstore::layer::{Accuracy, DType, KeyValueLayer, Limit, SharedLayer};
use layerstore::{
    ActivationsFile, ErrorKind, ImportOptions, NearKey, Rules, Store, formats, import, load_backend, save_backend,
};
use layerstore_core::linalg::normal_quantile;
use ndarray::{Array2, s};
use safetensors::tensor::TensorView;
use serde_json::json;

use crate::support::{CHECKPOINT, INPUTS, INT4, KEYS, Place, files, refused};

const BACKENDS: &str = "tests/fixtures/backends.toml";
const SVD: &str = "[[rule]]\nlayers = 'blocks\\..*'\nmethod = \"key_value\"\ndecomposition = \"svd\"\n\
                   ranking = \"score\"\nexpected_keys_per_query = 6\n";

fn inputs(layer: &str, width: usize) -> Array2<f32> {
    ActivationsFile::open(INPUTS).unwrap().get(layer, width).unwrap().unwrap().slice(s![..16, ..]).to_owned()
}

fn key_value(layer: SharedLayer) -> KeyValueLayer {
    layer.downcast_ref::<KeyValueLayer>().unwrap().clone()
}

#[test]
fn backends_are_stored_and_run() {
    let place = Place::new();
    place.import("f32", None);
    place.import("keys", Some(KEYS));
    place.import("backends", Some(BACKENDS));
    assert_eq!(place.json(&["verify"])["corrupt"], json!([]));
    let measured = |model: &str| place.json(&["evaluate", model, "--activations", INPUTS]);
    let (flat, others) = (measured("keys"), measured("backends"));
    let (flat, others) = (flat["layers"].as_array().unwrap(), others["layers"].as_array().unwrap());
    assert_eq!((flat.len(), others.len()), (6, 6));
    for (flat, other) in flat.iter().zip(others) {
        let error = |l: &serde_json::Value| l["relative_error"].as_f64().unwrap();
        assert_eq!(flat["layer"], other["layer"]);
        // One cell in four is not looked into, and codes are coarse.
        let slack = if other["layer"].as_str().unwrap().ends_with("down") { 0.25 } else { 0.15 };
        assert!(error(other) < error(flat) + slack, "{other} beside {flat}");
        // Of keys that nobody looked at no error is known; of coarse codes no useful bound.
        assert!(other["mean_certified_error"].is_null() && !flat["mean_certified_error"].is_null(), "{other}");
    }
    let x = place.path("x.npy").display().to_string();
    write_array(&x, inputs("blocks.0.up", 48).view(), false).unwrap();
    let search = ["search", "backends", "blocks.0.up", "--input", &x];
    assert_eq!(place.json(&[&search[..], &["--keys", "4"]].concat()).as_array().unwrap().len(), 16);
    place.fails(1, &["max_relative_error", "flat"], &[&search[..], &["--max-error", "0.2"]].concat());
    // Exact: of rounded keys, the dense weights that another model of the store has.
    let y = place.path("y.npy").display().to_string();
    let exact = |layer: &str| {
        let done = place.json(&["forward", "backends", layer, "--input", &x, "--output", &y, "--exact"]);
        (done["relative_error_bound"].as_f64(), layerstore::formats::read_array(&y).unwrap().0)
    };
    let (bound, found) = exact("blocks.1.up");
    let dense = place.json(&["forward", "f32", "blocks.1.up", "--input", &x, "--output", &y]);
    assert_eq!((dense["shape"].clone(), bound), (json!([16, 96]), None));
    assert_eq!(found, layerstore::formats::read_array(&y).unwrap().0);
    assert!(exact("blocks.0.up").0.unwrap() < 1e-3);
    // What does not fit the layers is adapted and said, or refused.
    let rules = std::fs::read_to_string(BACKENDS).unwrap().replace("clusters = 4", "clusters = 64");
    std::fs::write(place.path("many.toml"), &rules).unwrap();
    let many = place.path("many.toml").display().to_string();
    place.import("many", Some(&many));
    let shown = place.json(&["show", "many", "blocks.0.down"]);
    assert_eq!(shown["config"]["adapted"], json!(["backend clusters: 64 to 48"]), "{shown}");
    let strict = rules.replace("method = \"key_value\"", "method = \"key_value\"\non_misfit = \"error\"");
    std::fs::write(&many, strict).unwrap();
    let import = ["import", CHECKPOINT, "--model", "strict", "--rules", &many, "--calibration", INPUTS];
    place.fails(1, &["clusters: found 64, expected at most 48"], &import);
}

#[tokio::test(flavor = "multi_thread")]
async fn searching_on_disk_finds_the_same() {
    let place = Place::new();
    std::fs::write(place.path("svd.toml"), SVD).unwrap();
    place.import("keys", Some(KEYS));
    place.import("svd", Some(place.path("svd.toml").to_str().unwrap()));
    place.import("backends", Some(BACKENDS));
    let store = Store::open(&place.store()).await.unwrap();
    let latest = store.latest().await.unwrap();
    let x = inputs("blocks.1.up", 48);
    for model in ["keys", "svd"] {
        let handle = latest.layer(model, "blocks.1.up").await.unwrap();
        for limit in [None, Some(Limit::Keys(3.0)), Some(Limit::Threshold(0.5)), Some(Limit::Threshold(0.0))] {
            let found = handle.search_on_disk(x.view(), limit).await.unwrap();
            let (mut hits, mut apart) = (0, 0);
            let loaded = key_value(handle.load().await.unwrap()).search(x.view(), limit).unwrap();
            assert_eq!((found.len(), loaded.len()), (16, 16));
            for (found, loaded) in found.iter().zip(loaded) {
                assert_eq!((found.threshold, found.certified_error), (loaded.threshold, None));
                hits += loaded.hits.len();
                for hit in &loaded.hits {
                    match found.hits.iter().find(|h| h.key == hit.key) {
                        Some(same) => assert!((same.score - hit.score).abs() < 1e-3 * (1.0 + hit.score.abs())),
                        None => apart += 1,
                    }
                }
                apart += found.hits.len().abs_diff(loaded.hits.len());
            }
            // Scores at the threshold may fall either way.
            assert!(hits > 20 && apart <= 1, "{model} {limit:?}: {apart} of {hits}");
        }
    }
    let handle = latest.layer("keys", "blocks.1.up").await.unwrap();
    let limited = handle.search_on_disk(x.view(), Some(Limit::MaxError(0.1))).await;
    refused(limited, ErrorKind::InvalidInput, &["max_relative_error"]);
    let wide = inputs("blocks.0.down", 96);
    refused(handle.search_on_disk(wide.view(), None).await, ErrorKind::InvalidInput, &["query", "96", "48"]);
    let rounded = latest.layer("backends", "blocks.1.up").await.unwrap();
    refused(rounded.search_on_disk(x.view(), None).await, ErrorKind::InvalidInput, &["store_float_keys"]);
    // A layer whose keys are stored beside a graph.
    let kept = latest.layer("backends", "blocks.0.up").await.unwrap();
    assert!(!kept.search_on_disk(x.view(), None).await.unwrap()[0].hits.is_empty());
}

#[test]
fn keys_are_found_across_layers_with_and_without_an_index() {
    let place = Place::new();
    std::fs::write(place.path("svd.toml"), SVD).unwrap();
    place.import("one", Some(KEYS));
    place.import("two", Some(KEYS));
    place.import("svd", Some(place.path("svd.toml").to_str().unwrap()));
    let nearest = |more: &[&str]| place.json(&[&["nearest"], more].concat())[0]["nearest"].clone();
    let own = ["one", "blocks.0.up", "5", "--count", "3"];
    let before = nearest(&own);
    assert_eq!(before.as_array().unwrap().len(), 3);
    // The key itself, by the names of both models that share the artifact.
    let itself = &before[0];
    assert!(itself["cosine"].as_f64().unwrap() > 0.9999 && itself["key"] == 5);
    let names = json!([{"model": "one", "layer": "blocks.0.up"}, {"model": "two", "layer": "blocks.0.up"}]);
    assert_eq!(itself["layers"], names);
    let among = nearest(&[&own[..], &["--among", "svd"]].concat());
    let among_all = among.as_array().unwrap();
    assert!(among_all.len() == 3 && among_all.iter().all(|n| n["layers"][0]["model"] == "svd"), "{among}");

    // What is sorted on the way has to have a place, and the store is not blamed where it has none.
    let no_place = place.command(&["index"]).env("TMPDIR", "/nowhere").output().unwrap();
    let said = String::from_utf8(no_place.stderr).unwrap();
    assert!(no_place.status.code() == Some(1) && said.contains("/nowhere: nothing can be made there"), "{said}");
    let made = place.json(&["index"]);
    assert_eq!(made[0], json!({"table": "keys_d48", "keys": 384, "partitions": 1}));
    assert_eq!(made[1], json!({"table": "keys_d96", "keys": 192, "partitions": null}));
    let indexed = nearest(&own);
    assert_eq!(indexed[0]["layers"], names);
    assert!((indexed[0]["cosine"].as_f64().unwrap() - 1.0).abs() < 1e-3, "{indexed}");
    // An index whose end is damaged is told, and no memory is asked for by it.
    for file in files(&place.path("layers/keys_d48.lance/_indices")) {
        let good = std::fs::read(&file).unwrap();
        let mut bad = good.clone();
        let at = bad.len() - 13;
        bad[at] ^= 0x40;
        std::fs::write(&file, bad).unwrap();
        let name = file.file_name().unwrap().to_str().unwrap();
        place.fails(1, &[name, "contradicts itself"], &[&["nearest"][..], &own].concat());
        std::fs::write(&file, good).unwrap();
    }
    // Keys that came after the index are found too, and gc leaves an index that works.
    place.import("int4", Some(INT4));
    std::fs::write(place.path("ridge.toml"), SVD.replace("\"svd\"", "\"whitened_svd\"\nridge_relative = 0.5")).unwrap();
    place.import("later", Some(place.path("ridge.toml").to_str().unwrap()));
    let later = nearest(&["later", "blocks.1.up", "7", "--count", "2"]);
    assert_eq!(later[0]["layers"][0]["model"], "later", "{later}");
    place.import("svd", None);
    place.json(&["gc", "--older-than", "0s", "--apply"]);
    assert_eq!(place.json(&["verify"])["corrupt"], json!([]));
    assert_eq!(nearest(&own)[0]["layers"], names);
    assert_eq!(nearest(&["later", "blocks.1.up", "7"])[0]["layers"][0]["model"], "later");
    assert_eq!(place.json(&["index"])[0]["keys"], 384);
    assert_eq!(nearest(&own)[0]["layers"], names);

    let v = place.path("v.npy").display().to_string();
    write_array(&v, inputs("blocks.0.up", 48).slice(s![..2, ..]), false).unwrap();
    assert_eq!(place.json(&["nearest", "--input", &v]).as_array().unwrap().len(), 2);
    write_array(&v, Array2::zeros((1, 48)).view(), false).unwrap();
    place.fails(1, &["direction", "points somewhere"], &["nearest", "--input", &v]);
    write_array(&v, Array2::ones((1, 7)).view(), false).unwrap();
    place.fails(1, &["length of the direction", "7", "48, 96"], &["nearest", "--input", &v]);
    place.fails(1, &["key", "48", "less than 48"], &["nearest", "one", "blocks.0.up", "48"]);
    place.fails(1, &["backend", "f32"], &["nearest", "int4", "blocks.0.up", "0"]);
    place.fails(2, &["MODEL LAYER KEY"], &["nearest", "one"]);
    place.fails(
        1,
        &["no model named 'svt'", "svd"],
        &[&["nearest"][..], &own, &["--among", "svd", "--among", "svt"]].concat(),
    );
    place.fails(1, &["number of keys", "at least 1"], &["nearest", "one", "blocks.0.up", "0", "--count", "0"]);
}

/// Numbers of a standard normal distribution.
fn normal(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut state = seed;
    Array2::from_shape_simple_fn((rows, columns), || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        normal_quantile(((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64) as f32
    })
}

/// Keys of the model `m` near some directions.
async fn near(store: &Store, width: usize) -> Vec<HashSet<(String, u32)>> {
    let directions = normal(12, width, 1000);
    let among = ["m".to_owned()];
    let latest = store.latest().await.unwrap();
    let found = latest.nearest_keys(directions.view(), 10, Some(&among)).await.unwrap();
    let name = |near: NearKey| (near.layers[0].layer.clone(), near.key);
    found.into_iter().map(|keys| keys.into_iter().map(name).collect()).collect()
}

/// Keys are found through an index whatever divides their length, also after gc has moved them.
#[tokio::test(flavor = "multi_thread")]
async fn an_index_finds_keys_of_any_length() {
    const WIDTHS: [usize; 5] = [96, 97, 101, 33, 7];
    let place = Place::new();
    let store = Store::create(&place.store()).await.unwrap();
    let bring = async |model: &str, layers: usize, rules: &str| {
        let weights: Vec<(String, usize, Vec<u8>)> = WIDTHS
            .into_iter()
            .flat_map(|width| (0..layers * if width < 32 { 3 } else { 1 }).map(move |layer| (width, layer)))
            .map(|(width, layer)| {
                let weight = normal(width, width, (1 + layer * 1000 + width + model.len()) as u64);
                let bytes = weight.iter().flat_map(|v| v.to_le_bytes()).collect();
                (format!("w{width}.{layer}.weight"), width, bytes)
            })
            .collect();
        let views = weights
            .iter()
            .map(|(name, width, bytes)| (name, TensorView::new(DType::F32, vec![*width, *width], bytes).unwrap()));
        let file = place.path("model.safetensors");
        safetensors::serialize_to_file(views, None, &file).unwrap();
        let options = ImportOptions { rules: Rules::parse(rules, "rules.toml").unwrap(), ..ImportOptions::default() };
        import(&store, formats::open(&file).unwrap(), model, options).await.unwrap();
    };
    let keys = "[[rule]]\nlayers = '.*'\nmethod = 'key_value'\n";
    bring("gone", 1, keys).await;
    bring("m", 16, keys).await;
    let mut exact = vec![];
    for width in WIDTHS {
        exact.push(near(&store, width).await);
    }
    if std::path::Path::new(store.uri()).is_dir() {
        // As a process leaves it that is killed before the table's first version.
        std::fs::create_dir_all(format!("{}/keys_d98.lance/_versions", store.uri())).unwrap();
        let direction = Array2::ones((1, 98));
        let none = store.latest().await.unwrap().nearest_keys(direction.view(), 1, None).await;
        refused(none, ErrorKind::InvalidInput, &["length of the direction", "98"]);
    }
    let made = store.index_keys(|_, _| ()).await.unwrap();
    assert!(made.len() == 5 && made.iter().all(|table| table.partitions == Some(1)), "{made:?}");
    for collected in [false, true] {
        if collected {
            bring("gone", 1, "").await;
            assert!(store.gc(Duration::ZERO, true).await.unwrap().artifacts > 0);
        }
        let mut recalls = vec![];
        for (width, exact) in WIDTHS.into_iter().zip(&exact) {
            let found = near(&store, width).await;
            let common: usize = found.iter().zip(exact).map(|(found, exact)| found.intersection(exact).count()).sum();
            recalls.push(common as f64 / 120.0);
        }
        assert!(recalls.iter().all(|recall| *recall > 0.8 && *recall > recalls[0] - 0.05), "{recalls:?}");
    }
    let (latest, among) = (store.latest().await.unwrap(), ["m".to_owned(), "n".to_owned()]);
    let unknown = latest.nearest_keys(Array2::ones((1, 97)).view(), 1, Some(&among)).await;
    refused(unknown, ErrorKind::NotFound, &["no model named 'n'", "gone, m"]);
}

#[test]
fn layers_that_share_directions_are_shown() {
    let place = Place::new();
    std::fs::write(place.path("svd.toml"), SVD).unwrap();
    place.import("one", Some(KEYS));
    place.import("svd", Some(place.path("svd.toml").to_str().unwrap()));
    place.import("f32", None);
    let same = place.json(&["shared", "one", "one", "--keys", "8", "--count", "6"]);
    assert_eq!(same.as_array().unwrap().len(), 6);
    for pair in same.as_array().unwrap() {
        assert_eq!((&pair["layer"], pair["shared"].as_u64()), (&pair["other"], Some(8)));
        assert!(pair["mean_cosine"].as_f64().unwrap() > 0.9999);
    }
    let other = place.json(&["shared", "one", "svd", "--keys", "8"]);
    // Four layers of width 48 and two of width 96, each beside each of its width.
    assert_eq!(other.as_array().unwrap().len(), 20);
    assert!(other[0]["mean_cosine"].as_f64().unwrap() < 0.9999);
    place.fails(1, &["no keys", "key_value"], &["shared", "one", "f32"]);
    place.fails(1, &["--least", "2"], &["shared", "one", "svd", "--least", "2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_is_a_store_of_its_own() {
    let place = Place::new();
    place.import("backends", Some(BACKENDS));
    place.import("keys", Some(KEYS));
    let store = Store::open(&place.store()).await.unwrap();
    let latest = store.latest().await.unwrap();
    for (model, name) in [("backends", "blocks.0.up"), ("backends", "blocks.1.down"), ("keys", "blocks.0.mix")] {
        let handle = latest.layer(model, name).await.unwrap();
        let layer = handle.load().await.unwrap();
        let to = place.path(&format!("{model}-{name}")).display().to_string();
        save_backend(&*layer, &to).await.unwrap();
        let back = load_backend(&to).await.unwrap();
        assert_eq!((back.to_parts(), back.config()), (layer.to_parts(), layer.config()));
        let x = inputs(name, layer.in_features());
        let y = |layer: &SharedLayer| layer.forward(x.view(), Accuracy::Approximate).unwrap().y;
        assert_eq!(y(&back), y(&layer));
        // Again at the same place, with other settings: a new version of the same layer.
        let fewer = key_value(layer);
        let mut settings = fewer.settings().clone();
        settings.expected_keys_per_query = Some(2.0);
        save_backend(&fewer.with_search(settings).unwrap(), &to).await.unwrap();
        assert_eq!(load_backend(&to).await.unwrap().config()["expected_keys_per_query"], 2.0);
        // Another process opens it.
        let copied = Place::new();
        let target = copied.store();
        place.json(&["copy", model, name, &target]);
        assert_eq!(copied.json(&["show", model, name])["artifact"], handle.record().artifact.to_string());
        assert_eq!(y(&load_backend(&target).await.unwrap()), y(&handle.load().await.unwrap()));
        // A store of one layer takes no other, unless it is asked to.
        let other = latest.layer("keys", "blocks.1.mix").await.unwrap();
        refused(other.copy_to(&target).await, ErrorKind::InvalidInput, &["layers in", name]);
        place.json(&["copy", "keys", "blocks.1.mix", &target]);
        refused(load_backend(&target).await, ErrorKind::InvalidInput, &["layers in", "found 2"]);
    }
    refused(load_backend(&place.store()).await, ErrorKind::InvalidInput, &["layers in", "expected one"]);
}
