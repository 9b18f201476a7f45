//! The names of the catalogue's rows.

use arrow::array::{Array, AsArray, StringArray};
use futures::{StreamExt, TryStreamExt};
use lance::Dataset;
use lance::dataset::fragment::FileFragment;

/// Fragments read at once.
const AT_ONCE: usize = 4;

/// Where a row of the catalogue is: rows are counted within their fragment, deleted ones left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowPosition {
    /// The number of the row's fragment.
    pub fragment: usize,
    /// The rows of the fragment that come before it.
    pub row: u32,
}

/// The names of all rows of one version, in a few large arrays: going through 100,000 of them takes less than a
/// millisecond, and nothing has to be built first.
#[derive(Debug)]
pub struct Names {
    pieces: Vec<Piece>,
}

#[derive(Debug)]
struct Piece {
    first: RowPosition,
    models: StringArray,
    layers: StringArray,
}

impl Names {
    /// Reads the names of a version.
    pub async fn read(dataset: &Dataset) -> lance::Result<Self> {
        let columns = dataset.schema().project(&["model", "layer"])?;
        let pieces = futures::stream::iter(dataset.get_fragments())
            .map(|fragment| read_fragment(fragment, &columns))
            .buffered(AT_ONCE)
            .try_collect::<Vec<_>>()
            .await?;
        Ok(Names { pieces: pieces.into_iter().flatten().collect() })
    }

    /// Finds the row of a layer.
    pub fn find(&self, model: &str, layer: &str) -> Option<RowPosition> {
        self.pieces.iter().find_map(|piece| {
            let row =
                (0..piece.layers.len()).find(|&i| piece.layers.value(i) == layer && piece.models.value(i) == model)?;
            Some(RowPosition { row: piece.first.row + row as u32, ..piece.first })
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
    let reader = fragment.open(columns, Default::default()).await?;
    let mut batches = reader.read_all(u32::MAX).await?.buffered(1);
    let mut pieces = vec![];
    let mut row = 0;
    while let Some(batch) = batches.try_next().await? {
        let text = |name: &str| {
            let column = batch.column_by_name(name).and_then(|c| c.as_string_opt::<i32>()).cloned();
            column.ok_or_else(|| lance::Error::internal(format!("the catalogue's column '{name}' holds no text")))
        };
        pieces.push(Piece {
            first: RowPosition { fragment: fragment.id(), row },
            models: text("model")?,
            layers: text("layer")?,
        });
        row += batch.num_rows() as u32;
    }
    Ok(pieces)
}
