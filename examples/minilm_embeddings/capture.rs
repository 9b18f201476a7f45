//! The inputs of linear layers, kept as they run: a calibration file is made so.

use std::collections::BTreeMap;
use std::path::Path;

use half::f16;
use ndarray::ArrayView2;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::Result;

/// Tokens kept for each layer; second moments of a few hundred features settle well before more.
const TOKENS: usize = 2048;

/// Inputs of each layer for the same, evenly spaced, tokens.
pub struct Capture {
    /// The tokens to keep, counted over all sentences, ascending. Chosen before anything runs: the inputs of all tokens
    /// of a corpus would take gigabytes.
    chosen: Vec<usize>,
    /// The first token of the sentence at work.
    start: usize,
    /// By layer, `[chosen, in_features]` as little-endian f16.
    inputs: BTreeMap<String, Vec<u8>>,
}

impl Capture {
    /// For sentences of `total` tokens together.
    pub fn new(total: usize) -> Self {
        let kept = total.min(TOKENS);
        let chosen = (0..kept).map(|i| i * total / kept).collect();
        Capture { chosen, start: 0, inputs: BTreeMap::new() }
    }

    /// Keeps what is chosen of a layer's inputs for the sentence at work.
    pub fn add(&mut self, layer: &str, x: ArrayView2<f32>) {
        let first = self.chosen.partition_point(|token| *token < self.start);
        let last = self.chosen.partition_point(|token| *token < self.start + x.nrows());
        let inputs = self.inputs.entry(layer.to_owned()).or_default();
        for token in &self.chosen[first..last] {
            inputs.extend(x.row(token - self.start).iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()));
        }
    }

    /// Goes on to the next sentence, after one of `tokens` tokens.
    pub fn advance(&mut self, tokens: usize) {
        self.start += tokens;
    }

    /// Writes a tensor `[tokens, in_features]` for each layer, and says how many tokens those are.
    pub fn write(&self, path: &Path) -> Result<usize> {
        let tokens = self.chosen.len();
        let mut views = Vec::with_capacity(self.inputs.len());
        for (layer, bytes) in &self.inputs {
            let in_features = bytes.len() / size_of::<f16>() / tokens;
            views.push((layer.as_str(), TensorView::new(Dtype::F16, vec![tokens, in_features], bytes)?));
        }
        safetensors::serialize_to_file(views, None, path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(tokens)
    }
}
