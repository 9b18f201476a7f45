//! Exact attention, a tile of queries and keys at a time: the scores are never in memory as a whole (online softmax, as in
//! FlashAttention).

use ndarray::{Array2, ArrayView2, ArrayView4, ArrayViewMut1, ArrayViewMut2, s};

use super::mask::{AttentionMask, TileMask};
use super::output::{AttentionOutput, QueryTile, query_tiles};
use super::shape::{AttentionShape, check_scale};
use super::softmax::{OnlineSoftmax, accumulate, finish};
use crate::error::Result;
use crate::linalg::{large_zeros, on_all_threads};

/// Queries of a tile.
pub(super) const TILE_QUERIES: usize = 128;

/// Keys of a tile: with as many queries, scores that stay in a core's second cache.
const TILE_KEYS: usize = 256;

/// Multiply-adds below which one thread does everything.
const PARALLEL_FROM: usize = 1 << 20;

/// Computes softmax(scale · q kᵀ) v for queries `[batch, heads, queries, dim]`, keys `[batch, kv heads, keys, dim]` and values
/// `[batch, kv heads, keys, value dim]`, over the keys that `mask` lets a query see.
///
/// Time is that of the products of all visible pairs, memory a tile of scores for each thread beside the output.
///
/// # Errors
/// When shapes do not fit, a causal attention has more queries than keys, a number is not finite, or scores are beyond what f32 can
/// hold.
pub fn exact(
    q: ArrayView4<f32>,
    k: ArrayView4<f32>,
    v: ArrayView4<f32>,
    scale: f32,
    mask: &AttentionMask,
) -> Result<AttentionOutput> {
    let shape = AttentionShape::of(q, k, v, mask)?;
    let AttentionShape { batch, heads, group, queries, keys, value_dim } = shape;
    check_scale(scale)?;
    let mut output = large_zeros((batch * heads, queries, value_dim));
    let mut log_sum_exp = Array2::from_elem((batch * heads, queries), f32::NEG_INFINITY);
    let mut tiles = query_tiles(&mut output, &mut log_sum_exp, TILE_QUERIES);
    let work = |QueryTile { head, first, output, log_sum_exp }: QueryTile| {
        let (b, h) = (head / heads, head % heads);
        let q = q.slice(s![b, h, first..first + log_sum_exp.len(), ..]);
        let (k, v) = (k.slice(s![b, h / group, .., ..]), v.slice(s![b, h / group, .., ..]));
        attend_tile(
            q,
            k,
            v,
            scale,
            &TileMask { mask: *mask, batch: b, first_query: first, offset: shape.offset() },
            output,
            log_sum_exp,
        );
    };
    if batch * heads * queries * keys * (q.dim().3 + value_dim) < PARALLEL_FROM {
        tiles.into_iter().for_each(work);
    } else {
        // The last queries of a causal attention see the most keys: those first.
        tiles.sort_by_key(|tile| std::cmp::Reverse(tile.first));
        on_all_threads(tiles, work);
    }
    AttentionOutput::from_heads(output, log_sum_exp, (batch, heads))
}

/// Computes the attention of one tile of queries `[queries, dim]` to the keys of its head that it sees.
pub(super) fn attend_tile(
    q: ArrayView2<f32>,
    k: ArrayView2<f32>,
    v: ArrayView2<f32>,
    scale: f32,
    mask: &TileMask,
    mut output: ArrayViewMut2<f32>,
    log_sum_exp: ArrayViewMut1<f32>,
) {
    let queries = q.nrows();
    let end = mask.visible_end(queries, k.nrows());
    let mut scores = Array2::<f32>::zeros((queries, TILE_KEYS.min(end)));
    let mut softmax = vec![OnlineSoftmax::default(); queries];
    for start in (0..end).step_by(TILE_KEYS) {
        let keys = start..end.min(start + TILE_KEYS);
        let scores = scores.slice_mut(s![.., ..keys.len()]);
        let tile = (q, k.slice(s![keys.clone(), ..]), v.slice(s![keys, ..]));
        accumulate(tile, scale, scores, |scores| mask.apply(start, scores), output.view_mut(), &mut softmax);
    }
    finish(&softmax, output, log_sum_exp);
}
