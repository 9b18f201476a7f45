//! Attention masks: which keys a query sees.

use ndarray::{ArrayView2, ArrayViewMut2, s};

/// Which keys each query sees.
#[derive(Debug, Clone, Copy, Default)]
pub struct AttentionMask<'a> {
    /// Whether a query sees only the keys up to its own position. The last query is at the last key's, and there are no more
    /// queries than keys: queries that go on with a sequence come with the keys of all of it.
    pub causal: bool,
    /// `[batch, keys]`: `true` where a key is there, `false` where it is padding that no query sees. `None` when all are there.
    pub keys: Option<ArrayView2<'a, bool>>,
    /// Document numbers of the queries `[batch, queries]` and of the keys `[batch, keys]`: a query sees only keys of its own
    /// document.
    pub segments: Option<(ArrayView2<'a, u32>, ArrayView2<'a, u32>)>,
}

/// An [`AttentionMask`] as it applies to a tile of consecutive queries of one sequence.
pub(super) struct TileMask<'a> {
    pub mask: AttentionMask<'a>,
    /// The sequence's place in the batch.
    pub batch: usize,
    /// Number of the tile's first query.
    pub first_query: usize,
    /// Position of the first of all queries among the keys, in causal attention.
    pub offset: usize,
}

impl TileMask<'_> {
    /// Returns the end of the keys that one of the tile's `queries` may see, of `keys` in all.
    pub fn visible_end(&self, queries: usize, keys: usize) -> usize {
        if self.mask.causal { keys.min(self.offset + self.first_query + queries) } else { keys }
    }

    /// Sets `scores` `[queries, keys]`, whose keys begin at position `first_key`, to −∞ where a query does not see the key.
    pub fn apply(&self, first_key: usize, scores: &mut ArrayViewMut2<f32>) {
        let keys = scores.ncols();
        if let Some(there) = self.mask.keys {
            let there = there.slice(s![self.batch, first_key..first_key + keys]);
            if !there.iter().all(|there| *there) {
                for mut row in scores.rows_mut() {
                    row.zip_mut_with(&there, |score, there| *score = if *there { *score } else { f32::NEG_INFINITY });
                }
            }
        }
        for (i, mut row) in scores.rows_mut().into_iter().enumerate() {
            let query = self.first_query + i;
            if let Some((of_queries, of_keys)) = self.mask.segments {
                let own = of_queries[[self.batch, query]];
                let others = of_keys.slice(s![self.batch, first_key..first_key + keys]);
                row.zip_mut_with(&others, |score, of| *score = if *of == own { *score } else { f32::NEG_INFINITY });
            }
            let position = self.offset + query;
            if self.mask.causal && position + 1 < first_key + keys {
                row.slice_mut(s![(position + 1).saturating_sub(first_key)..]).fill(f32::NEG_INFINITY);
            }
        }
    }
}
