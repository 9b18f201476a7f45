//! The state that causal attention by codes keeps of the tokens that it has seen.

use std::ops::Range;

use ndarray::{Array3, Array4, ArrayView1, ArrayView2, ArrayView3, ArrayView4, ArrayViewMut1, ArrayViewMut2, Axis, s};

use crate::error::{Error, Result};
use crate::linalg::require_finite;

/// A compressed key–value cache: per key code the number of keys and the mean of their values, and the last `mem_len` tokens
/// uncompressed, which are not among those.
///
/// Its size does not grow with the number of tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct CompressedCache {
    /// Number of keys of each code `[batch, heads, codes]`.
    pub counts: Array3<f32>,
    /// Mean value of each code `[batch, heads, codes, value dim]`; zeros where the count is 0.
    pub means: Array4<f32>,
    /// Codes of the last tokens' keys, `[batch, heads, at most mem_len]`.
    pub recent_codes: Array3<u32>,
    /// Values of the last tokens, `[batch, heads, at most mem_len, value dim]`.
    pub recent_values: Array4<f32>,
}

impl CompressedCache {
    /// Returns an empty cache for `batch` sequences.
    pub fn new(batch: usize, heads: usize, codes: usize, value_dim: usize) -> Self {
        CompressedCache {
            counts: Array3::zeros((batch, heads, codes)),
            means: Array4::zeros((batch, heads, codes, value_dim)),
            recent_codes: Array3::zeros((batch, heads, 0)),
            recent_values: Array4::zeros((batch, heads, 0, value_dim)),
        }
    }

    /// Checks that the cache has the sizes `[batch, heads, codes, value dim]` and holds valid codes, counts and values.
    ///
    /// # Errors
    /// When sizes differ or do not fit each other, a code is not below the number of codes, a count is no number of at least 0,
    /// or a value is not finite.
    pub fn check(&self, expected: (usize, usize, usize, usize)) -> Result<()> {
        let (batch, heads, codes, value_dim) = expected;
        let recent = self.recent_codes.dim().2;
        let fits = self.means.dim() == expected
            && self.counts.dim() == (batch, heads, codes)
            && self.recent_codes.dim() == (batch, heads, recent)
            && self.recent_values.dim() == (batch, heads, recent, value_dim);
        if !fits {
            let found =
                [self.means.shape(), self.counts.shape(), self.recent_codes.shape(), self.recent_values.shape()];
            return Err(Error::expected(
                "shapes of the cache's means, counts, recent codes and values",
                format!("{found:?}"),
                format!("[batch, heads, codes, value dim] {expected:?}, and what fits it"),
            ));
        }
        require_finite("the cache's means", self.means.iter())?;
        require_finite("the cache's recent values", self.recent_values.iter())?;
        if let Some(count) = self.counts.iter().find(|count| !(count.is_finite() && **count >= 0.0)) {
            return Err(Error::expected("a count of the cache", count, "a number of keys"));
        }
        match self.recent_codes.iter().find(|code| **code as usize >= codes) {
            Some(code) => Err(Error::expected("a code of the cache", code, format!("below {codes}"))),
            None => Ok(()),
        }
    }

    /// Adds a range of tokens of all heads, of these codes and values, to the counts and means.
    pub(super) fn add(&mut self, codes: ArrayView3<u32>, values: ArrayView4<f32>, tokens: Range<usize>) {
        let (batch, heads, _) = codes.dim();
        for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            let (counts, means) = (self.counts.slice_mut(s![b, h, ..]), self.means.slice_mut(s![b, h, .., ..]));
            let (codes, values) = (codes.slice(s![b, h, tokens.clone()]), values.slice(s![b, h, tokens.clone(), ..]));
            add_to_means(counts, means, codes, values, None);
        }
    }

    /// Makes a range of tokens the last ones.
    pub(super) fn set_recent(&mut self, codes: ArrayView3<u32>, values: ArrayView4<f32>, tokens: Range<usize>) {
        self.recent_codes = codes.slice_axis(Axis(2), tokens.clone().into()).to_owned();
        self.recent_values = values.slice_axis(Axis(2), tokens.into()).to_owned();
    }
}

/// Adds values of these codes to their running means, of one head; values where `there` is false are left out.
pub(super) fn add_to_means(
    mut counts: ArrayViewMut1<f32>,
    mut means: ArrayViewMut2<f32>,
    codes: ArrayView1<u32>,
    values: ArrayView2<f32>,
    there: Option<ArrayView1<bool>>,
) {
    for (i, (&code, value)) in codes.iter().zip(values.rows()).enumerate() {
        if there.is_some_and(|there| !there[i]) {
            continue;
        }
        let count = &mut counts[code as usize];
        *count += 1.0;
        let share = 1.0 / *count;
        let mut mean = means.row_mut(code as usize);
        match (mean.as_slice_mut(), value.as_slice()) {
            (Some(mean), Some(value)) => move_towards(mean, value, share),
            _ => mean.zip_mut_with(&value, |mean, value| *mean += (value - *mean) * share),
        }
    }
}

/// Moves a mean by this share of the way to a value.
#[inline(always)]
fn move_towards(mean: &mut [f32], value: &[f32], share: f32) {
    let value = &value[..mean.len()];
    for i in 0..mean.len() {
        mean[i] += (value[i] - mean[i]) * share;
    }
}
