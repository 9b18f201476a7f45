//! The threshold that an expected number of keys reach.

use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};

use super::limit::{Ranking, Sides};
use super::search::rank_value;
use crate::error::{Error, Result};
use crate::linalg::{normal_pdf, normal_quantile, normal_survival};

/// Largest number of tokens that a calibration curve is measured on, evenly spaced: its quantiles settle long before all tokens
/// are used.
const CURVE_TOKENS: usize = 1024;

/// AXL's methods of choosing a score threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ThresholdMethod {
    /// The standard normal's upper quantile at expected/total: this many keys pass, one-sided, on average.
    #[default]
    Quantile,
    /// 0.5, whatever is asked for.
    Fixed,
    /// expected/total itself, within 0.1 and 0.9.
    Adaptive,
}

/// Returns a score threshold as AXL's `compute_search_threshold` does; the probability is kept 1e-12 away from 0 and 1.
///
/// It is for comparison with AXL. A layer uses the two-sided form of [`ThresholdMethod::Quantile`], the form for contributions,
/// or the quantiles of its calibration inputs.
///
/// # Errors
/// When there are no keys, or the number expected is negative, not a number, or above the total.
pub fn search_threshold(method: ThresholdMethod, expected: f64, total: usize) -> Result<f64> {
    if total == 0 || !(0.0..=total as f64).contains(&expected) {
        return Err(Error::expected(
            "expected keys",
            format!("{expected} of {total}"),
            "a number between 0 and the total, which is at least 1",
        ));
    }
    let share = expected / total as f64;
    Ok(match method {
        ThresholdMethod::Quantile => normal_quantile((1.0 - share).clamp(1e-12, 1.0 - 1e-12)),
        ThresholdMethod::Fixed => 0.5,
        ThresholdMethod::Adaptive => share.clamp(0.1, 0.9),
    })
}

/// Returns the threshold that `expected` keys reach on average, at most all of them: over the calibration inputs where there are
/// any, else for standard normal scores.
pub fn expecting(expected: f64, scales: &[f32], curves: Option<&Curves>, ranking: Ranking, sides: Sides) -> f32 {
    let keys = scales.len() as f64;
    if expected >= keys && sides == Sides::Both {
        return 0.0;
    }
    match curves {
        Some(curves) => curves.threshold(expected.min(keys), ranking, sides),
        None => gaussian(scales, expected.min(keys), ranking, sides),
    }
}

/// Returns the threshold that `expected` keys reach when every score is standard normal.
///
/// By score: Φ⁻¹(1 − K/2r), one-sided Φ⁻¹(1 − K/r). By contribution: the root of Σ 2(1 − Φ(t/s_i)) = K, one-sided
/// Σ (1 − Φ(t/s_i)) = K.
fn gaussian(scales: &[f32], expected: f64, ranking: Ranking, sides: Sides) -> f32 {
    let keys = scales.len() as f64;
    let doubled = if sides == Sides::Both { 2.0 } else { 1.0 };
    match ranking {
        Ranking::Score => normal_quantile(1.0 - expected / (doubled * keys)) as f32,
        Ranking::Contribution => {
            let largest = scales.iter().fold(0f64, |m, &s| m.max(s.into()));
            let low = if sides == Sides::Both { 0.0 } else { -40.0 * largest };
            // How many more than K pass, and how fast that falls.
            let excess = |t: f64| {
                scales.iter().fold((-expected, 0.0), |(hits, slope), &s| {
                    let s = f64::from(s).max(f64::MIN_POSITIVE);
                    (hits + doubled * normal_survival(t / s), slope - doubled * normal_pdf(t / s) / s)
                })
            };
            falling_root(low, 40.0 * largest, excess) as f32
        }
    }
}

/// Returns where a falling function, given with its derivative, is zero between `low` and `high`: by Newton's method, and by
/// bisection where a step leaves the bracket or is too short.
fn falling_root(mut low: f64, mut high: f64, value_and_slope: impl Fn(f64) -> (f64, f64)) -> f64 {
    let mut at = 0.5 * (low + high);
    let mut last = high - low;
    for _ in 0..200 {
        let (value, slope) = value_and_slope(at);
        if value > 0.0 {
            low = at
        } else {
            high = at
        }
        let newton = at - value / slope;
        let next =
            if newton > low && newton < high && (newton - at).abs() < 0.5 * last { newton } else { 0.5 * (low + high) };
        last = (next - at).abs();
        // f32 is what the caller keeps.
        if last <= 1e-12 * high.abs() {
            return next;
        }
        at = next;
    }
    at
}

