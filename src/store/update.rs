//! Commits of the catalogue and of the list of artifacts: rows that go and rows that come, in one version, with the small fragments of
//! earlier commits joined, so that a table of many commits stays one of few fragments.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use arrow::array::{AsArray, BooleanArray, RecordBatch};
use arrow::compute::filter_record_batch;
use arrow::datatypes::{Schema, SchemaRef, UInt64Type};
use futures::{FutureExt, TryStreamExt};
use lance::Dataset;
use lance::dataset::fragment::FileFragment;
use lance::dataset::transaction::{Operation, TransactionBuilder};
use lance::dataset::{CommitBuilder, InsertBuilder, WriteMode, WriteParams};
use lance::deps::datafusion::execution::SendableRecordBatchStream;
use lance::index::DatasetIndexExt;
use lance::table::format::Fragment;

use super::append::{open_or_create, uncommitted};
use super::format::{Format, with_foreign, without_missing};
use super::indexing;
use super::limits::Limits;
use super::location::Location;
use super::lock;
use super::lookup::{Indexed, indices_of};
use super::place::Place;
use super::properties::Properties;
use super::scan::{ROW_ADDRESS, batch_rows, live_rows};
use super::schema::ARTIFACTS;
use super::strict::{next_version, replacing};
use super::waiting::Waiting;
use crate::error::Result;

/// Commits the next version, without the rows at the addresses `gone`, and with the rows of `batches`, which have all columns of the
/// table, behind all others. Returns its number.
///
/// # Errors
/// When the storage refuses, and where the version that is open is not the latest one.
pub async fn commit(
    dataset: Dataset,
    gone: &[u64],
    batches: Vec<RecordBatch>,
    (indices, limits, properties): (&[Indexed], &Limits, Properties),
) -> lance::Result<u64> {
    let dataset = Arc::new(dataset);
    let schema: SchemaRef = Arc::new(Schema::from(dataset.schema()));
    let joined = match batches.is_empty() {
        true => vec![],
        false => to_be_joined(&dataset, indices, limits, batches.iter().map(|b| b.num_rows() as u64).sum()).await?,
    };
    let mut rows = remaining(&dataset, &joined, gone).await?;
    rows.extend(batches);
    let rows = rows.into_iter().map(|batch| in_order(&batch, &schema)).collect::<lance::Result<Vec<_>>>()?;
    let new_fragments = match rows.is_empty() {
        true => vec![],
        false => match uncommitted(&dataset, schema, rows.into_iter().map(Ok)).await?.0.operation {
            Operation::Append { fragments } => fragments,
            other => return Err(lance::Error::internal(format!("an append came to be {}", other.name()))),
        },
    };
    let mut removed: Vec<u64> = joined.iter().map(|fragment| fragment.id).collect();
    let mut updated = vec![];
    let mut by_fragment: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
    for address in gone {
        by_fragment.entry(address >> 32).or_default().push(*address as u32);
    }
    for (id, rows) in by_fragment {
        if joined.iter().any(|fragment| fragment.id == id) {
            continue;
        }
        let fragment = dataset.fragments().iter().find(|fragment| fragment.id == id);
        let fragment = fragment.ok_or_else(|| lance::Error::internal(format!("no fragment {id}, which has rows")))?;
        match FileFragment::new(dataset.clone(), fragment.clone()).extend_deletions(rows).await? {
            Some(left) => updated.push(left.metadata().clone()),
            None => removed.push(id),
        }
    }
    execute(dataset, (removed, updated, new_fragments), properties).await
}

/// Commits a version with some fragments removed, some with more rows deleted, and some new.
async fn execute(
    dataset: Arc<Dataset>,
    (removed, updated, new): (Vec<u64>, Vec<Fragment>, Vec<Fragment>),
    properties: Properties,
) -> lance::Result<u64> {
    let transaction = TransactionBuilder::new(dataset.version_id(), replacing(removed, updated, new))
        .transaction_properties(properties)
        .build();
    Ok(next_version(dataset).execute(transaction).await?.version_id())
}

/// Joins the fragments of a table that are not large, without their deleted rows, where there are many of them or much is deleted, and
/// returns whether a version was committed.
///
/// # Errors
/// As [`commit`].
pub async fn join_all(dataset: Dataset, (limits, properties): (&Limits, Properties)) -> lance::Result<bool> {
    let deleted = |fragment: &Fragment| {
        fragment.physical_rows.unwrap_or_default() as u64 - live_rows(fragment).unwrap_or_default()
    };
    let (small, most) = limits.gc_joins;
    let fragments = dataset.fragments().iter();
    let joined: Vec<Fragment> = fragments
        .filter(|fragment| live_rows(fragment).is_some_and(|rows| rows < small || 10 * deleted(fragment) > rows))
        .cloned()
        .collect();
    let gone: u64 = joined.iter().map(deleted).sum();
    let total: u64 = dataset.fragments().iter().filter_map(live_rows).sum();
    if joined.len() <= most && gone < limits.large_fragment.max(total / 10) {
        return Ok(false);
    }
    let dataset = Arc::new(dataset);
    let mut scan = dataset.scan();
    scan.with_fragments(joined.clone()).scan_in_order(true).batch_size(batch_rows(&dataset));
    let rows: SendableRecordBatchStream = scan.try_into_stream().await?.into();
    let params = WriteParams {
        mode: WriteMode::Append,
        max_rows_per_file: usize::try_from(small).unwrap_or(usize::MAX).max(1),
        ..WriteParams::default()
    };
    let transaction = InsertBuilder::new(dataset.clone()).with_params(&params).execute_uncommitted_stream(rows).await?;
    let Operation::Append { fragments } = transaction.operation else {
        return Err(lance::Error::internal("an append came to be something else"));
    };
    let removed = joined.iter().map(|fragment| fragment.id).collect();
    execute(dataset, (removed, vec![], fragments), properties).await.map(|_| true)
}

