//! A cache of keys and values as tensors, for files.

use bytemuck::{AnyBitPattern, NoUninit, cast_slice, pod_read_unaligned};
use bytes::Bytes;
use ndarray::{Array, Dimension};

use super::decoder::Decoder;
use super::kv_cache::{BlockCache, CacheType, HeadCache, KvCache, Numbers, Rows};
use crate::error::{Error, Result};
use crate::layer::parts::Tensor;

/// Tensors of a block: `block.N.keys` and so on.
const KEYS: &str = "keys";
const VALUES: &str = "values";

fn named(block: usize, part: &str) -> String {
    format!("block.{block}.{part}")
}

impl KvCache {
    /// Returns the cache as tensors: of block N `block.N.keys` and `block.N.values` `[heads of keys, tokens, head_dim]` in F32, F16 or
    /// I8, for I8 with `block.N.keys_scales` and `block.N.values_scales` `[heads of keys, tokens]`; where the block attends by codes,
    /// `counts`, `means`, `recent_codes` and `recent_values` in their place.
    pub fn to_tensors(&self) -> Vec<Tensor> {
        let mut tensors = vec![];
        for (number, block) in self.blocks.iter().enumerate() {
            let mut add = |part: &str, dtype: &str, shape: Vec<usize>, data: Vec<u8>| {
                tensors.push(Tensor {
                    name: named(number, part),
                    dtype: dtype.to_owned(),
                    shape,
                    data: Bytes::from(data),
                });
            };
            match block {
                BlockCache::Exact(heads) => {
                    for (part, rows) in [(KEYS, keys as fn(&HeadCache) -> &Rows), (VALUES, values)] {
                        let all = || heads.iter().map(rows);
                        let width = all().next().map_or(0, |rows| rows.width);
                        let data = all().flat_map(|rows| rows.raw().to_vec()).collect();
                        add(part, self.kind().dtype(), vec![heads.len(), self.len(), width], data);
                        if self.kind() == CacheType::Int8 {
                            let scales = all().flat_map(|rows| cast_slice::<f32, u8>(rows.scales()).to_vec()).collect();
                            add(&format!("{part}_scales"), "F32", vec![heads.len(), self.len()], scales);
                        }
                    }
                }
                BlockCache::Codes(cache) => {
                    add("counts", "F32", cache.counts.shape().to_vec(), raw(&cache.counts));
                    add("means", "F32", cache.means.shape().to_vec(), raw(&cache.means));
                    add("recent_codes", "U32", cache.recent_codes.shape().to_vec(), raw(&cache.recent_codes));
                    add("recent_values", "F32", cache.recent_values.shape().to_vec(), raw(&cache.recent_values));
                }
            }
        }
        tensors
    }
}

fn keys(head: &HeadCache) -> &Rows {
    &head.keys
}

fn values(head: &HeadCache) -> &Rows {
    &head.values
}

/// The bytes of numbers in their order.
fn raw<T: NoUninit, D: Dimension>(array: &Array<T, D>) -> Vec<u8> {
    array.iter().flat_map(|number| bytemuck::bytes_of(number).to_vec()).collect()
}

