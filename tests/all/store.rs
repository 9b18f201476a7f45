//! The store as a library, on the local file system and in memory.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use layerstore::layer::{Accuracy, KeyValueLayer, Limit, SearchSettings, SharedLayer};
use layerstore::{
    ActivationsFile, Cancel, Error, ErrorKind, ExportOptions, ImportOptions, ImportReport, LayerName, Progress, Reader,
    Snapshot, Store, StoreOptions, blocking, compress_layers, evaluate, export, formats, import, load_backend,
};
use ndarray::{Array2, Axis};

use crate::support::{CHECKPOINT, INPUTS, INT4, KEYS, Place};

/// Where a test's store lies, and a folder for the test's files.
struct Spot {
    place: Place,
    uri: String,
}

impl Spot {
    fn on_files() -> Self {
        let place = Place::new();
        Spot { uri: place.store(), place }
    }

    fn in_memory(test: &str) -> Self {
        Spot { place: Place::new(), uri: format!("memory://{test}") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path(name)
    }

    fn rules(&self, name: &str, text: &str) -> String {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name).display().to_string()
    }
}

/// A test of a store on the local file system, and of one in memory.
macro_rules! on_both {
    ($(#[$doc:meta])* async fn $name:ident($spot:ident: Spot) $body:block) => {
        $(#[$doc])*
        mod $name {
            use super::*;

            async fn check($spot: Spot) $body

            #[tokio::test(flavor = "multi_thread")]
            async fn on_files() {
                check(Spot::on_files()).await
            }

            #[tokio::test(flavor = "multi_thread")]
            async fn in_memory() {
                check(Spot::in_memory(stringify!($name))).await
            }
        }
    };
}

async fn bring(store: &Store, model: &str, rules: Option<&str>, cancel: Cancel) -> layerstore::Result<ImportReport> {
    let calibration = rules.map(|_| INPUTS.as_ref());
    let options = ImportOptions::from_files(rules.map(|r| r.as_ref()), calibration)?;
    import(store, formats::open(CHECKPOINT)?, model, ImportOptions { cancel, ..options }).await
}

on_both! {
    async fn handles_are_lazy_and_share_a_bounded_cache(spot: Spot) {
        let options = StoreOptions { cache_bytes: 100 << 10, ..StoreOptions::default() };
        let store = Store::create_with(&spot.uri, options).await.unwrap();
        bring(&store, "a", Some(KEYS), Cancel::new()).await.unwrap();
        bring(&store, "b", Some(KEYS), Cancel::new()).await.unwrap();
        let latest = store.latest().await.unwrap();
        let (a, b) = (latest.layer("a", "blocks.0.up").await.unwrap(), latest.layer("b", "blocks.0.up").await.unwrap());
        assert_eq!(store.cached_bytes().await, 0);
        let (a, b) = (a.load().await.unwrap(), b.load().await.unwrap());
        let one = store.cached_bytes().await;
        assert!(one > 0);
        // The same artifact under two names is one set of arrays.
        let keys = |layer: &SharedLayer| layer.downcast_ref::<KeyValueLayer>().unwrap().keys().as_ptr();
        assert_eq!(keys(&a), keys(&b));
        let handles: Vec<_> = latest.layers("a").await.unwrap().into_iter().map(|r| latest.handle(r)).collect();
        store.prefetch(&handles).await.unwrap();
        assert!(store.cached_bytes().await <= 100 << 10);
    }
}

on_both! {
    async fn search_settings_share_the_artifact(spot: Spot) {
        let store = Store::create(&spot.uri).await.unwrap();
        bring(&store, "k12", Some(KEYS), Cancel::new()).await.unwrap();
        let fewer = std::fs::read_to_string(KEYS).unwrap().replace("= 12", "= 6");
        let second = bring(&store, "k6", Some(&spot.rules("fewer.toml", &fewer)), Cancel::new()).await.unwrap();
        assert_eq!(second.written_bytes, 0);
        let latest = store.latest().await.unwrap();
        let hits = async |model: &str| {
            let layer = latest.layer(model, "blocks.0.up").await.unwrap().load().await.unwrap();
            let layer = layer.downcast_ref::<KeyValueLayer>().unwrap();
            let x = Array2::from_shape_fn((40, 48), |(i, j)| ((i * 31 + j * 17) % 13) as f32 - 6.0);
            let few =
                layer.with_search(SearchSettings { max_relative_error: Some(0.5), ..SearchSettings::default() }).unwrap();
            assert_eq!(few.search(x.view(), None).unwrap(), layer.search(x.view(), Some(Limit::MaxError(0.5))).unwrap());
            layer.search(x.view(), None).unwrap().iter().map(|q| q.hits.len()).sum::<usize>()
        };
        assert!(hits("k6").await < hits("k12").await);
    }
}

on_both! {
    async fn readers_see_one_version_while_writers_commit(spot: Spot) {
        let store = Store::create(&spot.uri).await.unwrap();
        bring(&store, "m", None, Cancel::new()).await.unwrap();
        let before = store.latest().await.unwrap();
        let reading = {
            let store = store.clone();
            tokio::spawn(async move {
                for _ in 0..20 {
                    let rows = store.latest().await.unwrap().layers("m").await.unwrap();
                    let compressed = rows.iter().filter(|r| r.method.as_str() != "dense").count();
                    assert!(rows.len() == 10 && matches!(compressed, 0 | 6), "{compressed} of {}", rows.len());
                }
            })
        };
        for rules in [Some(INT4), Some(KEYS), None, Some(INT4)] {
            bring(&store, "m", rules, Cancel::new()).await.unwrap();
        }
        reading.await.unwrap();
        assert!(before.layers("m").await.unwrap().iter().all(|r| r.method.as_str() == "dense"));
        let same = |s: &Snapshot| s.version();
        assert_eq!((same(&before), same(&store.latest().await.unwrap())), (2, 6));
    }
}

struct CancelAt(Cancel, std::sync::atomic::AtomicUsize);

impl Progress for CancelAt {
    fn layer(&self, _name: &str) {
        if self.1.fetch_sub(1, std::sync::atomic::Ordering::SeqCst) == 1 {
            self.0.cancel();
        }
    }
}

on_both! {
    async fn a_cancelled_import_changes_nothing(spot: Spot) {
        let store = Store::create(&spot.uri).await.unwrap();
        for at in [1, 4, 10] {
            let cancel = Cancel::new();
            let checkpoint = formats::open(CHECKPOINT).unwrap();
        let options = ImportOptions::from_files(Some(INT4.as_ref()), Some(INPUTS.as_ref())).unwrap();
            let progress = Arc::new(CancelAt(cancel.clone(), at.into()));
            let options = ImportOptions { cancel, progress, ..options };
            let error = import(&store, checkpoint, "m", options).await.unwrap_err();
            assert!(matches!(error, Error::Cancelled), "{error}");
            assert_eq!(store.latest().await.unwrap().version(), 1);
        }
        assert_eq!(bring(&store, "m", Some(INT4), Cancel::new()).await.unwrap().version, 2);
    }
}

on_both! {
    /// Layers that others compressed, and did not commit, are an import's: nothing is made again, and one version comes of it.
    async fn layers_are_compressed_before_their_import(spot: Spot) {
        let options = |rules: &str| ImportOptions::from_files(Some(rules.as_ref()), Some(INPUTS.as_ref())).unwrap();
        for rules in [INT4, KEYS] {
            let apart = Store::create(&format!("{}-{}", spot.uri, rules == INT4)).await.unwrap();
            let alone = bring(&apart, "m", Some(rules), Cancel::new()).await.unwrap();
            let store = Store::create(&spot.uri).await.unwrap();
            let before = store.latest().await.unwrap().version();
            let names: Vec<String> = alone.layers.iter().map(|layer| layer.layer.clone()).collect();
            let lease = store.lease().await.unwrap();
            for half in [&names[..3], &names[2..]] {
                let made = compress_layers(&store, formats::open(CHECKPOINT).unwrap(), half, options(rules)).await.unwrap();
                let own: Vec<String> = made.layers.iter().map(|layer| layer.layer.clone()).collect();
                assert_eq!(own, half);
                // The third is of both halves.
                assert!(half.len() == 3 || made.layers[0].reused);
                assert_eq!(store.latest().await.unwrap().version(), before);
            }
            drop(lease);
            let report = bring(&store, "m", Some(rules), Cancel::new()).await.unwrap();
            let artifacts = |report: &ImportReport| -> Vec<(String, String, Option<f64>)> {
                report.layers.iter().map(|l| (l.layer.clone(), l.artifact.clone(), l.relative_error)).collect()
            };
            assert_eq!(artifacts(&report), artifacts(&alone));
            assert_eq!((report.version, report.written_bytes), (before + 1, 0));
            assert!(report.layers.iter().all(|layer| layer.reused));
            assert!(store.verify(|_, _| ()).await.unwrap().is_sound());
            store.remove_model("m").await.unwrap();
        }
        let store = Store::create(&spot.uri).await.unwrap();
        let unknown = compress_layers(&store, formats::open(CHECKPOINT).unwrap(), &["nobody".into()], options(INT4)).await;
        assert!(unknown.unwrap_err().to_string().contains("'nobody', expected one of the source's; the closest is"));
    }
}

on_both! {
    /// Names for versions, what changed between them, and an older one made the latest.
    async fn versions_have_names(spot: Spot) {
        let store = Store::create(&spot.uri).await.unwrap();
        bring(&store, "m", None, Cancel::new()).await.unwrap();
        assert_eq!(store.create_snapshot("dense").await.unwrap().version, 2);
        let taken = store.create_snapshot("dense").await.unwrap_err();
        assert!(matches!(taken, Error::SnapshotExists { version: 2, .. }), "{taken}");
        bring(&store, "m", Some(INT4), Cancel::new()).await.unwrap();
        bring(&store, "n", Some(INT4), Cancel::new()).await.unwrap();
        let (dense, latest) = (store.at("dense").await.unwrap(), store.latest().await.unwrap());
        let diff = dense.diff(&latest).await.unwrap();
        assert_eq!((diff.added.len(), diff.removed.len(), diff.changed.len()), (10, 0, 6));
        let unknown = store.at("sparse").await.unwrap_err();
        assert!(matches!(&unknown, Error::UnknownSnapshot { known, .. } if known == &["dense"]), "{unknown}");
        assert!(matches!(store.at("77").await.unwrap_err(), Error::UnknownVersion { latest: 4, .. }));
        assert_eq!(store.restore("dense").await.unwrap().version, 5);
        assert_eq!(store.latest().await.unwrap().models().await.unwrap().len(), 1);
        let log = store.log().await.unwrap();
        let operations: Vec<&str> = log.iter().map(|v| v.operation.as_str()).collect();
        assert_eq!(operations, ["restore dense", "import n", "import m", "import m", "create"]);
        assert_eq!(log[3].snapshots, ["dense"]);
        assert_eq!(store.snapshots().await.unwrap().len(), 1);
        assert_eq!(store.delete_snapshot("dense").await.unwrap().version, Some(2));
        assert_eq!(store.delete_snapshot("dense").await.unwrap_err().kind(), ErrorKind::NotFound);
    }
}

on_both! {
    /// What nothing reaches goes, and the rest is whole, of this handle and of another.
    async fn gc_keeps_what_is_reached(spot: Spot) {
        let store = Store::create(&spot.uri).await.unwrap();
        bring(&store, "m", Some(KEYS), Cancel::new()).await.unwrap();
        store.create_snapshot("keys").await.unwrap();
        bring(&store, "m", Some(INT4), Cancel::new()).await.unwrap();
        bring(&store, "m", None, Cancel::new()).await.unwrap();
        let before = store.latest().await.unwrap().stats().await.unwrap();
        let dry = store.gc(Duration::ZERO, false).await.unwrap();
        assert!(!dry.applied && dry.removed_bytes == 0 && dry.reclaimable_bytes > 0, "{dry:?}");
        // An import at work is waited for, and holds off what it may come to need.
        let writer = store.writer().await.unwrap();
        let release = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(200)).await;
            drop(writer);
        });
        let done = store.gc(Duration::ZERO, true).await.unwrap();
        assert!(release.is_finished());
        assert!(done.applied && done.removed_bytes > 0, "{done:?}");
        assert_eq!((done.artifacts, done.reclaimable_bytes), (dry.artifacts, dry.reclaimable_bytes));
        assert_eq!(store.gc(Duration::ZERO, true).await.unwrap().artifacts, 0);
        let other = Store::open(&spot.uri).await.unwrap();
        assert_eq!(other.verify(|_, _| ()).await.unwrap().corrupt, []);
        for name in ["keys", "latest"] {
            for handle in other.at(name).await.unwrap().handles("m").await.unwrap() {
                handle.load().await.unwrap();
            }
        }
        let after = other.latest().await.unwrap().stats().await.unwrap();
        assert_eq!(before.artifacts - after.artifacts, done.artifacts);
        assert!(after.bytes.unwrap() < before.bytes.unwrap(), "{after:?} after {before:?}");
        assert!(matches!(other.at("3").await.unwrap_err(), Error::UnknownVersion { .. }));
    }
}

