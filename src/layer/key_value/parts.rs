//! The stored form of a key–value layer.
//!
//! Keys and values of f32 are `keys` and `values`, vectors that a notebook can read and search. Of fewer bits they are
//! `codes` with the roles `keys` and `values`, and what brings them back is in `tensors`: `key_scales` and
//! `value_scales` for int8, `key_units` where keys are kept in units, and `scales`, which float keys have beside them.

use std::sync::Arc;

use ndarray::{Array1, Array2};
use serde_json::json;

use super::config::{Backend, SearchSettings};
use super::threshold::Curves;
use super::{Core, KeyValueLayer, StoredConfig};
use crate::error::{Error, Result};
use crate::index::FlatIndex;
use crate::layer::parts::{Codes, Keys, Parts, Tensor, bytes_f32};
use crate::layer::{Method, read_config};
use crate::quant::{RowMatrix, RowType};

impl KeyValueLayer {
    pub(in crate::layer) fn to_parts(&self) -> Parts {
        let core = &*self.core;
        let mut parts = Parts::new(Method::KeyValue, json!(core.config));
        let keys = core.index.rows();
        match keys.floats() {
            Some(floats) => parts.keys = Some(Keys { vectors: floats.to_owned(), scales: core.scales.clone() }),
            None => {
                parts.codes.push(Codes { role: "keys".into(), codes: keys.bytes() });
                parts.tensors.push(Tensor::vector("scales", &core.scales));
            }
        }
        match core.values.floats() {
            Some(floats) => parts.values = Some(floats.to_owned()),
            None => parts.codes.push(Codes { role: "values".into(), codes: core.values.bytes() }),
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
        let Backend::Flat { keys: kind } = config.backend;
        let (rank, inputs, outputs) = (config.rank, config.in_features, config.out_features);
        let floats = parts.keys.take();
        let (keys, scales) = match floats {
            Some(keys) if kind == RowType::F32 => (RowMatrix::new(keys.vectors, kind)?, keys.scales),
            _ => (rows(&parts, "keys", "key_scales", kind, (rank, inputs))?, vector(&parts, "scales")?.to_vec()),
        };
        let units = parts.tensor("key_units").map(Tensor::to_vector).transpose()?;
        let values = match parts.values.take() {
            Some(values) if config.values == RowType::F32 => RowMatrix::new(values, RowType::F32)?,
            _ => rows(&parts, "values", "value_scales", config.values, (rank, outputs))?,
        };
        let bias = parts.tensor("bias").map(Tensor::to_vector).transpose()?;
        let curves = parts.tensor("calibration_thresholds").map(|t| curves(t, rank)).transpose()?;
        let (mean, mean_output) = (vector(&parts, "mean")?, vector(&parts, "mean_output")?);
        let index = FlatIndex::from_rows(keys, units)?;
        let core = Core::new(config, index, scales, values, mean, mean_output, bias, curves)?;
        Self::with_settings(Arc::new(core), SearchSettings::default())
    }
}

fn missing(what: &str) -> Error {
    Error::expected("parts of a key–value layer", format!("no {what}"), what)
}

fn vector(parts: &Parts, name: &str) -> Result<Array1<f32>> {
    parts.tensor(name).ok_or_else(|| missing(name))?.to_vector()
}

/// Keys or values of fewer bits.
fn rows(parts: &Parts, role: &str, scales: &str, kind: RowType, shape: (usize, usize)) -> Result<RowMatrix> {
    let codes = &parts.codes.iter().find(|c| c.role == role).ok_or_else(|| missing(role))?.codes;
    let expected = (shape.0, shape.1.saturating_mul(kind.bytes()));
    if codes.dim() != expected {
        return Err(Error::expected(format!("bytes of {role}"), format!("{:?}", codes.dim()), format!("{expected:?}")));
    }
    let scales = if kind == RowType::Int8 { vector(parts, scales)?.to_vec() } else { vec![] };
    let bytes = codes.as_standard_layout();
    RowMatrix::from_bytes(kind, shape, bytes.as_slice().expect("standard layout"), &scales)
}

fn curves(tensor: &Tensor, rank: usize) -> Result<Curves> {
    let thresholds = Array2::from_shape_vec((4, rank), bytes_f32(&tensor.data)).map_err(|_| {
        Error::expected("calibration_thresholds", format!("{} bytes", tensor.data.len()), format!("[4, {rank}] of F32"))
    })?;
    Ok(Curves { thresholds })
}
