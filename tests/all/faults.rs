//! Bad input, damaged bytes, a storage that refuses.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use bytes::Bytes;
use futures::stream::BoxStream;
use layerstore::testing::Hooks;
use layerstore::{ErrorKind, ImportOptions, Store, StoreOptions, formats, import};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, RenameOptions,
};

use crate::support::{CHECKPOINT, INPUTS, INT4, KEYS, Place, files, refused};

#[test]
fn bad_inputs_leave_no_store_behind() {
    let place = Place::new();
    let file = |name: &str, bytes: &[u8]| {
        std::fs::write(place.path(name), bytes).unwrap();
        place.path(name).display().to_string()
    };
    let good = std::fs::read(CHECKPOINT).unwrap();
    let bad = [
        (file("empty.safetensors", b""), "0 bytes"),
        (file("garbage.safetensors", &[0xff; 4000]), "claims"),
        (file("cut.safetensors", &good[..good.len() / 2]), "bytes of data"),
        (file("short.safetensors", b"x"), "at least 8"),
    ];
    for (checkpoint, says) in &bad {
        place.fails(1, &[checkpoint, says], &["import", checkpoint, "--model", "m"]);
    }
    place.fails(1, &["nowhere"], &["import", "nowhere", "--model", "m"]);
    let rules = |text: &str| file("rules.toml", text.as_bytes());
    for (text, says) in [
        ("[[rule]\nlayers = 'a'", "line 1"),
        ("[[rule]]\nlayers = 'a('\nmethod = 'dense'", "line 2"),
        ("[[rule]]\nlayers = '.*up'\nmethod = 'magic'", "line 3"),
        ("[[rule]]\nlayers = '.*up'\nmethod = 'key_value'\nbackend = { type = 'ann' }", "line 4"),
        (
            "[[rule]]\nlayers = '.*up'\nmethod = 'low_rank'\nrank = 49\nweight = { type = 'int4', group = 16 }",
            "at most 48",
        ),
        ("[[rule]]\nlayers = '.*up'\nmethod = 'low_rank'\nweight = { type = 'int4', group = 36 }", "divisor"),
        (
            "[[rule]]\nlayers = '.*up'\nmethod = 'low_rank'\nrank = 4\nscaling = 'exact'\nweight = { type = 'int4', group = 16 }",
            "calibration",
        ),
    ] {
        place.fails(1, &[says], &["import", CHECKPOINT, "--model", "m", "--rules", &rules(text)]);
    }
    // Calibration for another shape, and of numbers that are none.
    let wide = place.path("wide.safetensors").display().to_string();
    let x = ndarray::Array2::from_elem((3, 5), 1.0);
    formats::write_array(&format!("{wide}:blocks.0.up"), x.view(), false).unwrap();
    place.fails(
        1,
        &["blocks.0.up", "[3, 5]", "48"],
        &["import", CHECKPOINT, "--model", "m", "--rules", KEYS, "--calibration", &wide],
    );
    assert!(!place.path("layers").exists());

    let x = ndarray::Array2::from_elem((3, 48), f32::NAN);
    formats::write_array(&format!("{wide}:blocks.0.up"), x.view(), false).unwrap();
    place.fails(
        1,
        &["blocks.0.up", "NaN"],
        &["import", CHECKPOINT, "--model", "m", "--rules", KEYS, "--calibration", &wide],
    );
    let nan = place.path("nan.safetensors").display().to_string();
    formats::write_array(&format!("{nan}:a.weight"), x.view(), false).unwrap();
    place.fails(1, &["a.weight", "NaN", "index 0"], &["import", &nan, "--model", "m"]);
    assert!(!place.path("layers").exists());
}

#[test]
fn paths_that_are_no_store() {
    let place = Place::new();
    std::fs::write(place.path("layers"), b"a file").unwrap();
    place.fails(1, &["it is a file"], &["models"]);
    place.fails(1, &["it is a file"], &["import", CHECKPOINT, "--model", "m"]);
    std::fs::remove_file(place.path("layers")).unwrap();
    std::fs::create_dir(place.path("layers")).unwrap();
    std::fs::write(place.path("layers/thesis.txt"), b"years of work").unwrap();
    place.fails(1, &["thesis.txt"], &["import", CHECKPOINT, "--model", "m"]);
    place.fails(1, &["holds no table"], &["models"]);
}

