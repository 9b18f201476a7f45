//! Exact attention, a tile of queries and keys at a time: the scores are never in memory as a whole (online softmax, as in
//! FlashAttention).

use ndarray::{Array2, ArrayView2, ArrayView4, ArrayViewMut1, ArrayViewMut2, s};

use super::softmax::{Running, add_keys, finish};
use super::{Attended, Sizes, Task, Visible, attended, check, tasks};
use crate::error::{Error, Result};
use crate::linalg::{in_pool, large_zeros, on_all_threads};

/// Queries of a tile.
pub(super) const QUERIES: usize = 128;

/// Keys of a tile: with as many queries, scores that stay in a core's second cache.
const KEYS: usize = 256;

/// Multiply-adds below which one thread does everything.
const PARALLEL_FROM: usize = 1 << 20;

/// softmax(scale · q kᵀ) v for queries `[batch, heads, queries, dim]`, keys `[batch, kv heads, keys, dim]` and values
/// `[batch, kv heads, keys, value dim]`, over the keys that are visible.
///
/// Time is that of the products of all visible pairs, memory a tile of scores for each thread beside the output.
///
/// # Errors
/// When shapes do not fit, a number is not finite, or scores are beyond what f32 can hold.
pub fn exact(
    q: ArrayView4<f32>,
    k: ArrayView4<f32>,
    v: ArrayView4<f32>,
    scale: f32,
    visible: &Visible,
) -> Result<Attended> {
    let Sizes { batch, heads, shared, queries, keys, value_dim } = check(q, k, v, visible)?;
    if !scale.is_finite() {
        return Err(Error::expected("scale of the scores", scale, "a finite number"));
    }
    let mut output = large_zeros((batch * heads, queries, value_dim));
    let mut log_sum_exp = Array2::from_elem((batch * heads, queries), f32::NEG_INFINITY);
    let mut tasks = tasks(&mut output, &mut log_sum_exp, QUERIES);
    let work = |(head, first, output, lse): Task| {
        let (b, h) = (head / heads, head % heads);
        let q = q.slice(s![b, h, first..first + lse.len(), ..]);
        let (k, v) = (k.slice(s![b, h / shared, .., ..]), v.slice(s![b, h / shared, .., ..]));
        attend(q, k, v, scale, &Hidden { visible: *visible, batch: b, first }, output, lse);
    };
    if batch * heads * queries * keys * (q.dim().3 + value_dim) < PARALLEL_FROM {
        tasks.into_iter().for_each(work);
    } else {
        // The last queries of a causal attention see the most keys: those first.
        tasks.sort_by_key(|task| std::cmp::Reverse(task.1));
        in_pool(|| on_all_threads(tasks, work));
    }
    attended(output, log_sum_exp, (batch, heads))
}

/// What some queries of a sequence do not see.
pub(super) struct Hidden<'a> {
    pub visible: Visible<'a>,
    pub batch: usize,
    /// The first of the queries.
    pub first: usize,
}

impl Hidden<'_> {
    /// Keys below this may be seen by one of `queries`.
    pub fn end(&self, queries: usize, keys: usize) -> usize {
        if self.visible.causal { keys.min(self.first + queries) } else { keys }
    }

    /// Sets the scores of keys from `start` on that a query does not see to −∞.
    pub fn hide(&self, start: usize, scores: &mut ArrayViewMut2<f32>) {
        let keys = scores.ncols();
        if let Some(there) = self.visible.keys {
            let there = there.slice(s![self.batch, start..start + keys]);
            if !there.iter().all(|there| *there) {
                for mut row in scores.rows_mut() {
                    row.zip_mut_with(&there, |score, there| *score = if *there { *score } else { f32::NEG_INFINITY });
                }
            }
        }
        for (i, mut row) in scores.rows_mut().into_iter().enumerate() {
            let query = self.first + i;
            if let Some((of_queries, of_keys)) = self.visible.segments {
                let own = of_queries[[self.batch, query]];
                let others = of_keys.slice(s![self.batch, start..start + keys]);
                row.zip_mut_with(&others, |score, of| *score = if *of == own { *score } else { f32::NEG_INFINITY });
            }
            if self.visible.causal && query + 1 < start + keys {
                row.slice_mut(s![(query + 1).saturating_sub(start)..]).fill(f32::NEG_INFINITY);
            }
        }
    }
}

/// Some queries of one head, and all keys that they see.
pub(super) fn attend(
    q: ArrayView2<f32>,
    k: ArrayView2<f32>,
    v: ArrayView2<f32>,
    scale: f32,
    hidden: &Hidden,
    mut output: ArrayViewMut2<f32>,
    lse: ArrayViewMut1<f32>,
) {
    let queries = q.nrows();
    let end = hidden.end(queries, k.nrows());
    let mut scores = Array2::<f32>::zeros((queries, KEYS.min(end)));
    let mut running = vec![Running::default(); queries];
    for start in (0..end).step_by(KEYS) {
        let keys = start..end.min(start + KEYS);
        let scores = scores.slice_mut(s![.., ..keys.len()]);
        let tile = (q, k.slice(s![keys.clone(), ..]), v.slice(s![keys, ..]));
        add_keys(tile, scale, scores, |scores| hidden.hide(start, scores), output.view_mut(), &mut running);
    }
    finish(&running, output, lse);
}
