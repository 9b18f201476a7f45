//! Rows of the data tables, put together as parts again.

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{Float32Type, UInt8Type};
use bytes::Bytes;
use ndarray::Array2;

use super::blocks;
use super::columns::{Found, column, floats, joined_bytes, number, numbers, shared, text};
use super::schema::Table;
use crate::layer::parts::{Codebook, Codes, Factor, Keys, Side, Tensor, WeightRows};
use crate::layer::{ArtifactId, Parts};

/// Returns whether these are so many rows, all of this artifact.
pub fn all_of(batches: &[RecordBatch], id: ArtifactId, rows: u64) -> bool {
    batches.iter().map(|b| b.num_rows() as u64).sum::<u64>() == rows
        && batches.iter().all(|batch| {
            let names = batch.column_by_name("artifact").and_then(|c| c.as_fixed_size_binary_opt());
            names.is_some_and(|names| {
                let (from, rows) = (names.offset() * 32, names.len() * 32);
                let all = names.value_length() == 32 && names.null_count() == 0;
                all && names.value_data()[from..from + rows].chunks_exact(32).all(|name| name == id.0)
            })
        })
}

/// Puts one table's rows of an artifact back into its parts.
///
/// # Errors
/// When rows are missing, doubled or out of order: the reason, for the caller to put the artifact's name to.
pub fn add_rows(parts: &mut Parts, table: Table, batches: Vec<RecordBatch>) -> Found<()> {
    match table {
        Table::Keys(d) => {
            in_order(&batches, "key")?;
            let mut scales = Vec::new();
            for batch in &batches {
                scales.extend_from_slice(floats(batch, "scale")?);
            }
            parts.keys = Some(Keys { vectors: gather_vectors(batches, d)?, scales });
        }
        Table::Values(d) => {
            in_order(&batches, "key")?;
            parts.values = Some(gather_vectors(batches, d)?);
        }
        Table::Codebooks(d) => add_codebooks(parts, d, batches)?,
        Table::Codes(m) => {
            for rows in runs(batches, |b, i| Ok(text(b, "role", i)? == text(b, "role", i - 1)?))? {
                in_order(std::slice::from_ref(&rows), "key")?;
                let role = text(&rows, "role", 0)?.to_owned();
                parts.codes.push(Codes { role, codes: gather_codes(rows, m)? });
            }
        }
        Table::Factors(d) => add_factors(parts, d, batches)?,
        Table::Weights => {
            in_order(&batches, "row")?;
            let joined = |name| joined_bytes(&batches, name, std::iter::repeat(1)).map(shared);
            parts.weights = Some(WeightRows {
                rows: batches.iter().map(RecordBatch::num_rows).sum(),
                packed: joined("packed")?,
                scales: joined("scales")?,
                zeros: joined("zeros")?,
            });
        }
        Table::Tensors => add_tensors(parts, &batches)?,
        Table::WeightBlocks => parts.weights = Some(blocks::weights(&batches)?),
        Table::CodeBlocks => parts.codes = blocks::codes(batches)?,
        Table::CodebookBlocks => parts.codebooks = blocks::codebooks(batches)?,
    }
    Ok(())
}

fn add_codebooks(parts: &mut Parts, length: usize, batches: Vec<RecordBatch>) -> Found<()> {
    let same = |b: &RecordBatch, i| {
        Ok(text(b, "role", i)? == text(b, "role", i - 1)? && number(b, "subspace", i)? == number(b, "subspace", i - 1)?)
    };
    for rows in runs(batches, same)? {
        in_order(std::slice::from_ref(&rows), "code")?;
        let (role, subspace) = (text(&rows, "role", 0)?.to_owned(), number(&rows, "subspace", 0)?);
        parts.codebooks.push(Codebook { role, subspace, vectors: gather_vectors(vec![rows], length)? });
    }
    Ok(())
}

fn add_factors(parts: &mut Parts, length: usize, batches: Vec<RecordBatch>) -> Found<()> {
    for rows in runs(batches, |b, i| Ok(text(b, "side", i)? == text(b, "side", i - 1)?))? {
        in_order(std::slice::from_ref(&rows), "component")?;
        let side = match text(&rows, "side", 0)? {
            "a" => Side::A,
            "b" => Side::B,
            other => return Err(format!("a factor's side is '{other}'")),
        };
        let singular_values = floats(&rows, "singular_value")?.to_vec();
        parts.factors.push(Factor { side, singular_values, vectors: gather_vectors(vec![rows], length)? });
        // Sides of different lengths come from different tables, in no fixed order.
        parts.factors.sort_by_key(|f| f.side.as_str());
    }
    Ok(())
}

