//! Parts as rows of the data tables, and rows as parts again.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, FixedSizeBinaryArray, FixedSizeListArray, Float32Array, LargeBinaryArray,
    RecordBatch, StringArray, UInt8Array, UInt32Array,
};
use arrow::buffer::{Buffer, OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{DataType, Float32Type, UInt8Type, UInt32Type};
use bytes::Bytes;
use ndarray::Array2;

use super::schema::Table;
use crate::error::{Error, Result};
use crate::layer::parts::{Codebook, Codes, Factor, Keys, Side, Tensor, WeightRows};
use crate::layer::{ArtifactId, Parts};

/// Rows of `weights` go out in batches of about this many bytes, within what 32-bit offsets can address.
const BATCH_BYTES: usize = 64 << 20;

/// Returns the rows that an artifact's parts come to, table by table, in the order they are to be stored.
///
/// # Errors
/// When a vector is longer than an Arrow list can be, or there are more rows than a 32-bit number can count.
pub fn to_batches(id: ArtifactId, parts: &Parts) -> Result<BTreeMap<Table, Vec<RecordBatch>>> {
    let mut out = Batches { id, tables: BTreeMap::new() };
    if let Some(keys) = parts.keys.as_ref().filter(|keys| !keys.scales.is_empty()) {
        let columns: Vec<ArrayRef> = vec![
            counted(keys.scales.len())?,
            Arc::new(Float32Array::from(keys.scales.clone())),
            vectors(&keys.vectors)?,
        ];
        out.add(Table::Keys(keys.vectors.ncols()), columns)?;
    }
    if let Some(values) = parts.values.as_ref().filter(|v| v.nrows() > 0) {
        out.add(Table::Values(values.ncols()), vec![counted(values.nrows())?, vectors(values)?])?;
    }
    for book in parts.codebooks.iter().filter(|b| b.vectors.nrows() > 0) {
        let rows = book.vectors.nrows();
        let columns: Vec<ArrayRef> = vec![
            repeated(&book.role, rows),
            Arc::new(UInt32Array::from(vec![book.subspace; rows])),
            counted(rows)?,
            vectors(&book.vectors)?,
        ];
        out.add(Table::Codebooks(book.vectors.ncols()), columns)?;
    }
    for codes in parts.codes.iter().filter(|c| c.codes.nrows() > 0) {
        let (rows, length) = codes.codes.dim();
        let numbers = UInt8Array::from(codes.codes.iter().copied().collect::<Vec<_>>());
        let list = fixed_list(numbers, DataType::UInt8, length)?;
        out.add(Table::Codes(length), vec![repeated(&codes.role, rows), counted(rows)?, list])?;
    }
    for factor in parts.factors.iter().filter(|f| f.vectors.nrows() > 0) {
        let rows = factor.vectors.nrows();
        let columns: Vec<ArrayRef> = vec![
            repeated(factor.side.as_str(), rows),
            counted(rows)?,
            Arc::new(Float32Array::from(factor.singular_values.clone())),
            vectors(&factor.vectors)?,
        ];
        out.add(Table::Factors(factor.vectors.ncols()), columns)?;
    }
    if let Some(weights) = parts.weights.as_ref().filter(|w| w.rows > 0) {
        out.add_weights(weights)?;
    }
    for tensor in &parts.tensors {
        let columns: Vec<ArrayRef> = vec![
            repeated(&tensor.name, 1),
            repeated(&tensor.dtype, 1),
            repeated(&serde_json::json!(tensor.shape).to_string(), 1),
            Arc::new(LargeBinaryArray::from_vec(vec![&tensor.data])),
        ];
        out.add(Table::Tensors, columns)?;
    }
    Ok(out.tables)
}

/// The rows of one artifact.
struct Batches {
    id: ArtifactId,
    tables: BTreeMap<Table, Vec<RecordBatch>>,
}

impl Batches {
    /// Adds rows of these columns, which follow the column `artifact`.
    fn add(&mut self, table: Table, columns: Vec<ArrayRef>) -> Result<()> {
        let names = std::iter::repeat_n(self.id.0.as_slice(), columns[0].len());
        let mut all: Vec<ArrayRef> = vec![Arc::new(FixedSizeBinaryArray::try_from_iter(names).map_err(unstorable)?)];
        all.extend(columns);
        let batch = RecordBatch::try_new(table.schema(), all).map_err(unstorable)?;
        self.tables.entry(table).or_default().push(batch);
        Ok(())
    }

    /// Adds the rows of a weight matrix, in batches of [`BATCH_BYTES`].
    fn add_weights(&mut self, weights: &WeightRows) -> Result<()> {
        let rows = weights.rows;
        let row_bytes = (weights.packed.len() + weights.scales.len() + weights.zeros.len()) / rows;
        let batch_rows = (BATCH_BYTES / row_bytes.max(1)).max(1);
        let numbers = counted(rows)?;
        for start in (0..rows).step_by(batch_rows) {
            let end = (start + batch_rows).min(rows);
            let columns = vec![
                numbers.slice(start, end - start),
                byte_rows(&weights.packed, rows, start, end)?,
                byte_rows(&weights.scales, rows, start, end)?,
                byte_rows(&weights.zeros, rows, start, end)?,
            ];
            self.add(Table::Weights, columns)?;
        }
        Ok(())
    }
}

fn unstorable(e: arrow::error::ArrowError) -> Error {
    Error::Numeric(format!("the layer does not fit the tables: {e}"))
}

/// 0, 1, 2 …
fn counted(rows: usize) -> Result<ArrayRef> {
    let rows = u32::try_from(rows)
        .map_err(|_| Error::expected("rows of a stored matrix", rows, format!("at most {}", u32::MAX)))?;
    Ok(Arc::new(UInt32Array::from_iter_values(0..rows)))
}

fn repeated(text: &str, rows: usize) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(std::iter::repeat_n(text, rows)))
}

