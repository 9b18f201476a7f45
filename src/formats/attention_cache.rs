//! The compressed cache of a sequence, in a file, so that a long one can be attended to piece by piece.

use std::path::Path;

use layerstore_core::layer::to_f32;
use ndarray::{Array, ArrayD, Dimension};

use super::merged::{self, NewTensor};
use super::safetensors::SafetensorsSource;
use super::source::TensorSource;
use crate::attention::CompressedCache;
use crate::error::{Error, Result};
use crate::layer::DType;

/// The metadata that names the block which a cache is of.
const BLOCK: &str = "layerstore:attention";

/// Reads what [`write_attention_cache`] wrote for the block of this name, such as
/// [`AttentionHandle::id`](crate::AttentionHandle::id) gives.
///
/// # Errors
/// When the file cannot be read, holds other tensors, or is of another block, or of none that it names.
pub fn read_attention_cache(path: &Path, block: &str) -> Result<CompressedCache> {
    let file = SafetensorsSource::open(path)?;
    match file.metadata().get(BLOCK) {
        Some(found) if found == block => {}
        Some(_) => {
            let reason = "the state in it is of another block, or of this one before its codebooks or its key and value \
                          projections changed; expected a state of this block, or no file, to begin a sequence";
            return Err(Error::file(path, reason));
        }
        None if file.tensors().contains_key("recent_codes") => {
            let reason = "the state in it does not say which block it is of, as older versions of layerstore wrote it; \
                          expected a state of this block, or no file, to begin a sequence";
            return Err(Error::file(path, reason));
        }
        None => {
            return Err(Error::file(
                path,
                "there is no state in it; expected one of this block, or no file, to begin a sequence",
            ));
        }
    }
    Ok(CompressedCache {
        counts: floats(&file, "counts")?,
        means: floats(&file, "means")?,
        recent_codes: array(&file, "recent_codes", DType::U32, |bytes| {
            Ok(bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect())
        })?,
        recent_values: floats(&file, "recent_values")?,
    })
}

fn floats<D: Dimension>(file: &SafetensorsSource, name: &str) -> Result<Array<f32, D>> {
    array(file, name, DType::F32, |bytes| to_f32(DType::F32, bytes))
}

fn array<T, D: Dimension>(
    file: &SafetensorsSource,
    name: &str,
    dtype: DType,
    numbers: impl Fn(&[u8]) -> Result<Vec<T>>,
) -> Result<Array<T, D>> {
    let path = file.path().display();
    let wrong = |found: String| Error::expected(format!("tensor '{name}' of {path}"), found, "as `attend` writes it");
    let entry = file.tensors().get(name).ok_or_else(|| wrong("none".into()))?;
    if entry.dtype != dtype {
        return Err(wrong(format!("{:?}", entry.dtype)));
    }
    let array = ArrayD::from_shape_vec(entry.shape.clone(), numbers(&file.bytes(entry)?)?);
    array.and_then(|array| array.into_dimensionality()).map_err(|_| wrong(format!("shape {:?}", entry.shape)))
}

/// Writes a cache as safetensors, with the name of the block that it is of; the file appears whole or not at all. Other tensors of a
/// file that is there stay.
///
/// # Errors
/// When the file cannot be written, or one that is there is no safetensors file.
pub fn write_attention_cache(path: &Path, cache: &CompressedCache, block: &str) -> Result<()> {
    // Sizes may be 0, and numbers in any order.
    let floats = [
        ("counts", cache.counts.shape(), cache.counts.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()),
        ("means", cache.means.shape(), cache.means.iter().flat_map(|v| v.to_le_bytes()).collect()),
        (
            "recent_values",
            cache.recent_values.shape(),
            cache.recent_values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        ),
    ];
    let codes: Vec<u8> = cache.recent_codes.iter().flat_map(|code| code.to_le_bytes()).collect();
    let shape = cache.recent_codes.shape();
    let mut tensors = vec![NewTensor { name: "recent_codes", dtype: DType::U32, shape, bytes: &codes }];
    tensors.extend(floats.iter().map(|(name, shape, bytes)| NewTensor { name, dtype: DType::F32, shape, bytes }));
    merged::put(path, &tensors, &[(BLOCK, block)])
}

/// Tries whether [`write_attention_cache`] could write to a place. Nothing is left behind.
///
/// # Errors
/// As [`write_attention_cache`].
pub(crate) fn check_attention_cache_output(path: &Path) -> Result<()> {
    merged::probe(path)
}
