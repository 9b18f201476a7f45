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

/// A checkpoint of square layers, f32.
fn square(place: &Place, layers: usize, width: usize) -> String {
    let weight = |layer: usize| {
        let numbers = (0..width * width).map(|i| ((i * 7919 + layer * 613) % 1009) as f32 / 500.0 - 1.0);
        numbers.flat_map(f32::to_le_bytes).collect::<Vec<u8>>()
    };
    let weights: Vec<Vec<u8>> = (0..layers).map(weight).collect();
    let views = weights
        .iter()
        .enumerate()
        .map(|(i, w)| (format!("layers.{i:02}.weight"), TensorView::new(Dtype::F32, vec![width, width], w).unwrap()));
    let path = place.path("square.safetensors");
    safetensors::serialize_to_file(views.collect::<Vec<_>>(), None, &path).unwrap();
    path.display().to_string()
}

#[cfg(unix)]
fn signal(child: &Child, name: &str) {
    assert!(std::process::Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

/// Who waits for a lock says so, and stops at Ctrl-C; an import leaves the store as it was.
#[cfg(unix)]
#[test]
fn waiting_is_told_and_ends_at_ctrl_c() {
    let place = Place::new();
    place.import("before", None);
    let import = ["import", CHECKPOINT, "--model", "m"];
    for (lock, args) in [
        ("layerstore.lock", &import[..]),
        ("layerstore.commit.lock", &import[..]),
        ("layerstore.commit.lock", &["snapshot", "create", "s"]),
        ("layerstore.commit.lock", &["restore", "1"]),
    ] {
        let held = File::options().read(true).write(true).open(place.path("layers").join(lock)).unwrap();
        held.lock().unwrap();
        let mut child = place.spawn(args);
        let mut said = std::io::BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("waiting for") {
            line.clear();
            assert!(std::io::BufRead::read_line(&mut said, &mut line).unwrap() > 0, "{args:?} ended without a word");
        }
        assert!(line.contains(lock), "{line}");
        signal(&child, "-INT");
        let ended = child.wait().unwrap();
        assert!(!ended.success(), "{args:?}");
        assert_eq!(ended.code() == Some(1), args[0] == "import", "{args:?}: {ended:?}");
        drop(held);
        assert_eq!(place.json(&["models"]).as_array().unwrap().len(), 1);
        assert_eq!(place.json(&["snapshot", "list"]), serde_json::json!([]));
    }
}

/// A signal that ends an export, or whatever else writes files, leaves none that is not whole.
#[cfg(unix)]
#[test]
fn signals_leave_no_temporary_files() {
    let place = Place::new();
    let checkpoint = square(&place, 12, 1024);
    place.json(&["import", &checkpoint, "--model", "m"]);
    for name in ["-TERM", "-HUP", "-INT"] {
        let out = place.path("out");
        std::fs::create_dir(&out).unwrap();
        let output = out.join("m.safetensors");
        let mut child = place.spawn(&["export", "m", "--output", output.to_str().unwrap()]);
        wait_until("a file", || !is_running(&mut child) || std::fs::read_dir(&out).unwrap().count() > 0);
        signal(&child, name);
        child.wait().unwrap();
        let left: Vec<_> = std::fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(left.is_empty() || left == ["m.safetensors"], "{name}: {left:?}");
        std::fs::remove_dir_all(&out).unwrap();
    }
}

/// A checkpoint that is cut while it is imported is an error, which names it, and the store is as it was.
#[test]
fn a_checkpoint_that_is_cut_meanwhile_is_an_error() {
    let place = Place::new();
    let path = square(&place, 12, 256);
    let checkpoint = formats::open(&path).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(1_000_000).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let store = runtime.block_on(Store::create(&place.store())).unwrap();
    let error = runtime.block_on(import(&store, checkpoint, "m", ImportOptions::default())).unwrap_err();
    assert!(error.to_string().contains("square.safetensors") && error.to_string().contains("1000000 bytes"), "{error}");
    assert_eq!(place.json(&["models"]), serde_json::json!([]));
}

/// Layers of one model, and blocks of it, that are made at the same time all land, and so do indices.
#[tokio::test(flavor = "multi_thread")]
async fn changes_of_one_model_at_once_all_land() {
    let place = Place::new();
    place.import("m", Some(KEYS));
    let layer = Store::open(&place.store()).await.unwrap().latest().await.unwrap();
    let layer = layer.layer("m", "blocks.0.up").await.unwrap().load().await.unwrap();
    for uri in [place.store(), "memory://changes_at_once".into()] {
        let base = Store::create(&uri).await.unwrap();
        let names: Vec<String> = (0..6).map(|i| format!("saved.{i}")).collect();
        let saves = names.iter().map(|name| {
            let (uri, name, layer) = (uri.clone(), name.clone(), layer.clone());
            tokio::spawn(async move {
                let store = Store::open(&uri).await.unwrap();
                let layers = [(format!("{name}.a"), layer.clone()), (format!("{name}.b"), layer)];
                store.save_layers("m", &name, &layers, None).await.unwrap()
            })
        });
        let mut versions = vec![];
        for save in saves.collect::<Vec<_>>() {
            versions.push(save.await.unwrap());
        }
        versions.sort_unstable();
        versions.dedup();
        assert_eq!(versions.len(), names.len());
        let there: Vec<String> =
            base.latest().await.unwrap().layers("m").await.unwrap().into_iter().map(|r| r.layer).collect();
        for name in &names {
            assert!(there.contains(&format!("{name}.a")) && there.contains(&format!("{name}.b")), "{there:?}");
        }
        // A part that is saved again with less has only that; its neighbours stay.
        let one = [("saved.0.a".to_owned(), layer.clone())];
        base.save_layers("m", "saved.0", &one, None).await.unwrap();
        let now: Vec<String> =
            base.latest().await.unwrap().layers("m").await.unwrap().into_iter().map(|r| r.layer).collect();
        let expected: Vec<String> = there.into_iter().filter(|name| name != "saved.0.b").collect();
        assert_eq!(now, expected);
    }
    let inputs = place.path("x.npy").display().to_string();
    let x = Array2::from_shape_fn((256, 8), |(i, j)| ((i * 31 + j * 7) as f32).sin());
    formats::write_array(&inputs, x.view(), false).unwrap();
    let settings = place.path("settings.toml");
    std::fs::write(&settings, "n_head = 1\nn_code = 16\ncausal = false\n").unwrap();
    let train = |block: &str, epochs: &str| {
        let settings = settings.to_str().unwrap();
        place.spawn(&[
            "codebooks",
            "train",
            "m",
            block,
            "--queries",
            &inputs,
            "--settings",
            settings,
            "--epochs",
            epochs,
        ])
    };
    let index = || place.spawn(&["index"]);
    for child in [train("left", "5"), train("right", "40"), index(), index(), index()] {
        let done = child.wait_with_output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
    for block in ["left", "right", "blocks.0.up", "saved.5.b"] {
        place.json(&["show", "m", block]);
    }
    assert!(Store::open(&place.store()).await.unwrap().verify(|_, _| ()).await.unwrap().is_sound());
}

/// Few file handles are enough, however many files a store has.
#[cfg(unix)]
#[test]
fn few_file_handles_are_enough() {
    let place = Place::new();
    for i in 0..24 {
        let array = Array2::from_shape_fn((8 + i, 16), |(r, c)| ((r * 16 + c) as f32).sin());
        let path = place.path("m.safetensors").display().to_string();
        formats::write_array(&format!("{path}:l.weight"), array.view(), false).unwrap();
        std::fs::write(place.path("rules.toml"), "[[rule]]\nlayers = '.*'\nmethod = 'key_value'\n").unwrap();
        let rules = place.path("rules.toml").display().to_string();
        place.json(&["import", &path, "--model", &format!("m{i}"), "--rules", &rules]);
    }
    for command in ["verify", "gc", "models"] {
        let program = env!("CARGO_BIN_EXE_layerstore");
        let line = format!("ulimit -n 48 && exec timeout 100 '{program}' --store '{}' {command}", place.store());
        let done = std::process::Command::new("sh").args(["-c", &line]).output().unwrap();
        assert!(done.status.success(), "{command}: {:?} {}", done.status, String::from_utf8_lossy(&done.stderr));
    }
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
