//! The layer of a module that is made of other layers: its kind, settings and small tensors. The layers that it is made of are
//! stored by themselves, behind the module's name.

use std::collections::BTreeMap;
use std::sync::Arc;

use ndarray::{ArrayD, IxDyn};
use serde_json::{Map, Value};

use super::name::MethodName;
use super::parts::{Parts, Tensor, bytes_f32, f32_bytes};
use super::traits::{Layer, no_weight};
use crate::error::{Error, Result};

/// A module less the layers that it is made of. Cloning shares the arrays.
#[derive(Debug, Clone, PartialEq)]
pub struct ModuleLayer {
    inner: Arc<Inner>,
}

#[derive(Debug, PartialEq)]
struct Inner {
    kind: String,
    settings: Map<String, Value>,
    tensors: BTreeMap<String, ArrayD<f32>>,
}

impl ModuleLayer {
    /// The method's name in tables and JSON.
    pub const METHOD: &'static str = "module";

    /// Returns a module of this kind.
    pub fn new(kind: &str, settings: Map<String, Value>, tensors: BTreeMap<String, ArrayD<f32>>) -> Self {
        let whole = |array: ArrayD<f32>| array.as_standard_layout().into_owned();
        let tensors = tensors.into_iter().map(|(name, array)| (name, whole(array))).collect();
        ModuleLayer { inner: Arc::new(Inner { kind: kind.to_owned(), settings, tensors }) }
    }

    /// Returns the kind of module, such as `gru`.
    pub fn kind(&self) -> &str {
        &self.inner.kind
    }

    /// Returns the settings.
    pub fn settings(&self) -> &Map<String, Value> {
        &self.inner.settings
    }

    /// Returns the tensor of that name, where there is one.
    pub fn tensor(&self, name: &str) -> Option<&ArrayD<f32>> {
        self.inner.tensors.get(name)
    }

    /// Returns all tensors, by name.
    pub fn tensors(&self) -> &BTreeMap<String, ArrayD<f32>> {
        &self.inner.tensors
    }

    fn length(&self, name: &str) -> usize {
        self.inner.settings.get(name).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok()).unwrap_or(0)
    }

    pub(super) fn from_parts(parts: Parts) -> Result<Self> {
        let Value::Object(mut settings) = parts.config else {
            return Err(Error::expected("config of a module", parts.config, "an object"));
        };
        let Some(Value::String(kind)) = settings.remove("kind") else {
            return Err(Error::expected("config of a module", "no kind", "its kind"));
        };
        let mut tensors = BTreeMap::new();
        for tensor in parts.tensors {
            let array = tensor.to_array()?;
            tensors.insert(tensor.name, array);
        }
        Ok(ModuleLayer::new(&kind, settings, tensors))
    }
}

impl Layer for ModuleLayer {
    fn method(&self) -> MethodName {
        MethodName::new(Self::METHOD)
    }

    /// Width of the inputs; 0 where they may have any.
    fn in_features(&self) -> usize {
        self.length("in_features")
    }

    /// Width of the outputs; 0 where it follows from the inputs.
    fn out_features(&self) -> usize {
        self.length("out_features")
    }

    fn require_linear(&self) -> Result<()> {
        Err(no_weight("a layer to run", &self.method()))
    }

    fn own_tensors(&self) -> Vec<(String, ArrayD<f32>)> {
        self.inner.tensors.iter().map(|(name, array)| (name.clone(), array.clone())).collect()
    }

    fn config(&self) -> Value {
        let mut config = self.inner.settings.clone();
        config.insert("kind".into(), self.inner.kind.clone().into());
        Value::Object(config)
    }

    fn to_parts(&self) -> Parts {
        let mut parts = Parts::new(Self::METHOD, self.config());
        for (name, array) in &self.inner.tensors {
            let data = f32_bytes(array.as_slice().unwrap_or_default());
            let (name, shape) = (name.clone(), array.shape().to_vec());
            parts.tensors.push(Tensor { name, dtype: "F32".into(), shape, data });
        }
        parts
    }

    fn memory_bytes(&self) -> usize {
        self.inner.tensors.values().map(|array| 4 * array.len()).sum()
    }
}

impl Tensor {
    /// Returns the values of an f32 tensor of any shape.
    ///
    /// # Errors
    /// When the dtype or the number of bytes is another.
    pub fn to_array(&self) -> Result<ArrayD<f32>> {
        let wrong = || {
            let found = format!("{} {:?} in {} bytes", self.dtype, self.shape, self.data.len());
            Error::expected(format!("stored tensor '{}'", self.name), found, "F32, four bytes a number")
        };
        let count = self.shape.iter().try_fold(4usize, |bytes, &n| bytes.checked_mul(n)).ok_or_else(wrong)?;
        if self.dtype != "F32" || count != self.data.len() {
            return Err(wrong());
        }
        ArrayD::from_shape_vec(IxDyn(&self.shape), bytes_f32(&self.data)).map_err(|_| wrong())
    }
}
