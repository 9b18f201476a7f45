//! Data files, described without Lance's readers.
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
use lance::datatypes::LogicalType;
use lance_file::format::{pb, pbfile};
use prost::Message;

use super::column::PlainColumn;
use super::end::{End, Footer, pairs, require_rows, within};
use super::page::{Page, contradiction, range};
use super::source::ReadAt;

/// An open data file.
#[derive(Debug)]
pub struct DataFile {
    file: File,
    description: Description,
}

impl DataFile {
    /// Opens a file of a table with these columns.
    ///
    /// # Errors
    /// As [`Description::read`].
    pub fn open(path: &Path, table: &Schema) -> io::Result<Self> {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        let description = Description::read(&file, size, table)?;
        Ok(DataFile { file, description })
    }

    /// Reads some rows, as [`Description::rows`].
    ///
    /// # Errors
    /// As there.
    pub fn read(&self, rows: &Range<u64>) -> io::Result<Option<RecordBatch>> {
        self.description.rows(&self.file, rows)
    }
}

/// Where each page of each column of a data file lies.
#[derive(Debug)]
pub struct Description {
    size: u64,
    /// The columns of the table that the file has.
    schema: SchemaRef,
    /// The same columns as they are read.
    read_schema: SchemaRef,
    /// The pages of each of them.
    columns: Vec<Vec<Page>>,
}

impl Description {
    /// Reads the end of a file of a table with these columns, which has `size` bytes. Columns that the table does not have are passed
    /// over, and nullable ones may be missing.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] when the file is of another version of the format, or its columns are of other
    /// types; others when it cannot be read or contradicts itself.
    pub fn read(file: &impl ReadAt, size: u64, table: &Schema) -> io::Result<Self> {
        let mut end = End::read_tail(file, size)?;
        let footer = Footer::parse(&end.bytes)?;
        if !footer.is_plain() {
            return Err(unsupported("it is of another version of Lance's file format"));
        }
        footer.require_order(size)?;
        let descriptions = pairs(&end.get(file, footer.columns.clone())?);
        footer.require_first(&descriptions)?;
        let buffers = pairs(&end.get(file, footer.buffers.clone())?);
        // All descriptions of columns come one after another: one read for those of wide tables.
        if footer.descriptions < end.start {
            end = End::read(file, size, footer.descriptions)?;
        }
        // The schema is the first of the buffers, which come before the descriptions.
        let schema = *buffers.first().ok_or_else(|| contradiction("it has no schema"))?;
        within(schema, 0..footer.descriptions, "its schema")?;
        let described = pb::FileDescriptor::decode(end.get(file, range(schema)?)?)?;
        let fields = described.schema.ok_or_else(|| contradiction("it has no schema"))?.fields;
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
            let column = pbfile::ColumnMetadata::decode(end.get(file, range(descriptions[index])?)?)?;
            let pages = column.pages.into_iter().map(Page::decode).collect::<io::Result<Vec<Page>>>()?;
            require_rows(pages.iter().fold(0, |rows: u64, page| rows.saturating_add(page.rows)), size)?;
            schema.push(field.clone());
            columns.push(pages);
        }
        let read = schema.iter().map(|field: &Arc<Field>| PlainColumn::read_field(field));
        let read_schema = Arc::new(Schema::new(read.collect::<Vec<_>>()));
        Ok(Description { columns, schema: Arc::new(Schema::new(schema)), read_schema, size })
    }

    /// Finds some rows of all columns; `None` if not all lie plainly in the file, or it has fewer rows.
    fn find(&self, rows: &Range<u64>) -> Option<Vec<PlainColumn>> {
        let find = |(field, pages): (&Arc<Field>, &Vec<Page>)| PlainColumn::find(field, pages, rows.clone());
        self.schema.fields().iter().zip(&self.columns).map(find).collect()
    }

    /// Returns the bytes of the file that some rows are read from, as far as is known before any is read. `None` as [`Description::rows`].
    pub fn wanted(&self, margin: u64, rows: &Range<u64>) -> Option<Vec<Range<u64>>> {
        let mut ranges = vec![];
        self.find(rows)?.iter().for_each(|column| column.wanted(margin, &mut ranges));
        Some(ranges)
    }

    /// Reads some rows, as one batch. `None` if not all columns lie plainly in the file, or it has fewer rows.
    ///
    /// # Errors
    /// When the file cannot be read or contradicts itself.
    pub fn rows(&self, file: &impl ReadAt, rows: &Range<u64>) -> io::Result<Option<RecordBatch>> {
        let Some(columns) = self.find(rows) else { return Ok(None) };
        let read = columns.iter().map(|column| column.read(file, self.size));
        let batch = RecordBatch::try_new(self.read_schema.clone(), read.collect::<io::Result<_>>()?);
        Ok(Some(batch.map_err(io::Error::other)?))
    }
}

/// Lance's name of a type.
fn logical_type(kind: &DataType) -> Option<String> {
    LogicalType::try_from(kind).ok().map(|name| name.to_string())
}

/// The error of a file that is not read here, and may be by Lance.
fn unsupported(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, reason)
}
