//! Files that models and arrays come from and go to.
//!
//! [`open`] opens a model as a [`TensorSource`], whatever its format: safetensors (a file, shards, or a folder), GGUF, or an
//! archive that Keras saved.

mod arranged;
mod arrays;
mod attention_cache;
pub(crate) mod gguf;
mod keras;
mod meaning;
mod merged;
mod opened;
mod packed;
mod pytorch;
mod quantized;
mod regular;
mod safetensors;
mod side_files;
mod source;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

pub(crate) use arranged::{ArrangedSource, Arrangement, Split};
pub(crate) use arrays::check_output;
pub use arrays::{read_any_array, read_array, write_any_array, write_array};
pub(crate) use attention_cache::check_attention_cache_output;
pub use attention_cache::{read_attention_cache, write_attention_cache};
pub use gguf::GgufSource;
pub(crate) use gguf::METADATA;
pub use keras::{KERAS_ROOT, KerasSource};
pub use pytorch::PytorchSource;
pub(crate) use regular::{read_to_string as read_text, read_toml};
pub use safetensors::SafetensorsSource;
pub use side_files::SideFile;
pub(crate) use side_files::place as place_of_side_file;
pub(crate) use source::content_hash;
pub use source::{ReadyLayer, SourceContent, SourceLayer, TensorInfo, TensorSource};

use crate::error::{Error, Result};

/// How a model is opened.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OpenOptions {
    /// Whether tensors keep the names and the layout that they have in the file, where it is GGUF; else they get those of Hugging
    /// Face's transformers.
    pub keep_names: bool,
    /// Files to keep with the model beside the usual ones, such as its license: relative to the model's folder, or absolute.
    pub keep: Vec<PathBuf>,
}

/// A format of model files.
struct Format {
    /// Whether the file or folder at a path is of this format, by its name.
    is: fn(&Path) -> bool,
    /// Whether a `config.json` beside it says how tensors are to be understood.
    configured: bool,
    open: fn(&Path, &OpenOptions) -> Result<Arc<dyn TensorSource>>,
}

/// The formats, in the order in which they are asked; the last takes whatever no other does.
const FORMATS: [Format; 4] = [
    Format {
        is: |path| path.extension().is_some_and(|extension| extension == "keras"),
        configured: false,
        open: |path, _| Ok(Arc::new(KerasSource::open(path)?)),
    },
    Format {
        is: |path| path.extension().is_some_and(|extension| extension == "gguf"),
        configured: false,
        open: |path, options| Ok(Arc::new(GgufSource::open(path, options.keep_names)?)),
    },
    Format {
        is: PytorchSource::is,
        configured: true,
        open: |path, _| quantized::QuantizedSource::of(Arc::new(PytorchSource::open(path)?)),
    },
    Format {
        is: |_| true,
        configured: true,
        open: |path, _| quantized::QuantizedSource::of(Arc::new(SafetensorsSource::open(path)?)),
    },
];

/// Opens a model: a `.safetensors` file, an index of shards, a folder that holds either (quantised by GPTQ, AWQ, compressed-tensors or
/// bitsandbytes or not, as its `config.json` says), a `.gguf` file, or a `.keras` archive.
///
/// What the `config.json` says of tensors is done: weights of GPT-2's Conv1D are transposed, experts that are one tensor are a layer
/// each, and a head that is tied to the embedding is a layer, too.
///
/// The files should not be changed while the source is open. What a file no longer holds whole is an error when it is read.
///
/// # Errors
/// When a file is missing, truncated, or not what its format allows: the message names the file and what was found.
pub fn open(path: impl AsRef<Path>) -> Result<Arc<dyn TensorSource>> {
    open_with(path, OpenOptions::default())
}

/// Opens a model as [`open`] does, with options.
///
/// # Errors
/// As [`open`].
pub fn open_with(path: impl AsRef<Path>, options: OpenOptions) -> Result<Arc<dyn TensorSource>> {
    let path = path.as_ref();
    let format = FORMATS.iter().find(|format| (format.is)(path)).expect("the last format takes every path");
    let mut source = ArrangedSource::new((format.open)(path, &options)?);
    if format.configured {
        meaning::understand(&mut source, config_beside(path)?.as_ref())?;
    }
    let (files, notes) = side_files::beside(path, &options.keep)?;
    Ok(Arc::new(source.with_files(files, notes)))
}

/// Reads the `config.json` in a model's folder, if there is one.
///
/// # Errors
/// When it is no JSON.
fn config_beside(path: &Path) -> Result<Option<Value>> {
    let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) };
    let file = folder.join("config.json");
    if !file.is_file() {
        return Ok(None);
    }
    let text = regular::read_to_string(&file)?;
    match serde_json::from_str(&text) {
        Ok(config @ Value::Object(_)) => Ok(Some(config)),
        Ok(other) => Err(Error::file(&file, format!("it holds {other}, expected an object of settings"))),
        Err(e) => Err(Error::file(&file, format!("not JSON: {e}"))),
    }
}

/// Returns the 64-bit FNV-1a of bytes as 16 digits, as the scripts beside the fixtures compute it.
#[cfg(test)]
fn fnv(bytes: impl Iterator<Item = u8>) -> String {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    format!("{:016x}", bytes.fold(0xcbf2_9ce4_8422_2325, step))
}