fn vectors(matrix: &Array2<f32>) -> Result<ArrayRef> {
    let values = matrix.as_standard_layout();
    fixed_list(
        Float32Array::from(values.as_slice().expect("standard layout").to_vec()),
        DataType::Float32,
        matrix.ncols(),
    )
}

fn fixed_list(values: impl Array + 'static, item: DataType, length: usize) -> Result<ArrayRef> {
    let length = i32::try_from(length)
        .map_err(|_| Error::expected("length of a stored vector", length, format!("at most {}", i32::MAX)))?;
    let item = Arc::new(arrow::datatypes::Field::new("item", item, false));
    Ok(Arc::new(FixedSizeListArray::try_new(item, length, Arc::new(values), None).map_err(unstorable)?))
}

/// Rows `start..end` of bytes that hold `rows` rows of one length, without a copy.
fn byte_rows(bytes: &Bytes, rows: usize, start: usize, end: usize) -> Result<ArrayRef> {
    let width = bytes.len() / rows;
    let part = bytes.slice(start * width..end * width);
    let offsets = (0..=end - start).map(|i| i32::try_from(i * width)).collect::<std::result::Result<Vec<i32>, _>>();
    let offsets = offsets
        .map_err(|_| Error::expected("bytes of one stored weight row", width, format!("at most {}", i32::MAX)))?;
    let array = BinaryArray::try_new(OffsetBuffer::new(ScalarBuffer::from(offsets)), Buffer::from(part), None);
    Ok(Arc::new(array.map_err(unstorable)?))
}

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
pub fn add_rows(parts: &mut Parts, table: Table, batches: Vec<RecordBatch>) -> std::result::Result<(), String> {
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
            parts.weights = Some(WeightRows {
                rows: batches.iter().map(RecordBatch::num_rows).sum(),
                packed: gather_bytes(&batches, "packed")?,
                scales: gather_bytes(&batches, "scales")?,
                zeros: gather_bytes(&batches, "zeros")?,
            });
        }
        Table::Tensors => add_tensors(parts, &batches)?,
    }
    Ok(())
}

