//! Attention as a layer: settings, codebooks, and the compressed cache of a long sequence.

mod config;
mod stored;

use std::sync::Arc;

use ndarray::{ArrayView1, ArrayView2, ArrayView4, Axis, s};
use serde_json::{Map, Value, json};

pub use config::{Mechanism, VqAttentionConfig};

use crate::attention::{
    AttentionCodebook, AttentionMask, AttentionOutput, CodebookUpdate, CompressedCache, VqAttention, exact,
};
use crate::calibration::Calibration;
use crate::error::{Error, Result};
use crate::layer::method::{Method, MethodKind};
use crate::layer::name::MethodName;
use crate::layer::parts::Parts;
use crate::layer::shape::LayerShape;
use crate::layer::traits::{Layer, no_weight};

/// A codeword is dead, and replaced, when its count is below this share of the mean count.
const DEAD_BELOW: f32 = 0.01;

/// An attention layer without its projections: queries, keys and values in, heads of outputs out.
#[derive(Debug, Clone)]
pub struct VqAttentionLayer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// With all lengths given.
    config: VqAttentionConfig,
    queries: Option<AttentionCodebook>,
    keys: Option<AttentionCodebook>,
    cache: Option<CompressedCache>,
}

/// Statistics of one training step of the codebooks of queries and keys.
#[derive(Debug, Clone)]
pub struct CodebookStep {
    /// Of the queries' codebook; `None` where there is none, or no vectors.
    pub queries: Option<CodebookUpdate>,
    /// Of the keys' codebook.
    pub keys: Option<CodebookUpdate>,
    /// Number of dead codewords that were replaced.
    pub revived: usize,
}

impl VqAttentionLayer {
    /// Makes a layer of settings with all lengths given, the codebooks that they call for, and the cache of the tokens before the
    /// next one.
    ///
    /// # Errors
    /// When settings are not valid, or codebooks or the cache do not fit them.
    pub fn new(
        config: VqAttentionConfig,
        queries: Option<AttentionCodebook>,
        keys: Option<AttentionCodebook>,
        cache: Option<CompressedCache>,
    ) -> Result<Self> {
        config.validate()?;
        let (Some(d_k), Some(d_v), Some(_)) = (config.d_k, config.d_v, config.d_model) else {
            return Err(Error::expected("lengths of an attention layer", "some left out", "d_model, d_k and d_v"));
        };
        let wanted = [
            ("queries", &queries, config.query_codes(), config.n_head),
            ("keys", &keys, config.key_codes(), config.kv_heads()),
        ];
        for (what, book, codes, heads) in wanted {
            let found = book.as_ref().map(|book| (book.heads(), book.codes(), book.dim()));
            let expected = codes.map(|codes| (heads, codes, d_k));
            if found != expected {
                return Err(Error::expected(
                    format!("codebook of {what}, [heads, codes, d_k]"),
                    format!("{found:?}"),
                    format!("{expected:?}"),
                ));
            }
        }
        if let Some(cache) = &cache {
            let codes = keys.as_ref().filter(|_| config.causal).map(AttentionCodebook::codes);
            let codes = codes
                .ok_or_else(|| Error::expected("a cache", "one", "none: only causal attention by codes has one"))?;
            cache.check((cache.counts.dim().0, config.kv_heads(), codes, d_v))?;
        }
        Ok(VqAttentionLayer { inner: Arc::new(Inner { config, queries, keys, cache }) })
    }

    /// Makes a layer whose codebooks, where the settings call for them, are found by k-means of queries `[tokens, heads · d_k]` and
    /// keys `[tokens, kv heads · d_k]`.
    ///
    /// # Errors
    /// As [`VqAttentionLayer::new`], and when there are fewer vectors than codes.
    pub fn by_kmeans(config: VqAttentionConfig, queries: ArrayView2<f32>, keys: ArrayView2<f32>) -> Result<Self> {
        config.validate()?;
        let seed = config.seed;
        let learn = |x: ArrayView2<f32>, heads: usize, codes: Option<usize>, what: &str| {
            let by_heads = in_heads(x, heads, what)?;
            let by_heads = by_heads.view().into_dimensionality().map_err(|e| Error::Numeric(e.to_string()))?;
            codes.map(|codes| AttentionCodebook::by_kmeans(by_heads, codes, seed)).transpose()
        };
        let books = (
            learn(queries, config.n_head, config.query_codes(), "queries")?,
            learn(keys, config.kv_heads(), config.key_codes(), "keys")?,
        );
        Self::new(config, books.0, books.1, None)
    }

    /// Returns the settings, with all lengths given.
    pub fn settings(&self) -> &VqAttentionConfig {
        &self.inner.config
    }

    /// Returns the codebook of queries, where they are quantised.
    pub fn queries(&self) -> Option<&AttentionCodebook> {
        self.inner.queries.as_ref()
    }

    /// Returns the codebook of keys, where they are quantised.
    pub fn keys(&self) -> Option<&AttentionCodebook> {
        self.inner.keys.as_ref()
    }

