//! One part of HyperAttention: some queries of a head, and keys all of which they see.

use std::ops::Range;

use ndarray::{Array2, Array3, ArrayView1, ArrayView2, ArrayView4, ArrayViewMut1, ArrayViewMut2, s};

use super::config::HyperAttention;
use crate::attention::gather::gather_rows;
use crate::attention::shape::AttentionShape;
use crate::attention::softmax::{OnlineSoftmax, accumulate, finish, scratch_tile};

/// Queries, keys and values of the whole attention.
pub(super) struct Inputs<'a> {
    pub q: ArrayView4<'a, f32>,
    pub k: ArrayView4<'a, f32>,
    pub v: ArrayView4<'a, f32>,
    pub scale: f32,
    pub shape: AttentionShape,
}

/// Some queries of a head, and some keys, all of which they see.
pub(super) struct Part<'a> {
    /// Sequence and head in one number: `sequence · heads + head`.
    pub head: usize,
    pub queries: Range<usize>,
    pub keys: Range<usize>,
    /// Places of sampled keys in the order of their hashes; they stand for the keys of other blocks.
    pub sampled: ArrayView1<'a, u32>,
}

/// A part's tokens in the order of their hashes.
pub(super) struct SortedPart {
    /// Numbers of the queries, from the part's first.
    pub queries: Vec<u32>,
    /// Numbers of the keys, from the part's first.
    keys: Vec<u32>,
    sampled_keys: Array2<f32>,
    sampled_values: Array2<f32>,
}

impl Inputs<'_> {
    /// Returns the part's queries `[queries, dim]`.
    pub fn queries(&self, part: &Part) -> ArrayView2<'_, f32> {
        let (b, h) = (part.head / self.shape.heads, part.head % self.shape.heads);
        self.q.slice(s![b, h, part.queries.clone(), ..])
    }

    /// Returns the part's keys `[keys, dim]` and values `[keys, value dim]`.
    pub fn keys(&self, part: &Part) -> (ArrayView2<'_, f32>, ArrayView2<'_, f32>) {
        let (b, h) = (part.head / self.shape.heads, part.head % self.shape.heads / self.shape.group);
        (self.k.slice(s![b, h, part.keys.clone(), ..]), self.v.slice(s![b, h, part.keys.clone(), ..]))
    }
}

impl SortedPart {
    /// Sorts a part's queries and keys by their hashes `[batch, heads, tokens]`, and gathers the sampled keys.
    pub fn new(config: &HyperAttention, inputs: &Inputs, part: &Part, hashes: &(Array3<u32>, Array3<u32>)) -> Self {
        let shape = &inputs.shape;
        let (b, h) = (part.head / shape.heads, part.head % shape.heads);
        let queries = sorted_by_hash(hashes.0.slice(s![b, h, part.queries.clone()]));
        let keys = sorted_by_hash(hashes.1.slice(s![b, h / shape.group, part.keys.clone()]));
        let sampled: Vec<u32> = match config.blocks(part.keys.len()) {
            1 => vec![],
            _ => part.sampled.iter().map(|&place| keys[place as usize]).collect(),
        };
        let (k, v) = inputs.keys(part);
        let (sampled_keys, sampled_values) = (gather_rows(k, &sampled), gather_rows(v, &sampled));
        SortedPart { queries, keys, sampled_keys, sampled_values }
    }

    /// Computes the attention of blocks of queries to their own blocks of keys and to the sample; `output` `[queries, value dim]` and
    /// `log_sum_exp` `[queries]` are in the order of the hashes.
    pub fn attend_blocks(
        &self,
        config: &HyperAttention,
        inputs: &Inputs,
        part: &Part,
        blocks: Range<usize>,
        mut output: ArrayViewMut2<f32>,
        mut log_sum_exp: ArrayViewMut1<f32>,
    ) {
        let (count, queries, keys) = (config.blocks(part.keys.len()), part.queries.len(), part.keys.len());
        let (q, (k, v)) = (inputs.queries(part), inputs.keys(part));
        let start = blocks.start * queries / count;
        let mut scratch = vec![];
        for block in blocks {
            let rows = block * queries / count..(block + 1) * queries / count;
            let own = block * keys / count..(block + 1) * keys / count;
            let mut output = output.slice_mut(s![rows.start - start..rows.end - start, ..]);
            let lse = log_sum_exp.slice_mut(s![rows.start - start..rows.end - start]);
            let (near, values) = (gather_rows(k, &self.keys[own.clone()]), gather_rows(v, &self.keys[own.clone()]));
            let q = gather_rows(q, &self.queries[rows]);
            let mut softmax = vec![OnlineSoftmax::default(); q.nrows()];
            let scores = scratch_tile(&mut scratch, q.nrows(), near.nrows());
            let keys_of = (q.view(), near.view(), values.view());
            accumulate(keys_of, inputs.scale, scores, |_| {}, output.view_mut(), &mut softmax);
            self.accumulate_sample(&q, inputs.scale, part, &own, &mut scratch, output.view_mut(), &mut softmax);
            finish(&softmax, output, lse);
        }
    }

    /// Adds the sampled keys to the softmaxes of a block's queries, each as many times as keys it stands for; those that are in the
    /// block's `own` keys have been met.
    #[expect(clippy::too_many_arguments, reason = "what a block has at hand")]
    fn accumulate_sample(
        &self,
        q: &Array2<f32>,
        scale: f32,
        part: &Part,
        own: &Range<usize>,
        scratch: &mut Vec<f32>,
        output: ArrayViewMut2<f32>,
        softmax: &mut [OnlineSoftmax],
    ) {
        let samples = self.sampled_keys.nrows();
        if samples == 0 {
            return;
        }
        let log_weight = (part.keys.len() as f32 / samples as f32).ln();
        let scores = scratch_tile(scratch, q.nrows(), samples);
        let sampled = (q.view(), self.sampled_keys.view(), self.sampled_values.view());
        let weigh = |scores: &mut ArrayViewMut2<f32>| {
            *scores += log_weight;
            for (mut column, &place) in scores.columns_mut().into_iter().zip(part.sampled) {
                if own.contains(&(place as usize)) {
                    column.fill(f32::NEG_INFINITY);
                }
            }
        };
        accumulate(sampled, scale, scores, weigh, output, softmax);
    }
}

/// Returns the numbers of tokens in the order of their hashes.
fn sorted_by_hash(hashes: ArrayView1<u32>) -> Vec<u32> {
    let mut order: Vec<u32> = (0..hashes.len() as u32).collect();
    order.sort_by_key(|&token| hashes[token as usize]);
    order
}
