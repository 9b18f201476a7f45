//! Artifacts that lie in a table more than once, as two imports at once, or one that was killed, leave them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{provenance, sound, tensor};
use crate::compress::{RepairOptions, RepairSource, repair};
use crate::layer::{DType, Parts};
use crate::store::record::{LayerRecord, Source};
use crate::store::remedy::Remedy;
use crate::store::root::Store;
use crate::store::schema::{ARTIFACTS, WEIGHT_BLOCKS};
use crate::store::versions;
use crate::store::writer::Writer;

/// A row of the catalogue for an artifact.
fn row(model: &str, parts: &Parts) -> LayerRecord {
    LayerRecord {
        model: model.into(),
        layer: "layer".into(),
        method: parts.method.clone(),
        in_features: 300,
        out_features: 40,
        artifact: parts.id(),
        relative_error: Some(0.0),
        error_basis: provenance(1).error_basis,
        dense_bytes: 12_000,
        stored_bytes: parts.stored_bytes(),
        config: parts.config.clone(),
        source: Source::default(),
        created_at: chrono::Utc::now(),
        locations: Default::default(),
    }
}

/// A store to which two writers at once have added an artifact and another of their own, and the files of the two copies: the first
/// is the one that the list leads to, and the model `second` to the other.
async fn twice(folder: &Path) -> (Store, Parts, [PathBuf; 2]) {
    let uri = folder.join("layers").display().to_string();
    Store::create(&uri).await.unwrap();
    let store = Store::open(&uri).await.unwrap();
    let parts = tensor(DType::U8, vec![40, 300], 1);
    let mut writers: Vec<Writer> = vec![store.writer().await.unwrap(), store.writer().await.unwrap()];
    for (own, writer) in writers.iter_mut().enumerate() {
        writer.add(&parts, provenance(1)).await.unwrap();
        writer.add(&tensor(DType::U8, vec![40, 300], 2 + own as u64), provenance(2 + own as u8)).await.unwrap();
        writer.flush().await.unwrap();
    }
    let second = writers.pop().unwrap();
    drop(writers);
    second.commit("second", &[row("second", &parts)], None).await.unwrap();
    let listed = store.shared().data.listings().await.unwrap();
    let files: Vec<PathBuf> = listed
        .iter()
        .filter(|record| record.artifact == parts.id())
        .map(|record| {
            let file = &record.locations.0[WEIGHT_BLOCKS].ranges[0].file;
            folder.join("layers").join(format!("{WEIGHT_BLOCKS}.lance/data/{file}"))
        })
        .collect();
    assert_eq!(files.iter().collect::<BTreeSet<_>>().len(), 2);
    (store, parts, files.try_into().unwrap())
}

/// Flips a byte of the rows in a file.
fn damage(file: &Path) {
    let mut bytes = std::fs::read(file).unwrap();
    let at = bytes.len() / 4;
    bytes[at] ^= 0x40;
    std::fs::write(file, bytes).unwrap();
}

async fn loaded(store: &Store, model: &str) -> Parts {
    let latest = Store::open(store.uri()).await.unwrap().latest().await.unwrap();
    latest.handles(model).await.unwrap().remove(0).load().await.unwrap().to_parts()
}

/// gc keeps the copy that the list leads to, which is the one that `verify` and imports hash.
#[tokio::test(flavor = "multi_thread")]
async fn gc_keeps_the_copy_that_is_listed() {
    for listed in [0, 1] {
        let folder = tempfile::tempdir().unwrap();
        let (store, parts, files) = twice(folder.path()).await;
        // The other row of the list goes: who wrote it was killed before.
        let list = store.shared().location.open_for_write(ARTIFACTS).await.unwrap();
        let rows = format!("artifact = X'{}'", parts.id());
        let all = list.count_rows(Some(rows.clone())).await.unwrap();
        let mut list = list;
        list.delete(&format!("{rows} AND _rowaddr {} {}", if listed == 0 { ">=" } else { "<" }, 1u64 << 32))
            .await
            .unwrap();
        assert_eq!((all, list.count_rows(Some(rows)).await.unwrap()), (2, 1));
        damage(&files[1 - listed]);
        store.gc(Duration::ZERO, true).await.unwrap();
        assert_eq!(loaded(&store, "second").await, parts, "{listed}");
        sound(&store).await;
        assert_eq!(store.gc(Duration::ZERO, false).await.unwrap().stray_rows, 0);
    }
}

/// A copy that a version leads to, and the list does not, is looked at, and a repair leaves none that is damaged.
#[tokio::test(flavor = "multi_thread")]
async fn every_copy_that_is_read_is_verified() {
    for damaged in [0, 1] {
        let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (store, parts, files) = twice(folder.path()).await;
        let (whole, ..) = twice(other.path()).await;
        sound(&store).await;
        damage(&files[damaged]);
        let store = Store::open(store.uri()).await.unwrap();
        let report = store.verify(|_, _| ()).await.unwrap();
        let found = report.corrupt.iter().find(|c| c.artifact == parts.id().to_string());
        assert_eq!(found.unwrap().help, [Remedy::RepairFromStore], "{report:?}");
        let sources = vec![RepairSource::open(whole.uri()).await.unwrap()];
        let repaired = repair(&store, RepairOptions { sources, ..RepairOptions::default() }).await.unwrap();
        assert!(repaired.is_sound(), "{repaired:?}");
        sound(&store).await;
        assert_eq!(loaded(&store, "second").await, parts);
        store.gc(Duration::ZERO, true).await.unwrap();
        sound(&store).await;
        assert_eq!(loaded(&store, "second").await, parts);
    }
}

/// What only an older version names is completed as well where a repair asks for it, and by an import once anything is found to be
/// missing.
#[tokio::test(flavor = "multi_thread")]
async fn repairs_ask_all_versions() {
    let folder = tempfile::tempdir().unwrap();
    let uri = folder.path().join("layers").display().to_string();
    Store::create(&uri).await.unwrap();
    let store = Store::open(&uri).await.unwrap();
    let mut ids = vec![];
    for seed in [1, 2] {
        let parts = tensor(DType::U8, vec![40, 300], seed);
        let mut writer = store.writer().await.unwrap();
        writer.add(&parts, provenance(seed as u8)).await.unwrap();
        writer.commit("m", &[row("m", &parts)], None).await.unwrap();
        ids.push(parts.id());
    }
    // The list's row of the first import, whose artifact the latest version does not use.
    let mut list = store.shared().location.open_for_write(ARTIFACTS).await.unwrap();
    list.delete(&format!("artifact = X'{}'", ids[0])).await.unwrap();
    let store = Store::open(&uri).await.unwrap();
    drop(store.writer().await.unwrap());
    let found = store.verify(|_, _| ()).await.unwrap().corrupt;
    assert_eq!((found.len(), found[0].help.as_slice()), (1, &[Remedy::Repair][..]));
    let repaired = repair(&store, RepairOptions::default()).await.unwrap();
    assert!(repaired.is_sound() && repaired.listed == [ids[0].to_string()], "{repaired:?}");
    sound(&store).await;
    let first = versions::log(&store.shared().location, store.latest().await.unwrap().dataset()).await.unwrap();
    let first = first.iter().rev().find(|version| version.operation.starts_with("import")).unwrap().version;
    store.restore(&first.to_string()).await.unwrap();
    assert_eq!(loaded(&store, "m").await.id(), ids[0]);
}