#[test]
fn odd_store_paths() {
    let place = Place::new();
    for name in ["with space", "hash#mark", "per%20cent", "quest?ion", "dbname", "ünïcode"] {
        let store = place.path(name).display().to_string();
        let done = std::process::Command::new(env!("CARGO_BIN_EXE_layerstore"))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args(["--store", &store, "--quiet", "import", CHECKPOINT, "--model", "m"])
            .output()
            .unwrap();
        assert!(done.status.success(), "{name}: {}", String::from_utf8_lossy(&done.stderr));
        assert!(place.path(name).join("layers.lance").is_dir(), "{name}");
    }
    assert_eq!(std::fs::read_dir(place.folder.path()).unwrap().count(), 6);
}

#[tokio::test]
async fn another_format_is_named() {
    let place = Place::new();
    place.import("m", None);
    let mut table = lance::Dataset::open(&format!("{}/layers.lance", place.store())).await.unwrap();
    table.update_schema_metadata([("layerstore:format", "3")]).await.unwrap();
    place.fails(1, &["format version 3", "reads versions 1 to 2"], &["models"]);
    let error = Store::open(&place.store()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible);
}

#[test]
fn verify_names_what_a_flipped_byte_hit() {
    let place = Place::new();
    place.import("m", Some(KEYS));
    assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]));
    let folder = place.path("layers/values_d96.lance/data");
    let file = files(&folder).pop().unwrap();
    let good = std::fs::read(&file).unwrap();
    let mut found = 0;
    for at in [100, good.len() / 3, good.len() / 2, good.len() - 60] {
        let mut bad = good.clone();
        bad[at] ^= 0x40;
        std::fs::write(&file, &bad).unwrap();
        let done = place.command(&["--format", "json", "--quiet", "verify"]).output().unwrap();
        let report: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
        let corrupt = report["corrupt"].as_array().unwrap();
        assert_eq!(done.status.code(), Some(i32::from(!corrupt.is_empty())));
        for entry in corrupt {
            let user = &entry["layers"][0];
            assert_eq!(user["model"], "m");
            assert!(user["layer"].as_str().unwrap().ends_with(".up"), "{entry}");
        }
        found += usize::from(!corrupt.is_empty());
    }
    // A byte of padding may be flipped unseen; data may not.
    assert!(found >= 3, "{found}");
    std::fs::write(&file, &good).unwrap();
    assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]));
    std::fs::remove_file(&file).unwrap();
    assert_eq!(place.run(&["verify"]).code, 1);
}

/// Lance panics at a type that it does not know: for a caller that is one line which names the table's file.
#[tokio::test]
async fn a_damaged_manifest_is_an_error() {
    let place = Place::new();
    place.import("m", Some(KEYS));
    for (table, args) in [("layers", &["models"][..]), ("artifacts", &["gc"][..]), ("keys_d48", &["index"][..])] {
        // The newest manifest of a table has the least name.
        let path = files(&place.path(&format!("layers/{table}.lance/_versions"))).remove(0);
        let good = std::fs::read(&path).unwrap();
        let mut bad = good.clone();
        let at: Vec<usize> = (0..bad.len()).filter(|at| bad[*at..].starts_with(b"fixed_size_binary")).collect();
        assert!(!at.is_empty(), "{table}");
        at.iter().for_each(|at| bad[*at] = b'm');
        std::fs::write(&path, &bad).unwrap();
        place.fails(1, &["corrupt", "mixed_size_binary"], args);
        if table == "layers" {
            refused(Store::open(&place.store()).await, ErrorKind::Corrupt, &["mixed_size_binary"]);
        }
        std::fs::write(&path, &good).unwrap();
        assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]));
    }
}

/// The newest manifest of a table, which has the least name.
fn newest_manifest(place: &Place, table: &str) -> std::path::PathBuf {
    files(&place.path(&format!("layers/{table}.lance/_versions"))).remove(0)
}

/// What each layer of every model gives, as it is exported.
fn exported(place: &Place) -> Vec<(String, Vec<u8>)> {
    let models = place.json(&["models"]);
    let names = models.as_array().unwrap().iter().map(|m| m["model"].as_str().unwrap().to_owned());
    let export = |model: String| {
        let path = place.path(&format!("{model}-out.safetensors"));
        place.json(&["export", &model, "--output", path.to_str().unwrap()]);
        (model, std::fs::read(path).unwrap())
    };
    names.map(export).collect()
}

