//! The list of artifacts, told where rows are that have moved.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use arrow::array::{AsArray, RecordBatch, StringArray};
use futures::FutureExt;
use lance::Dataset;
use lance::dataset::{MergeInsertBuilder, WhenMatched, WhenNotMatched};

use super::row_locations::{LOCATIONS, RowLocations};
use super::scan::{batch_rows, for_each};
use super::waiting::{Waiting, storage_error};
use crate::error::{Error, Result};
use crate::layer::ArtifactId;

/// Writes the locations of these artifacts' rows into the list of artifacts; all other columns stay as they are, also
/// those that are not known here.
///
/// # Errors
/// When the storage refuses.
pub async fn relist(dataset: Dataset, moved: &BTreeMap<ArtifactId, RowLocations>) -> Result<Dataset> {
    let action = "writing where the artifacts' rows are";
    if moved.is_empty() {
        return Ok(dataset);
    }
    let (mut batches, mut seen) = (vec![], HashSet::new());
    let mut all = dataset.scan();
    all.scan_in_order(true).batch_size(batch_rows(&dataset));
    for_each(all, action, |batch| {
        batches.extend(relocated(&batch, moved, &mut seen).ok_or_else(|| {
            Error::expected(
                "columns 'artifact' and 'places' of the list of artifacts",
                "another type",
                "hashes and texts",
            )
        })?);
        Ok(())
    })
    .await?;
    if batches.is_empty() {
        return Ok(dataset);
    }
    let mut merge =
        MergeInsertBuilder::try_new(Arc::new(dataset), vec!["artifact".into()]).map_err(storage_error(action))?;
    merge.when_matched(WhenMatched::UpdateAll).when_not_matched(WhenNotMatched::DoNothing).use_index(false);
    let merge = merge.try_build().map_err(storage_error(action))?;
    let (dataset, _) = merge.execute_batches(batches).boxed().during(action).await?;
    Ok(Arc::unwrap_or_clone(dataset))
}

/// The rows of a batch of the list whose artifacts have moved, with their new locations; of an artifact that is listed twice, the
/// first row.
fn relocated(
    batch: &RecordBatch,
    moved: &BTreeMap<ArtifactId, RowLocations>,
    seen: &mut HashSet<ArtifactId>,
) -> Option<Vec<RecordBatch>> {
    let names = batch.column_by_name("artifact")?.as_fixed_size_binary_opt()?;
    let place = batch.schema().index_of(LOCATIONS).ok()?;
    let mut rows = vec![];
    for row in 0..batch.num_rows() {
        let id = ArtifactId(names.value(row).try_into().ok()?);
        let Some(locations) = moved.get(&id).filter(|_| seen.insert(id)) else { continue };
        let one = batch.slice(row, 1);
        let mut columns = one.columns().to_vec();
        columns[place] = Arc::new(StringArray::from(vec![serde_json::to_string(locations).ok()?]));
        rows.push(RecordBatch::try_new(one.schema(), columns).ok()?);
    }
    Some(rows)
}
