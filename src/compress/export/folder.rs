//! Folders that transformers opens: tensors in shards with an index, and the files that belong to the model.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::super::misfits::Misfits;
use super::content::{Content, Kept, OutlinedTensor};
use super::model::Model;
use super::options::ExportDtype;
use super::tensor::{LazyTensor, Work};
use crate::error::{Error, Result};
use crate::formats::gguf::FREQUENCIES;
use crate::formats::{METADATA, place_of_side_file};
use crate::staged;

/// The most bytes of a shard that holds more than one tensor, as transformers has it.
const SHARD_BYTES: u64 = 5_000_000_000;

/// What a configuration calls the quantisation of weights that it was written for.
const QUANTIZATION: [&str; 3] = ["quantization_config", "compression_config", "quantization"];

/// Names of layers that are looked up by row, which are no linear layers for transformers.
const EMBEDDINGS: [&str; 9] = [
    "embed_tokens",
    "wte",
    "wpe",
    "word_embeddings",
    "position_embeddings",
    "token_type_embeddings",
    "embeddings",
    "embed_in",
    "shared",
];

/// Returns whether a layer is one that is looked up by row, by its name.
pub(super) fn is_embedding(layer: &str) -> bool {
    EMBEDDINGS.contains(&layer.rsplit('.').next().unwrap_or(layer))
}

impl Model {
    /// Writes the folder of a model whose weights are numbers.
    pub(super) fn hugging_face(&mut self) -> Result<u64> {
        self.write_model_folder(None)
    }

    /// Writes the folder of a model, with what its configuration is to say of quantised weights.
    pub(super) fn write_model_folder(&mut self, quantization: Option<Value>) -> Result<u64> {
        let before = self.outline.tensors.len();
        self.outline.tensors.retain(|tensor| tensor.name != FREQUENCIES);
        if self.outline.tensors.len() < before {
            let remark = format!("'{FREQUENCIES}' is left out: transformers computes it of config.json");
            self.outline.remarks.push(remark);
        }
        let files = self.files_to_write(quantization)?;
        let tensors = std::mem::take(&mut self.outline.tensors);
        let (work, output) = (self.work.clone(), self.output.clone());
        write_folder(&output, "model", tensors, files, &work)
    }

    /// Returns the configuration, and what it says the model is.
    pub(super) fn configuration(&self) -> Result<Option<Map<String, Value>>> {
        let Some(config) = self.files.get("config.json") else { return Ok(None) };
        match serde_json::from_slice(config) {
            Ok(Value::Object(config)) => Ok(Some(config)),
            Ok(other) => Err(Error::expected("config.json of the model", other, "an object")),
            Err(e) => Err(Error::expected("config.json of the model", e, "JSON")),
        }
    }

    /// Returns the files that lie beside the tensors, with a configuration that says what is written.
    fn files_to_write(&mut self, quantization: Option<Value>) -> Result<BTreeMap<String, Bytes>> {
        let mut files = std::mem::take(&mut self.files);
        // What it says is in the files that are made of it.
        files.remove(METADATA);
        self.files = files.clone();
        let Some(mut config) = self.configuration()? else {
            self.outline.remarks.push("the model has no config.json, which transformers needs to open it".into());
            return Ok(files);
        };
        let before = config.clone();
        config.retain(|key, value| value.is_null() || !QUANTIZATION.contains(&key.as_str()));
        if let Some(text) = config.get_mut("text_config").and_then(Value::as_object_mut) {
            text.retain(|key, value| value.is_null() || !QUANTIZATION.contains(&key.as_str()));
        }
        if config != before && quantization.is_none() {
            let remark =
                "config.json is written without the quantisation that the model's source had: weights are numbers";
            self.outline.remarks.push(remark.into());
        }
        if let Some(quantization) = quantization {
            config.insert("quantization_config".into(), quantization);
        }
        self.allow_for_biases(&mut config)?;
        if !self.outline.untied.is_empty() {
            config.insert("tie_word_embeddings".into(), json!(false));
        }
        let dtype = match self.dtype {
            Some(ExportDtype::F32) => Some("float32"),
            Some(ExportDtype::F16) => Some("float16"),
            Some(ExportDtype::Bf16) => Some("bfloat16"),
            Some(ExportDtype::Q8_0) | None => None,
        };
        if let Some(dtype) = dtype {
            let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
            config.insert(key.into(), json!(dtype));
        }
        if config != before {
            let text = serde_json::to_string_pretty(&config).unwrap_or_default() + "\n";
            files.insert("config.json".into(), text.into());
        }
        Ok(files)
    }
}