fn add_tensors(parts: &mut Parts, batches: &[RecordBatch]) -> Found<()> {
    for batch in batches {
        let data = column(batch, "data")?.as_binary_opt::<i64>().ok_or("data is of another type")?;
        for i in 0..batch.num_rows() {
            let shape = text(batch, "shape", i)?;
            let shape = serde_json::from_str(shape).map_err(|e| format!("shape '{shape}': {e}"))?;
            parts.tensors.push(Tensor {
                name: text(batch, "name", i)?.to_owned(),
                dtype: text(batch, "dtype", i)?.to_owned(),
                shape,
                data: Bytes::copy_from_slice(data.value(i)),
            });
        }
    }
    Ok(())
}

/// Checks that a column counts 0, 1, 2 … over all batches.
fn in_order(batches: &[RecordBatch], name: &str) -> Found<()> {
    let mut expected = 0u32;
    for batch in batches {
        for &found in numbers(batch, name)? {
            if found != expected {
                return Err(format!("found {name} {found} where {name} {expected} was written"));
            }
            expected += 1;
        }
    }
    Ok(())
}

/// Splits all rows where one is not the `same` as the one before.
fn runs(mut batches: Vec<RecordBatch>, same: impl Fn(&RecordBatch, usize) -> Found<bool>) -> Found<Vec<RecordBatch>> {
    let all = match batches.len() {
        0 => return Ok(vec![]),
        1 => batches.remove(0),
        _ => arrow::compute::concat_batches(&batches[0].schema(), &batches).map_err(|e| e.to_string())?,
    };
    drop(batches);
    if all.num_rows() == 0 {
        return Ok(vec![]);
    }
    let mut starts = vec![0];
    for row in 1..all.num_rows() {
        if !same(&all, row)? {
            starts.push(row);
        }
    }
    // One run is handed on as it is: nobody else holds its arrays.
    if let [_] = starts[..] {
        return Ok(vec![all]);
    }
    let ends = starts.iter().skip(1).copied().chain([all.num_rows()]);
    Ok(starts.iter().zip(ends).map(|(&start, end)| all.slice(start, end - start)).collect())
}

/// All rows' vectors as one matrix; without a copy where one batch holds them all and nobody else holds it.
fn gather_vectors(batches: Vec<RecordBatch>, length: usize) -> Found<Array2<f32>> {
    let rows: usize = batches.iter().map(RecordBatch::num_rows).sum();
    let mut columns = Vec::with_capacity(batches.len());
    for batch in batches {
        let lists = column(&batch, "vector")?.as_fixed_size_list_opt().ok_or("vector is of another type")?.clone();
        if lists.value_length() as usize != length {
            return Err(format!("vectors of length {} in a table of length {length}", lists.value_length()));
        }
        let (start, count) = (lists.value_offset(0) as usize, lists.len() * length);
        let (_, _, values, _) = lists.into_parts();
        let floats = values.as_primitive_opt::<Float32Type>().ok_or("vector is of another type")?;
        columns.push(floats.values().slice(start, count));
    }
    let all = match columns.len() {
        1 => columns.remove(0).into(),
        _ => columns.iter().map(AsRef::<[f32]>::as_ref).collect::<Vec<_>>().concat(),
    };
    Array2::from_shape_vec((rows, length), all).map_err(|e| e.to_string())
}

/// All rows' codes as one matrix; without a copy where nobody else holds them.
fn gather_codes(rows: RecordBatch, length: usize) -> Found<Array2<u8>> {
    let lists = column(&rows, "codes")?.as_fixed_size_list_opt().ok_or("codes is of another type")?.clone();
    if lists.value_length() as usize != length {
        return Err(format!("codes of length {} in a table of length {length}", lists.value_length()));
    }
    let (start, count, rows_of) = (lists.value_offset(0) as usize, lists.len() * length, lists.len());
    drop(rows);
    let (_, _, values, _) = lists.into_parts();
    let codes = values.as_primitive_opt::<UInt8Type>().ok_or("codes is of another type")?.values().slice(start, count);
    drop(values);
    Array2::from_shape_vec((rows_of, length), codes.into()).map_err(|e| e.to_string())
}
