//! Columns of local data files, read straight into place.
//!
//! The data tables ask Lance to lay most of their columns out plainly: values one after another, fixed-width ones with
//! nothing between them, variable ones each behind its length, and a run of equal values as one. Its decoder takes some
//! 50 µs a column whatever the column's size, and copies the bytes two or three times; here a column is one read. What
//! is not laid out like this is left to the decoder, and so is all that a test compares with it.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, AsArray, BinaryArray, FixedSizeBinaryArray, FixedSizeListArray, Float32Array, LargeBinaryArray,
    StringArray, UInt8Array, UInt32Array,
};
use arrow::buffer::{Buffer, OffsetBuffer};
use arrow::datatypes::{DataType, Field, Float32Type, UInt32Type};
use bytemuck::Pod;
use bytes::Bytes;
use lance_encoding::format::metadata::compressive_encoding::Compression;
use lance_encoding::format::metadata::full_zip_layout::Details;
use lance_encoding::format::metadata::page_layout::Layout;
use lance_encoding::format::metadata::{CompressiveEncoding, ConstantLayout, FullZipLayout};

use super::local::{Page, invalid};
use super::pread::{At, append, read_exact_at, read_rows};
use super::room::Room;

/// Read at a time where lengths have to be taken out: little, since memory that nobody has touched takes longer to get than
/// to fill.
const WINDOW: usize = 16 << 10;

/// A run of rows of a column whose bytes lie plainly in the file.
#[derive(Debug)]
pub struct PlainColumn {
    field: Arc<Field>,
    kind: Kind,
    pieces: Vec<Piece>,
    rows: usize,
}

/// What the values of a column are made of.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    /// This many bytes each.
    Fixed(usize),
    /// Any number of bytes.
    Variable,
}

/// A run of rows of one page.
#[derive(Debug)]
struct Piece {
    rows: Range<u64>,
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// Fixed-width values in these bytes of the file.
    Fixed(Range<u64>),
    /// Values behind their lengths.
    Prefixed {
        data: Range<u64>,
        /// The bytes of a length.
        prefix: usize,
        /// Where the page says at which of its bytes each row begins: the first entry, and the bytes of one.
        starts: (u64, u64),
    },
    /// One value for all rows, in the file's description.
    Same(Bytes),
    /// One value for all rows, as Lance writes a single value into these bytes.
    SameAt(Range<u64>),
}

impl PlainColumn {
    /// These rows of a column, if that is how they lie in the file.
    pub fn find(field: &Arc<Field>, pages: &[Page], rows: Range<u64>) -> Option<Self> {
        let kind = kind(field.data_type())?;
        let mut pieces = vec![];
        let mut first = 0;
        for page in pages {
            let end = u64::checked_add(first, page.rows)?;
            let wanted = rows.start.max(first)..rows.end.min(end);
            if wanted.start < wanted.end {
                let buffer = |i: usize| page.buffers.get(i).cloned();
                let source = match page.layout.layout.as_ref()? {
                    Layout::FullZipLayout(layout) => match (kind, prefix_bytes(field.data_type(), layout)?) {
                        (Kind::Fixed(_), 0) => Source::Fixed(buffer(0)?),
                        (Kind::Variable, prefix @ 1..) => {
                            let index = buffer(1)?;
                            let (bytes, entries) = (index.end - index.start, page.rows.checked_add(1)?);
                            if bytes % entries != 0 || bytes / entries > 8 {
                                return None;
                            }
                            Source::Prefixed { data: buffer(0)?, prefix, starts: (index.start, bytes / entries) }
                        }
                        _ => return None,
                    },
                    Layout::ConstantLayout(layout) => match (same(layout)?, kind) {
                        (Some(value), Kind::Fixed(width)) if value.len() == width => Source::Same(value.clone()),
                        (None, _) if page.buffers.len() == 1 => Source::SameAt(buffer(0)?),
                        _ => return None,
                    },
                    _ => return None,
                };
                pieces.push(Piece { rows: wanted.start - first..wanted.end - first, source });
            }
            first = end;
        }
        let column = PlainColumn {
            field: field.clone(),
            kind,
            pieces,
            rows: usize::try_from(rows.end.checked_sub(rows.start)?).ok()?,
        };
        (rows.end <= first).then_some(column)
    }

