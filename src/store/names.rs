//! The names of rows of the catalogue.

use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch, StringArray, UInt64Array};
use arrow::datatypes::UInt64Type;
use futures::{StreamExt, TryStreamExt};
use lance::Dataset;
use lance::dataset::fragment::{FileFragment, FragReadConfig};
use lance::table::format::Fragment;

use super::scan::{FRAGMENTS_AT_ONCE, ROW_ADDRESS, rows_at};

/// The columns of a row's name.
const NAMES: [&str; 2] = ["model", "layer"];

/// So many rows at most are read with their names.
const WHOLE_ROWS: usize = 512;

/// The names of rows of one version, in a few large arrays: going through 100,000 of them takes less than a millisecond, and nothing
/// has to be built first.
#[derive(Debug, Default)]
pub struct Names {
    pieces: Vec<Piece>,
}

#[derive(Debug)]
struct Piece {
    addresses: UInt64Array,
    models: StringArray,
    layers: StringArray,
    /// The rows, where all that is read of them is at hand.
    rows: Option<RecordBatch>,
}

/// A row that was found by its name.
#[derive(Debug)]
pub struct FoundRow {
    /// Its address.
    pub address: u64,
    /// The row itself, with its address, where it was read with the names.
    pub row: Option<RecordBatch>,
}

impl Names {
    /// Reads the names of all rows of fragments.
    pub async fn read(dataset: &Arc<Dataset>, fragments: &[Fragment]) -> lance::Result<Self> {
        let columns = dataset.schema().project(&NAMES)?;
        let fragments: Vec<FileFragment> =
            fragments.iter().map(|fragment| FileFragment::new(dataset.clone(), fragment.clone())).collect();
        let pieces = futures::stream::iter(fragments)
            .map(|fragment| read_fragment(fragment, &columns))
            .buffered(FRAGMENTS_AT_ONCE)
            .try_collect::<Vec<_>>()
            .await?;
        Ok(Names { pieces: pieces.into_iter().flatten().collect() })
    }

    /// Reads the names of rows at these addresses, as [`rows_at`] does; and the rows themselves, all these columns of them, where they
    /// are few: to read them together takes less time than to read a row after the names.
    pub async fn at(dataset: &Arc<Dataset>, addresses: &[u64], all: &[String]) -> lance::Result<Self> {
        let whole = addresses.len() <= WHOLE_ROWS;
        let columns = if whole { dataset.schema().project(all)? } else { dataset.schema().project(&NAMES)? };
        let batches = rows_at(dataset, addresses, &columns).await?;
        let pieces = batches.into_iter().map(|batch| {
            let piece = piece(&batch)?;
            Ok(Piece { rows: whole.then_some(batch), ..piece })
        });
        Ok(Names { pieces: pieces.collect::<lance::Result<_>>()? })
    }

    /// Adds others.
    pub fn extend(&mut self, others: Names) {
        self.pieces.extend(others.pieces);
    }

    /// Finds the row of a layer.
    pub fn find(&self, model: &str, layer: &str) -> Option<FoundRow> {
        self.pieces.iter().find_map(|piece| {
            let row =
                (0..piece.layers.len()).find(|&i| piece.layers.value(i) == layer && piece.models.value(i) == model)?;
            let rows = piece.rows.as_ref();
            Some(FoundRow { address: piece.addresses.value(row), row: rows.map(|rows| rows.slice(row, 1)) })
        })
    }

    /// Returns the names of a model's layers.
    pub fn layers_of<'a>(&'a self, model: &'a str) -> impl Iterator<Item = &'a str> {
        self.pieces.iter().flat_map(move |piece| {
            (0..piece.layers.len()).filter(move |&i| piece.models.value(i) == model).map(|i| piece.layers.value(i))
        })
    }

    /// Returns the names of all models.
    pub fn models(&self) -> Vec<String> {
        let mut models: Vec<&str> = self.pieces.iter().flat_map(|p| p.models.iter().flatten()).collect();
        models.sort_unstable();
        models.dedup();
        models.into_iter().map(str::to_owned).collect()
    }
}

async fn read_fragment(fragment: FileFragment, columns: &lance::datatypes::Schema) -> lance::Result<Vec<Piece>> {
    let reader = fragment.open(columns, FragReadConfig::default().with_row_address(true)).await?;
    let mut batches = reader.read_all(u32::MAX).await?.buffered(1);
    let mut pieces = vec![];
    while let Some(batch) = batches.try_next().await? {
        pieces.push(piece(&batch)?);
    }
    Ok(pieces)
}

fn piece(batch: &RecordBatch) -> lance::Result<Piece> {
    let text = |name: &str| {
        let column = batch.column_by_name(name).and_then(|c| c.as_string_opt::<i32>()).cloned();
        column.ok_or_else(|| lance::Error::internal(format!("the catalogue's column '{name}' holds no text")))
    };
    let addresses = batch.column_by_name(ROW_ADDRESS).and_then(|c| c.as_primitive_opt::<UInt64Type>()).cloned();
    let addresses = addresses.ok_or_else(|| lance::Error::internal("rows without addresses"))?;
    Ok(Piece { addresses, models: text("model")?, layers: text("layer")?, rows: None })
}
