//! The result of attention, and its division into tiles of queries that threads write independently.

use ndarray::{Array2, Array3, Array4, ArrayViewMut1, ArrayViewMut2, Axis, ShapeError, s};

use crate::error::{Error, Result};

/// The result of an attention.
#[derive(Debug, Clone)]
pub struct AttentionOutput {
    /// Means of the values `[batch, heads, queries, value dim]`; zeros for a query that sees no key.
    pub output: Array4<f32>,
    /// ln Σ exp(score) over the keys that a query sees, `[batch, heads, queries]`; −∞ where it sees none.
    pub log_sum_exp: Array3<f32>,
}

impl AttentionOutput {
    /// Returns the result of the last `queries` queries.
    pub(super) fn of_last(self, queries: usize) -> AttentionOutput {
        let first = self.output.dim().2 - queries;
        AttentionOutput {
            output: self.output.slice(s![.., .., first.., ..]).to_owned(),
            log_sum_exp: self.log_sum_exp.slice(s![.., .., first..]).to_owned(),
        }
    }

    /// Builds the result from outputs `[batch · heads, queries, value dim]` and ln Σ exp(score) `[batch · heads, queries]`.
    ///
    /// # Errors
    /// When scores were beyond what f32 holds.
    pub(super) fn from_heads(
        output: Array3<f32>,
        log_sum_exp: Array2<f32>,
        (batch, heads): (usize, usize),
    ) -> Result<AttentionOutput> {
        if let Some(found) = log_sum_exp.iter().find(|lse| lse.is_nan() || **lse == f32::INFINITY) {
            return Err(Error::Numeric(format!(
                "the scores of attention are beyond what f32 holds: ln Σ exp(score) is {found}"
            )));
        }
        let shape = |e: ShapeError| Error::Numeric(e.to_string());
        let (_, queries, value_dim) = output.dim();
        Ok(AttentionOutput {
            output: output.into_shape_with_order((batch, heads, queries, value_dim)).map_err(shape)?,
            log_sum_exp: log_sum_exp.into_shape_with_order((batch, heads, queries)).map_err(shape)?,
        })
    }
}

/// Consecutive queries of one head, and where their results go.
pub(super) struct QueryTile<'a> {
    /// Sequence and head in one number: `sequence · heads + head`.
    pub head: usize,
    /// Position of the first query.
    pub first: usize,
    /// `[queries, value dim]`
    pub output: ArrayViewMut2<'a, f32>,
    /// `[queries]`
    pub log_sum_exp: ArrayViewMut1<'a, f32>,
}

/// Divides outputs `[batch · heads, queries, value dim]` and `[batch · heads, queries]` into tiles of at most `tile` queries.
pub(super) fn query_tiles<'a>(
    output: &'a mut Array3<f32>,
    log_sum_exp: &'a mut Array2<f32>,
    tile: usize,
) -> Vec<QueryTile<'a>> {
    let mut tiles = vec![];
    for (head, (mut output, mut lse)) in output.outer_iter_mut().zip(log_sum_exp.outer_iter_mut()).enumerate() {
        let queries = lse.len();
        for first in (0..queries).step_by(tile) {
            let count = tile.min(queries - first);
            let (some, some_lse);
            (some, output) = output.split_at(Axis(0), count);
            (some_lse, lse) = lse.split_at(Axis(0), count);
            tiles.push(QueryTile { head, first, output: some, log_sum_exp: some_lse });
        }
    }
    tiles
}
