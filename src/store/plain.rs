//! Large columns of local data files, read straight into place.
//!
//! Lance lays wide values out one after another, uncompressed: fixed-width ones with nothing between them, variable ones
//! each behind its length. Its decoder copies such bytes two or three times, which for megabytes costs more than reading
//! them does. What is not laid out like this is left to the decoder, and so is all that a test compares with it.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{ArrayRef, BinaryArray, FixedSizeListArray, Float32Array};
use arrow::buffer::{Buffer, OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{DataType, Field};
use lance_encoding::decoder::{ColumnInfo, PageEncoding};
use lance_encoding::format::metadata::compressive_encoding::Compression;
use lance_encoding::format::metadata::full_zip_layout::Details;
use lance_encoding::format::metadata::page_layout::Layout;
use lance_encoding::format::metadata::{CompressiveEncoding, FullZipLayout};

/// Below this many bytes the decoder is as fast.
const LARGE: u64 = 64 << 10;

/// Read at a time where lengths have to be taken out.
const WINDOW: usize = 256 << 10;

/// A run of rows of a column whose bytes lie plainly in the file.
#[derive(Debug)]
pub struct PlainColumn {
    field: Arc<Field>,
    kind: Kind,
    pieces: Vec<Piece>,
    rows: usize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    /// f32 vectors of this length.
    Vectors(usize),
    /// Bytes behind their length, in this many bytes.
    Prefixed(usize),
}

/// A run of rows of one page.
#[derive(Debug)]
struct Piece {
    rows: Range<u64>,
    /// The values' bytes in the file.
    data: Range<u64>,
    /// Where the page says at which of these bytes each row begins, for rows of varying width: the first entry, and
    /// the bytes of one.
    starts: Option<(u64, u64)>,
}

impl PlainColumn {
    /// These rows of a column, if that is how they lie in the file and there are enough of them to matter.
    pub fn find(field: &Arc<Field>, column: &ColumnInfo, rows: Range<u64>) -> Option<Self> {
        let mut kind = None;
        let mut pieces = vec![];
        let mut first = 0;
        for page in column.page_infos.iter() {
            let wanted = rows.start.max(first)..rows.end.min(first + page.num_rows);
            if wanted.start < wanted.end {
                let PageEncoding::Structural(layout) = &page.encoding else { return None };
                let Some(Layout::FullZipLayout(layout)) = &layout.layout else { return None };
                let found = plain(field.data_type(), layout)?;
                if *kind.get_or_insert(found) != found {
                    return None;
                }
                let &(at, size) = page.buffer_offsets_and_sizes.first()?;
                let data = at..at.checked_add(size)?;
                let starts = match (found, page.buffer_offsets_and_sizes.get(1)) {
                    (Kind::Vectors(_), _) => None,
                    (Kind::Prefixed(_), Some(&(at, size))) if size % (page.num_rows + 1) == 0 => {
                        Some((at, size / (page.num_rows + 1)))
                    }
                    _ => return None,
                };
                pieces.push(Piece { rows: wanted.start - first..wanted.end - first, data, starts });
            }
            first += page.num_rows;
        }
        let bytes: u64 = pieces.iter().map(|p| p.data.end - p.data.start).sum();
        let column = PlainColumn {
            field: field.clone(),
            kind: kind?,
            pieces,
            rows: usize::try_from(rows.end - rows.start).ok()?,
        };
        (rows.end <= first && bytes >= LARGE).then_some(column)
    }

    /// Reads the rows.
    ///
    /// # Errors
    /// When the file is shorter than its own description, or lengths in it do not add up.
    pub fn read(&self, file: &File) -> io::Result<ArrayRef> {
        let size = file.metadata()?.len();
        if self.pieces.iter().any(|p| p.data.end > size) {
            return Err(inconsistent("a page ends behind the file"));
        }
        match self.kind {
            Kind::Vectors(length) => self.vectors(file, length),
            Kind::Prefixed(prefix) => self.prefixed(file, prefix),
        }
    }

    fn vectors(&self, file: &File, length: usize) -> io::Result<ArrayRef> {
        let DataType::FixedSizeList(item, size) = self.field.data_type() else {
            return Err(inconsistent("vectors in a column of another type"));
        };
        let width = 4 * length as u64;
        let mut ranges = vec![];
        for piece in &self.pieces {
            let at = |row: u64| row.checked_mul(width).and_then(|bytes| piece.data.start.checked_add(bytes));
            match (at(piece.rows.start), at(piece.rows.end)) {
                (Some(start), Some(end)) if end <= piece.data.end => ranges.push(start..end),
                _ => return Err(inconsistent("a page is shorter than its rows")),
            }
        }
        let mut values = vec![0f32; self.rows * length];
        let mut rest = values.as_mut_slice();
        for range in ranges {
            let (now, later) = rest.split_at_mut(((range.end - range.start) / 4) as usize);
            read_exact_at(file, bytemuck::cast_slice_mut(now), range.start)?;
            rest = later;
        }
        let values = Arc::new(Float32Array::from(values));
        Ok(Arc::new(FixedSizeListArray::try_new(item.clone(), *size, values, None).map_err(io::Error::other)?))
    }

    fn prefixed(&self, file: &File, prefix: usize) -> io::Result<ArrayRef> {
        let mut ranges = vec![];
        let mut total = 0usize;
        for piece in &self.pieces {
            let (at, width) = piece.starts.ok_or_else(|| inconsistent("no index of rows"))?;
            let start = |row: u64| -> io::Result<u64> {
                let mut bytes = [0; 8];
                let entry =
                    bytes.get_mut(..width as usize).ok_or_else(|| inconsistent("an index entry is too wide"))?;
                read_exact_at(file, entry, at.saturating_add(row.saturating_mul(width)))?;
                piece
                    .data
                    .start
                    .checked_add(u64::from_le_bytes(bytes))
                    .ok_or_else(|| inconsistent("an entry overflows"))
            };
            let range = start(piece.rows.start)?..start(piece.rows.end)?;
            let prefixes = (piece.rows.end - piece.rows.start).saturating_mul(prefix as u64);
            let bytes = range.end.checked_sub(range.start).and_then(|bytes| bytes.checked_sub(prefixes));
            let bytes = bytes.filter(|_| range.end <= piece.data.end).ok_or_else(|| inconsistent("rows overlap"))?;
            total = usize::try_from(bytes)
                .ok()
                .and_then(|b| total.checked_add(b))
                .ok_or_else(|| inconsistent("too long"))?;
            ranges.push((range, piece.rows.end - piece.rows.start));
        }
        if i32::try_from(total).is_err() {
            return Err(inconsistent("more bytes than one array addresses"));
        }
        let mut values = vec![0u8; total];
        let mut offsets = Vec::with_capacity(self.rows + 1);
        let mut filled = 0usize;
        offsets.push(0i32);
        for (range, rows) in ranges {
            let window = WINDOW.min((range.end - range.start) as usize);
            let mut bytes = BufReader::with_capacity(window, At { file, range });
            for _ in 0..rows {
                let mut length = [0; 8];
                bytes.read_exact(&mut length[..prefix])?;
                let end =
                    usize::try_from(u64::from_le_bytes(length)).ok().and_then(|length| filled.checked_add(length));
                let target = end.and_then(|end| values.get_mut(filled..end));
                let target = target.ok_or_else(|| inconsistent("a row's length is beyond its page"))?;
                bytes.read_exact(target)?;
                filled += target.len();
                offsets.push(filled as i32);
            }
        }
        if filled != total {
            return Err(inconsistent("lengths do not add up to the page"));
        }
        let offsets = OffsetBuffer::new(ScalarBuffer::from(offsets));
        Ok(Arc::new(BinaryArray::try_new(offsets, Buffer::from(values), None).map_err(io::Error::other)?))
    }
}

/// How a page's values lie, if plainly.
fn plain(kind: &DataType, layout: &FullZipLayout) -> Option<Kind> {
    let whole = layout.bits_rep == 0 && layout.bits_def == 0 && layout.num_items == layout.num_visible_items;
    let compression = layout.value_compression.as_ref()?.compression.as_ref()?;
    match (kind, compression, &layout.details) {
        (
            DataType::FixedSizeList(item, length),
            Compression::FixedSizeList(list),
            Some(Details::BitsPerValue(bits)),
        ) => {
            let length = usize::try_from(*length).ok()?;
            let fits = *item.data_type() == DataType::Float32
                && list.items_per_value == length as u64
                && !list.has_validity
                && u64::from(*bits) == 32 * length as u64
                && list.values.as_ref().is_some_and(|values| flat(values, 32));
            (whole && fits).then_some(Kind::Vectors(length))
        }
        (DataType::Binary, Compression::Variable(variable), Some(Details::BitsPerOffset(bits))) => {
            let fits = matches!(bits, 32 | 64)
                && variable.values.is_none()
                && variable.offsets.as_ref().is_some_and(|offsets| flat(offsets, u64::from(*bits)));
            (whole && fits).then_some(Kind::Prefixed(*bits as usize / 8))
        }
        _ => None,
    }
}

fn flat(encoding: &CompressiveEncoding, bits: u64) -> bool {
    matches!(&encoding.compression, Some(Compression::Flat(flat)) if flat.bits_per_value == bits && flat.data.is_none())
}

fn inconsistent(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the file contradicts itself: {what}"))
}

/// A range of a file, as a stream of its own.
struct At<'a> {
    file: &'a File,
    range: Range<u64>,
}