/// A table that is older than the catalogue, as a copy of a store at work can have it: nothing that a version names is collected,
/// `verify` tells, and an import of any model mends it.
#[test]
fn gc_spares_what_an_older_table_does_not_hold() {
    let place = Place::new();
    place.import("a", Some(INT4));
    place.import("b", Some(KEYS));
    place.json(&["snapshot", "create", "kept"]);
    let good = exported(&place);
    let tables = ["artifacts", "keys_d48", "values_d96", "weight_blocks", "tensors"];
    for lost in [vec!["artifacts", "keys_d48"]].into_iter().chain(tables.map(|table| vec![table])) {
        let whole = tempfile::tempdir().unwrap();
        let moved: Vec<_> =
            lost.iter().map(|table| (newest_manifest(&place, table), whole.path().join(table))).collect();
        moved.iter().for_each(|(manifest, aside)| std::fs::rename(manifest, aside).unwrap());
        let report = place.run(&["--format", "json", "verify"]);
        assert_eq!(report.code, 1, "{lost:?}: {} {}", report.out, report.err);
        let report: serde_json::Value = serde_json::from_str(&report.out).unwrap();
        assert!(!report["corrupt"].as_array().unwrap().is_empty(), "{lost:?}: {report}");
        let older = ["gc", "--older-than", "0s", "--apply"];
        place.fails(1, &["nothing was removed", "of model '", "artifact"], &older);
        place.fails(1, &["nothing was removed"], &["gc"]);
        assert!(exported(&place) == good, "{lost:?}");
        // Of another model, which is there as it is: no version is made, and what was lost is.
        let version = place.import("a", Some(INT4))["version"].clone();
        assert_eq!(version, 3);
        assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]), "{lost:?}");
        place.json(&older);
        assert!(exported(&place) == good, "{lost:?}");
        assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]), "{lost:?}");
        assert_eq!(place.json(&["gc", "--older-than", "0s"])["stray_rows"], 0, "{lost:?}");
    }
}

/// What a gc that ended early left of versions that it had removed is the next one's.
#[test]
fn gc_goes_on_where_one_ended() {
    let place = Place::new();
    for rules in [Some(INT4), None, Some(INT4)] {
        place.import("a", rules);
    }
    let catalogue = format!("{}/layers.lance", place.store());
    let count = |folder: &str| files(std::path::Path::new(&format!("{catalogue}/{folder}"))).len();
    let data = count("data");
    assert!(data >= 3, "{data}");
    // Manifests go first: here they are all that went.
    let manifests = files(std::path::Path::new(&format!("{catalogue}/_versions")));
    let old = |path: &&std::path::PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        name.strip_suffix(".manifest").is_some_and(|n| u64::MAX - n.parse::<u64>().unwrap() < 4)
    };
    let removed = manifests.iter().filter(old).map(|path| std::fs::remove_file(path).unwrap()).count();
    assert_eq!(removed, 3);
    assert_eq!(place.json(&["log"]).as_array().unwrap().len(), 1);
    place.json(&["gc", "--older-than", "0s", "--apply"]);
    assert!(count("data") < data, "{} of {data}", count("data"));
    assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]));
}

