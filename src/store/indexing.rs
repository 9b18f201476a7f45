//! Indices of the catalogue and of the list of artifacts, made and kept up.

use lance::Dataset;
use lance::index::{DatasetIndexExt, DatasetIndexInternalExt};
use lance_index::IndexType;
use lance_index::optimize::OptimizeOptions;
use lance_index::scalar::{BuiltinIndexType, ScalarIndexParams};

use super::limits::Limits;
use super::lookup::{Indexed, indices_of};
use super::properties::Properties;
use super::scan::live_rows;
use super::strict::is_conflict;
use super::waiting::{Waiting, is_refused};

/// What is to be done about the indices of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    /// Nothing.
    Nothing,
    /// These are to be made, of all rows.
    Make,
    /// Rows are to be added, and merged with this many of the last parts.
    Add(usize),
}

/// Makes or adds to the indices of a table where that pays, and returns the version that has them: the one that was given, where
/// nothing was done. Whoever calls this is to hold the lock of commits.
///
/// # Errors
/// When the storage refuses.
pub async fn keep_up(
    mut dataset: Dataset,
    table: &str,
    (limits, properties): (&Limits, Properties),
) -> lance::Result<Dataset> {
    for indexed in indices_of(table) {
        let due = due(&dataset, (table, *indexed), limits).await?;
        bring_up(&mut dataset, *indexed, (due, properties.clone())).await?;
    }
    Ok(dataset)
}

/// Makes each index of a table one part that covers all rows; where the table has too few rows for one, nothing.
///
/// # Errors
/// When the storage refuses.
pub async fn merge_all(
    mut dataset: Dataset,
    table: &str,
    (limits, properties): (&Limits, Properties),
) -> lance::Result<Dataset> {
    for indexed in indices_of(table) {
        let segments = dataset.load_indices_by_name(indexed.index).await?.len();
        let covered = dataset.unindexed_fragments(indexed.index).await?.is_empty();
        let due = match due(&dataset, (table, *indexed), limits).await? {
            Due::Nothing if segments > 1 || segments == 1 && !covered => Due::Add(segments),
            Due::Add(_) => Due::Add(segments),
            due => due,
        };
        bring_up(&mut dataset, *indexed, (due, properties.clone())).await?;
    }
    Ok(dataset)
}

/// Makes an index anew, of all rows.
///
/// # Errors
/// When the storage refuses.
pub async fn make_anew(mut dataset: Dataset, indexed: Indexed, properties: Properties) -> lance::Result<Dataset> {
    bring_up(&mut dataset, indexed, (Due::Make, properties)).await?;
    Ok(dataset)
}

async fn bring_up(dataset: &mut Dataset, indexed: Indexed, (due, properties): (Due, Properties)) -> lance::Result<()> {
    let properties = properties.as_deref().cloned().unwrap_or_default();
    let due = match due {
        Due::Add(merged) => {
            let options = OptimizeOptions::merge(merged)
                .index_names(vec![indexed.index.to_owned()])
                .transaction_properties(properties.clone());
            match dataset.optimize_indices(&options).caught().await {
                Ok(()) => return Ok(()),
                Err(e) if is_refused(&e) || is_conflict(&e) => return Err(e),
                // What is there cannot be read: it is made anew.
                Err(_) => Due::Make,
            }
        }
        due => due,
    };
    if due == Due::Make {
        let params = ScalarIndexParams::for_builtin(BuiltinIndexType::BTree);
        let columns = [indexed.column];
        let mut builder = dataset.create_index_builder(&columns, IndexType::BTree, &params);
        builder = builder.name(indexed.index.to_owned()).replace(true).transaction_properties(properties);
        builder.into_future().caught().await?;
    }
    Ok(())
}

/// Says what is to be done about an index: rows are added when a large fragment has just been completed, so that what is covered is
/// few fragments, or when there are many more of them.
async fn due(dataset: &Dataset, (table, indexed): (&str, Indexed), limits: &Limits) -> lance::Result<Due> {
    let (from, most) = limits.of(table);
    let segments = dataset.load_indices_by_name(indexed.index).await?;
    if segments.is_empty() {
        return Ok(if rows_of(dataset, |_| true) >= from { Due::Make } else { Due::Nothing });
    }
    let rest = dataset.unindexed_fragments(indexed.index).await?;
    let uncovered: u64 = rest.iter().filter_map(live_rows).sum();
    let last = dataset.fragments().last().and_then(live_rows).unwrap_or_default();
    if uncovered < most || last < limits.large_fragment && uncovered < 4 * most {
        return Ok(Due::Nothing);
    }
    let mut sizes: Vec<u64> = segments
        .iter()
        .map(|segment| {
            let covered = segment.fragment_bitmap.as_ref();
            rows_of(dataset, |id| covered.is_some_and(|bitmap| bitmap.contains(id as u32)))
        })
        .collect();
    let (mut merged, mut rows) = (0, uncovered);
    while let Some(size) = sizes.pop().filter(|size| *size < limits.growth.saturating_mul(rows)) {
        (merged, rows) = (merged + 1, rows + size);
    }
    Ok(Due::Add(merged))
}

/// Counts the rows of the fragments that a choice takes by their numbers.
fn rows_of(dataset: &Dataset, taken: impl Fn(u64) -> bool) -> u64 {
    dataset.fragments().iter().filter(|fragment| taken(fragment.id)).filter_map(live_rows).sum()
}