fn add_codebooks(parts: &mut Parts, length: usize, batches: Vec<RecordBatch>) -> std::result::Result<(), String> {
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

fn add_factors(parts: &mut Parts, length: usize, batches: Vec<RecordBatch>) -> std::result::Result<(), String> {
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

fn add_tensors(parts: &mut Parts, batches: &[RecordBatch]) -> std::result::Result<(), String> {
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

fn column<'a>(batch: &'a RecordBatch, name: &str) -> std::result::Result<&'a ArrayRef, String> {
    batch.column_by_name(name).ok_or_else(|| format!("its table has no column '{name}'"))
}

fn text<'a>(batch: &'a RecordBatch, name: &str, row: usize) -> std::result::Result<&'a str, String> {
    let array = column(batch, name)?.as_string_opt::<i32>().ok_or_else(|| format!("{name} is of another type"))?;
    Ok(array.value(row))
}

fn number(batch: &RecordBatch, name: &str, row: usize) -> std::result::Result<u32, String> {
    let array =
        column(batch, name)?.as_primitive_opt::<UInt32Type>().ok_or_else(|| format!("{name} is of another type"))?;
    Ok(array.value(row))
}

fn floats<'a>(batch: &'a RecordBatch, name: &str) -> std::result::Result<&'a [f32], String> {
    let array = column(batch, name)?.as_primitive_opt::<Float32Type>();
    Ok(array.ok_or_else(|| format!("{name} is of another type"))?.values())
}

/// Checks that a column counts 0, 1, 2 … over all batches.
fn in_order(batches: &[RecordBatch], name: &str) -> std::result::Result<(), String> {
    let mut expected = 0u32;
    for batch in batches {
        let numbers = column(batch, name)?
            .as_primitive_opt::<UInt32Type>()
            .ok_or_else(|| format!("{name} is of another type"))?;
        for &found in numbers.values() {
            if found != expected {
                return Err(format!("found {name} {found} where {name} {expected} was written"));
            }
            expected += 1;
        }
    }
    Ok(())
}

