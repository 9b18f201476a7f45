//! bitsandbytes: 4-bit floats in blocks of the flattened weight, whose scales may be 8-bit codes themselves, and 8-bit integers with a
//! scale for each row.

use layerstore_core::quant::{FP4, Group, NORMAL_FLOAT, PackedMatrix, ScaleType, WeightFormat, WeightType};
use serde::Deserialize;
use serde_json::Value;

use super::super::source::{TensorInfo, TensorSource};
use super::{Codes, Found, Parts};
use crate::error::{Error, Result};
use crate::layer::DType;

/// The tensors of a layer.
#[derive(Debug, Clone)]
pub struct BitsAndBytes {
    weight: TensorInfo,
    /// A scale for each block or row: F32, or the codes of F32 numbers.
    scales: TensorInfo,
    nested: Option<Nested>,
    /// Weights of a block of four bits.
    block: usize,
}

/// What the codes of scales stand for.
#[derive(Debug, Clone)]
struct Nested {
    /// The 256 numbers.
    table: TensorInfo,
    /// What the numbers of a block of scales are multiplied with.
    scales: TensorInfo,
    block: usize,
    offset: f32,
}

/// What stands beside the codes, as JSON in a tensor of bytes.
#[derive(Debug, Deserialize)]
struct State {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f64>,
}

/// Returns a layer of bitsandbytes'; none where the weight is a plain one.
///
/// # Errors
/// When its tensors are not what the format says, or a block is not a whole part of a row, or whole rows.
pub fn find(parts: &Parts, _: &Value, source: &dyn TensorSource) -> Result<Option<Found>> {
    let Some(weight) = parts.get("weight").cloned() else { return Ok(None) };
    if let Some(scales) = parts.get("SCB") {
        if let Some(layout) = parts.get("weight_format") {
            let found = source.bytes(layout)?;
            if found.iter().any(|byte| *byte != 0) {
                let expected = "0, rows one after another: save the model again with a newer bitsandbytes";
                return Err(Error::expected(format!("tensor '{}'", layout.name), format!("{found:?}"), expected));
            }
        }
        return eight_bits(parts, weight, scales.clone()).map(Some);
    }
    let kinds = [("nf4", WeightType::Nf4, &NORMAL_FLOAT), ("fp4", WeightType::Fp4, &FP4)];
    let stated = kinds.iter().find_map(|(kind, weight_type, levels)| {
        let state = parts.get(&format!("weight.quant_state.bitsandbytes__{kind}"))?;
        Some((kind, *weight_type, *levels, state))
    });
    let Some((kind, weight_type, levels, state_tensor)) = stated else { return Ok(None) };
    let bad = |what: &str, found: String, expected: String| {
        Err(Error::expected(format!("{what} of layer '{}'", parts.stem), found, expected))
    };
    let state: State = serde_json::from_slice(&source.bytes(state_tensor)?)
        .map_err(|e| Error::expected(format!("tensor '{}'", state_tensor.name), e, "the state of a quantisation"))?;
    let (rows, columns) = match state.shape[..] {
        [rows, columns] if state.quant_type == *kind => (rows, columns),
        _ => {
            return bad(
                "state",
                format!("{} of shape {:?}", state.quant_type, state.shape),
                format!("{kind} of a matrix"),
            );
        }
    };
    let elements = rows
        .checked_mul(columns)
        .filter(|n| *n > 0 && weight.dtype == DType::U8 && weight.byte_len() == n.div_ceil(2) as u64);
    let Some(elements) = elements else {
        return bad(
            "codes",
            format!("{:?} {:?}", weight.dtype, weight.shape),
            format!("U8, two of {rows} × {columns} to a byte"),
        );
    };
    let block = state.blocksize;
    let fits = block > 0 && (columns.is_multiple_of(block) || block.is_multiple_of(columns));
    if !fits || !elements.is_multiple_of(block) {
        return bad("blocks", format!("{block} weights"), format!("a part of a row of {columns}, or whole rows"));
    }
    let scales = parts.required("weight.absmax", &[DType::F32, DType::U8], 1)?.clone();
    let table = parts.required("weight.quant_map", &[DType::F32], 1)?.clone();
    if scales.shape[0] != elements / block {
        return bad("scales", format!("{:?}", scales.shape), format!("{}, one a block", elements / block));
    }
    let mut taken = vec![weight.name.clone(), scales.name.clone(), table.name.clone(), state_tensor.name.clone()];
    let found = floats(&source.bytes(&table)?);
    if found.len() != 16 || found.iter().zip(levels).any(|(a, b)| (a - b).abs() > 1e-6) {
        return bad("levels", format!("{found:?}"), format!("those of {kind}"));
    }
    let nested = match scales.dtype {
        DType::F32 => None,
        _ => {
            let of = parts.required("weight.nested_absmax", &[DType::F32], 1)?.clone();
            let table = parts.required("weight.nested_quant_map", &[DType::F32], 1)?.clone();
            let block = state.nested_blocksize.unwrap_or(0);
            let offset = state.nested_offset.unwrap_or(f64::NAN) as f32;
            let fits = block > 0 && of.shape[0] == scales.shape[0].div_ceil(block) && table.shape == [256];
            if !fits || !offset.is_finite() {
                return bad(
                    "nested scales",
                    format!("{:?} and {:?}", of.shape, table.shape),
                    "one a block, of 256 numbers".into(),
                );
            }
            taken.extend([of.name.clone(), table.name.clone()]);
            Some(Nested { table, scales: of, block, offset })
        }
    };
    let group = if block >= columns { Group::Channel } else { Group::Size(block) };
    let format = WeightFormat { weight_type, group, symmetric: false, minimum: false, scales: ScaleType::F32 };
    let codes = Codes::BitsAndBytes(BitsAndBytes { weight, scales, nested, block });
    Ok(Some(Found { shape: (rows, columns), format, ordered: false, codes, taken }))
}

