//! The settings of attention by codes, their checks, and its division among threads.

use ndarray::{Array2, ArrayView2, ArrayView3, ArrayView4};

use crate::attention::codebook::AttentionCodebook;
use crate::attention::output::{AttentionOutput, QueryTile, query_tiles};
use crate::attention::shape::check_scale;
use crate::error::{Error, Result};
use crate::linalg::{large_zeros, on_all_threads, require_finite};

/// Scores of positions, added to those of contents (Transformer-XL; Transformer-VQ): query i and key j have
/// scale · (⟨qᵢ + u, kⱼ⟩ + ⟨qᵢ + w, r₍ᵢ₋ⱼ₎⟩), without the last product where i − j is more than `mem_len`.
#[derive(Debug, Clone, Copy)]
pub struct RelativeBias<'a> {
    /// Content bias `[heads, dim]`.
    pub u: ArrayView2<'a, f32>,
    /// Position bias `[heads, dim]`.
    pub w: ArrayView2<'a, f32>,
    /// Embeddings of the distances `[heads, mem_len + 1, dim]`.
    pub r: ArrayView3<'a, f32>,
}

/// Vector-quantised attention: its codebooks and settings.
#[derive(Debug, Clone, Copy)]
pub struct VqAttention<'a> {
    /// Codewords of keys, of as many heads as the keys have.
    pub keys: &'a AttentionCodebook,
    /// Codewords of queries, of as many heads as the queries have; `None` takes queries as they are.
    pub queries: Option<&'a AttentionCodebook>,
    /// Factor of the products of queries and keys.
    pub scale: f32,
    /// Tokens that a causal attention takes at a time: within such a block, and for `mem_len` tokens before it, keys are met one by
    /// one, before that by their codes.
    pub block_len: usize,
    /// Tokens before a block that it meets one by one.
    pub mem_len: usize,
    /// Whether a causal attention meets keys before that window at all, by their codes.
    pub agg_cache: bool,
    /// Scores of positions, of a causal attention.
    pub bias: Option<RelativeBias<'a>>,
}

impl<'a> VqAttention<'a> {
    /// Returns attention without scores of positions that sees every key.
    pub fn new(
        keys: &'a AttentionCodebook,
        queries: Option<&'a AttentionCodebook>,
        scale: f32,
        block_len: usize,
    ) -> Self {
        VqAttention { keys, queries, scale, block_len, mem_len: 0, agg_cache: true, bias: None }
    }
}

impl VqAttention<'_> {
    /// Checks codebooks and scores of positions against queries and keys.
    pub(in crate::attention) fn check(&self, q: ArrayView4<f32>, k: ArrayView4<f32>) -> Result<()> {
        check_codebook("keys", self.keys, k)?;
        self.check_bias(q)?;
        check_scale(self.scale)?;
        self.queries.map_or(Ok(()), |book| check_codebook("queries", book, q))
    }

    fn check_bias(&self, q: ArrayView4<f32>) -> Result<()> {
        let Some(bias) = self.bias else { return Ok(()) };
        let (_, heads, _, dim) = q.dim();
        let found = (bias.u.dim(), bias.w.dim(), bias.r.dim());
        let expected = ((heads, dim), (heads, dim), (heads, self.mem_len.saturating_add(1), dim));
        if found != expected {
            return Err(Error::expected("shapes of u, w and r", format!("{found:?}"), format!("{expected:?}")));
        }
        require_finite("u", bias.u.iter())?;
        require_finite("w", bias.w.iter())?;
        require_finite("r", bias.r.iter())
    }

    /// Runs `work` on all threads for each head's tiles of at most `tile` queries `[queries, dim]`, given sequence and head.
    pub(super) fn for_each_tile(
        &self,
        q: ArrayView4<f32>,
        value_dim: usize,
        tile: usize,
        work: impl Fn((usize, usize), ArrayView2<f32>, QueryTile) + Sync,
    ) -> Result<AttentionOutput> {
        let (batch, heads, queries, _) = q.dim();
        let mut output = large_zeros((batch * heads, queries, value_dim));
        let mut log_sum_exp = Array2::from_elem((batch * heads, queries), f32::NEG_INFINITY);
        let tiles = query_tiles(&mut output, &mut log_sum_exp, tile);
        on_all_threads(tiles, |tile| {
            let (b, h) = (tile.head / heads, tile.head % heads);
            let rows = tile.first..tile.first + tile.log_sum_exp.len();
            work((b, h), q.slice(ndarray::s![b, h, rows, ..]), tile);
        });
        AttentionOutput::from_heads(output, log_sum_exp, (batch, heads))
    }
}

fn check_codebook(what: &str, book: &AttentionCodebook, of: ArrayView4<f32>) -> Result<()> {
    match (book.heads(), book.dim()) == (of.dim().1, of.dim().3) {
        true => Ok(()),
        false => Err(Error::expected(
            format!("codewords of {what}"),
            format!("{} heads of length {}", book.heads(), book.dim()),
            format!("{} heads of length {}", of.dim().1, of.dim().3),
        )),
    }
}
