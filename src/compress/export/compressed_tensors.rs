//! compressed-tensors' `pack-quantized`: 4- and 8-bit integers in 32-bit words, with a scale for each group, row or weight.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use layerstore_core::quant::{Group, PackedMatrix, ScaleType, WeightFormat, WeightType};
use serde_json::{Value, json};

use super::super::misfits::Misfits;
use super::content::{Content, Kept, OutlinedTensor};
use super::folder::{beside, is_embedding};
use super::model::Model;
use crate::error::{Error, Result};
use crate::layer::DType;

/// Layers that are quantised alike: their bits, and the weights that share a scale.
type Scheme = (u8, Option<usize>);

impl Model {
    /// Writes the folder of a model whose layers of integers stay packed.
    pub(super) fn compressed_tensors(&mut self) -> Result<u64> {
        let tensors = std::mem::take(&mut self.outline.tensors);
        let (mut all, mut schemes, mut dense): (Vec<_>, BTreeMap<Scheme, Vec<String>>, Vec<String>) =
            (vec![], BTreeMap::new(), vec![]);
        let mut misfits = Misfits::default();
        for tensor in tensors {
            let stem = tensor.name.strip_suffix(".weight").map(str::to_owned);
            let found = match (&tensor.kept, &stem) {
                (Kept::Numbers, _) => None,
                (Kept::Codes(format), Some(stem)) => Some(scheme(*format, stem)),
                (Kept::Codes(_), None) => Some(Err("weights of another name than NAME.weight".to_owned())),
                (Kept::Otherwise(what), _) => Some(Err(what.clone())),
            };
            match (found, stem) {
                (Some(Ok(scheme)), Some(stem)) => {
                    all.extend(packed(&tensor, &stem, scheme)?);
                    schemes.entry(scheme).or_default().push(stem);
                }
                (Some(Err(what)), _) if !self.allow_dequantize => {
                    misfits.keep::<()>(&tensor.name, Err(cannot_be_held(&what)));
                }
                (_, stem) => {
                    let is_linear = tensor.shape.len() == 2;
                    dense.extend(stem.filter(|stem| is_linear && !is_embedding(stem)));
                    all.push(tensor);
                }
            }
        }
        misfits.result(&self.output)?;
        if schemes.is_empty() {
            let found = "none";
            let expected = "layers of int4 or int8 in symmetric groups: --to huggingface writes numbers";
            return Err(Error::expected("layers that compressed-tensors keeps packed", found, expected));
        }
        self.outline.tensors = all;
        self.write_model_folder(Some(configuration(&schemes, &dense)))
    }
}

fn cannot_be_held(what: &str) -> Error {
    let expected =
        "int4 or int8, symmetric, in groups or by row, of a linear layer; --allow-dequantize writes it as numbers";
    Error::expected("weight for pack-quantized", what, expected)
}

/// Returns how a layer is quantised; or what it is that has no place there.
fn scheme(format: WeightFormat, stem: &str) -> Result<Scheme, String> {
    let WeightFormat { weight_type, group, symmetric, minimum: _, scales } = format;
    let bits = match weight_type {
        WeightType::Int(bits @ (4 | 8)) => bits,
        other => return Err(format!("weights of {other}")),
    };
    let group = match group {
        Group::Size(group) => Some(group),
        Group::Channel | Group::Tensor => None,
    };
    match () {
        () if is_embedding(stem) => Err("an embedding".into()),
        () if !symmetric => Err("an asymmetric weight".into()),
        () if scales.nested().is_some() => Err("a weight with scales of scales".into()),
        () => Ok((bits, group)),
    }
}

/// Returns the tensors of a packed layer.
fn packed(tensor: &OutlinedTensor, stem: &str, (bits, _): Scheme) -> Result<[OutlinedTensor; 3]> {
    let [rows, columns] = tensor.shape[..] else {
        let found = format!("{:?}", tensor.shape);
        return Err(Error::expected(format!("shape of tensor '{}'", tensor.name), found, "a matrix"));
    };
    let Kept::Codes(format) = &tensor.kept else {
        return Err(Error::expected(format!("tensor '{}'", tensor.name), "numbers", "codes"));
    };
    let words = columns.div_ceil(32 / usize::from(bits));
    let name = |part: &str| format!("{stem}.{part}");
    let codes = beside(tensor, name("weight_packed"), Content::Packed(Arc::new(move |m| Ok(words_of(m, bits)))));
    let scales = beside(tensor, name("weight_scale"), Content::Packed(Arc::new(|m| Ok(m.scale_bytes().to_vec()))));
    let shape: Vec<u8> = [rows as i64, columns as i64].into_iter().flat_map(i64::to_le_bytes).collect();
    let mut shape = beside(tensor, name("weight_shape"), Content::Made(Bytes::from(shape)));
    shape.pieces.iter_mut().for_each(|piece| piece.dtype = DType::I64);
    let scale = match format.scales {
        ScaleType::F16 => DType::F16,
        ScaleType::Bf16 => DType::BF16,
        _ => DType::F32,
    };
    Ok([
        OutlinedTensor { dtype: DType::I32, shape: vec![rows, words], ..codes },
        OutlinedTensor { dtype: scale, shape: vec![rows, format.groups(columns)?], ..scales },
        OutlinedTensor { dtype: DType::I64, shape: vec![2], ..shape },
    ])
}

/// Returns the codes of a matrix, plus half of their range, in words of whole codes, row by row.
fn words_of(matrix: &PackedMatrix, bits: u8) -> Vec<u8> {
    let (each, half) = (32 / usize::from(bits), 1u32 << (bits - 1));
    let mask = (half << 1) - 1;
    let mut codes = vec![0; matrix.ncols()];
    let mut all = Vec::with_capacity(matrix.nrows() * matrix.ncols() * usize::from(bits) / 8);
    for row in 0..matrix.nrows() {
        matrix.codes(row, &mut codes);
        for codes in codes.chunks(each) {
            let place = |(place, &code): (usize, &u8)| ((u32::from(code) ^ half) & mask) << (place * usize::from(bits));
            let word = codes.iter().enumerate().map(place).fold(0, |word, code| word | code);
            all.extend(word.to_le_bytes());
        }
    }
    all
}

fn configuration(schemes: &BTreeMap<Scheme, Vec<String>>, dense: &[String]) -> Value {
    let groups = schemes.iter().enumerate().map(|(number, ((bits, group), layers))| {
        let weights = json!({
            "num_bits": bits, "type": "int", "symmetric": true, "dynamic": false, "actorder": null,
            "strategy": if group.is_some() { "group" } else { "channel" }, "group_size": group, "block_structure": null,
            "observer": "minmax", "observer_kwargs": {},
        });
        // One scheme is that of all linear layers but those that are listed.
        let targets = if schemes.len() == 1 { json!(["Linear"]) } else { json!(layers) };
        let group =
            json!({ "targets": targets, "weights": weights, "input_activations": null, "output_activations": null });
        (format!("group_{number}"), group)
    });
    json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups.collect::<serde_json::Map<_, _>>(), "ignore": dense, "kv_cache_scheme": null,
        "global_compression_ratio": null,
    })
}
