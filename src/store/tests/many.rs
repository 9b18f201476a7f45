//! Stores of many models: rows are found by an index, and a commit touches few of them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lance::deps::datafusion::scalar::ScalarValue;
use lance::index::DatasetIndexExt;
use proptest::prelude::*;

use super::{provenance, sound, tensor};
use crate::error::Error;
use crate::layer::{ArtifactId, DType, Parts};
use crate::store::catalogue;
use crate::store::change::Scope;
use crate::store::limits::Limits;
use crate::store::lookup::{BY_ARTIFACT, BY_MODEL, BY_RECIPE, Indexed, Lookup};
use crate::store::record::{LayerRecord, Source, layers_batches};
use crate::store::root::{Store, StoreOptions};
use crate::store::schema::{ARTIFACTS, LAYERS};
use crate::store::strict::is_conflict;
use crate::store::testing::Hooks;
use crate::store::update;

/// An index from 12 rows on, kept up at every fourth row.
const SMALL: Limits = Limits {
    indexed_from: 12,
    uncovered: 4,
    list: (12, 4),
    growth: 3,
    large_fragment: 4,
    joined: 3,
    gc_joins: (64, 5),
};

fn options(limits: Limits) -> StoreOptions {
    StoreOptions { hooks: Hooks { limits, ..Hooks::default() }, ..StoreOptions::default() }
}

async fn small(folder: &Path) -> Store {
    Store::create_with(&folder.join("layers").display().to_string(), options(SMALL)).await.unwrap()
}

/// Parts that are others for every number.
fn parts(number: u64) -> Parts {
    tensor(DType::U8, vec![2, 3], 201 + 2 * number)
}

fn record(model: &str, layer: &str, parts: &Parts) -> LayerRecord {
    LayerRecord {
        model: model.into(),
        layer: layer.into(),
        method: parts.method.clone(),
        in_features: 3,
        out_features: 2,
        artifact: parts.id(),
        relative_error: Some(0.0),
        error_basis: provenance(1).error_basis,
        dense_bytes: 6,
        stored_bytes: parts.stored_bytes(),
        config: parts.config.clone(),
        source: Source::default(),
        created_at: chrono::Utc::now(),
        locations: Default::default(),
    }
}

/// Stores a model of these layers, by name and number.
async fn save(store: &Store, model: &str, layers: &[(&str, u64)], scope: Scope<'_>) -> u64 {
    let mut writer = store.writer().await.unwrap();
    let mut records = vec![];
    for (layer, number) in layers {
        let parts = parts(*number);
        writer.add(&parts, provenance_of(*number)).await.unwrap();
        records.push(record(model, layer, &parts));
    }
    writer.commit_in((model, scope), &records, ("import", None)).await.unwrap()
}

fn provenance_of(number: u64) -> crate::store::Provenance {
    crate::store::Provenance { recipe: *blake3::hash(&number.to_le_bytes()).as_bytes(), ..provenance(0) }
}

/// Stores models of two layers, `m0` and so on, one commit each.
async fn fill(store: &Store, models: std::ops::Range<u64>) {
    for m in models {
        save(store, &format!("m{m}"), &[("a", 2 * m), ("b", 2 * m + 1)], Scope::Model).await;
    }
}

/// Whether every layer of these models is there with its artifact, by name and in the list of its model.
async fn holds(store: &Store, at: &str, models: std::ops::Range<u64>) {
    let snapshot = store.at(at).await.unwrap();
    for m in models {
        let model = format!("m{m}");
        let expected = [("a", parts(2 * m).id()), ("b", parts(2 * m + 1).id())];
        for (layer, artifact) in expected {
            assert_eq!(snapshot.layer(&model, layer).await.unwrap().record().artifact, artifact, "{model}.{layer}");
        }
        let listed = snapshot.layers(&model).await.unwrap();
        let listed: Vec<_> = listed.iter().map(|r| (r.layer.as_str(), r.artifact)).collect();
        assert_eq!(listed, expected, "{model} at {at}");
        assert_eq!(snapshot.summary(&model).await.unwrap().layers, 2);
    }
}

async fn segments(store: &Store, table: &str, indexed: Indexed) -> usize {
    let dataset = store.shared().location.open_table(table, None).await.unwrap();
    dataset.load_indices_by_name(indexed.index).await.unwrap().len()
}

