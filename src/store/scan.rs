//! How many rows of a table a scan reads at once.

use lance::Dataset;

/// Rows read at once, unless they are long: Lance's own default.
const ROWS: u64 = 8192;

/// Bytes of files read at once, about: memory that a scan takes, and few enough that 32-bit offsets address what they hold.
const BYTES: u64 = 64 << 20;

/// Returns how many rows of a table to read at once, by the longest that a file's rows are on average.
pub fn batch_rows(dataset: &Dataset) -> usize {
    let longest = dataset.fragments().iter().filter_map(|fragment| {
        let sizes = fragment.files.iter().filter_map(|file| file.file_size_bytes.get());
        let bytes = sizes.fold(0, |sum, size| u64::saturating_add(sum, size.get()));
        bytes.checked_div(fragment.physical_rows? as u64)
    });
    (BYTES / longest.max().unwrap_or_default().max(1)).clamp(1, ROWS) as usize
}
