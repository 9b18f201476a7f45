//! GPTQ and AWQ: codes of a column of the transposed weight side by side, with zero points.

use layerstore_core::quant::{Group, PackedMatrix, ScaleType, WeightFormat, WeightType};
use serde_json::Value;

use super::super::source::{TensorInfo, TensorSource};
use super::order::by_groups;
use super::words::{dense, words};
use super::{Codes, Found, Parts, SCALES};
use crate::error::{Error, Result};
use crate::layer::DType;

/// Where column `j` of eight lies in a word of AWQ's.
const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// The tensors of a layer.
#[derive(Debug, Clone)]
pub struct Columns {
    bits: usize,
    /// GPTQ `[in · bits / 32, out]`, AWQ `[in, out / 8]`.
    weight: TensorInfo,
    /// `[groups, out · bits / 32]`
    zeros: TensorInfo,
    /// `[groups, out]`
    scales: TensorInfo,
    /// Which input each stored column is for; none where they are in order.
    order: Vec<u32>,
    /// Whether zero points are stored less one.
    less_one: bool,
    /// Whether words are AWQ's.
    awq: bool,
}

/// Returns the type of scales of this dtype.
pub fn scale_type(dtype: DType) -> ScaleType {
    match dtype {
        DType::F16 => ScaleType::F16,
        DType::BF16 => ScaleType::Bf16,
        _ => ScaleType::F32,
    }
}

/// Returns a layer of GPTQ's.
///
/// Zero points are stored less one (but in the format `gptq_v2`), inputs in any order (`g_idx`).
///
/// # Errors
/// When its tensors are not what the format says.
pub fn gptq(parts: &Parts, config: &Value, source: &dyn TensorSource) -> Result<Found> {
    let bits = config["bits"]
        .as_u64()
        .filter(|bits| matches!(bits, 2..=8))
        .ok_or_else(|| Error::expected("bits of the quantisation", &config["bits"], "2 to 8"))? as usize;
    let weight = parts.required("qweight", &[DType::I32], 2)?;
    if !(weight.shape[0] * 32).is_multiple_of(bits) {
        let expected = format!("words that hold whole codes of {bits} bits, the configuration's");
        return Err(Error::expected(format!("rows of '{}'", weight.name), weight.shape[0], expected));
    }
    let (rows, columns) = (weight.shape[1], weight.shape[0] * 32 / bits);
    let named = ["checkpoint_format", "format"].iter().find_map(|key| config[*key].as_str());
    let less_one = match named {
        None | Some("gptq") => true,
        Some("gptq_v2") => false,
        Some(other) => {
            return Err(Error::expected("checkpoint_format of GPTQ", format!("'{other}'"), "gptq or gptq_v2"));
        }
    };
    check_group(parts, &config["group_size"], columns, "scales")?;
    let mut found = Columns::found(parts, (rows, columns), bits, (less_one, false))?;
    if parts.get("g_idx").is_none() {
        return Ok(found);
    }
    let index = parts.required("g_idx", &[DType::I32], 1)?;
    found.taken.push(index.name.clone());
    let groups: Vec<u32> = words(&source.bytes(index)?);
    let Codes::Columns(codes) = &mut found.codes else { return Ok(found) };
    let count = codes.scales.shape[0];
    let Some(order) = by_groups(&groups, columns, count) else {
        let expected = format!("{columns} inputs, as many in each of {count} groups");
        return Err(Error::expected(format!("tensor '{}'", index.name), "groups of other sizes", expected));
    };
    found.ordered = !order.is_empty();
    codes.order = order;
    Ok(found)
}

/// Returns a layer of AWQ's, in the layout `gemm`.
///
/// # Errors
/// When its tensors are not what the format says, or the layout is another.
pub fn awq(parts: &Parts, config: &Value) -> Result<Found> {
    let version = config["version"].as_str().unwrap_or("gemm").to_lowercase();
    if version != "gemm" {
        return Err(Error::expected("version of the quantisation", version, "gemm"));
    }
    match config["bits"].as_u64() {
        None | Some(4) => {}
        Some(bits) => return Err(Error::expected("bits of the quantisation", bits, "4")),
    }
    if let Some(backend) = config["backend"].as_str().filter(|backend| *backend != "autoawq") {
        return Err(Error::expected("backend of AWQ", format!("'{backend}'"), "autoawq"));
    }
    let weight = parts.required("qweight", &[DType::I32], 2)?;
    let shape = (weight.shape[1] * 8, weight.shape[0]);
    check_group(parts, &config["group_size"], shape.1, "scales")?;
    Columns::found(parts, shape, 4, (false, true))
}