/// Versions of the catalogue that are known to have been there, and are not, are not garbage.
#[test]
fn gc_spares_what_a_lost_catalogue_named() {
    let place = Place::new();
    place.import("a", None);
    place.import("b", Some(KEYS));
    let newest = newest_manifest(&place, "layers");
    let manifest = std::fs::read(&newest).unwrap();
    let older = ["gc", "--older-than", "0s", "--apply"];
    std::fs::remove_file(&newest).unwrap();
    place.fails(1, &["version 3 was committed", "latest that is there is 2"], &older);
    assert_eq!(place.run(&["verify"]).code, 1);
    std::fs::write(&newest, &manifest).unwrap();
    assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]));
    // A snapshot of a version that is not there.
    place.json(&["snapshot", "create", "kept"]);
    place.import("b", Some(INT4));
    std::fs::remove_file(files(&place.path("layers/layers.lance/_versions")).remove(1)).unwrap();
    place.fails(1, &["snapshot 'kept'", "version 3", "not there"], &older);
    let report: serde_json::Value = serde_json::from_str(&place.run(&["--format", "json", "verify"]).out).unwrap();
    assert_eq!((&report["damaged"][0]["snapshot"], &report["damaged"][0]["version"]), (&"kept".into(), &3.into()));
    assert_eq!(place.json(&["snapshot", "delete", "kept"])["version"], 3);
    place.json(&older);
    assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]));
    // No catalogue at all: an empty one in its place would make all that is there garbage.
    std::fs::rename(place.path("layers/layers.lance/_versions"), place.path("aside")).unwrap();
    place.fails(1, &["table 'artifacts'", "catalogue"], &["import", CHECKPOINT, "--model", "c"]);
    std::fs::remove_dir_all(place.path("layers/layers.lance")).unwrap();
    place.fails(1, &["table 'artifacts'", "catalogue"], &["import", CHECKPOINT, "--model", "c"]);
}

/// Snapshots whose files name nothing: what needs them says so, all else works, and they can be deleted.
#[test]
fn broken_snapshots_are_named_and_can_be_deleted() {
    let place = Place::new();
    place.import("m", Some(KEYS));
    for text in ["", "{", "{\"version\": 77}", "\0\0\0", "{\"branch\":null,\"version\":99,\"manifestSize\":1}"] {
        place.json(&["snapshot", "create", "good"]);
        place.json(&["snapshot", "create", "bad"]);
        let file = place.path("layers/layers.lance/_refs/tags/bad.json");
        std::fs::write(&file, text).unwrap();
        for args in [&["models"][..], &["layers", "m"], &["--at", "good", "models"], &["stats"]] {
            place.json(args);
        }
        place.import("m", Some(KEYS));
        place.fails(1, &["bad"], &["gc", "--older-than", "0s", "--apply"]);
        place.fails(1, &["bad"], &["snapshot", "list"]);
        assert_ne!(place.run(&["--at", "bad", "models"]).code, 0);
        let report = place.run(&["--format", "json", "verify"]);
        assert_eq!(report.code, 1, "{text:?}: {}", report.err);
        let report: serde_json::Value = serde_json::from_str(&report.out).unwrap();
        assert_eq!(report["damaged"][0]["snapshot"], "bad", "{report}");
        place.json(&["snapshot", "delete", "bad"]);
        place.fails(1, &["no snapshot named 'bad'"], &["snapshot", "delete", "bad"]);
        place.json(&["gc", "--older-than", "0s", "--apply"]);
        assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]));
        place.json(&["snapshot", "delete", "good"]);
    }
}

/// A manifest that is cut short, of any table and any version: `verify` names it, and what needs it fails with its name.
#[test]
fn cut_manifests_are_named() {
    let place = Place::new();
    place.import("a", Some(INT4));
    place.import("b", Some(KEYS));
    for table in ["layers", "artifacts", "weight_blocks", "keys_d48", "tensors"] {
        let manifests = files(&place.path(&format!("layers/{table}.lance/_versions")));
        let manifests: Vec<_> = manifests.iter().filter(|f| f.extension().is_some_and(|e| e == "manifest")).collect();
        for (age, manifest) in manifests.iter().enumerate() {
            let good = std::fs::read(manifest).unwrap();
            for length in [0, 1, 17, good.len() / 2, good.len() - 1] {
                std::fs::write(manifest, &good[..length]).unwrap();
                let name = manifest.file_name().unwrap().to_str().unwrap();
                let report = place.run(&["--format", "json", "verify"]);
                assert_eq!(report.code, 1, "{table} {name} {length}: {} {}", report.out, report.err);
                assert!(report.out.contains(name) || report.err.contains(name), "{} {}", report.out, report.err);
                if age == 0 {
                    let import =
                        place.run(&["import", CHECKPOINT, "--model", "c", "--rules", INT4, "--calibration", INPUTS]);
                    assert_eq!(import.code, 1, "{table} {length}");
                    assert!(import.err.contains(name), "{table} {length}: {}", import.err);
                    place.fails(1, &[name], &["gc", "--older-than", "0s", "--apply"]);
                }
            }
            std::fs::write(manifest, &good).unwrap();
        }
    }
    assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]));
}