on_both! {
    /// Two handles of one store, and a table that both are the first to write to.
    async fn imports_at_once_all_land(spot: Spot) {
        let store = Store::create(&spot.uri).await.unwrap();
        let other = Store::open(&spot.uri).await.unwrap();
        let imports = ["a", "b", "c", "d"].into_iter().zip([&store, &other, &store, &other]);
        let imports = imports.zip([INT4, KEYS, KEYS, INT4]).map(|((model, store), rules)| {
            let store = store.clone();
            tokio::spawn(async move { bring(&store, model, Some(rules), Cancel::new()).await.map(|_| ()) })
        });
        for done in imports.collect::<Vec<_>>() {
            done.await.unwrap().unwrap();
        }
        for store in [&store, &other] {
            let models = store.latest().await.unwrap().models().await.unwrap();
            let layers: Vec<(&str, u64)> = models.iter().map(|m| (m.model.as_str(), m.layers)).collect();
            assert_eq!(layers, [("a", 10), ("b", 10), ("c", 10), ("d", 10)]);
            assert_eq!(store.verify(|_, _| ()).await.unwrap().corrupt, []);
        }
        assert_eq!(store.latest().await.unwrap().version(), 5);
    }
}

on_both! {
    /// A dense model comes back bit for bit, and layers are measured.
    async fn models_are_exported_and_measured(spot: Spot) {
        let store = Store::create(&spot.uri).await.unwrap();
        bring(&store, "m", None, Cancel::new()).await.unwrap();
        bring(&store, "k", Some(KEYS), Cancel::new()).await.unwrap();
        let latest = store.latest().await.unwrap();
        let path = spot.path("out.safetensors");
        let done = export(&latest, "m", &path, ExportOptions::default()).await.unwrap();
        assert_eq!((done.layers, done.bytes), (10, std::fs::metadata(&path).unwrap().len()));
        let (out, source) = (formats::open(&path).unwrap(), formats::open(CHECKPOINT).unwrap());
        for tensor in source.tensors().values() {
            let found = out.bytes(out.tensor(&tensor.name).unwrap()).unwrap();
            assert_eq!(found, source.bytes(tensor).unwrap(), "{}", tensor.name);
        }
        let activations = ActivationsFile::open(INPUTS).unwrap();
        let measured = evaluate(&latest, "k", activations, None).await.unwrap();
        assert_eq!(measured.layers.len(), 6);
    }
}

