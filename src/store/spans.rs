//! Which rows of a data table are which artifact's.

use std::collections::HashMap;

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::UInt64Type;
use lance::Dataset;
use lance::dataset::scanner::Scanner;

use super::row_locations::TableRows;
use super::scan::{batch_rows, for_each};
use super::waiting::storage_error;
use crate::error::{Error, Result};
use crate::layer::ArtifactId;

/// Consecutive rows of one artifact in a data table, by row address.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    pub artifact: ArtifactId,
    /// The address of the first of them: the fragment, and the row's offset in it in the lower 32 bits.
    pub start: u64,
    pub rows: u64,
}

impl Span {
    /// Returns the fragment that they lie in.
    pub fn fragment(&self) -> u64 {
        self.start >> 32
    }

    /// Returns the offset of the first of them in their fragment.
    pub fn offset(&self) -> u64 {
        self.start & u64::from(u32::MAX)
    }

    /// Returns the address behind the last of them.
    pub fn end(&self) -> u64 {
        self.start + self.rows
    }

    /// Returns those of them that lie where `rows` says, in order; `files` are the files of fragments.
    pub fn parts_in(&self, files: &HashMap<u64, String>, rows: &TableRows) -> Vec<Span> {
        let (file, own) = (files.get(&self.fragment()), self.offset()..self.offset() + self.rows);
        let in_file = rows.ranges.iter().filter(|range| Some(&range.file) == file);
        let mut within: Vec<(u64, u64)> = in_file
            .map(|range| (range.offset.max(own.start), range.offset.saturating_add(range.rows).min(own.end)))
            .filter(|(start, end)| start < end)
            .collect();
        within.sort_unstable();
        let mut behind = own.start;
        let mut parts = vec![];
        for (start, end) in within {
            // Ranges that overlap are of no list that was written here.
            let start = start.max(behind);
            if start < end {
                parts.push(Span { start: self.start + (start - own.start), rows: end - start, ..*self });
                behind = end;
            }
        }
        parts
    }
}

/// Returns the file of each fragment that holds the columns that it was written with: the first.
pub fn first_files(dataset: &Dataset) -> HashMap<u64, String> {
    dataset.fragments().iter().filter_map(|f| Some((f.id, f.files.first()?.path.clone()))).collect()
}

/// Returns a scan of columns of a table, in the table's order, with row addresses.
///
/// # Errors
/// When the table has no such columns.
pub fn scan(dataset: &Dataset, columns: &[&str]) -> Result<Scanner> {
    let mut scan = dataset.scan();
    scan.project(columns).map_err(storage_error("choosing columns"))?;
    scan.with_row_address().scan_in_order(true).batch_size(batch_rows(dataset));
    Ok(scan)
}

/// Returns the row addresses of a batch of [`scan`].
///
/// # Errors
/// When it has none.
pub fn addresses(batch: &RecordBatch) -> Result<Vec<u64>> {
    let column = batch.column_by_name("_rowaddr").and_then(|c| c.as_primitive_opt::<UInt64Type>());
    column.map(|c| c.values().to_vec()).ok_or_else(|| Error::expected("row addresses", "none", "one a row"))
}

/// Consecutive rows of one artifact each, in the table's order.
///
/// # Errors
/// When the table cannot be read.
pub async fn spans(dataset: &Dataset) -> Result<Vec<Span>> {
    let mut spans: Vec<Span> = vec![];
    for_each(scan(dataset, &["artifact"])?, "reading the rows' artifacts", |batch| {
        let addresses = addresses(&batch)?;
        let names = batch
            .column(0)
            .as_fixed_size_binary_opt()
            .ok_or_else(|| Error::expected("column 'artifact'", "another type", "hashes"))?;
        for (i, start) in addresses.into_iter().enumerate() {
            let Ok(name) = names.value(i).try_into() else {
                return Err(Error::expected(
                    "column 'artifact'",
                    format!("{} bytes", names.value_length()),
                    "32 bytes",
                ));
            };
            let artifact = ArtifactId(name);
            match spans.last_mut() {
                Some(last) if last.artifact == artifact && last.start + last.rows == start => last.rows += 1,
                _ => spans.push(Span { artifact, start, rows: 1 }),
            }
        }
        Ok(())
    })
    .await?;
    Ok(spans)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::row_locations::RowRange;

    #[test]
    fn parts_are_what_lies_in_ranges() {
        let span = Span { artifact: ArtifactId([1; 32]), start: (3 << 32) + 10, rows: 20 };
        assert_eq!((span.fragment(), span.offset(), span.end()), (3, 10, (3 << 32) + 30));
        let files = HashMap::from([(3, "three".to_owned()), (4, "four".to_owned())]);
        let parts = |ranges: &[(&str, u64, u64)]| {
            let range = |&(file, offset, rows): &(&str, u64, u64)| RowRange { file: file.into(), offset, rows };
            let rows = TableRows { rows: 20, ranges: ranges.iter().map(range).collect() };
            span.parts_in(&files, &rows).iter().map(|part| (part.offset(), part.rows)).collect::<Vec<_>>()
        };
        assert_eq!(parts(&[("three", 10, 20)]), [(10, 20)]);
        assert_eq!(parts(&[("four", 10, 20)]), []);
        assert_eq!(parts(&[("three", 25, 100), ("three", 0, 12)]), [(10, 2), (25, 5)]);
        assert_eq!(parts(&[("three", 12, 4), ("three", 14, 4), ("three", 30, 9)]), [(12, 4), (16, 2)]);
        assert_eq!(parts(&[("three", u64::MAX, u64::MAX)]), []);
    }
}
