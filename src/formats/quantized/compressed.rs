//! compressed-tensors: codes row by row, in 32-bit words (`pack-quantized`), bytes (`naive-quantized`, `int-quantized`) or 8-bit
//! floats (`float-quantized`).

use layerstore_core::quant::{Group, PackedMatrix, WeightFormat, WeightType};
use serde_json::Value;

use super::super::source::{TensorInfo, TensorSource};
use super::columns::{check_group, scale_type};
use super::order::by_groups;
use super::words::{whole, words};
use super::{Codes, Found, Parts, SCALES};
use crate::error::{Error, Result};
use crate::layer::DType;

/// The tensors of a layer.
#[derive(Debug, Clone)]
pub struct Compressed {
    bits: usize,
    /// `[out, in · bits / 32]` or `[out, in]`.
    weight: TensorInfo,
    /// `[out, groups]`, or one for all.
    scales: TensorInfo,
    /// `[out · bits / 32, groups]` or `[out, groups]`.
    zeros: Option<TensorInfo>,
    /// Which input each stored column is for; none where they are in order.
    order: Vec<u32>,
}

/// Returns a layer of compressed-tensors'; none where the tensor is no part of one.
///
/// # Errors
/// When its tensors are not what the formats say.
pub fn find(parts: &Parts, config: &Value, source: &dyn TensorSource) -> Result<Option<Found>> {
    let scales = match parts.get("weight_scale") {
        Some(_) if parts.get("weight_packed").is_none() && parts.get("weight").is_none() => return Ok(None),
        Some(scales) if SCALES.contains(&scales.dtype) => scales.clone(),
        Some(scales) => {
            let found = format!("{:?}", scales.dtype);
            return Err(Error::expected(format!("dtype of '{}'", scales.name), found, "F16, BF16 or F32"));
        }
        None => parts.required("weight_scale", &SCALES, 2)?.clone(),
    };
    let mut taken = vec![scales.name.clone()];
    let of_groups = config["config_groups"].as_object();
    let group_sizes: Vec<&Value> =
        of_groups.iter().flat_map(|groups| groups.values()).map(|group| &group["weights"]["group_size"]).collect();
    let (weight, rows, columns, bits, is_float) = match parts.get("weight_packed") {
        Some(_) => {
            let weight = parts.required("weight_packed", &[DType::I32], 2)?.clone();
            let shape = parts.required("weight_shape", &[DType::I64, DType::I32], 1)?;
            let sizes: Vec<usize> = match shape.dtype {
                DType::I64 => {
                    source.bytes(shape)?.as_chunks::<8>().0.iter().map(|n| u64::from_le_bytes(*n) as usize).collect()
                }
                _ => words(&source.bytes(shape)?).into_iter().map(|n| n as usize).collect(),
            };
            taken.push(shape.name.clone());
            let bits = bits_of(config, parts.stem)?;
            let each = 32 / bits;
            match sizes[..] {
                [rows, columns] if weight.shape == [rows, columns.div_ceil(each)] => {
                    (weight, rows, columns, bits, false)
                }
                _ => {
                    let expected = format!("words of {each} codes for its shape {sizes:?}");
                    return Err(Error::expected(
                        format!("shape of '{}'", weight.name),
                        format!("{:?}", weight.shape),
                        expected,
                    ));
                }
            }
        }
        None => {
            // A weight of floats beside a scale is no quantised one: the scale is of activations.
            let weight = parts.required("weight", &[DType::I8, DType::F8_E4M3, DType::F8_E5M2], 2)?.clone();
            let (rows, columns) = (weight.shape[0], weight.shape[1]);
            let is_float = weight.dtype != DType::I8;
            (weight, rows, columns, 8, is_float)
        }
    };
    taken.push(weight.name.clone());
    let values: usize = scales.shape.iter().product();
    let groups = match values {
        1 => 1,
        _ if rows > 0 && values.is_multiple_of(rows) && scales.shape.first() == Some(&rows) => values / rows,
        _ => 0,
    };
    if groups == 0 || !columns.is_multiple_of(groups) {
        let expected = format!("one, or as many for each of {rows} rows as divide {columns} columns");
        return Err(Error::expected(format!("shape of '{}'", scales.name), format!("{:?}", scales.shape), expected));
    }
    group_sizes.into_iter().try_for_each(|size| check_group(parts, size, columns, "weight_scale"))?;
    let zeros = parts.get("weight_zero_point").filter(|_| !is_float).cloned();
    taken.extend(parts.get("weight_zero_point").map(|zeros| zeros.name.clone()));
    if let Some(zeros) = &zeros {
        let each = 32 / bits;
        let fits = match zeros.dtype {
            DType::I32 => zeros.shape == [rows.div_ceil(each), groups],
            DType::I8 => zeros.shape.iter().product::<usize>() == rows * groups,
            _ => false,
        };
        if !fits {
            let expected = format!("zero points of {rows} rows and {groups} groups, as I32 words or I8");
            return Err(Error::expected(
                format!("tensor '{}'", zeros.name),
                format!("{:?} {:?}", zeros.dtype, zeros.shape),
                expected,
            ));
        }
    }
    let order = order(parts, source, (columns, groups), &mut taken)?;
    let weight_type = match weight.dtype {
        DType::F8_E4M3 => WeightType::F8E4M3,
        DType::F8_E5M2 => WeightType::F8E5M2,
        _ => WeightType::Int(bits as u8),
    };
    let format = WeightFormat {
        weight_type,
        group: if groups == 1 { Group::Channel } else { Group::Size(columns / groups) },
        symmetric: !is_float && zeros.is_none(),
        minimum: false,
        scales: scale_type(scales.dtype),
    };
    let ordered = !order.is_empty();
    let codes = Codes::Compressed(Compressed { bits, weight, scales, zeros, order });
    Ok(Some(Found { shape: (rows, columns), format, ordered, codes, taken }))
}