/// Refuses a last group that is smaller than the others: formats here have groups of one size.
///
/// # Errors
/// When the configuration's group size says that there is one.
pub fn check_group(parts: &Parts, group: &Value, columns: usize, scales: &str) -> Result<()> {
    let Some(group) = group.as_u64().and_then(|group| usize::try_from(group).ok()).filter(|group| *group > 0) else {
        return Ok(());
    };
    let (whole, groups) = (columns.is_multiple_of(group), columns.div_ceil(group));
    match parts.get(scales).is_some_and(|scales| groups > 1 && scales.shape.contains(&groups)) {
        true if !whole => {
            let expected = format!("a divisor of its {columns} inputs: a smaller last group cannot be kept");
            Err(Error::expected(format!("group_size of layer '{}'", parts.stem), group, expected))
        }
        _ => Ok(()),
    }
}

impl Columns {
    fn found(
        parts: &Parts,
        (rows, columns): (usize, usize),
        bits: usize,
        (less_one, awq): (bool, bool),
    ) -> Result<Found> {
        let weight = parts.required("qweight", &[DType::I32], 2)?.clone();
        let zeros = parts.required("qzeros", &[DType::I32], 2)?.clone();
        let scales = parts.required("scales", &SCALES, 2)?.clone();
        let groups = scales.shape[0];
        let expected = [groups, (rows * bits).div_ceil(32)];
        if groups == 0 || !columns.is_multiple_of(groups) || scales.shape[1] != rows || zeros.shape != expected {
            let found = format!("{:?}, {:?} and {:?}", weight.shape, scales.shape, zeros.shape);
            let expected = "codes, scales and zero points of as many outputs, and groups of as many inputs";
            return Err(Error::expected(format!("shapes of layer '{}'", parts.stem), found, expected));
        }
        let format = WeightFormat {
            weight_type: WeightType::Int(bits as u8),
            group: Group::Size(columns / groups),
            symmetric: false,
            minimum: false,
            scales: scale_type(scales.dtype),
        };
        let taken = vec![weight.name.clone(), zeros.name.clone(), scales.name.clone()];
        let codes = Codes::Columns(Columns { bits, weight, zeros, scales, order: vec![], less_one, awq });
        Ok(Found { shape: (rows, columns), format, ordered: false, codes, taken })
    }

    /// Reads the weight, its rows side by side.
    ///
    /// # Errors
    /// When a tensor cannot be read, or a scale is not finite.
    pub fn matrix(
        &self,
        (rows, columns): (usize, usize),
        format: WeightFormat,
        source: &dyn TensorSource,
    ) -> Result<PackedMatrix> {
        let bits = self.bits;
        let (weight, zeros) = (words(&source.bytes(&self.weight)?), words(&source.bytes(&self.zeros)?));
        let scale_bytes = source.bytes(&self.scales)?;
        let (groups, of_zeros) = (self.scales.shape[0], self.zeros.shape[1]);
        let awq = |words: &[u32], line: usize, row: usize| {
            let place = AWQ_ORDER.iter().position(|&column| column == row % 8).unwrap_or_default();
            (words[line * (rows / 8) + row / 8] >> (4 * place) & 15) as u8
        };
        let code = |row: usize, column: usize| match self.awq {
            true => awq(&weight, column, row),
            false => dense(column, bits, |word| weight[word * rows + row]),
        };
        let zero = |row: usize, group: usize| match self.awq {
            true => awq(&zeros, group, row),
            false => {
                let stored = dense(row, bits, |word| zeros[group * of_zeros + word]);
                let top = ((1u16 << bits) - 1) as u8;
                if self.less_one { stored.wrapping_add(1) & top } else { stored }
            }
        };
        let mut codes = Vec::with_capacity(rows * columns);
        let (mut scales, mut zero_points) = (Vec::with_capacity(scale_bytes.len()), Vec::with_capacity(rows * groups));
        let bytes = scale_bytes.len() / (rows * groups).max(1);
        for row in 0..rows {
            match &self.order[..] {
                [] => codes.extend((0..columns).map(|column| code(row, column))),
                order => codes.extend(order.iter().map(|&column| code(row, column as usize))),
            }
            for group in 0..groups {
                let at = (group * rows + row) * bytes;
                scales.extend_from_slice(&scale_bytes[at..at + bytes]);
                zero_points.push(zero(row, group));
            }
        }
        let matrix = PackedMatrix::from_unpacked(format, (rows, columns), &codes, &scales, zero_points)?;
        if self.order.is_empty() { Ok(matrix) } else { matrix.with_order(self.order.clone()) }
    }
}
