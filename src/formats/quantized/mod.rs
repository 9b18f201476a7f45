//! Hugging Face folders whose weights are quantised already (`quantization_config`): GPTQ, AWQ, compressed-tensors and
//! bitsandbytes. Codes and scales are kept as they are.

mod bitsandbytes;
mod columns;
mod compressed;
mod order;
mod scaled;
mod words;

#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use layerstore_core::layer::to_f32;
use layerstore_core::quant::{PackedMatrix, WeightFormat};
use serde_json::{Value, json};

use super::config_beside;
use super::packed::packed;
use super::source::{SourceLayer, TensorInfo, TensorSource, paired};
use crate::error::{Error, Result};
use crate::layer::{DType, LayerShape};

/// A checkpoint with quantised layers among its tensors.
#[derive(Debug)]
pub struct QuantizedSource {
    source: Arc<dyn TensorSource>,
    /// Tensors that are no part of a quantised layer.
    tensors: BTreeMap<String, TensorInfo>,
    layers: BTreeMap<String, Quantized>,
}

/// A quantised layer.
#[derive(Debug, Clone)]
struct Quantized {
    rows: usize,
    columns: usize,
    format: WeightFormat,
    /// Whether its columns are stored in another order.
    ordered: bool,
    bias: Option<TensorInfo>,
    codes: Codes,
}

/// Where the codes of a layer are, and how they lie.
#[derive(Debug, Clone)]
enum Codes {
    Columns(columns::Columns),
    Compressed(compressed::Compressed),
    BitsAndBytes(bitsandbytes::BitsAndBytes),
    Scaled(scaled::Scaled),
}

/// What was found of a layer: its shape, format and codes, and the names of its tensors.
struct Found {
    shape: (usize, usize),
    format: WeightFormat,
    ordered: bool,
    codes: Codes,
    taken: Vec<String>,
}

/// Tensors of one layer, by the part of the name behind the layer's.
struct Parts<'a> {
    stem: &'a str,
    tensors: &'a BTreeMap<String, TensorInfo>,
}

impl Parts<'_> {
    fn get(&self, part: &str) -> Option<&TensorInfo> {
        self.tensors.get(&format!("{}.{part}", self.stem))
    }

    /// Returns a tensor that has to be there, of this dtype and so many dimensions.
    fn required(&self, part: &str, dtypes: &[DType], dimensions: usize) -> Result<&TensorInfo> {
        let name = format!("{}.{part}", self.stem);
        let expected = || format!("tensor '{name}' of {dimensions} dimensions and dtype {dtypes:?}");
        match self.get(part) {
            None => Err(Error::expected(format!("quantised layer '{}'", self.stem), "an incomplete one", expected())),
            Some(t) if dtypes.contains(&t.dtype) && t.shape.len() == dimensions => Ok(t),
            Some(t) => {
                Err(Error::expected(format!("tensor '{name}'"), format!("{:?} {:?}", t.dtype, t.shape), expected()))
            }
        }
    }
}

/// Finds a layer's tensors and what they are; none where they are a plain weight.
type Find = fn(&Parts, &Value, &dyn TensorSource) -> Result<Option<Found>>;

/// Types that scales have.
const SCALES: [DType; 3] = [DType::F16, DType::BF16, DType::F32];

impl QuantizedSource {
    /// Finds the quantised layers of a checkpoint; gives it back as it is where its `config.json` names no quantisation.
    ///
    /// # Errors
    /// When the configuration is of a kind that is not read here, or the tensors of a layer are not what it says.
    pub fn of(source: Arc<dyn TensorSource>) -> Result<Arc<dyn TensorSource>> {
        let config = config_beside(source.path())?.unwrap_or_default();
        let text = &config["text_config"]["quantization_config"];
        let quantization = [&config["quantization_config"], &config["compression_config"], text];
        let path = source.path().to_owned();
        if let Some(odd) = quantization.into_iter().find(|found| !found.is_object() && !found.is_null()) {
            let reason = format!("quantization_config of its config.json is {odd}, expected an object of settings");
            return Err(Error::file(path, reason));
        }
        let quantization = quantization.into_iter().find(|found| found.is_object());
        match quantization {
            Some(quantization) => {
                let found = Self::with(source, quantization);
                Ok(Arc::new(found.map_err(|e| Error::file(path, format!("as its config.json has it: {e}")))?))
            }
            None if scaled::is_scaled(source.tensors()) => {
                let found = Self::with(source, &json!({ "quant_method": "fp8" }));
                Ok(Arc::new(found.map_err(|e| Error::file(path, e.to_string()))?))
            }
            None => Ok(source),
        }
    }

