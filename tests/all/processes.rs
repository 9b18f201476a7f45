//! Several processes on one store, and processes that die.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use layerstore::layer::Accuracy;
use layerstore::compress::{ImportOptions, import};
use layerstore::formats;
use layerstore::store::Store;
use ndarray::Array2;
use safetensors::tensor::{Dtype, TensorView};

use crate::support::{CHECKPOINT, INPUTS, INT4, KEYS, Place};

/// An import that is killed at any moment leaves the store as it was, and can be run again.
#[test]
fn killed_imports_leave_nothing_half_done() {
    let place = Place::new();
    place.import("before", None);
    let mut killed = 0;
    for step in 0..12u64 {
        let rules = if step % 2 == 0 { INT4 } else { KEYS };
        let mut child =
            place.spawn(&["--quiet", "import", CHECKPOINT, "--model", "m", "--rules", rules, "--calibration", INPUTS]);
        std::thread::sleep(Duration::from_millis(15 + 45 * step));
        let running = child.try_wait().unwrap().is_none();
        child.kill().unwrap();
        child.wait().unwrap();
        killed += usize::from(running);
        let models = place.json(&["models"]);
        for model in models.as_array().unwrap() {
            assert_eq!(model["layers"], 10, "{models}");
            let methods = model["methods"].as_object().unwrap();
            assert!(methods.len() == if model["model"] == "m" { 2 } else { 1 }, "{models}");
        }
        assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]));
    }
    assert!(killed > 0);
    place.json(&["gc", "--older-than", "0s", "--apply"]);
    assert_eq!(place.import("m", Some(INT4))["layers"].as_array().unwrap().len(), 10);
    assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]));
}

/// Imports of one model at once: each commit replaces the model as a whole. Imports of other models all land.
#[test]
fn writers_do_not_mix() {
    let place = Place::new();
    let mut children = vec![];
    for round in 0..2 {
        for rules in [INT4, KEYS] {
            children.push(place.spawn(&[
                "--quiet",
                "import",
                CHECKPOINT,
                "--model",
                "same",
                "--rules",
                rules,
                "--calibration",
                INPUTS,
            ]));
        }
        let own = format!("own-{round}");
        children.push(place.spawn(&["--quiet", "import", CHECKPOINT, "--model", &own]));
    }
    // Readers beside them, at any state the store is in.
    for _ in 0..5 {
        let _ = place.run(&["models"]);
    }
    for child in children {
        let done = child.wait_with_output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
    let models = place.json(&["models"]);
    assert_eq!(models.as_array().unwrap().len(), 3);
    for model in models.as_array().unwrap() {
        assert_eq!(model["layers"], 10, "{models}");
    }
    let methods = models[2]["methods"].as_object().unwrap();
    assert_eq!(methods.len(), 2, "one import's methods and dense: {models}");
    // What two of them wrote twice is collected, and all is still there.
    place.json(&["gc", "--older-than", "0s", "--apply"]);
    assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]));
    assert_eq!(place.json(&["gc", "--older-than", "0s"])["stray_rows"], 0);
}

/// Many first imports of one store at once: each makes the tables that it finds missing, and none undoes another's.
#[test]
fn first_imports_make_tables_together() {
    for _ in 0..3 {
        let place = Place::new();
        let names: Vec<String> = (0..6).map(|i| format!("m{i}")).collect();
        let children: Vec<_> = names
            .iter()
            .enumerate()
            .map(|(i, name)| {
                let rules = if i % 2 == 0 { INT4 } else { KEYS };
                place.spawn(&[
                    "--quiet",
                    "import",
                    CHECKPOINT,
                    "--model",
                    name,
                    "--rules",
                    rules,
                    "--calibration",
                    INPUTS,
                ])
            })
            .collect();
        for child in children {
            let done = child.wait_with_output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        }
        assert_eq!(place.json(&["models"]).as_array().unwrap().len(), names.len());
        assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]));
    }
}