async fn fragments(store: &Store, table: &str) -> usize {
    store.shared().location.open_table(table, None).await.unwrap().fragments().len()
}

fn files(store: &Path, table: &str, folder: &str) -> Vec<PathBuf> {
    fn under(path: &Path, all: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { under(&path, all) } else { all.push(path) }
        }
    }
    let mut all = vec![];
    under(&store.join(format!("{table}.lance")).join(folder), &mut all);
    all
}

/// Small fragments of earlier commits are joined, whatever version is asked for.
#[tokio::test(flavor = "multi_thread")]
async fn many_commits_leave_few_fragments() {
    let folder = tempfile::tempdir().unwrap();
    let limits = Limits { indexed_from: u64::MAX, list: (u64::MAX, 1), large_fragment: 1000, ..SMALL };
    let uri = folder.path().join("layers").display().to_string();
    let store = Store::create_with(&uri, options(limits)).await.unwrap();
    fill(&store, 0..30).await;
    assert!(fragments(&store, LAYERS).await <= 8, "{}", fragments(&store, LAYERS).await);
    assert!(fragments(&store, ARTIFACTS).await <= 8);
    assert_eq!(store.latest().await.unwrap().version(), 31, "one version a commit");
    for version in [2, 7, 19, 31] {
        holds(&store, &version.to_string(), 0..version - 1).await;
    }
    sound(&store).await;
    // Some rows go, some come, some stay.
    save(&store, "m3", &[("a", 6), ("c", 500)], Scope::Model).await;
    save(&store, "m4", &[("b", 501)], Scope::Layers).await;
    let latest = store.latest().await.unwrap();
    let names = |rows: Vec<LayerRecord>| rows.into_iter().map(|r| (r.layer, r.artifact)).collect::<Vec<_>>();
    assert_eq!(names(latest.layers("m3").await.unwrap()), [("a".into(), parts(6).id()), ("c".into(), parts(500).id())]);
    assert_eq!(names(latest.layers("m4").await.unwrap()), [("a".into(), parts(8).id()), ("b".into(), parts(501).id())]);
    holds(&store, "latest", 5..30).await;
    holds(&store, "31", 0..30).await;
    // What is there already is no version.
    assert_eq!(save(&store, "m4", &[("b", 501)], Scope::Layers).await, 33);
}

/// The index is made from some number of rows on, and kept up; every version finds its rows through its own.
#[tokio::test(flavor = "multi_thread")]
async fn rows_are_found_by_an_index() {
    let folder = tempfile::tempdir().unwrap();
    let store = small(folder.path()).await;
    fill(&store, 0..5).await;
    assert_eq!(segments(&store, LAYERS, BY_MODEL).await, 0);
    store.create_snapshot("before").await.unwrap();
    fill(&store, 5..40).await;
    assert!((1..=5).contains(&segments(&store, LAYERS, BY_MODEL).await));
    assert!((1..=5).contains(&segments(&store, ARTIFACTS, BY_ARTIFACT).await));
    assert!((1..=5).contains(&segments(&store, ARTIFACTS, BY_RECIPE).await));
    holds(&store, "before", 0..5).await;
    holds(&store, "latest", 0..40).await;
    let log = store.log().await.unwrap();
    assert!(log.iter().any(|version| version.operation == "index"));
    for version in log.iter().filter(|version| version.operation.starts_with("import")) {
        let m: u64 = version.operation.trim_start_matches("import m").parse().unwrap();
        holds(&store, &version.version.to_string(), m..m + 1).await;
    }
    assert!(!log.iter().any(|version| version.operation == "changed by another program"));
    // Names that are not there.
    let latest = store.latest().await.unwrap();
    assert!(matches!(latest.layer("m7", "c").await, Err(Error::UnknownLayer { closest, .. }) if closest == ["a", "b"]));
    assert!(matches!(latest.layer("n", "a").await, Err(Error::UnknownModel { known, .. }) if known.len() == 40));
    // Whole models change.
    store.remove_model("m1").await.unwrap();
    store.rename_model("m2", "renamed").await.unwrap();
    let latest = store.latest().await.unwrap();
    assert_eq!(latest.layer("renamed", "b").await.unwrap().record().artifact, parts(5).id());
    for gone in ["m1", "m2"] {
        assert!(matches!(latest.rows(gone).await, Err(Error::UnknownModel { .. })), "{gone}");
    }
    sound(&store).await;
    store.restore("before").await.unwrap();
    holds(&store, "latest", 0..5).await;
    fill(&store, 3..12).await;
    holds(&store, "latest", 0..12).await;
    let report = store.verify(|_, _| ()).await.unwrap();
    assert!(report.is_sound(), "{report:?}");
}

