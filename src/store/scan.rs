//! Rows as Lance counts and reads them.

use std::sync::Arc;

use arrow::array::RecordBatch;
use futures::{FutureExt, StreamExt, TryStreamExt};
use lance::Dataset;
use lance::dataset::fragment::{FileFragment, FragReadConfig};
use lance::dataset::scanner::Scanner;
use lance::datatypes::Schema;
use lance::table::format::Fragment;

use super::waiting::Waiting;
use crate::error::Result;

/// Rows read at once, unless they are long: Lance's own default.
const ROWS: u64 = 8192;

/// Fragments read at once: on an object store each waits for an answer.
pub const FRAGMENTS_AT_ONCE: usize = 32;

/// Bytes of files read at once, about: memory that a scan takes, and few enough that 32-bit offsets address what they hold.
const BYTES: u64 = 64 << 20;

/// The column that Lance gives the addresses of rows in: the number of the fragment, and the row's own in it, deleted ones counted.
pub const ROW_ADDRESS: &str = "_rowaddr";

/// Returns how many rows of a table to read at once, by the longest that a file's rows are on average.
pub fn batch_rows(dataset: &Dataset) -> usize {
    let longest = dataset.fragments().iter().filter_map(|fragment| {
        let sizes = fragment.files.iter().filter_map(|file| file.file_size_bytes.get());
        let bytes = sizes.fold(0, |sum, size| u64::saturating_add(sum, size.get()));
        bytes.checked_div(fragment.physical_rows? as u64)
    });
    (BYTES / longest.max().unwrap_or_default().max(1)).clamp(1, ROWS) as usize
}

/// Hands the batches of a scan on as they are read: a table may be larger than memory.
///
/// # Errors
/// When the storage refuses `action`, and the first that `each` returns.
pub async fn for_each(
    scan: Scanner,
    action: impl Into<String> + Send,
    mut each: impl FnMut(RecordBatch) -> Result<()> + Send,
) -> Result<()> {
    let read = async {
        let mut batches = scan.try_into_stream().await?;
        while let Some(batch) = batches.try_next().await? {
            if let Err(e) = each(batch) {
                return Ok(Err(e));
            }
        }
        Ok(Ok(()))
    };
    // Boxed: Lance's futures are large.
    read.boxed().during(action).await?
}

/// Returns the rows of a fragment, without deleted ones, where its manifest tells.
pub fn live_rows(fragment: &Fragment) -> Option<u64> {
    fragment.num_rows().map(|rows| rows as u64)
}

/// Reads the rows at addresses, which are in order and each there once, with these; deleted ones are left out. Nothing is planned for it,
/// which would take longer than to read a few rows.
///
/// # Errors
/// When the storage refuses, or no fragment has such a number.
pub async fn rows_at(dataset: &Arc<Dataset>, addresses: &[u64], columns: &Schema) -> lance::Result<Vec<RecordBatch>> {
    let wanted: Vec<(FileFragment, Vec<u32>)> = addresses
        .chunk_by(|a, b| a >> 32 == b >> 32)
        .map(|of_one| {
            let number = of_one[0] >> 32;
            let fragment = dataset.get_fragment(number as usize);
            let fragment =
                fragment.ok_or_else(|| lance::Error::internal(format!("no fragment has number {number}")))?;
            Ok((fragment, of_one.iter().map(|address| *address as u32).collect()))
        })
        .collect::<lance::Result<_>>()?;
    let read = futures::stream::iter(wanted).map(async |(fragment, rows)| {
        let reader = fragment.open(columns, FragReadConfig::default().with_row_address(true)).await?;
        reader.take(&rows, u32::MAX, None).await?.buffered(1).try_collect::<Vec<_>>().await
    });
    Ok(read.buffered(FRAGMENTS_AT_ONCE).try_collect::<Vec<_>>().await?.into_iter().flatten().collect())
}