impl Read for At<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.range.end - self.range.start).unwrap_or(usize::MAX);
        let some = into.len().min(left);
        let read = read_at(self.file, &mut into[..some], self.range.start)?;
        self.range.start += read as u64;
        Ok(read)
    }
}

fn read_at(file: &File, into: &mut [u8], at: u64) -> io::Result<usize> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_at(file, into, at);
    #[cfg(windows)]
    return std::os::windows::fs::FileExt::seek_read(file, into, at);
}

fn read_exact_at(file: &File, into: &mut [u8], at: u64) -> io::Result<()> {
    At { file, range: at..at.saturating_add(into.len() as u64) }.read_exact(into)
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{AsArray, RecordBatch};
    use proptest::prelude::*;

    use crate::store::files::Files;
    use crate::store::location::Location;
    use crate::store::schema::Table;
    use crate::store::writer::append;

    /// Rows of wide values of both kinds, some pages of them, and any run of these: as the decoder reads them.
    #[test]
    fn reads_what_the_decoder_reads() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let location = Location::new(folder.path().to_str().unwrap(), None).unwrap();
        let files = Files::new(location.clone());
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
        let mut written = vec![];
        for (table, batch, column) in [(Table::Keys(700), &keys, "vector"), (Table::Weights, &weights, "packed")] {
            let name = table.name();
            let done = append(&location, &name, table.schema(), vec![batch.clone()]);
            let file = runtime.block_on(done).unwrap().remove(0).0;
            let found = runtime.block_on(files.plain_columns(&table.name(), &file, 0..rows as u64)).unwrap();
            assert_eq!(found, [column], "of {}", table.name());
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
                let fast = joined(runtime.block_on(files.rows(&table.name(), file, range.clone())).unwrap());
                let slow = joined(runtime.block_on(files.decoded(&table.name(), file, range)).unwrap());
                prop_assert_eq!(fast.columns(), slow.columns());
                for (found, written) in fast.columns().iter().zip(expected.columns()) {
                    // Lance calls the items of every list nullable.
                    prop_assert_eq!(found, &arrow::compute::cast(written, found.data_type()).unwrap());
                }
            }
        });
        for (table, _, file) in &written {
            assert!(runtime.block_on(files.rows(&table.name(), file, 2990..3001)).is_err());
            // A page that is not there any more is no panic.
            let path = folder.path().join(format!("{}.lance/data/{file}", table.name()));
            File::options().write(true).open(&path).unwrap().set_len(5000).unwrap();
            assert!(runtime.block_on(files.rows(&table.name(), file, 0..3000)).is_err());
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
                kind: Kind::Prefixed(4),
                pieces: vec![Piece { rows: 0..2, data: 0..11, starts: Some((11, 4)) }],
                rows: 2,
            };
            column.read(&File::open(&path).unwrap())
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