/// Recipes and artifacts that the index covers are found, and not written again.
#[tokio::test(flavor = "multi_thread")]
async fn artifacts_are_found_by_an_index() {
    let folder = tempfile::tempdir().unwrap();
    let store = small(folder.path()).await;
    fill(&store, 0..20).await;
    let mut writer = store.writer().await.unwrap();
    for number in 0..40 {
        let made = writer.made_by(&provenance_of(number).recipe).await.unwrap().unwrap().artifact;
        assert_eq!(made, parts(number).id());
        assert!(writer.reusable(&provenance_of(number).recipe).await.unwrap().is_some());
        assert!(!writer.add(&parts(number), provenance_of(number)).await.unwrap().1, "{number} is there");
    }
    assert!(writer.made_by(&[7; 32]).await.unwrap().is_none());
    assert_eq!(writer.written_bytes(), 0);
    drop(writer);
    // A record that nobody added is of an artifact that the store has.
    let writer = store.writer().await.unwrap();
    writer.commit("again", &[record("again", "x", &parts(0))], None).await.unwrap();
    let loaded = store.latest().await.unwrap().layer("again", "x").await.unwrap().load().await.unwrap();
    assert_eq!(loaded.to_parts().id(), parts(0).id());
    let writer = store.writer().await.unwrap();
    let unknown = writer.commit("again", &[record("again", "x", &parts(999))], None).await.unwrap_err();
    assert!(unknown.to_string().contains("artifact of layer 'x'"), "{unknown}");
    let recipes = store.latest().await.unwrap().recipes(&[parts(3).id(), ArtifactId([1; 32])]).await.unwrap();
    assert_eq!(recipes.get(&parts(3).id()), Some(&provenance_of(3).recipe));
    assert!(!recipes.contains_key(&ArtifactId([1; 32])));
}

/// Neither a lookup nor a commit reads what it has nothing to do with: it is not even there.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_read_whole() {
    let folder = tempfile::tempdir().unwrap();
    let store = small(folder.path()).await;
    fill(&store, 0..40).await;
    store.create_snapshot("all").await.unwrap();
    let place = folder.path().join("layers");
    let location = &store.shared().location;
    let needed = |dataset: &lance::Dataset, addresses: &[u64]| -> BTreeSet<String> {
        let ids: BTreeSet<u64> = addresses.iter().map(|address| address >> 32).collect();
        let fragments = dataset.fragments().iter().filter(|f| ids.contains(&f.id));
        fragments.map(|fragment| fragment.files[0].path.clone()).collect()
    };
    // What lies in fragments that the index covers and that do not hold the model is moved away.
    let dataset = Arc::new(location.open_table(LAYERS, None).await.unwrap());
    let lookup = Lookup::open(&dataset, BY_MODEL).await.unwrap();
    let hits = lookup.hits("m0".into()).await.unwrap();
    assert_eq!(hits.addresses.len(), 2);
    let mut kept = needed(&dataset, &hits.addresses);
    kept.extend(lookup.rest().iter().map(|fragment| fragment.files[0].path.clone()));
    let artifacts = Arc::new(location.open_table(ARTIFACTS, None).await.unwrap());
    let list = Lookup::open(&artifacts, BY_ARTIFACT).await.unwrap();
    let recipes = Lookup::open(&artifacts, BY_RECIPE).await.unwrap();
    let rest = list.rest().iter().chain(recipes.rest());
    let mut listed: BTreeSet<String> = rest.map(|fragment| fragment.files[0].path.clone()).collect();
    for number in [0, 1] {
        let hash = ScalarValue::FixedSizeBinary(32, Some(parts(number).id().0.to_vec()));
        let hits = list.hits(hash).await.unwrap();
        assert_eq!(hits.addresses.len(), 1);
        listed.extend(needed(&artifacts, &hits.addresses));
    }
    let mut moved = vec![];
    for (table, kept) in [(LAYERS, &kept), (ARTIFACTS, &listed)] {
        for file in files(&place, table, "data") {
            if !kept.contains(file.file_name().unwrap().to_str().unwrap()) {
                let away = folder.path().join(format!("{table}-{}", file.file_name().unwrap().to_str().unwrap()));
                std::fs::rename(&file, &away).unwrap();
                moved.push((away, file));
            }
        }
    }
    assert!(moved.len() > 4, "{} files", moved.len());
    let uri = place.display().to_string();
    let limits = Limits { uncovered: 1000, list: (12, 1000), ..SMALL };
    let store = Store::open_with(&uri, options(limits)).await.unwrap();
    holds(&store, "latest", 0..1).await;
    holds(&store, "all", 0..1).await;
    let before = store.latest().await.unwrap().version();
    fill(&store, 50..52).await;
    save(&store, "m0", &[("a", 0), ("b", 1), ("c", 700)], Scope::Model).await;
    assert_eq!(store.latest().await.unwrap().version(), before + 3);
    store.create_snapshot("more").await.unwrap();
    holds(&store, "more", 50..52).await;
    assert_eq!(store.at("more").await.unwrap().layers("m0").await.unwrap().len(), 3);
    for (away, file) in moved {
        std::fs::rename(away, file).unwrap();
    }
    let store = small(folder.path()).await;
    holds(&store, "latest", 1..40).await;
    let report = store.verify(|_, _| ()).await.unwrap();
    assert!(report.is_sound(), "{report:?}");
}