on_both! {
    /// Keys searched where they lie, across layers, with an index; and a layer as a store of its own.
    async fn keys_are_searched_in_the_store(spot: Spot) {
        let store = Store::create(&spot.uri).await.unwrap();
        let keys = std::fs::read_to_string(KEYS).unwrap();
        bring(&store, "m", Some(&spot.rules("keys.toml", &keys)), Cancel::new()).await.unwrap();
        let latest = store.latest().await.unwrap();
        let handle = latest.layer("m", "blocks.1.up").await.unwrap();
        let x = Array2::from_shape_fn((5, 48), |(i, j)| ((i * 31 + j * 17) % 13) as f32 - 6.0);
        let found = handle.search_on_disk(x.view(), Some(Limit::Keys(5.0))).await.unwrap();
        assert!(found.iter().map(|query| query.hits.len()).sum::<usize>() > 5);
        let key = handle.key(3).await.unwrap();
        let mine = LayerName { model: "m".into(), layer: "blocks.1.up".into() };
        for indexed in [false, true] {
            if indexed {
                let reports = store.index_keys(|_, _| ()).await.unwrap();
                assert!(reports.iter().any(|r| r.table == "keys_d48" && r.keys > 0), "{reports:?}");
            }
            let near = latest.nearest_keys(key.view().insert_axis(Axis(0)), 2, None).await.unwrap();
            assert!(near[0][0].key == 3 && near[0][0].layers.contains(&mine) && near[0][0].cosine > 0.999, "{near:?}");
        }
        let alone = match spot.uri.starts_with("memory://") {
            true => format!("{}-alone", spot.uri),
            false => spot.path("alone").display().to_string(),
        };
        // A store in memory lasts as long as something holds it.
        let held = Store::create(&alone).await.unwrap();
        handle.copy_to(&alone).await.unwrap();
        let copy = load_backend(&alone).await.unwrap();
        assert_eq!(copy.to_parts(), handle.load().await.unwrap().to_parts());
        drop(held);
    }
}

