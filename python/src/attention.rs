//! Attention over arrays of four dimensions.

use std::sync::{Mutex, PoisonError};

use layerstore::Error;
use layerstore::attention::{AttentionMask, CompressedCache, VqAttention, exact_gradients};
use layerstore::layer::{Mechanism, SharedLayer, VqAttentionLayer};
use ndarray::{Array3, Array4, ArrayView4, Ix4};
use numpy::{IntoPyArray, PyArray3, PyArray4, PyArrayDyn};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::convert::Given;
use crate::errors::invalid;
use crate::runtime::compute;

fn heads<'a>(py: Python<'_>, given: &'a Given<'_>, what: &str) -> PyResult<ArrayView4<'a, f32>> {
    let view = given.view();
    let found = view.ndim();
    let expected = "4: [batch, heads, tokens, dim]";
    view.into_dimensionality::<Ix4>().map_err(|_| invalid(py, &format!("dimensions of {what}"), found, expected))
}

fn attention_of(py: Python<'_>, layer: &SharedLayer) -> PyResult<VqAttentionLayer> {
    let found = layer.downcast_ref::<VqAttentionLayer>().cloned();
    found.ok_or_else(|| {
        invalid(py, "layer to attend with", format!("a {} layer", layer.method()), "a vq_attention layer")
    })
}

/// What causal attention by codes keeps of the tokens that it has seen: its size does not grow with their number.
#[pyclass(frozen, module = "layerstore")]
pub struct AttentionCache {
    inner: Mutex<CompressedCache>,
}

#[pymethods]
impl AttentionCache {
    /// Returns a cache of the same content.
    fn copy(&self, py: Python<'_>) -> AttentionCache {
        let inner = py.detach(|| self.inner.lock().unwrap_or_else(PoisonError::into_inner).clone());
        AttentionCache { inner: Mutex::new(inner) }
    }

    /// Returns the number of keys of each code, `[batch, heads, codes]`.
    fn counts<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray3<f32>> {
        let counts = py.detach(|| self.inner.lock().unwrap_or_else(PoisonError::into_inner).counts.clone());
        counts.into_pyarray(py)
    }

    /// Returns the mean value of each code, `[batch, heads, codes, d_v]`.
    fn means<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray4<f32>> {
        let means = py.detach(|| self.inner.lock().unwrap_or_else(PoisonError::into_inner).means.clone());
        means.into_pyarray(py)
    }
}

/// Returns an empty cache for a number of sequences.
///
/// # Errors
/// For layers that have none.
pub fn empty_cache(py: Python<'_>, layer: &SharedLayer, batch: usize) -> PyResult<AttentionCache> {
    let made = attention_of(py, layer)?.empty_cache(batch);
    let inner = made.ok_or_else(|| invalid(py, "layer with a cache", "none", "causal attention by codes"))?;
    Ok(AttentionCache { inner: Mutex::new(inner) })
}

/// Attends with a layer; the tokens are added to the cache, where there is one.
///
/// # Errors
/// For other layers than attention, and shapes that do not fit.
pub fn attend<'py>(
    py: Python<'py>,
    layer: &SharedLayer,
    [q, k, v]: [&Bound<'py, PyAny>; 3],
    cache: Option<&AttentionCache>,
) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
    let layer = attention_of(py, layer)?;
    let (q, k, v) = (Given::new(q)?, Given::new(k)?, Given::new(v)?);
    let (q, k, v) = (heads(py, &q, "queries")?, heads(py, &k, "keys")?, heads(py, &v, "values")?);
    let output = compute(py, || {
        let mut cache = cache.map(|cache| cache.inner.lock().unwrap_or_else(PoisonError::into_inner));
        layer.attend(q, k, v, None, cache.as_deref_mut())
    })?;
    Ok(output.output.into_dyn().into_pyarray(py))
}

