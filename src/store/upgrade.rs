//! A store brought to a newer format version: columns are added to its tables, and no row is written anew.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::{Schema, SchemaRef};
use lance::Dataset;
use lance::dataset::transaction::{Operation, TransactionBuilder};

use super::catalogue::{open, writable};
use super::format::Format;
use super::listing::data_tables;
use super::location::Location;
use super::lock;
use super::properties::{TableVersions, properties};
use super::schema::ARTIFACTS;
use super::strict::next_version;
use super::waiting::{Waiting, storage_error};
use crate::error::Result;

/// How long an upgrade waits for imports to finish before it gives up.
const PATIENCE: Duration = Duration::from_secs(10);

/// Brings a store to the newest format that is known here, and returns its version.
///
/// # Errors
/// When an import is at work and does not finish in time, or the storage refuses. Then some tables may have columns that
/// the store's version does not know, which every reader passes over.
pub async fn upgrade(location: &Location) -> Result<u32> {
    let formats = location.formats();
    let format = formats.newest();
    if location.format_of(&open(location, None).await?)?.version == format.version {
        return Ok(format.version);
    }
    let (held, _commit) = (lock::collecting(location, "upgrade", PATIENCE).await?, lock::committing(location).await?);
    held.fence(location).await?;
    let catalogue = writable(location).await?;
    if location.format_of(&catalogue)?.version == format.version {
        return Ok(format.version);
    }
    let mut tables: Vec<String> = data_tables(location).await?.into_iter().map(|(name, _)| name).collect();
    tables.push(ARTIFACTS.into());
    for name in tables {
        let action = || format!("adding columns to table '{name}'");
        let dataset = match location.open_for_write(&name).await {
            Ok(dataset) => dataset,
            Err(lance::Error::DatasetNotFound { .. }) => continue,
            Err(e) => return Err(storage_error(action())(e)),
        };
        if let Some(schema) = formats.schema(&name, format.version) {
            with_columns(dataset, &schema, None).during(action()).await?;
        }
    }
    // The catalogue last: with it the store is of the newer version.
    with_format(location, catalogue, format).await?;
    Ok(format.version)
}

/// Gives the catalogue the columns and the number of a format version, as a new version of the store, where it is of an
/// older format.
pub async fn with_format(location: &Location, catalogue: Dataset, format: &Format) -> Result<Dataset> {
    if location.format_of(&catalogue)?.version >= format.version {
        return Ok(catalogue);
    }
    let tables = TableVersions::said_by(&catalogue).await;
    let properties = properties(format!("upgrade to format {}", format.version), None, tables.as_ref());
    let schema = location.formats().catalogue(format.version);
    with_columns(catalogue, &schema, properties).during("changing the format of the catalogue").await
}

/// Adds the columns of a schema that a table lacks, all null, and the schema's metadata, in one commit.
async fn with_columns(
    dataset: Dataset,
    schema: &SchemaRef,
    properties: Option<Arc<HashMap<String, String>>>,
) -> lance::Result<Dataset> {
    let missing = schema.fields().iter().filter(|field| dataset.schema().field(field.name()).is_none());
    let missing: Vec<_> = missing.cloned().collect();
    let named = schema.metadata().iter().all(|(key, value)| dataset.schema().metadata.get(key) == Some(value));
    if missing.is_empty() && named {
        return Ok(dataset);
    }
    let mut merged = dataset.schema().merge(&Schema::new(missing))?;
    merged.try_set_field_id(Some(dataset.manifest().max_field_id()))?;
    merged.metadata.extend(schema.metadata().clone());
    // As Lance's own `add_columns` does for columns of nulls, which cannot change metadata in the same commit.
    let operation =
        Operation::Merge { fragments: dataset.fragments().to_vec(), schema: merged, preserves_nullability: true };
    let transaction =
        TransactionBuilder::new(dataset.version_id(), operation).transaction_properties(properties).build();
    next_version(Arc::new(dataset)).execute(transaction).await
}