/// Appends rows to the list of artifacts, which is made first in the store's format where it is missing, and returns its version.
///
/// # Errors
/// When the storage refuses, or the list has no column for what is not null.
pub async fn list((location, format): (&Location, &Format), batches: Vec<RecordBatch>) -> Result<u64> {
    let dataset = open_or_create((location, format), ARTIFACTS).await?;
    let fitted = |batch| {
        let batch = without_missing(batch, (ARTIFACTS, &dataset), (location.uri(), format))?;
        with_foreign(batch, (ARTIFACTS, &dataset))
    };
    let batches = batches.into_iter().map(fitted).collect::<Result<Vec<_>>>()?;
    let _guard = lock::committing(location).await?;
    let limits = location.limits();
    // Boxed: Lance's futures are large.
    let appended = async {
        match location.place() {
            // Without a lock: an append, which others' commits do not stand in the way of.
            Place::Remote => append(dataset, batches).await,
            Place::Local(_) | Place::Memory(_) => {
                let latest = location.open_for_write(ARTIFACTS).await?;
                let latest = indexing::keep_up(latest, ARTIFACTS, (limits, None)).await?;
                commit(latest, &[], batches, (indices_of(ARTIFACTS), limits, None)).await
            }
        }
    }
    .boxed();
    appended.during("listing artifacts").await
}

async fn append(dataset: Dataset, batches: Vec<RecordBatch>) -> lance::Result<u64> {
    let dataset = Arc::new(dataset);
    let schema: SchemaRef = Arc::new(Schema::from(dataset.schema()));
    let batches = batches.into_iter().map(|batch| in_order(&batch, &schema)).collect::<lance::Result<Vec<_>>>()?;
    let (transaction, _) = uncommitted(&dataset, schema, batches.into_iter().map(Ok)).await?;
    Ok(CommitBuilder::new(dataset).with_skip_auto_cleanup(true).execute(transaction).await?.version_id())
}

/// Returns the fragments at the end of a table that a commit joins with its own rows: where there are several of about one size,
/// these and all smaller ones behind them, so that a row is written anew a few times at most, whatever the number of commits. Those
/// that an index covers stay.
async fn to_be_joined(
    dataset: &Dataset,
    indices: &[Indexed],
    limits: &Limits,
    new: u64,
) -> lance::Result<Vec<Fragment>> {
    let mut covered = HashSet::new();
    for indexed in indices {
        for segment in dataset.load_indices_by_name(indexed.index).await? {
            covered.extend(segment.fragment_bitmap.iter().flatten());
        }
    }
    let small = |fragment: &&Fragment| {
        !covered.contains(&(fragment.id as u32)) && live_rows(fragment).is_some_and(|rows| rows < limits.large_fragment)
    };
    let run: Vec<&Fragment> = dataset.fragments().iter().rev().take_while(small).collect();
    let level = |rows: u64| rows.max(1).ilog(limits.joined.max(2) as u64);
    let sizes: Vec<u32> = run.iter().filter_map(|fragment| live_rows(fragment)).map(level).collect();
    let highest = sizes.iter().copied().max().unwrap_or_default();
    let reaches = |of: u32| sizes.iter().take_while(|size| **size <= of).count();
    let full = |of: &u32| {
        let own = usize::from(level(new) == *of);
        sizes[..reaches(*of)].iter().filter(|size| *size == of).count() + own >= limits.joined
    };
    let count = (0..=highest).rev().find(full).map_or(0, reaches);
    let mut joined: Vec<Fragment> = run.into_iter().take(count).cloned().collect();
    joined.reverse();
    Ok(joined)
}

/// Reads the rows of fragments, in order, but for those that go.
async fn remaining(dataset: &Dataset, fragments: &[Fragment], gone: &[u64]) -> lance::Result<Vec<RecordBatch>> {
    if fragments.is_empty() {
        return Ok(vec![]);
    }
    let gone: HashSet<u64> = gone.iter().copied().collect();
    let mut scan = dataset.scan();
    scan.with_fragments(fragments.to_vec()).scan_in_order(true).batch_size(batch_rows(dataset)).with_row_address();
    let mut stream = scan.try_into_stream().await?;
    let mut rows = vec![];
    while let Some(batch) = stream.try_next().await? {
        let addresses = batch.column_by_name(ROW_ADDRESS).and_then(|c| c.as_primitive_opt::<UInt64Type>());
        let addresses = addresses.ok_or_else(|| lance::Error::internal("rows without addresses"))?;
        let stay: BooleanArray = addresses.values().iter().map(|address| Some(!gone.contains(address))).collect();
        rows.push(filter_record_batch(&batch, &stay)?);
    }
    Ok(rows)
}

/// Returns the columns of a schema, in its order.
fn in_order(batch: &RecordBatch, schema: &SchemaRef) -> lance::Result<RecordBatch> {
    let missing = |name: &str| lance::Error::internal(format!("rows without column '{name}'"));
    let columns = schema.fields().iter().map(|field| {
        let column = batch.column_by_name(field.name()).ok_or_else(|| missing(field.name()))?;
        Ok(column.clone())
    });
    Ok(RecordBatch::try_new(schema.clone(), columns.collect::<lance::Result<_>>()?)?)
}
