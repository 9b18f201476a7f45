//! Whole models of the catalogue, removed and renamed. Older versions keep them, and gc removes artifacts that nothing reaches any
//! more.

use std::sync::Arc;

use lance::Dataset;

use super::catalogue::{Catalogue, writable};
use super::change::{Change, Made, Scope, Seen, replace};
use super::location::Location;
use super::lock;
use super::record::LayerRecord;
use super::rows::rows_of;
use super::strict::Attempts;
use super::writer::check_model_name;
use crate::error::{Error, Result};

/// Removes a model from the catalogue, as one new version, and returns the version.
///
/// # Errors
/// [`Error::UnknownModel`] when the latest version has no such model, and when the storage refuses.
pub async fn remove(location: &Location, model: &str) -> Result<u64> {
    let guard = lock::changing(location).await?;
    let latest = Arc::new(writable(location).await?);
    if rows_of(location, &latest, &[model]).await?.is_empty() {
        return Err(unknown(latest, model).await?);
    }
    let made = Made { operation: "remove", message: None, tables: &Seen::nothing() };
    replace((location, &guard), (model, Scope::Model), &[], made).await
}

/// Gives a model another name, as one new version, and returns the version.
///
/// # Errors
/// [`Error::UnknownModel`] when the latest version has no such model, [`Error::ModelExists`] when it has one of the new name,
/// [`Error::InvalidName`] when that is no name for a model, and when the storage refuses.
pub async fn rename(location: &Location, model: &str, name: &str) -> Result<u64> {
    check_model_name(name)?;
    let guard = lock::changing(location).await?;
    let mut attempts = Attempts::begin();
    loop {
        let latest = Arc::new(writable(location).await?);
        let (renamed, others): (Vec<_>, Vec<_>) =
            rows_of(location, &latest, &[model, name]).await?.into_iter().partition(|(_, r)| r.model == model);
        if renamed.is_empty() {
            return Err(unknown(latest, model).await?);
        }
        // Also the name that it has.
        let taken = if model == name { renamed.len() } else { others.len() };
        if taken > 0 {
            return Err(Error::ModelExists { name: name.to_owned(), layers: taken });
        }
        let records: Vec<LayerRecord> =
            renamed.iter().map(|(_, record)| LayerRecord { model: name.to_owned(), ..record.clone() }).collect();
        let operation = format!("rename {model} to {name}");
        let made = Made { operation: &operation, message: None, tables: &Seen::nothing() };
        let change = Change { model, records: &records, present: &renamed, made };
        if let Some(version) = change.commit((location, &guard), Arc::unwrap_or_clone(latest), &mut attempts).await? {
            return Ok(version);
        }
    }
}

async fn unknown(latest: Arc<Dataset>, model: &str) -> Result<Error> {
    let at = format!("version {}", latest.version_id());
    let known = Catalogue::from(Arc::unwrap_or_clone(latest)).models().await?;
    Ok(Error::UnknownModel { model: model.to_owned(), at, known })
}