/// A group of linear layers that a setting gives biases to, all of them or none.
struct Group {
    /// What is in the layers' names.
    part: &'static str,
    /// The setting; `None` where the family's layers of that group have none.
    setting: Option<&'static str>,
}

/// Returns how a family's layers get biases; `None` for families whose layers have some already, or that are not known.
fn bias_groups(family: &str) -> Option<[Group; 2]> {
    let group = |part, setting| Group { part, setting };
    match family {
        "llama" => Some([group(".self_attn.", Some("attention_bias")), group(".mlp.", Some("mlp_bias"))]),
        "qwen3" | "qwen3_moe" => Some([group(".self_attn.", Some("attention_bias")), group(".mlp.", None)]),
        "qwen2" | "qwen2_moe" | "mistral" | "mixtral" | "gemma" | "gemma2" | "gemma3" | "gemma3_text" | "phi3" => {
            Some([group(".self_attn.", None), group(".mlp.", None)])
        }
        _ => None,
    }
}

impl Model {
    /// Has a configuration say which layers have the biases that were added; layers beside them get biases of 0.
    ///
    /// # Errors
    /// When the family's layers have none, unless the model may be approximate.
    fn allow_for_biases(&mut self, config: &mut Map<String, Value>) -> Result<()> {
        let family = config.get("model_type").and_then(Value::as_str).unwrap_or_default().to_owned();
        let Some(groups) = bias_groups(&family).filter(|_| !self.outline.added_biases.is_empty()) else {
            return Ok(());
        };
        let mut misfits = Misfits::default();
        for name in &self.outline.added_biases {
            let has_place = groups.iter().any(|group| name.contains(group.part) && group.setting.is_some());
            if !has_place && !self.rounds_scales {
                let found = format!("'{name}', a constant that the layer's outputs need");
                let expected = format!(
                    "layers that have one in transformers' {family}; --allow-approximate writes it all the same"
                );
                misfits.keep::<()>(name, Err(Error::expected("bias for a Hugging Face folder", found, expected)));
            }
        }
        misfits.result(&self.output)?;
        for Group { part, setting } in groups {
            let Some(setting) = setting.filter(|_| self.outline.added_biases.iter().any(|name| name.contains(part)))
            else {
                continue;
            };
            config.insert(setting.into(), json!(true));
            let names: HashSet<String> = self.outline.tensors.iter().map(|tensor| tensor.name.clone()).collect();
            let without = self.outline.tensors.iter().filter(|t| t.shape.len() == 2 && t.name.contains(part));
            let zeros: Vec<OutlinedTensor> = without
                .filter_map(|tensor| {
                    let name = format!("{}.bias", tensor.name.strip_suffix(".weight")?);
                    let rows = *tensor.shape.first()?;
                    let bytes = vec![0; rows * tensor.dtype.bitsize() / 8];
                    let mut zero = beside(tensor, name, Content::Made(bytes.into()));
                    zero.pieces.truncate(1);
                    zero.pieces.iter_mut().for_each(|piece| (piece.dtype, piece.stored_as) = (tensor.dtype, None));
                    Some(OutlinedTensor { shape: vec![rows], kept: Kept::Numbers, ..zero })
                })
                .filter(|zero| !names.contains(&zero.name))
                .collect();
            self.outline.added_biases.extend(zeros.iter().map(|zero| zero.name.clone()));
            self.outline.tensors.extend(zeros);
        }
        Ok(())
    }
}

