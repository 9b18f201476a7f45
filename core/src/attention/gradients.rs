//! Gradients of a loss through attention, a tile at a time (as FlashAttention's backward pass), and straight through
//! codewords to the vectors that they stand for.

use std::ops::Range;

use ndarray::{Array2, Array3, Array4, ArrayView2, ArrayView4, ArrayViewMut2, ArrayViewMut3, ShapeError, s};

use super::codebook::AttentionCodebook;
use super::exact::{TILE_QUERIES, exact};
use super::gather::gather_rows;
use super::mask::{AttentionMask, TileMask};
use super::output::AttentionOutput;
use super::shape::AttentionShape;
use super::vector_quantized::VqAttention;
use crate::error::{Error, Result};
use crate::linalg::{on_all_threads, product_into, require_finite};

/// Gradients with respect to queries, keys and values, in their shapes.
#[derive(Debug, Clone)]
pub struct AttentionGradients {
    /// With respect to the queries `[batch, heads, queries, dim]`.
    pub q: Array4<f32>,
    /// With respect to the keys `[batch, kv heads, keys, dim]`.
    pub k: Array4<f32>,
    /// With respect to the values `[batch, kv heads, keys, value dim]`.
    pub v: Array4<f32>,
}

/// Computes the gradients of a loss whose gradient with respect to the output of [`exact`] is `grad_output` `[batch, heads, queries,
/// value dim]`. Time is that of all pairs; memory, beside the gradients, a few queries' scores for each thread.
///
/// # Errors
/// As [`exact`], and when `grad_output` has another shape or is not finite.
pub fn exact_gradients(
    q: ArrayView4<f32>,
    k: ArrayView4<f32>,
    v: ArrayView4<f32>,
    scale: f32,
    mask: &AttentionMask,
    grad_output: ArrayView4<f32>,
) -> Result<AttentionGradients> {
    let shape = AttentionShape::of(q, k, v, mask)?;
    let (batch, heads, queries, _) = q.dim();
    if grad_output.dim() != (batch, heads, queries, shape.value_dim) {
        return Err(Error::expected(
            "shape of the output's gradient",
            format!("{:?}", grad_output.shape()),
            format!("[{batch}, {heads}, {queries}, {}]", shape.value_dim),
        ));
    }
    require_finite("the output's gradient", grad_output.iter())?;
    let forward = exact(q, k, v, scale, mask)?;
    let kv_heads = k.dim().1;
    let mut of_q = Array4::zeros((batch * kv_heads, shape.group, queries, q.dim().3));
    let mut of_k = Array3::zeros((batch * kv_heads, shape.keys, q.dim().3));
    let mut of_v = Array3::zeros((batch * kv_heads, shape.keys, shape.value_dim));
    let tasks = of_q.outer_iter_mut().zip(of_k.outer_iter_mut()).zip(of_v.outer_iter_mut()).enumerate();
    let tasks: Vec<_> = tasks.map(|(head, ((q, k), v))| (head, q, k, v)).collect();
    let backward = Backward {
        q,
        k,
        v,
        scale,
        mask: *mask,
        grad_output,
        forward: &forward,
        group: shape.group,
        offset: shape.offset(),
    };
    on_all_threads(tasks, |(head, q, k, v)| backward.head((head / kv_heads, head % kv_heads), q, k, v));
    let of_shape = |e: ShapeError| Error::Numeric(e.to_string());
    Ok(AttentionGradients {
        q: of_q.into_shape_with_order(q.dim()).map_err(of_shape)?,
        k: of_k.into_shape_with_order(k.dim()).map_err(of_shape)?,
        v: of_v.into_shape_with_order(v.dim()).map_err(of_shape)?,
    })
}

/// A backward pass: what went in and came out, and the gradient of the latter.
struct Backward<'a, 'm> {
    q: ArrayView4<'a, f32>,
    k: ArrayView4<'a, f32>,
    v: ArrayView4<'a, f32>,
    scale: f32,
    mask: AttentionMask<'m>,
    grad_output: ArrayView4<'a, f32>,
    forward: &'a AttentionOutput,
    /// Consecutive query heads that share one head of keys.
    group: usize,
    /// Position of the first query among the keys, in causal attention.
    offset: usize,
}

