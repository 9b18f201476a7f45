//! Whole models: removed, renamed, compared and copied; layers shown; versions named; imports summed up.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use layerstore::formats::write_array;
use layerstore::{
    Cancel, ErrorKind, ImportOptions, ImportReport, LayerRecord, Silent, Store, blocking, copy, formats, import,
};
use ndarray::Array2;
use serde_json::{Value, json};

use crate::support::{CHECKPOINT, INPUTS, INT4, KEYS, Place, field, refused};

/// Addresses of a store on files and of one in memory.
fn addresses(place: &Place, test: &str) -> [String; 2] {
    [place.store(), format!("memory://{test}")]
}

async fn bring(store: &Store, model: &str, rules: Option<&str>) -> ImportReport {
    let options = ImportOptions::from_files(rules.map(Path::new), rules.map(|_| INPUTS.as_ref())).unwrap();
    import(store, formats::open(CHECKPOINT).unwrap(), model, options).await.unwrap()
}

async fn models(store: &Store) -> Vec<String> {
    store.latest().await.unwrap().models().await.unwrap().into_iter().map(|m| m.model).collect()
}

/// Rules for the small checkpoint, of this rank.
fn rules_of_rank(place: &Place, rank: usize) -> String {
    let path = place.path(&format!("rank-{rank}.toml"));
    let rules = std::fs::read_to_string(INT4).unwrap();
    std::fs::write(&path, rules.replace("rank = 8", &format!("rank = {rank}"))).unwrap();
    path.display().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_removed_and_renamed() {
    let place = Place::new();
    for uri in addresses(&place, "models_are_removed_and_renamed") {
        let store = Store::create(&uri).await.unwrap();
        bring(&store, "a", None).await;
        bring(&store, "b", Some(INT4)).await;
        let before = store.latest().await.unwrap().layers("b").await.unwrap();

        refused(store.rename_model("b", "a").await, ErrorKind::Conflict, &["'a' exists already", "10 layers"]);
        refused(store.rename_model("b", "b").await, ErrorKind::Conflict, &["'b' exists already"]);
        refused(store.rename_model("b", "b ").await, ErrorKind::InvalidInput, &["not a valid model name"]);
        refused(store.rename_model("c", "d").await, ErrorKind::NotFound, &["'c' in version 3", "a, b"]);
        refused(store.remove_model("c").await, ErrorKind::NotFound, &["'c' in version 3", "a, b"]);
        assert_eq!(store.latest().await.unwrap().version(), 3);

        let name = "it's \"b\"";
        assert_eq!(store.rename_model("b", name).await.unwrap(), 4);
        assert_eq!(models(&store).await, ["a", name]);
        let latest = store.latest().await.unwrap();
        let after = latest.layers(name).await.unwrap();
        latest.layer(name, "blocks.0.up").await.unwrap().load().await.unwrap();
        let under_the_old_name = |r: LayerRecord| LayerRecord { model: "b".into(), ..r };
        assert_eq!(after.into_iter().map(under_the_old_name).collect::<Vec<_>>(), before);

        assert_eq!(store.remove_model(name).await.unwrap(), 5);
        assert_eq!(models(&store).await, ["a"]);
        let log = store.log().await.unwrap();
        let operations: Vec<&str> = log.iter().map(|v| v.operation.as_str()).collect();
        let expected = ["remove it's \"b\"", "rename b to it's \"b\"", "import b", "import a", "create"];
        assert_eq!(operations, expected);

        // Older versions keep it until gc frees what nothing else uses.
        store.at("4").await.unwrap().layer(name, "blocks.0.up").await.unwrap().load().await.unwrap();
        assert_eq!(store.gc(Duration::ZERO, true).await.unwrap().artifacts, 6);
        assert!(store.at("4").await.is_err());
        assert_eq!(store.verify(|_, _| ()).await.unwrap().corrupt, []);
        // A model that was there once is made anew.
        // On an object store gc makes a version, too.
        assert!(bring(&store, "b", Some(INT4)).await.version > 5);
    }
}

/// Each change is made of the version that the one before it left.
#[tokio::test(flavor = "multi_thread")]
async fn changes_of_models_at_once_all_land() {
    let place = Place::new();
    for uri in addresses(&place, "changes_of_models_at_once_all_land") {
        let store = Store::create(&uri).await.unwrap();
        for model in ["a", "b", "c"] {
            bring(&store, model, None).await;
        }
        let other = Store::open(&uri).await.unwrap();
        let (renamed, removed, _) =
            tokio::join!(store.rename_model("a", "x"), other.remove_model("b"), bring(&store, "y", Some(KEYS)),);
        assert_ne!(renamed.unwrap(), removed.unwrap());
        assert_eq!(models(&store).await, ["c", "x", "y"]);
        assert_eq!(store.latest().await.unwrap().version(), 7);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_version_is_named() {
    let place = Place::new();
    for uri in addresses(&place, "any_version_is_named") {
        let store = Store::create(&uri).await.unwrap();
        let other = Store::open(&uri).await.unwrap();
        bring(&store, "a", None).await;
        bring(&store, "b", None).await;
        let named = store.create_snapshot_at("old", "2").await.unwrap();
        assert_eq!((named.name.as_str(), named.version), ("old", 2));
        assert_eq!(named.time, store.log().await.unwrap()[1].time);
        assert_eq!(store.create_snapshot_at("same", "old").await.unwrap().version, 2);
        assert_eq!(store.create_snapshot_at("newest", "latest").await.unwrap().version, 3);
        refused(store.create_snapshot_at("old", "3").await, ErrorKind::Conflict, &["'old'", "version 2"]);
        refused(store.create_snapshot_at("x", "99").await, ErrorKind::NotFound, &["version 99"]);
        refused(
            store.create_snapshot_at("x", "nobody").await,
            ErrorKind::NotFound,
            &["'nobody'", "snapshots: old, newest, same"],
        );
        refused(store.create_snapshot("latest").await, ErrorKind::InvalidInput, &["stands for the latest version"]);
        // The latest is that of the store, not of what the handle has seen.
        assert_eq!(other.at("latest").await.unwrap().version(), 3);
        assert_eq!(other.restore("latest").await.unwrap().version, 3);
        assert_eq!(store.at("old").await.unwrap().models().await.unwrap().len(), 1);
    }
    // A snapshot that was called so when it could be is still what it was.
    let layers = format!("{}/layers.lance", place.store());
    lance::Dataset::open(&layers).await.unwrap().tags().create("latest", 2u64).await.unwrap();
    let store = Store::open(&place.store()).await.unwrap();
    assert_eq!(store.at("latest").await.unwrap().version(), 2);
    assert_eq!(store.delete_snapshot("latest").await.unwrap().version, Some(2));
    assert_eq!(store.at("latest").await.unwrap().version(), 3);
}

#[test]
fn versions_and_models_by_command() {
    let place = Place::new();
    place.import("m", None);
    place.import("m", Some(INT4));
    place.import("m", Some(&rules_of_rank(&place, 4)));
    let created = place.json(&["snapshot", "create", "dense", "--at", "2"]);
    assert_eq!((&created["name"], &created["version"]), (&json!("dense"), &json!(2)));
    place.fails(2, &["--at", "snapshot list"], &["--at", "2", "snapshot", "list"]);
    place.fails(2, &["--at", "snapshot delete"], &["--at", "2", "snapshot", "delete", "dense"]);
    for command in [&["remove", "m"][..], &["rename", "m", "n"]] {
        place.fails(2, &["--at", "a command that reads a version"], &[&["--at", "2"], command].concat());
    }
    assert_eq!(place.json(&["--at", "latest", "show", "m", "blocks.0.up"])["config"]["rank"], 4);

    // What changed, down to the settings.
    let diff = place.json(&["diff", "3", "latest"]);
    let changed = diff["changed"].as_array().unwrap();
    assert_eq!((changed.len(), &diff["added"]), (6, &json!([])));
    for layer in changed {
        assert_eq!(layer["settings"], json!([{"setting": "rank", "from": 8, "to": 4}]));
        assert_eq!(layer["before"]["error_basis"], "activations");
    }
    assert!(place.run(&["diff", "3", "latest"]).out.contains("rank 8 → 4"));
    let methods = place.json(&["diff", "dense", "3"]);
    assert_eq!(methods["changed"][0]["settings"], json!([{"setting": "method", "from": "dense", "to": "low_rank"}]));
    let table = place.run(&["diff", "dense", "3"]).out;
    assert!(table.contains("dense → low_rank") && !table.contains("method dense"), "{table}");

    assert_eq!(place.json(&["rename", "m", "n"]), json!({"model": "m", "name": "n", "version": 5}));
    place.fails(1, &["no model named 'm'"], &["rename", "m", "n"]);
    place.import("m", None);
    place.fails(1, &["'n' exists already", "10 layers"], &["rename", "m", "n"]);
    assert_eq!(place.json(&["remove", "n"]), json!({"model": "n", "version": 7}));
    place.fails(1, &["no model named 'n'", "m"], &["remove", "n"]);
    place.json(&["restore", "5"]);
    assert!(place.run(&["rename", "n", "o"]).out.contains("'n' is named 'o', at version 9"));
    assert!(place.run(&["remove", "o"]).out.contains("'o' is removed, at version 10"));
    assert_eq!(place.json(&["models"]), json!([]));
}

#[test]
fn models_are_compared() {
    let place = Place::new();
    place.import("f32", None);
    place.import("int4", Some(INT4));
    place.import("keys", Some(KEYS));
    place.import("int4", Some(&rules_of_rank(&place, 4)));

    // Two versions of one model.
    let both = place.json(&["compare", "int4@3", "int4"]);
    assert_eq!((&both["first"]["version"], &both["second"]["version"]), (&json!(3), &json!(5)));
    assert_eq!((&both["same"], &both["only_first"], &both["only_second"]), (&json!(4), &json!([]), &json!([])));
    let layers = both["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 6);
    let error = |layer: &Value, side: &str| layer[side]["relative_error"].as_f64().unwrap();
    let difference = |layer: &Value| (error(layer, "second") - error(layer, "first")).abs();
    assert!(layers.windows(2).all(|w| difference(&w[0]) >= difference(&w[1])), "{both}");
    for layer in layers {
        assert!(error(layer, "second") > error(layer, "first"), "{layer}");
        assert_eq!(layer["settings"], json!([{"setting": "rank", "from": 8, "to": 4}]));
    }
    let stored = |model: &Value| model["stored_bytes"].as_u64().unwrap();
    assert!(stored(&both["first"]) > stored(&both["second"]));
    let table = place.run(&["compare", "int4@3", "int4"]).out;
    let rows = ["error of int4@3", "rank 8 → 4", "6 layers differ, 4 are the same; mean error of 6 over calibration:"];
    assert!(rows.iter().all(|row| table.contains(row)), "{table}");
    let first = table.lines().nth(1).unwrap();
    assert!(first.contains(layers[0]["layer"].as_str().unwrap()) && first.contains("calibration"), "{table}");

    // Two models, at one version or at several.
    let methods = place.json(&["--at", "4", "compare", "int4", "keys@latest"]);
    assert_eq!(methods["first"]["version"], 4);
    let method = json!([{"setting": "method", "from": "low_rank", "to": "key_value"}]);
    assert!(methods["layers"].as_array().unwrap().iter().all(|l| l["settings"] == method), "{methods}");
    // Exact layers are not measured over inputs: nothing is said of which is worse.
    let exact = place.run(&["compare", "f32", "int4"]).out;
    assert!(exact.contains("weights → calibration") && !exact.contains("mean error"), "{exact}");
    let same = place.run(&["compare", "f32@2", "f32"]).out;
    assert!(same.contains("0 layers differ, 10 are the same") && !same.contains("error of"), "{same}");

    // Layers of one alone are named.
    place.json(&["import", "tests/fixtures/keras/functional.keras", "--model", "keras"]);
    let other = place.json(&["compare", "f32", "keras"]);
    assert_eq!((other["layers"].as_array().unwrap().len(), &other["same"]), (0, &json!(0)));
    assert_eq!(other["only_first"].as_array().unwrap().len(), 10);
    assert_eq!(other["only_second"][0]["layer"], "model");
    let table = place.run(&["compare", "f32", "keras"]).out;
    assert!(table.contains("only in f32@6") && table.contains("only in keras@6"), "{table}");

    // A name that has an @ is a name before it is anything else.
    place.import("int4@3", None);
    assert_eq!(place.json(&["compare", "int4@3", "int4@5"])["first"]["model"], "int4@3");
    assert_eq!(place.json(&["compare", "int4@3@7", "int4@5"])["first"]["version"], 7);
    place.fails(1, &["no model named 'nobody'", "f32"], &["compare", "f32", "nobody"]);
    place.fails(1, &["no model named 'keras' in '3'"], &["compare", "f32", "keras@3"]);
    place.fails(1, &["no snapshot named 'then'"], &["compare", "f32@then", "f32"]);
    place.fails(1, &["version 99"], &["compare", "f32@99", "f32"]);
}

/// What an import says of a layer is said of it later, as far as the catalogue has it.
#[test]
fn a_layer_is_shown_as_its_import_did() {
    let place = Place::new();
    let rules = place.path("rules.toml");
    let text = "[[rule]]\nlayers = '.*\\.up'\nmethod = 'key_value'\n\
                backend = { type = 'pq', subvectors = 12, codewords = 200 }\n";
    std::fs::write(&rules, text).unwrap();
    let report = place.import("m", Some(rules.to_str().unwrap()));
    let layers = report["layers"].as_array().unwrap();
    let imported = layers.iter().find(|l| l["layer"] == "blocks.0.up").unwrap();
    let shown = place.json(&["show", "m", "blocks.0.up"]);
    assert_eq!(imported["notes"], json!(["backend codewords: 200 to 48"]));
    for same in ["notes", "bits_per_weight", "relative_error", "error_basis", "dense_bytes", "stored_bytes", "artifact"]
    {
        assert_eq!(field(&shown, same), field(imported, same), "{same}");
    }
    let table = place.run(&["show", "m", "blocks.0.up"]).out;
    assert!(table.contains("backend codewords: 200 to 48") && table.contains(" bits "), "{table}");
    let plain = place.json(&["show", "m", "blocks.0.norm"]);
    assert_eq!((plain.get("notes"), plain["bits_per_weight"].as_f64()), (None, Some(64.0)));
    place.json(&["import", "tests/fixtures/keras/functional.keras", "--model", "keras"]);
    assert_eq!(place.json(&["show", "keras", "model"])["bits_per_weight"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_copied() {
    let place = Place::new();
    for uri in addresses(&place, "models_are_copied") {
        let store = Store::create(&uri).await.unwrap();
        bring(&store, "m", Some(INT4)).await;
        bring(&store, "other", None).await;
        let to = match uri.starts_with("memory://") {
            true => format!("{uri}-to"),
            false => place.path("to").display().to_string(),
        };
        let target = Store::create(&to).await.unwrap();
        bring(&target, "m", Some(KEYS)).await;
        bring(&target, "mine", None).await;
        let latest = store.latest().await.unwrap();
        let into = async |cancel: Cancel| copy(&latest, "m", None, &target, &Silent, &cancel).await;

        // Nothing of it where somebody asks to stop.
        let cancel = Cancel::new();
        cancel.cancel();
        refused(into(cancel).await, ErrorKind::Cancelled, &[]);
        assert_eq!(target.latest().await.unwrap().version(), 3);

        let copied = into(Cancel::new()).await.unwrap();
        assert_eq!((copied.version, copied.layers.len()), (4, 10));
        assert!(copied.written_bytes > 0 && copied.written_bytes < copied.stored_bytes, "{copied:?}");
        assert_eq!(models(&target).await, ["m", "mine"]);
        let there = target.latest().await.unwrap();
        let (from, of) = (latest.layers("m").await.unwrap(), there.layers("m").await.unwrap());
        for (from, of) in from.into_iter().zip(of) {
            let handles = (latest.handle(from.clone()), there.handle(of.clone()));
            let (from_layer, of_layer) = (handles.0.load().await.unwrap(), handles.1.load().await.unwrap());
            assert_eq!(of_layer.to_parts(), from_layer.to_parts());
            assert_eq!(LayerRecord { locations: from.locations.clone(), ..of }, from);
        }
        let log = target.log().await.unwrap();
        assert_eq!(log[0].operation, "copy m");
        assert_eq!(log[0].message.as_deref(), Some(format!("copied from {}, version 3", store.uri()).as_str()));
        // Again, and imported again: all of it is known.
        let again = into(Cancel::new()).await.unwrap();
        assert_eq!((again.version, again.written_bytes), (4, 0));
        let imported = bring(&target, "m", Some(INT4)).await;
        assert_eq!((imported.version, imported.written_bytes), (4, 0));
        assert!(imported.layers.iter().all(|layer| layer.reused));
        assert_eq!(target.verify(|_, _| ()).await.unwrap().corrupt, []);

        let nothing = copy(&latest, "n", None, &target, &Silent, &Cancel::new()).await;
        refused(nothing, ErrorKind::NotFound, &["no model named 'n'"]);
        // Into the store itself: a model as an older version had it.
        store.remove_model("m").await.unwrap();
        let back = copy(&latest, "m", None, &store, &Silent, &Cancel::new()).await.unwrap();
        assert_eq!((back.version, back.written_bytes), (5, 0));
        assert_eq!(models(&store).await, ["m", "other"]);
    }
}

/// A module is copied whole, in the place of what has its name; a layer beside the others.
#[tokio::test(flavor = "multi_thread")]
async fn modules_are_copied_with_their_layers() {
    let place = Place::new();
    let store = Store::create(&place.store()).await.unwrap();
    let keras = formats::open("tests/fixtures/keras/functional.keras").unwrap();
    import(&store, keras, "net", ImportOptions::default()).await.unwrap();
    let latest = store.latest().await.unwrap();
    let module = latest.module("net", "model.block").await.unwrap();
    let target = Store::create(&place.path("to").display().to_string()).await.unwrap();
    let stray = latest.layer("net", "model.head").await.unwrap().load().await.unwrap();
    for (prefix, name) in [("model.block", "model.block.old"), ("model.head", "model.head")] {
        target.save_layers("net", prefix, &[(name.to_owned(), stray.clone())], None).await.unwrap();
    }
    let part = async |layer: &str| copy(&latest, "net", Some(layer), &target, &Silent, &Cancel::new()).await;
    let copied = part("model.block").await.unwrap();
    assert_eq!(copied.layers, module.layers().keys().cloned().collect::<Vec<_>>());
    assert!(copied.layers.len() > 6, "{copied:?}");
    let names = async || -> Vec<String> {
        target.latest().await.unwrap().layers("net").await.unwrap().into_iter().map(|r| r.layer).collect()
    };
    let expected: Vec<String> = copied.layers.iter().cloned().chain(["model.head".into()]).collect();
    assert_eq!(names().await, expected);
    target.latest().await.unwrap().module("net", "model.block").await.unwrap().load().await.unwrap();
    // A layer that is no module takes nothing else.
    assert_eq!(part("model.proj").await.unwrap().layers, ["model.proj"]);
    assert_eq!(names().await.len(), expected.len() + 1);
    refused(part("model.blok").await, ErrorKind::NotFound, &["no layer named 'model.blok'", "model.block"]);
}

#[test]
fn copies_by_command() {
    let place = Place::new();
    place.import("m", Some(INT4));
    place.import("n", None);
    let to = Place::new();
    let target = to.store();
    place.fails(1, &["no layer named 'nope'"], &["copy", "m", "nope", &target]);
    place.fails(1, &["no model named 'nope'"], &["copy", "nope", &target]);
    assert!(!to.path("layers").exists(), "nothing to copy, and a store was made");
    place.fails(2, &["MODEL [LAYER] STORE"], &["copy", "m"]);

    let copied = place.json(&["copy", "m", "blocks.0.up", &target]);
    assert_eq!(
        (&copied["model"], &copied["layer"], &copied["version"]),
        (&json!("m"), &json!("blocks.0.up"), &json!(2))
    );
    assert_eq!((&copied["layers"], &copied["store"]), (&json!(["blocks.0.up"]), &json!(target)));
    let said = place.run(&["copy", "m", "blocks.0.down", "--quiet", &target]).out;
    assert!(said.contains("layer 'blocks.0.down' of 'm' is in ") && said.contains("at version 3"), "{said}");
    assert_eq!(to.json(&["layers", "m"]).as_array().unwrap().len(), 2);
    let whole = place.json(&["copy", "n", &target]);
    assert_eq!((whole.get("layer"), whole["layers"].as_array().unwrap().len()), (None, 10));
    let said = place.run(&["copy", "m", &target]).out;
    assert!(said.contains("model 'm', 10 layers, is in ") && said.contains("at version 5"), "{said}");
    assert_eq!(to.json(&["models"]).as_array().unwrap().len(), 2);
    assert_eq!(to.json(&["verify"])["corrupt"], json!([]));
}

/// A large import is summed up; its notes come last.
#[test]
fn imports_of_many_layers_are_summed_up() {
    let place = Place::new();
    let (checkpoint, rules) = (place.path("large.safetensors").display().to_string(), place.path("rules.toml"));
    for i in 0..21 {
        let weight = Array2::from_shape_fn((4, 8), |(r, c)| ((r * 31 + c * 17 + i * 7) % 13) as f32 - 6.0);
        write_array(&format!("{checkpoint}:h.{i}.up.weight"), weight.view(), false).unwrap();
    }
    let text = "[[rule]]\nlayers = 'h\\.1?\\d\\.up'\nmethod = 'low_rank'\nrank = 1\n\
                weight = { type = 'int4', group = 'channel' }\n[[rule]]\nlayers = 'nothing'\nmethod = 'dense'\n";
    std::fs::write(&rules, text).unwrap();
    let rules = rules.display().to_string();
    let import = ["import", &checkpoint, "--model", "m", "--rules", &rules];
    let both = File::create(place.path("both.txt")).unwrap();
    let done = place.command(&import).stdout(both.try_clone().unwrap()).stderr(both).status().unwrap();
    assert!(done.success());
    let both = std::fs::read_to_string(place.path("both.txt")).unwrap();
    let at = |text: &str| both.find(text).unwrap_or_else(|| panic!("no '{text}' in {both}"));
    assert!(at("mean error") < at("worst layers"));
    assert!(at("worst layers") < at("m at version 2: 21 layers"));
    assert!(at("m at version 2: 21 layers") < at("note: the rule at"));

    let summary = place.run(&[&["--quiet"][..], &import].concat()).out;
    let lines: Vec<String> =
        summary.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert!(lines[1].starts_with("h.*.up dense 1 ") && lines[1].ends_with("0.0000 weights"), "{summary}");
    assert!(lines[2].starts_with("h.*.up low_rank 20 ") && lines[2].ends_with("weights"), "{summary}");
    // The kinds, the five worst, and what became of the model.
    assert_eq!(lines.len(), 3 + 1 + 6 + 2, "{summary}");
    let report = place.json(&import);
    let error = |layer: &Value| layer["relative_error"].as_f64().unwrap();
    let worst = report["layers"].as_array().unwrap().iter().max_by(|a, b| error(a).total_cmp(&error(b))).unwrap();
    assert!(lines[5].contains(&format!("{:.4} weights", error(worst))), "{summary}");
    assert_eq!(report["layers"].as_array().unwrap().len(), 21);

    let all = place.run(&[&["--quiet"][..], &import, &["--all"]].concat()).out;
    assert!(all.lines().count() == 24 && all.contains("h.20.up") && !all.contains("worst"), "{all}");
    let few = place.run(&["--quiet", "import", CHECKPOINT, "--model", "few"]).out;
    assert!(few.lines().count() == 13 && few.contains("blocks.0.norm"), "{few}");
}

#[test]
fn without_async() {
    let place = Place::new();
    let store = blocking::Store::create(&place.store()).unwrap();
    let checkpoint = || formats::open(CHECKPOINT).unwrap();
    let options = ImportOptions::from_files(Some(INT4.as_ref()), Some(INPUTS.as_ref())).unwrap();
    blocking::import(&store, checkpoint(), "m", ImportOptions::default()).unwrap();
    blocking::import(&store, checkpoint(), "n", options).unwrap();
    assert_eq!(store.create_snapshot_at("first", "2").unwrap().version, 2);
    let latest = store.at("latest").unwrap();
    let comparison = latest.compare("m", &latest, "n").unwrap();
    assert_eq!((comparison.layers.len(), comparison.same), (6, 4));
    assert_eq!(store.rename_model("m", "o").unwrap(), 4);
    assert_eq!(store.remove_model("o").unwrap(), 5);
    let copied = blocking::copy(&latest, "m", None, &store, &Silent, &Cancel::new()).unwrap();
    assert_eq!((copied.version, copied.layers.len()), (6, 10));
    let layer = latest.layer("n", "blocks.0.up").unwrap();
    assert_eq!(layer.record().notes(), Vec::<String>::new());
}
