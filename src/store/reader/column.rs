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

use super::aligned::AlignedBuffer;
use super::page::{Page, contradiction};
use super::pread::{At, append, read_exact_at, read_rows};

/// Bytes read at a time where lengths have to be taken out: few, since new memory takes longer to get than to fill.
const WINDOW: usize = 16 << 10;

/// Consecutive rows of a column whose bytes lie plainly in the file.
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

/// Consecutive rows of one page.
#[derive(Debug)]
struct Piece {
    /// Counted from the page's first.
    rows: Range<u64>,
    bytes: PageBytes,
}

/// Where the values of a page are.
#[derive(Debug)]
enum PageBytes {
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
    /// Finds these rows of a column in its pages. `None` if the pages have fewer rows, or do not lie plainly.
    pub fn find(field: &Arc<Field>, pages: &[Page], rows: Range<u64>) -> Option<Self> {
        let kind = kind(field.data_type())?;
        let mut pieces = vec![];
        let mut first = 0;
        for page in pages {
            let end = u64::checked_add(first, page.rows)?;
            let wanted = rows.start.max(first)..rows.end.min(end);
            if wanted.start < wanted.end {
                let buffer = |i: usize| page.buffers.get(i).cloned();
                let bytes = match page.layout.layout.as_ref()? {
                    Layout::FullZipLayout(layout) => match (kind, prefix_bytes(field.data_type(), layout)?) {
                        (Kind::Fixed(_), 0) => PageBytes::Fixed(buffer(0)?),
                        (Kind::Variable, prefix @ 1..) => {
                            let index = buffer(1)?;
                            let (length, entries) = (index.end - index.start, page.rows.checked_add(1)?);
                            if length % entries != 0 || length / entries > 8 {
                                return None;
                            }
                            PageBytes::Prefixed { data: buffer(0)?, prefix, starts: (index.start, length / entries) }
                        }
                        _ => return None,
                    },
                    // One vector for all rows would be any number of bytes from few of the file: that is left to Lance.
                    Layout::ConstantLayout(_) if matches!(field.data_type(), DataType::FixedSizeList(..)) => {
                        return None;
                    }
                    Layout::ConstantLayout(layout) => match (same(layout)?, kind) {
                        (Some(value), Kind::Fixed(width)) if value.len() == width => PageBytes::Same(value.clone()),
                        (None, _) if page.buffers.len() == 1 => PageBytes::SameAt(buffer(0)?),
                        _ => return None,
                    },
                    _ => return None,
                };
                pieces.push(Piece { rows: wanted.start - first..wanted.end - first, bytes });
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
        let ends = self.pieces.iter().filter_map(|piece| match &piece.bytes {
            PageBytes::Fixed(data) | PageBytes::SameAt(data) | PageBytes::Prefixed { data, .. } => Some(data.end),
            PageBytes::Same(_) => None,
        });
        if ends.max().is_some_and(|end| end > size) {
            return Err(contradiction("a page ends behind the file"));
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
            other => return Err(contradiction(&format!("{other} among values of fixed width"))),
        };
        Ok(array)
    }

    /// All rows' numbers, in one allocation.
    fn values<T: Pod>(&self, file: &File, width: usize) -> io::Result<Vec<T>> {
        // Before memory is asked for: that the pages do hold so many rows.
        for piece in &self.pieces {
            if let PageBytes::Fixed(data) = &piece.bytes {
                let end = piece.rows.end.checked_mul(width as u64).and_then(|bytes| data.start.checked_add(bytes));
                if end.is_none_or(|end| end > data.end) {
                    return Err(contradiction("a page is shorter than its rows"));
                }
            }
        }
        let bytes = self.rows.checked_mul(width).ok_or_else(|| contradiction("too long"))?;
        let mut values = Vec::new();
        values.try_reserve_exact(bytes / size_of::<T>())?;
        let repeat = |values: &mut Vec<T>, value: &[u8], rows: u64| -> io::Result<()> {
            if value.len() != width {
                return Err(contradiction("a value is of another width"));
            }
            let value: Vec<T> = bytemuck::pod_collect_to_vec(value);
            (0..rows).for_each(|_| values.extend_from_slice(&value));
            Ok(())
        };
        for piece in &self.pieces {
            let rows = piece.rows.end - piece.rows.start;
            match &piece.bytes {
                PageBytes::Fixed(data) => {
                    let count = rows as usize * width / size_of::<T>();
                    append(file, data.start + piece.rows.start * width as u64, count, &mut values)?;
                }
                PageBytes::Same(value) => repeat(&mut values, value, rows)?,
                PageBytes::SameAt(data) => repeat(&mut values, &self.single(file, data)?, rows)?,
                PageBytes::Prefixed { .. } => return Err(contradiction("lengths before values of fixed width")),
            }
        }
        Ok(values)
    }

    fn variable(&self, file: &File) -> io::Result<ArrayRef> {
        let runs = self.pieces.iter().map(|piece| match &piece.bytes {
            PageBytes::Prefixed { data, prefix, starts } => {
                prefixed(file, &piece.rows, data, *prefix, *starts).map(Some)
            }
            PageBytes::SameAt(_) => Ok(None),
            PageBytes::Fixed(_) | PageBytes::Same(_) => Err(contradiction("values of fixed width among others")),
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
                return Err(contradiction("more bytes than one array addresses"));
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
        let (mut values, mut lengths): (Vec<u8>, Vec<usize>) = (vec![], vec![]);
        lengths.try_reserve_exact(self.rows)?;
        for (piece, run) in self.pieces.iter().zip(runs) {
            match (run, &piece.bytes) {
                (Some(run), _) => uneven(file, run, &mut values, &mut lengths)?,
                (None, PageBytes::SameAt(data)) => {
                    let (value, rows) = (self.single(file, data)?, piece.rows.end - piece.rows.start);
                    let total = usize::try_from(rows).ok().and_then(|rows| rows.checked_mul(value.len()));
                    if total.is_none_or(|total| total > i32::MAX as usize) {
                        return Err(contradiction("more bytes than one array addresses"));
                    }
                    values.try_reserve_exact(total.unwrap_or_default())?;
                    (0..rows).for_each(|_| values.extend_from_slice(&value));
                    lengths.extend(std::iter::repeat_n(value.len(), rows as usize));
                }
                (None, _) => return Err(contradiction("a piece of no kind")),
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
            other => return Err(contradiction(&format!("one value for a column of {other}"))),
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
        let entry = bytes.get_mut(..width as usize).ok_or_else(|| contradiction("an index entry is too wide"))?;
        read_exact_at(file, entry, index.saturating_add(row.saturating_mul(width)))?;
        data.start.checked_add(u64::from_le_bytes(bytes)).ok_or_else(|| contradiction("an entry overflows"))
    };
    let range = start(rows.start)?..start(rows.end)?;
    let count = rows.end - rows.start;
    let bytes = range.end.checked_sub(range.start).and_then(|b| b.checked_sub(count.saturating_mul(prefix as u64)));
    let bytes = bytes.filter(|_| range.end <= data.end).ok_or_else(|| contradiction("rows overlap"))?;
    Ok(Prefixed { range, prefix, rows: count, bytes: usize::try_from(bytes).map_err(io::Error::other)? })
}

/// All rows' bytes and how many each has, where those of a run are of one length.
fn even(file: &File, runs: &[Prefixed]) -> io::Result<Option<(Buffer, Vec<usize>)>> {
    let length = |run: &Prefixed| run.bytes / run.rows as usize;
    if runs.iter().any(|run| run.bytes == 0 || run.bytes % run.rows as usize != 0) {
        return Ok(None);
    }
    let total = runs.iter().try_fold(0usize, |sum, run| sum.checked_add(run.bytes));
    let mut buffer = AlignedBuffer::new(total.ok_or_else(|| contradiction("too long"))?)?;
    let mut left = buffer.all();
    for run in runs {
        let (into, rest) = left.split_at_mut(run.bytes);
        if !read_rows(file, run.range.start, run.prefix, length(run), into)? {
            return Ok(None);
        }
        left = rest;
    }
    let lengths = runs.iter().flat_map(|run| std::iter::repeat_n(length(run), run.rows as usize));
    // SAFETY: each run has filled its part, and the parts are all there is.
    Ok(Some((unsafe { buffer.filled() }, lengths.collect())))
}

/// Adds rows of any lengths.
fn uneven(file: &File, run: &Prefixed, values: &mut Vec<u8>, lengths: &mut Vec<usize>) -> io::Result<()> {
    let mut left = run.bytes;
    values.try_reserve_exact(left)?;
    let window = WINDOW.min((run.range.end - run.range.start) as usize);
    let mut bytes = BufReader::with_capacity(window, At { file, range: run.range.clone() });
    for _ in 0..run.rows {
        let mut length = [0; 8];
        bytes.read_exact(&mut length[..run.prefix])?;
        let length = usize::try_from(u64::from_le_bytes(length)).ok().filter(|&length| length <= left);
        let length = length.ok_or_else(|| contradiction("a row's length is beyond its page"))?;
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
        return Err(contradiction("lengths do not add up to the page"));
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
                    bytes: PageBytes::Prefixed { data: 0..11, prefix: 4, starts: (11, 4) },
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

    /// Rows that a file claims and has no bytes for are refused before memory is asked for.
    #[test]
    fn rows_that_are_not_there_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("page");
        std::fs::write(&path, [1; 64]).unwrap();
        let rows = 1u64 << 60;
        let read = |kind: DataType, width, bytes| {
            let column = PlainColumn {
                field: Arc::new(Field::new("column", kind, false)),
                kind: width,
                pieces: vec![Piece { rows: 0..rows, bytes }],
                rows: rows as usize,
            };
            column.read(&File::open(&path).unwrap(), 64)
        };
        assert!(read(DataType::UInt32, Kind::Fixed(4), PageBytes::Fixed(0..64)).is_err());
        assert!(read(DataType::UInt32, Kind::Fixed(4), PageBytes::Same(Bytes::from_static(b"abcd"))).is_err());
        let prefixed = PageBytes::Prefixed { data: 0..64, prefix: 4, starts: (0, 8) };
        assert!(read(DataType::Binary, Kind::Variable, prefixed).is_err());
        assert!(read(DataType::Utf8, Kind::Variable, PageBytes::SameAt(0..64)).is_err());
    }
}
