//! The sizes of queries, keys and values, checked against each other.

use ndarray::{Array4, ArrayView4, s};

use super::mask::AttentionMask;
use crate::error::{Error, Result};
use crate::linalg::require_finite;

/// Sizes of queries, keys and values that belong together.
#[derive(Debug, Clone, Copy)]
pub(super) struct AttentionShape {
    pub batch: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Consecutive query heads that share one head of keys and values.
    pub group: usize,
    pub queries: usize,
    pub keys: usize,
    /// Length of a value.
    pub value_dim: usize,
}

impl AttentionShape {
    /// Returns the sizes of queries `[batch, heads, queries, dim]`, keys `[batch, kv heads, keys, dim]` and values
    /// `[batch, kv heads, keys, value dim]`.
    ///
    /// # Errors
    /// When shapes, or those of the mask, do not fit each other, a causal attention has more queries than keys, or a number is
    /// not finite.
    pub fn of(
        q: ArrayView4<f32>,
        k: ArrayView4<f32>,
        v: ArrayView4<f32>,
        mask: &AttentionMask,
    ) -> Result<AttentionShape> {
        let ((batch, heads, queries, dim), (k_batch, k_heads, keys, k_dim)) = (q.dim(), k.dim());
        let (v_batch, v_heads, values, value_dim) = v.dim();
        if (k_batch, k_dim) != (batch, dim) || k_heads == 0 || !heads.is_multiple_of(k_heads) {
            return Err(Error::expected(
                "shape of the keys, [batch, heads, tokens, dim]",
                format!("{:?}", k.shape()),
                format!("[{batch}, a divisor of {heads}, any, {dim}], as the queries are {:?}", q.shape()),
            ));
        }
        if (v_batch, v_heads, values) != (batch, k_heads, keys) {
            let expected = format!("[{batch}, {k_heads}, {keys}, any], as the keys are {:?}", k.shape());
            return Err(Error::expected("shape of the values", format!("{:?}", v.shape()), expected));
        }
        check_mask(mask, batch, queries, keys)?;
        if mask.causal && queries > keys {
            return Err(Error::expected(
                "queries of a causal attention",
                format!("{queries} for {keys} keys"),
                "no more than keys: the last query is at the last key",
            ));
        }
        for (what, array) in [("the queries", q), ("the keys", k), ("the values", v)] {
            require_finite(what, array.iter())?;
        }
        Ok(AttentionShape { batch, heads, group: heads / k_heads, queries, keys, value_dim })
    }
}

impl AttentionShape {
    /// Returns the position of the first query of a causal attention among the keys: the last query is at the last key.
    pub fn offset(&self) -> usize {
        self.keys.saturating_sub(self.queries)
    }
}

/// Puts queries of nothing before queries `[batch, heads, queries, dim]`, so that there are as many as keys and each is at its key's
/// position; `None` where there are.
pub(super) fn aligned(q: ArrayView4<f32>, keys: usize) -> Option<Array4<f32>> {
    let (batch, heads, queries, dim) = q.dim();
    if queries >= keys {
        return None;
    }
    let mut all = Array4::zeros((batch, heads, keys, dim));
    all.slice_mut(s![.., .., keys - queries.., ..]).assign(&q);
    Some(all)
}

fn check_mask(mask: &AttentionMask, batch: usize, queries: usize, keys: usize) -> Result<()> {
    let fits = |what: &str, found: &[usize], tokens: usize| match found == [batch, tokens] {
        true => Ok(()),
        false => Err(Error::expected(format!("shape of {what}"), format!("{found:?}"), format!("[{batch}, {tokens}]"))),
    };
    if let Some(there) = mask.keys {
        fits("the keys' mask", there.shape(), keys)?;
    }
    if let Some((of_queries, of_keys)) = mask.segments {
        fits("the queries' segments", of_queries.shape(), queries)?;
        fits("the keys' segments", of_keys.shape(), keys)?;
    }
    Ok(())
}

/// Refuses a scale of the scores that is not finite.
pub(super) fn check_scale(scale: f32) -> Result<()> {
    match scale.is_finite() {
        true => Ok(()),
        false => Err(Error::expected("scale of the scores", scale, "a finite number")),
    }
}
