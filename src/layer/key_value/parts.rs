//! The stored form of a key–value layer.
//!
//! Keys and values of f32 are `keys` and `values`, vectors that a notebook can read and search. Of fewer bits they are
//! `codes` with the roles `keys` and `values`, and what brings them back is in `tensors`: `key_scales` and
//! `value_scales` for int8, `key_units` where keys are kept in units, and `scales`, which float keys have beside them.
//! Product codes have their codewords in `codebooks`, and may have the float keys as well.

use std::sync::Arc;

use ndarray::{Array1, Array2};
use serde_json::json;

use super::config::SearchSettings;
use super::threshold::Curves;
use super::{Core, KeyValueLayer, StoredConfig};
use crate::error::{Error, Result};
use crate::index::FlatIndex;
use crate::layer::parts::{Codebook, Codes, Keys, Parts, Tensor, bytes_f32};
use crate::layer::{Method, read_config};
use crate::quant::{ProductQuantizer, RowFormat, RowMatrix, RowType};

impl KeyValueLayer {
    pub(in crate::layer) fn to_parts(&self) -> Parts {
        let core = &*self.core;
        let mut parts = Parts::new(Method::KeyValue, json!(core.config));
        let keys = core.index.rows();
        match keys.floats().or(core.float_keys.as_ref().map(|k| k.view())) {
            Some(floats) => parts.keys = Some(Keys { vectors: floats.to_owned(), scales: core.scales.clone() }),
            None => parts.tensors.push(Tensor::vector("scales", &core.scales)),
        }
        match core.values.floats() {
            Some(floats) => parts.values = Some(floats.to_owned()),
            None => put(&mut parts, "values", &core.values),
        }
        if keys.floats().is_none() {
            put(&mut parts, "keys", keys);
        }
        for (name, scales) in [("key_scales", keys.scales()), ("value_scales", core.values.scales())] {
            if !scales.is_empty() {
                parts.tensors.push(Tensor::vector(name, scales));
            }
        }
        if let Some(units) = core.index.units() {
            parts.tensors.push(Tensor::vector("key_units", &units.to_vec()));
        }
        parts.tensors.push(Tensor::vector("mean", &core.mean.to_vec()));
        parts.tensors.push(Tensor::vector("mean_output", &core.mean_output.to_vec()));
        if let Some(bias) = &core.bias {
            parts.tensors.push(Tensor::vector("bias", &bias.to_vec()));
        }
        if let Some(curves) = &core.curves {
            parts.tensors.push(Tensor {
                name: "calibration_thresholds".into(),
                shape: curves.thresholds.shape().to_vec(),
                ..Tensor::vector("", curves.thresholds.as_slice().expect("built in standard layout"))
            });
        }
        parts
    }

    pub(in crate::layer) fn from_parts(mut parts: Parts) -> Result<Self> {
        let config: StoredConfig = read_config(parts.method, &parts.config)?;
        let (rank, inputs, outputs) = (config.rank, config.in_features, config.out_features);
        let exact = RowFormat::Plain(RowType::F32);
        let (key_format, stored) = (config.backend.format(), parts.keys.take());
        let (floats, scales) = match stored {
            Some(keys) => (Some(keys.vectors), keys.scales),
            None => (None, vector(&parts, "scales")?.to_vec()),
        };
        let (keys, float_keys) = match floats {
            Some(floats) if key_format == exact => (RowMatrix::new(floats, RowType::F32)?, None),
            Some(_) | None if key_format == exact => return Err(missing("keys")),
            floats if floats.is_some() == config.backend.stores_float_keys() => {
                (rows(&mut parts, "keys", "key_scales", key_format, (rank, inputs))?, floats)
            }
            _ => return Err(missing("float keys")),
        };
        let units = parts.tensor("key_units").map(Tensor::to_vector).transpose()?;
        let values = match (config.values == exact, parts.values.take()) {
            (true, Some(values)) => RowMatrix::new(values, RowType::F32)?,
            (true, None) => return Err(missing("values")),
            (false, _) => rows(&mut parts, "values", "value_scales", config.values, (rank, outputs))?,
        };
        let bias = parts.tensor("bias").map(Tensor::to_vector).transpose()?;
        let curves = parts.tensor("calibration_thresholds").map(|t| curves(t, rank)).transpose()?;
        let (mean, mean_output) = (vector(&parts, "mean")?, vector(&parts, "mean_output")?);
        let index = FlatIndex::from_rows(keys, units)?;
        let core = Core::new(config, index, float_keys, scales, values, mean, mean_output, bias, curves)?;
        Self::with_settings(Arc::new(core), SearchSettings::default())
    }
}

fn missing(what: &str) -> Error {
    Error::expected("parts of a key–value layer", format!("no {what}"), what)
}

fn vector(parts: &Parts, name: &str) -> Result<Array1<f32>> {
    parts.tensor(name).ok_or_else(|| missing(name))?.to_vector()
}

/// Puts keys or values that are no floats among the parts, less their scales.
fn put(parts: &mut Parts, role: &str, rows: &RowMatrix) {
    parts.codes.push(Codes { role: role.into(), codes: rows.bytes() });
    for (subspace, vectors) in rows.quantizer().map_or(&[][..], |q| q.codebooks()).iter().enumerate() {
        parts.codebooks.push(Codebook { role: role.into(), subspace: subspace as u32, vectors: vectors.clone() });
    }
}

/// Keys or values that are no floats.
fn rows(
    parts: &mut Parts,
    role: &str,
    scales: &str,
    format: RowFormat,
    (count, width): (usize, usize),
) -> Result<RowMatrix> {
    let place = parts.codes.iter().position(|c| c.role == role).ok_or_else(|| missing(role))?;
    let codes = parts.codes.swap_remove(place).codes;
    let bytes = match format {
        RowFormat::Plain(kind) => width.saturating_mul(kind.bytes()),
        RowFormat::Product(format) => format.subvectors,
    };
    if codes.dim() != (count, bytes) {
        return Err(Error::expected(
            format!("bytes of {role}"),
            format!("{:?}", codes.dim()),
            format!("{:?}", (count, bytes)),
        ));
    }
    match format {
        RowFormat::Plain(kind) => {
            let scales = if kind == RowType::Int8 { vector(parts, scales)?.to_vec() } else { vec![] };
            let bytes = codes.as_standard_layout();
            RowMatrix::from_bytes(kind, (count, width), bytes.as_slice().expect("standard layout"), &scales)
        }
        RowFormat::Product(_) => {
            let (mut books, others): (Vec<_>, Vec<_>) = parts.codebooks.drain(..).partition(|b| b.role == role);
            parts.codebooks = others;
            books.sort_by_key(|b| b.subspace);
            let quantizer = ProductQuantizer::from_codebooks(books.into_iter().map(|b| b.vectors).collect())?;
            RowMatrix::from_codes(quantizer, codes)
        }
    }
}

fn curves(tensor: &Tensor, rank: usize) -> Result<Curves> {
    let thresholds = Array2::from_shape_vec((4, rank), bytes_f32(&tensor.data)).map_err(|_| {
        Error::expected("calibration_thresholds", format!("{} bytes", tensor.data.len()), format!("[4, {rank}] of F32"))
    })?;
    Ok(Curves { thresholds })
}