    /// Reads the rows from a file of `size` bytes.
    ///
    /// # Errors
    /// When the file is shorter than its own description, or lengths in it do not add up.
    pub fn read(&self, file: &File, size: u64) -> io::Result<ArrayRef> {
        let ends = self.pieces.iter().filter_map(|piece| match &piece.source {
            Source::Fixed(data) | Source::SameAt(data) | Source::Prefixed { data, .. } => Some(data.end),
            Source::Same(_) => None,
        });
        if ends.max().is_some_and(|end| end > size) {
            return Err(invalid("a page ends behind the file"));
        }
        match self.kind {
            Kind::Fixed(width) => self.fixed(file, width),
            Kind::Variable => self.variable(file),
        }
    }

    fn fixed(&self, file: &File, width: usize) -> io::Result<ArrayRef> {
        let array: ArrayRef = match self.field.data_type() {
            DataType::UInt32 => Arc::new(UInt32Array::from(self.values::<u32>(file, width)?)),
            DataType::Float32 => Arc::new(Float32Array::from(self.values::<f32>(file, width)?)),
            DataType::FixedSizeBinary(size) => {
                let bytes = Buffer::from(self.values::<u8>(file, width)?);
                Arc::new(FixedSizeBinaryArray::try_new(*size, bytes, None).map_err(io::Error::other)?)
            }
            DataType::FixedSizeList(item, length) => {
                let values: ArrayRef = match item.data_type() {
                    DataType::Float32 => Arc::new(Float32Array::from(self.values::<f32>(file, width)?)),
                    _ => Arc::new(UInt8Array::from(self.values::<u8>(file, width)?)),
                };
                Arc::new(FixedSizeListArray::try_new(item.clone(), *length, values, None).map_err(io::Error::other)?)
            }
            other => return Err(invalid(&format!("{other} among values of fixed width"))),
        };
        Ok(array)
    }

    /// All rows' numbers, in one allocation.
    fn values<T: Pod>(&self, file: &File, width: usize) -> io::Result<Vec<T>> {
        // Before memory is asked for: that the pages do hold so many rows.
        for piece in &self.pieces {
            if let Source::Fixed(data) = &piece.source {
                let end = piece.rows.end.checked_mul(width as u64).and_then(|bytes| data.start.checked_add(bytes));
                if end.is_none_or(|end| end > data.end) {
                    return Err(invalid("a page is shorter than its rows"));
                }
            }
        }
        let bytes = self.rows.checked_mul(width).ok_or_else(|| invalid("too long"))?;
        let mut values = Vec::with_capacity(bytes / size_of::<T>());
        let repeat = |values: &mut Vec<T>, value: &[u8], rows: u64| -> io::Result<()> {
            if value.len() != width {
                return Err(invalid("a value is of another width"));
            }
            let value: Vec<T> = bytemuck::pod_collect_to_vec(value);
            (0..rows).for_each(|_| values.extend_from_slice(&value));
            Ok(())
        };
        for piece in &self.pieces {
            let rows = piece.rows.end - piece.rows.start;
            match &piece.source {
                Source::Fixed(data) => {
                    let count = rows as usize * width / size_of::<T>();
                    append(file, data.start + piece.rows.start * width as u64, count, &mut values)?;
                }
                Source::Same(value) => repeat(&mut values, value, rows)?,
                Source::SameAt(data) => repeat(&mut values, &self.single(file, data)?, rows)?,
                Source::Prefixed { .. } => return Err(invalid("lengths before values of fixed width")),
            }
        }
        Ok(values)
    }

    fn variable(&self, file: &File) -> io::Result<ArrayRef> {
        let runs = self.pieces.iter().map(|piece| match &piece.source {
            Source::Prefixed { data, prefix, starts } => prefixed(file, &piece.rows, data, *prefix, *starts).map(Some),
            Source::SameAt(_) => Ok(None),
            Source::Fixed(_) | Source::Same(_) => Err(invalid("values of fixed width among others")),
        });
        let runs: Vec<Option<Prefixed>> = runs.collect::<io::Result<_>>()?;
        // As those of nearly all layers are.
        let even = runs.iter().cloned().collect::<Option<Vec<Prefixed>>>().map(|runs| even(file, &runs)).transpose()?;
        let (bytes, lengths) = match even.flatten() {
            Some(read) => read,
            None => self.uneven(file, &runs)?,
        };
        let array: ArrayRef = match self.field.data_type() {
            DataType::LargeBinary => {
                let offsets = OffsetBuffer::<i64>::from_lengths(lengths);
                Arc::new(LargeBinaryArray::try_new(offsets, bytes, None).map_err(io::Error::other)?)
            }
            _ if i32::try_from(bytes.len()).is_err() => {
                return Err(invalid("more bytes than one array addresses"));
            }
            DataType::Utf8 => {
                let offsets = OffsetBuffer::<i32>::from_lengths(lengths);
                Arc::new(StringArray::try_new(offsets, bytes, None).map_err(io::Error::other)?)
            }
            _ => {
                let offsets = OffsetBuffer::<i32>::from_lengths(lengths);
                Arc::new(BinaryArray::try_new(offsets, bytes, None).map_err(io::Error::other)?)
            }
        };
        Ok(array)
    }

