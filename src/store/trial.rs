//! Layers run on fixed inputs, to see whether they give what a layer has to give.
//!
//! No outputs are stored to compare with: sums of floats depend on the instruction set in their last bits, and what the parts are is
//! known by their hash.

use layerstore_core::layer::{configured, registry};
use ndarray::{Array2, Array4};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde_json::Value;

use super::record::LayerRecord;
use crate::error::{Error, Result};
use crate::layer::{Accuracy, Dense, Method, SharedLayer, VqAttentionLayer};

/// The seed of all inputs.
const SEED: u64 = 1;

/// Rows of input that a layer is run on, where it does not ask for more.
const ROWS: usize = 2;

/// What a row of the catalogue says that a layer is.
#[derive(Debug, Clone, PartialEq)]
pub struct Trial {
    name: String,
    config: Value,
    shape: (u64, u64),
    method: String,
}

impl From<&LayerRecord> for Trial {
    fn from(record: &LayerRecord) -> Self {
        Trial {
            name: format!("layer '{}' of model '{}'", record.layer, record.model),
            config: record.config.clone(),
            shape: (record.out_features, record.in_features),
            method: record.method.to_string(),
        }
    }
}

impl Trial {
    /// Returns whether both are of layers that run alike.
    pub fn is_like(&self, other: &Trial) -> bool {
        (&self.config, self.shape, &self.method) == (&other.config, other.shape, &other.method)
    }

    /// Runs a layer as the row says: its method and shape have to be the row's, its outputs of that shape, and finite where its numbers
    /// are its own and not the checkpoint's.
    ///
    /// # Errors
    /// When something is not so.
    pub fn run(&self, layer: &SharedLayer) -> Result<()> {
        self.tried(layer).map_err(|e| {
            Error::expected(format!("{}, run on seeded inputs", self.name), e, "finite outputs of its shape")
        })
    }

    fn tried(&self, layer: &SharedLayer) -> Result<()> {
        let layer = configured(layer, &self.config)?;
        if layer.method() != self.method.as_str() {
            return Err(Error::expected("method", layer.method(), &self.method));
        }
        if let Some(attention) = layer.downcast_ref::<VqAttentionLayer>() {
            return attended(attention);
        }
        // Modules run by what they are made of, which are layers of their own; files do not run.
        if !registry::is_linear(&layer.method()) {
            return Ok(());
        }
        let shape = (layer.out_features() as u64, layer.in_features() as u64);
        if shape != self.shape {
            return Err(Error::expected("shape", format!("{shape:?}"), format!("{:?}", self.shape)));
        }
        let is_dense = layer.method() == Dense::NAME;
        let x = inputs(layer.positions().max(ROWS), layer.in_features());
        for accuracy in [Accuracy::Approximate, Accuracy::Full] {
            let y = match layer.forward(x.view(), accuracy) {
                // A checkpoint's tensors may be of any shape, type and size.
                Err(_) if is_dense => return Ok(()),
                output => output?.y,
            };
            if y.dim() != (x.nrows(), layer.out_features()) {
                let expected = (x.nrows(), layer.out_features());
                return Err(Error::expected("shape of the output", format!("{:?}", y.dim()), format!("{expected:?}")));
            }
            require_finite(y.iter().filter(|_| !is_dense))?;
        }
        Ok(())
    }
}

/// Runs attention on queries, keys and values of a few tokens.
fn attended(layer: &VqAttentionLayer) -> Result<()> {
    let settings = layer.settings();
    let (d_k, d_v) = (settings.d_k.unwrap_or_default(), settings.d_v.unwrap_or_default());
    let (queries, keys) = (settings.n_head, settings.kv_heads());
    let heads = |heads: usize, width: usize| {
        Array4::from_shape_vec((1, heads, ROWS, width), inputs(heads * ROWS, width).into_raw_vec_and_offset().0)
            .map_err(|e| Error::Numeric(e.to_string()))
    };
    let (q, k, v) = (heads(queries, d_k)?, heads(keys, d_k)?, heads(keys, d_v)?);
    let out = layer.attend(q.view(), k.view(), v.view(), None, None)?;
    if out.output.dim() != (1, queries, ROWS, d_v) {
        let expected = (1, queries, ROWS, d_v);
        return Err(Error::expected("shape of the output", format!("{:?}", out.output.dim()), format!("{expected:?}")));
    }
    require_finite(out.output.iter())
}

fn require_finite<'a>(values: impl Iterator<Item = &'a f32>) -> Result<()> {
    match values.enumerate().find(|(_, value)| !value.is_finite()) {
        Some((index, &value)) => Err(Error::NotFinite { what: "the output".into(), value: f64::from(value), index }),
        None => Ok(()),
    }
}

/// Numbers between −1 and 1, the same ones each time.
fn inputs(rows: usize, columns: usize) -> Array2<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(SEED);
    Array2::from_shape_simple_fn((rows, columns), || random.next_u32() as f32 / (1u64 << 31) as f32 - 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{DenseLayer, KeyValueConfig, Layer};
    use layerstore_core::layer::compress;

    fn trial(method: &str, config: Value, shape: (u64, u64)) -> Trial {
        Trial { name: "layer 'a' of model 'm'".into(), config, shape, method: method.into() }
    }

    #[test]
    fn layers_have_to_be_what_their_rows_say() {
        let weight = inputs(3, 4);
        let layer = compress(&KeyValueConfig::default(), weight.view(), None, None).unwrap().shared();
        let config = layer.config();
        trial("key_value", config.clone(), (3, 4)).run(&layer).unwrap();
        for (bad, says) in [
            (trial("key_value", config.clone(), (4, 3)), "shape: found (3, 4)"),
            (trial("low_rank", config.clone(), (3, 4)), "method: found key_value"),
            (trial("key_value", serde_json::json!({"threshold": "x"}), (3, 4)), "config"),
        ] {
            let message = bad.run(&layer).unwrap_err().to_string();
            assert!(message.contains(says) && message.contains("layer 'a' of model 'm'"), "{message}");
        }
        // Numbers of a checkpoint are its own, and its tensors may be no matrices.
        let infinite = DenseLayer::from_f32(weight.mapv(|_| f32::INFINITY).view(), None).shared();
        trial("dense", infinite.config(), (3, 4)).run(&infinite).unwrap();
        let numbers = DenseLayer::new(crate::layer::DType::I64, vec![2, 1], vec![0; 16].into(), None).unwrap().shared();
        trial("dense", numbers.config(), (2, 1)).run(&numbers).unwrap();
    }

    #[test]
    fn inputs_are_fixed() {
        let x = inputs(2, 3);
        assert_eq!(x, inputs(2, 3));
        assert!(x.iter().all(|v| v.abs() <= 1.0) && x.iter().any(|v| *v < 0.0));
    }
}