/// A store in memory is one by its name while a handle holds it, and no longer.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_in_memory_lasts_as_long_as_its_handles() {
    let uri = "memory://a_store_in_memory/sub";
    assert!(matches!(Store::open(uri).await.unwrap_err(), Error::NotAStore { .. }));
    let store = Store::create(uri).await.unwrap();
    bring(&store, "m", Some(INT4), Cancel::new()).await.unwrap();
    assert!(store.lancedb().await.unwrap().table_names().execute().await.unwrap().contains(&"layers".to_owned()));
    let layer = store.latest().await.unwrap().layer("m", "blocks.0.up").await.unwrap();
    drop(store);
    let again = Store::open(uri).await.unwrap();
    assert_eq!(again.latest().await.unwrap().models().await.unwrap().len(), 1);
    assert!(matches!(Store::open("memory://a_store_in_memory").await.unwrap_err(), Error::NotAStore { .. }));
    drop(again);
    // A layer's handle holds it, too.
    layer.load().await.unwrap();
    drop(layer);
    assert!(matches!(Store::open(uri).await.unwrap_err(), Error::NotAStore { .. }));
}

fn kept(format: u32) -> PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/store-v{format}"))
}

/// A copy of the store of a format that was kept as it was written.
fn copy_of_kept_store(format: u32) -> Place {
    let (place, from) = (Place::new(), kept(format).join("layers"));
    for file in crate::support::files(&from) {
        let copy = place.path("layers").join(file.strip_prefix(&from).unwrap());
        std::fs::create_dir_all(copy.parent().unwrap()).unwrap();
        std::fs::copy(&file, copy).unwrap();
    }
    place
}