/// Without an index that can be read, its rows are read; `verify` tells of it, and `repair` and the next commit make it anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_index_costs_time_alone() {
    for damage in ["cut", "removed", "other bytes"] {
        let folder = tempfile::tempdir().unwrap();
        let store = small(folder.path()).await;
        fill(&store, 0..20).await;
        let place = folder.path().join("layers");
        for table in [LAYERS, ARTIFACTS] {
            let all = files(&place, table, "_indices");
            assert!(!all.is_empty());
            for file in all {
                match damage {
                    "cut" => std::fs::write(&file, &std::fs::read(&file).unwrap()[..10]).unwrap(),
                    "removed" => std::fs::remove_file(&file).unwrap(),
                    _ => std::fs::write(&file, vec![0x5a; std::fs::metadata(&file).unwrap().len() as usize]).unwrap(),
                }
            }
        }
        let store = Store::open_with(&place.display().to_string(), options(SMALL)).await.unwrap();
        holds(&store, "latest", 0..20).await;
        let found = store.verify(|_, _| ()).await.unwrap().damaged;
        let mut tables: Vec<&str> = found.iter().map(|d| d.table.as_str()).collect();
        tables.dedup();
        assert_eq!(tables, [LAYERS, ARTIFACTS], "{damage}: {found:?}");
        fill(&store, 20..40).await;
        holds(&store, "latest", 0..40).await;
        let options = crate::compress::RepairOptions::default();
        let repaired = crate::compress::repair(&store, options).await.unwrap();
        assert!(repaired.is_sound(), "{damage}: {repaired:?}");
        let report = store.verify(|_, _| ()).await.unwrap();
        assert!(report.is_sound(), "{damage}: {report:?}");
        holds(&store, "latest", 0..40).await;
    }
}

/// gc joins what many commits left, and all snapshots stay as they are.
#[tokio::test(flavor = "multi_thread")]
async fn gc_joins_fragments() {
    let folder = tempfile::tempdir().unwrap();
    let never = Limits { joined: usize::MAX, ..SMALL };
    let uri = folder.path().join("layers").display().to_string();
    let store = Store::create_with(&uri, options(never)).await.unwrap();
    fill(&store, 0..30).await;
    store.create_snapshot("thirty").await.unwrap();
    store.remove_model("m2").await.unwrap();
    assert!(fragments(&store, LAYERS).await >= 29 && fragments(&store, ARTIFACTS).await == 30);
    let store = small(folder.path()).await;
    store.gc(Duration::ZERO, true).await.unwrap();
    assert_eq!((fragments(&store, LAYERS).await, fragments(&store, ARTIFACTS).await), (1, 1));
    for (table, indexed) in [(LAYERS, BY_MODEL), (ARTIFACTS, BY_ARTIFACT), (ARTIFACTS, BY_RECIPE)] {
        assert_eq!(segments(&store, table, indexed).await, 1, "{table}");
    }
    holds(&store, "thirty", 0..30).await;
    holds(&store, "latest", 3..30).await;
    assert_eq!(store.log().await.unwrap()[0].operation, "gc");
    fill(&store, 30..33).await;
    holds(&store, "latest", 3..33).await;
    let version = store.latest().await.unwrap().version();
    store.gc(Duration::ZERO, true).await.unwrap();
    assert_eq!(store.latest().await.unwrap().version(), version, "there is nothing to be joined");
    let report = store.verify(|_, _| ()).await.unwrap();
    assert!(report.is_sound(), "{report:?}");
}