/// Writes tensors and files into a new folder, which appears whole or not at all. Returns the bytes of all.
///
/// # Errors
/// When a tensor cannot be read, or something written.
pub(super) fn write_folder(
    output: &Path,
    stem: &str,
    tensors: Vec<OutlinedTensor>,
    files: BTreeMap<String, Bytes>,
    work: &Arc<Work>,
) -> Result<u64> {
    let mut tensors: Vec<LazyTensor> = tensors.into_iter().map(|tensor| work.tensor(tensor)).collect();
    work.start(&tensors);
    tensors.sort_by(|a, b| a.of.name.cmp(&b.of.name));
    let shards = shards(tensors, |tensor| tensor.length as u64, SHARD_BYTES);
    let metadata = || HashMap::from([("format".to_owned(), "pt".to_owned())]);
    staged::write_folder(output, |folder| {
        let mut written = 0;
        let mut put = |name: &str, content: &[u8]| {
            let path = place_of_side_file(folder, name).ok_or_else(|| {
                Error::expected("name of a file of the model", format!("'{name}'"), "one in its folder")
            })?;
            let made =
                path.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(&path, content));
            made.map_err(|e| Error::io(&path, e))?;
            written += content.len() as u64;
            Ok::<_, Error>(())
        };
        for (name, content) in &files {
            put(name, content)?;
        }
        let count = shards.len();
        let name = |number: usize| match count {
            1 => format!("{stem}.safetensors"),
            _ => format!("{stem}-{:05}-of-{count:05}.safetensors", number + 1),
        };
        if count > 1 {
            put(&format!("{stem}.safetensors.index.json"), index(&shards, name).as_bytes())?;
        }
        for (number, shard) in shards.into_iter().enumerate() {
            let path = folder.join(name(number));
            work.write_safetensors(shard, metadata(), &path, &output.join(name(number)))?;
            written += std::fs::metadata(&path).map_err(|e| Error::io(&path, e))?.len();
        }
        Ok(written)
    })
}

/// Divides tensors into shards of so many bytes at most, in their order; one that is larger by itself is a shard.
fn shards<T>(tensors: Vec<T>, length: impl Fn(&T) -> u64, most: u64) -> Vec<Vec<T>> {
    let (mut all, mut bytes) = (vec![vec![]], 0);
    for tensor in tensors {
        let length = length(&tensor);
        if bytes > 0 && bytes + length > most {
            all.push(vec![]);
            bytes = 0;
        }
        bytes += length;
        if let Some(last) = all.last_mut() {
            last.push(tensor);
        }
    }
    all
}

/// The index of shards: which tensor is in which.
fn index(shards: &[Vec<LazyTensor>], name: impl Fn(usize) -> String) -> String {
    let total: usize = shards.iter().flatten().map(|tensor| tensor.length).sum();
    let places = shards.iter().enumerate().flat_map(|(number, shard)| {
        let file = name(number);
        shard.iter().map(move |tensor| (tensor.of.name.clone(), json!(file)))
    });
    let map: Map<String, Value> = places.collect();
    let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
    serde_json::to_string_pretty(&index).unwrap_or_default() + "\n"
}

/// Returns a tensor of a layer beside one that is outlined already.
pub(super) fn beside(tensor: &OutlinedTensor, name: String, content: Content) -> OutlinedTensor {
    let mut pieces = tensor.pieces.clone();
    pieces.iter_mut().for_each(|piece| piece.content = content.clone());
    OutlinedTensor { name, pieces, ..tensor.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_full_in_order() {
        let divided = |lengths: &[u64]| shards(lengths.to_vec(), |length| *length, 10);
        assert_eq!(divided(&[4, 6, 1, 12, 9, 1, 1]), [vec![4, 6], vec![1], vec![12], vec![9, 1], vec![1]]);
        assert_eq!(divided(&[]), [Vec::<u64>::new()]);
        assert_eq!(divided(&[30]), [vec![30]]);
    }
}
