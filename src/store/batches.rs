//! An artifact's parts as rows of the data tables. They are made when they are written, in batches of bounded size: until then an
//! artifact takes the memory of its parts, however much its rows repeat.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, BinaryArray, FixedSizeBinaryArray, FixedSizeListArray, Float32Array, LargeBinaryArray,
    RecordBatch, StringArray, UInt8Array, UInt32Array,
};
use arrow::buffer::{Buffer, OffsetBuffer};
use arrow::datatypes::{DataType, Field};
use arrow::error::ArrowError;
use bytes::Bytes;
use ndarray::{Array2, s};

use super::row_locations::RowLocations;
use super::schema::Table;
use crate::error::{Error, Result};
use crate::layer::parts::{Codebook, Codes, Factor, Keys, Tensor, WeightRows};
use crate::layer::{ArtifactId, Parts};

/// The most bytes of a batch, ids and lengths included, unless a single row has more: 32-bit offsets address them.
const BATCH_BYTES: usize = 64 << 20;

/// About how many bytes of a matrix make up a row of a table of blocks: so many that the id and the lengths beside them do not
/// count, and so few that a single row of the matrix is read fast.
const BLOCK_BYTES: usize = 64 << 10;

/// The most bytes of one value: what 32-bit offsets address. Where a page has a single row, Lance counts its bytes in 32 bits.
const VALUE_BYTES: usize = i32::MAX as usize;

/// What a row takes beside its values: the artifact's id, 4 bytes a number, and a length for texts and bytes.
const ID_BYTES: usize = 32;
const NUMBER_BYTES: usize = 4;
const LENGTH_BYTES: usize = 4;
const LARGE_LENGTH_BYTES: usize = 8;

/// What an artifact takes in memory beside its arrays and settings: lists, names, and its record.
const HELD_BYTES: usize = 1 << 10;

/// How weights, codes and codebooks lie in tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// A row of a matrix is a row of `weights`, `codes_m{m}` or `codebooks_d{d}`, as in format 1.
    Rows,
    /// Consecutive rows of a matrix are a row of `weight_blocks`, `code_blocks` or `codebook_blocks`, from format 2 on.
    Blocks,
}

impl Layout {
    /// Returns the layout of an artifact whose rows are there.
    pub fn of(locations: &RowLocations) -> Self {
        match locations.0.keys().any(|name| Table::named(name).is_some_and(Table::is_blocks)) {
            true => Layout::Blocks,
            false => Layout::Rows,
        }
    }
}

/// How much goes into a batch and into a block.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    batch: usize,
    block: usize,
}

const SIZES: Sizes = Sizes { batch: BATCH_BYTES, block: BLOCK_BYTES };

/// An artifact, and the rows that it comes to.
#[derive(Debug)]
pub struct ArtifactRows {
    id: ArtifactId,
    /// In the order in which their rows are stored.
    arrays: Vec<StoredArray>,
    batch_bytes: usize,
    held_bytes: u64,
}

/// An array of an artifact, and how it is divided into rows of its table.
#[derive(Debug)]
struct StoredArray {
    table: Table,
    array: Part,
    /// Rows of the array.
    rows: usize,
    /// How many of them make up a row of the table; the last row may hold fewer.
    held: usize,
    /// The most bytes of a row of the table.
    row_bytes: usize,
}

#[derive(Debug)]
enum Part {
    Keys(Keys),
    Values(Array2<f32>),
    Codebook(Codebook),
    Codes(Codes),
    Factor(Factor),
    Weights(WeightRows),
    Tensor(Tensor),
}

/// Consecutive rows of an array, for one batch.
#[derive(Debug, Clone)]
pub struct Piece {
    array: usize,
    rows: Range<usize>,
}

impl ArtifactRows {
    /// Returns the rows of the artifact of this name, with these parts.
    ///
    /// # Errors
    /// When a vector is longer than an Arrow list can be, there are more rows than a 32-bit number can count, a single value has
    /// more than 2³¹ − 1 bytes, or arrays of one matrix do not have as many rows.
    pub fn new(id: ArtifactId, parts: Parts, layout: Layout) -> Result<Self> {
        Self::sized(id, parts, layout, SIZES)
    }

