//! HyperAttention of a whole batch: its parts on all threads, merged.

use std::ops::Range;

use ndarray::{Array1, Array2, Array3, ArrayView1, ArrayView4, ArrayViewMut1, Axis, s};
use rayon::prelude::*;

use super::config::HyperAttention;
use super::levels::{Level, levels};
use super::part::{Inputs, Part, SortedPart};
use super::sample::HyperAttentionSample;
use crate::attention::exact::{TILE_QUERIES, attend_tile, exact};
use crate::attention::mask::{AttentionMask, TileMask};
use crate::attention::output::AttentionOutput;
use crate::attention::shape::{AttentionShape, check_scale};
use crate::error::Result;
use crate::linalg::{large_zeros, on_all_threads};

/// Queries that a task has, if they are of several blocks.
const SHARE: usize = 256;

impl HyperAttention {
    /// Estimates [`exact`](crate::attention::exact()) over all keys, or those up to each query's own; causal queries that are fewer
    /// than keys are those of the last keys, and see all of theirs.
    ///
    /// # Errors
    /// As [`exact`](crate::attention::exact()); when a block is of no keys, or there are more projections than 24.
    pub fn attend(
        &self,
        q: ArrayView4<f32>,
        k: ArrayView4<f32>,
        v: ArrayView4<f32>,
        scale: f32,
        causal: bool,
    ) -> Result<AttentionOutput> {
        let shape = AttentionShape::of(q, k, v, &AttentionMask { causal, ..AttentionMask::default() })?;
        if causal && shape.queries < shape.keys {
            self.validate()?;
            return exact(q, k, v, scale, &AttentionMask { causal, ..AttentionMask::default() });
        }
        self.attend_with(q, k, v, scale, causal, &self.sample(q, k, causal)?)
    }

    /// Does what [`HyperAttention::attend`] does with a given sample.
    ///
    /// # Errors
    /// As there; when a causal attention has not a key for each query; and when the sample is of another shape, or names keys that are not there.
    pub fn attend_with(
        &self,
        q: ArrayView4<f32>,
        k: ArrayView4<f32>,
        v: ArrayView4<f32>,
        scale: f32,
        causal: bool,
        sample: &HyperAttentionSample,
    ) -> Result<AttentionOutput> {
        let shape = AttentionShape::of(q, k, v, &AttentionMask { causal, ..AttentionMask::default() })?;
        self.check(q, k, causal)?;
        if !causal && shape.queries < self.min_seq_len {
            return exact(q, k, v, scale, &AttentionMask::default());
        }
        check_scale(scale)?;
        let (parts, runs) = levels(shape.queries, shape.keys, causal, self.min_seq_len);
        sample.check(self, &parts, &shape, q.dim().3)?;
        let inputs = Inputs { q, k, v, scale, shape };
        let mut output = large_zeros((shape.batch * shape.heads, shape.queries, shape.value_dim));
        let mut log_sum_exp = Array2::from_elem((shape.batch * shape.heads, shape.queries), f32::NEG_INFINITY);
        inputs.diagonal(&runs, &mut output, &mut log_sum_exp);
        let hashes = (sample.hashes(q), sample.hashes(k));
        // Each level is merged before the next one's results are in memory.
        for (parts, sampled) in parts.iter().zip(&sample.keys).rev() {
            let parts = parts_of_heads(&shape, parts, sampled);
            self.off_diagonal(&inputs, &parts, &hashes, &mut output, &mut log_sum_exp);
        }
        AttentionOutput::from_heads(output, log_sum_exp, (shape.batch, shape.heads))
    }

    /// Computes these parts and merges them into the outputs.
    fn off_diagonal(
        &self,
        inputs: &Inputs,
        parts: &[Part],
        hashes: &(Array3<u32>, Array3<u32>),
        output: &mut Array3<f32>,
        log_sum_exp: &mut Array2<f32>,
    ) {
        let sorted: Vec<SortedPart> =
            parts.par_iter().map(|part| SortedPart::new(self, inputs, part, hashes)).collect();
        let found = self.attend_parts(inputs, parts, &sorted);
        let heads: Vec<_> = output.outer_iter_mut().zip(log_sum_exp.outer_iter_mut()).enumerate().collect();
        on_all_threads(heads, |(head, (mut output, mut lse))| {
            let own = parts.iter().zip(&sorted).zip(&found).filter(|((part, _), _)| part.head == head);
            for ((part, sorted), (more, more_lse)) in own {
                for (place, &query) in sorted.queries.iter().enumerate() {
                    let query = part.queries.start + query as usize;
                    merge(output.row_mut(query), &mut lse[query], more.row(place), more_lse[place]);
                }
            }
        });
    }

