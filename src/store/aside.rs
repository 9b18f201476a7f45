//! Files taken out of a table: removed, or kept beside their places under another name for whoever may still read something of
//! them.

use lance_io::object_store::{ObjectStore as LanceStore, ObjectStoreParams};
use object_store::ObjectStoreExt;
use object_store::path::Path;

use super::location::Location;
use crate::error::{Error, Result};

/// What the name of a file that was set aside ends with.
const ENDING: &str = ".damaged";

/// Removes a file of a folder of a table, if it is there.
///
/// # Errors
/// When the storage refuses.
pub async fn remove(location: &Location, place: (&str, &str), file: &str) -> Result<()> {
    let action = || format!("removing file '{file}' of table '{}'", place.0);
    let (store, folder) = folder(location, place).await.map_err(|e| Error::storage(action(), e))?;
    match store.inner.delete(&folder.join(file)).await {
        Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
        Err(e) => Err(Error::storage(action(), e)),
    }
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
