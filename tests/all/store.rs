//! The store as a library.

use std::sync::Arc;

use layerstore::layer::{Accuracy, Limit};
use layerstore::layer::{KeyValueLayer, SearchSettings, SharedLayer};
use layerstore::compress::{Cancel, ImportOptions, ImportReport, Progress, import};
use layerstore::formats;
use layerstore::store::{Snapshot, Store, StoreOptions};
use layerstore::{Error, blocking};
use ndarray::Array2;

use crate::support::{CHECKPOINT, INPUTS, INT4, KEYS, Place};

async fn bring(store: &Store, model: &str, rules: Option<&str>, cancel: Cancel) -> layerstore::Result<ImportReport> {
    let calibration = rules.map(|_| INPUTS.as_ref());
    let checkpoint = formats::open(CHECKPOINT)?;
        let options = ImportOptions::from_files(rules.map(|r| r.as_ref()), calibration)?;
    import(store, checkpoint, model, ImportOptions { cancel, ..options })
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn handles_are_lazy_and_share_a_bounded_cache() {
    let place = Place::new();
    let options = StoreOptions { cache_bytes: 100 << 10, ..StoreOptions::default() };
    let store = Store::create_with(&place.store(), options).await.unwrap();
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

#[tokio::test(flavor = "multi_thread")]
async fn search_settings_share_the_artifact() {
    let place = Place::new();
    let store = Store::create(&place.store()).await.unwrap();
    bring(&store, "k12", Some(KEYS), Cancel::new()).await.unwrap();
    let fewer = std::fs::read_to_string(KEYS).unwrap().replace("= 12", "= 6");
    std::fs::write(place.path("fewer.toml"), fewer).unwrap();
    let second = bring(&store, "k6", Some(place.path("fewer.toml").to_str().unwrap()), Cancel::new()).await.unwrap();
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

#[tokio::test(flavor = "multi_thread")]
async fn readers_see_one_version_while_writers_commit() {
    let place = Place::new();
    let store = Store::create(&place.store()).await.unwrap();
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

struct CancelAt(Cancel, std::sync::atomic::AtomicUsize);

impl Progress for CancelAt {
    fn layer(&self, _name: &str) {
        if self.1.fetch_sub(1, std::sync::atomic::Ordering::SeqCst) == 1 {
            self.0.cancel();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_import_changes_nothing() {
    let place = Place::new();
    let store = Store::create(&place.store()).await.unwrap();
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

/// A store of format 1, kept as it was written: everything in it is there, and is what it was.
#[test]
fn a_kept_store_of_format_1_is_read() {
    let place = Place::new();
    let kept = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/store-v1");
    for file in crate::support::files(&kept.join("layers")) {
        let copy = place.path("layers").join(file.strip_prefix(kept.join("layers")).unwrap());
        std::fs::create_dir_all(copy.parent().unwrap()).unwrap();
        std::fs::copy(&file, copy).unwrap();
    }
    for at in ["first", "5"] {
        for model in ["f32", "int4", "keys"] {
            let expected = std::fs::read(kept.join(format!("{model}-{at}.json"))).unwrap();
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

#[test]
fn without_async() {
    let place = Place::new();
    let store = blocking::Store::create(&place.store()).unwrap();
    store.run(bring(store.inner(), "m", None, Cancel::new())).unwrap();
    store.create_snapshot("s").unwrap();
    let layer = store.layer("m", "blocks.0.mix").unwrap();
    let y = store.run(layer.forward(Array2::ones((2, 48)).view(), Accuracy::Full)).unwrap().y;
    assert_eq!(y.dim(), (2, 48));
    assert_eq!(store.load(&layer).unwrap().in_features(), 48);
    assert_eq!(store.at("s").unwrap().version(), store.latest().unwrap().version());
    assert_eq!(store.restore("s").unwrap().version, 2);
    assert_eq!(store.log().unwrap().len(), 2);
}
