//! Data files on the local file system, described without Lance's readers.
//!
//! Opening a file with Lance's reader takes several trips through its scheduler; here the file's end is read and
//! decoded where the rows are read too. The layout is Lance's file format 2.1 and 2.2 (`file2.proto`): the last bytes
//! name the format's version, and say where the descriptions of the columns lie and where the schema does.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use bytes::Bytes;
use lance::datatypes::LogicalType;
use lance_file::format::{MAGIC, pb, pbfile};
use lance_file::version::ConcreteFileVersion;
use prost::Message;

use super::column::PlainColumn;
use super::page::{Page, contradiction, range};
use super::pread::read_exact_at;

/// Bytes read at a file's end at first: more than the descriptions of most files.
const TAIL: u64 = 16 << 10;

/// Bytes of a file's footer: three offsets, two counts, the version and the magic number.
const FOOTER: usize = 40;

/// The most rows that a file may claim for each of its bytes. In every data table a column counts rows or names them, and
/// none lies in less than a bit a row.
pub const ROWS_PER_BYTE: u64 = 8;

/// An open data file, and where each page of each column of its table lies.
#[derive(Debug)]
pub struct DataFile {
    file: File,
    size: u64,
    /// The columns of the table that the file has.
    schema: SchemaRef,
    /// The same columns as they are read.
    read_schema: SchemaRef,
    /// The pages of each of them.
    columns: Vec<Vec<Page>>,
}

impl DataFile {
    /// Opens a file of a table with these columns. Columns that the table does not have are passed over, and nullable
    /// ones may be missing.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] when the file is of another version of the format, or its columns are of other
    /// types; others when it cannot be read or contradicts itself.
    pub fn open(path: &Path, table: &Schema) -> io::Result<Self> {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        let start = size.saturating_sub(TAIL);
        let mut end = End { start, bytes: bytes_at(&file, start..size)? };
        let footer = Footer::parse(&end.bytes)?;
        // The schema, the first of the buffers, comes before everything else that is wanted here.
        let first =
            *pairs(&end.get(&file, footer.buffers)?).first().ok_or_else(|| contradiction("it has no schema"))?;
        if first.0 < end.start {
            end = End { start: first.0, bytes: bytes_at(&file, first.0..size)? };
        }
        let described = pb::FileDescriptor::decode(end.get(&file, range(first)?)?)?;
        let fields = described.schema.ok_or_else(|| contradiction("it has no schema"))?.fields;
        let descriptions = pairs(&end.get(&file, footer.columns)?);
        // A field with fields of its own may be any number of columns.
        if fields.len() != descriptions.len() || fields.iter().any(|field| field.parent_id >= 0) {
            return Err(unsupported("its fields are not a column each"));
        }
        let (mut schema, mut columns) = (vec![], vec![]);
        for field in table.fields() {
            let Some(index) = fields.iter().position(|found| found.name == *field.name()) else {
                if field.is_nullable() {
                    continue;
                }
                return Err(unsupported("it lacks a column of its table"));
            };
            if Some(&fields[index].logical_type) != logical_type(field.data_type()).as_ref() {
                return Err(unsupported("a column is of another type than its table's"));
            }
            let column = pbfile::ColumnMetadata::decode(end.get(&file, range(descriptions[index])?)?)?;
            let pages = column.pages.into_iter().map(Page::decode).collect::<io::Result<Vec<Page>>>()?;
            let rows = pages.iter().try_fold(0u64, |rows, page| rows.checked_add(page.rows));
            if rows.is_none_or(|rows| rows / ROWS_PER_BYTE > size) {
                return Err(contradiction("it claims more rows than it can hold"));
            }
            schema.push(field.clone());
            columns.push(pages);
        }
        let read = schema.iter().map(|field: &Arc<Field>| PlainColumn::read_field(field));
        let read_schema = Arc::new(Schema::new(read.collect::<Vec<_>>()));
        Ok(DataFile { columns, schema: Arc::new(Schema::new(schema)), read_schema, file, size })
    }

    /// Reads some rows, as one batch. `None` if not all columns lie plainly in the file, or it has fewer rows.
    ///
    /// # Errors
    /// When the file cannot be read or contradicts itself.
    pub fn read(&self, rows: &Range<u64>) -> io::Result<Option<RecordBatch>> {
        let find = |(field, pages): (&Arc<Field>, &Vec<Page>)| PlainColumn::find(field, pages, rows.clone());
        let Some(columns) = self.schema.fields().iter().zip(&self.columns).map(find).collect::<Option<Vec<_>>>() else {
            return Ok(None);
        };
        let read = columns.iter().map(|column| column.read(&self.file, self.size));
        let batch = RecordBatch::try_new(self.read_schema.clone(), read.collect::<io::Result<_>>()?);
        Ok(Some(batch.map_err(io::Error::other)?))
    }
}

