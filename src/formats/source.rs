//! What an import reads: tensors by name, whatever file they lie in.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use layerstore_core::layer::{dtype_name, to_f32};
use ndarray::{Array1, Array2};

use super::side_files::SideFile;
use crate::error::{Error, Result};
use crate::layer::{DType, LayerShape, MethodName, SharedLayer, StoredAs};

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
        self.shape.len() == 2 && self.shape.iter().all(|&n| n > 0) && self.has_floats()
    }

    /// Returns whether its elements are floats that can be computed with.
    pub fn has_floats(&self) -> bool {
        use DType::{BF16, F8_E4M3, F8_E5M2, F16, F32, F64};
        matches!(self.dtype, F32 | F16 | BF16 | F64 | F8_E4M3 | F8_E5M2)
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
        layer: ReadyLayer,
        /// Whether a rule may compress it (again).
        takes_rules: bool,
    },
}

/// A layer that a source holds as one, read when it is asked for.
#[derive(Clone)]
pub struct ReadyLayer(Ready);

#[derive(Clone)]
enum Ready {
    Here(SharedLayer),
    Lazy { shape: LayerShape, method: MethodName, stored_bytes: u64, load: Load },
}

type Load = Arc<dyn Fn() -> Result<SharedLayer> + Send + Sync>;

impl fmt::Debug for ReadyLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReadyLayer({})", self.method())
    }
}

impl ReadyLayer {
    /// Wraps a layer that is in memory.
    pub fn new(layer: SharedLayer) -> Self {
        ReadyLayer(Ready::Here(layer))
    }

    /// Describes a layer that `load` reads: a linear one of this shape and method, of so many bytes as it is stored.
    pub fn lazy(
        shape: LayerShape,
        method: MethodName,
        stored_bytes: u64,
        load: impl Fn() -> Result<SharedLayer> + Send + Sync + 'static,
    ) -> Self {
        ReadyLayer(Ready::Lazy { shape, method, stored_bytes, load: Arc::new(load) })
    }

    /// Returns the layer's shape.
    ///
    /// # Errors
    /// When its bias cannot be told.
    pub fn shape(&self) -> Result<LayerShape> {
        Ok(match &self.0 {
            Ready::Here(layer) => LayerShape {
                out_features: layer.out_features(),
                in_features: layer.in_features(),
                has_bias: layer.stored_bias()?.is_some(),
            },
            Ready::Lazy { shape, .. } => *shape,
        })
    }

    /// Returns the numbers of rows and columns of its weight.
    pub fn dimensions(&self) -> (usize, usize) {
        match &self.0 {
            Ready::Here(layer) => (layer.out_features(), layer.in_features()),
            Ready::Lazy { shape, .. } => (shape.out_features, shape.in_features),
        }
    }

    /// Returns the layer's method.
    pub fn method(&self) -> MethodName {
        match &self.0 {
            Ready::Here(layer) => layer.method(),
            Ready::Lazy { method, .. } => method.clone(),
        }
    }

    /// Returns the bytes that it takes as it is stored.
    pub fn stored_bytes(&self) -> u64 {
        match &self.0 {
            Ready::Here(layer) => layer.to_parts().stored_bytes(),
            Ready::Lazy { stored_bytes, .. } => *stored_bytes,
        }
    }

    /// Returns the layer where it is in memory.
    pub fn in_memory(&self) -> Option<&SharedLayer> {
        match &self.0 {
            Ready::Here(layer) => Some(layer),
            Ready::Lazy { .. } => None,
        }
    }

    /// Returns the layer, which is read now where it is not in memory.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn load(&self) -> Result<SharedLayer> {
        match &self.0 {
            Ready::Here(layer) => Ok(layer.clone()),
            Ready::Lazy { load, .. } => load(),
        }
    }
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

    /// Returns some of a tensor's bytes.
    ///
    /// # Errors
    /// As [`TensorSource::bytes`], and when the tensor has fewer.
    fn part(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<Vec<u8>> {
        let bytes = self.bytes(tensor)?;
        match bytes.get(range.clone()) {
            Some(part) => Ok(part.to_vec()),
            None => Err(Error::expected(
                format!("bytes of tensor '{}'", tensor.name),
                bytes.len(),
                format!("at least {}", range.end),
            )),
        }
    }

    /// Returns the BLAKE3 hash of a tensor's type, shape and bytes, which are read for it unless it is known.
    ///
    /// # Errors
    /// As [`TensorSource::bytes`].
    fn content_hash(&self, tensor: &TensorInfo) -> Result<[u8; 32]> {
        self.bytes(tensor).map(|bytes| content_hash(tensor, &bytes))
    }

    /// Returns how a tensor lies in the one that the file holds, where that has another name, or is laid out in another way.
    fn stored_as(&self, tensor: &str) -> Option<StoredAs> {
        let _ = tensor;
        None
    }

    /// Returns the files that belong to the model beside its tensors, such as its configuration and its tokenizer.
    fn side_files(&self) -> Vec<SideFile> {
        vec![]
    }

    /// Returns the name of the file that a tensor lies in.
    fn file_name(&self, tensor: &str) -> String {
        let _ = tensor;
        self.path().file_name().map_or_else(|| self.path().display().to_string(), |n| n.to_string_lossy().into_owned())
    }

    /// Texts that the file holds beside its tensors.
    fn metadata(&self) -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    /// Returns what lies beside the model and was left out of it, and what else a user should know of how it was read.
    fn notes(&self) -> Vec<String> {
        vec![]
    }

    /// Returns the layers that all tensors together make up, in order: by default each tensor, a bias with its weight.
    fn layers(&self) -> Vec<SourceLayer> {
        paired(self.tensors())
    }
}

