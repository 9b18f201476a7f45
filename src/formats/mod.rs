//! Files that models and arrays come from and go to.
//!
//! [`open`] opens a model as a [`TensorSource`], whatever its format: safetensors (a file, shards, or a folder), GGUF, or an
//! archive that Keras saved.

mod arrays;
mod attention_cache;
mod gguf;
mod keras;
mod merged;
mod opened;
mod packed;
mod pytorch;
mod quantized;
mod regular;
mod safetensors;
mod source;

use std::path::Path;
use std::sync::Arc;

pub(crate) use arrays::check_output;
pub use arrays::{read_any_array, read_array, write_any_array, write_array};
pub(crate) use attention_cache::check_attention_cache_output;
pub use attention_cache::{read_attention_cache, write_attention_cache};
pub use gguf::GgufSource;
pub use keras::{KERAS_ROOT, KerasSource};
pub use pytorch::PytorchSource;
pub(crate) use regular::read_toml;
pub use safetensors::SafetensorsSource;
pub use source::{ReadyLayer, SourceContent, SourceLayer, TensorInfo, TensorSource};

use crate::error::Result;

/// How a model is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OpenOptions {
    /// Whether tensors keep the names and the layout that they have in the file, where it is GGUF; else they get those of Hugging
    /// Face's transformers.
    pub keep_names: bool,
}

/// A format of model files.
struct Format {
    /// Whether the file or folder at a path is of this format, by its name.
    is: fn(&Path) -> bool,
    open: fn(&Path, OpenOptions) -> Result<Arc<dyn TensorSource>>,
}

/// The formats, in the order in which they are asked; the last takes whatever no other does.
const FORMATS: [Format; 4] = [
    Format {
        is: |path| path.extension().is_some_and(|extension| extension == "keras"),
        open: |path, _| Ok(Arc::new(KerasSource::open(path)?)),
    },
    Format {
        is: |path| path.extension().is_some_and(|extension| extension == "gguf"),
        open: |path, options| Ok(Arc::new(GgufSource::open(path, options.keep_names)?)),
    },
    Format { is: PytorchSource::is, open: |path, _| Ok(Arc::new(PytorchSource::open(path)?)) },
    Format { is: |_| true, open: |path, _| quantized::QuantizedSource::of(SafetensorsSource::open(path)?) },
];

/// Opens a model: a `.safetensors` file, an index of shards, a folder that holds either (quantised by GPTQ, AWQ, compressed-tensors or
/// bitsandbytes or not, as its `config.json` says), a `.gguf` file, or a `.keras` archive.
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
    (format.open)(path, options)
}

/// Returns the 64-bit FNV-1a of bytes as 16 digits, as the scripts beside the fixtures compute it.
#[cfg(test)]
fn fnv(bytes: impl Iterator<Item = u8>) -> String {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    format!("{:016x}", bytes.fold(0xcbf2_9ce4_8422_2325, step))
}