    /// Returns the cache of the tokens before the next one, where it was kept.
    pub fn cache(&self) -> Option<&CompressedCache> {
        self.inner.cache.as_ref()
    }

    /// Returns the same layer with another cache, at another position of a sequence.
    ///
    /// # Errors
    /// When the cache does not fit.
    pub fn with_cache(&self, cache: Option<CompressedCache>) -> Result<Self> {
        let Inner { config, queries, keys, .. } = &*self.inner;
        Self::new(config.clone(), queries.clone(), keys.clone(), cache)
    }

    /// Returns the same layer with exact attention.
    ///
    /// # Errors
    /// As [`VqAttentionLayer::new`].
    pub fn exact(&self) -> Result<Self> {
        let config = VqAttentionConfig {
            mechanism: Mechanism::Exact,
            hyper: None,
            n_code_q: None,
            n_code_k: None,
            ..self.inner.config.clone()
        };
        Self::new(config, None, None, None)
    }

    /// Returns an empty cache for `batch` sequences; `None` where the layer uses none.
    pub fn empty_cache(&self, batch: usize) -> Option<CompressedCache> {
        let config = &self.inner.config;
        let codes = self.inner.keys.as_ref().filter(|_| config.causal)?.codes();
        Some(CompressedCache::new(batch, config.kv_heads(), codes, config.d_v.unwrap_or_default()))
    }

    /// Computes the attention of queries `[batch, heads, tokens, d_k]` to keys and values. `there` `[batch, keys]` is false for
    /// padding. The tokens follow those of `cache` and are added to it; without a cache they are the first.
    ///
    /// # Errors
    /// As the mechanism's own; and when there is a cache that the mechanism does not use, or padding that it does not support.
    pub fn attend(
        &self,
        q: ArrayView4<f32>,
        k: ArrayView4<f32>,
        v: ArrayView4<f32>,
        there: Option<ArrayView2<bool>>,
        cache: Option<&mut CompressedCache>,
    ) -> Result<AttentionOutput> {
        let Inner { config, queries, keys, .. } = &*self.inner;
        let d_k = config.d_k.unwrap_or_default();
        let scale = config.scale.unwrap_or(1.0 / (d_k as f64).sqrt()) as f32;
        let found = (q.dim().1, k.dim().1, q.dim().3, v.dim().3);
        let expected = (config.n_head, config.kv_heads(), d_k, config.d_v.unwrap_or_default());
        if found != expected {
            return Err(Error::expected(
                "heads of queries and of keys, their length, and that of values",
                format!("{found:?}"),
                format!("{expected:?}"),
            ));
        }
        let mask = AttentionMask { causal: config.causal, keys: there, segments: None };
        let no_use = |what: &str, mechanism: &str| Err(Error::expected(what, "one", format!("none: {mechanism}")));
        match (config.mechanism, keys) {
            (Mechanism::VqQk | Mechanism::VqK, Some(keys)) if config.causal => {
                if there.is_some() {
                    return no_use("a mask of keys", "causal attention by codes takes whole sequences");
                }
                let attention = VqAttention {
                    mem_len: config.mem_len,
                    agg_cache: config.agg_cache,
                    ..VqAttention::new(keys, queries.as_ref(), scale, config.block_len)
                };
                match (cache, self.empty_cache(q.dim().0)) {
                    (Some(cache), _) => attention.causal(q, k, v, cache),
                    (None, Some(mut fresh)) => attention.causal(q, k, v, &mut fresh),
                    (None, None) => no_use("a codebook of keys", "the layer has one"),
                }
            }
            _ if cache.is_some() => no_use("a cache", "only causal attention by codes has one"),
            (Mechanism::VqQk | Mechanism::VqK, Some(keys)) => {
                VqAttention::new(keys, queries.as_ref(), scale, config.block_len).bidirectional(q, k, v, &mask)
            }
            (Mechanism::Hyper, _) if there.is_some() => {
                no_use("a mask of keys", "HyperAttention takes whole sequences")
            }
            (Mechanism::Hyper, _) => config.hyper.unwrap_or_default().attend(q, k, v, scale, config.causal),
            _ => exact(q, k, v, scale, &mask),
        }
    }

