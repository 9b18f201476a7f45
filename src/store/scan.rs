//! Rows as Lance counts and reads them.

use lance::Dataset;
use lance::table::format::Fragment;

/// Rows read at once, unless they are long: Lance's own default.
const ROWS: u64 = 8192;

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

/// Returns the rows of a fragment, without deleted ones, where its manifest tells.
pub fn live_rows(fragment: &Fragment) -> Option<u64> {
    fragment.num_rows().map(|rows| rows as u64)
}
