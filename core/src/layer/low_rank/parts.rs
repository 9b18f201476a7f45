//! A layer as arrays to store, and from them.

use half::f16;
use ndarray::Array2;
use serde_json::json;

use super::config::LowRankConfig;
use super::stored::{Inner, StoredConfig};
use crate::error::{Error, Result};
use crate::layer::check::check_lengths;
use crate::layer::method::{Method, read_config};
use crate::layer::parts::{Codes, Factor, Parts, Side, Tensor, WeightRows};
use crate::quant::{PackedMatrix, RowMatrix, RowType};

/// The tensor that says which input each stored column of the weight is for.
const INPUT_ORDER: &str = "input_order";

/// Returns the arrays of a layer from its parts.
///
/// # Errors
/// When they are not those of a low-rank layer.
pub fn from_parts(mut parts: Parts) -> Result<Inner> {
    let mut config: StoredConfig = read_config(LowRankConfig::NAME, &parts.config)?;
    // A way to run it, which the catalogue's config has beside: no part of what is stored.
    config.made.remove("activations");
    let (outputs, inputs) = (config.out_features, config.in_features);
    check_lengths(outputs, inputs)?;
    let rows = parts
        .weights
        .as_ref()
        .ok_or_else(|| Error::expected("parts of a low-rank layer", "no weight rows", "weight rows"))?;
    let weight = PackedMatrix::from_fields(
        config.weight,
        (outputs, inputs),
        rows.packed.clone(),
        &rows.scales,
        rows.zeros.to_vec(),
    )?;
    let weight = match parts.tensor("column_scales") {
        Some(scales) => {
            let scales = RowMatrix::from_bytes(RowType::F16, (1, inputs), &scales.data, &[])?;
            weight.with_column_scales(scales.to_f32().into_raw_vec_and_offset().0)?
        }
        None => weight,
    };
    let weight = match parts.tensor(INPUT_ORDER) {
        Some(order) if order.dtype == "U32" => {
            let order = order.data.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
            weight.with_order(order)?
        }
        Some(order) => return Err(Error::expected("dtype of an order of inputs", &order.dtype, "U32")),
        None => weight,
    };
    let mut singular_values = match parts.tensor("singular_values") {
        Some(values) => values.to_vector()?.to_vec(),
        None => vec![],
    };
    let mut factor = |side: Side, length: usize| -> Result<RowMatrix> {
        if config.rank == 0 {
            return RowMatrix::new(Array2::zeros((0, length)), config.factors);
        }
        let missing = || Error::expected("parts of a low-rank layer", format!("no factor {}", side.as_str()), "it");
        if config.factors == RowType::F32 {
            let place = parts.factors.iter().position(|f| f.side == side).ok_or_else(missing)?;
            let factor = parts.factors.swap_remove(place);
            singular_values = factor.singular_values;
            return RowMatrix::new(factor.vectors, RowType::F32);
        }
        let codes = parts.codes.iter().find(|codes| codes.role == side.as_str()).ok_or_else(missing)?;
        if codes.codes.dim() != (config.rank, length * config.factors.bytes()) {
            let expected = format!("{:?}", (config.rank, length * config.factors.bytes()));
            return Err(Error::expected("bytes of a factor", format!("{:?}", codes.codes.dim()), expected));
        }
        let scales = match parts.tensor(&format!("{}_scales", side.as_str())) {
            Some(scales) => scales.to_vector()?.to_vec(),
            None => vec![],
        };
        let bytes = codes.codes.as_standard_layout();
        let bytes = bytes.as_slice().expect("standard layout");
        RowMatrix::from_bytes(config.factors, (config.rank, length), bytes, &scales)
    };
    let (a, b) = (factor(Side::A, outputs)?, factor(Side::B, inputs)?);
    let bias_correction = parts
        .tensor("shift")
        .map(|t| {
            let kind = if t.dtype == "F32" { RowType::F32 } else { RowType::F16 };
            RowMatrix::from_bytes(kind, (1, outputs), &t.data, &[])
        })
        .transpose()?;
    let bias = parts.tensor("bias").map(Tensor::to_vector).transpose()?;
    Ok(Inner { config, weight, a, b, singular_values, bias_correction, bias })
}

/// Returns the parts of a layer.
pub fn to_parts(inner: &Inner) -> Parts {
    let mut parts = Parts::new(LowRankConfig::NAME, json!(inner.config));
    parts.weights = Some(WeightRows {
        rows: inner.weight.nrows(),
        packed: inner.weight.stored_codes(),
        scales: inner.weight.scale_bytes(),
        zeros: inner.weight.zero_bytes(),
    });
    for (side, rows) in [(Side::A, &inner.a), (Side::B, &inner.b)] {
        if inner.config.rank == 0 {
            continue;
        }
        match rows.floats() {
            Some(vectors) => parts.factors.push(Factor {
                side,
                singular_values: inner.singular_values.clone(),
                vectors: vectors.to_owned(),
            }),
            None => {
                parts.codes.push(Codes { role: side.as_str().into(), codes: rows.bytes() });
                if !rows.scales().is_empty() {
                    parts.tensors.push(Tensor::vector(&format!("{}_scales", side.as_str()), rows.scales()));
                }
            }
        }
    }
    if !parts.codes.is_empty() {
        parts.tensors.push(Tensor::vector("singular_values", &inner.singular_values));
    }
    if !inner.weight.column_scales().is_empty() {
        let halves = inner.weight.column_scales().iter().flat_map(|&s| f16::from_f32(s).to_le_bytes());
        let (data, shape) = (halves.collect::<Vec<u8>>().into(), vec![inner.config.in_features]);
        parts.tensors.push(Tensor { name: "column_scales".into(), dtype: "F16".into(), shape, data });
    }
    if !inner.weight.order().is_empty() {
        let data = inner.weight.order().iter().flat_map(|column| column.to_le_bytes()).collect::<Vec<u8>>().into();
        let shape = vec![inner.config.in_features];
        parts.tensors.push(Tensor { name: INPUT_ORDER.into(), dtype: "U32".into(), shape, data });
    }
    if let Some(correction) = &inner.bias_correction {
        let data = correction.bytes().into_raw_vec_and_offset().0.into();
        let shape = vec![inner.config.out_features];
        let dtype = if correction.floats().is_some() { "F32" } else { "F16" };
        parts.tensors.push(Tensor { name: "shift".into(), dtype: dtype.into(), shape, data });
    }
    if let Some(bias) = &inner.bias {
        parts.tensors.push(Tensor::vector("bias", &bias.to_vec()));
    }
    parts
}
