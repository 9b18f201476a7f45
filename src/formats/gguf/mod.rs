//! Models in GGUF files, as llama.cpp has them: quantised weights are kept as they are.

mod blocks;
mod header;
mod made;
mod metadata;
mod names;
mod tokenizer;
mod types;
mod writer;

#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use layerstore_core::layer::to_f32;
use layerstore_core::quant::PackedMatrix;
use memmap2::Mmap;
use ndarray::Array1;
use regex::Regex;

pub use self::blocks::to_q8_0;
use self::header::{ListedTensor, Value};
pub use self::made::Made as MadeMetadata;
pub use self::metadata::METADATA;
use self::metadata::Shape;
pub use self::names::Change;
pub use self::names::Names as GgufNames;
use self::names::Names;
pub use self::types::{BlockType, TensorType};
pub use self::writer::{Pairs, TensorToWrite, write as write_gguf};
use super::opened::OpenFile;
use super::packed::packed;
use super::regular;
use super::side_files::SideFile;
use super::source::{SourceLayer, TensorInfo, TensorSource, paired};
use crate::error::{Error, Result};
use crate::layer::{DType, LayerShape, StoredAs};

/// An open GGUF model: one file, or all files that it is split over. Dropping it closes them.
#[derive(Debug)]
pub struct GgufSource {
    path: PathBuf,
    /// Tensors of numbers one by one.
    tensors: BTreeMap<String, TensorInfo>,
    file: Arc<Files>,
    /// The embedding that the head is, too, by transformers' names.
    tied: Option<(String, String)>,
    side_files: Vec<SideFile>,
    notes: Vec<String>,
}

/// What layers are read from when they are asked for.
#[derive(Debug)]
struct Files {
    files: Vec<OpenFile>,
    metadata: BTreeMap<String, Value>,
    entries: BTreeMap<String, Entry>,
}

/// A tensor under the name that it is imported by.
#[derive(Debug, Clone)]
struct Entry {
    file: usize,
    listed: ListedTensor,
    change: Change,
}

impl GgufSource {
    /// Opens a GGUF file, or all files of a model that is split (`NAME-00001-of-00003.gguf`), whichever of them is given.
    ///
    /// Tensors get the names that Hugging Face's transformers has for them, where the architecture is one of llama (Mistral and
    /// SmolLM too), qwen2, qwen3, gemma, phi3 and bert, and are laid out as there: rows of queries and keys of `llama` are put back in
    /// halves, and what was added to norms of `gemma` is taken away. With `keep_names`, all is left as it is in the file.
    ///
    /// # Errors
    /// When a file is missing, cut short, not GGUF of version 2 or 3, or has tensors of a type that is not read here: the message
    /// names the file and what was found. Nothing beyond the headers is read.
    pub fn open(path: impl AsRef<Path>, keep_names: bool) -> Result<Self> {
        let path = path.as_ref();
        let mut all = Files { files: vec![], metadata: BTreeMap::new(), entries: BTreeMap::new() };
        let (mut listed, mut names, mut header_alone) = (vec![], HashSet::new(), None);
        for path in parts(path)? {
            let file = regular::open(&path)?;
            // SAFETY: only the header is read from it, now.
            let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(&path, e))?;
            let header = header::read(&map).map_err(|reason| Error::file(&path, reason))?;
            header_alone.get_or_insert_with(|| metadata::without_tensors(&map, &header));
            for tensor in header.tensors {
                if !names.insert(tensor.name.clone()) {
                    return Err(Error::file(&path, format!("tensor '{}' is there twice", tensor.name)));
                }
                listed.push((all.files.len(), tensor));
            }
            // The first file's metadata are the model's; the others have the numbers of parts alone.
            header.metadata.into_iter().for_each(|(key, value)| _ = all.metadata.entry(key).or_insert(value));
            let name =
                path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
            all.files.push(OpenFile { name, path, file });
        }
        let expected = all.metadata.get("split.tensors.count").and_then(Value::as_usize);
        if let Some(expected) = expected.filter(|expected| *expected != listed.len()) {
            return Err(Error::file(path, format!("the files hold {} tensors, expected {expected}", listed.len())));
        }
        if listed.is_empty() {
            return Err(Error::file(path, "the model holds no tensor"));
        }
        let naming = match keep_names {
            true => None,
            false => Some(Names::of(&all.metadata).map_err(|reason| {
                Error::file(path, format!("{reason}. With --keep-names the tensors are left as the file has them"))
            })?),
        };
        let mut tensors = BTreeMap::new();
        for (file, listed) in listed {
            let (name, change) = match &naming {
                None => (listed.name.clone(), Change::None),
                Some(naming) => naming.of_tensor(&listed.name),
            };
            if let TensorType::Plain(dtype) = listed.tensor_type {
                let info = TensorInfo { name: name.clone(), dtype, shape: listed.shape.clone() };
                tensors.insert(name.clone(), info);
            }
            if let Some(other) = all.entries.insert(name.clone(), Entry { file, listed, change }) {
                let file = &all.files[file].path;
                return Err(Error::file(file, format!("tensor '{}' and another are both '{name}'", other.listed.name)));
            }
        }
        let mut notes = vec![];
        if let Some(naming) = naming.as_ref().filter(|naming| !naming.is_known()) {
            let architecture = naming.architecture();
            notes.push(format!("tensors keep their names: those of architecture '{architecture}' are not known"));
        }
        let tied = naming.as_ref().is_some_and(Names::ties_heads) && all.tie_head(&mut tensors);
        let tied = tied.then(|| (HEAD.to_owned(), EMBEDDING.to_owned()));
        let header_alone = header_alone.unwrap_or_default();
        let mut side_files = vec![];
        if naming.as_ref().is_some_and(Names::is_known) {
            let (made, more) = metadata::for_transformers(&header_alone, &all.shape(tied.is_some()));
            side_files.extend(made);
            notes.extend(more);
        }
        side_files.push(SideFile::new(METADATA, header_alone));
        Ok(GgufSource { path: path.to_owned(), tensors, file: Arc::new(all), tied, side_files, notes })
    }
}

