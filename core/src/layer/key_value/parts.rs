//! The stored form of a key–value layer.
//!
//! Keys and values of f32 are `keys` and `values`, vectors that a notebook can read and search. Of fewer bits they are
//! `codes` with the roles `keys` and `values`, and what brings them back is in `tensors`: `key_scales` and
//! `value_scales` for int8, `key_units` where keys are kept in units, and `scales`, which float keys have beside them.
//! Product codes have their codewords in `codebooks`, and may have the float keys as well.
//!
//! `ivf_pq` has the centres of its cells in `codebooks` with the role `cells`, each key's cell in the tensor
//! `cells`, and how far cells reach in `cell_radii`.
//! `hnsw` has the tensor `graph`, in usearch's format, and its BLAKE3 hash in `graph_hash`. Both have `index_units`, what
//! their vectors are in units of, where inputs are known.

use std::sync::Arc;

use bytes::Bytes;
use ndarray::{Array1, Array2};
use serde_json::json;

use super::backend::Backend;
use super::config::{KeyValueConfig, SearchSettings};
use super::layer::{Core, KeyValueLayer, StoredConfig};
use super::threshold::Curves;
use crate::error::{Error, Result};
use crate::index::{FlatIndex, HnswIndex, IvfPqIndex, KeyIndex};
use crate::layer::check::check_lengths;
use crate::layer::method::{Method, read_config};
use crate::layer::parts::{Codebook, Codes, Keys, Parts, Tensor, bytes_f32};
use crate::quant::{ProductQuantizer, RowFormat, RowMatrix, RowType};

/// The role and the tensor that cells are kept under.
const CELLS: &str = "cells";

/// The tensor of how far cells reach.
const RADII: &str = "cell_radii";

