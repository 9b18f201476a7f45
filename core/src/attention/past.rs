//! What a causal attention by codes keeps of the tokens that it has seen.

use std::ops::Range;

use ndarray::{Array3, Array4, ArrayView1, ArrayView2, ArrayView3, ArrayView4, ArrayViewMut1, ArrayViewMut2, Axis, s};

use crate::error::{Error, Result};

/// What is left of keys and values that were seen: of each code their number and the mean of the values, and the last
/// `mem_len` tokens by themselves, which are not among those.
#[derive(Debug, Clone, PartialEq)]
pub struct Past {
    /// `[batch, heads, codes]`
    pub counts: Array3<f32>,
    /// `[batch, heads, codes, value dim]`; zeros where the count is 0.
    pub means: Array4<f32>,
    /// Codes of the last tokens' keys, `[batch, heads, at most mem_len]`.
    pub recent_codes: Array3<u32>,
    /// Their values, `[batch, heads, at most mem_len, value dim]`.
    pub recent_values: Array4<f32>,
}

impl Past {
    /// Of nothing.
    pub fn new(batch: usize, heads: usize, codes: usize, value_dim: usize) -> Self {
        Past {
            counts: Array3::zeros((batch, heads, codes)),
            means: Array4::zeros((batch, heads, codes, value_dim)),
            recent_codes: Array3::zeros((batch, heads, 0)),
            recent_values: Array4::zeros((batch, heads, 0, value_dim)),
        }
    }

    /// # Errors
    /// When the sizes are not `[batch, heads, codes, value dim]` or do not fit each other, or codes, counts or values are
    /// none.
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
                "shapes of the past's means, counts, recent codes and values",
                format!("{found:?}"),
                format!("[batch, heads, codes, value dim] {expected:?}, and what fits it"),
            ));
        }
        crate::linalg::require_finite("the past's means", self.means.iter())?;
        crate::linalg::require_finite("the past's values", self.recent_values.iter())?;
        if let Some(count) = self.counts.iter().find(|count| !(count.is_finite() && **count >= 0.0)) {
            return Err(Error::expected("a count of the past", count, "a number of keys"));
        }
        match self.recent_codes.iter().find(|code| **code as usize >= codes) {
            Some(code) => Err(Error::expected("a code of the past", code, format!("below {codes}"))),
            None => Ok(()),
        }
    }

    /// Adds these of some tokens to the counts and means, all heads'.
    pub(super) fn add(&mut self, codes: ArrayView3<u32>, values: ArrayView4<f32>, tokens: Range<usize>) {
        let (batch, heads, _) = codes.dim();
        for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            let (counts, means) = (self.counts.slice_mut(s![b, h, ..]), self.means.slice_mut(s![b, h, .., ..]));
            let (codes, values) = (codes.slice(s![b, h, tokens.clone()]), values.slice(s![b, h, tokens.clone(), ..]));
            add(counts, means, codes, values, None);
        }
    }

    /// These tokens are the last ones now.
    pub(super) fn keep(&mut self, codes: ArrayView3<u32>, values: ArrayView4<f32>, tokens: Range<usize>) {
        self.recent_codes = codes.slice_axis(Axis(2), tokens.clone().into()).to_owned();
        self.recent_values = values.slice_axis(Axis(2), tokens.into()).to_owned();
    }
}

/// Adds values of some codes to their means.
pub(super) fn add(
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
        means.row_mut(code as usize).zip_mut_with(&value, |mean, value| *mean += (value - *mean) * share);
    }
}
