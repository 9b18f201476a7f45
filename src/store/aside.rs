//! Files taken out of a table: removed, or kept beside their places under another name for whoever may still read something of
//! them.

use futures::{StreamExt, stream};
use lance_io::object_store::{ObjectStore as LanceStore, ObjectStoreParams};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

use super::location::Location;
use crate::error::{Error, Result};

/// What the name of a file that was set aside ends with.
const ENDING: &str = ".damaged";

/// Removes a file of a folder of a table, if it is there.
///
/// # Errors
/// When the storage refuses.
pub async fn remove(location: &Location, place: (&str, &str), file: &str) -> Result<()> {
    remove_all(location, place, vec![file.to_owned()]).await
}

/// Removes files of a folder of a table, those that are there.
///
/// # Errors
/// When the storage refuses.
pub async fn remove_all(location: &Location, place: (&str, &str), files: Vec<String>) -> Result<()> {
    let named = files.join("', '");
    let action = || format!("removing file '{named}' of table '{}'", place.0);
    let (store, folder) = folder(location, place).await.map_err(|e| Error::storage(action(), e))?;
    let paths = files.iter().map(|file| Ok(folder.clone().join(file.as_str()))).collect::<Vec<_>>();
    let mut removed = store.inner.delete_stream(stream::iter(paths).boxed());
    while let Some(done) = removed.next().await {
        match done {
            Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
            Err(e) => return Err(Error::storage(action(), e)),
        }
    }
    Ok(())
}

/// Gives a file of a folder of a table another name, so that it is no part of the table, and returns its new address; `None` where it
/// is not there.
///
/// # Errors
/// When the storage refuses.
pub async fn set_aside(location: &Location, place: (&str, &str), file: &str) -> Result<Option<String>> {
    let action = || format!("setting file '{file}' of table '{}' aside", place.0);
    let (store, folder) = folder(location, place).await.map_err(|e| Error::storage(action(), e))?;
    let to = format!("{file}{ENDING}");
    match store.inner.rename(&folder.clone().join(file), &folder.join(to.as_str())).await {
        Ok(()) => Ok(Some(format!("{}/{}/{to}", location.table_uri(place.0), place.1))),
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(e) => Err(Error::storage(action(), e)),
    }
}

async fn folder(
    location: &Location,
    (table, folder): (&str, &str),
) -> lance::Result<(std::sync::Arc<LanceStore>, Path)> {
    let registry = location.session().store_registry();
    let (store, root) =
        LanceStore::from_uri_and_params(registry, &location.table_uri(table), &ObjectStoreParams::default()).await?;
    Ok((store, root.join(folder)))
}
