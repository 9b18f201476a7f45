//! Softmaxes over keys that come a tile at a time (online softmax: Milakov and Gimelshein, 2018; FlashAttention).

use ndarray::{ArrayView2, ArrayViewMut1, ArrayViewMut2};

use crate::linalg::{exp, product_into};

/// The state of one query's softmax over the scores so far.
#[derive(Debug, Clone, Copy)]
pub struct OnlineSoftmax {
    /// The largest score.
    pub max: f32,
    /// Σ exp(score − max).
    pub sum: f32,
}

impl Default for OnlineSoftmax {
    fn default() -> Self {
        OnlineSoftmax { max: f32::NEG_INFINITY, sum: 0.0 }
    }
}

impl OnlineSoftmax {
    /// Returns ln Σ exp(score) so far; NaN where a score was NaN or infinite.
    pub fn log_sum_exp(&self) -> f32 {
        if self.sum == 0.0 { f32::NEG_INFINITY } else { self.max + self.sum.ln() }
    }

    /// Turns further `scores` into exp(score − max), where max is the largest score by then, and returns the factor for everything
    /// that was weighed before, since the largest score may be another now. Scores of −∞ become 0.
    pub fn update(&mut self, scores: &mut [f32]) -> f32 {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                // SAFETY: the feature is there.
                return unsafe { update_avx512(self, scores) };
            }
            if is_x86_feature_detected!("avx2") {
                // SAFETY: the feature is there.
                return unsafe { update_avx2(self, scores) };
            }
        }
        update_lanes(self, scores)
    }
}

/// Adds a tile of keys to each query's softmax, and to `output` `[queries, value dim]` the values times exp(score − max).
///
/// `scores` `[queries, keys]` is scratch memory: it receives scale · q kᵀ, which `modify` may change, for a mask or a bias, before
/// the softmax is taken.
pub fn accumulate(
    (q, k, v): (ArrayView2<f32>, ArrayView2<f32>, ArrayView2<f32>),
    scale: f32,
    mut scores: ArrayViewMut2<f32>,
    modify: impl FnOnce(&mut ArrayViewMut2<f32>),
    output: ArrayViewMut2<f32>,
    softmax: &mut [OnlineSoftmax],
) {
    product_into(scores.view_mut(), q, k.reversed_axes(), scale, false);
    modify(&mut scores);
    accumulate_scores(scores, v, output, softmax);
}

/// Does what [`accumulate`] does with scores that are known; they hold exp(score − max) afterwards.
pub fn accumulate_scores(
    mut scores: ArrayViewMut2<f32>,
    v: ArrayView2<f32>,
    mut output: ArrayViewMut2<f32>,
    softmax: &mut [OnlineSoftmax],
) {
    for ((mut row, softmax), mut output) in scores.rows_mut().into_iter().zip(softmax).zip(output.rows_mut()) {
        let before = softmax.update(row.as_slice_mut().expect("rows of a tile are contiguous"));
        if before != 1.0 {
            output *= before;
        }
    }
    product_into(output, scores.view(), v, 1.0, true);
}

/// Returns `[rows, columns]` of scratch memory, which grows where it is too small.
pub fn scratch_tile(scratch: &mut Vec<f32>, rows: usize, columns: usize) -> ArrayViewMut2<'_, f32> {
    if scratch.len() < rows * columns {
        scratch.resize(rows * columns, 0.0);
    }
    ArrayViewMut2::from_shape((rows, columns), &mut scratch[..rows * columns]).expect("as many as the shape has")
}

/// Divides each query's `output` by the sum of its weights and writes its ln Σ exp(score); a query that has seen no key has zeros
/// and −∞.
pub fn finish(softmax: &[OnlineSoftmax], mut output: ArrayViewMut2<f32>, mut log_sum_exp: ArrayViewMut1<f32>) {
    for ((softmax, mut output), lse) in softmax.iter().zip(output.rows_mut()).zip(&mut log_sum_exp) {
        if softmax.sum > 0.0 {
            output /= softmax.sum;
        }
        *lse = softmax.log_sum_exp();
    }
}

/// Scores that are taken at a time: one running sum would wait for itself.
const LANES: usize = 16;

/// [`update_lanes`], compiled for wider registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn update_avx512(softmax: &mut OnlineSoftmax, scores: &mut [f32]) -> f32 {
    update_lanes(softmax, scores)
}

/// [`update_lanes`], compiled for wider registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn update_avx2(softmax: &mut OnlineSoftmax, scores: &mut [f32]) -> f32 {
    update_lanes(softmax, scores)
}

/// The body of [`OnlineSoftmax::update`]. Its loops are plain, and what they call is inlined whatever the build's settings are.
#[inline(always)]
fn update_lanes(softmax: &mut OnlineSoftmax, scores: &mut [f32]) -> f32 {
    let (lines, rest) = scores.as_chunks_mut::<LANES>();
    let mut maxima = [softmax.max; LANES];
    for line in &*lines {
        for lane in 0..LANES {
            maxima[lane] = if line[lane] > maxima[lane] { line[lane] } else { maxima[lane] };
        }
    }
    let mut max = softmax.max;
    for lane in maxima {
        max = max.max(lane);
    }
    for score in &*rest {
        max = max.max(*score);
    }
    if max == f32::NEG_INFINITY {
        scores.fill(0.0);
        return 1.0;
    }
    let before = if softmax.max == f32::NEG_INFINITY { 0.0 } else { exp(softmax.max - max) };
    let mut sums = [0f32; LANES];
    for line in lines {
        for lane in 0..LANES {
            line[lane] = exp(line[lane] - max);
            sums[lane] += line[lane];
        }
    }
    let mut sum = 0f32;
    for lane in sums {
        sum += lane;
    }
    for score in rest {
        *score = exp(*score - max);
        sum += *score;
    }
    *softmax = OnlineSoftmax { max, sum: softmax.sum * before + sum };
    before
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Pieces give what the whole does, whatever their order of size and where nothing is visible.
        #[test]
        fn pieces_are_the_whole(scores in proptest::collection::vec(-60f32..60.0, 1..90), cut in 0usize..90, hidden in 0usize..5) {
            let mut scores = scores;
            scores.iter_mut().step_by(hidden + 1).skip(1).for_each(|s| *s = f32::NEG_INFINITY);
            let cut = cut.min(scores.len());
            let (mut first, mut second) = (scores[..cut].to_vec(), scores[cut..].to_vec());
            let mut softmax = OnlineSoftmax::default();
            let unused = softmax.update(&mut first);
            prop_assert!(unused == 0.0 || unused == 1.0);
            let before = softmax.update(&mut second);
            let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = scores.iter().map(|s| f64::from(s - most).exp()).sum();
            prop_assert!((f64::from(softmax.sum) - sum).abs() < 1e-5 * sum);
            prop_assert!((f64::from(softmax.log_sum_exp()) - (f64::from(most) + sum.ln())).abs() < 1e-4);
            let all = first.iter().map(|p| p * before).chain(second);
            for (found, score) in all.zip(&scores) {
                prop_assert!((f64::from(found) - f64::from(score - most).exp()).abs() < 1e-6);
            }
        }
    }
}
