//! Gradients of a loss through attention, a tile at a time (as FlashAttention's backward pass), and straight through
//! codewords to the vectors that they stand for.

use ndarray::{Array2, Array3, Array4, ArrayView4, ShapeError, s};

use super::exact::{Hidden, QUERIES};
use super::vector_quantized::gathered;
use super::{Codebook, Quantized, Visible, check, exact};
use crate::error::{Error, Result};
use crate::linalg::{in_pool, on_all_threads, product_into, require_finite};

/// Gradients with respect to queries, keys and values, in their shapes.
#[derive(Debug, Clone)]
pub struct AttentionGradients {
    pub q: Array4<f32>,
    pub k: Array4<f32>,
    pub v: Array4<f32>,
}

/// Gradients of a loss whose gradient with respect to the output of [`exact`] is `grad_output` `[batch, heads, queries, value
/// dim]`. Time is that of all pairs; memory, beside the gradients, a few queries' scores for each thread.
///
/// # Errors
/// As [`exact`], and when `grad_output` has another shape or is not finite.
pub fn exact_gradients(
    q: ArrayView4<f32>,
    k: ArrayView4<f32>,
    v: ArrayView4<f32>,
    scale: f32,
    visible: &Visible,
    grad_output: ArrayView4<f32>,
) -> Result<AttentionGradients> {
    let sizes = check(q, k, v, visible)?;
    let (batch, heads, queries, _) = q.dim();
    if grad_output.dim() != (batch, heads, queries, sizes.value_dim) {
        return Err(Error::expected(
            "shape of the output's gradient",
            format!("{:?}", grad_output.shape()),
            format!("[{batch}, {heads}, {queries}, {}]", sizes.value_dim),
        ));
    }
    require_finite("the output's gradient", grad_output.iter())?;
    let forward = exact(q, k, v, scale, visible)?;
    let kv_heads = k.dim().1;
    let mut of_q = Array4::zeros((batch * kv_heads, sizes.shared, queries, q.dim().3));
    let mut of_k = Array3::zeros((batch * kv_heads, sizes.keys, q.dim().3));
    let mut of_v = Array3::zeros((batch * kv_heads, sizes.keys, sizes.value_dim));
    let tasks = of_q.outer_iter_mut().zip(of_k.outer_iter_mut()).zip(of_v.outer_iter_mut()).enumerate();
    let tasks: Vec<_> = tasks.map(|(head, ((q, k), v))| (head / kv_heads, head % kv_heads, q, k, v)).collect();
    in_pool(|| {
        on_all_threads(tasks, |(b, h, mut of_q, mut of_k, mut of_v)| {
            let (k, v) = (k.slice(s![b, h, .., ..]), v.slice(s![b, h, .., ..]));
            for (place, first) in (0..sizes.shared).flat_map(|p| (0..queries).step_by(QUERIES).map(move |f| (p, f))) {
                let (head, rows) = (h * sizes.shared + place, first..queries.min(first + QUERIES));
                let hidden = Hidden { visible: *visible, batch: b, first };
                let end = hidden.end(rows.len(), k.nrows());
                let (k, v) = (k.slice(s![..end, ..]), v.slice(s![..end, ..]));
                let q = q.slice(s![b, head, rows.clone(), ..]);
                let grad = grad_output.slice(s![b, head, rows.clone(), ..]);
                let mut weights = Array2::zeros((rows.len(), end));
                product_into(weights.view_mut(), q, k.reversed_axes(), scale, false);
                hidden.hide(0, &mut weights.view_mut());
                let mut scores = Array2::zeros((rows.len(), end));
                product_into(scores.view_mut(), grad, v.reversed_axes(), 1.0, false);
                for (i, (mut weights, mut scores)) in weights.rows_mut().into_iter().zip(scores.rows_mut()).enumerate()
                {
                    let lse = forward.log_sum_exp[[b, head, rows.start + i]];
                    // A query that sees no key has no part in anything.
                    weights.mapv_inplace(|score| if lse == f32::NEG_INFINITY { 0.0 } else { (score - lse).exp() });
                    let output = forward.output.slice(s![b, head, rows.start + i, ..]);
                    let mean = output.dot(&grad.row(i));
                    scores.zip_mut_with(&weights, |score, weight| *score = weight * (*score - mean));
                }
                product_into(of_v.slice_mut(s![..end, ..]), weights.t(), grad, 1.0, true);
                product_into(of_k.slice_mut(s![..end, ..]), scores.t(), q, scale, true);
                product_into(of_q.slice_mut(s![place, rows, ..]), scores.view(), k, scale, false);
            }
        });
    });
    let shape = |e: ShapeError| Error::Numeric(e.to_string());
    Ok(AttentionGradients {
        q: of_q.into_shape_with_order(q.dim()).map_err(shape)?,
        k: of_k.into_shape_with_order(k.dim()).map_err(shape)?,
        v: of_v.into_shape_with_order(v.dim()).map_err(shape)?,
    })
}

impl Quantized<'_> {
    /// Straight-through gradients: those of attention over the codewords are handed to the queries and keys that they stand for
    /// as if these had been met themselves (van den Oord, Vinyals, Kavukcuoglu, 2017), with `commitment` times the gradient of
    /// the commitment loss, the mean over tokens of ‖x − codeword‖². Time is that of all pairs.
    ///
    /// # Errors
    /// As [`exact_gradients`]; when codebooks do not fit; and for scores of positions or a window of keys.
    pub fn gradients(
        &self,
        q: ArrayView4<f32>,
        k: ArrayView4<f32>,
        v: ArrayView4<f32>,
        visible: &Visible,
        grad_output: ArrayView4<f32>,
        commitment: f32,
    ) -> Result<AttentionGradients> {
        if self.bias.is_some() || !self.agg_cache {
            return Err(Error::expected(
                "attention to go back through",
                "scores of positions, or a window of keys",
                "attention by codes alone",
            ));
        }
        check(q, k, v, visible)?;
        self.check(q, k)?;
        let near = codewords(self.keys, k)?;
        let asked = self.queries.map(|book| codewords(book, q)).transpose()?;
        let of_asked = asked.as_ref().map_or(q, |asked| asked.view());
        let mut found = exact_gradients(of_asked, near.view(), v, self.scale, visible, grad_output)?;
        let commit = |grad: &mut Array4<f32>, x: ArrayView4<f32>, words: &Array4<f32>| {
            let tokens = (x.dim().0 * x.dim().2).max(1) as f32;
            grad.zip_mut_with(&(&x - words), |grad, off| *grad += commitment * 2.0 / tokens * off);
        };
        commit(&mut found.k, k, &near);
        if let Some(asked) = &asked {
            commit(&mut found.q, q, asked);
        }
        Ok(found)
    }
}

/// Vectors' codewords in their place.
fn codewords(book: &Codebook, x: ArrayView4<f32>) -> Result<Array4<f32>> {
    let mut words = Array4::zeros(x.dim());
    for (x, mut words) in x.outer_iter().zip(words.outer_iter_mut()) {
        let codes = book.assign(x)?;
        for (h, (codes, mut words)) in codes.outer_iter().zip(words.outer_iter_mut()).enumerate() {
            words.assign(&gathered(book.codewords().slice(s![h, .., ..]), &codes.to_vec()));
        }
    }
    Ok(words)
}