    /// Runs one training step of the codebooks on queries `[tokens, heads · d_k]` and keys `[tokens, kv heads · d_k]`: exponential
    /// moving averages with `c_gamma`, then dead codewords replaced by vectors of this step. A codeword that no vector is nearest to
    /// stays as it is until then. No rows leave a codebook as it is.
    ///
    /// # Errors
    /// When vectors are of another length, or a number is not finite.
    pub fn learn(&self, queries: ArrayView2<f32>, keys: ArrayView2<f32>, step: u64) -> Result<(Self, CodebookStep)> {
        let config = &self.inner.config;
        let mut revived = 0;
        let mut one = |book: &Option<AttentionCodebook>, x: ArrayView2<f32>, heads: usize, what: &str| {
            let Some(book) = book else { return Ok((None, None)) };
            if x.is_empty() {
                return Ok((Some(book.clone()), None));
            }
            let (mut book, x) = (book.clone(), in_heads(x, heads, what)?);
            let learned = book.learn(x.view(), config.c_gamma as f32)?;
            let even = book.counts().sum() / (book.heads() * book.codes()) as f32;
            revived += book.revive(x.view(), DEAD_BELOW * even, config.seed.wrapping_add(step))?;
            Ok::<_, Error>((Some(book), Some(learned)))
        };
        let (q, of_queries) = one(&self.inner.queries, queries, config.n_head, "queries")?;
        let (k, of_keys) = one(&self.inner.keys, keys, config.kv_heads(), "keys")?;
        let layer = Self::new(config.clone(), q, k, None)?;
        Ok((layer, CodebookStep { queries: of_queries, keys: of_keys, revived }))
    }
}

impl Method for VqAttentionConfig {
    const NAME: &'static str = "vq_attention";
    const KIND: MethodKind = MethodKind::Attention;
    type Layer = VqAttentionLayer;

    fn validate(&self) -> Result<()> {
        self.validate()
    }

    fn check_rule(&self, given: &Map<String, Value>) -> Result<()> {
        if given.contains_key("rotary") {
            let reason =
                "found rotary in a rule, expected none: an import that calibrates by a text sets it".to_owned();
            return Err(Error::Settings { method: Self::NAME.to_owned(), reason });
        }
        if self.query.is_some() && given.contains_key("n_head") {
            return Ok(());
        }
        let reason = "found a rule without one of them, expected n_head, query, key and value".to_owned();
        Err(Error::Settings { method: Self::NAME.to_owned(), reason })
    }

    fn check(&self, _shape: LayerShape, _calibrated: bool) -> Result<()> {
        Err(no_weight("a method for a weight", &MethodName::new(Self::NAME)))
    }

    fn compress(
        &self,
        _weight: ArrayView2<f32>,
        _bias: Option<ArrayView1<f32>>,
        _calibration: Option<&Calibration>,
    ) -> Result<VqAttentionLayer> {
        Err(no_weight("a method for a weight", &MethodName::new(Self::NAME)))
    }

    fn from_parts(parts: Parts) -> Result<VqAttentionLayer> {
        VqAttentionLayer::read_parts(parts)
    }
}

impl Layer for VqAttentionLayer {
    fn method(&self) -> MethodName {
        MethodName::new(VqAttentionConfig::NAME)
    }

    /// Width of the block's inputs.
    fn in_features(&self) -> usize {
        self.inner.config.d_model.unwrap_or_default()
    }

    /// Width of the block's outputs.
    fn out_features(&self) -> usize {
        self.inner.config.d_model.unwrap_or_default()
    }

    fn config(&self) -> Value {
        json!(self.inner.config)
    }

    fn to_parts(&self) -> Parts {
        self.written_parts()
    }

    fn require_linear(&self) -> Result<()> {
        Err(no_weight("a layer to run", &self.method()))
    }

    fn memory_bytes(&self) -> usize {
        let book =
            |book: &Option<AttentionCodebook>| book.as_ref().map_or(0, |b| b.codewords().len() + b.counts().len());
        let cache = self.inner.cache.as_ref();
        let cache = cache.map_or(0, |p| p.counts.len() + p.means.len() + p.recent_codes.len() + p.recent_values.len());
        4 * (book(&self.inner.queries) + book(&self.inner.keys) + cache)
    }
}

/// Splits rows `[tokens, heads · dim]` into heads `[heads, tokens, dim]`.
fn in_heads(x: ArrayView2<f32>, heads: usize, what: &str) -> Result<ndarray::Array3<f32>> {
    let (tokens, width) = x.dim();
    if heads == 0 || !width.is_multiple_of(heads) {
        return Err(Error::expected(format!("width of {what}"), width, format!("a multiple of {heads} heads")));
    }
    let x = x.to_shape((tokens, heads, width / heads)).map_err(|e| Error::Numeric(e.to_string()))?;
    Ok(x.permuted_axes([1, 0, 2]).as_standard_layout().to_owned())
}

/// Returns rows `[batch, tokens, heads · dim]` as `[batch, heads, tokens, dim]`.
///
/// # Errors
/// When the heads do not divide the rows' length.
pub(crate) fn batch_in_heads(x: ndarray::ArrayView3<f32>, heads: usize, what: &str) -> Result<ndarray::Array4<f32>> {
    let (batch, tokens, width) = x.dim();
    let mut all = ndarray::Array4::zeros((batch, heads, tokens, width.checked_div(heads).unwrap_or(0)));
    for b in 0..batch {
        all.slice_mut(s![b, .., .., ..]).assign(&in_heads(x.index_axis(Axis(0), b), heads, what)?);
    }
    Ok(all)
}

#[cfg(test)]
mod tests;
