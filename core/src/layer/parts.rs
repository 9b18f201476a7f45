//! The stored form of one compressed layer: plain arrays and a JSON config, in a fixed order, with a name made from
//! their content.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use ndarray::{Array1, Array2};
use serde_json::Value;

use super::name::MethodName;
use crate::error::{Error, Result};
use crate::linalg::require_finite;

/// An artifact's name: the BLAKE3 hash of its canonical content. Written as 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ArtifactId(pub [u8; 32]);

impl fmt::Display for ArtifactId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from(self.0).to_hex())
    }
}

impl fmt::Debug for ArtifactId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ArtifactId({self})")
    }
}

impl FromStr for ArtifactId {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        match blake3::Hash::from_hex(text) {
            Ok(hash) => Ok(ArtifactId(*hash.as_bytes())),
            Err(_) => Err(Error::expected("artifact name", text, "64 hexadecimal digits")),
        }
    }
}

/// Folded keys κ and their scales s, so that `W = Σ s_i · value_i · κ_iᵀ`.
#[derive(Debug, Clone, PartialEq)]
pub struct Keys {
    /// `[keys, in_features]`.
    pub vectors: Array2<f32>,
    /// `[keys]`.
    pub scales: Vec<f32>,
}

/// The codewords of one subspace of a codebook.
#[derive(Debug, Clone, PartialEq)]
pub struct Codebook {
    /// What it encodes: `keys`, `values`, `queries` or `inputs`.
    pub role: String,
    /// Which piece of the vectors it encodes, counted from 0; for attention, which head.
    pub subspace: u32,
    /// `[codewords, width]`.
    pub vectors: Array2<f32>,
}

/// Vectors as bytes: the codes of a product quantiser, or numbers of one or two bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct Codes {
    /// What they encode, as in [`Codebook::role`].
    pub role: String,
    /// `[vectors, bytes]`, a code or a number's little-endian bytes after another.
    pub codes: Array2<u8>,
}

/// Which factor of the correction A·B.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Columns of A, each `[out_features]`.
    A,
    /// Rows of B, each `[in_features]`.
    B,
}

impl Side {
    /// Returns `"a"` or `"b"`.
    pub fn as_str(self) -> &'static str {
        match self {
            Side::A => "a",
            Side::B => "b",
        }
    }
}

/// One factor of a low-rank correction, a component a row.
#[derive(Debug, Clone, PartialEq)]
pub struct Factor {
    /// Which of the two factors it is.
    pub side: Side,
    /// `[rank]`, descending.
    pub singular_values: Vec<f32>,
    /// `[rank, length]`.
    pub vectors: Array2<f32>,
}

/// The rows of a weight matrix, packed or in the checkpoint's own dtype; every row has the same number of bytes.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct WeightRows {
    /// The number of rows: `out_features`.
    pub rows: usize,
    /// Row after row.
    pub packed: Bytes,
    /// Little-endian f32, row after row; empty where the format has none.
    pub scales: Bytes,
    /// One byte a group, row after row; empty where the format has none.
    pub zeros: Bytes,
}

/// Anything small or oddly shaped: a bias, a mean, a gain.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Its name among the tensors of the layer, such as `bias`.
    pub name: String,
    /// A safetensors dtype name, such as `F32`.
    pub dtype: String,
    /// The lengths of its dimensions; empty for a scalar.
    pub shape: Vec<usize>,
    /// Little-endian elements, row-major.
    pub data: Bytes,
}

impl Tensor {
    /// Returns a one-dimensional f32 tensor.
    pub fn vector(name: &str, values: &[f32]) -> Self {
        Tensor { name: name.to_owned(), dtype: "F32".into(), shape: vec![values.len()], data: f32_bytes(values) }
    }

    /// Returns the values of a one-dimensional f32 tensor.
    ///
    /// # Errors
    /// When the dtype, the shape or the number of bytes is another.
    pub fn to_vector(&self) -> Result<Array1<f32>> {
        if self.dtype != "F32" || self.shape.len() != 1 || Some(self.data.len()) != self.shape[0].checked_mul(4) {
            return Err(Error::expected(
                format!("stored tensor '{}'", self.name),
                format!("{} {:?} in {} bytes", self.dtype, self.shape, self.data.len()),
                "a vector of F32",
            ));
        }
        Ok(Array1::from(bytes_f32(&self.data)))
    }
}