/// Ctrl-C in the middle of an import: it says so, and the store is as it was.
#[cfg(unix)]
#[test]
fn an_interrupted_import_leaves_the_store_as_it_was() {
    let place = Place::new();
    place.import("before", None);
    let weights: Vec<Vec<u8>> = (0..40u32)
        .map(|layer| (0..256 * 256).flat_map(|i| ((i % (251 + layer)) as f32 - 125.0).to_le_bytes()).collect())
        .collect();
    let layers: BTreeMap<String, TensorView> = weights
        .iter()
        .enumerate()
        .map(|(i, w)| (format!("layers.{i}.weight"), TensorView::new(Dtype::F32, vec![256, 256], w).unwrap()))
        .collect();
    let checkpoint = place.path("large.safetensors");
    safetensors::serialize_to_file(layers, None, &checkpoint).unwrap();
    let rules = place.path("rules.toml");
    std::fs::write(&rules, "[[rule]]\nlayers = '.*'\nmethod = 'key_value'\n").unwrap();
    let (checkpoint, rules) = (checkpoint.display().to_string(), rules.display().to_string());
    let mut interrupted = 0;
    for delay in [50, 200, 400] {
        let mut child = place.spawn(&["import", &checkpoint, "--model", "m", "--rules", &rules]);
        std::thread::sleep(Duration::from_millis(delay));
        let running = child.try_wait().unwrap().is_none();
        assert!(std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
        let done = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        // Before the first layer there is nobody to ask, and the signal ends the process.
        let asked = done.status.code() == Some(1) && said.contains("cancelled");
        assert!(!running || asked || done.status.code().is_none(), "{:?} {said}", done.status);
        interrupted += usize::from(asked);
        let models = place.json(&["models"]);
        assert_eq!((models.as_array().unwrap().len(), &models[0]["model"]), (1, &serde_json::json!("before")));
    }
    assert!(interrupted > 0);
    assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]));
}

/// Readers of a snapshot and of the latest version are not disturbed by imports and by gc, which moves rows.
#[tokio::test(flavor = "multi_thread")]
async fn gc_beside_readers() {
    let place = Place::new();
    let bring = async |store: &Store, model: &str, rules: &str| {
        let checkpoint = formats::open(CHECKPOINT).unwrap();
        let options = ImportOptions::from_files(Some(rules.as_ref()), Some(INPUTS.as_ref())).unwrap();
        import(store, checkpoint, model, options).await.unwrap();
    };
    let store = Store::create(&place.store()).await.unwrap();
    bring(&store, "kept", KEYS).await;
    store.create_snapshot("kept").await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..3)
        .map(|_| {
            let (uri, stop) = (place.store(), stop.clone());
            tokio::spawn(async move {
                let (x, mut rounds, mut first) = (Array2::ones((2, 48)), 0, None);
                while !stop.load(Ordering::SeqCst) {
                    // Anew each time, so that nothing is in a cache.
                    let store = Store::open(&uri).await.unwrap();
                    for snapshot in [store.at("kept").await.unwrap(), store.latest().await.unwrap()] {
                        let layer = snapshot.layer("kept", "blocks.0.up").await.unwrap();
                        let y = layer.forward(x.view(), Accuracy::Full).await.unwrap().y;
                        assert_eq!(first.get_or_insert_with(|| y.clone()), &y);
                    }
                    rounds += 1;
                }
                rounds
            })
        })
        .collect();
    for _ in 0..3 {
        for rules in [INT4, KEYS] {
            // Written into the same tables, then replaced and collected.
            let narrow = place.path("rules.toml");
            let text = std::fs::read_to_string(rules).unwrap();
            let text =
                text.replace("rank = 8", "rank = 5").replace("expected_keys_per_query = 12", "energy_keep = 0.9");
            std::fs::write(&narrow, text).unwrap();
            bring(&store, "passing", narrow.to_str().unwrap()).await;
        }
        store.gc(Duration::ZERO, true).await.unwrap();
    }
    stop.store(true, Ordering::SeqCst);
    for reader in readers {
        assert!(reader.await.unwrap() > 0);
    }
    assert_eq!(store.verify(|_, _| ()).await.unwrap().corrupt, []);
}
