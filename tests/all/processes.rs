//! Several processes on one store, and processes that die.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::Path;
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use layerstore::layer::Accuracy;
use layerstore::{ImportOptions, Store, formats, import};
use ndarray::Array2;
use safetensors::tensor::{Dtype, TensorView};

use crate::support::{CHECKPOINT, INPUTS, INT4, KEYS, Place, wait_until};

/// Files under a folder, some of which may come and go meanwhile.
fn count_files(folder: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let count = |path: &Path| if path.is_dir() { count_files(path) } else { 1 };
    entries.flatten().map(|entry| count(&entry.path())).sum()
}

/// Whether an import holds the store's lock.
fn is_importing(store: &Path) -> bool {
    File::open(store.join("layerstore.lock")).is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)))
}

fn is_running(child: &mut Child) -> bool {
    child.try_wait().unwrap().is_none()
}

/// When a running import is ended.
#[derive(Clone, Copy)]
enum Moment {
    /// As soon as there is a process.
    Start,
    /// When it has begun to look at the store.
    Import,
    /// When it has written so many files.
    Files(usize),
}

impl Moment {
    /// Waits for it, or for the end of the process.
    fn wait(self, child: &mut Child, store: &Path, files_before: usize) {
        wait_until("an import to get so far", || {
            let there = match self {
                Moment::Start => true,
                Moment::Import => is_importing(store),
                Moment::Files(count) => count_files(store) >= files_before + count,
            };
            there || !is_running(child)
        });
    }
}

/// An import that is killed at any moment leaves the store as it was, and can be run again.
#[test]
fn killed_imports_leave_nothing_half_done() {
    let place = Place::new();
    let store = place.path("layers");
    place.import("before", None);
    let moments = [Moment::Start, Moment::Import].into_iter().chain((1..24).step_by(2).map(Moment::Files));
    let (mut killed, mut killed_writing) = (0, 0);
    for (step, moment) in moments.enumerate() {
        // Other settings each time, so that there is work to do.
        let (rules, from, to) = match step % 2 {
            0 => (INT4, "rank = 8", format!("rank = {}", step + 1)),
            _ => (KEYS, "expected_keys_per_query = 12", format!("energy_keep = {}", 0.99 - 0.02 * step as f64)),
        };
        let text = std::fs::read_to_string(rules).unwrap();
        assert!(text.contains(from));
        let path = place.path("rules.toml");
        std::fs::write(&path, text.replace(from, &to)).unwrap();
        let path = path.display().to_string();
        let files = count_files(&store);
        let mut child =
            place.spawn(&["--quiet", "import", CHECKPOINT, "--model", "m", "--rules", &path, "--calibration", INPUTS]);
        moment.wait(&mut child, &store, files);
        let running = is_running(&mut child);
        child.kill().unwrap();
        child.wait().unwrap();
        killed += usize::from(running);
        killed_writing += usize::from(running && matches!(moment, Moment::Files(_)));
        let models = place.json(&["models"]);
        for model in models.as_array().unwrap() {
            assert_eq!(model["layers"], 10, "{models}");
            let methods = model["methods"].as_object().unwrap();
            assert!(methods.len() == if model["model"] == "m" { 2 } else { 1 }, "{models}");
        }
        assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]));
    }
    assert!(killed >= 4 && killed_writing >= 2, "{killed}, of which {killed_writing} while it wrote");
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
    // Readers beside them, from when there is a store on: whatever has been committed is whole.
    wait_until("a store", || place.run(&["models"]).code == 0);
    for _ in 0..5 {
        let models = place.json(&["models"]);
        for model in models.as_array().unwrap() {
            assert_eq!(model["layers"], 10, "{models}");
        }
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
    let store = place.path("layers");
    let mut interrupted = 0;
    for moment in [Moment::Start, Moment::Import, Moment::Import, Moment::Import] {
        let files = count_files(&store);
        let mut child = place.spawn(&["import", &checkpoint, "--model", "m", "--rules", &rules]);
        moment.wait(&mut child, &store, files);
        let running = is_running(&mut child);
        assert!(std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
        let done = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        // Before the first layer there is nobody to ask, and the signal ends the process.
        let asked = done.status.code() == Some(1) && said.contains("cancelled");
        assert!(running, "the import was over before it could be interrupted: {said}");
        assert!(asked || done.status.code().is_none(), "{:?} {said}", done.status);
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
        import(store, checkpoint, model, options).await.unwrap()
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
            let narrower =
                text.replace("rank = 8", "rank = 5").replace("expected_keys_per_query = 12", "energy_keep = 0.9");
            assert_ne!(narrower, text);
            std::fs::write(&narrow, narrower).unwrap();
            let report = bring(&store, "passing", narrow.to_str().unwrap()).await;
            // The last of a round is what gc leaves.
            assert!(rules == KEYS || report.written_bytes > 0);
        }
        let collected = store.gc(Duration::ZERO, true).await.unwrap();
        assert!(collected.artifacts > 0, "{collected:?}");
    }
    stop.store(true, Ordering::SeqCst);
    for reader in readers {
        assert!(reader.await.unwrap() > 0);
    }
    assert_eq!(store.verify(|_, _| ()).await.unwrap().corrupt, []);
}
