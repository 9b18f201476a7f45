//! Damaged stores: what finds the damage, what says what helps, and what mends it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use layerstore::formats::write_array;
use layerstore::layer::Layer;
use layerstore::{
    ErrorKind, ImportOptions, Remedy, RepairOptions, RepairSource, Store, StoreOptions, VerifyDepth, formats, import,
    repair,
};
use ndarray::Array2;
use serde_json::{Value, json};

use crate::numbered;
use crate::support::{CHECKPOINT, INPUTS, INT4, KEYS, Place, Ran, files, refused};

/// Rules whose layers follow from the checkpoint alone.
const PLAIN: &str = "[[rule]]\nlayers = 'blocks\\.\\d+\\.up'\nmethod = 'low_rank'\nrank = 4\nfactors = 'f32'\nactivations = 'int8'\n\
                     weight = { type = 'int4', group = 16 }\n\
                     [[rule]]\nlayers = 'blocks\\.\\d+\\.down'\nmethod = 'ternary'\nrank = 2\n\
                     [[rule]]\nlayers = 'blocks\\.\\d+\\.mix'\nmethod = 'key_value'\nexpected_keys_per_query = 5\nvalues = 'int8'\n";

/// The data files of a table, the largest first.
fn data_files(place: &Place, table: &str) -> Vec<PathBuf> {
    let mut all = files(&place.path(&format!("layers/{table}.lance/data")));
    all.retain(|path| path.extension().is_some_and(|e| e == "lance"));
    all.sort_by_key(|path| std::cmp::Reverse(std::fs::metadata(path).unwrap().len()));
    all
}

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 0x40;
    std::fs::write(path, bytes).unwrap();
}

/// Flips a byte of a file, counted from its end.
fn flip_end(path: &Path, from_end: usize) {
    flip(path, std::fs::metadata(path).unwrap().len() as usize - from_end);
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

fn document(ran: &Ran) -> Value {
    serde_json::from_str(&ran.out).unwrap_or_else(|e| panic!("no JSON ({e}): {} {}", ran.out, ran.err))
}

/// What `verify` finds, which has to be something.
fn found(place: &Place, more: &[&str]) -> Value {
    let ran = place.run(&[&["--format", "json", "--quiet", "verify"], more].concat());
    assert_eq!(ran.code, 1, "{} {}", ran.out, ran.err);
    document(&ran)
}

fn sound(place: &Place) {
    for depth in [&["verify"][..], &["verify", "--quick"], &["verify", "--deep"]] {
        let report = place.json(depth);
        assert_eq!((&report["corrupt"], report.get("damaged")), (&json!([]), None), "{depth:?}");
    }
}

/// What every model gives, as it is exported, at the latest version and at a snapshot.
fn exported(place: &Place, at: &[&str]) -> Vec<Vec<u8>> {
    let mut all = vec![];
    for version in at {
        let at: Vec<&str> = if version.is_empty() { vec![] } else { vec!["--at", version] };
        for model in place.json(&[&at[..], &["models"]].concat()).as_array().unwrap() {
            let path = place.path("out.safetensors");
            let model = model["model"].as_str().unwrap();
            place.json(&[&at[..], &["export", model, "--output", path.to_str().unwrap()]].concat());
            all.push(std::fs::read(path).unwrap());
        }
    }
    all
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() { copy(&path, &to) } else { std::fs::copy(&path, &to).map(|_| ()).unwrap() }
    }
}

/// A byte of a data file's end: the number of its buffers, and the offsets of its tables. Lance would ask for up to 34 GB.
#[test]
fn flipped_ends_of_data_files_are_named() {
    let place = Place::new();
    place.import("m", Some(INT4));
    let input = place.path("x.npy").display().to_string();
    write_array(&input, Array2::ones((1, 48)).view(), false).unwrap();
    let forward = ["forward", "m", "blocks.0.up", "--input", &input];
    for from_end in [13, 9, 17, 25, 33] {
        for (table, commands) in [
            ("layers", vec![&["models"][..], &["layers", "m"], &["gc"], &["import", CHECKPOINT, "--model", "n"]]),
            ("artifacts", vec![&["gc"], &["import", CHECKPOINT, "--model", "n"]]),
            ("weight_blocks", vec![&["gc"], &forward]),
        ] {
            let file = data_files(&place, table).remove(0);
            let good = std::fs::read(&file).unwrap();
            flip_end(&file, from_end);
            for args in commands {
                place.fails(1, &[&name(&file), "contradicts itself"], args);
            }
            if table != "weight_blocks" {
                let report = found(&place, &[]).to_string();
                assert!(report.contains(&name(&file)) && report.contains("contradicts itself"), "{report}");
            }
            if table == "weight_blocks" {
                let report = found(&place, &[]);
                assert_eq!(report["damaged"][0]["table"], "weight_blocks");
                assert!(report["damaged"][0]["file"].as_str().unwrap().ends_with(&name(&file)), "{report}");
                assert!(report["corrupt"].as_array().unwrap().iter().all(|c| c["help"] == json!(["repair_from"])));
            }
            std::fs::write(&file, &good).unwrap();
        }
    }
    sound(&place);
}

