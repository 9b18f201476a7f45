//! Multi-head attention with its projections: Wq, Wk, Wv and Wo are linear layers of any method.

use ndarray::{Array2, Array3, ArrayView2, ArrayView3};

use crate::attention::CompressedCache;
use crate::error::{Error, Result};
use crate::layer::{Accuracy, Layer, SharedLayer, VqAttentionLayer, batch_in_heads};

/// A multi-head attention block.
#[derive(Debug, Clone)]
pub struct AttentionBlock {
    attention: VqAttentionLayer,
    /// Wq, Wk and Wv; without them the inputs are queries, keys and values already.
    projections: Option<[SharedLayer; 3]>,
    output: Option<SharedLayer>,
}

impl AttentionBlock {
    /// Returns the block of an attention layer and its projections.
    ///
    /// # Errors
    /// When a projection is of another shape than the attention asks for.
    pub fn new(
        attention: VqAttentionLayer,
        projections: Option<[SharedLayer; 3]>,
        output: Option<SharedLayer>,
    ) -> Result<Self> {
        let config = attention.settings();
        let (d_model, d_k, d_v) =
            (attention.in_features(), config.d_k.unwrap_or_default(), config.d_v.unwrap_or_default());
        let (heads, shared) = (config.n_head, config.kv_heads());
        let fits = |what: &str, layer: &SharedLayer, outputs: usize, inputs: usize| {
            let found = (layer.out_features(), layer.in_features());
            match found == (outputs, inputs) {
                true => Ok(()),
                false => Err(Error::expected(
                    format!("shape of the {what} projection, [out, in]"),
                    format!("{found:?}"),
                    format!("({outputs}, {inputs})"),
                )),
            }
        };
        if let Some([query, key, value]) = &projections {
            fits("query", query, heads * d_k, d_model)?;
            // Keys and values may be of another sequence, of another width.
            fits("key", key, shared * d_k, key.in_features())?;
            fits("value", value, shared * d_v, value.in_features())?;
        }
        if let Some(output) = &output {
            fits("output", output, output.out_features(), heads * d_v)?;
        }
        Ok(AttentionBlock { attention, projections, output })
    }

    /// Returns the attention without its projections.
    pub fn attention(&self) -> &VqAttentionLayer {
        &self.attention
    }

    /// Returns the block with exact attention in the place of its own.
    ///
    /// # Errors
    /// As [`VqAttentionLayer::exact`].
    pub fn exact(&self) -> Result<Self> {
        Ok(AttentionBlock { attention: self.attention.exact()?, ..self.clone() })
    }

    /// Returns queries, keys and values of inputs `q`, `k` and `v`, a row a token each.
    ///
    /// # Errors
    /// As [`Layer::forward`].
    pub fn project(
        &self,
        q: ArrayView2<f32>,
        k: ArrayView2<f32>,
        v: ArrayView2<f32>,
        accuracy: Accuracy,
    ) -> Result<[Array2<f32>; 3]> {
        let Some([query, key, value]) = &self.projections else {
            return Ok([q.to_owned(), k.to_owned(), v.to_owned()]);
        };
        Ok([query.forward(q, accuracy)?.y, key.forward(k, accuracy)?.y, value.forward(v, accuracy)?.y])
    }

    /// Runs attention from `q` `[batch, queries, width]` to `k` and `v` `[batch, keys, width]`: `[batch, queries, width]`. `there` and
    /// `cache` are [`VqAttentionLayer::attend`]'s.
    ///
    /// # Errors
    /// As [`Layer::forward`] and [`VqAttentionLayer::attend`].
    pub fn attend(
        &self,
        q: ArrayView3<f32>,
        k: ArrayView3<f32>,
        v: ArrayView3<f32>,
        there: Option<ArrayView2<bool>>,
        cache: Option<&mut CompressedCache>,
        accuracy: Accuracy,
    ) -> Result<Array3<f32>> {
        let (batch, queries, keys) = (q.dim().0, q.dim().1, k.dim().1);
        if (k.dim().0, v.dim().0, v.dim().1) != (batch, batch, keys) {
            return Err(Error::expected(
                "shapes of inputs, [batch, tokens, width]",
                format!("{:?}, {:?} and {:?}", q.shape(), k.shape(), v.shape()),
                "one batch, and a value for each key",
            ));
        }
        let rows = |x: ArrayView3<f32>| -> Result<Array2<f32>> {
            let (batch, tokens, width) = x.dim();
            let x = x.as_standard_layout().into_owned();
            x.into_shape_with_order((batch * tokens, width)).map_err(|e| Error::Numeric(e.to_string()))
        };
        let (q, k, v) = (rows(q)?, rows(k)?, rows(v)?);
        let [q, k, v] = self.project(q.view(), k.view(), v.view(), accuracy)?;
        let config = self.attention.settings();
        let heads = |x: Array2<f32>, tokens: usize, heads: usize, what: &str| {
            let width = x.ncols();
            let x = x.into_shape_with_order((batch, tokens, width)).map_err(|e| Error::Numeric(e.to_string()))?;
            batch_in_heads(x.view(), heads, what)
        };
        let (q, k, v) = (
            heads(q, queries, config.n_head, "queries")?,
            heads(k, keys, config.kv_heads(), "keys")?,
            heads(v, keys, config.kv_heads(), "values")?,
        );
        let found = self.attention.attend(q.view(), k.view(), v.view(), there, cache)?.output;
        let (_, heads, _, dim) = found.dim();
        let joined = found.permuted_axes([0, 2, 1, 3]).as_standard_layout().into_owned();
        let shape = |e: ndarray::ShapeError| Error::Numeric(e.to_string());
        let joined = joined.into_shape_with_order((batch * queries, heads * dim)).map_err(shape)?;
        let all = match &self.output {
            Some(output) => output.forward(joined.view(), accuracy)?.y,
            None => joined,
        };
        let width = all.ncols();
        all.into_shape_with_order((batch, queries, width)).map_err(shape)
    }
}