/// Transformers' names of the embedding and the head.
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// What rotary frequencies are divided by.
pub const FREQUENCIES: &str = "rope_freqs.weight";

/// Returns the files of a model: those of all parts, where the name says that it is one of several.
///
/// # Errors
/// When one is not there.
fn parts(path: &Path) -> Result<Vec<PathBuf>> {
    static PART: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$").expect("a regular expression"));
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let Some(found) = PART.captures(&name) else { return Ok(vec![path.to_owned()]) };
    let (number, count) = (found[2].parse().unwrap_or(0usize), found[3].parse().unwrap_or(0usize));
    if number == 0 || number > count {
        return Err(Error::file(path, format!("it calls itself part {number} of {count}")));
    }
    let parts = (1..=count).map(|part| path.with_file_name(format!("{}-{part:05}-of-{}.gguf", &found[1], &found[3])));
    let parts: Vec<PathBuf> = parts.collect();
    if let Some(missing) = parts.iter().find(|part| !part.exists()) {
        let reason = format!("it is missing: '{name}' is one of {count} parts of a model");
        return Err(Error::file(missing, reason));
    }
    Ok(parts)
}

impl Files {
    /// Gives the embedding the head's name, too, where there is no head: llama.cpp takes the one for the other. Returns whether that
    /// is so.
    fn tie_head(&mut self, tensors: &mut BTreeMap<String, TensorInfo>) -> bool {
        let (Some(embedding), false) = (self.entries.get(EMBEDDING), self.entries.contains_key(HEAD)) else {
            return false;
        };
        self.entries.insert(HEAD.to_owned(), embedding.clone());
        if let Some(embedding) = tensors.get(EMBEDDING) {
            tensors.insert(HEAD.to_owned(), TensorInfo { name: HEAD.to_owned(), ..embedding.clone() });
        }
        true
    }

    /// What the tensors say of a configuration.
    fn shape(&self, is_tied: bool) -> Shape {
        let rows = |name: &str| self.entries.get(name).and_then(|entry| entry.listed.shape.first().copied());
        Shape {
            vocabulary: rows(EMBEDDING).or_else(|| rows("embeddings.word_embeddings.weight")),
            token_types: rows("embeddings.token_type_embeddings.weight"),
            is_tied,
            has_attention_bias: self.entries.contains_key("model.layers.0.self_attn.q_proj.bias"),
            frequency_factors: match self.entries.get(FREQUENCIES).map(|entry| entry.listed.tensor_type) {
                Some(TensorType::Plain(dtype)) => self.read(FREQUENCIES).and_then(|bytes| to_f32(dtype, &bytes)).ok(),
                _ => None,
            },
        }
    }

