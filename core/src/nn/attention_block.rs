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
        if config.rotary && projections.is_some() {
            let expected = "a language model, which rotates queries and keys by their positions";
            return Err(Error::expected(
                "what runs an attention block with rotary = true",
                "the block by itself",
                expected,
            ));
        }
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

#[cfg(test)]
mod tests {
    use ndarray::{Axis, s};

    use super::*;
    use crate::layer::{DenseLayer, LowRankConfig, Mechanism, MethodConfig, Rank, VqAttentionConfig};
    use crate::linalg::relative_error;

    fn sample(rows: usize, columns: usize, seed: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, columns), |(i, j)| {
            ((i * 7919 + j * 104_729 + i * j * 31 + seed * 613) % 1009) as f32 / 500.0 - 1.0
        })
    }

    fn config(mechanism: Mechanism, causal: bool) -> VqAttentionConfig {
        VqAttentionConfig {
            mechanism,
            n_head: 4,
            n_kv_head: Some(2),
            d_model: Some(12),
            d_k: Some(6),
            d_v: Some(5),
            n_code: 8,
            block_len: 7,
            causal,
            ..VqAttentionConfig::default()
        }
    }

    fn layer(config: VqAttentionConfig) -> VqAttentionLayer {
        VqAttentionLayer::by_kmeans(config, sample(50, 24, 1).view(), sample(50, 12, 2).view()).unwrap()
    }

    fn dense(rows: usize, columns: usize, seed: usize) -> SharedLayer {
        let bias = sample(1, rows, seed + 1).row(0).to_owned();
        DenseLayer::from_f32(sample(rows, columns, seed).view(), Some(bias.view())).shared()
    }

    const ALL: [Mechanism; 4] = [Mechanism::VqQk, Mechanism::VqK, Mechanism::Hyper, Mechanism::Exact];

    #[test]
    fn a_block_is_its_projections_around_attention() {
        let x = sample(2 * 30, 12, 9).into_shape_with_order((2, 30, 12)).unwrap();
        let projections = [dense(24, 12, 10), dense(12, 12, 20), dense(10, 12, 30)];
        for mechanism in ALL {
            for causal in [false, true] {
                let layer = layer(config(mechanism, causal));
                let block =
                    AttentionBlock::new(layer.clone(), Some(projections.clone()), Some(dense(12, 20, 40))).unwrap();
                let found = block.attend(x.view(), x.view(), x.view(), None, None, Accuracy::Approximate).unwrap();
                for (b, x) in x.outer_iter().enumerate() {
                    let [q, k, v] = [(0, 4), (1, 2), (2, 2)].map(|(place, heads): (usize, usize)| {
                        let y = projections[place].forward(x, Accuracy::Full).unwrap().y;
                        batch_in_heads(y.insert_axis(Axis(0)).view(), heads, "inputs").unwrap()
                    });
                    let heads = layer.attend(q.view(), k.view(), v.view(), None, None).unwrap().output;
                    let joined = Array2::from_shape_fn((30, 20), |(i, j)| heads[[0, j / 5, i, j % 5]]);
                    let expected = dense(12, 20, 40).forward(joined.view(), Accuracy::Full).unwrap().y;
                    let error = relative_error(found.slice(s![b, .., ..]), expected.view());
                    assert!(error < 1e-5, "{mechanism:?}: {error}");
                }
            }
        }
    }

    #[test]
    fn long_sequences_come_in_pieces_and_compressed_projections_serve() {
        let low_rank = |rows: usize, columns: usize, seed: usize| {
            let config = LowRankConfig {
                weight: serde_json::from_str(r#"{"type": "int8", "group": "channel"}"#).unwrap(),
                rank: Rank::Components(2),
                ..LowRankConfig::default()
            };
            MethodConfig::from(config).compress(sample(rows, columns, seed).view(), None, None).unwrap()
        };
        let projections = [low_rank(24, 12, 10), low_rank(12, 12, 20), low_rank(10, 12, 30)];
        let block = AttentionBlock::new(layer(config(Mechanism::VqK, true)), Some(projections), None).unwrap();
        let x = sample(40, 12, 9).insert_axis(Axis(0));
        let attend = |x: ndarray::ArrayView3<f32>, cache: Option<&mut CompressedCache>| -> Array3<f32> {
            block.attend(x, x, x, None, cache, Accuracy::Approximate).unwrap()
        };
        let whole = attend(x.view(), None);
        let mut cache = block.attention().empty_cache(1).unwrap();
        let pieces = [0..17, 17..18, 18..40].map(|tokens| attend(x.slice(s![.., tokens, ..]), Some(&mut cache)));
        let views: Vec<_> = pieces.iter().map(|piece| piece.view()).collect();
        let joined = ndarray::concatenate(Axis(1), &views).unwrap();
        assert!(joined.iter().zip(&whole).all(|(a, b)| (a - b).abs() < 1e-5));
        let exact = block.exact().unwrap();
        assert_eq!(exact.attention().settings().mechanism, Mechanism::Exact);
        assert_ne!(exact.attend(x.view(), x.view(), x.view(), None, None, Accuracy::Full).unwrap(), whole);
    }

    #[test]
    fn projections_of_another_shape_are_refused() {
        let other = Some([dense(24, 12, 1), dense(11, 12, 2), dense(10, 12, 3)]);
        let message = AttentionBlock::new(layer(config(Mechanism::VqQk, false)), other, None).unwrap_err().to_string();
        assert!(message.contains("key projection"), "{message}");
    }
}
