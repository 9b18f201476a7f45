//! Versions that change nothing: what was begun on an earlier version of the table, and is of the next one alone, is refused behind them.

use std::sync::Arc;

use lance::dataset::transaction::TransactionBuilder;

use super::location::Location;
use super::properties::{TableVersions, properties};
use super::schema::LAYERS;
use super::strict::{Attempts, is_conflict, next_version, replacing};
use super::waiting::{Waiting, storage_error};
use crate::error::Result;

/// Commits a version of a table that changes nothing, if there is such a table. The log of the catalogue says what it is for.
///
/// # Errors
/// When the storage refuses.
pub async fn commit_unchanged(location: &Location, table: &str, operation: &str) -> Result<()> {
    let action = || format!("committing a version of table '{table}'");
    let mut attempts = Attempts::begin();
    loop {
        let dataset = match location.open_for_write(table).await {
            Ok(dataset) => dataset,
            Err(lance::Error::DatasetNotFound { .. }) => return Ok(()),
            Err(e) => return Err(storage_error(action())(e)),
        };
        let said = match table {
            LAYERS => properties(operation.to_owned(), None, TableVersions::said_by(&dataset).await.as_ref()),
            _ => None,
        };
        let transaction = TransactionBuilder::new(dataset.version_id(), replacing(vec![], vec![], vec![]))
            .transaction_properties(said)
            .build();
        match next_version(Arc::new(dataset)).execute(transaction).caught().await {
            Ok(_) => return Ok(()),
            Err(e) if is_conflict(&e) && attempts.again().await => {}
            Err(e) => return Err(storage_error(action())(e)),
        }
    }
}
