//! The stored form of a layer as a text and arrays: what a pickle or a `state_dict` holds.

use bytes::Bytes;
use layerstore::layer::parts::{Codebook, Codes, Factor, Keys, Side, Tensor, WeightRows, bytes_f32, f32_bytes};
use layerstore::layer::{DenseLayer, KeyValueLayer, Layer, LowRankLayer, Parts, TernaryLayer};
use layerstore::{Error, Result};
use ndarray::Array2;
use numpy::{IntoPyArray, PyArray1, PyArrayDyn, PyArrayMethods, PyUntypedArrayMethods, ToPyArray};
use pyo3::prelude::*;
use pyo3::types::PyList;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::errors::{OrRaise, invalid};

/// The version of this form.
const FORM: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Header {
    form: u32,
    method: String,
    /// Of the parts.
    stored: Value,
    /// Of the layer: how it runs as well.
    config: Value,
    arrays: Vec<Entry>,
}

/// What an array is, in the order of the arrays.
#[derive(Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
enum Entry {
    Keys,
    Scales,
    Values,
    Codebook { role: String, subspace: u32 },
    Codes { role: String },
    Factor { side: String },
    SingularValues { side: String },
    Weights { rows: usize },
    WeightScales,
    WeightZeros,
    Tensor { name: String, dtype: String, shape: Vec<usize> },
}

/// Returns a layer's stored form.
///
/// # Errors
/// When memory is short.
pub fn to_python<'py>(py: Python<'py>, layer: &dyn Layer) -> PyResult<(String, Bound<'py, PyList>)> {
    let (parts, list) = (layer.to_parts(), PyList::empty(py));
    let mut arrays = vec![];
    let mut add = |entry: Entry, array: Bound<'py, PyAny>| {
        arrays.push(entry);
        list.append(array)
    };
    if let Some(keys) = &parts.keys {
        add(Entry::Keys, keys.vectors.to_pyarray(py).into_any())?;
        add(Entry::Scales, PyArray1::from_slice(py, &keys.scales).into_any())?;
    }
    if let Some(values) = &parts.values {
        add(Entry::Values, values.to_pyarray(py).into_any())?;
    }
    for Codebook { role, subspace, vectors } in &parts.codebooks {
        let entry = Entry::Codebook { role: role.clone(), subspace: *subspace };
        add(entry, vectors.to_pyarray(py).into_any())?;
    }
    for Codes { role, codes } in &parts.codes {
        add(Entry::Codes { role: role.clone() }, codes.to_pyarray(py).into_any())?;
    }
    for Factor { side, singular_values, vectors } in &parts.factors {
        let side = side.as_str().to_owned();
        add(Entry::SingularValues { side: side.clone() }, PyArray1::from_slice(py, singular_values).into_any())?;
        add(Entry::Factor { side }, vectors.to_pyarray(py).into_any())?;
    }
    if let Some(WeightRows { rows, packed, scales, zeros }) = &parts.weights {
        add(Entry::Weights { rows: *rows }, PyArray1::from_slice(py, packed).into_any())?;
        add(Entry::WeightScales, bytes_f32(scales).into_pyarray(py).into_any())?;
        add(Entry::WeightZeros, PyArray1::from_slice(py, zeros).into_any())?;
    }
    for Tensor { name, dtype, shape, data } in &parts.tensors {
        let entry = Entry::Tensor { name: name.clone(), dtype: dtype.clone(), shape: shape.clone() };
        add(entry, PyArray1::from_slice(py, data).into_any())?;
    }
    let (method, stored, config) = (parts.method.to_string(), parts.config, layer.config());
    let header = serde_json::to_string(&Header { form: FORM, method, stored, config, arrays });
    Ok((header.map_err(|e| invalid(py, "configuration of a layer", e, "JSON"))?, list))
}

fn elements<T: numpy::Element + Copy>(array: &Bound<'_, PyAny>, dtype: &str) -> PyResult<(Vec<usize>, Vec<T>)> {
    let py = array.py();
    let Ok(array) = array.cast::<PyArrayDyn<T>>() else {
        let found = array.getattr("dtype").map_or_else(|_| array.get_type().to_string(), |dtype| dtype.to_string());
        return Err(invalid(py, "array of a layer", found, format!("an array of {dtype}, as to_parts gave")));
    };
    Ok((array.shape().to_vec(), array.try_readonly()?.as_array().iter().copied().collect()))
}

fn floats(array: &Bound<'_, PyAny>) -> PyResult<(Vec<usize>, Vec<f32>)> {
    let (shape, values) = elements::<f32>(array, "float32")?;
    match values.iter().position(|value| !value.is_finite()) {
        Some(place) => {
            Err(invalid(array.py(), "array of a layer", format!("{} at {place}", values[place]), "finite numbers"))
        }
        None => Ok((shape, values)),
    }
}

