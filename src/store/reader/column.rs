//! Columns of local data files, read straight into place.
//!
//! The data tables ask Lance to lay most of their columns out plainly: values one after another, fixed-width ones with
//! nothing between them, variable ones each behind its length, and a run of equal values as one. Its decoder takes some
//! 50 µs a column whatever the column's size, and copies the bytes two or three times; here a column is one read. What
//! is not laid out like this is left to the decoder, and so is all that a test compares with it.

use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, AsArray, FixedSizeBinaryArray, FixedSizeListArray, Float32Array, LargeBinaryArray, StringArray,
    UInt8Array, UInt32Array,
};
use arrow::buffer::{Buffer, OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{DataType, Field, Float32Type, UInt32Type};
use bytemuck::Pod;
use bytes::Bytes;
use lance_encoding::format::metadata::compressive_encoding::Compression;
use lance_encoding::format::metadata::full_zip_layout::Details;
use lance_encoding::format::metadata::page_layout::Layout;
use lance_encoding::format::metadata::{CompressiveEncoding, ConstantLayout, FullZipLayout};

use super::aligned::AlignedBuffer;
use super::page::{Page, contradiction};
use super::pread::{append, read_rows};
use super::source::ReadAt;

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
        /// Where the page says at which of its bytes each row begins, and the last ends, in entries of so many bytes.
        index: (Range<u64>, u64),
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
                            PageBytes::Prefixed { data: buffer(0)?, prefix, index: (index, length / entries) }
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

    /// Returns the field of what [`PlainColumn::read`] gives for a field of the table: offsets of bytes have 64 bits, since an
    /// artifact's may be more than 32-bit ones address.
    pub fn read_field(field: &Field) -> Field {
        match field.data_type() {
            DataType::Binary => field.clone().with_data_type(DataType::LargeBinary),
            _ => field.clone(),
        }
    }

    /// Adds the bytes of the file that the rows are read from, as far as is known before any is read. Where rows have any lengths, the page
    /// says where they begin: then those bytes are wanted, and those where the rows are if all are about as long, with `margin` more
    /// at both ends.
    pub fn wanted(&self, margin: u64, ranges: &mut Vec<Range<u64>>) {
        for piece in &self.pieces {
            match &piece.bytes {
                PageBytes::Fixed(data) => {
                    let Kind::Fixed(width) = self.kind else { continue };
                    let at = |row: u64| data.start.saturating_add(row.saturating_mul(width as u64)).min(data.end);
                    ranges.push(at(piece.rows.start)..at(piece.rows.end));
                }
                PageBytes::SameAt(data) => ranges.push(data.clone()),
                PageBytes::Prefixed { data, index: (index, width), .. } => {
                    let entry = |row: u64| index.start.saturating_add(row.saturating_mul(*width)).min(index.end);
                    ranges.push(entry(piece.rows.start)..entry(piece.rows.end.saturating_add(1)));
                    let rows = ((index.end - index.start) / (*width).max(1)).saturating_sub(1).max(1);
                    let length = data.end.saturating_sub(data.start);
                    let about = |row: u64| (u128::from(length) * u128::from(row.min(rows)) / u128::from(rows)) as u64;
                    let start = about(piece.rows.start).saturating_sub(margin);
                    let end = about(piece.rows.end).saturating_add(margin).min(length);
                    ranges.push(data.start + start..data.start + end);
                }
                PageBytes::Same(_) => {}
            }
        }
    }

    /// Reads the rows from a file of `size` bytes.
    ///
    /// # Errors
    /// When the file is shorter than its own description, or lengths in it do not add up.
    pub fn read(&self, file: &impl ReadAt, size: u64) -> io::Result<ArrayRef> {
        let ends = self.pieces.iter().filter_map(|piece| match &piece.bytes {
            PageBytes::Fixed(data) | PageBytes::SameAt(data) => Some(data.end),
            PageBytes::Prefixed { data, index: (index, _), .. } => Some(data.end.max(index.end)),
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

    fn fixed(&self, file: &impl ReadAt, width: usize) -> io::Result<ArrayRef> {
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
    fn values<T: Pod>(&self, file: &impl ReadAt, width: usize) -> io::Result<Vec<T>> {
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

    fn variable(&self, file: &impl ReadAt) -> io::Result<ArrayRef> {
        // Where each row begins in the column's bytes, and the last ends.
        let mut starts: Vec<usize> = vec![0];
        let mut runs = Vec::with_capacity(self.pieces.len());
        for piece in &self.pieces {
            let first = starts.len() - 1;
            let run = match &piece.bytes {
                PageBytes::Prefixed { data, prefix, index } => {
                    let at = add_starts(file, &piece.rows, (data, *prefix, index), &mut starts)?;
                    Run::Prefixed { at, prefix: *prefix }
                }
                PageBytes::SameAt(data) => {
                    let value = self.single(file, data)?;
                    repeat_starts(&mut starts, value.len(), piece.rows.end - piece.rows.start)?;
                    Run::Same(value)
                }
                PageBytes::Fixed(_) | PageBytes::Same(_) => {
                    return Err(contradiction("values of fixed width among others"));
                }
            };
            runs.push((run, first..starts.len() - 1));
        }
        let mut bytes = AlignedBuffer::new(starts.last().copied().unwrap_or_default())?;
        let mut left = bytes.all();
        for (run, rows) in runs {
            let starts = &starts[rows.start..=rows.end];
            let (into, rest) = left.split_at_mut(starts[starts.len() - 1] - starts[0]);
            left = rest;
            match run {
                Run::Prefixed { at, prefix } => read_rows(file, at, prefix, starts, into)?,
                Run::Same(value) => fill(into, &value),
            }
        }
        // SAFETY: each run has filled its part, and the parts are all there is.
        let bytes = unsafe { bytes.filled() };
        let array: ArrayRef = match self.field.data_type() {
            DataType::Utf8 => {
                let offsets = starts.iter().map(|&start| i32::try_from(start)).collect::<Result<Vec<i32>, _>>();
                let offsets = offsets.map_err(|_| contradiction("more bytes of texts than one array addresses"))?;
                let offsets = OffsetBuffer::new(ScalarBuffer::from(offsets));
                Arc::new(StringArray::try_new(offsets, bytes, None).map_err(io::Error::other)?)
            }
            _ => {
                let offsets = starts.iter().map(|&start| start as i64).collect::<Vec<i64>>();
                let offsets = OffsetBuffer::new(ScalarBuffer::from(offsets));
                Arc::new(LargeBinaryArray::try_new(offsets, bytes, None).map_err(io::Error::other)?)
            }
        };
        Ok(array)
    }

    /// The bytes of a value that Lance wrote by itself.
    fn single(&self, file: &impl ReadAt, data: &Range<u64>) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(data.end - data.start).map_err(io::Error::other)?];
        file.read_exact_at(&mut bytes, data.start)?;
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

/// Consecutive rows of any lengths.
enum Run {
    /// They lie from `at` on in the file, each behind its length in so many bytes.
    Prefixed { at: u64, prefix: usize },
    /// All of them are this value.
    Same(Vec<u8>),
}

/// Adds the starts of some rows of a page, as its index says, and returns where the first of them lies in the file. The index has an
/// entry for each row of the page and one more, and ends within the file.
fn add_starts(
    file: &impl ReadAt,
    rows: &Range<u64>,
    (data, prefix, (index, width)): (&Range<u64>, usize, &(Range<u64>, u64)),
    starts: &mut Vec<usize>,
) -> io::Result<u64> {
    let bytes = usize::try_from((rows.end - rows.start + 1) * width).map_err(io::Error::other)?;
    let mut entries = Vec::new();
    entries.try_reserve_exact(bytes)?;
    append::<u8>(file, index.start + rows.start * width, bytes, &mut entries)?;
    let mut entries = entries.chunks_exact((*width as usize).max(1)).map(|entry| {
        let mut bytes = [0; 8];
        bytes[..entry.len()].copy_from_slice(entry);
        u64::from_le_bytes(bytes)
    });
    let first = entries.next().ok_or_else(|| contradiction("a page has no index"))?;
    starts.try_reserve(entries.len())?;
    let (mut before, mut end) = (first, starts.last().copied().unwrap_or_default());
    for entry in entries {
        let length = entry.checked_sub(before).and_then(|length| length.checked_sub(prefix as u64));
        let length = length.and_then(|length| usize::try_from(length).ok());
        end = length.and_then(|length| end.checked_add(length)).ok_or_else(|| contradiction("rows overlap"))?;
        starts.push(end);
        before = entry;
    }
    if before > data.end - data.start {
        return Err(contradiction("a row ends behind its page"));
    }
    Ok(data.start + first)
}

/// Adds the starts of rows that are all of one length. Together they may be as long as 32-bit offsets address, however few bytes of
/// the file say so.
fn repeat_starts(starts: &mut Vec<usize>, length: usize, rows: u64) -> io::Result<()> {
    let total = usize::try_from(rows).ok().and_then(|rows| rows.checked_mul(length));
    let first = starts.last().copied().unwrap_or_default();
    match total.filter(|&total| total <= i32::MAX as usize).and_then(|total| first.checked_add(total)) {
        Some(_) => {
            starts.try_reserve(rows as usize)?;
            starts.extend((1..=rows as usize).map(|row| first + row * length));
            Ok(())
        }
        None => Err(contradiction("more bytes than one array addresses")),
    }
}

/// Fills memory with a value again and again.
fn fill(into: &mut [MaybeUninit<u8>], value: &[u8]) {
    for place in into.chunks_exact_mut(value.len().max(1)) {
        place.write_copy_of_slice(value);
    }
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
    use std::fs::File;

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
                    bytes: PageBytes::Prefixed { data: 0..11, prefix: 4, index: (11..23, 4) },
                }],
                rows: 2,
            };
            column.read(&File::open(&path).unwrap(), bytes.len() as u64)
        };
        let good = page([2, 1], [0, 6, 11]).unwrap();
        assert_eq!(good.as_binary::<i64>().iter().flatten().collect::<Vec<_>>(), [b"ab".as_slice(), b"c"]);
        for (lengths, index) in [
            ([2, 2], [0, 6, 11]),
            ([u32::MAX, 1], [0, 6, 11]),
            ([2, 0], [0, 6, 11]),
            ([2, 1], [9, 6, 2]),
            ([2, 1], [0, 6, 99]),
            ([2, 1], [0, 2, 11]),
            ([2, 1], [6, 6, 11]),
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
        let prefixed = PageBytes::Prefixed { data: 0..64, prefix: 4, index: (0..8 * rows, 8) };
        assert!(read(DataType::Binary, Kind::Variable, prefixed).is_err());
        assert!(read(DataType::Utf8, Kind::Variable, PageBytes::SameAt(0..64)).is_err());
    }
}
