//! Whole models of the catalogue, removed and renamed. Older versions keep them, and gc removes artifacts that nothing reaches any
//! more.

use lance::Dataset;

use super::catalogue::{Catalogue, Change, Scope, quoted, replace, rows, writable};
use super::location::Location;
use super::lock;
use super::record::LayerRecord;
use super::writer::check_model_name;
use crate::error::{Error, Result};

/// Removes a model from the catalogue, as one new version, and returns the version.
///
/// # Errors
/// [`Error::UnknownModel`] when the latest version has no such model, and when the storage refuses.
pub async fn remove(location: &Location, model: &str) -> Result<u64> {
    let _guard = lock::committing(location).await?;
    let latest = writable(location).await?;
    if rows(location, &latest, Some(&format!("model = {}", quoted(model)))).await?.is_empty() {
        return Err(unknown(latest, model).await?);
    }
    replace(location, (model, Scope::Model), &[], "remove", None).await
}

/// Gives a model another name, as one new version, and returns the version.
///
/// # Errors
/// [`Error::UnknownModel`] when the latest version has no such model, [`Error::ModelExists`] when it has one of the new name,
/// [`Error::InvalidName`] when that is no name for a model, and when the storage refuses.
pub async fn rename(location: &Location, model: &str, name: &str) -> Result<u64> {
    check_model_name(name)?;
    let _guard = lock::committing(location).await?;
    let mut attempt = 1;
    loop {
        let latest = writable(location).await?;
        let both = format!("model IN ({}, {})", quoted(model), quoted(name));
        let (renamed, others): (Vec<_>, Vec<_>) =
            rows(location, &latest, Some(&both)).await?.into_iter().partition(|r| r.model == model);
        if renamed.is_empty() {
            return Err(unknown(latest, model).await?);
        }
        // Also the name that it has.
        let taken = if model == name { renamed.len() } else { others.len() };
        if taken > 0 {
            return Err(Error::ModelExists { name: name.to_owned(), layers: taken });
        }
        let records: Vec<LayerRecord> =
            renamed.into_iter().map(|record| LayerRecord { model: name.to_owned(), ..record }).collect();
        let change = Change {
            model,
            records: &records,
            removed: Some(format!("model = {}", quoted(model))),
            operation: format!("rename {model} to {name}"),
            message: None,
        };
        if let Some(version) = change.commit(location, latest, &mut attempt).await? {
            return Ok(version);
        }
    }
}

async fn unknown(latest: Dataset, model: &str) -> Result<Error> {
    let at = format!("version {}", latest.version_id());
    let known = Catalogue::from(latest).names().await?.models();
    Ok(Error::UnknownModel { model: model.to_owned(), at, known })
}
