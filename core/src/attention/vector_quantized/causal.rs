//! Causal attention by codes: a window of keys met one by one, and the keys before it by their codes.
//!
//! A head's queries are divided into shares, which threads take independently; for each share the counts and mean values of the keys
//! before it are computed first. A share goes through its queries in blocks of `block_len`.

use ndarray::{Array2, Array3, ArrayView2, ArrayView4, Axis, concatenate, s};

use super::settings::VqAttention;
use crate::attention::cache::{CompressedCache, add_to_means};
use crate::attention::compressed::{CompressedKeys, ScoreTable};
use crate::attention::gather::gather_rows;
use crate::attention::mask::AttentionMask;
use crate::attention::output::{AttentionOutput, QueryTile};
use crate::attention::shape::{AttentionShape, aligned};
use crate::attention::softmax::{OnlineSoftmax, finish};
use crate::attention::window::WindowKeys;
use crate::error::{Error, Result};
use crate::linalg::{matmul, product_into};

/// Keys as codes, and values, of the tokens that the cache has uncompressed and of those of the call, in this order.
struct Tokens<'a> {
    /// `[batch, kv heads, tokens]`
    codes: Array3<u32>,
    /// `[batch, kv heads, tokens, value dim]`
    values: ArrayView4<'a, f32>,
    /// Number of the tokens that come from the cache.
    cached: usize,
    /// Consecutive query heads that share one head of keys.
    group: usize,
}

