//! 8-bit floats with scales beside them: one for a weight, one for each row, or one for each block of rows and columns (DeepSeek).

use std::collections::BTreeMap;

use layerstore_core::quant::{Group, PackedMatrix, WeightFormat, WeightType};

use super::super::source::{TensorInfo, TensorSource};
use super::columns::scale_type;
use super::{Codes, Found, Parts, SCALES};
use crate::error::{Error, Result};
use crate::layer::DType;

/// What the names of scales end with. All are multiplied with the weight, whatever the name says.
const NAMES: [&str; 3] = ["weight_scale", "weight_scale_inv", "scale_weight"];

/// Rows and columns of a block.
const BLOCK: usize = 128;

/// The tensors of a layer.
#[derive(Debug, Clone)]
pub struct Scaled {
    weight: TensorInfo,
    scales: TensorInfo,
    /// Rows that share a scale.
    rows: usize,
}

/// Returns whether there are weights of 8-bit floats with scales among tensors.
pub fn is_scaled(tensors: &BTreeMap<String, TensorInfo>) -> bool {
    let stems = tensors.values().filter(|t| is_weight(t)).filter_map(|t| t.name.strip_suffix(".weight"));
    let mut parts = stems.map(|stem| Parts { stem, tensors });
    parts.any(|parts| NAMES.iter().any(|name| parts.get(name).is_some()))
}

fn is_weight(tensor: &TensorInfo) -> bool {
    matches!(tensor.dtype, DType::F8_E4M3 | DType::F8_E5M2) && tensor.shape.len() == 2
}

/// Returns a layer of 8-bit floats; none where the weight is another, or has no scale.
///
/// # Errors
/// When the scales are not those of the weight.
pub fn find(parts: &Parts, _: &dyn TensorSource) -> Result<Option<Found>> {
    let Some(weight) = parts.get("weight").filter(|weight| is_weight(weight)).cloned() else { return Ok(None) };
    let Some(scales) = NAMES.iter().find_map(|name| parts.get(name)).cloned() else { return Ok(None) };
    let (rows, columns) = (weight.shape[0], weight.shape[1]);
    let wrong = || {
        let found = format!("{:?} {:?}", scales.dtype, scales.shape);
        let expected = format!(
            "F32, F16 or BF16: one, one for each of {rows} rows, or one for each block of {BLOCK} × {BLOCK} of whole columns"
        );
        Error::expected(format!("tensor '{}'", scales.name), found, expected)
    };
    let blocks = [rows.div_ceil(BLOCK), columns.div_ceil(BLOCK)];
    let (shared, group) = match scales.shape[..] {
        _ if !SCALES.contains(&scales.dtype) => return Err(wrong()),
        [] | [1] | [1, 1] => (rows, Group::Channel),
        [n] | [n, 1] if n == rows => (1, Group::Channel),
        [_, _] if scales.shape == blocks && columns.is_multiple_of(BLOCK) => (BLOCK, Group::Size(BLOCK)),
        _ => return Err(wrong()),
    };
    let weight_type = if weight.dtype == DType::F8_E4M3 { WeightType::F8E4M3 } else { WeightType::F8E5M2 };
    let format =
        WeightFormat { weight_type, group, symmetric: false, minimum: false, scales: scale_type(scales.dtype) };
    let taken = vec![weight.name.clone(), scales.name.clone()];
    let codes = Codes::Scaled(Scaled { weight, scales, rows: shared });
    Ok(Some(Found { shape: (rows, columns), format, ordered: false, codes, taken }))
}

impl Scaled {
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
        let (codes, scales) = (source.bytes(&self.weight)?, source.bytes(&self.scales)?);
        let groups = format.groups(columns)?;
        let row = groups * self.scales.dtype.bitsize() / 8;
        let each = (0..rows).flat_map(|i| &scales[i / self.rows * row..][..row]);
        let scales: Vec<u8> = each.copied().collect();
        PackedMatrix::from_unpacked(format, (rows, columns), &codes, &scales, vec![])
    }
}