    /// All rows' bytes, and how many each has, row by row.
    fn uneven(&self, file: &File, runs: &[Option<Prefixed>]) -> io::Result<(Buffer, Vec<usize>)> {
        let (mut values, mut lengths) = (vec![], Vec::with_capacity(self.rows));
        for (piece, run) in self.pieces.iter().zip(runs) {
            match (run, &piece.source) {
                (Some(run), _) => uneven(file, run, &mut values, &mut lengths)?,
                (None, Source::SameAt(data)) => {
                    let (value, rows) = (self.single(file, data)?, piece.rows.end - piece.rows.start);
                    let total = usize::try_from(rows).ok().and_then(|rows| rows.checked_mul(value.len()));
                    if total.is_none_or(|total| total > i32::MAX as usize) {
                        return Err(invalid("more bytes than one array addresses"));
                    }
                    values.extend(value.repeat(rows as usize));
                    lengths.extend(std::iter::repeat_n(value.len(), rows as usize));
                }
                (None, _) => return Err(invalid("a piece of no kind")),
            }
        }
        Ok((values.into(), lengths))
    }

    /// The bytes of a value that Lance wrote by itself.
    fn single(&self, file: &File, data: &Range<u64>) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(data.end - data.start).map_err(io::Error::other)?];
        read_exact_at(file, &mut bytes, data.start)?;
        let kind = self.field.data_type();
        let value = lance_arrow::scalar::decode_scalar_from_value_buffer(kind, &bytes).map_err(io::Error::other)?;
        let value = match kind {
            DataType::UInt32 => value.as_primitive::<UInt32Type>().value(0).to_le_bytes().to_vec(),
            DataType::Float32 => value.as_primitive::<Float32Type>().value(0).to_le_bytes().to_vec(),
            DataType::FixedSizeBinary(_) => value.as_fixed_size_binary().value(0).to_vec(),
            DataType::Utf8 => value.as_string::<i32>().value(0).into(),
            DataType::Binary => value.as_binary::<i32>().value(0).into(),
            DataType::LargeBinary => value.as_binary::<i64>().value(0).into(),
            other => return Err(invalid(&format!("one value for a column of {other}"))),
        };
        Ok(value)
    }
}

/// Rows that lie one after another in a file, each behind its length.
#[derive(Debug, Clone)]
struct Prefixed {
    range: Range<u64>,
    /// Bytes of a length.
    prefix: usize,
    rows: u64,
    /// Bytes of the rows without their lengths.
    bytes: usize,
}

/// Where these rows of a page lie in the file.
fn prefixed(
    file: &File,
    rows: &Range<u64>,
    data: &Range<u64>,
    prefix: usize,
    (index, width): (u64, u64),
) -> io::Result<Prefixed> {
    let start = |row: u64| -> io::Result<u64> {
        let mut bytes = [0; 8];
        let entry = bytes.get_mut(..width as usize).ok_or_else(|| invalid("an index entry is too wide"))?;
        read_exact_at(file, entry, index.saturating_add(row.saturating_mul(width)))?;
        data.start.checked_add(u64::from_le_bytes(bytes)).ok_or_else(|| invalid("an entry overflows"))
    };
    let range = start(rows.start)?..start(rows.end)?;
    let count = rows.end - rows.start;
    let bytes = range.end.checked_sub(range.start).and_then(|b| b.checked_sub(count.saturating_mul(prefix as u64)));
    let bytes = bytes.filter(|_| range.end <= data.end).ok_or_else(|| invalid("rows overlap"))?;
    Ok(Prefixed { range, prefix, rows: count, bytes: usize::try_from(bytes).map_err(io::Error::other)? })
}