    /// Reads the bytes of a tensor, as transformers would have them.
    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let Some(Entry { file, listed, change }) = self.entries.get(name) else {
            return Err(Error::expected("tensor", format!("'{name}'"), "one of the GGUF file"));
        };
        let file = &self.files[*file];
        let bytes = file.read(&listed.bytes)?;
        let changed = match change {
            Change::None => Ok(bytes),
            Change::Unpermute(heads) => unpermuted(&bytes, &listed.shape, *heads),
            Change::LessOne => less_one(bytes, listed),
        };
        changed.map_err(|reason| Error::file(&file.path, format!("tensor '{}': {reason}", listed.name)))
    }

    /// Reads a layer of packed weights: the whole tensor, or one of the matrices that it is made of.
    fn layer(
        &self,
        name: &str,
        blocks: BlockType,
        part: Option<usize>,
        bias: Option<&TensorInfo>,
    ) -> Result<(PackedMatrix, Option<Array1<f32>>)> {
        let entry = &self.entries[name];
        let shape = match entry.listed.shape[..] {
            [columns] => [1, columns],
            [.., rows, columns] => [rows, columns],
            [] => [0, 0],
        };
        let [rows, columns] = shape;
        if columns == 0 {
            return Err(Error::expected(
                format!("shape of tensor '{name}'"),
                format!("{:?}", entry.listed.shape),
                "a matrix",
            ));
        };
        let bytes = self.read(name)?;
        let bytes = match part {
            None => &bytes[..],
            Some(part) => {
                let length = bytes.len() / entry.listed.shape[0].max(1);
                &bytes[part * length..(part + 1) * length]
            }
        };
        let bad = |e: Error| Error::file(&self.files[entry.file].path, format!("tensor '{}': {e}", entry.listed.name));
        let weight = blocks.packed((rows, columns), bytes).map_err(bad)?;
        let bias = bias.map(|bias| to_f32(bias.dtype, &self.read(&bias.name)?)).transpose()?;
        Ok((weight, bias.map(Into::into)))
    }
}

/// Returns where each row of a weight whose heads' rows are in halves is when they are in pairs, as llama.cpp's converter puts them for
/// its rotary positions.
///
/// # Errors
/// When the rows are not those of so many heads.
fn places_in_pairs(rows: usize, heads: usize) -> std::result::Result<impl Iterator<Item = usize>, String> {
    if heads == 0 || heads > rows || !rows.is_multiple_of(2 * heads) {
        return Err(format!("{rows} rows, expected a multiple of twice the {heads} heads"));
    }
    let width = rows / heads;
    Ok((0..rows).map(move |row| {
        let (head, row) = (row / width, row % width);
        let (half, pair) = (row / (width / 2), row % (width / 2));
        head * width + 2 * pair + half
    }))
}

/// Puts the rows of each head back in halves.
fn unpermuted(bytes: &[u8], shape: &[usize], heads: usize) -> std::result::Result<Vec<u8>, String> {
    let rows = shape.first().copied().unwrap_or_default();
    let places = places_in_pairs(rows, heads)?;
    let length = bytes.len() / rows;
    let mut all = Vec::with_capacity(bytes.len());
    places.for_each(|place| all.extend_from_slice(&bytes[place * length..(place + 1) * length]));
    Ok(all)
}

/// Puts the halves of each head's rows in pairs.
///
/// # Errors
/// When the rows are not those of so many heads.
pub fn permuted(bytes: &[u8], shape: &[usize], heads: usize) -> std::result::Result<Vec<u8>, String> {
    let rows = shape.first().copied().unwrap_or_default();
    let places = places_in_pairs(rows, heads)?;
    let length = bytes.len() / rows;
    let mut all = vec![0; bytes.len()];
    for (row, place) in places.enumerate() {
        all[place * length..(place + 1) * length].copy_from_slice(&bytes[row * length..(row + 1) * length]);
    }
    Ok(all)
}