fn bytes_of(array: &Bound<'_, PyAny>) -> PyResult<(Vec<usize>, Vec<u8>)> {
    elements(array, "uint8")
}

fn matrix<T>((shape, values): (Vec<usize>, Vec<T>)) -> Result<Array2<T>> {
    let wrong = || Error::expected("array of a layer", format!("{shape:?}"), "a matrix");
    let [rows, columns] = shape[..] else { return Err(wrong()) };
    Array2::from_shape_vec((rows, columns), values).map_err(|_| wrong())
}

/// Returns what [`to_python`] gave: the parts, and how the layer runs.
///
/// # Errors
/// When the text is no such one, or an array is not what it says.
pub fn from_python(py: Python<'_>, header: &str, arrays: &[Bound<'_, PyAny>]) -> PyResult<(Parts, Value)> {
    let what = "text of a layer's parts";
    let header: Header = serde_json::from_str(header).map_err(|e| invalid(py, what, e, "one that to_parts gave"))?;
    if header.form != FORM {
        return Err(invalid(py, "form of a layer's parts", header.form, FORM));
    }
    if header.arrays.len() != arrays.len() {
        return Err(invalid(py, "arrays of a layer", arrays.len(), header.arrays.len()));
    }
    let mut parts = Parts::new(header.method, header.stored);
    let (mut scales, mut singular_values) = (vec![], vec![]);
    for (entry, array) in header.arrays.into_iter().zip(arrays) {
        match entry {
            Entry::Keys => {
                parts.keys = Some(Keys { vectors: matrix(floats(array)?).or_raise(py)?, scales: vec![] });
            }
            Entry::Scales => scales = floats(array)?.1,
            Entry::Values => parts.values = Some(matrix(floats(array)?).or_raise(py)?),
            Entry::Codebook { role, subspace } => {
                parts.codebooks.push(Codebook { role, subspace, vectors: matrix(floats(array)?).or_raise(py)? });
            }
            Entry::Codes { role } => parts.codes.push(Codes { role, codes: matrix(bytes_of(array)?).or_raise(py)? }),
            Entry::SingularValues { .. } => singular_values = floats(array)?.1,
            Entry::Factor { side } => {
                let side = if side == Side::A.as_str() { Side::A } else { Side::B };
                let vectors = matrix(floats(array)?).or_raise(py)?;
                parts.factors.push(Factor { side, singular_values: std::mem::take(&mut singular_values), vectors });
            }
            Entry::Weights { rows } => {
                parts.weights = Some(WeightRows { rows, packed: bytes_of(array)?.1.into(), ..WeightRows::default() });
            }
            Entry::WeightScales => {
                let scales = f32_bytes(&floats(array)?.1);
                parts.weights.get_or_insert_default().scales = scales;
            }
            Entry::WeightZeros => parts.weights.get_or_insert_default().zeros = bytes_of(array)?.1.into(),
            Entry::Tensor { name, dtype, shape } => {
                parts.tensors.push(Tensor { name, dtype, shape, data: Bytes::from(bytes_of(array)?.1) });
            }
        }
    }
    if let Some(keys) = &mut parts.keys {
        keys.scales = scales;
    }
    Ok((parts, header.config))
}

/// Returns the numbers of a dense tensor, and its shape.
///
/// # Errors
/// For other layers, and dtypes that cannot be computed with.
pub fn dense_values(layer: &dyn Layer) -> Result<(Vec<f32>, Vec<usize>)> {
    match layer.downcast_ref::<DenseLayer>() {
        Some(dense) => Ok((dense.floats()?.iter().copied().collect(), dense.shape().to_vec())),
        None => {
            let weight = layer.weight()?;
            let shape = weight.shape().to_vec();
            Ok((weight.into_iter().collect(), shape))
        }
    }
}

/// Returns the singular values of a correction, or the scales of keys, largest first.
pub fn spectrum(layer: &dyn Layer) -> Vec<f32> {
    let mut found = if let Some(layer) = layer.downcast_ref::<LowRankLayer>() {
        layer.singular_values().to_vec()
    } else if let Some(layer) = layer.downcast_ref::<TernaryLayer>() {
        layer.low_rank().singular_values().to_vec()
    } else if let Some(layer) = layer.downcast_ref::<KeyValueLayer>() {
        layer.scales().to_vec()
    } else {
        vec![]
    };
    found.sort_by(|a, b| b.total_cmp(a));
    found
}
