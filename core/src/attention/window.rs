//! The window of a causal attention: the last keys before a query, met one by one.

use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};

use super::softmax::{OnlineSoftmax, accumulate, scratch_tile};

/// Keys of one head that a block of queries meets one by one.
pub(super) struct WindowKeys<'a> {
    /// `[keys, dim]`
    pub keys: ArrayView2<'a, f32>,
    /// `[keys, value dim]`
    pub values: ArrayView2<'a, f32>,
    /// Number of the keys that come before the block's first query.
    pub before: usize,
    /// Scores of each query with each distance to a key, `[queries, distances]`, added to those of the products.
    pub positions: Option<Array2<f32>>,
    /// Factor of the products.
    pub scale: f32,
}

impl WindowKeys<'_> {
    /// Adds to the softmaxes of the block's queries `[queries, dim]` the keys up to each query's own.
    pub fn accumulate(
        &self,
        q: ArrayView2<f32>,
        scratch: &mut Vec<f32>,
        output: ArrayViewMut2<f32>,
        softmax: &mut [OnlineSoftmax],
    ) {
        let scores = scratch_tile(scratch, q.nrows(), self.keys.nrows());
        let keys = (q, self.keys, self.values);
        accumulate(keys, self.scale, scores, |scores| self.mask_and_bias(scores), output, softmax);
    }

    /// Hides the keys after each query and adds the scores of positions.
    fn mask_and_bias(&self, scores: &mut ArrayViewMut2<f32>) {
        for (i, mut row) in scores.rows_mut().into_iter().enumerate() {
            let own = self.before + i;
            row.slice_mut(s![own + 1..]).fill(f32::NEG_INFINITY);
            if let Some(positions) = &self.positions {
                let positions = positions.row(i);
                let nearest = row.slice_mut(s![(own + 1).saturating_sub(positions.len())..=own; -1]);
                nearest.into_iter().zip(positions).for_each(|(score, position)| *score += position);
            }
        }
    }
}