fn less_one(bytes: Vec<u8>, tensor: &ListedTensor) -> std::result::Result<Vec<u8>, String> {
    match tensor.tensor_type {
        TensorType::Plain(DType::F32) => {
            let weights = bytes.as_chunks::<4>().0.iter();
            Ok(weights.flat_map(|bytes| (f32::from_le_bytes(*bytes) - 1.0).to_le_bytes()).collect())
        }
        other => Err(format!("a norm of type {other:?}, expected F32")),
    }
}

impl TensorSource for GgufSource {
    fn path(&self) -> &Path {
        &self.path
    }

    /// Those of numbers one by one; blocks of codes come as [`SourceContent::Ready`] layers.
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    fn bytes(&self, tensor: &TensorInfo) -> Result<Cow<'_, [u8]>> {
        Ok(self.file.read(&tensor.name)?.into())
    }

    fn file_name(&self, tensor: &str) -> String {
        let entry = self.file.entries.get(tensor).or_else(|| self.file.entries.get(&format!("{tensor}.weight")));
        let file = entry.map_or(0, |entry| entry.file);
        self.file.files[file].name.clone()
    }

    fn stored_as(&self, tensor: &str) -> Option<StoredAs> {
        let (_, embedding) = self.tied.as_ref().filter(|(head, _)| head == tensor)?;
        Some(StoredAs::whole(embedding, &self.file.entries.get(embedding)?.listed.shape))
    }

    /// The header as a file without tensors, and what transformers has in its place.
    fn side_files(&self) -> Vec<SideFile> {
        self.side_files.clone()
    }

    /// The header's values, but for long arrays.
    fn metadata(&self) -> BTreeMap<String, String> {
        let pairs = self.file.metadata.iter();
        pairs.filter_map(|(key, value)| Some((key.clone(), text(value)?))).collect()
    }

    fn notes(&self) -> Vec<String> {
        self.notes.clone()
    }

    /// Each tensor with its bias; quantised ones are packed layers, and those of three dimensions are a layer for each matrix
    /// (`NAME.0` and so on): the experts of a mixture.
    fn layers(&self) -> Vec<SourceLayer> {
        let mut plain = self.tensors.clone();
        let mut layers = vec![];
        for (name, entry) in &self.file.entries {
            let TensorType::Blocks(blocks) = entry.listed.tensor_type else { continue };
            let stem = name.strip_suffix(".weight").unwrap_or(name).to_owned();
            let (rows, columns, parts) = match entry.listed.shape[..] {
                [columns] => (1, columns, None),
                [rows, columns] => (rows, columns, None),
                [parts, rows, columns] => (rows, columns, Some(parts)),
                [a, b, rows, columns] => (rows, columns, Some(a * b)),
                _ => continue,
            };
            let bias = self.tensors.get(&format!("{stem}.bias")).filter(|bias| parts.is_none() && bias.shape == [rows]);
            if let Some(bias) = bias {
                plain.remove(&bias.name);
            }
            let shape = LayerShape { out_features: rows, in_features: columns, has_bias: bias.is_some() };
            let ready = |part: Option<usize>| {
                let (file, name, bias) = (self.file.clone(), name.clone(), bias.cloned());
                packed(shape, blocks.format(), false, move || file.layer(&name, blocks, part, bias.as_ref()))
            };
            match parts {
                None => layers.push(SourceLayer { name: stem, content: ready(None) }),
                Some(count) => {
                    let each = (0..count)
                        .map(|part| SourceLayer { name: format!("{stem}.{part}"), content: ready(Some(part)) });
                    layers.extend(each);
                }
            }
        }
        layers.extend(paired(&plain));
        layers.sort_by(|a, b| a.name.cmp(&b.name));
        layers
    }
}

fn text(value: &Value) -> Option<String> {
    Some(match value {
        Value::Unsigned(value) => value.to_string(),
        Value::Signed(value) => value.to_string(),
        Value::Float(value) => value.to_string(),
        Value::Bool(value) => value.to_string(),
        Value::Text(text) => text.clone(),
        Value::Array(values) => {
            let values: Option<Vec<String>> = values.iter().map(text).collect();
            format!("[{}]", values?.join(", "))
        }
        Value::Long(_) => return None,
    })
}