/// Splits all rows where one is not the `same` as the one before.
fn runs(
    mut batches: Vec<RecordBatch>,
    same: impl Fn(&RecordBatch, usize) -> std::result::Result<bool, String>,
) -> std::result::Result<Vec<RecordBatch>, String> {
    let all = match batches.len() {
        0 => return Ok(vec![]),
        1 => batches.remove(0),
        _ => arrow::compute::concat_batches(&batches[0].schema(), &batches).map_err(|e| e.to_string())?,
    };
    drop(batches);
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
fn gather_vectors(batches: Vec<RecordBatch>, length: usize) -> std::result::Result<Array2<f32>, String> {
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
fn gather_codes(rows: RecordBatch, length: usize) -> std::result::Result<Array2<u8>, String> {
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

/// An Arrow buffer as the owner of the bytes it holds.
struct Owned(Buffer);

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        self.0.as_slice()
    }
}

/// All rows' bytes joined; without a copy where one batch holds them all.
fn gather_bytes(batches: &[RecordBatch], name: &str) -> std::result::Result<Bytes, String> {
    let mut all = Vec::new();
    let mut width = None;
    for batch in batches {
        let rows = column(batch, name)?.as_binary_opt::<i32>().ok_or_else(|| format!("{name} is of another type"))?;
        for ends in rows.value_offsets().windows(2) {
            let length = ends[1] - ends[0];
            if *width.get_or_insert(length) != length {
                return Err(format!("rows of {name} of {} and of {length} bytes", width.unwrap_or_default()));
            }
        }
        let (first, last) = (rows.value_offsets()[0] as usize, rows.value_offsets()[rows.len()] as usize);
        if batches.len() == 1 {
            return Ok(Bytes::from_owner(Owned(rows.values().slice_with_length(first, last - first))));
        }
        all.extend_from_slice(&rows.value_data()[first..last]);
    }
    Ok(all.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn matrix(rows: usize, columns: usize, seed: u32) -> Array2<f32> {
        Array2::from_shape_fn((rows, columns), |(i, j)| (i * 7 + j * 3 + seed as usize) as f32)
    }

    fn any_parts() -> impl Strategy<Value = Parts> {
        (0usize..5, 1usize..5, 1usize..4, 0u32..100, any::<bool>()).prop_map(|(rows, d, m, seed, square)| {
            let mut parts = Parts::new("key_value", json!({"seed": seed}));
            if rows > 0 {
                parts.keys =
                    Some(Keys { vectors: matrix(rows, d, seed), scales: (0..rows).map(|i| i as f32).collect() });
                parts.values = Some(matrix(rows, m, seed + 1));
                for role in ["keys", "values"] {
                    for subspace in 0..2 {
                        parts.codebooks.push(Codebook {
                            role: role.into(),
                            subspace,
                            vectors: matrix(rows, d, seed + subspace),
                        });
                    }
                    parts.codes.push(Codes {
                        role: role.into(),
                        codes: Array2::from_shape_fn((rows, m), |(i, j)| (i + j) as u8),
                    });
                }
                for (side, length) in [(Side::A, d), (Side::B, if square { d } else { d + 3 })] {
                    parts.factors.push(Factor {
                        side,
                        singular_values: vec![0.5; rows],
                        vectors: matrix(rows, length, seed),
                    });
                }
                let bytes = |width: usize| (0..rows * width).map(|i| i as u8).collect::<Bytes>();
                parts.weights = Some(WeightRows {
                    rows,
                    packed: bytes(d),
                    scales: bytes(4),
                    zeros: bytes(if square { 0 } else { 1 }),
                });
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

    proptest! {
        #[test]
        fn rows_become_the_same_parts(parts in any_parts(), split in 1usize..4) {
            let id = parts.id();
            let mut back = Parts::new(parts.method.clone(), parts.config.clone());
            for (table, batches) in to_batches(id, &parts).unwrap() {
                for batch in &batches {
                    prop_assert_eq!(batch.schema(), table.schema());
                }
                // As a reader may get them: in slices of other sizes.
                let all = arrow::compute::concat_batches(&table.schema(), &batches).unwrap();
                let slices: Vec<_> = (0..all.num_rows()).step_by(split).map(|i| all.slice(i, split.min(all.num_rows() - i))).collect();
                add_rows(&mut back, table, slices).unwrap();
            }
            prop_assert_eq!(back.id(), id);
            prop_assert_eq!(back, parts);
        }
    }

    #[test]
    fn rows_of_another_artifact_or_order_are_refused() {
        let mut parts = Parts::new("key_value", json!({}));
        parts.keys = Some(Keys { vectors: matrix(3, 2, 0), scales: vec![1.0; 3] });
        let id = parts.id();
        let batches = to_batches(id, &parts).unwrap();
        let (table, rows) = batches.iter().next().unwrap();
        let mut back = Parts::new("key_value", json!({}));
        let refuse = |back: &mut Parts, rows: &[RecordBatch], expected: &str| {
            let message = add_rows(back, *table, rows.to_vec()).unwrap_err();
            assert!(message.contains(expected), "{message}");
        };
        refuse(&mut back, &[rows[0].slice(1, 2)], "key 1 where key 0");
        refuse(&mut back, &[rows[0].clone(), rows[0].clone()], "key 0 where key 3");
        assert!(all_of(rows, id, 3) && all_of(&[rows[0].slice(1, 2)], id, 2));
        assert!(!all_of(rows, id, 2) && !all_of(rows, ArtifactId([0; 32]), 3));
    }
}
