//! Columns of rows that were read, by name and type. What is missing, or of another type, is told in words, for the caller to put
//! the artifact's name to.

use arrow::array::{ArrayRef, AsArray, OffsetSizeTrait, RecordBatch};
use arrow::buffer::Buffer;
use arrow::datatypes::{Float32Type, UInt32Type};
use bytes::Bytes;

/// What was found, or why it is not what was written.
pub type Found<T> = std::result::Result<T, String>;

/// Returns a column of a batch.
pub fn column<'a>(batch: &'a RecordBatch, name: &str) -> Found<&'a ArrayRef> {
    batch.column_by_name(name).ok_or_else(|| format!("its table has no column '{name}'"))
}

/// Returns the text in a row.
pub fn text<'a>(batch: &'a RecordBatch, name: &str, row: usize) -> Found<&'a str> {
    let array = column(batch, name)?.as_string_opt::<i32>().ok_or_else(|| other_type(name))?;
    Ok(array.value(row))
}

/// Returns the numbers of all rows.
pub fn numbers<'a>(batch: &'a RecordBatch, name: &str) -> Found<&'a [u32]> {
    Ok(column(batch, name)?.as_primitive_opt::<UInt32Type>().ok_or_else(|| other_type(name))?.values())
}

/// Returns the number in a row.
pub fn number(batch: &RecordBatch, name: &str, row: usize) -> Found<u32> {
    Ok(numbers(batch, name)?[row])
}

/// Returns the floats of all rows.
pub fn floats<'a>(batch: &'a RecordBatch, name: &str) -> Found<&'a [f32]> {
    Ok(column(batch, name)?.as_primitive_opt::<Float32Type>().ok_or_else(|| other_type(name))?.values())
}

/// An Arrow buffer as the owner of the bytes it holds.
struct Owned(Buffer);

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        self.0.as_slice()
    }
}

/// Returns a buffer's bytes, which stay where they are.
pub fn shared(buffer: Buffer) -> Bytes {
    Bytes::from_owner(Owned(buffer))
}

/// Joins the bytes of all rows of a matrix, without a copy where one batch holds them all. `counts` says how many rows of the matrix
/// are in each row of the batches: all of them have to be of one length.
pub fn joined_bytes(batches: &[RecordBatch], name: &str, counts: impl IntoIterator<Item = u32>) -> Found<Buffer> {
    let (mut counts, mut width, mut pieces) = (counts.into_iter(), None, vec![]);
    for batch in batches {
        let array = column(batch, name)?;
        pieces.push(match (array.as_binary_opt::<i32>(), array.as_binary_opt::<i64>()) {
            (Some(bytes), _) => even(name, bytes.values(), bytes.value_offsets(), &mut counts, &mut width)?,
            (_, Some(bytes)) => even(name, bytes.values(), bytes.value_offsets(), &mut counts, &mut width)?,
            (None, None) => return Err(other_type(name)),
        });
    }
    match pieces.len() {
        1 => Ok(pieces.remove(0)),
        _ => Ok(Buffer::from_vec(pieces.iter().map(Buffer::as_slice).collect::<Vec<_>>().concat())),
    }
}

/// The bytes between the first and the last of these offsets, where each row of the matrix has as many.
fn even<O: OffsetSizeTrait>(
    name: &str,
    bytes: &Buffer,
    offsets: &[O],
    counts: &mut impl Iterator<Item = u32>,
    width: &mut Option<usize>,
) -> Found<Buffer> {
    for (ends, count) in offsets.windows(2).zip(counts) {
        let (length, count) = ((ends[1] - ends[0]).as_usize(), count as usize);
        let width = *width.get_or_insert(length / count.max(1));
        if width.checked_mul(count) != Some(length) {
            return Err(format!("{count} rows of {name} in {length} bytes, where a row has {width}"));
        }
    }
    let (first, last) = (offsets.first(), offsets.last());
    let (first, last) = (first.map_or(0, |o| o.as_usize()), last.map_or(0, |o| o.as_usize()));
    Ok(bytes.slice_with_length(first, last - first))
}

fn other_type(name: &str) -> String {
    format!("{name} is of another type")
}
