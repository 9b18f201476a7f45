//! What an import reads: tensors by name, whatever file they lie in.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::Path;

use layerstore_core::layer::to_f32;
use ndarray::{Array1, Array2};

use crate::error::{Error, Result};
use crate::layer::{DType, SharedLayer};

/// A tensor of a source.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// The name in the source.
    pub name: String,
    /// The element type.
    pub dtype: DType,
    /// `[out_features, in_features]` for a weight matrix.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Bytes of the tensor's elements.
    pub fn byte_len(&self) -> u64 {
        let bits = self.shape.iter().fold(self.dtype.bitsize() as u128, |bits, &n| bits.saturating_mul(n as u128));
        u64::try_from(bits.div_ceil(8)).unwrap_or(u64::MAX)
    }

    /// Returns whether it is a matrix of a float type that can be compressed.
    pub fn is_float_matrix(&self) -> bool {
        self.shape.len() == 2
            && self.shape.iter().all(|&n| n > 0)
            && matches!(self.dtype, DType::F32 | DType::F16 | DType::BF16)
    }
}

/// One layer of a source.
#[derive(Debug, Clone)]
pub struct SourceLayer {
    /// The layer's name in the store: for a tensor, its name less `.weight`.
    pub name: String,
    /// What the source holds of it.
    pub content: SourceContent,
}

/// What a source holds of a layer.
#[derive(Debug, Clone)]
pub enum SourceContent {
    /// A tensor, and its bias where it has one.
    Tensors {
        /// Usually a weight; any other tensor is a layer by itself.
        weight: TensorInfo,
        /// A vector as long as the weight's first dimension.
        bias: Option<TensorInfo>,
    },
    /// A layer that the file holds in a compressed form, or that is no tensor: it is stored as it is.
    Ready {
        /// The layer.
        layer: SharedLayer,
        /// Whether a rule may compress it (again).
        takes_rules: bool,
    },
}

/// A file or folder of tensors that a model is imported from.
///
/// To add a format, see `CONTRIBUTING.md`.
pub trait TensorSource: fmt::Debug + Send + Sync {
    /// Returns the path that the source was opened by.
    fn path(&self) -> &Path;

    /// Returns every tensor, by name.
    fn tensors(&self) -> &BTreeMap<String, TensorInfo>;

    /// Returns the elements of one of [`TensorSource::tensors`], little-endian and row-major.
    ///
    /// # Errors
    /// When the file cannot be read, or there is no such tensor.
    fn bytes(&self, tensor: &TensorInfo) -> Result<Cow<'_, [u8]>>;

    /// Returns the name of the file that a tensor lies in.
    fn file_name(&self, tensor: &str) -> String {
        let _ = tensor;
        self.path().file_name().map_or_else(|| self.path().display().to_string(), |n| n.to_string_lossy().into_owned())
    }

    /// Texts that the file holds beside its tensors.
    fn metadata(&self) -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    /// Returns the layers that all tensors together make up, in order: by default each tensor, a bias with its weight.
    fn layers(&self) -> Vec<SourceLayer> {
        paired(self.tensors())
    }
}

impl dyn TensorSource + '_ {
    /// Returns the tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors().get(name)
    }

    /// Returns a matrix `[rows, columns]` as f32.
    ///
    /// # Errors
    /// When the tensor is no matrix, its dtype cannot be computed with, or a value is not finite.
    pub fn matrix(&self, tensor: &TensorInfo) -> Result<Array2<f32>> {
        let [rows, columns] = tensor.shape[..] else {
            return Err(Error::expected(
                format!("shape of tensor '{}'", tensor.name),
                format!("{:?}", tensor.shape),
                "a matrix",
            ));
        };
        let values = self.finite(tensor)?;
        Array2::from_shape_vec((rows, columns), values).map_err(|e| {
            Error::expected(format!("elements of tensor '{}'", tensor.name), e, format!("{rows} × {columns}"))
        })
    }

    /// Returns a vector as f32.
    ///
    /// # Errors
    /// As [`TensorSource::matrix`](#method.matrix).
    pub fn vector(&self, tensor: &TensorInfo) -> Result<Array1<f32>> {
        Ok(Array1::from(self.finite(tensor)?))
    }

    fn finite(&self, tensor: &TensorInfo) -> Result<Vec<f32>> {
        let values = to_f32(tensor.dtype, &self.bytes(tensor)?)?;
        match values.iter().position(|v| !v.is_finite()) {
            Some(index) => Err(self.not_finite(tensor, f64::from(values[index]), index)),
            None => Ok(values),
        }
    }

    fn not_finite(&self, tensor: &TensorInfo, value: f64, index: usize) -> Error {
        let what = format!("tensor '{}' of {}", tensor.name, self.file_name(&tensor.name));
        Error::NotFinite { what, value, index }
    }

    /// Refuses a tensor that holds NaN, whatever will be done with it.
    ///
    /// # Errors
    /// When one is found: the message names the tensor and the index.
    pub fn refuse_nan(&self, tensor: &TensorInfo) -> Result<()> {
        let bytes = self.bytes(tensor)?;
        let found = match tensor.dtype {
            DType::F32 => bytes.as_chunks().0.iter().position(|b| f32::from_le_bytes(*b).is_nan()),
            DType::F64 => bytes.as_chunks().0.iter().position(|b| f64::from_le_bytes(*b).is_nan()),
            DType::F16 => bytes.as_chunks().0.iter().position(|b| half::f16::from_le_bytes(*b).is_nan()),
            DType::BF16 => bytes.as_chunks().0.iter().position(|b| half::bf16::from_le_bytes(*b).is_nan()),
            _ => None,
        };
        found.map_or(Ok(()), |index| Err(self.not_finite(tensor, f64::NAN, index)))
    }
}

/// Groups tensors into layers, each tensor in exactly one: `NAME.weight` with `NAME.bias`, where that is a vector as long as
/// the weight's first dimension, is layer `NAME`; any other tensor is a layer by itself.
pub fn paired(tensors: &BTreeMap<String, TensorInfo>) -> Vec<SourceLayer> {
    let bias_of = |weight: &TensorInfo| {
        let stem = weight.name.strip_suffix(".weight")?;
        let bias = tensors.get(&format!("{stem}.bias"))?;
        let fits = bias.shape.len() == 1 && weight.shape.first() == bias.shape.first();
        // Narrow floats come back from f32 bit for bit; any other bias stays a tensor of its own.
        let exact = matches!(bias.dtype, DType::F32 | DType::F16 | DType::BF16);
        (fits && exact).then(|| bias.clone())
    };
    let taken: HashSet<String> = tensors.values().filter_map(bias_of).map(|b| b.name).collect();
    tensors
        .values()
        .filter(|t| !taken.contains(&t.name))
        .map(|weight| {
            // A tensor that bears the bare name keeps it.
            let stem = weight
                .name
                .strip_suffix(".weight")
                .filter(|s| !s.is_empty() && (!tensors.contains_key(*s) || taken.contains(*s)));
            let name = stem.unwrap_or(&weight.name).to_owned();
            SourceLayer { name, content: SourceContent::Tensors { bias: bias_of(weight), weight: weight.clone() } }
        })
        .collect()
}