/// A kind of damage of a data file, and what does it.
type FileDamage = (&'static str, fn(&Path));

/// The kinds of damage of a data file.
fn damages() -> [FileDamage; 5] {
    [
        ("a flipped byte of a row", |file| flip(file, std::fs::metadata(file).unwrap().len() as usize / 3)),
        ("a flipped byte of the end", |file| flip_end(file, 13)),
        ("a flipped byte of the magic number", |file| flip_end(file, 1)),
        ("a cut file", |file| {
            let bytes = std::fs::read(file).unwrap();
            std::fs::write(file, &bytes[..bytes.len() / 2]).unwrap();
        }),
        ("a file that is gone", |file| std::fs::remove_file(file).unwrap()),
    ]
}

/// An import hashes what it reuses, and makes what is damaged again: also for snapshots, and beside models that share files.
#[test]
fn imports_mend_what_they_reuse() {
    for (what, damage) in damages() {
        let place = Place::new();
        place.import("a", Some(INT4));
        place.import("b", Some(KEYS));
        place.json(&["snapshot", "create", "s"]);
        let good = exported(&place, &["", "s"]);
        for (table, model, rules) in [("weight_blocks", "a", Some(INT4)), ("values_d96", "b", Some(KEYS))] {
            damage(&data_files(&place, table)[0]);
            let report = found(&place, &[]);
            let corrupt = report["corrupt"].as_array().unwrap();
            assert!(!corrupt.is_empty(), "{what}: {report}");
            let report = place.import(model, rules);
            let made = report["layers"].as_array().unwrap().iter().filter(|l| l["reused"] == false);
            assert!(made.clone().count() > 0, "{what}: {report}");
            for layer in made {
                assert!(layer["notes"].to_string().contains("damaged"), "{what}: {layer}");
            }
            assert_eq!(report["version"], 3, "{what}: no version is made");
        }
        sound(&place);
        assert!(exported(&place, &["", "s"]) == good, "{what}");
        assert_eq!(place.json(&["gc", "--older-than", "0s"])["artifacts"], 0, "{what}");
        place.json(&["gc", "--older-than", "0s", "--apply"]);
        sound(&place);
        assert!(exported(&place, &["", "s"]) == good, "{what}");
        let again = place.import("a", Some(INT4));
        assert!(again["layers"].as_array().unwrap().iter().all(|l| l["reused"] == true), "{what}: {again}");
    }
}

/// A copy hashes what the other store has of it, and writes what is damaged there again.
#[test]
fn copies_mend_what_is_there() {
    for (what, damage) in damages() {
        let (place, to) = (Place::new(), Place::new());
        place.import("m", None);
        let copy = ["copy", "m", &to.store()];
        place.json(&copy);
        let good = exported(&to, &[""]);
        damage(&data_files(&to, "weight_blocks")[0]);
        found(&to, &[]);
        let report = place.json(&copy);
        assert_ne!(report["written_bytes"], 0, "{what}: {report}");
        sound(&to);
        assert!(exported(&to, &[""]) == good, "{what}");
        assert_eq!(place.json(&copy)["written_bytes"], 0, "{what}");
    }
}

/// From the checkpoint, with the settings that the catalogue has, or from a store that has what was lost.
#[test]
fn repairs_take_from_checkpoints_and_stores() {
    for (what, damage) in damages() {
        let place = Place::new();
        let rules = place.path("rules.toml");
        std::fs::write(&rules, PLAIN).unwrap();
        let import = ["import", CHECKPOINT, "--model", "m", "--rules", rules.to_str().unwrap()];
        place.json(&import);
        place.json(&["snapshot", "create", "s"]);
        place.import("other", None);
        let good = exported(&place, &["", "s"]);
        let whole = place.path("whole");
        copy(&place.path("layers"), &whole);
        for table in ["weight_blocks", "tensors", "factors_d48", "keys_d48"] {
            for source in [CHECKPOINT, whole.to_str().unwrap()] {
                data_files(&place, table).iter().for_each(|file| damage(file));
                let corrupt = found(&place, &[])["corrupt"].as_array().unwrap().len();
                // Nothing but what the store has itself.
                let left = place.run(&["--format", "json", "repair"]);
                assert_eq!(left.code, 1, "{what} {table}: {} {}", left.out, left.err);
                assert_eq!(document(&left)["corrupt"].as_array().unwrap().len(), corrupt, "{what} {table}");
                let report = place.json(&["repair", "--from", source]);
                assert_eq!(report["mended"].as_array().unwrap().len(), corrupt, "{what} {table}: {report}");
                assert_eq!(
                    (&report["corrupt"], &report["damaged"], &report["tried"]),
                    (&json!([]), &json!([]), &json!([]))
                );
                assert!(report["mended"][0]["from"].as_str().unwrap().ends_with(source), "{report}");
                sound(&place);
                assert!(exported(&place, &["", "s"]) == good, "{what} {table} {source}");
            }
        }
        place.json(&["gc", "--older-than", "0s", "--apply"]);
        sound(&place);
        assert!(exported(&place, &["", "s"]) == good, "{what}");
        let again = place.json(&import);
        assert!(again["layers"].as_array().unwrap().iter().all(|l| l["reused"] == true), "{again}");
    }
}

/// What was calibrated is made again with its calibration; another checkpoint is refused.
#[test]
fn repairs_say_what_they_need() {
    let place = Place::new();
    place.import("m", Some(INT4));
    let file = data_files(&place, "code_blocks").remove(0);
    flip(&file, std::fs::metadata(&file).unwrap().len() as usize / 3);
    let refused = place.run(&["--format", "json", "repair", "--from", CHECKPOINT]);
    assert_eq!(refused.code, 1);
    let report = document(&refused);
    assert!(report["tried"][0]["reason"].as_str().unwrap().contains("calibration"), "{report}");
    assert_eq!(report["corrupt"][0]["help"], json!(["repair_from"]));
    let table = place.run(&["repair", "--from", CHECKPOINT]);
    assert!(
        table.code == 1 && table.out.contains("still damaged") && table.out.contains("calibration"),
        "{}",
        table.out
    );
    // Another checkpoint of the same names.
    let other = place.path("other.safetensors").display().to_string();
    for layer in ["up", "down", "mix"] {
        for block in 0..2 {
            write_array(&format!("{other}:blocks.{block}.{layer}.weight"), Array2::ones((48, 48)).view(), false)
                .unwrap();
        }
    }
    let refused = document(&place.run(&["--format", "json", "repair", "--from", &other, "--calibration", INPUTS]));
    assert!(refused["tried"][0]["reason"].as_str().unwrap().contains("content of tensor"), "{refused}");
    let report = place.json(&["repair", "--from", &other, "--from", CHECKPOINT, "--calibration", INPUTS]);
    assert_eq!(report["corrupt"], json!([]), "{report}");
    sound(&place);
    place.fails(2, &["--from"], &["repair", "--calibration", INPUTS]);
    place.fails(2, &["--at"], &["repair", "--at", "1"]);
    assert!(place.run(&["repair"]).out.contains("nothing is damaged any more"));
}

/// Whatever happens to the list of artifacts, the catalogue and the data tables say what it has to say.
#[test]
fn repairs_make_the_list_again() {
    type Damage = (&'static str, fn(&Place));
    let damages: [Damage; 5] = [
        ("a damaged manifest", |place| {
            let manifest = files(&place.path("layers/artifacts.lance/_versions")).remove(0);
            std::fs::write(manifest, b"nothing of use").unwrap();
        }),
        ("damaged manifests of all tables but the catalogue", |place| {
            for table in ["artifacts", "weight_blocks", "tensors", "keys_d48"] {
                let manifests = files(&place.path(&format!("layers/{table}.lance/_versions")));
                manifests.iter().filter(|f| f.extension().is_some_and(|e| e == "manifest")).for_each(|manifest| {
                    std::fs::write(manifest, b"").unwrap();
                });
            }
        }),
        ("a flipped end", |place| flip_end(&data_files(place, "artifacts")[0], 13)),
        ("rows that are gone", |place| {
            let file = &data_files(place, "artifacts")[0];
            let mut bytes = std::fs::read(file).unwrap();
            let half = bytes.len() / 2;
            bytes[..half].fill(0xa5);
            std::fs::write(file, bytes).unwrap();
        }),
        ("a list that is gone", |place| std::fs::remove_dir_all(place.path("layers/artifacts.lance")).unwrap()),
    ];
    for (what, damage) in damages {
        let place = Place::new();
        place.import("a", Some(INT4));
        place.json(&["snapshot", "create", "s"]);
        place.import("b", Some(KEYS));
        let good = exported(&place, &["", "s"]);
        damage(&place);
        assert_eq!(place.run(&["verify"]).code, 1, "{what}");
        let report = place.json(&["repair"]);
        let healed = ["listed", "written"].map(|what| report[what].as_array().unwrap().len());
        assert!(healed.iter().sum::<usize>() > 0, "{what}: {report}");
        assert!(report["set_aside"].as_array().unwrap().iter().all(|f| Path::new(f.as_str().unwrap()).exists()));
        sound(&place);
        assert!(exported(&place, &["", "s"]) == good, "{what}");
        place.json(&["gc", "--older-than", "0s", "--apply"]);
        place.import("c", None);
        sound(&place);
        assert!(exported(&place, &["s"]) == good[good.len() - 1..], "{what}");
    }
}

/// A quick look counts, and reads no artifact; each thing says what helps.
#[test]
fn findings_say_what_helps() {
    let place = Place::new();
    place.import("a", Some(INT4));
    place.import("b", None);
    place.json(&["snapshot", "create", "s"]);
    let file = data_files(&place, "weight_blocks").remove(0);
    flip(&file, std::fs::metadata(&file).unwrap().len() as usize / 3);
    assert_eq!(place.json(&["verify", "--quick"])["corrupt"], json!([]));
    assert_eq!(found(&place, &[])["corrupt"][0]["help"], json!(["repair_from"]));
    let shown = place.run(&["verify"]);
    assert!(shown.out.contains("what helps") && shown.out.contains("layerstore repair --from"), "{}", shown.out);
    flip(&file, std::fs::metadata(&file).unwrap().len() as usize / 3);
    // Listed nowhere, and there.
    let manifest = files(&place.path("layers/artifacts.lance/_versions")).remove(0);
    let kept = std::fs::read(&manifest).unwrap();
    std::fs::remove_file(&manifest).unwrap();
    assert_eq!(found(&place, &[])["corrupt"][0]["help"], json!(["repair"]));
    assert_eq!(found(&place, &["--quick"])["corrupt"][0]["help"], json!(["repair", "repair_from"]));
    std::fs::write(&manifest, kept).unwrap();
    let tag = place.path("layers/layers.lance/_refs/tags/s.json");
    let kept = std::fs::read(&tag).unwrap();
    std::fs::write(&tag, "{").unwrap();
    assert_eq!(found(&place, &["--quick"])["damaged"][0]["help"], json!(["delete_snapshot", "restore_file"]));
    std::fs::write(&tag, kept).unwrap();
    sound(&place);
    place.fails(2, &["--deep"], &["verify", "--quick", "--deep"]);
}

/// Loads that are verified refuse what others take.
#[tokio::test]
async fn loads_can_be_verified() {
    let place = Place::new();
    place.import("m", Some(KEYS));
    let input = place.path("x.npy").display().to_string();
    write_array(&input, Array2::ones((1, 48)).view(), false).unwrap();
    let out = place.path("out.safetensors").display().to_string();
    let forward = ["forward", "m", "blocks.0.up", "--input", &input];
    let commands = [&forward[..], &["show", "m", "blocks.0.up"], &["export", "m", "--output", &out]];
    for args in commands {
        place.json(&[args, &["--verify"]].concat());
    }
    let file = data_files(&place, "values_d96").remove(0);
    let good = std::fs::read(&file).unwrap();
    // The last bits of numbers in the middle, which are those of both layers.
    let middle = good.len() / 5..good.len() * 4 / 5;
    let bad: Vec<u8> =
        good.iter().enumerate().map(|(at, b)| if middle.contains(&at) && at % 4 == 0 { b ^ 1 } else { *b }).collect();
    std::fs::write(&file, bad).unwrap();
    for args in commands {
        place.json(args);
        place.fails(1, &["corrupt", "hashes to"], &[args, &["--verify"]].concat());
    }
    let options = StoreOptions { verify_loads: true, ..StoreOptions::default() };
    let store = Store::open_with(&place.store(), options).await.unwrap();
    let layer = store.latest().await.unwrap().layer("m", "blocks.0.up").await.unwrap();
    refused(layer.load().await, ErrorKind::Corrupt, &["hashes to"]);
    let plain = Store::open(&place.store()).await.unwrap();
    let taken = plain.latest().await.unwrap().layer("m", "blocks.0.up").await.unwrap();
    let before = taken.load().await.unwrap().weight().unwrap();
    // A mended artifact is mended for whoever has the store open, too.
    let options = ImportOptions::from_files(Some(KEYS.as_ref()), Some(INPUTS.as_ref())).unwrap();
    import(&plain, formats::open(CHECKPOINT).unwrap(), "m", options).await.unwrap();
    let after = taken.load().await.unwrap().weight().unwrap();
    assert_eq!(layer.load().await.unwrap().weight().unwrap(), after);
    assert_ne!(before, after);
    // Where the list does not say where it is, the catalogue does.
    std::fs::remove_dir_all(place.path("layers/artifacts.lance")).unwrap();
    let options = StoreOptions { verify_loads: true, ..StoreOptions::default() };
    let store = Store::open_with(&place.store(), options).await.unwrap();
    let unlisted = store.latest().await.unwrap().layer("m", "blocks.0.mix").await.unwrap();
    unlisted.load().await.unwrap();
}

/// The same in Rust, with a store in memory that lost its list, and without async.
#[tokio::test]
async fn repairs_in_rust() {
    let place = Place::new();
    place.import("m", None);
    copy(&place.path("layers"), &place.path("whole"));
    let file = data_files(&place, "weight_blocks").remove(0);
    flip_end(&file, 13);
    let store = Store::open(&place.store()).await.unwrap();
    let report = store.verify_with(VerifyDepth::Deep, |_, _| ()).await.unwrap();
    assert!(report.corrupt.iter().all(|c| c.help == [Remedy::RepairFrom]) && !report.corrupt.is_empty(), "{report:?}");
    let whole = RepairSource::open(place.path("whole").to_str().unwrap()).await.unwrap();
    assert!(matches!(whole, RepairSource::Store(_)));
    let options = RepairOptions { sources: vec![whole], ..RepairOptions::default() };
    let repaired = repair(&store, options).await.unwrap();
    assert!(repaired.is_sound(), "{repaired:?}");
    assert_eq!(repaired.mended.len(), report.corrupt.len());
    assert!(store.verify(|_, _| ()).await.unwrap().is_sound());
    let kept = PathBuf::from(&repaired.set_aside[0]);
    assert!(kept.exists() && name(&kept) == format!("{}.damaged", name(&file)), "{repaired:?}");
    store.gc(Duration::ZERO, true).await.unwrap();
    assert!(store.verify(|_, _| ()).await.unwrap().is_sound());
    assert!(matches!(RepairSource::open(CHECKPOINT).await.unwrap(), RepairSource::Checkpoint(_)));

    let memory = Store::create("memory://repairs_in_rust").await.unwrap();
    import(&memory, formats::open(CHECKPOINT).unwrap(), "m", ImportOptions::default()).await.unwrap();
    assert!(repair(&memory, RepairOptions::default()).await.unwrap().is_sound());

    let uri = place.store();
    let blocking = std::thread::spawn(move || {
        let store = layerstore::blocking::Store::open(&uri).unwrap();
        assert!(store.verify_with(VerifyDepth::Quick, |_, _| ()).unwrap().is_sound());
        layerstore::blocking::repair(&store, RepairOptions::default()).unwrap()
    });
    assert!(blocking.join().unwrap().is_sound());
}

/// The newest manifest of the catalogue, cut or emptied, stands in the way of all versions, until a repair goes back before it.
#[test]
fn repairs_go_back_before_a_damaged_version() {
    let place = Place::new();
    place.import("m", Some(INT4));
    place.json(&["snapshot", "create", "good"]);
    let before = exported(&place, &[""]);
    for kept in [0, 100] {
        place.import("n", None);
        let manifests = files(&place.path("layers/layers.lance/_versions"));
        let manifests = manifests.into_iter().filter(|path| path.extension().is_some_and(|e| e == "manifest"));
        // Numbers count down in names.
        let newest = manifests.min().unwrap();
        std::fs::File::options().write(true).open(&newest).unwrap().set_len(kept).unwrap();
        place.fails(1, &[&name(&newest), "layerstore verify"], &["models"]);
        let report = found(&place, &[]);
        let damaged = report["damaged"].as_array().unwrap();
        assert_eq!(damaged.len(), 1, "{report}");
        assert_eq!(damaged[0]["help"], json!(["restore_file", "roll_back"]), "{report}");
        assert!(damaged[0]["file"].as_str().unwrap().ends_with(&name(&newest)), "{report}");
        let repaired = place.json(&["repair"]);
        assert_eq!(repaired["set_aside"].as_array().unwrap().len(), 1, "{repaired}");
        sound(&place);
        assert_eq!(exported(&place, &["", "good"]), [before.clone(), before.clone()].concat());
    }
}

/// Rows of the catalogue or of the list that cannot be read are findings like others.
#[test]
fn unreadable_rows_are_findings() {
    let place = Place::new();
    place.import("m", Some(INT4));
    place.json(&["snapshot", "create", "good"]);
    let old = data_files(&place, "layers");
    place.import("n", None);
    let new = data_files(&place, "layers").into_iter().find(|path| !old.contains(path)).unwrap();
    let bytes = std::fs::read(&new).unwrap();
    for damaged in [vec![], bytes[..bytes.len() / 2].to_vec()] {
        std::fs::write(&new, damaged).unwrap();
        let report = found(&place, &[]);
        assert_eq!(report["damaged"][0]["table"], "layers", "{report}");
        assert_eq!(report["damaged"][0]["help"], json!(["restore_file", "restore_version"]), "{report}");
    }
    place.json(&["restore", "good"]);
    assert_eq!(place.json(&["models"]).as_array().unwrap().len(), 1);
    std::fs::write(&new, bytes).unwrap();
    sound(&place);
    std::fs::write(&data_files(&place, "artifacts")[0], []).unwrap();
    let report = found(&place, &[]);
    assert_eq!(
        (&report["damaged"][0]["table"], &report["damaged"][0]["help"]),
        (&json!("artifacts"), &json!(["repair"]))
    );
    place.json(&["repair"]);
    sound(&place);
}

/// An older store's files that are put over a store hide no version that came later, and nothing is committed behind another version
/// than the newest.
#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn older_files_hide_no_newer_version() {
    let folder = tempfile::tempdir().unwrap();
    let (path, before) = (folder.path().join("layers"), folder.path().join("before"));
    let copy = |from: &Path, to: &Path| {
        let copied = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
        assert!(copied.success());
    };
    let store = Store::create(path.to_str().unwrap()).await.unwrap();
    for number in 0..3 {
        numbered::put(&store, "m", "layer", number).await.unwrap();
    }
    store.create_snapshot("kept").await.unwrap();
    copy(&path, &before);
    for number in 3..15 {
        numbered::put(&store, "m", "layer", number).await.unwrap();
    }
    // What lies between the version that is kept and the newest is not there any more.
    store.gc(Duration::ZERO, true).await.unwrap();
    let hint = path.join("layers.lance/_versions/latest_version_hint.json");
    let mut number = 14;
    for whole in [false, true] {
        match whole {
            false => std::fs::write(&hint, "{\"version\":4}").unwrap(),
            true => copy(&before.join("."), &path),
        }
        for _ in 0..3 {
            for store in [store.clone(), Store::open(path.to_str().unwrap()).await.unwrap()] {
                let latest = store.latest().await.unwrap();
                assert_eq!(latest.version(), u64::from(number) + 2);
                let loaded = latest.layer("m", "layer").await.unwrap().load().await.unwrap();
                assert_eq!(loaded.to_parts().id(), numbered::layer(number).to_parts().id());
            }
            number += 1;
            let version = numbered::put(&store, "m", "layer", number).await.unwrap();
            assert_eq!(version, u64::from(number) + 2);
        }
    }
    assert_eq!(store.log().await.unwrap()[0].version, u64::from(number) + 2);
}