/// Holds a copy of the kept store against what was in it, and writes to it.
fn check_kept_store(place: &Place, format: u32) {
    for at in ["first", "5"] {
        for model in ["f32", "int4", "keys"] {
            let expected = std::fs::read(kept(format).join(format!("{model}-{at}.json"))).unwrap();
            let expected: serde_json::Value = serde_json::from_slice(&expected).unwrap();
            assert_eq!(place.json(&["--at", at, "layers", model]), expected, "{model} at {at}");
        }
    }
    // Hashing every artifact says that its arrays are read as they were written.
    assert_eq!(place.json(&["verify"]), serde_json::json!({"artifacts": 28, "corrupt": []}));
    for (model, at, most) in [("f32", "5", 1e-6), ("int4", "5", 0.08), ("keys", "first", 0.3), ("keys", "5", 0.3)] {
        let report = place.json(&["--at", at, "evaluate", model, "--activations", INPUTS, "--checkpoint", CHECKPOINT]);
        assert!(report["mean_relative_error"].as_f64().unwrap() < most, "{model} at {at}: {report}");
    }
    // And it can be written to.
    place.import("new", Some(KEYS));
    assert_eq!(place.json(&["models"]).as_array().unwrap().len(), 4);
}

/// Stores kept as they were written: everything in them is there, and is what it was.
#[test]
fn kept_stores_are_read() {
    for format in [1, 2] {
        check_kept_store(&copy_of_kept_store(format), format);
    }
}