    fn with(source: Arc<dyn TensorSource>, config: &Value) -> Result<Self> {
        let loads = |key: &str| config[key].as_bool() == Some(true);
        let method = match config["quant_method"].as_str() {
            Some(method) => method,
            // As bitsandbytes' configurations were before there were others.
            None if loads("load_in_4bit") || loads("load_in_8bit") => "bitsandbytes",
            None => "",
        };
        let (mark, find): (&[&str], Find) = match method {
            "gptq" => (&["qweight"], |parts, config, source| columns::gptq(parts, config, source).map(Some)),
            "awq" => (&["qweight"], |parts, config, _| columns::awq(parts, config).map(Some)),
            "compressed-tensors" => (&["weight_packed", "weight_scale"], compressed::find),
            "bitsandbytes" => (&["weight"], bitsandbytes::find),
            "fp8" | "fbgemm_fp8" => (&["weight"], |parts, _, source| scaled::find(parts, source)),
            other => {
                let expected = "gptq, awq, compressed-tensors, bitsandbytes or fp8";
                return Err(Error::expected("quant_method of the checkpoint", format!("'{other}'"), expected));
            }
        };
        let mut tensors = source.tensors().clone();
        let mut layers = BTreeMap::new();
        for name in source.tensors().keys() {
            let Some(stem) = mark.iter().find_map(|mark| name.strip_suffix(mark)?.strip_suffix('.')) else { continue };
            if layers.contains_key(stem) {
                continue;
            }
            let parts = Parts { stem, tensors: source.tensors() };
            let Some(found) = find(&parts, config, &*source)? else { continue };
            let (rows, columns) = found.shape;
            if rows == 0 || columns == 0 {
                let shape = format!("{rows} × {columns}");
                return Err(Error::expected(format!("shape of layer '{stem}'"), shape, "at least 1 × 1"));
            }
            found.taken.iter().for_each(|taken| _ = tensors.remove(taken));
            let bias = parts.get("bias").filter(|bias| bias.shape == [rows] && SCALES.contains(&bias.dtype)).cloned();
            bias.iter().for_each(|bias| _ = tensors.remove(&bias.name));
            let Found { format, ordered, codes, .. } = found;
            layers.insert(stem.to_owned(), Quantized { rows, columns, format, ordered, bias, codes });
        }
        Ok(QuantizedSource { source, tensors, layers })
    }
}

impl Quantized {
    /// Reads the layer's weight.
    fn matrix(&self, source: &dyn TensorSource) -> Result<PackedMatrix> {
        let shape = (self.rows, self.columns);
        match &self.codes {
            Codes::Columns(codes) => codes.matrix(shape, self.format, source),
            Codes::Compressed(codes) => codes.matrix(shape, self.format, source),
            Codes::BitsAndBytes(codes) => codes.matrix(shape, self.format, source),
            Codes::Scaled(codes) => codes.matrix(shape, self.format, source),
        }
    }
}

impl TensorSource for QuantizedSource {
    fn path(&self) -> &Path {
        self.source.path()
    }

    /// Those that are no part of a quantised layer.
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    fn bytes(&self, tensor: &TensorInfo) -> Result<Cow<'_, [u8]>> {
        self.source.bytes(tensor)
    }

    fn file_name(&self, tensor: &str) -> String {
        self.source.file_name(tensor)
    }

    fn metadata(&self) -> BTreeMap<String, String> {
        self.source.metadata()
    }

    fn notes(&self) -> Vec<String> {
        self.source.notes()
    }

    fn layers(&self) -> Vec<SourceLayer> {
        let mut layers = paired(&self.tensors);
        for (name, quantized) in &self.layers {
            let shape = LayerShape {
                out_features: quantized.rows,
                in_features: quantized.columns,
                has_bias: quantized.bias.is_some(),
            };
            let (source, of, stem) = (self.source.clone(), quantized.clone(), name.clone());
            let load = move || {
                let read = || {
                    let bias = of.bias.as_ref().map(|bias| to_f32(bias.dtype, &source.bytes(bias)?)).transpose()?;
                    Ok((of.matrix(&*source)?, bias.map(Into::into)))
                };
                read().map_err(|e: Error| e.in_layer(&stem))
            };
            let content = packed(shape, quantized.format, quantized.ordered, load);
            layers.push(SourceLayer { name: name.clone(), content });
        }
        layers.sort_by(|a, b| a.name.cmp(&b.name));
        layers
    }
}