impl Decoder {
    /// Returns a cache of so many tokens of which [`KvCache::to_tensors`] gave the tensors, those that `get` finds by name.
    ///
    /// # Errors
    /// When one is missing, or of another shape or dtype than a cache of this decoder has; when `get` fails.
    pub fn cache_from_tensors(
        &self,
        kind: CacheType,
        tokens: usize,
        mut get: impl FnMut(&str) -> Result<Option<Tensor>>,
    ) -> Result<KvCache> {
        let mut cache = self.cache(kind);
        let mut tensor = |name: String, dtype: &str, shape: &[Option<usize>]| {
            let wrong = |found: String| {
                let expected = format!("{dtype} {}", sizes(shape));
                Error::expected(format!("tensor '{name}' of a saved cache"), found, expected)
            };
            let found = get(&name)?.ok_or_else(|| wrong("none".into()))?;
            let is_alike = found.shape.len() == shape.len()
                && found.shape.iter().zip(shape).all(|(found, size)| size.is_none_or(|size| size == *found));
            match found.dtype == dtype && is_alike {
                true => Ok(found),
                false => Err(wrong(format!("{} {:?}", found.dtype, found.shape))),
            }
        };
        for (number, block) in cache.blocks.iter_mut().enumerate() {
            match block {
                BlockCache::Exact(heads) => {
                    let (count, width) = (heads.len(), heads.first().map_or(0, |head| head.keys.width));
                    for (place, part) in [KEYS, VALUES].into_iter().enumerate() {
                        let shape = [Some(count), Some(tokens), Some(width)];
                        let numbers = tensor(named(number, part), kind.dtype(), &shape)?;
                        let scales = match kind {
                            CacheType::Int8 => {
                                let name = named(number, &format!("{part}_scales"));
                                Some(tensor(name, "F32", &shape[..2])?)
                            }
                            CacheType::F32 | CacheType::F16 => None,
                        };
                        for (head, own) in heads.iter_mut().enumerate() {
                            let of = |tensor: &Tensor| {
                                let bytes = tensor.data.len() / count.max(1);
                                tensor.data.slice(head * bytes..(head + 1) * bytes)
                            };
                            let scales = scales.as_ref().map(of);
                            own.both_mut()[place].numbers = Numbers::of_raw(kind, &of(&numbers), scales.as_deref());
                        }
                    }
                }
                BlockCache::Codes(cache) => {
                    let (batch, heads, codes, dim) = cache.means.dim();
                    let sizes = [Some(batch), Some(heads), Some(codes), Some(dim)];
                    let recent = [sizes[0], sizes[1], None, sizes[3]];
                    cache.counts = array(tensor(named(number, "counts"), "F32", &sizes[..3])?)?;
                    cache.means = array(tensor(named(number, "means"), "F32", &sizes)?)?;
                    cache.recent_codes = array(tensor(named(number, "recent_codes"), "U32", &recent[..3])?)?;
                    cache.recent_values = array(tensor(named(number, "recent_values"), "F32", &recent)?)?;
                    cache.check((batch, heads, codes, dim))?;
                }
            }
        }
        cache.seen(tokens);
        Ok(cache)
    }
}

fn sizes(shape: &[Option<usize>]) -> String {
    let sizes = shape.iter().map(|size| size.map_or("any".to_owned(), |size| size.to_string()));
    format!("[{}]", sizes.collect::<Vec<_>>().join(", "))
}

/// Returns the numbers that bytes are, wherever they lie.
fn numbers<T: AnyBitPattern>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(size_of::<T>()).map(pod_read_unaligned).collect()
}

fn array<T: AnyBitPattern, D: Dimension>(tensor: Tensor) -> Result<Array<T, D>> {
    let array = ndarray::ArrayD::from_shape_vec(tensor.shape, numbers::<T>(&tensor.data));
    array.and_then(ndarray::ArrayD::into_dimensionality).map_err(|e| Error::Numeric(e.to_string()))
}

impl CacheType {
    /// Returns the name that safetensors has for the numbers.
    fn dtype(self) -> &'static str {
        match self {
            CacheType::F32 => "F32",
            CacheType::F16 => "F16",
            CacheType::Int8 => "I8",
        }
    }
}

impl Rows {
    /// Returns the bytes of the numbers, scales aside.
    fn raw(&self) -> &[u8] {
        match &self.numbers {
            Numbers::F32(all) => cast_slice(all),
            Numbers::F16(all) => cast_slice(all),
            Numbers::Int8(all, _) => cast_slice(all),
        }
    }

    /// Returns a scale for each row; none where numbers are as they are.
    fn scales(&self) -> &[f32] {
        match &self.numbers {
            Numbers::F32(_) | Numbers::F16(_) => &[],
            Numbers::Int8(_, scales) => scales,
        }
    }
}

impl Numbers {
    fn of_raw(kind: CacheType, bytes: &[u8], scales: Option<&[u8]>) -> Self {
        match kind {
            CacheType::F32 => Numbers::F32(numbers(bytes)),
            CacheType::F16 => Numbers::F16(numbers(bytes)),
            CacheType::Int8 => Numbers::Int8(numbers(bytes), numbers(scales.unwrap_or_default())),
        }
    }
}