/// Returns the hash that [`TensorSource::content_hash`] is, of a tensor with these bytes.
pub(crate) fn content_hash(tensor: &TensorInfo, bytes: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("{} {:?} ", dtype_name(tensor.dtype), tensor.shape).as_bytes());
    hasher.update_rayon(bytes);
    hasher.finalize().into()
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
        self.bytes_without_nan(tensor).map(drop)
    }

    /// Returns the bytes of a tensor that holds no NaN.
    ///
    /// # Errors
    /// As [`TensorSource::bytes`], and when it holds one: the message names the tensor and the index.
    pub fn bytes_without_nan(&self, tensor: &TensorInfo) -> Result<Cow<'_, [u8]>> {
        let bytes = self.bytes(tensor)?;
        match special(tensor.dtype, &bytes, true) {
            Some((index, value)) => Err(self.not_finite(tensor, value, index)),
            None => Ok(bytes),
        }
    }

    /// Refuses a tensor that holds NaN or an infinite number, without converting it.
    ///
    /// # Errors
    /// When one is found: the message names the tensor and the index.
    pub fn refuse_not_finite(&self, tensor: &TensorInfo) -> Result<()> {
        let found = special(tensor.dtype, &self.bytes(tensor)?, false);
        found.map_or(Ok(()), |(index, value)| Err(self.not_finite(tensor, value, index)))
    }
}

/// The first number that is not finite (or NaN, with `nan_only`), and its place. Integers are all finite.
fn special(dtype: DType, bytes: &[u8], nan_only: bool) -> Option<(usize, f64)> {
    let bad = |v: f64| if nan_only { v.is_nan() } else { !v.is_finite() };
    fn first<const N: usize>(
        bytes: &[u8],
        value: impl Fn([u8; N]) -> f64,
        bad: impl Fn(f64) -> bool,
    ) -> Option<(usize, f64)> {
        bytes.as_chunks().0.iter().enumerate().map(|(i, b)| (i, value(*b))).find(|(_, v)| bad(*v))
    }
    // By the bits, which is faster than conversion.
    let sixteen = |bits: u16, infinite: u16| match (bits & 0x7fff).cmp(&infinite) {
        Ordering::Less => 0.0,
        Ordering::Equal => f64::INFINITY.copysign(if bits > 0x7fff { -1.0 } else { 1.0 }),
        Ordering::Greater => f64::NAN,
    };
    // An 8-bit number by its bits without the sign: which are infinite, and which from some number on are no numbers.
    let eight = |infinite: Option<u8>, nan: std::ops::RangeInclusive<u8>| {
        let value = move |[b]: [u8; 1]| match b & 0x7f {
            v if Some(v) == infinite => f64::INFINITY.copysign(if b > 0x7f { -1.0 } else { 1.0 }),
            v if nan.contains(&v) => f64::NAN,
            _ => 0.0,
        };
        first(bytes, value, bad)
    };
    match dtype {
        DType::F32 => first(bytes, |b| f64::from(f32::from_le_bytes(b)), bad),
        DType::F64 => first(bytes, f64::from_le_bytes, bad),
        DType::F16 => first(bytes, |b| sixteen(u16::from_le_bytes(b), 0x7c00), bad),
        DType::BF16 => first(bytes, |b| sixteen(u16::from_le_bytes(b), 0x7f80), bad),
        // Two numbers for each element.
        DType::C64 => first(bytes, |b| f64::from(f32::from_le_bytes(b)), bad).map(|(i, v)| (i / 2, v)),
        DType::F8_E4M3 => eight(None, 0x7f..=0x7f),
        DType::F8_E5M2 => eight(Some(0x7c), 0x7d..=0x7f),
        DType::F8_E8M0 => first(bytes, |[b]: [u8; 1]| if b == 0xff { f64::NAN } else { 0.0 }, bad),
        DType::F8_E4M3FNUZ | DType::F8_E5M2FNUZ => {
            first(bytes, |[b]: [u8; 1]| if b == 0x80 { f64::NAN } else { 0.0 }, bad)
        }
        _ => None,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_are_not_finite_are_found_in_every_dtype() {
        let inf = f32::INFINITY.to_le_bytes();
        let nan = f32::NAN.to_le_bytes();
        for (dtype, bytes, nan_at, bad_at) in [
            (DType::F32, [inf, nan].concat(), Some(1), Some(0)),
            (DType::C64, [[0; 4], [0; 4], [0; 4], nan].concat(), Some(1), Some(1)),
            (DType::F64, [1.0f64.to_le_bytes(), f64::NAN.to_le_bytes()].concat(), Some(1), Some(1)),
            (DType::F16, vec![0, 0x7c, 1, 0x7c], Some(1), Some(0)),
            (DType::BF16, vec![0x80, 0x7f, 0xc0, 0x7f], Some(1), Some(0)),
            (DType::F8_E4M3, vec![0x38, 0xff, 0x7f], Some(1), Some(1)),
            (DType::F8_E5M2, vec![0x7b, 0xfc, 0x7e], Some(2), Some(1)),
            (DType::F8_E8M0, vec![0x7f, 0x80, 0xff], Some(2), Some(2)),
            (DType::F8_E4M3FNUZ, vec![0x7f, 0xff, 0x80], Some(2), Some(2)),
            (DType::U8, vec![0xff, 0x7f], None, None),
        ] {
            assert_eq!(special(dtype, &bytes, true).map(|(i, _)| i), nan_at, "{dtype:?}");
            assert_eq!(special(dtype, &bytes, false).map(|(i, _)| i), bad_at, "{dtype:?}");
        }
    }
}