impl KeyValueLayer {
    pub(super) fn written_parts(&self) -> Parts {
        let core = &*self.core;
        let mut parts = Parts::new(KeyValueConfig::NAME, json!(core.config));
        let keys = core.index.rows().rows();
        let floats = core.float_keys.as_ref().map(|k| k.view()).or(keys.floats());
        match floats.filter(|_| core.config.settings.backend.stores_float_keys()) {
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
        let index_units = match &core.index {
            KeyIndex::Flat(_) => None,
            KeyIndex::IvfPq(index) => {
                let (centres, radii, cells) = index.cells();
                parts.tensors.push(Tensor::vector(RADII, &radii.to_vec()));
                parts.codebooks.push(Codebook { role: CELLS.into(), subspace: 0, vectors: centres.to_owned() });
                parts.tensors.push(Tensor {
                    name: CELLS.into(),
                    dtype: "U32".into(),
                    shape: vec![cells.len()],
                    data: cells.iter().flat_map(|cell| cell.to_le_bytes()).collect(),
                });
                index.units()
            }
            KeyIndex::Hnsw(index) => {
                parts.tensors.extend(graph_tensors(index.serialized()));
                index.units()
            }
        };
        if let Some(units) = index_units {
            parts.tensors.push(Tensor::vector("index_units", &units.to_vec()));
        }
        if let Some(units) = core.index.rows().units() {
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

    pub(super) fn read_parts(mut parts: Parts) -> Result<Self> {
        let config: StoredConfig = read_config(KeyValueConfig::NAME, &parts.config)?;
        let (rank, inputs, outputs) = (config.rank, config.in_features, config.out_features);
        check_lengths(outputs, inputs)?;
        let exact = RowFormat::Plain(RowType::F32);
        let (backend, value_format) = (config.settings.backend, config.settings.values);
        // What an index is made and searched with is taken from the config as it is.
        backend.validate()?;
        let (floats, scales) = match parts.keys.take() {
            Some(keys) => (Some(keys.vectors), keys.scales),
            None => (None, vector(&parts, "scales")?.to_vec()),
        };
        if floats.is_some() != backend.stores_float_keys() {
            return Err(missing(if floats.is_some() { "keys but codes or a graph" } else { "float keys" }));
        }
        let optional = |parts: &Parts, name| parts.tensor(name).map(Tensor::to_vector).transpose();
        let units = optional(&parts, "key_units")?;
        let index_units = optional(&parts, "index_units")?;
        let (index, float_keys) = match (backend, backend.graph(), backend.format(), floats) {
            (_, Some(options), _, floats) => {
                let graph = graph(&parts)?;
                let index = HnswIndex::restore(&graph, floats, &scales, inputs, index_units, options)?;
                (KeyIndex::Hnsw(index), None)
            }
            (_, None, format, Some(floats)) if format == exact => {
                let keys = RowMatrix::new(floats, RowType::F32)?;
                (KeyIndex::Flat(FlatIndex::from_rows(keys, units)?), None)
            }
            (backend, None, format, floats) => {
                let keys = rows(&mut parts, "keys", "key_scales", format, (rank, inputs))?;
                let keys = FlatIndex::from_rows(keys, units)?;
                let index = match backend {
                    Backend::IvfPq { probes, .. } => {
                        let (centres, cells) = cells(&mut parts)?;
                        let radii = vector(&parts, RADII)?;
                        KeyIndex::IvfPq(IvfPqIndex::from_cells(keys, centres, radii, cells, index_units, probes)?)
                    }
                    _ => KeyIndex::Flat(keys),
                };
                (index, floats)
            }
        };
        let values = match (value_format == exact, parts.values.take()) {
            (true, Some(values)) => RowMatrix::new(values, RowType::F32)?,
            (true, None) => return Err(missing("values")),
            (false, _) => rows(&mut parts, "values", "value_scales", value_format, (rank, outputs))?,
        };
        let bias = parts.tensor("bias").map(Tensor::to_vector).transpose()?;
        let curves = parts.tensor("calibration_thresholds").map(|t| curves(t, rank)).transpose()?;
        let (mean, mean_output) = (vector(&parts, "mean")?, vector(&parts, "mean_output")?);
        let core = Core::new(config, index, float_keys, scales, values, mean, mean_output, bias, curves)?;
        Self::with_settings(Arc::new(core), SearchSettings::default())
    }
}

fn missing(what: &str) -> Error {
    Error::expected("parts of a key–value layer", format!("no {what}"), what)
}

/// The graph's bytes, and what they have to be: usearch trusts what it reads.
fn graph_tensors(graph: Vec<u8>) -> [Tensor; 2] {
    let bytes =
        |name: &str, data: Bytes| Tensor { name: name.into(), dtype: "U8".into(), shape: vec![data.len()], data };
    let hash = Bytes::copy_from_slice(blake3::hash(&graph).as_bytes());
    [bytes("graph", graph.into()), bytes("graph_hash", hash)]
}

fn graph(parts: &Parts) -> Result<Bytes> {
    let graph = &parts.tensor("graph").ok_or_else(|| missing("graph"))?.data;
    let hash = parts.tensor("graph_hash").ok_or_else(|| missing("graph_hash"))?;
    let found = blake3::hash(graph);
    if *found.as_bytes() != *hash.data {
        return Err(Error::expected(
            "graph of keys",
            format!("bytes with the hash {found}"),
            "the bytes that were written",
        ));
    }
    Ok(graph.clone())
}

/// The centres of the cells, and by key its cell.
fn cells(parts: &mut Parts) -> Result<(Array2<f32>, Vec<u32>)> {
    let place = parts.codebooks.iter().position(|book| book.role == CELLS).ok_or_else(|| missing(CELLS))?;
    let centres = parts.codebooks.swap_remove(place).vectors;
    let cells = parts.tensor(CELLS).ok_or_else(|| missing(CELLS))?;
    let cells = cells.data.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    Ok((centres, cells))
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

pub(super) fn curves(tensor: &Tensor, rank: usize) -> Result<Curves> {
    let thresholds = Array2::from_shape_vec((4, rank), bytes_f32(&tensor.data)).map_err(|_| {
        Error::expected("calibration_thresholds", format!("{} bytes", tensor.data.len()), format!("[4, {rank}] of F32"))
    })?;
    Ok(Curves { thresholds })
}