    fn sized(id: ArtifactId, parts: Parts, layout: Layout, sizes: Sizes) -> Result<Self> {
        // The settings are in the artifact's record, too.
        let held_bytes = parts.stored_bytes() + (HELD_BYTES + 2 * parts.config.to_string().len()) as u64;
        let Parts { method: _, config: _, keys, values, codebooks, codes, factors, weights, tensors } = parts;
        let arrays = keys.map(Part::Keys).into_iter().chain(values.map(Part::Values));
        let arrays = arrays.chain(codebooks.into_iter().map(Part::Codebook)).chain(codes.into_iter().map(Part::Codes));
        let arrays = arrays.chain(factors.into_iter().map(Part::Factor)).chain(weights.map(Part::Weights));
        let arrays = arrays.chain(tensors.into_iter().map(Part::Tensor)).filter(|array| array.rows() > 0);
        let arrays = arrays.map(|array| array.stored(layout, sizes.block)).collect::<Result<_>>()?;
        Ok(ArtifactRows { id, arrays, batch_bytes: sizes.batch, held_bytes })
    }

    /// Returns the artifact's name.
    pub fn id(&self) -> ArtifactId {
        self.id
    }

    /// Returns the tables that the artifact has rows in, and how many, array by array.
    pub fn tables(&self) -> impl Iterator<Item = (Table, u64)> {
        self.arrays.iter().map(|stored| (stored.table, stored.rows.div_ceil(stored.held) as u64))
    }

    /// Returns the bytes of memory that are taken until the rows are written.
    pub fn held_bytes(&self) -> u64 {
        self.held_bytes
    }

    /// Returns what a table's rows are made from, in their order, a batch each.
    pub fn pieces(&self, table: Table) -> Vec<Piece> {
        let arrays = self.arrays.iter().enumerate().filter(|(_, stored)| stored.table == table);
        let pieces = arrays.flat_map(|(array, stored)| {
            let step = (self.batch_bytes / stored.row_bytes).max(1).saturating_mul(stored.held);
            let rows = stored.rows;
            (0..rows).step_by(step).map(move |start| Piece { array, rows: start..rows.min(start.saturating_add(step)) })
        });
        pieces.collect()
    }

    /// Makes the rows of a piece.
    ///
    /// # Errors
    /// When Arrow refuses the columns.
    pub fn batch(&self, piece: &Piece) -> std::result::Result<RecordBatch, ArrowError> {
        let stored = &self.arrays[piece.array];
        let count = piece.rows.len().div_ceil(stored.held);
        let names = std::iter::repeat_n(self.id.0.as_slice(), count);
        let mut columns: Vec<ArrayRef> = vec![Arc::new(FixedSizeBinaryArray::try_from_iter(names)?)];
        columns.extend(stored.columns(&piece.rows, count)?);
        RecordBatch::try_new(stored.table.schema(), columns)
    }
}

impl Part {
    fn rows(&self) -> usize {
        match self {
            Part::Keys(keys) => keys.vectors.nrows(),
            Part::Values(values) => values.nrows(),
            Part::Codebook(book) => book.vectors.nrows(),
            Part::Codes(codes) => codes.codes.nrows(),
            Part::Factor(factor) => factor.vectors.nrows(),
            Part::Weights(weights) => weights.rows,
            Part::Tensor(_) => 1,
        }
    }

