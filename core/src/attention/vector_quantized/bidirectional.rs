//! Attention by codes in which every query sees every key.

use ndarray::{Array1, Array2, ArrayView4, Axis, s};

use super::settings::VqAttention;
use crate::attention::cache::{CompressedCache, add_to_means};
use crate::attention::codebook::AttentionCodebook;
use crate::attention::compressed::CompressedKeys;
use crate::attention::mask::AttentionMask;
use crate::attention::output::{AttentionOutput, QueryTile};
use crate::attention::shape::AttentionShape;
use crate::error::{Error, Result};

impl VqAttention<'_> {
    /// Computes the attention of every query to every key that is there. Where queries are quantised, the output of each query
    /// code is computed once.
    ///
    /// # Errors
    /// As [`exact`](crate::attention::exact()); when codebooks do not fit; and when the mask is causal, which is for
    /// [`VqAttention::causal`], or has segments, or there are scores of positions, which have no meaning here.
    pub fn bidirectional(
        &self,
        q: ArrayView4<f32>,
        k: ArrayView4<f32>,
        v: ArrayView4<f32>,
        mask: &AttentionMask,
    ) -> Result<AttentionOutput> {
        let shape = AttentionShape::of(q, k, v, mask)?;
        self.check(q, k)?;
        if mask.causal || mask.segments.is_some() || self.bias.is_some() {
            let found = match (mask.causal, self.bias) {
                (true, _) => "causal",
                (_, Some(_)) => "scores of positions",
                _ => "segments",
            };
            return Err(Error::expected(
                "visible keys of an attention by codes",
                found,
                "all keys, or those of a mask",
            ));
        }
        let cache = self.compress(k, v, mask, shape.value_dim)?;
        let codewords = self.keys.codewords();
        let whole_head = shape.queries.max(1);
        self.for_each_tile(q, shape.value_dim, whole_head, |(b, h), q, tile| {
            let QueryTile { mut output, mut log_sum_exp, .. } = tile;
            let kv_head = h / shape.group;
            let keys = CompressedKeys {
                codewords: codewords.slice(s![kv_head, .., ..]),
                counts: cache.counts.slice(s![b, kv_head, ..]),
                means: cache.means.slice(s![b, kv_head, .., ..]),
                scale: self.scale,
            };
            let Some(book) = self.queries else { return keys.attend(q, output, log_sum_exp) };
            let (of_codes, lse_of_codes) = attend_codewords(book, h, &keys, shape.value_dim);
            let codes = book.codes_of(h, q);
            for ((mut output, lse), code) in output.rows_mut().into_iter().zip(&mut log_sum_exp).zip(codes) {
                output.assign(&of_codes.row(code as usize));
                *lse = lse_of_codes[code as usize];
            }
        })
    }

    /// Returns the counts and mean values of the keys' codes.
    fn compress(
        &self,
        k: ArrayView4<f32>,
        v: ArrayView4<f32>,
        mask: &AttentionMask,
        value_dim: usize,
    ) -> Result<CompressedCache> {
        let (batch, heads, _, _) = k.dim();
        let mut cache = CompressedCache::new(batch, heads, self.keys.codes(), value_dim);
        for b in 0..batch {
            let codes = self.keys.assign(k.slice(s![b, .., .., ..]))?;
            let there = mask.keys.map(|there| there.index_axis_move(Axis(0), b));
            for h in 0..heads {
                let (counts, means) = (cache.counts.slice_mut(s![b, h, ..]), cache.means.slice_mut(s![b, h, .., ..]));
                add_to_means(counts, means, codes.row(h), v.slice(s![b, h, .., ..]), there);
            }
        }
        Ok(cache)
    }
}

/// Returns the outputs `[codes, value dim]` and ln Σ exp(score) `[codes]` of one head's query codewords.
fn attend_codewords(
    book: &AttentionCodebook,
    head: usize,
    keys: &CompressedKeys,
    value_dim: usize,
) -> (Array2<f32>, Array1<f32>) {
    let mut output = Array2::zeros((book.codes(), value_dim));
    let mut log_sum_exp = Array1::zeros(book.codes());
    keys.attend(book.codewords().slice_move(s![head, .., ..]), output.view_mut(), log_sum_exp.view_mut());
    (output, log_sum_exp)
}
