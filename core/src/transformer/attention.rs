//! Attention of new tokens to those of a cache.

use ndarray::{Array2, ArrayView2, ArrayView4, ArrayViewMut2, ShapeBuilder, s};

use super::config::DecoderConfig;
use super::kv_cache::HeadCache;
use crate::attention::CompressedCache;
use crate::error::{Error, Result};
use crate::layer::VqAttentionLayer;
use crate::linalg::{product_into, share_chunks};

/// Queries that are scored at a time.
const TILE: usize = 32;

/// Multiply-adds below which one thread does it all.
const PARALLEL_FROM: usize = 1 << 16;

/// The same for a single token, while the other threads look out for the next product.
const PARALLEL_FROM_OF_ONE: usize = 1 << 14;

/// Memory for one token's scores, used again and again.
#[derive(Debug, Default)]
pub(super) struct Scores {
    heads: Vec<HeadScores>,
}

#[derive(Debug, Default)]
struct HeadScores {
    scores: Vec<f32>,
    weights: Vec<(u32, f32)>,
    output: Vec<f32>,
}

/// Writes to `output` what the last tokens, whose queries `q` are `[tokens, heads · head_dim]`, take from those of the cache's heads,
/// which hold their keys and values already.
pub(super) fn attend(config: &DecoderConfig, q: &[f32], cache: &[HeadCache], scores: &mut Scores, output: &mut [f32]) {
    let width = config.heads * config.head_dim;
    let (tokens, length) = (q.len() / width, cache[0].keys.len());
    if tokens == 1 {
        return attend_one(config, q, cache, scores, output, q.len() * length >= PARALLEL_FROM_OF_ONE);
    }
    let is_parallel = q.len() * length >= PARALLEL_FROM;
    let work = |number: usize, output: &mut [f32]| {
        let first = number * TILE;
        let rows = output.len() / width;
        let q = ArrayView2::from_shape((rows, width), &q[first * width..(first + rows) * width]).expect("whole rows");
        let mut output = ArrayViewMut2::from_shape((rows, width), output).expect("whole rows");
        attend_tile(config, q, cache, length - tokens + first, &mut output);
    };
    share_chunks(output, TILE * width, is_parallel, work);
}

/// Writes to `output` what all tokens of a text take from each other: queries, keys and values are `[tokens, features]`, whose columns
/// are divided among the heads.
pub(super) fn attend_all(heads: usize, [q, k, v]: [&[f32]; 3], width: usize, output: &mut [f32]) {
    let (tokens, head_dim) = (q.len() / width, width / heads);
    let scale = 1.0 / (head_dim as f32).sqrt();
    let of = |all| ArrayView2::from_shape((tokens, width), all).expect("whole rows");
    let (q, k, v) = (of(q), of(k), of(v));
    let work = |number: usize, output: &mut [f32]| {
        let (first, rows) = (number * TILE, output.len() / width);
        let mut output = ArrayViewMut2::from_shape((rows, width), output).expect("whole rows");
        let mut scores = Array2::zeros((rows, tokens));
        for head in 0..heads {
            let columns = head * head_dim..(head + 1) * head_dim;
            let queries = q.slice(s![first..first + rows, columns.clone()]);
            product_into(scores.view_mut(), queries, k.slice(s![.., columns.clone()]).reversed_axes(), scale, false);
            scores.rows_mut().into_iter().for_each(|mut row| softmax(row.as_slice_mut().expect("rows of a tile")));
            product_into(
                output.slice_mut(s![.., columns.clone()]),
                scores.view(),
                v.slice(s![.., columns]),
                1.0,
                false,
            );
        }
    };
    share_chunks(output, TILE * width, q.len() * tokens >= PARALLEL_FROM, work);
}

/// Writes to `output` `[tokens, heads · head_dim]` what tokens take from each other, and from those of the cache before them, by a
/// stored attention: queries, keys and values are `[tokens, heads · head_dim]`, with heads of their own.
///
/// # Errors
/// As [`VqAttentionLayer::attend`].
pub(super) fn attend_by_layer(
    layer: &VqAttentionLayer,
    [q, k, v]: [&[f32]; 3],
    cache: Option<&mut CompressedCache>,
    output: &mut [f32],
) -> Result<()> {
    let settings = layer.settings();
    let (heads, kv_heads) = (settings.n_head, settings.kv_heads());
    let (d_k, d_v) = (settings.d_k.unwrap_or_default(), settings.d_v.unwrap_or_default());
    let tokens = q.len() / (heads * d_k).max(1);
    // By heads, a token a row: [1, heads, tokens, dim].
    let by_heads = |all, heads: usize, dim: usize| {
        let rows = ArrayView4::from_shape((1, tokens, heads, dim), all).map_err(|e| Error::Numeric(e.to_string()))?;
        Ok::<_, Error>(rows.permuted_axes([0, 2, 1, 3]))
    };
    let own = |all, heads, dim| by_heads(all, heads, dim).map(|rows| rows.as_standard_layout().into_owned());
    let (q, k, v) = (own(q, heads, d_k)?, own(k, kv_heads, d_k)?, own(v, kv_heads, d_v)?);
    let found = layer.attend(q.view(), k.view(), v.view(), None, cache)?.output;
    let rows = output.chunks_exact_mut(heads * d_v).enumerate();
    for (token, row) in rows {
        row.iter_mut().zip(found.slice(s![0, .., token, ..])).for_each(|(y, found)| *y = *found);
    }
    Ok(())
}