    /// The array with its table and how it is divided. It has rows.
    fn stored(self, layout: Layout, block_bytes: usize) -> Result<StoredArray> {
        let rows = at_most("rows of a stored matrix", self.rows(), u32::MAX as usize)?;
        let text = |what: &str, text: &str| Ok::<_, Error>(LENGTH_BYTES + at_most(what, text.len(), VALUE_BYTES)?);
        let vector = |numbers: usize| match numbers {
            0 => Err(Error::expected("length of a stored vector", 0, "at least 1")),
            _ => at_most("length of a stored vector", numbers, VALUE_BYTES / 4),
        };
        // The table, the bytes of a row of it, and of blocks those that each row of the array adds to them.
        let (table, beside, each) = match (&self, layout) {
            (Part::Keys(Keys { vectors, scales }), _) => {
                as_many("scales of stored keys", scales.len(), rows)?;
                let d = vector(vectors.ncols())?;
                (Table::Keys(d), 2 * NUMBER_BYTES + 4 * d, None)
            }
            (Part::Values(values), _) => {
                let d = vector(values.ncols())?;
                (Table::Values(d), NUMBER_BYTES + 4 * d, None)
            }
            (Part::Codebook(book), layout) => {
                let (d, beside) = (vector(book.vectors.ncols())?, text("role of a stored codebook", &book.role)?);
                match layout {
                    Layout::Rows => (Table::Codebooks(d), beside + 2 * NUMBER_BYTES + 4 * d, None),
                    Layout::Blocks => {
                        (Table::CodebookBlocks, beside + 3 * NUMBER_BYTES + LARGE_LENGTH_BYTES, Some(4 * d))
                    }
                }
            }
            (Part::Codes(codes), layout) => {
                let (m, beside) = (vector(codes.codes.ncols())?, text("role of stored codes", &codes.role)?);
                match layout {
                    Layout::Rows => (Table::Codes(m), beside + NUMBER_BYTES + m, None),
                    Layout::Blocks => (Table::CodeBlocks, beside + 2 * NUMBER_BYTES + LARGE_LENGTH_BYTES, Some(m)),
                }
            }
            (Part::Factor(factor), _) => {
                as_many("singular values of a stored factor", factor.singular_values.len(), rows)?;
                let (d, side) = (vector(factor.vectors.ncols())?, factor.side.as_str());
                (Table::Factors(d), LENGTH_BYTES + side.len() + 2 * NUMBER_BYTES + 4 * d, None)
            }
            (Part::Weights(WeightRows { packed, scales, zeros, .. }), layout) => {
                let mut bytes = 0;
                for (what, all) in [("packed", packed), ("scales", scales), ("zeros", zeros)] {
                    if !all.len().is_multiple_of(rows) {
                        let expected = format!("a multiple of its {rows} rows");
                        return Err(Error::expected(format!("bytes of a stored weight's {what}"), all.len(), expected));
                    }
                    bytes += at_most("bytes of one stored weight row", all.len() / rows, VALUE_BYTES)?;
                }
                match layout {
                    Layout::Rows => (Table::Weights, NUMBER_BYTES + 3 * LENGTH_BYTES + bytes, None),
                    Layout::Blocks => (Table::WeightBlocks, 2 * NUMBER_BYTES + 3 * LARGE_LENGTH_BYTES, Some(bytes)),
                }
            }
            (Part::Tensor(tensor), _) => {
                let bytes =
                    at_most(&format!("bytes of stored tensor '{}'", tensor.name), tensor.data.len(), VALUE_BYTES)?;
                let texts =
                    text("name of a stored tensor", &tensor.name)? + text("dtype of a stored tensor", &tensor.dtype)?;
                (Table::Tensors, texts + shape_text(tensor).len() + LENGTH_BYTES + LARGE_LENGTH_BYTES + bytes, None)
            }
        };
        let held = each.map_or(1, |bytes| (block_bytes / bytes.max(1)).clamp(1, rows));
        let row_bytes = ID_BYTES + beside + each.map_or(0, |bytes| held * bytes);
        Ok(StoredArray { table, array: self, rows, held, row_bytes })
    }
}