/// A disk that is full after some writes.
#[derive(Debug, Clone)]
struct Failing {
    files: Arc<LocalFileSystem>,
    left: Arc<AtomicI64>,
}

impl Failing {
    fn check(&self) -> object_store::Result<()> {
        if self.left.fetch_sub(1, Ordering::SeqCst) > 0 {
            return Ok(());
        }
        // ENOSPC.
        Err(object_store::Error::Generic { store: "failing", source: Box::new(std::io::Error::from_raw_os_error(28)) })
    }
}

impl std::fmt::Display for Failing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("failing")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Failing {
    async fn put_opts(&self, p: &Path, d: PutPayload, o: PutOptions) -> object_store::Result<PutResult> {
        self.check()?;
        self.files.put_opts(p, d, o).await
    }
    async fn put_multipart_opts(
        &self,
        p: &Path,
        o: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.check()?;
        self.files.put_multipart_opts(p, o).await
    }
    async fn get_opts(&self, p: &Path, o: GetOptions) -> object_store::Result<GetResult> {
        self.files.get_opts(p, o).await
    }
    async fn get_ranges(&self, p: &Path, r: &[std::ops::Range<u64>]) -> object_store::Result<Vec<Bytes>> {
        self.files.get_ranges(p, r).await
    }
    fn delete_stream(
        &self,
        s: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.files.delete_stream(s)
    }
    fn list(&self, p: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.files.list(p)
    }
    async fn list_with_delimiter(&self, p: Option<&Path>) -> object_store::Result<ListResult> {
        self.files.list_with_delimiter(p).await
    }
    async fn copy_opts(&self, a: &Path, b: &Path, o: CopyOptions) -> object_store::Result<()> {
        self.check()?;
        self.files.copy_opts(a, b, o).await
    }
    async fn rename_opts(&self, a: &Path, b: &Path, o: RenameOptions) -> object_store::Result<()> {
        self.check()?;
        self.files.rename_opts(a, b, o).await
    }
}

/// The number of the system's error behind an error, found by type.
fn raw_os_error(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    match error.downcast_ref::<std::io::Error>() {
        Some(system) if system.raw_os_error().is_some() => system.raw_os_error(),
        _ => raw_os_error(error.source()?),
    }
}

/// Wherever the disk fills up during an import, what was committed stays, and a later import completes the work.
#[tokio::test]
async fn a_full_disk_loses_nothing() {
    let place = Place::new();
    place.import("before", None);
    let left = Arc::new(AtomicI64::new(0));
    let storage = Failing { files: Arc::new(LocalFileSystem::new()), left: left.clone() };
    let mut failures = 0;
    for allowed in 0..200 {
        left.store(allowed, Ordering::SeqCst);
        let options = StoreOptions { hooks: Hooks::writing_to(Arc::new(storage.clone())), ..StoreOptions::default() };
        let store = Store::open_with(&place.store(), options).await.unwrap();
        let checkpoint = formats::open(CHECKPOINT).unwrap();
        let options = ImportOptions::from_files(Some(INT4.as_ref()), Some(INPUTS.as_ref())).unwrap();
        let done = import(&store, checkpoint, "m", options).await;
        let models: Vec<String> = Store::open(&place.store())
            .await
            .unwrap()
            .latest()
            .await
            .unwrap()
            .models()
            .await
            .unwrap()
            .into_iter()
            .map(|m| m.model)
            .collect();
        match done {
            Err(e) => {
                failures += 1;
                assert_eq!(e.kind(), ErrorKind::Storage, "{e}");
                assert!(e.to_string().contains("os error 28"), "{e}");
                assert_eq!(raw_os_error(&e), Some(28), "{e:?}");
                assert_eq!(models, ["before"]);
            }
            Ok(_) => {
                assert_eq!(models, ["before", "m"]);
                break;
            }
        }
    }
    assert!(failures >= 3, "{failures}");
    let store = Store::open(&place.store()).await.unwrap();
    assert_eq!(store.verify(|_, _| ()).await.unwrap().corrupt, []);
    store.gc(std::time::Duration::ZERO, true).await.unwrap();
    assert_eq!(store.verify(|_, _| ()).await.unwrap().corrupt, []);
    assert_eq!(
        store.latest().await.unwrap().layers("m").await.unwrap().len(),
        store.latest().await.unwrap().layers("before").await.unwrap().len()
    );
}

