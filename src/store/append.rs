//! Rows appended to a table, and where they came to be.

use std::sync::Arc;

use arrow::array::{RecordBatch, RecordBatchIterator};
use arrow::datatypes::SchemaRef;
use arrow::error::ArrowError;
use lance::Dataset;
use lance::dataset::transaction::{Operation, Transaction, TransactionBuilder};
use lance::dataset::{CommitBuilder, InsertBuilder, WriteMode, WriteParams};

use super::batches::ArtifactRows;
use super::catalogue::create_table;
use super::format::{Format, without_missing};
use super::location::Location;
use super::row_locations::RowRange;
use super::schema::Table;
use super::strict::replacing;
use super::waiting::{Waiting, storage_error};
use crate::error::{Error, Result};

/// What was appended to a table.
#[derive(Debug)]
pub struct Appended {
    /// The version that has it.
    pub version: u64,
    /// The new data files with their rows, in order.
    pub files: Vec<(String, u64)>,
}

/// Appends the rows that artifacts have in a table, which is made first in the store's format where it is missing. They are made
/// meanwhile, batch by batch.
///
/// # Errors
/// When the storage refuses.
pub async fn append_rows(
    place: (&Location, &Format),
    table: Table,
    artifacts: &Arc<Vec<ArtifactRows>>,
) -> Result<Appended> {
    let name = table.name();
    let dataset = Arc::new(open_or_create(place, &name).await?);
    let pieces = artifacts.iter().enumerate().map(|(owner, rows)| (owner, rows.pieces(table)));
    let pieces: Vec<_> = pieces.flat_map(|(owner, all)| all.into_iter().map(move |piece| (owner, piece))).collect();
    let artifacts = artifacts.clone();
    // They have no column that a later format adds to the table.
    let batches = pieces.into_iter().map(move |(owner, piece)| artifacts[owner].batch(&piece));
    let written = uncommitted(&dataset, table.schema(), batches).during(appending(&name)).await?;
    let (transaction, files) = written;
    let commit = CommitBuilder::new(dataset).with_skip_auto_cleanup(true).execute(transaction);
    Ok(Appended { version: commit.during(appending(&name)).await?.version_id(), files })
}

fn appending(table: &str) -> String {
    format!("appending to table '{table}'")
}

/// Opens a table for writing, made first in the store's format where it is missing.
///
/// # Errors
/// When the storage refuses.
pub async fn open_or_create((location, format): (&Location, &Format), table: &str) -> Result<Dataset> {
    let action = || format!("opening table '{table}'");
    match location.open_for_write(table).await {
        Err(lance::Error::DatasetNotFound { .. }) => {
            let schema = location.formats().schema(table, format.version);
            let schema = schema.ok_or_else(|| Error::expected("table", table, "one of the format's"))?;
            create_table(location, table, schema).await?;
            location.open_for_write(table).during(action()).await
        }
        opened => opened.map_err(storage_error(action())),
    }
}

/// Rows that are written, and not yet part of their table: what makes them so, and their files with the rows of each, in order.
pub type Uncommitted = (Transaction, Vec<(String, u64)>);

/// Writes rows of a table, without a commit; `None` where there are none. Columns of the table that the batches do not have, which
/// take nulls, are left out of the new files.
///
/// # Errors
/// When the storage refuses, or the table has no column for what is not null.
pub async fn write(
    (location, format): (&Location, &Format),
    (table, dataset): (&str, &Arc<Dataset>),
    batches: Vec<RecordBatch>,
) -> Result<Option<Uncommitted>> {
    let fitted = |batch| without_missing(batch, (table, dataset), (location.uri(), format));
    let batches = batches.into_iter().map(fitted).collect::<Result<Vec<_>>>()?;
    let Some(schema) = batches.first().map(RecordBatch::schema) else { return Ok(None) };
    let written = uncommitted(dataset, schema, batches.into_iter().map(Ok)).during(appending(table)).await?;
    Ok(Some(written))
}

/// Writes rows of a table, without a commit.
///
/// # Errors
/// When the storage refuses.
pub async fn uncommitted(
    dataset: &Arc<Dataset>,
    schema: SchemaRef,
    batches: impl Iterator<Item = std::result::Result<RecordBatch, ArrowError>> + Send + 'static,
) -> lance::Result<Uncommitted> {
    let params = WriteParams { mode: WriteMode::Append, ..WriteParams::default() };
    let reader = RecordBatchIterator::new(batches, schema);
    let transaction =
        InsertBuilder::new(dataset.clone()).with_params(&params).execute_uncommitted_stream(reader).await?;
    let Operation::Append { fragments } = &transaction.operation else {
        return Err(lance::Error::internal(format!("an append came to be {}", transaction.operation.name())));
    };
    let mut written = Vec::with_capacity(fragments.len());
    for fragment in fragments {
        let [file] = fragment.files.as_slice() else {
            return Err(lance::Error::internal(format!("a new fragment has {} data files", fragment.files.len())));
        };
        written.push((file.path.clone(), fragment.physical_rows.unwrap_or_default() as u64));
    }
    Ok((transaction, written))
}

/// Puts rows that were written in the place of whole fragments of their table, in one commit.
///
/// # Errors
/// When the storage refuses, or another has changed these fragments meanwhile.
pub async fn replace_fragments(
    (table, dataset): (&str, Arc<Dataset>),
    removed: Vec<u64>,
    written: Vec<Transaction>,
) -> Result<()> {
    let mut new_fragments = vec![];
    for transaction in written {
        if let Operation::Append { fragments } = transaction.operation {
            new_fragments.extend(fragments);
        }
    }
    if removed.is_empty() && new_fragments.is_empty() {
        return Ok(());
    }
    let operation = match removed.is_empty() {
        true => Operation::Append { fragments: new_fragments },
        false => replacing(removed, vec![], new_fragments),
    };
    let transaction = TransactionBuilder::new(dataset.version_id(), operation).build();
    let commit = CommitBuilder::new(dataset).with_skip_auto_cleanup(true).execute(transaction);
    commit.during(format!("replacing rows of table '{table}'")).await?;
    Ok(())
}

/// Hands out consecutive rows of a list of files.
pub struct Written {
    files: std::vec::IntoIter<(String, u64)>,
    current: Option<(String, u64)>,
    offset: u64,
}

impl Written {
    /// Returns all rows of these files.
    pub fn new(files: Vec<(String, u64)>) -> Self {
        Written { files: files.into_iter(), current: None, offset: 0 }
    }

    /// Takes the next rows; `None` where fewer are left.
    pub fn take(&mut self, mut rows: u64) -> Option<Vec<RowRange>> {
        let mut ranges = Vec::new();
        while rows > 0 {
            match &self.current {
                Some((file, size)) if self.offset < *size => {
                    let taken = rows.min(size - self.offset);
                    ranges.push(RowRange { file: file.clone(), offset: self.offset, rows: taken });
                    self.offset += taken;
                    rows -= taken;
                }
                _ => {
                    self.current = Some(self.files.next()?);
                    self.offset = 0;
                }
            }
        }
        Some(ranges)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_go_on_in_the_next_file() {
        let run = |file: &str, offset, rows| RowRange { file: file.into(), offset, rows };
        let mut written = Written::new(vec![("a".into(), 3), ("b".into(), 0), ("c".into(), 10)]);
        assert_eq!(written.take(2).unwrap(), [run("a", 0, 2)]);
        assert_eq!(written.take(4).unwrap(), [run("a", 2, 1), run("c", 0, 3)]);
        assert_eq!(written.take(0).unwrap(), []);
        assert_eq!(written.take(8), None);
    }
}