impl StoredArray {
    /// The columns behind `artifact`, of `count` rows of the table.
    fn columns(&self, rows: &Range<usize>, count: usize) -> std::result::Result<Vec<ArrayRef>, ArrowError> {
        let text =
            |text: &str| -> ArrayRef { Arc::new(StringArray::from_iter_values(std::iter::repeat_n(text, count))) };
        let floats = |all: &[f32]| -> ArrayRef { Arc::new(Float32Array::from(all[rows.clone()].to_vec())) };
        let subspace = |book: &Codebook| -> ArrayRef { Arc::new(UInt32Array::from(vec![book.subspace; count])) };
        let blocks = self.table.is_blocks();
        Ok(match &self.array {
            Part::Keys(keys) => vec![self.first_rows(rows), floats(&keys.scales), vectors(&keys.vectors, rows)?],
            Part::Values(values) => vec![self.first_rows(rows), vectors(values, rows)?],
            Part::Codebook(book) if blocks => {
                let bytes = Buffer::from_vec(elements(&book.vectors, rows));
                vec![
                    text(&book.role),
                    subspace(book),
                    self.first_rows(rows),
                    self.counts(rows),
                    self.blocks(bytes, rows)?,
                ]
            }
            Part::Codebook(book) => {
                vec![text(&book.role), subspace(book), self.first_rows(rows), vectors(&book.vectors, rows)?]
            }
            Part::Codes(codes) if blocks => {
                let bytes = Buffer::from_vec(elements(&codes.codes, rows));
                vec![text(&codes.role), self.first_rows(rows), self.counts(rows), self.blocks(bytes, rows)?]
            }
            Part::Codes(Codes { role, codes }) => {
                let list = fixed_list(UInt8Array::from(elements(codes, rows)), DataType::UInt8, codes.ncols())?;
                vec![text(role), self.first_rows(rows), list]
            }
            Part::Factor(factor) => vec![
                text(factor.side.as_str()),
                self.first_rows(rows),
                floats(&factor.singular_values),
                vectors(&factor.vectors, rows)?,
            ],
            Part::Weights(WeightRows { packed, scales, zeros, .. }) => {
                let bytes = |all: &Bytes| match blocks {
                    true => self.blocks(Buffer::from(self.bytes_of(all, rows)), rows),
                    false => byte_rows(Buffer::from(self.bytes_of(all, rows)), rows.len()),
                };
                let bytes = [bytes(packed)?, bytes(scales)?, bytes(zeros)?];
                let counts = blocks.then(|| self.counts(rows));
                std::iter::once(self.first_rows(rows)).chain(counts).chain(bytes).collect()
            }
            Part::Tensor(tensor) => {
                let lengths = OffsetBuffer::from_lengths([tensor.data.len()]);
                let data = LargeBinaryArray::try_new(lengths, Buffer::from(tensor.data.clone()), None)?;
                vec![text(&tensor.name), text(&tensor.dtype), text(&shape_text(tensor)), Arc::new(data)]
            }
        })
    }

    /// The number of the first row of the array in each row of the table.
    fn first_rows(&self, rows: &Range<usize>) -> ArrayRef {
        Arc::new(UInt32Array::from_iter_values(rows.clone().step_by(self.held).map(|row| row as u32)))
    }

    /// How many rows of the array are in each row of the table.
    fn counts(&self, rows: &Range<usize>) -> ArrayRef {
        let starts = rows.clone().step_by(self.held);
        Arc::new(UInt32Array::from_iter_values(starts.map(|start| self.held.min(rows.end - start) as u32)))
    }

    /// The bytes of some rows of the array, of the bytes of all.
    fn bytes_of(&self, all: &Bytes, rows: &Range<usize>) -> Bytes {
        let width = all.len() / self.rows;
        all.slice(rows.start * width..rows.end * width)
    }

    /// The bytes of some rows of the array, block by block.
    fn blocks(&self, bytes: Buffer, rows: &Range<usize>) -> std::result::Result<ArrayRef, ArrowError> {
        let width = bytes.len() / rows.len();
        let starts = rows.clone().step_by(self.held);
        let lengths = OffsetBuffer::from_lengths(starts.map(|start| self.held.min(rows.end - start) * width));
        Ok(Arc::new(LargeBinaryArray::try_new(lengths, bytes, None)?))
    }
}

/// `found`, which may be `most` at most.
fn at_most(what: &str, found: usize, most: usize) -> Result<usize> {
    match found <= most {
        true => Ok(found),
        false => Err(Error::expected(what, found, format!("at most {most}"))),
    }
}

fn as_many(what: &str, found: usize, rows: usize) -> Result<()> {
    match found == rows {
        true => Ok(()),
        false => Err(Error::expected(what, found, format!("{rows}, as many as vectors"))),
    }
}

fn shape_text(tensor: &Tensor) -> String {
    serde_json::json!(tensor.shape).to_string()
}

