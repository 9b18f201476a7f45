//! Attention: what each query gives is the mean of the values, weighed by the softmax of its products with the keys.
//!
//! Arrays are `[batch, heads, tokens, dim]`, f32. Queries may have a whole multiple of the keys' heads: that many heads of
//! queries in a row share one of keys and values (grouped-query attention). Key j is visible to query i of a causal
//! attention where j ≤ i.

mod codebook;
mod exact;
mod gradients;
mod hyper;
mod past;
mod softmax;
mod vector_quantized;

use ndarray::{Array2, Array3, Array4, ArrayView2, ArrayView4, ArrayViewMut1, ArrayViewMut2, Axis, ShapeError};

pub use codebook::{Codebook, Learned};
pub use exact::exact;
pub use gradients::{AttentionGradients, exact_gradients};
pub use hyper::{Draws, Hyper};
pub use past::Past;
pub use vector_quantized::{Quantized, RelativeBias};

use crate::error::{Error, Result};
use crate::linalg::require_finite;

/// Which keys a query sees.
#[derive(Debug, Clone, Copy, Default)]
pub struct Visible<'a> {
    /// No key behind the query.
    pub causal: bool,
    /// Keys `[batch, keys]` that are there; the others are padding, which no query sees.
    pub keys: Option<ArrayView2<'a, bool>>,
    /// The documents that queries `[batch, queries]` and keys `[batch, keys]` are of: none sees another's.
    pub segments: Option<(ArrayView2<'a, u32>, ArrayView2<'a, u32>)>,
}

/// What attention gives.
#[derive(Debug, Clone)]
pub struct Attended {
    /// `[batch, heads, queries, value dim]`; zeros for a query that sees no key.
    pub output: Array4<f32>,
    /// ln Σ exp(score) over the keys that a query sees, `[batch, heads, queries]`; −∞ where it sees none.
    pub log_sum_exp: Array3<f32>,
}

/// Sizes that fit each other.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    batch: usize,
    heads: usize,
    /// Heads of queries that share one of keys.
    shared: usize,
    queries: usize,
    keys: usize,
    value_dim: usize,
}

fn check(q: ArrayView4<f32>, k: ArrayView4<f32>, v: ArrayView4<f32>, visible: &Visible) -> Result<Sizes> {
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
    let fits = |what: &str, found: &[usize], tokens: usize| match found == [batch, tokens] {
        true => Ok(()),
        false => Err(Error::expected(format!("shape of {what}"), format!("{found:?}"), format!("[{batch}, {tokens}]"))),
    };
    if let Some(there) = visible.keys {
        fits("the keys' mask", there.shape(), keys)?;
    }
    if let Some((of_queries, of_keys)) = visible.segments {
        fits("the queries' segments", of_queries.shape(), queries)?;
        fits("the keys' segments", of_keys.shape(), keys)?;
    }
    for (what, array) in [("the queries", q), ("the keys", k), ("the values", v)] {
        require_finite(what, array.iter())?;
    }
    Ok(Sizes { batch, heads, shared: heads / k_heads, queries, keys, value_dim })
}

/// Some queries of a head of a sequence, both in one number; the first of them; their outputs.
type Task<'a> = (usize, usize, ArrayViewMut2<'a, f32>, ArrayViewMut1<'a, f32>);

/// Outputs `[batch · heads, queries, value dim]` and `[batch · heads, queries]` in shares of queries.
fn tasks<'a>(output: &'a mut Array3<f32>, log_sum_exp: &'a mut Array2<f32>, share: usize) -> Vec<Task<'a>> {
    let mut tasks = vec![];
    for (head, (mut output, mut lse)) in output.outer_iter_mut().zip(log_sum_exp.outer_iter_mut()).enumerate() {
        let queries = lse.len();
        for first in (0..queries).step_by(share) {
            let count = share.min(queries - first);
            let (some, some_lse);
            (some, output) = output.split_at(Axis(0), count);
            (some_lse, lse) = lse.split_at(Axis(0), count);
            tasks.push((head, first, some, some_lse));
        }
    }
    tasks
}

/// The outputs of all heads, if scores have been within what f32 holds.
fn attended(output: Array3<f32>, log_sum_exp: Array2<f32>, (batch, heads): (usize, usize)) -> Result<Attended> {
    if let Some(found) = log_sum_exp.iter().find(|lse| lse.is_nan() || **lse == f32::INFINITY) {
        return Err(Error::Numeric(format!(
            "the scores of attention are beyond what f32 holds: ln Σ exp(score) is {found}"
        )));
    }
    let shape = |e: ShapeError| Error::Numeric(e.to_string());
    let (_, queries, value_dim) = output.dim();
    Ok(Attended {
        output: output.into_shape_with_order((batch, heads, queries, value_dim)).map_err(shape)?,
        log_sum_exp: log_sum_exp.into_shape_with_order((batch, heads, queries)).map_err(shape)?,
    })
}

#[cfg(test)]
mod tests;