impl VqAttention<'_> {
    /// Computes the attention of each query to the keys up to its own and to the tokens in `cache`, which came before; then adds the
    /// call's tokens to the cache. A long sequence can be given in pieces, or token by token, with the same result. Where there are
    /// fewer queries than keys, they are those of the last keys.
    ///
    /// # Errors
    /// As [`VqAttention::bidirectional`]; and when there are more queries than keys, or the cache is of other sizes.
    pub fn causal(
        &self,
        q: ArrayView4<f32>,
        k: ArrayView4<f32>,
        v: ArrayView4<f32>,
        cache: &mut CompressedCache,
    ) -> Result<AttentionOutput> {
        let shape = AttentionShape::of(q, k, v, &AttentionMask { causal: true, ..AttentionMask::default() })?;
        self.check(q, k)?;
        if self.block_len == 0 {
            return Err(Error::expected("block_len of a causal attention", 0, "at least 1"));
        }
        if let Some(all) = aligned(q, shape.keys) {
            return Ok(self.causal(all.view(), k, v, cache)?.of_last(shape.queries));
        }
        cache.check((shape.batch, k.dim().1, self.keys.codes(), shape.value_dim))?;
        let cached = cache.recent_codes.dim().2;
        let all_values = (cached > 0).then(|| concatenate![Axis(2), cache.recent_values, v]);
        let tokens = Tokens {
            codes: self.codes_after(cache, k)?,
            values: all_values.as_ref().map_or(v, |all| all.view()),
            cached,
            group: shape.group,
        };
        let share = self.share_len(shape.keys);
        let (before_shares, mut added) = self.caches_before_shares(cache, &tokens, shape.keys, share);
        let found = self.for_each_tile(q, shape.value_dim, share, |place, q, tile| {
            self.attend_share(place, q, tile, &tokens, &before_shares[..], share);
        });
        let all = cached + shape.keys;
        let recent = all.saturating_sub(self.mem_len).max(added);
        cache.add(tokens.codes.view(), tokens.values, added..recent);
        added = recent;
        cache.set_recent(tokens.codes.view(), tokens.values, added..all);
        found
    }

    /// Returns the codes of the cache's recent keys and of keys `[batch, heads, keys, dim]`.
    fn codes_after(&self, cache: &CompressedCache, k: ArrayView4<f32>) -> Result<Array3<u32>> {
        let (batch, heads, keys, _) = k.dim();
        let cached = cache.recent_codes.dim().2;
        let mut codes = Array3::zeros((batch, heads, cached + keys));
        codes.slice_mut(s![.., .., ..cached]).assign(&cache.recent_codes);
        for b in 0..batch {
            let found = self.keys.assign(k.slice(s![b, .., .., ..]))?;
            codes.slice_mut(s![b, .., cached..]).assign(&found);
        }
        Ok(codes)
    }

    /// Returns the number of queries in a share: whole blocks, and so many that the cache before a share is worth its memory.
    fn share_len(&self, tokens: usize) -> usize {
        let shares = 2 * rayon::current_num_threads();
        tokens.div_ceil(shares).max(self.keys.codes()).next_multiple_of(self.block_len).max(1)
    }

    /// Returns the cache as it is before each share of queries, so that shares are independent of each other, and the number of tokens
    /// that are in the last one.
    fn caches_before_shares(
        &self,
        cache: &mut CompressedCache,
        tokens: &Tokens,
        queries: usize,
        share: usize,
    ) -> (Vec<CompressedCache>, usize) {
        let mut before = Vec::with_capacity(queries.div_ceil(share));
        let mut added = 0;
        for first in (0..queries).step_by(share) {
            let end = (tokens.cached + first).saturating_sub(self.mem_len).max(added);
            cache.add(tokens.codes.view(), tokens.values, added..end);
            added = end;
            before.push(cache.clone());
        }
        (before, added)
    }

    /// Computes the attention of one share of a head's queries, block by block.
    fn attend_share(
        &self,
        (b, h): (usize, usize),
        q: ArrayView2<f32>,
        tile: QueryTile,
        tokens: &Tokens,
        before_shares: &[CompressedCache],
        share: usize,
    ) {
        let QueryTile { first, mut output, mut log_sum_exp, .. } = tile;
        let kv_head = h / tokens.group;
        let before = &before_shares[first / share];
        let mut counts = before.counts.slice(s![b, kv_head, ..]).to_owned();
        let mut means = before.means.slice(s![b, kv_head, .., ..]).to_owned();
        let codewords = self.keys.codewords().slice_move(s![kv_head, .., ..]);
        let (codes, values) = (tokens.codes.slice(s![b, kv_head, ..]), tokens.values.slice(s![b, kv_head, .., ..]));
        let query_codes = self.queries.map(|book| book.codes_of(h, q));
        let quantized = self.queries.zip(query_codes.as_ref());
        let quantized = quantized.map(|(book, codes)| gather_rows(book.codewords().slice(s![h, .., ..]), codes));
        let q = quantized.as_ref().map_or(q, |quantized| quantized.view());
        let table = self.score_table(h, codewords, q.nrows());
        let mut scratch = vec![];
        let mut added = (tokens.cached + first).saturating_sub(self.mem_len);
        for start in (0..q.nrows()).step_by(self.block_len) {
            let end = q.nrows().min(start + self.block_len);
            let query = tokens.cached + first + start;
            let window = query.saturating_sub(self.mem_len)..tokens.cached + first + end;
            let left = added..window.start;
            let (left_codes, left_values) = (codes.slice(s![left.clone()]), values.slice(s![left, ..]));
            add_to_means(counts.view_mut(), means.view_mut(), left_codes, left_values, None);
            added = window.start;
            let q = q.slice(s![start..end, ..]);
            let with_u = self.bias.map(|bias| &q + &bias.u.row(h));
            let content = with_u.as_ref().map_or(q, |q| q.view());
            let mut output = output.slice_mut(s![start..end, ..]);
            let mut softmax = vec![OnlineSoftmax::default(); end - start];
            if self.agg_cache {
                let (counts, means) = (counts.view(), means.view());
                let keys = CompressedKeys { codewords, counts, means, scale: self.scale };
                let known = table.as_ref().zip(query_codes.as_ref());
                let known = known.map(|(scores, codes)| ScoreTable { scores, codes: &codes[start..end] });
                keys.accumulate(content, known, &mut scratch, output.view_mut(), &mut softmax);
            }
            let keys = gather_rows(codewords, &codes.slice(s![window.clone()]).to_vec());
            let window = WindowKeys {
                keys: keys.view(),
                before: query - window.start,
                values: values.slice(s![window, ..]),
                positions: self.position_scores(h, q),
                scale: self.scale,
            };
            window.accumulate(content, &mut scratch, output.view_mut(), &mut softmax);
            finish(&softmax, output, log_sum_exp.slice_mut(s![start..end]));
        }
    }

    /// Returns the scores of all pairs of codewords `[query codes, key codes]`, where those are fewer than all queries'.
    fn score_table(&self, head: usize, codewords: ArrayView2<f32>, queries: usize) -> Option<Array2<f32>> {
        let book = self.queries.filter(|book| self.bias.is_none() && book.codes() <= queries)?;
        let mut table = Array2::zeros((book.codes(), codewords.nrows()));
        let of_queries = book.codewords().slice_move(s![head, .., ..]);
        product_into(table.view_mut(), of_queries, codewords.reversed_axes(), self.scale, false);
        Some(table)
    }

    /// Returns the scores of queries with distances `[queries, mem_len + 1]`.
    fn position_scores(&self, head: usize, q: ArrayView2<f32>) -> Option<Array2<f32>> {
        self.bias.map(|bias| {
            let with_w = &q + &bias.w.row(head);
            matmul(with_w.view(), bias.r.slice(s![head, .., ..]).reversed_axes()) * self.scale
        })
    }
}
