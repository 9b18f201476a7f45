//! What an export is asked for, and what it says of what it wrote.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::layer::DType;
use crate::work::{Cancel, Progress, Silent};

/// Endings of files that nobody means a folder by.
const OTHER_FILES: [&str; 10] = ["bin", "pt", "pth", "ckpt", "keras", "h5", "onnx", "npy", "npz", "json"];

/// What an export writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExportFormat {
    /// One safetensors file of all tensors as numbers, each in its own dtype.
    #[default]
    Safetensors,
    /// A folder that transformers opens: safetensors in shards of 5 GB, and the files that were stored with the model.
    #[serde(rename = "huggingface")]
    HuggingFace,
    /// A folder like that whose layers of 4- and 8-bit integers in symmetric groups stay packed (`pack-quantized`).
    CompressedTensors,
    /// A GGUF file for llama.cpp. Codes of its types stay as they are.
    Gguf,
    /// The corrections of `low_rank` layers as a LoRA adapter over their quantised weights.
    Peft,
}

impl ExportFormat {
    /// Every format.
    pub const ALL: [ExportFormat; 5] = [
        ExportFormat::Safetensors,
        ExportFormat::HuggingFace,
        ExportFormat::CompressedTensors,
        ExportFormat::Gguf,
        ExportFormat::Peft,
    ];

    /// Returns the format's name.
    pub fn as_str(self) -> &'static str {
        match self {
            ExportFormat::Safetensors => "safetensors",
            ExportFormat::HuggingFace => "huggingface",
            ExportFormat::CompressedTensors => "compressed-tensors",
            ExportFormat::Gguf => "gguf",
            ExportFormat::Peft => "peft",
        }
    }

    /// Returns the format that an output's name stands for: a file by its ending, else a folder for transformers.
    ///
    /// # Errors
    /// When the name is that of a file of another format.
    pub fn of_output(output: &Path) -> Result<Self> {
        match output.extension().and_then(|extension| extension.to_str()) {
            Some("safetensors") => Ok(ExportFormat::Safetensors),
            Some("gguf") => Ok(ExportFormat::Gguf),
            Some(other) if OTHER_FILES.contains(&other) => {
                let expected = "a name ending in .safetensors or .gguf, or a folder";
                Err(Error::expected("output of an export", format!("'{}'", output.display()), expected))
            }
            _ => Ok(ExportFormat::HuggingFace),
        }
    }

    /// Returns what the name of an output has to end with, where it is a file.
    pub(super) fn ending(self) -> Option<&'static str> {
        match self {
            ExportFormat::Safetensors => Some("safetensors"),
            ExportFormat::Gguf => Some("gguf"),
            ExportFormat::HuggingFace | ExportFormat::CompressedTensors | ExportFormat::Peft => None,
        }
    }
}

/// What weights that are written as numbers are written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExportDtype {
    /// 32-bit floats.
    F32,
    /// Half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// 8-bit integers in groups of 32, of [`ExportFormat::Gguf`] alone.
    Q8_0,
}

impl ExportDtype {
    /// The dtype of numbers one by one.
    pub(super) fn plain(self) -> Option<DType> {
        match self {
            ExportDtype::F32 => Some(DType::F32),
            ExportDtype::F16 => Some(DType::F16),
            ExportDtype::Bf16 => Some(DType::BF16),
            ExportDtype::Q8_0 => None,
        }
    }
}

/// How a model is exported.
pub struct ExportOptions {
    /// What is written.
    pub format: ExportFormat,
    /// What weights are written as that are no codes; each in its source's dtype where it is not said.
    pub dtype: Option<ExportDtype>,
    /// Whether layers are written that compute more than a weight and a bias say, such as a norm before the product or an activation
    /// after it: without that, and with a note. If not, they are an error.
    pub allow_approximate: bool,
    /// Whether weights that a format of codes ([`ExportFormat::Gguf`], [`ExportFormat::CompressedTensors`]) cannot hold as they are
    /// stored are written as numbers. If not, they are an error.
    pub allow_dequantize: bool,
    /// Whether the corrections of `low_rank` layers are left out: the base of an adapter ([`ExportFormat::Peft`]).
    pub without_correction: bool,
    /// What is told how far the export is.
    pub progress: Arc<dyn Progress>,
    /// Stops the export when the caller asks: nothing is written then.
    pub cancel: Cancel,
}

impl Default for ExportOptions {
    fn default() -> Self {
        ExportOptions {
            format: ExportFormat::default(),
            dtype: None,
            allow_approximate: false,
            allow_dequantize: false,
            without_correction: false,
            progress: Arc::new(Silent),
            cancel: Cancel::new(),
        }
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExportReport {
    /// What was written.
    pub format: ExportFormat,
    /// The number of layers of the model.
    pub layers: usize,
    /// Size of the file, or of all files, in bytes.
    pub bytes: u64,
    /// Names of the biases that the checkpoint did not have, and the layers' outputs need. What lies beside a checkpoint and says
    /// which layers have a bias (`attention_bias` in a `config.json`) does not know of them.
    pub added_biases: Vec<String>,
    /// What a person should know of layers, by name: what was left out or added, and how their own runs differ from the file.
    pub notes: BTreeMap<String, Vec<String>>,
    /// What a person should know of the whole.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub remarks: Vec<String>,
}
