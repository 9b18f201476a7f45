//! An attention layer's parts: codewords in tables of their length, and counts and the cache as tensors (`past_counts`, `past_means`,
//! `past_codes`, `past_values`).

use ndarray::{Array, ArrayD, ArrayView, Axis, Dimension};

use super::{VqAttentionConfig, VqAttentionLayer};
use crate::attention::{AttentionCodebook, CompressedCache};
use crate::error::{Error, Result};
use crate::layer::method::{Method, read_config};
use crate::layer::parts::{self, Parts, Tensor, bytes_f32, f32_bytes};
use crate::layer::traits::Layer;

const QUERIES: &str = "queries";
const KEYS: &str = "keys";

impl VqAttentionLayer {
    pub(super) fn written_parts(&self) -> Parts {
        let mut parts = Parts::new(VqAttentionConfig::NAME, self.config());
        for (role, book) in [(QUERIES, self.queries()), (KEYS, self.keys())] {
            let Some(book) = book else { continue };
            for (head, vectors) in book.codewords().axis_iter(Axis(0)).enumerate() {
                let vectors = vectors.to_owned();
                parts.codebooks.push(parts::Codebook { role: role.into(), subspace: head as u32, vectors });
            }
            parts.tensors.push(floats(&format!("{role}_counts"), book.counts()));
        }
        if let Some(cache) = self.cache() {
            parts.tensors.push(floats("past_counts", cache.counts.view()));
            parts.tensors.push(floats("past_means", cache.means.view()));
            parts.tensors.push(Tensor {
                name: "past_codes".into(),
                dtype: "U32".into(),
                shape: cache.recent_codes.shape().to_vec(),
                data: cache.recent_codes.iter().flat_map(|code| code.to_le_bytes()).collect(),
            });
            parts.tensors.push(floats("past_values", cache.recent_values.view()));
        }
        parts
    }

    pub(super) fn read_parts(parts: Parts) -> Result<Self> {
        let config: VqAttentionConfig = read_config(VqAttentionConfig::NAME, &parts.config)?;
        let book = |role: &str| -> Result<Option<AttentionCodebook>> {
            let mut heads: Vec<&parts::Codebook> = parts.codebooks.iter().filter(|book| book.role == role).collect();
            let Some(tensor) = parts.tensor(&format!("{role}_counts")) else { return Ok(None) };
            heads.sort_by_key(|book| book.subspace);
            let views: Vec<_> = heads.iter().map(|book| book.vectors.view()).collect();
            let words = ndarray::stack(Axis(0), &views).map_err(|e| {
                Error::expected(format!("codewords of {role}"), e, "as many of each head, of one length")
            })?;
            AttentionCodebook::new(words, array(tensor)?).map(Some)
        };
        let cache = match parts.tensor("past_counts") {
            None => None,
            Some(counts) => {
                let named = |name: &str| {
                    parts
                        .tensor(name)
                        .ok_or_else(|| Error::expected("the cache's tensors", "some", format!("'{name}' too")))
                };
                let codes = named("past_codes")?;
                let numbers = codes.data.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
                Some(CompressedCache {
                    counts: array(counts)?,
                    means: array(named("past_means")?)?,
                    recent_codes: shaped(codes, numbers)?,
                    recent_values: array(named("past_values")?)?,
                })
            }
        };
        VqAttentionLayer::new(config, book(QUERIES)?, book(KEYS)?, cache)
    }
}

fn floats<D: Dimension>(name: &str, numbers: ArrayView<f32, D>) -> Tensor {
    let data = f32_bytes(numbers.as_standard_layout().as_slice().expect("standard layout"));
    Tensor { name: name.to_owned(), dtype: "F32".into(), shape: numbers.shape().to_vec(), data }
}

fn array<D: Dimension>(tensor: &Tensor) -> Result<Array<f32, D>> {
    if tensor.dtype != "F32" {
        return Err(Error::expected(format!("dtype of stored tensor '{}'", tensor.name), &tensor.dtype, "F32"));
    }
    shaped(tensor, bytes_f32(&tensor.data))
}

fn shaped<T, D: Dimension>(tensor: &Tensor, numbers: Vec<T>) -> Result<Array<T, D>> {
    let array = ArrayD::from_shape_vec(tensor.shape.clone(), numbers).and_then(|array| array.into_dimensionality());
    array.map_err(|e| {
        Error::expected(format!("shape of stored tensor '{}'", tensor.name), format!("{:?}", tensor.shape), e)
    })
}