/// What the last bytes of a file say.
#[derive(Debug, PartialEq)]
struct Footer {
    /// The table of where each column's description lies.
    columns: Range<u64>,
    /// The table of where each buffer of the file lies that belongs to no column.
    buffers: Range<u64>,
}

impl Footer {
    /// Parses the footer that these bytes end with. Its version is looked at before anything else is believed.
    fn parse(end: &[u8]) -> io::Result<Self> {
        let start = end.len().checked_sub(FOOTER).ok_or_else(|| contradiction("it is too short"))?;
        let footer = &end[start..];
        if &footer[36..] != MAGIC {
            return Err(contradiction("it does not end as a Lance file does"));
        }
        let half = |at: usize| u16::from_le_bytes([footer[at], footer[at + 1]]);
        let (major, minor) = (half(32), half(34));
        match ConcreteFileVersion::from_footer_numbers(major, minor) {
            Ok(ConcreteFileVersion::V2_1 | ConcreteFileVersion::V2_2) => {}
            _ => return Err(unsupported(&format!("it is of version {major}.{minor} of Lance's file format"))),
        }
        Ok(Footer { columns: table(footer, 8, 28), buffers: table(footer, 16, 24) })
    }
}

/// Where a table of offsets and sizes lies: the footer has its start and its count in these places.
fn table(footer: &[u8], start: usize, count: usize) -> Range<u64> {
    let start = footer[start..start + 8].try_into().map_or(u64::MAX, u64::from_le_bytes);
    let count = footer[count..count + 4].try_into().map_or(u32::MAX, u32::from_le_bytes);
    start..start.saturating_add(16 * u64::from(count))
}

/// The offsets and sizes of a table.
fn pairs(table: &[u8]) -> Vec<(u64, u64)> {
    let number = |bytes: &[u8]| bytes.try_into().map_or(u64::MAX, u64::from_le_bytes);
    table.chunks_exact(16).map(|pair| (number(&pair[..8]), number(&pair[8..]))).collect()
}

/// The end of a file.
struct End {
    start: u64,
    bytes: Bytes,
}

impl End {
    /// Bytes of the file: from what has been read of it, or read now.
    fn get(&self, file: &File, range: Range<u64>) -> io::Result<Bytes> {
        let end = self.start + self.bytes.len() as u64;
        if range.start > range.end || range.end > end {
            return Err(contradiction("a description ends behind the file"));
        }
        match range.start.checked_sub(self.start) {
            Some(from) => Ok(self.bytes.slice(from as usize..(range.end - self.start) as usize)),
            None => bytes_at(file, range),
        }
    }
}

/// These bytes of a file, which must be within it: memory is asked for first.
fn bytes_at(file: &File, range: Range<u64>) -> io::Result<Bytes> {
    let mut bytes = vec![0; usize::try_from(range.end - range.start).map_err(io::Error::other)?];
    read_exact_at(file, &mut bytes, range.start)?;
    Ok(bytes.into())
}

/// Lance's name of a type.
fn logical_type(kind: &DataType) -> Option<String> {
    LogicalType::try_from(kind).ok().map(|name| name.to_string())
}

/// The error of a file that is not read here, and may be by Lance.
fn unsupported(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn footer(major: u16, minor: u16, counts: u32) -> Vec<u8> {
        let mut bytes = vec![];
        [11u64, 22, 33].iter().for_each(|offset| bytes.extend(offset.to_le_bytes()));
        [counts, counts].iter().for_each(|count| bytes.extend(count.to_le_bytes()));
        [major, minor].iter().for_each(|number| bytes.extend(number.to_le_bytes()));
        bytes.extend(MAGIC);
        bytes
    }

    /// Other versions are left to Lance, whatever the rest of the footer is.
    #[test]
    fn versions_come_first() {
        for minor in [1, 2] {
            let found = Footer::parse(&footer(2, minor, 1)).unwrap();
            assert_eq!(found, Footer { columns: 22..38, buffers: 33..49 });
        }
        for (major, minor) in [(0, 2), (1, 0), (2, 0), (2, 3), (2, 9), (3, 1), (u16::MAX, u16::MAX)] {
            let error = Footer::parse(&footer(major, minor, u32::MAX)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::Unsupported, "{major}.{minor}: {error}");
        }
        let mut other = footer(2, 1, 1);
        other[39] ^= 1;
        assert_eq!(Footer::parse(&other).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(Footer::parse(&other[1..]).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
