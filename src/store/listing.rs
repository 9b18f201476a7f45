//! What a store's place holds: its tables, and how many bytes.

use std::path::{Path, PathBuf};

use futures::TryStreamExt;
use lance_io::object_store::{ObjectStore as LanceStore, ObjectStoreParams};
use object_store::ObjectStore;

use super::layout::is_staged;
use super::location::Location;
use super::place::Place;
use super::schema::Table;
use super::waiting::Waiting;
use crate::error::{Error, Result};

/// Returns the bytes of all files of a store; `None` where they cannot be listed.
pub async fn disk_bytes(location: &Location) -> Option<u64> {
    fn under(path: &Path) -> u64 {
        let Ok(entries) = std::fs::read_dir(path) else { return 0 };
        entries
            .filter_map(|e| e.ok())
            .map(|e| match e.file_type() {
                Ok(kind) if kind.is_dir() => under(&e.path()),
                _ => e.metadata().map_or(0, |m| m.len()),
            })
            .sum()
    }
    match location.place() {
        Place::Local(path) => Some(under(path)),
        Place::Memory(memory) => {
            memory.files().list(None).try_fold(0, |sum, file| async move { Ok(sum + file.size) }).await.ok()
        }
        Place::Remote => {
            let (files, root) = location.own_files().await.ok()?;
            let listed = files.inner.list(Some(&root));
            listed.try_fold(0, |sum, file| async move { Ok(sum + file.size) }).await.ok()
        }
    }
}

/// Returns the files that writers of a local store have begun and not moved to their places, with their bytes: the object store
/// calls them by their names to be, `#` and a number, and Lance calls a snapshot's by `.json.tmp.` and an id. Whoever removes them
/// holds the locks that say that no writer is at work.
pub fn staged_files(location: &Location) -> Vec<(PathBuf, u64)> {
    fn under(path: &Path, all: &mut Vec<(PathBuf, u64)>) {
        let Ok(entries) = std::fs::read_dir(path) else { return };
        for entry in entries.filter_map(|e| e.ok()) {
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() {
                under(&entry.path(), all);
            } else if kind.is_file() && is_staged(&entry.file_name().to_string_lossy()) {
                all.push((entry.path(), entry.metadata().map_or(0, |m| m.len())));
            }
        }
    }
    let mut all = vec![];
    if let Some(store) = location.local() {
        let tables = std::fs::read_dir(store).into_iter().flatten().filter_map(|e| e.ok());
        // Only in the folders of tables: what else lies in the directory is not the store's.
        let tables = tables.filter(|e| e.file_name().to_string_lossy().ends_with(".lance"));
        tables.for_each(|table| under(&table.path(), &mut all));
    }
    all
}

/// Returns the names of the files in a folder of a table, and of the folders in it; none where there is no such folder.
///
/// # Errors
/// When the storage refuses.
pub async fn names_in(location: &Location, table: &str, folder: &[&str]) -> Result<Vec<String>> {
    let listing = async {
        let registry = location.session().store_registry();
        let (store, root) =
            LanceStore::from_uri_and_params(registry, &location.table_uri(table), &ObjectStoreParams::default())
                .await?;
        store.read_dir(folder.iter().fold(root, |path, part| path.join(*part))).await
    };
    let mut names = listing.during(format!("listing {} of table '{table}'", folder.join("/"))).await?;
    names.sort();
    Ok(names)
}

/// Lists the folders of tables, by the tables' names: also of tables that have no version that can be opened.
///
/// # Errors
/// When the storage refuses.
pub async fn table_folders(location: &Location) -> Result<Vec<String>> {
    // LanceDB makes the directory that it is to list.
    if location.local().is_some_and(|store| !store.exists()) {
        return Ok(vec![]);
    }
    let refused = |e: lancedb::Error| Error::storage(format!("listing the tables of {}", location.uri()), e);
    let connection = lancedb::connect(location.uri()).session(location.session().clone()).execute().await;
    let connection = connection.map_err(refused)?;
    let mut names = Vec::new();
    // LanceDB lists a page at a time.
    loop {
        let mut page = connection.table_names().limit(1000);
        if let Some(last) = names.last() {
            page = page.start_after(String::clone(last));
        }
        let page = page.execute().await.map_err(refused)?;
        if page.is_empty() {
            break;
        }
        names.extend(page);
    }
    Ok(names)
}

/// Lists the store's data tables, by name.
pub async fn data_tables(location: &Location) -> Result<Vec<(String, Table)>> {
    let names = table_folders(location).await?;
    Ok(names.into_iter().filter_map(|n| Table::named(&n).map(|t| (n, t))).collect())
}