/// A change that was made of another version than the latest is not committed behind it, lock or no lock.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_is_of_the_next_version_or_none() {
    let folder = tempfile::tempdir().unwrap();
    let store = small(folder.path()).await;
    fill(&store, 0..2).await;
    let location = &store.shared().location;
    let stale = catalogue::writable(location).await.unwrap();
    fill(&store, 2..3).await;
    let latest = store.latest().await.unwrap().version();
    let batches = layers_batches(&[record("m2", "a", &parts(0))]).unwrap();
    let committed = update::commit(stale, &[], batches, (&[], &SMALL, None)).await;
    assert!(is_conflict(&committed.unwrap_err()));
    assert_eq!(store.latest().await.unwrap().version(), latest);
    holds(&store, "latest", 0..3).await;
}

/// A store that was made before there were indices gets them at the first change.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_store_gets_an_index() {
    let folder = tempfile::tempdir().unwrap();
    let uri = super::kept_store(folder.path());
    let limits = Limits { indexed_from: 1, list: (1, 4), ..SMALL };
    let store = Store::open_with(&uri, options(limits)).await.unwrap();
    let before = store.latest().await.unwrap().records().await.unwrap();
    fill(&store, 0..1).await;
    assert_eq!(segments(&store, LAYERS, BY_MODEL).await, 1);
    fill(&store, 1..2).await;
    assert_eq!(segments(&store, ARTIFACTS, BY_RECIPE).await, 1);
    let latest = store.latest().await.unwrap();
    for record in before {
        assert_eq!(latest.layer(&record.model, &record.layer).await.unwrap().record(), &record);
    }
    holds(&store, "latest", 0..2).await;
    sound(&store).await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 40, ..ProptestConfig::default() })]

    /// Whatever is put in the place of whatever, the catalogue holds what a map does.
    #[test]
    fn commits_are_those_of_a_map(
        changes in prop::collection::vec(
            (0..4u8, 0..3u8, prop::collection::btree_map(0..5u8, 0..6u64, 0..4)), 1..14,
        ),
        with_index in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let from = if with_index { 3 } else { u64::MAX };
            let limits = Limits { indexed_from: from, uncovered: 2, list: (from, 2), ..SMALL };
            let uri = folder.path().join("layers").display().to_string();
            let store = Store::create_with(&uri, options(limits)).await.unwrap();
            let mut expected: BTreeMap<(String, String), ArtifactId> = BTreeMap::new();
            for (model, scope, layers) in changes {
                let model = format!("m{model}");
                let named: Vec<(String, u64)> = layers.iter().map(|(l, n)| (format!("l.{l}"), *n)).collect();
                let named: Vec<(&str, u64)> = named.iter().map(|(l, n)| (l.as_str(), *n)).collect();
                let scope = [Scope::Model, Scope::Layers, Scope::Part("l.1")][scope as usize];
                save(&store, &model, &named, scope).await;
                expected.retain(|(m, l), _| *m != model || match scope {
                    Scope::Model => false,
                    Scope::Part(_) => l != "l.1",
                    _ => true,
                });
                for (layer, number) in named {
                    expected.insert((model.clone(), layer.to_owned()), parts(number).id());
                }
                let rows = store.latest().await.unwrap().records().await.unwrap();
                let rows: Vec<_> = rows.into_iter().map(|r| ((r.model, r.layer), r.artifact)).collect();
                assert_eq!(rows, expected.clone().into_iter().collect::<Vec<_>>());
            }
            let latest = store.latest().await.unwrap();
            for ((model, layer), artifact) in &expected {
                assert_eq!(latest.layer(model, layer).await.unwrap().record().artifact, *artifact);
            }
            let dataset = catalogue::open(&store.shared().location, None).await.unwrap();
            assert_eq!(dataset.count_rows(None).await.unwrap(), expected.len());
        });
    }
}