    /// Returns the outputs `[queries, value dim]` and ln Σ exp(score) `[queries]` of parts, in the order of their hashes.
    fn attend_parts(&self, inputs: &Inputs, parts: &[Part], sorted: &[SortedPart]) -> Vec<(Array2<f32>, Array1<f32>)> {
        let rows = |part: &Part| (Array2::zeros((part.queries.len(), inputs.shape.value_dim)), part.queries.len());
        let mut found: Vec<(Array2<f32>, Array1<f32>)> =
            parts.iter().map(rows).map(|(o, n)| (o, Array1::from_elem(n, f32::NEG_INFINITY))).collect();
        let mut shares = vec![];
        for ((part, sorted), (output, lse)) in parts.iter().zip(sorted).zip(&mut found) {
            let (mut output, mut lse) = (output.view_mut(), lse.view_mut());
            let (blocks, queries) = (self.blocks(part.keys.len()), part.queries.len());
            let step = (SHARE * blocks / queries.max(1)).max(1);
            for first in (0..blocks).step_by(step) {
                let end = blocks.min(first + step);
                let rows = (end * queries / blocks) - first * queries / blocks;
                let (some, some_lse);
                (some, output) = output.split_at(Axis(0), rows);
                (some_lse, lse) = lse.split_at(Axis(0), rows);
                shares.push((part, sorted, first..end, some, some_lse));
            }
        }
        on_all_threads(shares, |(part, sorted, blocks, output, lse)| {
            sorted.attend_blocks(self, inputs, part, blocks, output, lse);
        });
        found
    }
}

/// Returns the parts of one level for every head of every sequence, less those without queries.
fn parts_of_heads<'a>(shape: &AttentionShape, parts: &Level, sampled: &'a Array3<u32>) -> Vec<Part<'a>> {
    let mut all = vec![];
    for head in 0..shape.batch * shape.heads {
        for (place, (queries, keys)) in parts.iter().enumerate().filter(|(_, (queries, _))| !queries.is_empty()) {
            let sampled = sampled.slice(s![head / shape.heads, head % shape.heads * parts.len() + place, ..]);
            all.push(Part { head, queries: queries.clone(), keys: keys.clone(), sampled });
        }
    }
    all
}

impl Inputs<'_> {
    /// Computes the causal attention of runs of tokens, each to itself.
    fn diagonal(&self, runs: &[Range<usize>], output: &mut Array3<f32>, log_sum_exp: &mut Array2<f32>) {
        let mut shares = vec![];
        for (head, (mut output, mut lse)) in output.outer_iter_mut().zip(log_sum_exp.outer_iter_mut()).enumerate() {
            for run in runs {
                for first in (0..run.len()).step_by(TILE_QUERIES) {
                    let count = TILE_QUERIES.min(run.len() - first);
                    let (some, some_lse);
                    (some, output) = output.split_at(Axis(0), count);
                    (some_lse, lse) = lse.split_at(Axis(0), count);
                    shares.push((head, run.clone(), first, some, some_lse));
                }
            }
        }
        on_all_threads(shares, |(head, run, first, output, lse)| {
            let run = Part { head, queries: run.clone(), keys: run, sampled: ArrayView1::from(&[]) };
            let mask = AttentionMask { causal: true, ..AttentionMask::default() };
            let mask = TileMask { mask, batch: 0, first_query: first, offset: 0 };
            let q = self.queries(&run).slice_move(s![first..first + lse.len(), ..]);
            let (k, v) = self.keys(&run);
            attend_tile(q, k, v, self.scale, &mask, output, lse);
        });
    }
}

/// Merges two results of one query over different keys, each with its ln Σ exp(score), into the first.
fn merge(mut output: ArrayViewMut1<f32>, lse: &mut f32, more: ArrayView1<f32>, more_lse: f32) {
    let max = lse.max(more_lse);
    if more_lse == f32::NEG_INFINITY {
        return;
    }
    let (own, other) = ((*lse - max).exp(), (more_lse - max).exp());
    let (sum, own, other) = (own + other, own / (own + other), other / (own + other));
    output.zip_mut_with(&more, |output, more| *output = *output * own + more * other);
    *lse = max + sum.ln();
}