/// Gradients of queries, keys and values for one of the outputs, straight through codewords, with `commitment` times the gradient of
/// the commitment loss.
///
/// # Errors
/// As [`attend`], and for HyperAttention, which has none.
pub fn attend_backward<'py>(
    py: Python<'py>,
    layer: &SharedLayer,
    [q, k, v, grad]: [&Bound<'py, PyAny>; 4],
    commitment: f32,
) -> PyResult<[Bound<'py, PyArray4<f32>>; 3]> {
    let layer = attention_of(py, layer)?;
    let (q, k, v, grad) = (Given::new(q)?, Given::new(k)?, Given::new(v)?, Given::new(grad)?);
    let (q, k, v) = (heads(py, &q, "queries")?, heads(py, &k, "keys")?, heads(py, &v, "values")?);
    let grad = heads(py, &grad, "the output gradient")?;
    let found = compute(py, || {
        let config = layer.settings();
        let scale = config.scale.unwrap_or(1.0 / (q.dim().3.max(1) as f64).sqrt()) as f32;
        let mask = AttentionMask { causal: config.causal, keys: None, segments: None };
        match (config.mechanism, layer.keys()) {
            (Mechanism::VqQk | Mechanism::VqK, Some(keys)) => {
                let attention = VqAttention {
                    agg_cache: config.agg_cache,
                    ..VqAttention::new(keys, layer.queries(), scale, config.block_len)
                };
                attention.gradients(q, k, v, &mask, grad, commitment)
            }
            (Mechanism::Hyper, _) => Err(Error::expected(
                "attention to go back through",
                "HyperAttention",
                "exact attention, or one by codes",
            )),
            _ => exact_gradients(q, k, v, scale, &mask, grad),
        }
    })?;
    Ok([found.q.into_pyarray(py), found.k.into_pyarray(py), found.v.into_pyarray(py)])
}

/// The codebooks of a layer by what they encode, `queries` and `keys`, each `[heads, codes, d_k]`.
///
/// # Errors
/// For other layers than attention.
pub fn codebooks<'py>(py: Python<'py>, layer: &SharedLayer) -> PyResult<Bound<'py, PyDict>> {
    let (layer, dict) = (attention_of(py, layer)?, PyDict::new(py));
    for (name, book) in [("queries", layer.queries()), ("keys", layer.keys())] {
        if let Some(book) = book {
            dict.set_item(name, book.codewords().to_owned().into_pyarray(py))?;
        }
    }
    Ok(dict)
}

/// The code of each vector `[batch, heads, tokens, d_k]`, by the codebook of that name: `[batch, heads, tokens]`.
///
/// # Errors
/// For layers without such a codebook, and shapes that do not fit.
pub fn codes<'py>(
    py: Python<'py>,
    layer: &SharedLayer,
    x: &Bound<'py, PyAny>,
    of: &str,
) -> PyResult<Bound<'py, PyArray3<u32>>> {
    let layer = attention_of(py, layer)?;
    let book = match of {
        "queries" => layer.queries(),
        "keys" => layer.keys(),
        other => return Err(invalid(py, "codebook", format!("'{other}'"), "'queries' or 'keys'")),
    };
    let book = book.ok_or_else(|| invalid(py, "codebook", format!("no codebook of {of}"), "one"))?;
    let given = Given::new(x)?;
    let x = heads(py, &given, "vectors")?;
    let found = compute(py, || {
        let mut all = Array3::zeros((x.dim().0, x.dim().1, x.dim().2));
        for (x, mut codes) in x.outer_iter().zip(all.outer_iter_mut()) {
            codes.assign(&book.assign(x)?);
        }
        Ok(all)
    })?;
    Ok(found.into_pyarray(py))
}

/// Computes exact attention of queries `[batch, heads, tokens, d_k]` to keys and values; `scale` is 1/√d_k where it is not said.
#[pyfunction]
#[pyo3(signature = (q, k, v, *, scale = None, causal = false))]
pub fn exact_attention<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    scale: Option<f32>,
    causal: bool,
) -> PyResult<Bound<'py, PyArray4<f32>>> {
    let (q, k, v) = (Given::new(q)?, Given::new(k)?, Given::new(v)?);
    let (q, k, v) = (heads(py, &q, "queries")?, heads(py, &k, "keys")?, heads(py, &v, "values")?);
    let scale = scale.unwrap_or(1.0 / (q.dim().3.max(1) as f32).sqrt());
    let mask = AttentionMask { causal, keys: None, segments: None };
    let output: Array4<f32> = compute(py, || layerstore::attention::exact(q, k, v, scale, &mask))?.output;
    Ok(output.into_pyarray(py))
}