/// The same store after `upgrade`: nothing that was in it differs, and what comes new lies in the tables of format 2.
#[test]
fn a_kept_store_is_upgraded() {
    let place = copy_of_kept_store(1);
    assert_eq!(place.json(&["upgrade"]), serde_json::json!({"from": 1, "to": 2}));
    assert_eq!(place.json(&["upgrade"]), serde_json::json!({"from": 2, "to": 2}));
    assert_eq!(place.run(&["upgrade"]).out.trim(), "the store is of format 2 already");
    assert_eq!(place.json(&["log"])[0]["operation"], "upgrade to format 2");
    assert!(!place.path("layers/weight_blocks.lance").exists());
    check_kept_store(&place, 1);
    place.import("int4 again", Some(INT4));
    let rules = place.path("int3.toml");
    std::fs::write(&rules, std::fs::read_to_string(INT4).unwrap().replace("int4", "int3")).unwrap();
    place.import("int3", Some(rules.to_str().unwrap()));
    assert!(place.path("layers/weight_blocks.lance").exists());
    assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]));
}

/// Columns that this version does not know are passed over when they are read, and left open when rows are written,
/// whether they are values in files of their own or nulls that are in none.
#[tokio::test(flavor = "multi_thread")]
async fn unknown_columns_are_passed_over() {
    use arrow::datatypes::{DataType, Field, Schema};
    use lance::dataset::NewColumnTransform;

    let place = copy_of_kept_store(1);
    let table = |name: &str| format!("{}/{name}.lance", place.store());
    for (name, note) in [
        ("layers", "nullif(model, 'f32')"),
        ("artifacts", "nullif(method, 'dense')"),
        ("keys_d48", "nullif(cast(key as string), '0')"),
        ("factors_d96", "nullif(side, 'none')"),
        ("weights", "nullif(cast(row as string), '0')"),
        ("tensors", "nullif(name, 'none')"),
    ] {
        let mut dataset = lance::Dataset::open(&table(name)).await.unwrap();
        let noted = NewColumnTransform::SqlExpressions(vec![("note".into(), note.into())]);
        dataset.add_columns(noted, None, None).await.unwrap();
        let lists = Field::new("list", DataType::List(Arc::new(Field::new("item", DataType::Int64, true))), true);
        let empty = NewColumnTransform::AllNulls(Arc::new(Schema::new(vec![lists])));
        dataset.add_columns(empty, None, None).await.unwrap();
    }
    // Each change of the catalogue was a version of it.
    let store = Store::open(&place.store()).await.unwrap();
    assert_eq!(store.latest().await.unwrap().version(), 7);
    let expected = store.at("5").await.unwrap().records().await.unwrap();
    assert_eq!(store.latest().await.unwrap().records().await.unwrap(), expected);
    for reader in [Reader::Direct, Reader::Lance] {
        let options = StoreOptions { reader: Some(reader), ..StoreOptions::default() };
        let store = Store::open_with(&place.store(), options).await.unwrap();
        for model in ["f32", "int4", "keys"] {
            for handle in store.latest().await.unwrap().handles(model).await.unwrap() {
                handle.load().await.unwrap();
            }
        }
        assert_eq!(store.verify(|_, _| ()).await.unwrap().corrupt, []);
    }
    check_kept_store(&place, 1);
    bring(&store, "more", Some(INT4), Cancel::new()).await.unwrap();
    bring(&store, "keys", Some(INT4), Cancel::new()).await.unwrap();
    let done = store.gc(Duration::ZERO, true).await.unwrap();
    assert!(done.applied, "{done:?}");
    assert_eq!(store.verify(|_, _| ()).await.unwrap().corrupt, []);
    // What another program wrote into the list of artifacts is still there, of rows that gc has moved too.
    let list = lance::Dataset::open(&table("artifacts")).await.unwrap();
    let count = async |filter: &str| list.count_rows(Some(filter.into())).await.unwrap();
    let (noted, new) = (count("note = method").await, count("note IS NULL AND method != 'dense'").await);
    assert!(noted >= 6 && new > 0, "{noted} noted, {new} new");
    assert_eq!(count("note != method").await, 0);
}

/// One setting leaves all reading to Lance, for the binary too.
#[test]
fn the_environment_chooses_the_reader() {
    let place = Place::new();
    place.import("m", Some(KEYS));
    let run = |reader: &str| {
        let done = place.command(&["verify"]).env("LAYERSTORE_READER", reader).output().unwrap();
        (done.status.code(), String::from_utf8(done.stderr).unwrap())
    };
    for reader in ["lance", "direct", ""] {
        assert_eq!(run(reader).0, Some(0), "{reader}");
    }
    let (code, said) = run("arrow");
    assert!(code == Some(1) && said.contains("LAYERSTORE_READER") && said.contains("'lance'"), "{said}");
}