/// Some rows of a matrix, one after another.
fn elements<T: Copy>(matrix: &Array2<T>, rows: &Range<usize>) -> Vec<T> {
    matrix.slice(s![rows.clone(), ..]).iter().copied().collect()
}

fn vectors(matrix: &Array2<f32>, rows: &Range<usize>) -> std::result::Result<ArrayRef, ArrowError> {
    fixed_list(Float32Array::from(elements(matrix, rows)), DataType::Float32, matrix.ncols())
}

fn fixed_list(
    values: impl Array + 'static,
    item: DataType,
    length: usize,
) -> std::result::Result<ArrayRef, ArrowError> {
    let length = i32::try_from(length).map_err(|e| ArrowError::from_external_error(Box::new(e)))?;
    let item = Arc::new(Field::new("item", item, false));
    Ok(Arc::new(FixedSizeListArray::try_new(item, length, Arc::new(values), None)?))
}

/// Bytes that hold so many rows of one length.
fn byte_rows(bytes: Buffer, rows: usize) -> std::result::Result<ArrayRef, ArrowError> {
    let lengths = OffsetBuffer::from_lengths(std::iter::repeat_n(bytes.len() / rows, rows));
    Ok(Arc::new(BinaryArray::try_new(lengths, bytes, None)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::parts::Side;
    use crate::store::row_locations::TableRows;
    use crate::store::tables::{add_rows, all_of};
    use proptest::prelude::*;
    use serde_json::json;

    const LAYOUTS: [Layout; 2] = [Layout::Rows, Layout::Blocks];

    fn matrix(rows: usize, columns: usize, seed: u32) -> Array2<f32> {
        Array2::from_shape_fn((rows, columns), |(i, j)| (i * 7 + j * 3 + seed as usize) as f32)
    }

    fn any_parts() -> impl Strategy<Value = Parts> {
        let shape = (0usize..40, 1usize..9, 1usize..4);
        (shape, 0u32..100, any::<bool>()).prop_map(|((rows, d, m), seed, square)| {
            let mut parts = Parts::new("key_value", json!({"seed": seed}));
            if rows > 0 {
                parts.keys =
                    Some(Keys { vectors: matrix(rows, d, seed), scales: (0..rows).map(|i| i as f32).collect() });
                parts.values = Some(matrix(rows, m, seed + 1));
                for role in ["keys", "values"] {
                    for subspace in 0..2 {
                        let vectors = matrix(rows, d, seed + subspace);
                        parts.codebooks.push(Codebook { role: role.into(), subspace, vectors });
                    }
                    let codes = Array2::from_shape_fn((rows, m), |(i, j)| (i + j) as u8);
                    parts.codes.push(Codes { role: role.into(), codes });
                }
                for (side, length) in [(Side::A, d), (Side::B, if square { d } else { d + 3 })] {
                    let vectors = matrix(rows, length, seed);
                    parts.factors.push(Factor { side, singular_values: vec![0.5; rows], vectors });
                }
                let bytes = |width: usize| (0..rows * width).map(|i| i as u8).collect::<Bytes>();
                let zeros = bytes(if square { 0 } else { 1 });
                parts.weights = Some(WeightRows { rows, packed: bytes(d), scales: bytes(4), zeros });
            }
            parts.tensors.push(Tensor::vector("bias", &[1.0, 2.0]));
            parts.tensors.push(Tensor {
                name: "scalar".into(),
                dtype: "BF16".into(),
                shape: vec![],
                data: Bytes::from_static(b"ab"),
            });
            parts
        })
    }

    /// All rows of a table, as they are written.
    fn batches(rows: &ArtifactRows, table: Table) -> Vec<RecordBatch> {
        rows.pieces(table).iter().map(|piece| rows.batch(piece).unwrap()).collect()
    }

    fn tables(rows: &ArtifactRows) -> std::collections::BTreeSet<Table> {
        rows.tables().map(|(table, _)| table).collect()
    }

    /// What the values of a batch take, without what a slice leaves out.
    fn bytes(batch: &RecordBatch) -> usize {
        batch.columns().iter().map(|column| column.to_data().get_slice_memory_size().unwrap()).sum()
    }

    proptest! {
        /// Any shape, in batches and blocks of any size, and read in slices of other sizes.
        #[test]
        fn rows_become_the_same_parts(
            parts in any_parts(),
            batch in prop_oneof![1usize..3000, Just(BATCH_BYTES)],
            block in prop_oneof![1usize..300, Just(BLOCK_BYTES)],
            split in 1usize..4,
        ) {
            let id = parts.id();
            for layout in LAYOUTS {
                let rows = ArtifactRows::sized(id, parts.clone(), layout, Sizes { batch, block }).unwrap();
                let mut back = Parts::new(parts.method.clone(), parts.config.clone());
                for table in tables(&rows) {
                    let batches = batches(&rows, table);
                    let count: u64 = rows.tables().filter(|(of, _)| *of == table).map(|(_, rows)| rows).sum();
                    prop_assert!(all_of(&batches, id, count));
                    for made in &batches {
                        prop_assert_eq!(made.schema(), table.schema());
                        // The ends of offsets are not counted, of three columns at most.
                        prop_assert!(made.num_rows() == 1 || bytes(made) <= batch + 24, "{} bytes", bytes(made));
                    }
                    let all = arrow::compute::concat_batches(&table.schema(), &batches).unwrap();
                    let slices = (0..all.num_rows()).step_by(split);
                    let slices = slices.map(|i| all.slice(i, split.min(all.num_rows() - i))).collect();
                    add_rows(&mut back, table, slices).unwrap();
                }
                prop_assert_eq!(back.id(), id);
                prop_assert_eq!(&back, &parts);
                let place = |(table, rows): (Table, u64)| (table.name(), TableRows { rows, ranges: vec![] });
                let locations = RowLocations(rows.tables().map(place).collect());
                prop_assert_eq!(Layout::of(&locations), if parts.weights.is_some() { layout } else { Layout::Rows });
            }
        }
    }

    fn weight(rows: usize, row_bytes: usize) -> Parts {
        let mut parts = Parts::new("dense", json!({}));
        let packed = (0..rows * row_bytes).map(|i| (i * 31) as u8).collect();
        parts.weights = Some(WeightRows { rows, packed, ..WeightRows::default() });
        parts
    }

    /// Rows of one byte have an id and lengths beside them: in no batch more than it may have, and in blocks next to nothing.
    #[test]
    fn what_repeats_is_counted() {
        let parts = weight(200_000, 1);
        let sizes = Sizes { batch: 1 << 20, ..SIZES };
        for (layout, most) in [(Layout::Rows, 60 * 200_000), (Layout::Blocks, 200_000 + 4 * 100)] {
            let rows = ArtifactRows::sized(parts.id(), parts.clone(), layout, sizes).unwrap();
            let table = if layout == Layout::Blocks { Table::WeightBlocks } else { Table::Weights };
            let made = batches(&rows, table);
            assert!(made.iter().all(|batch| bytes(batch) <= 1 << 20), "{layout:?}");
            assert!(made.iter().map(bytes).sum::<usize>() <= most, "{layout:?}");
            assert!(rows.held_bytes() < 202_000, "{layout:?}");
        }
        // Settings are held twice, with the rows to be and in the artifact's record.
        let settings = Parts::new("module", json!({"kind": "x".repeat(1 << 20)}));
        assert!(ArtifactRows::new(settings.id(), settings, Layout::Blocks).unwrap().held_bytes() > 2 << 20);
    }

    /// The rows of a released layout do not change: an artifact that is written again has as many as the catalogue says.
    #[test]
    fn blocks_are_as_released() {
        let blocks = |rows, row_bytes| {
            let parts = weight(rows, row_bytes);
            let rows = ArtifactRows::new(parts.id(), parts, Layout::Blocks).unwrap();
            let batch = rows.batch(&rows.pieces(Table::WeightBlocks)[0]).unwrap();
            let counts: &UInt32Array = batch.column(2).as_any().downcast_ref().unwrap();
            counts.values().to_vec()
        };
        assert_eq!(blocks(200_000, 1), [65_536, 65_536, 65_536, 3_392]);
        assert_eq!(blocks(400, 360), [182, 182, 36]);
        assert_eq!(blocks(3, 70_000), [1, 1, 1]);
        assert_eq!(blocks(5, 65_536), [1; 5]);
        assert_eq!(blocks(2, 1), [2]);
    }

    #[test]
    fn rows_of_another_artifact_or_order_are_refused() {
        let mut parts = weight(5, 2);
        parts.keys = Some(Keys { vectors: matrix(3, 2, 0), scales: vec![1.0; 3] });
        let (id, sizes) = (parts.id(), Sizes { batch: BATCH_BYTES, block: 4 });
        let rows = ArtifactRows::sized(id, parts, Layout::Blocks, sizes).unwrap();
        let refuse = |table: Table, rows: &[RecordBatch], expected: &str| {
            let message = add_rows(&mut Parts::new("key_value", json!({})), table, rows.to_vec()).unwrap_err();
            assert!(message.contains(expected), "{message}");
        };
        let keys = &batches(&rows, Table::Keys(2))[0];
        refuse(Table::Keys(2), &[keys.slice(1, 2)], "key 1 where key 0");
        refuse(Table::Keys(2), &[keys.clone(), keys.clone()], "key 0 where key 3");
        let blocks = &batches(&rows, Table::WeightBlocks)[0];
        refuse(Table::WeightBlocks, &[blocks.slice(1, 2)], "row 2 where row 0");
        refuse(Table::WeightBlocks, &[blocks.slice(0, 1), blocks.slice(2, 1)], "row 4 where row 2");
        refuse(Table::WeightBlocks, &[blocks.slice(0, 1), blocks.slice(0, 1)], "row 0 where row 2");
        let with_counts = |counts: [u32; 3], firsts: [u32; 3]| {
            let mut columns = blocks.columns().to_vec();
            columns[1] = Arc::new(UInt32Array::from(firsts.to_vec()));
            columns[2] = Arc::new(UInt32Array::from(counts.to_vec()));
            [RecordBatch::try_new(blocks.schema(), columns).unwrap()]
        };
        refuse(Table::WeightBlocks, &with_counts([2, 0, 1], [0, 2, 2]), "no rows where row 2");
        refuse(Table::WeightBlocks, &with_counts([2, 2, 2], [0, 2, 4]), "2 rows of packed in 2 bytes");
        refuse(Table::WeightBlocks, &with_counts([2, u32::MAX, 1], [0, 2, 1]), "rows from row 2 on");
        let all = std::slice::from_ref(keys);
        assert!(all_of(all, id, 3) && all_of(&[keys.slice(1, 2)], id, 2));
        assert!(!all_of(all, id, 2) && !all_of(all, ArtifactId([0; 32]), 3));
    }

    /// What no row can hold is refused before anything is written.
    #[test]
    fn what_does_not_fit_is_refused() {
        let refuse = |change: &dyn Fn(&mut Parts), expected: &str| {
            let mut parts = weight(4, 2);
            change(&mut parts);
            for layout in LAYOUTS {
                let error = ArtifactRows::new(ArtifactId([0; 32]), parts.clone(), layout).unwrap_err().to_string();
                assert!(error.contains(expected), "{error}");
            }
        };
        refuse(
            &|parts| parts.weights.as_mut().unwrap().scales = Bytes::from_static(b"abcde"),
            "multiple of its 4 rows",
        );
        let keys = |scales| Keys { vectors: matrix(3, 2, 0), scales };
        refuse(&|parts| parts.keys = Some(keys(vec![1.0; 2])), "3, as many as vectors");
        let factor = |n| Factor { side: Side::A, singular_values: vec![1.0; n], vectors: matrix(3, 2, 0) };
        refuse(&|parts| parts.factors = vec![factor(4)], "3, as many as vectors");
        let codes = |length| Codes { role: "keys".into(), codes: Array2::zeros((3, length)) };
        refuse(&|parts| parts.codes = vec![codes(0)], "at least 1");
        assert!(at_most("x", VALUE_BYTES + 1, VALUE_BYTES).is_err());
    }
}