/// All rows' bytes and how many each has, where those of a run are of one length.
fn even(file: &File, runs: &[Prefixed]) -> io::Result<Option<(Buffer, Vec<usize>)>> {
    let length = |run: &Prefixed| run.bytes / run.rows as usize;
    if runs.iter().any(|run| run.bytes == 0 || run.bytes % run.rows as usize != 0) {
        return Ok(None);
    }
    let total = runs.iter().try_fold(0usize, |sum, run| sum.checked_add(run.bytes));
    let mut room = Room::new(total.ok_or_else(|| invalid("too long"))?)?;
    let mut left = room.all();
    for run in runs {
        let (into, rest) = left.split_at_mut(run.bytes);
        if !read_rows(file, run.range.start, run.prefix, length(run), into)? {
            return Ok(None);
        }
        left = rest;
    }
    let lengths = runs.iter().flat_map(|run| std::iter::repeat_n(length(run), run.rows as usize));
    // SAFETY: each run has filled its part, and the parts are all there is.
    Ok(Some((unsafe { room.filled() }, lengths.collect())))
}

/// Adds rows of any lengths.
fn uneven(file: &File, run: &Prefixed, values: &mut Vec<u8>, lengths: &mut Vec<usize>) -> io::Result<()> {
    let mut left = run.bytes;
    values.reserve_exact(left);
    let window = WINDOW.min((run.range.end - run.range.start) as usize);
    let mut bytes = BufReader::with_capacity(window, At { file, range: run.range.clone() });
    for _ in 0..run.rows {
        let mut length = [0; 8];
        bytes.read_exact(&mut length[..run.prefix])?;
        let length = usize::try_from(u64::from_le_bytes(length)).ok().filter(|&length| length <= left);
        let length = length.ok_or_else(|| invalid("a row's length is beyond its page"))?;
        lengths.push(length);
        left -= length;
        let mut missing = length;
        while missing > 0 {
            let some = bytes.fill_buf()?;
            let some = &some[..missing.min(some.len())];
            if some.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            values.extend_from_slice(some);
            let taken = some.len();
            bytes.consume(taken);
            missing -= taken;
        }
    }
    if left > 0 {
        return Err(invalid("lengths do not add up to the page"));
    }
    Ok(())
}

/// What a column's values are made of, for the types that the data tables have.
fn kind(kind: &DataType) -> Option<Kind> {
    match kind {
        DataType::UInt32 | DataType::Float32 => Some(Kind::Fixed(4)),
        DataType::FixedSizeBinary(bytes) => Some(Kind::Fixed(usize::try_from(*bytes).ok()?)),
        DataType::FixedSizeList(item, length) => {
            let bytes = match item.data_type() {
                DataType::Float32 => 4,
                DataType::UInt8 => 1,
                _ => return None,
            };
            Some(Kind::Fixed(usize::try_from(*length).ok()?.checked_mul(bytes)?))
        }
        DataType::Binary | DataType::LargeBinary | DataType::Utf8 => Some(Kind::Variable),
        _ => None,
    }
}

/// The bytes of the length before each value of a page, 0 for values of fixed width, if the values lie plainly.
fn prefix_bytes(kind: &DataType, layout: &FullZipLayout) -> Option<usize> {
    let whole = layout.bits_rep == 0 && layout.bits_def == 0 && layout.num_items == layout.num_visible_items;
    let compression = layout.value_compression.as_ref()?;
    let prefix = match (kind, compression.compression.as_ref()?, &layout.details) {
        (
            DataType::FixedSizeList(item, length),
            Compression::FixedSizeList(list),
            Some(Details::BitsPerValue(bits)),
        ) => {
            let item = if *item.data_type() == DataType::Float32 { 32 } else { 8 };
            let length = u64::try_from(*length).ok()?;
            let fits = list.items_per_value == length
                && !list.has_validity
                && Some(u64::from(*bits)) == length.checked_mul(item)
                && list.values.as_ref().is_some_and(|values| flat(values, item));
            fits.then_some(0)
        }
        (DataType::UInt32 | DataType::Float32 | DataType::FixedSizeBinary(_), _, Some(Details::BitsPerValue(bits))) => {
            let expected =
                if let DataType::FixedSizeBinary(bytes) = kind { u64::try_from(*bytes).ok()? * 8 } else { 32 };
            (u64::from(*bits) == expected && flat(compression, expected)).then_some(0)
        }
        (
            DataType::Binary | DataType::LargeBinary | DataType::Utf8,
            Compression::Variable(variable),
            Some(Details::BitsPerOffset(bits)),
        ) => {
            let fits = matches!(bits, 32 | 64)
                && variable.values.is_none()
                && variable.offsets.as_ref().is_some_and(|offsets| flat(offsets, u64::from(*bits)));
            fits.then_some(*bits as usize / 8)
        }
        _ => None,
    };
    prefix.filter(|_| whole)
}