impl Backward<'_, '_> {
    /// Computes the gradients of one head of keys of sequence `b`, and of the heads of queries `[group, queries, dim]` that share it.
    fn head(
        &self,
        (b, kv_head): (usize, usize),
        mut of_q: ArrayViewMut3<f32>,
        mut of_k: ArrayViewMut2<f32>,
        mut of_v: ArrayViewMut2<f32>,
    ) {
        let queries = self.q.dim().2;
        let (k, v) = (self.k.slice(s![b, kv_head, .., ..]), self.v.slice(s![b, kv_head, .., ..]));
        for (place, first) in (0..self.group).flat_map(|p| (0..queries).step_by(TILE_QUERIES).map(move |f| (p, f))) {
            let (head, rows) = (kv_head * self.group + place, first..queries.min(first + TILE_QUERIES));
            let mask = TileMask { mask: self.mask, batch: b, first_query: first, offset: self.offset };
            let end = mask.visible_end(rows.len(), k.nrows());
            let (k, v) = (k.slice(s![..end, ..]), v.slice(s![..end, ..]));
            let q = self.q.slice(s![b, head, rows.clone(), ..]);
            let grad = self.grad_output.slice(s![b, head, rows.clone(), ..]);
            let (weights, of_scores) = self.tile((b, head), rows.clone(), (q, k, v), &mask);
            product_into(of_v.slice_mut(s![..end, ..]), weights.t(), grad, 1.0, true);
            product_into(of_k.slice_mut(s![..end, ..]), of_scores.t(), q, self.scale, true);
            product_into(of_q.slice_mut(s![place, rows, ..]), of_scores.view(), k, self.scale, false);
        }
    }

    /// Returns a tile's softmax weights, recomputed, and the gradients of its scores, both `[queries, keys]`.
    fn tile(
        &self,
        (b, head): (usize, usize),
        rows: Range<usize>,
        (q, k, v): (ArrayView2<f32>, ArrayView2<f32>, ArrayView2<f32>),
        mask: &TileMask,
    ) -> (Array2<f32>, Array2<f32>) {
        let grad = self.grad_output.slice(s![b, head, rows.clone(), ..]);
        let mut weights = Array2::zeros((rows.len(), k.nrows()));
        product_into(weights.view_mut(), q, k.reversed_axes(), self.scale, false);
        mask.apply(0, &mut weights.view_mut());
        let mut of_scores = Array2::zeros((rows.len(), k.nrows()));
        product_into(of_scores.view_mut(), grad, v.reversed_axes(), 1.0, false);
        for (i, (mut weights, mut of_scores)) in weights.rows_mut().into_iter().zip(of_scores.rows_mut()).enumerate() {
            let lse = self.forward.log_sum_exp[[b, head, rows.start + i]];
            // A query that sees no key has no part in anything.
            weights.mapv_inplace(|score| if lse == f32::NEG_INFINITY { 0.0 } else { (score - lse).exp() });
            let output = self.forward.output.slice(s![b, head, rows.start + i, ..]);
            let mean = output.dot(&grad.row(i));
            of_scores.zip_mut_with(&weights, |score, weight| *score = weight * (*score - mean));
        }
        (weights, of_scores)
    }
}

impl VqAttention<'_> {
    /// Computes straight-through gradients: those of attention over the codewords are handed to the queries and keys that they stand
    /// for as if these had been met themselves (van den Oord, Vinyals, Kavukcuoglu, 2017), with `commitment` times the gradient of
    /// the commitment loss, the mean over tokens of ‖x − codeword‖². Time is that of all pairs.
    ///
    /// # Errors
    /// As [`exact_gradients`]; when codebooks do not fit; and for scores of positions or a window of keys.
    pub fn gradients(
        &self,
        q: ArrayView4<f32>,
        k: ArrayView4<f32>,
        v: ArrayView4<f32>,
        mask: &AttentionMask,
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
        AttentionShape::of(q, k, v, mask)?;
        self.check(q, k)?;
        let quantized_k = codewords_of(self.keys, k)?;
        let quantized_q = self.queries.map(|book| codewords_of(book, q)).transpose()?;
        let used_q = quantized_q.as_ref().map_or(q, |quantized| quantized.view());
        let mut found = exact_gradients(used_q, quantized_k.view(), v, self.scale, mask, grad_output)?;
        let commit = |grad: &mut Array4<f32>, x: ArrayView4<f32>, codewords: &Array4<f32>| {
            let tokens = (x.dim().0 * x.dim().2).max(1) as f32;
            grad.zip_mut_with(&(&x - codewords), |grad, off| *grad += commitment * 2.0 / tokens * off);
        };
        commit(&mut found.k, k, &quantized_k);
        if let Some(quantized_q) = &quantized_q {
            commit(&mut found.q, q, quantized_q);
        }
        Ok(found)
    }
}

/// Returns each vector's codeword in its place.
fn codewords_of(book: &AttentionCodebook, x: ArrayView4<f32>) -> Result<Array4<f32>> {
    let mut all = Array4::zeros(x.dim());
    for (x, mut all) in x.outer_iter().zip(all.outer_iter_mut()) {
        let codes = book.assign(x)?;
        for (h, (codes, mut all)) in codes.outer_iter().zip(all.outer_iter_mut()).enumerate() {
            all.assign(&gather_rows(book.codewords().slice(s![h, .., ..]), &codes.to_vec()));
        }
    }
    Ok(all)
}
