//! What a store's place holds: its tables, and how many bytes.

use std::path::Path;

use futures::TryStreamExt;
use object_store::ObjectStore;

use super::location::{Location, Place};
use super::schema::Table;
use crate::error::{Error, Result};

/// Returns the bytes of all files of a store, on the local file system or in memory.
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
        Place::Remote => None,
    }
}

/// Lists the store's data tables, by name.
pub async fn data_tables(location: &Location) -> Result<Vec<(String, Table)>> {
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
    Ok(names.into_iter().filter_map(|n| Table::named(&n).map(|t| (n, t))).collect())
}