/// One compressed layer as the store keeps it.
#[derive(Debug, Clone, PartialEq)]
pub struct Parts {
    /// The method that made it.
    pub method: MethodName,
    /// What is needed to read the arrays; settings that may change without touching them are the catalogue's.
    pub config: Value,
    /// Keys in f32, with their scales.
    pub keys: Option<Keys>,
    /// `[keys, out_features]`.
    pub values: Option<Array2<f32>>,
    /// Codebooks of product quantizers, cells of an inverted file, or codewords of attention.
    pub codebooks: Vec<Codebook>,
    /// Vectors as bytes: product codes, f16 or int8.
    pub codes: Vec<Codes>,
    /// The factors of a low-rank correction.
    pub factors: Vec<Factor>,
    /// The weight, row by row.
    pub weights: Option<WeightRows>,
    /// Everything else: small arrays, and arrays of other shapes.
    pub tensors: Vec<Tensor>,
}

impl Parts {
    /// Parts without any array.
    pub fn new(method: impl Into<MethodName>, config: Value) -> Self {
        Parts {
            method: method.into(),
            config,
            keys: None,
            values: None,
            codebooks: vec![],
            codes: vec![],
            factors: vec![],
            weights: None,
            tensors: vec![],
        }
    }

    /// Returns the tensor of that name, if there is one.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|t| t.name == name)
    }

    /// Checks the numbers of all arrays of f32.
    ///
    /// # Errors
    /// When one is not finite.
    pub fn require_finite(&self) -> Result<()> {
        if let Some(keys) = &self.keys {
            require_finite("stored keys", keys.vectors.iter())?;
            require_finite("stored scales of keys", keys.scales.iter())?;
        }
        if let Some(values) = &self.values {
            require_finite("stored values", values.iter())?;
        }
        for book in &self.codebooks {
            require_finite(&format!("stored codewords of {}", book.role), book.vectors.iter())?;
        }
        for factor in &self.factors {
            require_finite(&format!("stored factor {}", factor.side.as_str()), factor.vectors.iter())?;
            require_finite("stored singular values", factor.singular_values.iter())?;
        }
        for tensor in self.tensors.iter().filter(|tensor| tensor.dtype == "F32") {
            require_finite(&format!("stored tensor '{}'", tensor.name), bytes_f32(&tensor.data).iter())?;
        }
        Ok(())
    }

    /// Returns the artifact's name.
    ///
    /// The hash covers a format tag, the method, the config with sorted keys, then every array in the order of the
    /// fields, each preceded by its tag, its names and its lengths as little-endian u64.
    pub fn id(&self) -> ArtifactId {
        let mut canonical = Canonical::new();
        canonical.text("layerstore artifact 1");
        canonical.text(self.method.as_str());
        canonical.text(&canonical_json(&self.config));
        if let Some(keys) = &self.keys {
            canonical.text("keys");
            canonical.matrix(&keys.vectors);
            canonical.floats(&keys.scales);
        }
        if let Some(values) = &self.values {
            canonical.text("values");
            canonical.matrix(values);
        }
        // By name: they come back from tables in the order of their widths.
        let mut codebooks: Vec<&Codebook> = self.codebooks.iter().collect();
        codebooks.sort_by_key(|b| (&b.role, b.subspace));
        for book in codebooks {
            canonical.text("codebook");
            canonical.text(&book.role);
            canonical.number(book.subspace as usize);
            canonical.matrix(&book.vectors);
        }
        let mut all_codes: Vec<&Codes> = self.codes.iter().collect();
        all_codes.sort_by_key(|c| &c.role);
        for codes in all_codes {
            canonical.text("codes");
            canonical.text(&codes.role);
            canonical.number(codes.codes.nrows());
            canonical.number(codes.codes.ncols());
            canonical.bytes(codes.codes.as_standard_layout().as_slice().expect("standard layout"));
        }
        for factor in &self.factors {
            canonical.text("factor");
            canonical.text(factor.side.as_str());
            canonical.floats(&factor.singular_values);
            canonical.matrix(&factor.vectors);
        }
        if let Some(weights) = &self.weights {
            canonical.text("weights");
            canonical.number(weights.rows);
            canonical.bytes(&weights.packed);
            canonical.bytes(&weights.scales);
            canonical.bytes(&weights.zeros);
        }
        for tensor in &self.tensors {
            canonical.text("tensor");
            canonical.text(&tensor.name);
            canonical.text(&tensor.dtype);
            canonical.number(tensor.shape.len());
            tensor.shape.iter().for_each(|&n| canonical.number(n));
            canonical.bytes(&tensor.data);
        }
        ArtifactId(canonical.0.finalize().into())
    }

    /// Bytes of all arrays: the layer's own size, the store's bookkeeping aside.
    pub fn stored_bytes(&self) -> u64 {
        let keys = self.keys.as_ref().map_or(0, |k| 4 * (k.vectors.len() + k.scales.len()));
        let values = self.values.as_ref().map_or(0, |v| 4 * v.len());
        let codebooks: usize = self.codebooks.iter().map(|b| 4 * b.vectors.len()).sum();
        let codes: usize = self.codes.iter().map(|c| c.codes.len()).sum();
        // A component's singular value is written beside both of its vectors.
        let factors: usize = self.factors.iter().map(|f| 4 * (f.vectors.len() + f.singular_values.len())).sum();
        let weights = self.weights.as_ref().map_or(0, |w| w.packed.len() + w.scales.len() + w.zeros.len());
        let tensors: usize = self.tensors.iter().map(|t| t.data.len()).sum();
        (keys + values + codebooks + codes + factors + weights + tensors) as u64
    }
}

