//! Indices held against the rows that they lead to.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::UInt64Type;
use futures::TryStreamExt;
use lance::Dataset;
use lance::deps::datafusion::scalar::ScalarValue;

use super::location::Location;
use super::lookup::{Indexed, Lookup, indices_of};
use super::metadata::DamagedMetadata;
use super::remedy::Remedy;
use super::scan::{ROW_ADDRESS, batch_rows};
use super::schema::{ARTIFACTS, LAYERS};
use super::waiting::{Waiting, detail, is_refused, storage_error};
use crate::error::Result;

/// Values of each index that are looked up: of more, as many at even distances.
const LOOKED_UP: usize = 1024;

/// Looks values up in the indices of the latest versions, and returns those indices that do not lead to the rows which have them.
///
/// # Errors
/// When the storage refuses.
pub async fn damaged(location: &Location) -> Result<Vec<DamagedMetadata>> {
    let mut all = vec![];
    for table in [LAYERS, ARTIFACTS] {
        // What cannot be opened is told of elsewhere.
        let Ok(dataset) = location.open_table(table, None).await else { continue };
        let dataset = Arc::new(dataset);
        for indexed in indices_of(table) {
            if let Some(reason) = fault(&dataset, *indexed).await? {
                all.push(DamagedMetadata {
                    table: table.to_owned(),
                    version: Some(dataset.version_id()),
                    snapshot: None,
                    file: format!("{}/_indices", location.table_uri(table)),
                    reason,
                    help: vec![Remedy::Repair],
                });
            }
        }
    }
    Ok(all)
}

/// Returns what is wrong with an index; `None` where nothing is found, or there is none.
///
/// # Errors
/// When the storage refuses.
pub async fn fault(dataset: &Arc<Dataset>, indexed: Indexed) -> Result<Option<String>> {
    let told = |what: String| Some(format!("index '{}' on column '{}' {what}", indexed.index, indexed.column));
    match wrong_value(dataset, indexed).caught().await {
        Ok(what) => Ok(what.and_then(told)),
        Err(e) if is_refused(&e) => Err(storage_error(format!("reading index '{}'", indexed.index))(e)),
        Err(e) => Ok(told(format!("cannot be held against the rows: {}", detail(&e)))),
    }
}

async fn wrong_value(dataset: &Arc<Dataset>, indexed: Indexed) -> lance::Result<Option<String>> {
    let lookup = Lookup::open(dataset, indexed).await?;
    if lookup.unreadable() > 0 {
        return Ok(Some("has a part that cannot be read".into()));
    }
    let rest: HashSet<u64> = lookup.rest().iter().map(|fragment| fragment.id).collect();
    let covered: Vec<_> = dataset.fragments().iter().filter(|f| !rest.contains(&f.id)).cloned().collect();
    if covered.is_empty() {
        return Ok(None);
    }
    let mut scan = dataset.scan();
    scan.project(&[indexed.column])?.with_row_address().with_fragments(covered).batch_size(batch_rows(dataset));
    let batches: Vec<RecordBatch> = scan.try_into_stream().await?.try_collect().await?;
    let mut rows: BTreeMap<Vec<u8>, Vec<u64>> = BTreeMap::new();
    for batch in &batches {
        let addresses = batch.column_by_name(ROW_ADDRESS).and_then(|c| c.as_primitive_opt::<UInt64Type>());
        let addresses = addresses.ok_or_else(|| lance::Error::internal("rows without addresses"))?;
        let column = batch.column_by_name(indexed.column);
        for row in 0..batch.num_rows() {
            let value = column.and_then(|c| match c.as_string_opt::<i32>() {
                Some(texts) => Some(texts.value(row).as_bytes().to_vec()),
                None => Some(c.as_fixed_size_binary_opt()?.value(row).to_vec()),
            });
            let value = value.ok_or_else(|| lance::Error::internal("a column of another type"))?;
            rows.entry(value).or_default().push(addresses.value(row));
        }
    }
    let live: HashSet<u64> = rows.values().flatten().copied().collect();
    let is_text =
        batches.iter().any(|b| b.column_by_name(indexed.column).is_some_and(|c| c.as_string_opt::<i32>().is_some()));
    for (value, mut expected) in rows.iter().step_by(rows.len().div_ceil(LOOKED_UP)).map(|(v, rows)| (v, rows.clone()))
    {
        let asked = match is_text {
            true => ScalarValue::Utf8(Some(String::from_utf8_lossy(value).into_owned())),
            false => ScalarValue::FixedSizeBinary(value.len() as i32, Some(value.clone())),
        };
        let hits = lookup.hits(asked).await?;
        if !hits.unread.is_empty() {
            return Ok(Some("has a part that cannot be read".into()));
        }
        let found: Vec<u64> = hits.addresses.into_iter().filter(|address| live.contains(address)).collect();
        expected.sort_unstable();
        if found != expected {
            return Ok(Some(format!("leads to {} rows of a value that {} have", found.len(), expected.len())));
        }
    }
    Ok(None)
}