/// Checks a stored attention against the heads of a model that is to run it.
///
/// # Errors
/// When heads or lengths are others, it is not causal where it has to be or the other way round, or its codebooks are of queries and
/// keys that are not rotated as the model's are.
pub(super) fn check_attention(
    what: String,
    layer: &VqAttentionLayer,
    (heads, kv_heads, head_dim): (usize, usize, usize),
    is_decoder: bool,
) -> Result<()> {
    let settings = layer.settings();
    let found = (settings.n_head, settings.kv_heads(), settings.d_k, settings.d_v);
    let expected = (heads, kv_heads, Some(head_dim), Some(head_dim));
    if found != expected {
        return Err(Error::expected(
            format!("heads of queries and of keys, and their lengths, of {what}"),
            format!("{found:?}"),
            format!("{expected:?}"),
        ));
    }
    if is_decoder != settings.causal || (is_decoder && settings.key_codes().is_none()) {
        let found = format!("mechanism {:?}, causal = {}", settings.mechanism, settings.causal);
        let expected = match is_decoder {
            true => "causal attention by codes, VqQk or VqK",
            false => "attention that is not causal",
        };
        return Err(Error::expected(what, found, expected));
    }
    if is_decoder != settings.rotary {
        let (found, expected) = match is_decoder {
            true => {
                ("of queries and keys before they are rotated", "of rotated ones, as --calibration-text makes them")
            }
            false => ("of rotated queries and keys", "of those that are not rotated"),
        };
        return Err(Error::expected(format!("codebooks of {what}"), found, expected));
    }
    Ok(())
}

/// The keys that a query at this position sees.
fn seen(config: &DecoderConfig, position: usize) -> std::ops::Range<usize> {
    let first = config.window.map_or(0, |window| (position + 1).saturating_sub(window));
    first..position + 1
}

fn attend_one(
    config: &DecoderConfig,
    q: &[f32],
    cache: &[HeadCache],
    scores: &mut Scores,
    output: &mut [f32],
    is_parallel: bool,
) {
    let DecoderConfig { heads, kv_heads, head_dim, .. } = *config;
    let group = heads / kv_heads;
    let keys = seen(config, cache[0].keys.len() - 1);
    let scale = 1.0 / (head_dim as f32).sqrt();
    scores.heads.resize_with(heads, HeadScores::default);
    let work = |head: usize, own: &mut [HeadScores]| {
        let HeadScores { scores, weights, output } = &mut own[0];
        let HeadCache { keys: all_keys, values } = &cache[head / group];
        output.clear();
        output.resize(head_dim, 0.0);
        scores.resize(keys.len(), 0.0);
        all_keys.dots(keys.clone(), &q[head * head_dim..(head + 1) * head_dim], scores);
        scores.iter_mut().for_each(|score| *score *= scale);
        softmax(scores);
        weights.clear();
        weights.extend((0u32..).zip(scores.iter().copied()));
        values.add_weighted(keys.start, weights, output);
    };
    share_chunks(&mut scores.heads, 1, is_parallel, work);
    for (head, output) in scores.heads.iter().zip(output.chunks_exact_mut(head_dim)) {
        output.copy_from_slice(&head.output);
    }
}

/// Some queries, the first of which is at this position among the keys.
fn attend_tile(
    config: &DecoderConfig,
    q: ArrayView2<f32>,
    cache: &[HeadCache],
    position: usize,
    output: &mut ArrayViewMut2<f32>,
) {
    let DecoderConfig { heads, kv_heads, head_dim, .. } = *config;
    let (queries, group) = (q.nrows(), heads / kv_heads);
    let (begin, end) = (seen(config, position).start, position + queries);
    let scale = 1.0 / (head_dim as f32).sqrt();
    let (mut scores, mut as_keys, mut as_values) = (vec![0f32; queries * (end - begin)], vec![], vec![]);
    for (number, head) in cache.iter().enumerate() {
        let shape = (end - begin, head_dim);
        let keys = ArrayView2::from_shape(shape, head.keys.floats(begin..end, &mut as_keys)).expect("whole rows");
        let values = ArrayView2::from_shape(shape, head.values.floats(begin..end, &mut as_values)).expect("whole rows");
        for head in number * group..(number + 1) * group {
            let columns = s![.., head * head_dim..(head + 1) * head_dim];
            let shape = (queries, end - begin).strides((end - begin, 1));
            let mut tile = ArrayViewMut2::from_shape(shape, &mut scores).expect("as many as the shape has");
            product_into(tile.view_mut(), q.slice(columns), keys.reversed_axes(), scale, false);
            for (i, mut row) in tile.rows_mut().into_iter().enumerate() {
                let seen = seen(config, position + i);
                let row = row.as_slice_mut().expect("rows of a tile");
                row[..seen.start - begin].fill(0.0);
                row[seen.end - begin..].fill(0.0);
                softmax(&mut row[seen.start - begin..seen.end - begin]);
            }
            product_into(output.slice_mut(columns), tile.view(), values, 1.0, false);
        }
    }
}

/// Replaces scores by their shares.
fn softmax(scores: &mut [f32]) {
    let mut softmax = crate::attention::OnlineSoftmax::default();
    softmax.update(scores);
    let share = 1.0 / softmax.sum;
    scores.iter_mut().for_each(|score| *score *= share);
}
