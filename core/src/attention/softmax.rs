//! Softmaxes whose maximum is not known yet, some keys at a time.

use ndarray::{ArrayView2, ArrayViewMut1, ArrayViewMut2};

use crate::linalg::product_into;

/// The largest score so far, and Σ exp(score − largest).
#[derive(Debug, Clone, Copy)]
pub struct Running {
    pub most: f32,
    pub sum: f32,
}

impl Default for Running {
    fn default() -> Self {
        Running { most: f32::NEG_INFINITY, sum: 0.0 }
    }
}

impl Running {
    /// ln Σ exp(score) so far; NaN where a score was NaN or infinite.
    pub fn log_sum_exp(&self) -> f32 {
        if self.sum == 0.0 { f32::NEG_INFINITY } else { self.most + self.sum.ln() }
    }
}

/// Adds some keys' part to each query's: to `output` `[queries, value dim]` the values times exp(score − largest so far).
///
/// `scores` `[queries, keys]` is room for them, and `change` may do as it likes with what comes into it.
pub fn add_keys(
    (q, k, v): (ArrayView2<f32>, ArrayView2<f32>, ArrayView2<f32>),
    scale: f32,
    mut scores: ArrayViewMut2<f32>,
    change: impl FnOnce(&mut ArrayViewMut2<f32>),
    output: ArrayViewMut2<f32>,
    running: &mut [Running],
) {
    product_into(scores.view_mut(), q, k.reversed_axes(), scale, false);
    change(&mut scores);
    add_scored(scores, v, output, running);
}

/// [`add_keys`] where the scores are known: they are weights afterwards.
pub fn add_scored(
    mut scores: ArrayViewMut2<f32>,
    v: ArrayView2<f32>,
    mut output: ArrayViewMut2<f32>,
    running: &mut [Running],
) {
    for ((mut row, running), mut output) in scores.rows_mut().into_iter().zip(running).zip(output.rows_mut()) {
        let before = take(running, row.as_slice_mut().expect("rows of a tile are contiguous"));
        if before != 1.0 {
            output *= before;
        }
    }
    product_into(output, scores.view(), v, 1.0, true);
}

/// Room for a tile of scores in memory that is used again and again.
pub fn tile(room: &mut Vec<f32>, rows: usize, columns: usize) -> ArrayViewMut2<'_, f32> {
    if room.len() < rows * columns {
        room.resize(rows * columns, 0.0);
    }
    ArrayViewMut2::from_shape((rows, columns), &mut room[..rows * columns]).expect("as many as the shape has")
}

/// Divides what all keys gave by the sum of their weights; a query that has seen none gives zeros.
pub fn finish(running: &[Running], mut output: ArrayViewMut2<f32>, mut lse: ArrayViewMut1<f32>) {
    for ((running, mut output), lse) in running.iter().zip(output.rows_mut()).zip(&mut lse) {
        if running.sum > 0.0 {
            output /= running.sum;
        }
        *lse = running.log_sum_exp();
    }
}

/// Below this an exponential is nothing beside 1.
const LEAST: f32 = -87.0;

/// Adding and subtracting it rounds to the nearest whole number.
const TO_WHOLE: f32 = 12_582_912.0;

/// Turns further `scores` into exp(score − largest), and gives what everything before has to be multiplied with: the
/// largest score may be another now. Scores of −∞ become 0.
pub fn take(running: &mut Running, scores: &mut [f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature is there.
            return unsafe { take_avx512(running, scores) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the feature is there.
            return unsafe { take_avx2(running, scores) };
        }
    }
    taken(running, scores)
}

/// The same, compiled for wider registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn take_avx512(running: &mut Running, scores: &mut [f32]) -> f32 {
    taken(running, scores)
}

/// The same, compiled for wider registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn take_avx2(running: &mut Running, scores: &mut [f32]) -> f32 {
    taken(running, scores)
}

#[inline(always)]
fn taken(running: &mut Running, scores: &mut [f32]) -> f32 {
    // Sixteen at a time: one would wait for itself.
    let (lines, rest) = scores.as_chunks_mut::<16>();
    let mut most = [running.most; 16];
    for line in &*lines {
        most.iter_mut().zip(line).for_each(|(most, score)| *most = if *score > *most { *score } else { *most });
    }
    let most = most.iter().chain(&*rest).fold(running.most, |most, score| most.max(*score));
    if most == f32::NEG_INFINITY {
        scores.fill(0.0);
        return 1.0;
    }
    let before = if running.most == f32::NEG_INFINITY { 0.0 } else { exp(running.most - most) };
    let mut sums = [0f32; 16];
    for line in lines {
        for (score, sum) in line.iter_mut().zip(&mut sums) {
            *score = exp(*score - most);
            *sum += *score;
        }
    }
    let mut sum = sums.iter().sum::<f32>();
    for score in rest {
        *score = exp(*score - most);
        sum += *score;
    }
    *running = Running { most, sum: running.sum * before + sum };
    before
}

/// e^x for x ≤ 0, within two units of the last place; 0 below [`LEAST`]. Cephes' polynomial, without a branch.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // NaN stays what it is.
    let bounded = if x <= LEAST { LEAST } else { x };
    let shifted = bounded * std::f32::consts::LOG2_E + TO_WHOLE;
    let whole = shifted - TO_WHOLE;
    // ln 2 in two parts, the first of which has few bits.
    let r = (bounded - whole * 0.693_359_4) + whole * 2.121_944_4e-4;
    let p = ((((1.987_569_1e-4 * r + 1.398_199_9e-3) * r + 8.333_452e-3) * r + 4.166_579_6e-2) * r + 1.666_666_5e-1)
        * r
        + 0.5;
    let fraction = p * (r * r) + r + 1.0;
    // The lowest bits of the shifted number are the whole one, which goes into the exponent.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x <= LEAST { 0.0 } else { fraction * power }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn exponentials_are_close() {
        for i in 0..200_000 {
            let x = -i as f32 * (86.9 / 200_000.0);
            let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((found - expected).abs() <= 3e-7 * expected, "{x}: {found} for {expected}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-90.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    proptest! {
        /// Pieces give what the whole does, whatever their order of size and where nothing is visible.
        #[test]
        fn pieces_are_the_whole(scores in proptest::collection::vec(-60f32..60.0, 1..90), cut in 0usize..90, hidden in 0usize..5) {
            let mut scores = scores;
            scores.iter_mut().step_by(hidden + 1).skip(1).for_each(|s| *s = f32::NEG_INFINITY);
            let cut = cut.min(scores.len());
            let (mut first, mut second) = (scores[..cut].to_vec(), scores[cut..].to_vec());
            let mut running = Running::default();
            let unused = take(&mut running, &mut first);
            prop_assert!(unused == 0.0 || unused == 1.0);
            let before = take(&mut running, &mut second);
            let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = scores.iter().map(|s| f64::from(s - most).exp()).sum();
            prop_assert!((f64::from(running.sum) - sum).abs() < 1e-5 * sum);
            prop_assert!((f64::from(running.log_sum_exp()) - (f64::from(most) + sum.ln())).abs() < 1e-4);
            let all = first.iter().map(|p| p * before).chain(second);
            for (found, score) in all.zip(&scores) {
                prop_assert!((f64::from(found) - f64::from(score - most).exp()).abs() < 1e-6);
            }
        }
    }
}