/// Thresholds that were measured on calibration inputs: entry `k − 1` of a row is the one that `k` keys reach on average.
#[derive(Debug, Clone, PartialEq)]
pub struct Curves {
    /// `[4, keys]`: contribution both, contribution positive, score both, score positive.
    pub thresholds: Array2<f32>,
}

impl Curves {
    /// Measures the thresholds on the scores of calibration inputs, `[tokens, keys]`.
    pub fn measure(scores: ArrayView2<f32>, scales: &[f32]) -> Self {
        let keys = scales.len();
        let step = scores.nrows().div_ceil(CURVE_TOKENS).max(1);
        let rows: Vec<_> = scores.rows().into_iter().step_by(step).collect();
        let mut thresholds = Array2::zeros((4, keys));
        let mut values = Vec::with_capacity(rows.len() * keys);
        for (curve, (ranking, sides)) in KINDS.into_iter().enumerate() {
            values.clear();
            for row in &rows {
                values.extend(row.iter().zip(scales).map(|(&score, &scale)| rank_value(score, scale, ranking, sides)));
            }
            values.sort_unstable_by(|a, b| b.total_cmp(a));
            for k in 1..=keys {
                thresholds[[curve, k - 1]] = values[k * rows.len() - 1];
            }
        }
        Curves { thresholds }
    }

    /// Returns the threshold that `expected` keys reach, by linear interpolation between whole numbers of keys.
    pub fn threshold(&self, expected: f64, ranking: Ranking, sides: Sides) -> f32 {
        let kind = KINDS.iter().position(|k| *k == (ranking, sides)).expect("KINDS lists every pair");
        let row = self.thresholds.row(kind);
        let position = (expected - 1.0).clamp(0.0, (row.len() - 1) as f64);
        let (low, part) = (position.floor() as usize, position.fract());
        let high = (low + 1).min(row.len() - 1);
        (f64::from(row[low]) * (1.0 - part) + f64::from(row[high]) * part) as f32
    }
}

const KINDS: [(Ranking, Sides); 4] = [
    (Ranking::Contribution, Sides::Both),
    (Ranking::Contribution, Sides::Positive),
    (Ranking::Score, Sides::Both),
    (Ranking::Score, Sides::Positive),
];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// At the threshold, the expected number of normal scores passes.
        #[test]
        fn gaussian_threshold_expects_k(scales in proptest::collection::vec(0.01f32..5.0, 2..40), share in 0.02f64..0.98) {
            let expected = share * scales.len() as f64;
            for (ranking, sides) in KINDS {
                let t = f64::from(gaussian(&scales, expected, ranking, sides));
                let doubled = if sides == Sides::Both { 2.0 } else { 1.0 };
                let passing: f64 = scales.iter().map(|&s| {
                    let unit = if ranking == Ranking::Score { 1.0 } else { f64::from(s) };
                    doubled * normal_survival(t / unit)
                }).sum();
                prop_assert!((passing - expected).abs() < 1e-3 * expected.max(1.0), "{:?} {:?}: {} for {}", ranking, sides, passing, expected);
            }
        }

        /// On the inputs it was measured on, the curve lets k keys through on average.
        #[test]
        fn curve_lets_k_through(tokens in 1usize..20, keys in 1usize..12, seed in 0u32..1000) {
            let scores = Array2::from_shape_fn((tokens, keys), |(i, j)| ((i * 7919 + j * 104_729 + seed as usize * 31) % 1009) as f32 / 500.0 - 1.0);
            let scales: Vec<f32> = (0..keys).map(|j| 1.0 + j as f32 * 0.37).collect();
            let curves = Curves::measure(scores.view(), &scales);
            for (ranking, sides) in KINDS {
                for k in 1..=keys {
                    let t = curves.threshold(k as f64, ranking, sides);
                    let passing = scores.indexed_iter().filter(|((_, j), s)| rank_value(**s, scales[*j], ranking, sides) >= t).count();
                    // Ties at the threshold may let more through.
                    prop_assert!(passing >= k * tokens);
                }
            }
        }
    }
}