/// A store that may only be read: what reads works, what writes says why it cannot.
#[cfg(unix)]
#[test]
fn a_read_only_store_can_be_read() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;

    let place = Place::new();
    place.import("m", Some(KEYS));
    place.json(&["snapshot", "create", "s"]);
    std::fs::copy(CHECKPOINT, place.path("small.safetensors")).unwrap();
    let allow = |path: &std::path::Path, mode: u32| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    fn folders(path: &std::path::Path) -> Vec<std::path::PathBuf> {
        let inner = std::fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir());
        inner.flat_map(|p| folders(&p)).chain([path.to_owned()]).collect()
    }
    let layers = place.path("layers");
    files(&layers).iter().for_each(|f| allow(f, 0o444));
    folders(&layers).iter().for_each(|f| allow(f, 0o555));
    allow(place.folder.path(), 0o755);
    // No permission binds the superuser: then it is somebody else who runs a copy of the program.
    let binary = place.path("layerstore");
    std::fs::copy(env!("CARGO_BIN_EXE_layerstore"), &binary).unwrap();
    let superuser = std::fs::write(layers.join("probe"), b"").is_ok();
    let run = |args: &[&str]| {
        let mut command = std::process::Command::new(&binary);
        command.current_dir(place.folder.path()).args(["--store", "layers", "--quiet"]).args(args);
        if superuser {
            command.uid(65534).gid(65534);
        }
        let done = loop {
            match command.output() {
                // A process that another test has just started still holds the copy open for writing.
                Err(e) if e.kind() == std::io::ErrorKind::ExecutableFileBusy => std::thread::yield_now(),
                done => break done.unwrap(),
            }
        };
        (done.status.code(), String::from_utf8(done.stderr).unwrap())
    };
    for args in [
        vec!["models"],
        vec!["layers", "m"],
        vec!["--at", "s", "show", "m", "blocks.0.up"],
        vec!["log"],
        vec!["snapshot", "list"],
        vec!["verify"],
        vec!["stats"],
        vec!["gc", "--older-than", "0s"],
    ] {
        assert_eq!(run(&args), (Some(0), String::new()), "{args:?}");
    }
    for args in [
        vec!["import", "small.safetensors", "--model", "n"],
        vec!["snapshot", "create", "t"],
        vec!["snapshot", "delete", "s"],
        vec!["restore", "1"],
        vec!["gc", "--older-than", "0s", "--apply"],
    ] {
        let (code, said) = run(&args);
        assert_eq!(code, Some(1), "{args:?}: {said}");
        assert!(said.contains("ermission denied") && !said.contains("panicked"), "{args:?}: {said}");
    }
    folders(&layers).iter().for_each(|f| allow(f, 0o755));
    files(&layers).iter().for_each(|f| allow(f, 0o644));
    assert_eq!(place.json(&["models"]).as_array().unwrap().len(), 1);
    assert_eq!(place.json(&["snapshot", "list"]).as_array().unwrap().len(), 1);
}

/// Sums that f32 does not hold are told.
#[test]
fn outputs_that_are_not_finite_are_told() {
    let place = Place::new();
    place.import("m", Some(INT4));
    let x = place.path("x.npy").display().to_string();
    formats::write_array(&x, ndarray::Array2::from_elem((2, 48), 3e38).view(), false).unwrap();
    let forward = ["forward", "m", "blocks.0.mix", "--input", &x];
    assert!(place.json(&forward)["not_finite"].as_u64().unwrap() > 0);
    assert!(place.run(&forward).err.contains("no finite numbers"));
    formats::write_array(&x, ndarray::Array2::ones((2, 48)).view(), false).unwrap();
    assert!(place.json(&forward).get("not_finite").is_none());
}

/// A store without its catalogue is damaged, and not a place where an import makes a store.
#[test]
fn a_store_without_its_catalogue_is_damaged() {
    let place = Place::new();
    place.import("m", None);
    std::fs::remove_dir_all(place.path("layers/layers.lance/_versions")).unwrap();
    for args in [&["verify"][..], &["models"], &["gc"], &["stats"], &["import", CHECKPOINT, "--model", "n"]] {
        place.fails(1, &["and no version of table 'layers', the catalogue", "Bring the table back"], args);
    }
}