#[test]
fn without_async() {
    let place = Place::new();
    let store = blocking::Store::create(&place.store()).unwrap();
    assert_eq!(store.uri(), place.store());
    let checkpoint = formats::open(CHECKPOINT).unwrap();
    let options = ImportOptions::from_files(Some(KEYS.as_ref()), Some(INPUTS.as_ref())).unwrap();
    assert_eq!(blocking::import(&store, checkpoint.clone(), "k", options).unwrap().version, 2);
    blocking::import(&store, checkpoint, "m", ImportOptions::default()).unwrap();
    store.create_snapshot("s").unwrap();
    let latest = store.latest().unwrap();
    let layer = latest.layer("m", "blocks.0.mix").unwrap();
    let y = layer.forward(Array2::ones((2, 48)).view(), Accuracy::Full).unwrap().y;
    assert_eq!(y.dim(), (2, 48));
    assert_eq!(layer.load().unwrap().in_features(), 48);
    assert_eq!((store.at("s").unwrap().version(), latest.version()), (3, 3));
    let handles = latest.handles("k").unwrap();
    store.prefetch(&handles).unwrap();
    assert!(store.cached_bytes() > 0);
    let keys = latest.layer("k", "blocks.0.up").unwrap();
    let x = Array2::ones((1, 48));
    assert_eq!(keys.search_on_disk(x.view(), None).unwrap().len(), 1);
    let near = latest.nearest_keys(keys.key(0).unwrap().insert_axis(Axis(0)).view(), 1, None).unwrap();
    assert_eq!(near[0][0].key, 0);
    assert!(store.index_keys(|_, _| ()).unwrap().len() > 1);
    let alone = place.path("alone").display().to_string();
    keys.copy_to(&alone).unwrap();
    assert_eq!(blocking::load_backend(&alone).unwrap().to_parts(), keys.load().unwrap().to_parts());
    let measured = blocking::evaluate(
        &latest,
        "k",
        ActivationsFile::open(INPUTS).unwrap(),
        Some(formats::open(CHECKPOINT).unwrap()),
    );
    assert_eq!(measured.unwrap().layers.len(), 6);
    assert_eq!(blocking::exact_layer(&latest, &keys).unwrap().in_features(), 48);
    let shared = blocking::shared_directions(&latest, "k", "k", Default::default()).unwrap();
    assert!(!shared.is_empty());
    let out = place.path("out.safetensors");
    assert_eq!(blocking::export(&latest, "m", &out, ExportOptions::default()).unwrap().layers, 10);
    let keras = "tests/fixtures/keras/functional.keras";
    blocking::import(&store, formats::open(keras).unwrap(), "keras", ImportOptions::default()).unwrap();
    let module = store.latest().unwrap().module("keras", "model").unwrap();
    assert_eq!(store.save_module("copy", "model", &module.load().unwrap(), None).unwrap(), 5);
    let methods: BTreeMap<String, u64> = store.latest().unwrap().models().unwrap().pop().unwrap().methods;
    assert!(methods.contains_key("dense"), "{methods:?}");
    let mut writer = store.writer().unwrap();
    writer.flush().unwrap();
    assert_eq!(writer.commit("copy", &[], None).unwrap(), 6);
    let diff = store.at("s").unwrap().diff(&store.latest().unwrap()).unwrap();
    assert_eq!((diff.removed.len(), diff.changed.len()), (0, 0));
    assert_eq!(store.restore("s").unwrap().version, 7);
    assert_eq!((store.log().unwrap().len(), store.snapshots().unwrap().len()), (7, 1));
    assert_eq!((store.format().unwrap(), store.upgrade().unwrap()), (2, 2));
    assert_eq!(store.verify(|_, _| ()).unwrap().corrupt, []);
    assert!(store.gc(Duration::ZERO, true).unwrap().applied);
    assert_eq!(store.delete_snapshot("s").unwrap().version, Some(3));
    assert!(store.latest().unwrap().stats().unwrap().layers == 20);
    let tables = store.run(store.inner().lancedb()).unwrap();
    assert!(!store.run(tables.table_names().execute()).unwrap().is_empty());
}
