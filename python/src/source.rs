//! What is imported: a file or folder, or a dictionary of tensors in memory.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use layerstore::formats::{self, SideFile, TensorInfo, TensorSource};
use layerstore::layer::DType;
use layerstore::{Error, Result, Rules};
use numpy::{PyArray1, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::convert::{call, json};
use crate::errors::{OrRaise, invalid};
use crate::runtime::compute;

/// Bytes that Python owns.
struct Held {
    start: *const u8,
    length: usize,
    /// The array, which keeps its memory where it is.
    _array: Py<PyAny>,
}

// SAFETY: the bytes are only read, and the array, which is not touched otherwise, keeps them alive; `Py` may cross threads.
unsafe impl Send for Held {}
// SAFETY: as above.
unsafe impl Sync for Held {}

/// Tensors in memory, and the files that go with them.
pub struct StateDict {
    name: PathBuf,
    tensors: BTreeMap<String, TensorInfo>,
    data: BTreeMap<String, Held>,
    files: Vec<SideFile>,
}

impl std::fmt::Debug for StateDict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StateDict of {} tensors", self.tensors.len())
    }
}

impl TensorSource for StateDict {
    fn path(&self) -> &Path {
        &self.name
    }

    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    fn bytes(&self, tensor: &TensorInfo) -> Result<Cow<'_, [u8]>> {
        let held = self.data.get(&tensor.name);
        let held =
            held.ok_or_else(|| Error::expected("tensor", format!("no '{}'", tensor.name), "one of the dictionary"))?;
        if held.length == 0 {
            return Ok(Cow::Borrowed(&[]));
        }
        // SAFETY: the array is contiguous, so long, and alive as long as `self`.
        Ok(Cow::Borrowed(unsafe { std::slice::from_raw_parts(held.start, held.length) }))
    }

    fn side_files(&self) -> Vec<SideFile> {
        self.files.clone()
    }
}

/// Returns what a caller gives to be imported: a path, or a dictionary of tensors (NumPy, PyTorch or others with DLPack), which are read
/// in place.
///
/// # Errors
/// When it is neither, a file is no model, or a tensor is of a dtype that has no name in safetensors.
pub fn open(model: &Bound<'_, PyAny>, files: Option<&Bound<'_, PyDict>>) -> PyResult<Arc<dyn TensorSource>> {
    let py = model.py();
    let files = files.map(side_files).transpose()?.unwrap_or_default();
    let state: Option<Bound<'_, PyList>> = call(py, "_arrays", "state_dict", (model,))?.extract()?;
    let Some(state) = state else {
        let path: PathBuf = model
            .extract()
            .map_err(|_| invalid(py, "model to import", model.get_type(), "a path, or a dictionary of tensors"))?;
        if !files.is_empty() {
            return Err(invalid(py, "files", "some", "none: the files beside a path are found there"));
        }
        return compute(py, || formats::open(&path));
    };
    let mut source = StateDict { name: "state_dict".into(), tensors: BTreeMap::new(), data: BTreeMap::new(), files };
    for entry in state {
        let (name, dtype, shape, array): (String, String, Vec<usize>, Bound<'_, PyAny>) = entry.extract()?;
        let bytes = array.cast::<PyArray1<u8>>()?;
        let dtype: DType = serde_json::from_value(dtype.clone().into())
            .map_err(|_| invalid(py, &format!("dtype of tensor '{name}'"), dtype, "one that safetensors names"))?;
        let held = Held {
            start: bytes.data().cast_const(),
            length: numpy::PyUntypedArrayMethods::len(bytes),
            _array: array.clone().unbind(),
        };
        let info = TensorInfo { name: name.clone(), dtype, shape };
        if info.byte_len() != held.length as u64 {
            return Err(invalid(py, &format!("bytes of tensor '{name}'"), held.length, info.byte_len()));
        }
        source.tensors.insert(name.clone(), info);
        source.data.insert(name, held);
    }
    Ok(Arc::new(source))
}

/// Reads files by name: their bytes, a text, or a path to read them from.
fn side_files(files: &Bound<'_, PyDict>) -> PyResult<Vec<SideFile>> {
    let read = |(name, content): (Bound<'_, PyAny>, Bound<'_, PyAny>)| {
        let content: Vec<u8> = call(files.py(), "_arrays", "content", (content,))?.extract()?;
        Ok(SideFile::new(&name.extract::<String>()?, content))
    };
    files.iter().map(read).collect()
}

/// Reads rules: a path, a text of TOML, or what a file of rules holds: a dictionary with `rule`, or a list of rules.
///
/// # Errors
/// When they hold a mistake.
pub fn rules(value: Option<&Bound<'_, PyAny>>) -> PyResult<Rules> {
    let Some(value) = value else { return Ok(Rules::default()) };
    let py = value.py();
    if value.is_instance_of::<PyDict>() || value.is_instance_of::<PyList>() {
        let given = json(value)?;
        let all = match &given {
            serde_json::Value::Array(_) => serde_json::json!({ "rule": given }),
            serde_json::Value::Object(one) if one.contains_key("layers") => serde_json::json!({ "rule": [given] }),
            _ => given,
        };
        // TOML has no null: what is None is not said.
        let text = toml::to_string(&without_nulls(all)).map_err(|e| invalid(py, "rules", e, "those of a file"))?;
        return Rules::parse(&text, "rules").or_raise(py);
    }
    if let Ok(text) = value.extract::<String>()
        && (text.contains('\n') || text.trim_start().starts_with("[["))
    {
        return Rules::parse(&text, "rules").or_raise(py);
    }
    let path: PathBuf = value.extract().map_err(|_| {
        invalid(py, "rules", value.get_type(), "a path, a text of TOML, a dictionary or a list of rules")
    })?;
    compute(py, || Rules::open(&path))
}

fn without_nulls(value: serde_json::Value) -> serde_json::Value {
    use serde_json::Value;
    match value {
        Value::Object(all) => {
            Value::Object(all.into_iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k, without_nulls(v))).collect())
        }
        Value::Array(all) => Value::Array(all.into_iter().map(without_nulls).collect()),
        other => other,
    }
}
