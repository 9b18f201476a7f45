//! Rows of the catalogue, read.

use std::sync::Arc;

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::UInt64Type;
use futures::{FutureExt, TryStreamExt};
use lance::Dataset;
use lance::deps::datafusion::scalar::ScalarValue;
use lance::table::format::Fragment;

use super::location::Location;
use super::lookup::{BY_MODEL, Lookup};
use super::names::FoundRow;
use super::record::{LayerRecord, read_layers};
use super::scan::{ROW_ADDRESS, batch_rows, rows_at};
use super::schema::LAYERS;
use super::waiting::Waiting;
use crate::error::{Error, Result};

const READING: &str = "reading the catalogue";

/// A row of the catalogue, with its address.
pub type AddressedRow = (u64, LayerRecord);

/// Reads the rows that `filter` (SQL) selects, by model and layer.
pub async fn rows(location: &Location, dataset: &Dataset, filter: Option<&str>) -> Result<Vec<LayerRecord>> {
    let batches = scanned(location, dataset, (dataset.fragments(), filter)).boxed().during(READING).await?;
    Ok(by_name(addressed(location, batches)?).into_iter().map(|(_, record)| record).collect())
}

/// Reads the rows of fragments, by model and layer.
pub async fn rows_in(location: &Location, dataset: &Dataset, fragments: &[Fragment]) -> Result<Vec<LayerRecord>> {
    let batches = scanned(location, dataset, (fragments, None)).boxed().during(READING).await?;
    Ok(by_name(addressed(location, batches)?).into_iter().map(|(_, record)| record).collect())
}

/// Reads all rows, by model and layer.
pub async fn all_rows(location: &Location, dataset: &Dataset) -> Result<Vec<AddressedRow>> {
    let batches = scanned(location, dataset, (dataset.fragments(), None)).boxed().during(READING).await?;
    Ok(by_name(addressed(location, batches)?))
}

/// Reads the rows of models, by model and layer: what the index does not cover is read whole, and no more.
pub async fn rows_of(location: &Location, dataset: &Arc<Dataset>, models: &[&str]) -> Result<Vec<AddressedRow>> {
    let read = async {
        let lookup = Lookup::open(dataset, BY_MODEL).await?;
        let (mut addresses, mut fragments) = (vec![], lookup.rest().to_vec());
        for model in models {
            let hits = lookup.hits(ScalarValue::from(*model)).await?;
            addresses.extend(hits.addresses);
            fragments.extend(hits.unread);
        }
        addresses.sort_unstable();
        addresses.dedup();
        fragments.sort_unstable_by_key(|fragment| fragment.id);
        fragments.dedup_by_key(|fragment| fragment.id);
        let named: Vec<String> = models.iter().copied().map(quoted).collect();
        let filter = format!("model IN ({})", named.join(", "));
        let mut batches = scanned(location, dataset, (&fragments, Some(&filter))).await?;
        batches.extend(taken(location, dataset, &addresses).await?);
        Ok(batches)
    };
    let mut rows = addressed(location, read.boxed().during(READING).await?)?;
    // An address is where the index says that the model is.
    rows.retain(|(_, record)| models.contains(&record.model.as_str()));
    Ok(by_name(rows))
}

/// Returns the row that was found, which is read unless it is at hand.
pub async fn row(location: &Location, dataset: &Arc<Dataset>, found: FoundRow) -> Result<LayerRecord> {
    let batches = match found.row {
        Some(row) => vec![row],
        None => taken(location, dataset, &[found.address]).boxed().during(READING).await?,
    };
    let mut rows = addressed(location, batches)?;
    rows.pop().map(|(_, record)| record).ok_or_else(|| Error::expected("rows of the catalogue", "none", "1"))
}

/// Reads the rows of fragments that `filter` selects, with their addresses.
async fn scanned(
    location: &Location,
    dataset: &Dataset,
    (fragments, filter): (&[Fragment], Option<&str>),
) -> lance::Result<Vec<RecordBatch>> {
    if fragments.is_empty() {
        return Ok(vec![]);
    }
    let mut scan = dataset.scan();
    scan.project(&location.formats().known_columns(LAYERS, dataset))?
        .batch_size(batch_rows(dataset))
        .use_scalar_index(false)
        .with_row_address();
    if fragments.len() < dataset.fragments().len() {
        scan.with_fragments(fragments.to_vec());
    }
    if let Some(filter) = filter {
        scan.filter(filter)?;
    }
    scan.try_into_stream().await?.try_collect().await
}

/// Reads the rows at addresses, as [`rows_at`] does.
async fn taken(location: &Location, dataset: &Arc<Dataset>, addresses: &[u64]) -> lance::Result<Vec<RecordBatch>> {
    let columns = dataset.schema().project(&location.formats().known_columns(LAYERS, dataset))?;
    rows_at(dataset, addresses, &columns).await
}

fn addressed(location: &Location, batches: Vec<RecordBatch>) -> Result<Vec<AddressedRow>> {
    let mut rows = vec![];
    for batch in batches {
        let addresses = batch.column_by_name(ROW_ADDRESS).and_then(|c| c.as_primitive_opt::<UInt64Type>()).cloned();
        let addresses =
            addresses.ok_or_else(|| Error::expected("rows of the catalogue", "no addresses", "their addresses"))?;
        let batch = location.formats().completed(LAYERS, batch).map_err(|e| Error::storage(READING, e))?;
        rows.extend(addresses.values().iter().copied().zip(read_layers(&batch)?));
    }
    Ok(rows)
}

fn by_name(mut rows: Vec<AddressedRow>) -> Vec<AddressedRow> {
    rows.sort_by(|(_, a), (_, b)| (&a.model, &a.layer).cmp(&(&b.model, &b.layer)));
    rows
}

/// Returns a text as an SQL literal.
pub fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}
