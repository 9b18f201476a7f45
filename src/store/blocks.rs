//! Blocks of rows, put together as the matrices that they are of.

use arrow::array::RecordBatch;
use arrow::buffer::Buffer;
use ndarray::Array2;

use super::columns::{Found, joined_bytes, number, numbers, shared, text};
use crate::layer::parts::{Codebook, Codes, WeightRows, bytes_f32};

/// Returns the weight that rows of `weight_blocks` hold.
///
/// # Errors
/// When blocks are missing, doubled or out of order, or rows of the weight are not of one length.
pub fn weights(batches: &[RecordBatch]) -> Found<WeightRows> {
    let counts = counts(batches)?;
    let joined = |name| joined_bytes(batches, name, counts.iter().copied()).map(shared);
    let (packed, scales, zeros) = (joined("packed")?, joined("scales")?, joined("zeros")?);
    Ok(WeightRows { rows: total(&counts), packed, scales, zeros })
}

/// Returns the codes that rows of `code_blocks` hold, role by role.
///
/// # Errors
/// As [`weights`].
pub fn codes(batches: Vec<RecordBatch>) -> Found<Vec<Codes>> {
    let matrices = matrices(batches, |batch, row| Ok(text(batch, "role", row)?.to_owned()))?;
    let codes = matrices.into_iter().map(|(role, blocks)| {
        let (rows, bytes) = matrix(&blocks, "codes")?;
        let shape = (rows, bytes.len() / rows.max(1));
        // Nobody else has bytes that were joined just now.
        let bytes = bytes.into_vec().unwrap_or_else(|shared| shared.to_vec());
        let codes = Array2::from_shape_vec(shape, bytes).map_err(|e| e.to_string())?;
        Ok(Codes { role, codes })
    });
    codes.collect()
}

/// Returns the codebooks that rows of `codebook_blocks` hold, by role and subspace.
///
/// # Errors
/// As [`weights`], and when the bytes are no f32.
pub fn codebooks(batches: Vec<RecordBatch>) -> Found<Vec<Codebook>> {
    let of = |batch: &RecordBatch, row| Ok((text(batch, "role", row)?.to_owned(), number(batch, "subspace", row)?));
    let books = matrices(batches, of)?.into_iter().map(|((role, subspace), blocks)| {
        let (rows, bytes) = matrix(&blocks, "codewords")?;
        let numbers = bytes_f32(&bytes);
        if numbers.len() * 4 != bytes.len() || !numbers.len().is_multiple_of(rows.max(1)) {
            return Err(format!("{rows} codewords of f32 in {} bytes", bytes.len()));
        }
        let shape = (rows, numbers.len() / rows.max(1));
        let vectors = Array2::from_shape_vec(shape, numbers).map_err(|e| e.to_string())?;
        Ok(Codebook { role, subspace, vectors })
    });
    books.collect()
}

/// Splits rows where they come to be of another matrix.
fn matrices<K: PartialEq + Clone>(
    batches: Vec<RecordBatch>,
    of: impl Fn(&RecordBatch, usize) -> Found<K>,
) -> Found<Vec<(K, Vec<RecordBatch>)>> {
    let mut all: Vec<(K, Vec<RecordBatch>)> = vec![];
    for batch in batches {
        let names = (0..batch.num_rows()).map(|row| of(&batch, row)).collect::<Found<Vec<K>>>()?;
        let mut start = 0;
        for run in names.chunk_by(|a, b| a == b) {
            let rows = batch.slice(start, run.len());
            start += run.len();
            match (all.last_mut(), &run[0]) {
                (Some((name, blocks)), same) if *name == *same => blocks.push(rows),
                (_, new) => all.push((new.clone(), vec![rows])),
            }
        }
    }
    Ok(all)
}

/// The number of rows of a matrix, and their bytes.
fn matrix(blocks: &[RecordBatch], name: &str) -> Found<(usize, Buffer)> {
    let counts = counts(blocks)?;
    Ok((total(&counts), joined_bytes(blocks, name, counts)?))
}

/// How many rows are in each block. Checks that each block begins where the one before ends.
fn counts(blocks: &[RecordBatch]) -> Found<Vec<u32>> {
    let (mut all, mut expected) = (vec![], 0u32);
    for batch in blocks {
        for (&first, &rows) in numbers(batch, "first_row")?.iter().zip(numbers(batch, "rows")?) {
            if first != expected {
                return Err(format!("found row {first} where row {expected} was written"));
            }
            if rows == 0 {
                return Err(format!("found a block of no rows where row {expected} was written"));
            }
            expected = expected.checked_add(rows).ok_or_else(|| format!("{rows} rows from row {first} on"))?;
            all.push(rows);
        }
    }
    Ok(all)
}

fn total(counts: &[u32]) -> usize {
    counts.iter().map(|&rows| rows as usize).sum()
}