struct Canonical(blake3::Hasher);

impl Canonical {
    fn new() -> Self {
        Canonical(blake3::Hasher::new())
    }
    fn number(&mut self, n: usize) {
        self.0.update(&(n as u64).to_le_bytes());
    }
    fn bytes(&mut self, bytes: &[u8]) {
        const PARALLEL_FROM: usize = 1 << 20;
        self.number(bytes.len());
        if bytes.len() >= PARALLEL_FROM {
            self.0.update_rayon(bytes)
        } else {
            self.0.update(bytes)
        };
    }
    fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }
    fn floats(&mut self, values: &[f32]) {
        self.bytes(bytemuck::cast_slice(values));
    }
    fn matrix(&mut self, matrix: &Array2<f32>) {
        self.number(matrix.nrows());
        self.number(matrix.ncols());
        self.floats(matrix.as_standard_layout().as_slice().expect("standard layout"));
    }
}

/// JSON with object keys sorted, whatever map type serde_json was built with.
pub fn canonical_json(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let mut keys: Vec<&String> = map.keys().collect();
            keys.sort();
            let fields: Vec<String> =
                keys.iter().map(|k| format!("{}:{}", Value::String((*k).clone()), canonical_json(&map[*k]))).collect();
            format!("{{{}}}", fields.join(","))
        }
        Value::Array(items) => format!("[{}]", items.iter().map(canonical_json).collect::<Vec<_>>().join(",")),
        other => other.to_string(),
    }
}

/// Returns the little-endian bytes of `values`.
pub fn f32_bytes(values: &[f32]) -> Bytes {
    Bytes::copy_from_slice(bytemuck::cast_slice(values))
}

/// Returns the f32 values in `bytes`, whatever its alignment; trailing bytes short of a value are ignored.
pub fn bytes_f32(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn names_follow_content() {
        let mut a = Parts::new("dense", json!({"b": 1, "a": [1, {"z": 0, "y": 1}]}));
        let same = Parts::new("dense", json!({"a": [1, {"y": 1, "z": 0}], "b": 1}));
        assert_eq!(a.id(), same.id());
        a.tensors.push(Tensor::vector("bias", &[1.0]));
        assert_ne!(a.id(), same.id());
        let text = a.id().to_string();
        assert_eq!(text.parse::<ArtifactId>().unwrap(), a.id());
        assert!("xyz".parse::<ArtifactId>().is_err());
        assert_eq!(a.stored_bytes(), 4);
    }

    #[test]
    fn what_cannot_be_read_back_is_found() {
        use crate::layer::registry::rebuilt_layer;
        use crate::layer::{KeyValueConfig, Layer, compress};
        let weight = Array2::from_shape_fn((3, 4), |(i, j)| (i * 4 + j) as f32);
        let good = compress(&KeyValueConfig::default(), weight.view(), None, None).unwrap().to_parts();
        assert_eq!(rebuilt_layer(&good).unwrap().to_parts(), good);
        // As a number that is not finite becomes in JSON.
        let mut parts = good.clone();
        parts.config["truncation"] = json!(f64::INFINITY);
        assert!(rebuilt_layer(&parts).unwrap_err().to_string().contains("null"));
        let mut parts = good.clone();
        parts.keys.as_mut().unwrap().scales[1] = f32::INFINITY;
        assert!(rebuilt_layer(&parts).unwrap_err().to_string().contains("scales of keys"));
        let mut parts = good;
        parts.tensors.retain(|tensor| tensor.name != "mean");
        assert!(rebuilt_layer(&parts).unwrap_err().to_string().contains("mean"));
    }

    /// The name of a released artifact must never change.
    #[test]
    fn frozen_name() {
        let mut parts = Parts::new("key_value", json!({"x": 1}));
        parts.keys = Some(Keys { vectors: Array2::from_elem((2, 3), 0.5), scales: vec![1.0, 2.0] });
        parts.values = Some(Array2::from_elem((2, 1), -1.0));
        parts.weights = Some(WeightRows { rows: 1, packed: Bytes::from_static(b"ab"), ..WeightRows::default() });
        parts.tensors.push(Tensor::vector("bias", &[1.0]));
        assert_eq!(parts.id().to_string(), "81d0a0b49d63611aed9de658df2474a4be76f8f3a35999cad134089d2216f092");
    }
}
