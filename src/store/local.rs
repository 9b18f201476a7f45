//! Data files on the local file system, described without Lance's readers.
//!
//! Opening a file with Lance's reader takes several trips through its scheduler; here the file's end is read and
//! decoded where the rows are read too. The layout is Lance's file format 2.1 and 2.2 (`file2.proto`): the last bytes
//! say where the descriptions of the columns lie and where the schema does.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, SchemaRef};
use bytes::Bytes;
use lance::datatypes::LogicalType;
use lance_encoding::format::metadata::PageLayout;
use lance_encoding::format::pb21;
use lance_file::format::{MAGIC, pb, pbfile};
use lance_file::version::ConcreteFileVersion;
use prost::Message;

use super::plain::PlainColumn;
use super::pread::read_exact_at;

/// Read at a file's end at first: more than the descriptions of most files.
const TAIL: u64 = 16 << 10;

/// The last bytes of a file: three offsets, two counts, the version and the magic number.
const FOOTER: usize = 40;

/// An open data file, and where each page of each column lies.
#[derive(Debug)]
pub struct LocalFile {
    file: File,
    size: u64,
    schema: SchemaRef,
    columns: Vec<Vec<Page>>,
}

/// Rows of a column that were written together.
#[derive(Debug)]
pub struct Page {
    pub rows: u64,
    pub layout: PageLayout,
    pub buffers: Vec<Range<u64>>,
}

impl LocalFile {
    /// # Errors
    /// When the file cannot be read, is of another version of the format, has other columns, or contradicts itself.
    pub fn open(path: &Path, schema: SchemaRef) -> io::Result<Self> {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        let start = size.saturating_sub(TAIL);
        let mut end = End { start, bytes: bytes_at(&file, start..size)? };
        let footer = end.bytes.len().checked_sub(FOOTER).ok_or_else(|| invalid("it is too short"))?;
        let footer = end.bytes.slice(footer..);
        if &footer[36..] != MAGIC {
            return Err(invalid("it does not end as a Lance file does"));
        }
        let half = |at: usize| u16::from_le_bytes([footer[at], footer[at + 1]]);
        let version = ConcreteFileVersion::from_footer_numbers(half(32), half(34)).map_err(io::Error::other)?;
        if !matches!(version, ConcreteFileVersion::V2_1 | ConcreteFileVersion::V2_2) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, format!("it is of version {version:?}")));
        }
        let (descriptions, buffers) = (table(&footer, 8, 28), table(&footer, 16, 24));
        // The schema, the first of the buffers, comes before everything else that is wanted here.
        let first = *pairs(&end.get(&file, buffers)?).first().ok_or_else(|| invalid("it has no schema"))?;
        if first.0 < end.start {
            end = End { start: first.0, bytes: bytes_at(&file, first.0..size)? };
        }
        let described = pb::FileDescriptor::decode(end.get(&file, range(first)?)?)?;
        let fields = described.schema.ok_or_else(|| invalid("it has no schema"))?.fields;
        let expected = schema.fields().iter().map(|f| Some((f.name().clone(), logical_type(f.data_type())?)));
        if !fields.into_iter().map(|f| Some((f.name, f.logical_type))).eq(expected) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "its columns are not those of its table"));
        }
        let columns = pairs(&end.get(&file, descriptions)?).into_iter().map(|place| {
            let column = pbfile::ColumnMetadata::decode(end.get(&file, range(place)?)?)?;
            column.pages.into_iter().map(Page::decode).collect()
        });
        Ok(LocalFile { columns: columns.collect::<io::Result<_>>()?, schema, file, size })
    }

    /// Some rows, as one batch. None if not all columns lie plainly in the file.
    ///
    /// # Errors
    /// When the file cannot be read or contradicts itself.
    pub fn read(&self, rows: &Range<u64>) -> io::Result<Option<RecordBatch>> {
        let fields = self.schema.fields();
        // As many columns as fields: each field is one column.
        if fields.len() != self.columns.len() {
            return Ok(None);
        }
        let find = |(field, pages): (&Arc<Field>, &Vec<Page>)| PlainColumn::find(field, pages, rows.clone());
        let Some(columns) = fields.iter().zip(&self.columns).map(find).collect::<Option<Vec<_>>>() else {
            return Ok(None);
        };
        let read = columns.iter().map(|column| column.read(&self.file, self.size));
        let batch = RecordBatch::try_new(self.schema.clone(), read.collect::<io::Result<_>>()?);
        Ok(Some(batch.map_err(io::Error::other)?))
    }
}

impl Page {
    fn decode(page: pbfile::column_metadata::Page) -> io::Result<Self> {
        let Some(pbfile::encoding::Location::Direct(encoding)) = page.encoding.and_then(|e| e.location) else {
            return Err(invalid("a page's layout is not with the page's description"));
        };
        let layout = prost_types::Any::decode(Bytes::from(encoding.encoding))?;
        let layout = layout.to_msg::<pb21::PageLayout>()?.into();
        if page.buffer_offsets.len() != page.buffer_sizes.len() {
            return Err(invalid("a page's buffers are not as many as their sizes"));
        }
        let buffers = page.buffer_offsets.into_iter().zip(page.buffer_sizes).map(range);
        Ok(Page { rows: page.length, layout, buffers: buffers.collect::<io::Result<_>>()? })
    }
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
            return Err(invalid("a description ends behind the file"));
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

/// Where a table of offsets and sizes lies, by the places in the footer of its start and its count.
fn table(footer: &[u8], start: usize, count: usize) -> Range<u64> {
    let start = footer[start..start + 8].try_into().map_or(u64::MAX, u64::from_le_bytes);
    let count = footer[count..count + 4].try_into().map_or(u32::MAX, u32::from_le_bytes);
    start..start.saturating_add(16 * u64::from(count))
}

fn pairs(table: &[u8]) -> Vec<(u64, u64)> {
    let number = |bytes: &[u8]| bytes.try_into().map_or(u64::MAX, u64::from_le_bytes);
    table.chunks_exact(16).map(|pair| (number(&pair[..8]), number(&pair[8..]))).collect()
}

fn range((start, size): (u64, u64)) -> io::Result<Range<u64>> {
    Ok(start..start.checked_add(size).ok_or_else(|| invalid("an offset overflows"))?)
}

pub fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the file contradicts itself: {what}"))
}