fn eight_bits(parts: &Parts, weight: TensorInfo, scales: TensorInfo) -> Result<Found> {
    let weight = match weight.dtype {
        DType::I8 => weight,
        _ => parts.required("weight", &[DType::I8], 2)?.clone(),
    };
    let shape = match weight.shape[..] {
        [rows, columns] if scales.dtype == DType::F32 && scales.shape.iter().product::<usize>() == rows => {
            (rows, columns)
        }
        _ => {
            let found = format!("{:?} and {:?} {:?}", weight.shape, scales.dtype, scales.shape);
            return Err(Error::expected(
                format!("shapes of layer '{}'", parts.stem),
                found,
                "a matrix, and an F32 scale for each row",
            ));
        }
    };
    let mut taken = vec![weight.name.clone(), scales.name.clone()];
    taken.extend(parts.get("weight_format").map(|t| t.name.clone()));
    let format = WeightFormat {
        weight_type: WeightType::Int(8),
        group: Group::Channel,
        symmetric: true,
        minimum: false,
        scales: ScaleType::F32,
    };
    let codes = Codes::BitsAndBytes(BitsAndBytes { weight, scales, nested: None, block: shape.1 });
    Ok(Found { shape, format, ordered: false, codes, taken })
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|number| f32::from_le_bytes(*number)).collect()
}

impl BitsAndBytes {
    /// Reads the weight.
    ///
    /// # Errors
    /// When a tensor cannot be read, or a scale is not finite.
    pub fn matrix(
        &self,
        (rows, columns): (usize, usize),
        format: WeightFormat,
        source: &dyn TensorSource,
    ) -> Result<PackedMatrix> {
        let (codes, scales) = (source.bytes(&self.weight)?, source.bytes(&self.scales)?);
        if self.weight.dtype == DType::I8 {
            let scales: Vec<u8> = floats(&scales).iter().flat_map(|scale| (scale / 127.0).to_le_bytes()).collect();
            return PackedMatrix::from_unpacked(format, (rows, columns), &codes, &scales, vec![]);
        }
        // The earlier of two is in the upper half.
        let mut codes: Vec<u8> = codes.iter().flat_map(|byte| [byte >> 4, byte & 15]).collect();
        codes.truncate(rows * columns);
        let scales = match &self.nested {
            None => floats(&scales),
            Some(nested) => {
                let (table, of) = (floats(&source.bytes(&nested.table)?), floats(&source.bytes(&nested.scales)?));
                let scale =
                    |(place, &code): (usize, &u8)| table[usize::from(code)] * of[place / nested.block] + nested.offset;
                scales.iter().enumerate().map(scale).collect()
            }
        };
        // A block of several rows is the scale of each.
        let each = (self.block / columns).max(1);
        let bytes = scales.iter().flat_map(|scale| scale.to_le_bytes().repeat(each)).collect::<Vec<u8>>();
        PackedMatrix::from_unpacked(format, (rows, columns), &codes, &bytes, vec![])
    }
}