/// The bits of packed weights: those of the group of the configuration that targets the layer, if there are several.
fn bits_of(config: &Value, stem: &str) -> Result<usize> {
    let groups = config["config_groups"].as_object();
    let groups: Vec<&Value> = groups.iter().flat_map(|groups| groups.values()).collect();
    let bits = |group: &Value| group["weights"]["num_bits"].as_u64();
    let named = groups.iter().find(|group| {
        group["targets"].as_array().is_some_and(|targets| targets.iter().any(|target| target.as_str() == Some(stem)))
    });
    let mut all: Vec<u64> = match named {
        Some(group) => bits(group).into_iter().collect(),
        None => groups.iter().filter_map(|group| bits(group)).collect(),
    };
    all.dedup();
    match all[..] {
        [bits @ 2..=8] => Ok(bits as usize),
        _ => Err(Error::expected(format!("num_bits of layer '{stem}'"), format!("{all:?}"), "one number, 2 to 8")),
    }
}

/// The order of inputs (`weight_g_idx`), by their groups.
fn order(
    parts: &Parts,
    source: &dyn TensorSource,
    (columns, groups): (usize, usize),
    taken: &mut Vec<String>,
) -> Result<Vec<u32>> {
    let Some(index) = parts.get("weight_g_idx") else { return Ok(vec![]) };
    taken.push(index.name.clone());
    let of = words(&source.bytes(index)?);
    // What stands for no order is −1 everywhere.
    let order = match of.iter().all(|&group| group == u32::MAX) {
        true => Some(vec![]),
        false => by_groups(&of, columns, groups),
    };
    if let Some(order) = order.filter(|_| index.dtype == DType::I32) {
        return Ok(order);
    }
    let each = columns / groups.max(1);
    let expected = format!("{each} of {columns} inputs in each of {groups} groups, as I32");
    Err(Error::expected(format!("tensor '{}'", index.name), format!("{:?} {:?}", index.dtype, index.shape), expected))
}

impl Compressed {
    /// Reads the weight.
    ///
    /// # Errors
    /// When a tensor cannot be read, or a scale or a weight is not finite.
    pub fn matrix(
        &self,
        (rows, columns): (usize, usize),
        format: WeightFormat,
        source: &dyn TensorSource,
    ) -> Result<PackedMatrix> {
        let bits = self.bits;
        let half = 1u8 << (bits - 1);
        let bytes = source.bytes(&self.weight)?;
        // Words hold codes plus half of their range; bytes are two's complement, which adding it makes unsigned.
        let mut codes = match self.weight.dtype {
            DType::I32 => {
                let (words, width) = (words(&bytes), self.weight.shape[1]);
                let row = |row: usize| (0..columns).map(move |column| (row, column));
                let all = (0..rows).flat_map(row);
                all.map(|(row, column)| whole(column, bits, |word| words[row * width + word])).collect::<Vec<u8>>()
            }
            DType::I8 => bytes.iter().map(|code| code ^ half).collect(),
            _ => bytes.into_owned(),
        };
        if format.symmetric {
            let top = ((1u16 << bits) - 1) as u8;
            codes.iter_mut().for_each(|code| *code = (*code ^ half) & top);
        }
        if !self.order.is_empty() {
            let rows = codes.chunks(columns);
            codes = rows.flat_map(|row| self.order.iter().map(|&column| row[column as usize])).collect();
        }
        let mut scales = source.bytes(&self.scales)?.into_owned();
        if self.scales.shape.iter().product::<usize>() == 1 {
            scales = scales.repeat(rows);
        }
        let zeros = match &self.zeros {
            None => vec![],
            Some(zeros) => {
                let bytes = source.bytes(zeros)?;
                match zeros.dtype {
                    DType::I8 => {
                        bytes.iter().map(|zero| zero ^ half).map(|zero| zero & ((1u16 << bits) - 1) as u8).collect()
                    }
                    _ => {
                        let (words, groups) = (words(&bytes), zeros.shape[1]);
                        let all = (0..rows).flat_map(|row| (0..groups).map(move |group| (row, group)));
                        all.map(|(row, group)| whole(row, bits, |word| words[word * groups + group])).collect()
                    }
                }
            }
        };
        let matrix = PackedMatrix::from_unpacked(format, (rows, columns), &codes, &scales, zeros)?;
        if self.order.is_empty() { Ok(matrix) } else { matrix.with_order(self.order.clone()) }
    }
}