/// The one value of a page of equal ones, if it is in the description and not in the page.
fn same(layout: &ConstantLayout) -> Option<Option<&Bytes>> {
    let plain = layout.num_rep_values == 0
        && layout.num_def_values == 0
        && layout.rep_compression.is_none()
        && layout.def_compression.is_none();
    plain.then_some(layout.inline_value.as_ref())
}

fn flat(encoding: &CompressiveEncoding, bits: u64) -> bool {
    matches!(&encoding.compression, Some(Compression::Flat(flat)) if flat.bits_per_value == bits && flat.data.is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::RecordBatch;
    use proptest::prelude::*;

    use crate::store::files::{Files, Run};
    use crate::store::local::LocalFile;
    use crate::store::location::Location;
    use crate::store::schema::Table;
    use crate::store::writer::append;

    /// Rows of wide values of both kinds, some pages of them, and any run of these: as the decoder reads them.
    #[test]
    fn reads_what_the_decoder_reads() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let location = Location::new(folder.path().to_str().unwrap(), None).unwrap();
        let files = Arc::new(Files::new(location.clone()));
        let rows = 3000usize;
        let keys = {
            let names = FixedSizeBinary::new(rows);
            let values: Vec<f32> = (0..rows * 700).map(|i| (i as f32).sin()).collect();
            let DataType::FixedSizeList(item, length) = Table::Keys(700).schema().field(3).data_type().clone() else {
                panic!()
            };
            let vectors =
                FixedSizeListArray::try_new(item, length, Arc::new(Float32Array::from(values)), None).unwrap();
            let scales = Float32Array::from_iter_values((0..rows).map(|i| i as f32));
            RecordBatch::try_new(
                Table::Keys(700).schema(),
                vec![names.0, counted(rows), Arc::new(scales), Arc::new(vectors)],
            )
            .unwrap()
        };
        let weights = {
            let packed: Vec<Vec<u8>> = (0..rows)
                .map(|i| (0..2000 + i % 3).map(|j| (((i * 2003 + j) * 40_503) >> 7) as u8).collect())
                .collect();
            let few: Vec<Vec<u8>> = (0..rows).map(|i| vec![i as u8; 4]).collect();
            let bytes = |rows: &[Vec<u8>]| -> ArrayRef { Arc::new(BinaryArray::from_iter_values(rows)) };
            RecordBatch::try_new(
                Table::Weights.schema(),
                vec![FixedSizeBinary::new(rows).0, counted(rows), bytes(&packed), bytes(&few), bytes(&few)],
            )
            .unwrap()
        };
        let one = |bytes: &[u8]| -> ArrayRef {
            Arc::new(FixedSizeBinaryArray::try_from_iter(std::iter::repeat_n(bytes, rows)).unwrap())
        };
        let same = |text: &str| -> ArrayRef { Arc::new(StringArray::from_iter_values(vec![text; rows])) };
        let list = |kind: &Table, values: ArrayRef, column: usize| -> ArrayRef {
            let DataType::FixedSizeList(item, length) = kind.schema().field(column).data_type().clone() else {
                panic!()
            };
            Arc::new(FixedSizeListArray::try_new(item, length, values, None).unwrap())
        };
        let factors = {
            let table = Table::Factors(3);
            let vectors = Float32Array::from_iter_values((0..rows * 3).map(|i| i as f32));
            let columns = vec![
                one(&[9; 32]),
                same("a"),
                counted(rows),
                Arc::new(Float32Array::from(vec![0.5; rows])),
                list(&table, Arc::new(vectors), 4),
            ];
            RecordBatch::try_new(table.schema(), columns).unwrap()
        };
        let codes = {
            let table = Table::Codes(5);
            let roles = StringArray::from_iter_values((0..rows).map(|i| ["keys", "values"][i * 2 / rows]));
            let codes = UInt8Array::from_iter_values((0..rows * 5).map(|i| (i * i) as u8));
            let columns =
                vec![one(&[7; 32]), Arc::new(roles) as ArrayRef, counted(rows), list(&table, Arc::new(codes), 3)];
            RecordBatch::try_new(table.schema(), columns).unwrap()
        };
        let mut written = vec![];
        for (table, batch) in [
            (Table::Keys(700), &keys),
            (Table::Weights, &weights),
            (Table::Factors(3), &factors),
            (Table::Codes(5), &codes),
        ] {
            let name = table.name();
            let done = append(&location, &name, table.schema(), vec![batch.clone()]);
            let file = runtime.block_on(done).unwrap().remove(0).0;
            written.push((table, batch, file));
        }
        proptest!(ProptestConfig::with_cases(40), |(start in 0usize..2999, length in 1usize..3000)| {
            let run = start..(start + length).min(rows);
            for (table, batch, file) in &written {
                let range = run.start as u64..run.end as u64;
                let expected = batch.slice(run.start, run.len());
                let joined = |batches: Vec<RecordBatch>| {
                    arrow::compute::concat_batches(&batches[0].schema(), &batches).unwrap()
                };
                let run = Run { table: table.name(), file: file.clone(), rows: range };
                let fast = joined(files.local_rows(std::slice::from_ref(&run)).unwrap().unwrap());
                let slow = joined(runtime.block_on(files.rows(&[run])).unwrap().remove(0));
                for (slow, fast) in slow.columns().iter().zip(fast.columns()) {
                    // Lance calls the items of every list nullable.
                    prop_assert_eq!(&arrow::compute::cast(slow, fast.data_type()).unwrap(), fast);
                }
                prop_assert_eq!(fast.columns(), expected.columns());
            }
        });
        for (table, _, file) in &written {
            let run = |rows| [Run { table: table.name(), file: file.clone(), rows }];
            assert!(files.local_rows(&run(2990..3001)).unwrap().is_none());
            assert!(runtime.block_on(files.rows(&run(2990..3001))).is_err());
            // Pages that are not there any more, or a description that is cut off, are no panic.
            let path = folder.path().join(format!("{}.lance/data/{file}", table.name()));
            let bytes = std::fs::read(&path).unwrap();
            let cut = File::options().write(true).open(&path).unwrap();
            cut.set_len(5000).unwrap();
            assert!(files.local_rows(&run(0..3000)).is_err());
            for length in (0..bytes.len()).rev().step_by(97).take(60).chain(0..45) {
                std::fs::write(&path, &bytes[..length]).unwrap();
                assert!(LocalFile::open(&path, table.schema()).is_err(), "{length} of {} bytes", bytes.len());
            }
            // Nor is a byte that is not what was written, wherever in the description it is.
            for place in (bytes.len().saturating_sub(4000)..bytes.len()).step_by(7) {
                let mut flipped = bytes.clone();
                flipped[place] ^= 0x55;
                std::fs::write(&path, &flipped).unwrap();
                let _ = Files::new(location.clone()).local_rows(&run(0..3000));
            }
        }
    }

    struct FixedSizeBinary(ArrayRef);

    impl FixedSizeBinary {
        fn new(rows: usize) -> Self {
            let names = (0..rows).map(|i| [i as u8; 32]);
            FixedSizeBinary(Arc::new(arrow::array::FixedSizeBinaryArray::try_from_iter(names).unwrap()))
        }
    }

    fn counted(rows: usize) -> ArrayRef {
        Arc::new(arrow::array::UInt32Array::from_iter_values(0..rows as u32))
    }

    #[test]
    fn lengths_that_contradict_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("page");
        // Two rows, "ab" and "c", then the index of where rows begin.
        let page = |lengths: [u32; 2], index: [u32; 3]| {
            let mut bytes = vec![];
            for (length, value) in lengths.iter().zip([b"ab".as_slice(), b"c"]) {
                bytes.extend(length.to_le_bytes());
                bytes.extend(value);
            }
            index.iter().for_each(|i| bytes.extend(i.to_le_bytes()));
            std::fs::write(&path, &bytes).unwrap();
            let column = PlainColumn {
                field: Arc::new(Field::new("packed", DataType::Binary, false)),
                kind: Kind::Variable,
                pieces: vec![Piece {
                    rows: 0..2,
                    source: Source::Prefixed { data: 0..11, prefix: 4, starts: (11, 4) },
                }],
                rows: 2,
            };
            column.read(&File::open(&path).unwrap(), bytes.len() as u64)
        };
        let good = page([2, 1], [0, 6, 11]).unwrap();
        assert_eq!(good.as_binary::<i32>().iter().flatten().collect::<Vec<_>>(), [b"ab".as_slice(), b"c"]);
        for (lengths, index) in [
            ([2, 2], [0, 6, 11]),
            ([u32::MAX, 1], [0, 6, 11]),
            ([2, 0], [0, 6, 11]),
            ([2, 1], [9, 6, 2]),
            ([2, 1], [0, 6, 99]),
        ] {
            assert!(page(lengths, index).is_err(), "{lengths:?} {index:?}");
        }
    }
}
