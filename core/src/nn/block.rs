//! A transformer block whose tokens are mixed by a GRU.

use ndarray::{Array2, Array3, ArrayD, ArrayView2, ArrayViewD};
use serde::{Deserialize, Serialize};

use super::glu::Glu;
use super::gru::Gru;
use super::recurrence::Cell;
use super::rows::{check_positions, rows, sequences, shaped};
use crate::error::{Error, Result};
use crate::layer::{Accuracy, RmsNorm};

/// A block's settings that its parts do not say.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BlockConfig {
    /// Dropout's rate in training; nothing is dropped here.
    pub rate: f64,
}

impl Default for BlockConfig {
    fn default() -> Self {
        BlockConfig { rate: 0.1 }
    }
}

/// `a = norm(x + gru(x))`, `y = norm(a + glu(a))`.
#[derive(Debug, Clone)]
pub struct TransformerBlock {
    config: BlockConfig,
    attention: Gru,
    attention_norm: RmsNorm,
    ffn: Glu,
    ffn_norm: RmsNorm,
}

impl TransformerBlock {
    /// From its parts.
    ///
    /// # Errors
    /// When their widths differ, or the GRU does not give each step's output in order.
    pub fn new(
        config: BlockConfig,
        attention: Gru,
        attention_norm: RmsNorm,
        ffn: Glu,
        ffn_norm: RmsNorm,
    ) -> Result<Self> {
        let width = attention.out_features();
        let norm = |norm: &RmsNorm| norm.features().unwrap_or(width);
        let found = [
            attention.in_features(),
            ffn.gate().in_features(),
            ffn.config().units,
            norm(&attention_norm),
            norm(&ffn_norm),
        ];
        if found != [width; 5] {
            return Err(Error::expected("widths of a block's parts", format!("{found:?}"), format!("{width}, all")));
        }
        let sequence = attention.config().sequence;
        if !sequence.return_sequences || sequence.go_backwards {
            return Err(Error::expected("a block's attention", "one that gives other steps", "each step's output"));
        }
        Ok(TransformerBlock { config, attention, attention_norm, ffn, ffn_norm })
    }

    /// The settings.
    pub fn config(&self) -> BlockConfig {
        self.config
    }

    /// What mixes tokens.
    pub fn attention(&self) -> &Gru {
        &self.attention
    }

    /// The norm behind it.
    pub fn attention_norm(&self) -> &RmsNorm {
        &self.attention_norm
    }

    /// What each token goes through.
    pub fn ffn(&self) -> &Glu {
        &self.ffn
    }

    /// The norm behind it.
    pub fn ffn_norm(&self) -> &RmsNorm {
        &self.ffn_norm
    }

    /// Runs sequences `[batch, steps, width]`.
    ///
    /// # Errors
    /// As [`Gru::run`] and [`Glu::forward`].
    pub fn forward(&self, x: ArrayViewD<f32>, accuracy: Accuracy) -> Result<ArrayD<f32>> {
        let x = sequences(x)?;
        let mixed = self.attention.run(x.view(), None, None, accuracy)?.outputs;
        let a = normalized(&self.attention_norm, (x + mixed).into_dyn())?;
        let given = self.ffn.forward(a.view(), accuracy)?;
        normalized(&self.ffn_norm, a + given)
    }

    pub(super) fn step(
        &self,
        x: ArrayView2<f32>,
        state: &mut Array3<f32>,
        position: usize,
        accuracy: Accuracy,
    ) -> Result<Array2<f32>> {
        let mixed = self.attention.step(x, state, accuracy)?;
        let a = self.attention_norm.at(position)?.forward((&x + &mixed).view())?;
        let given = self.ffn.step(a.view(), position, accuracy)?;
        self.ffn_norm.at(position)?.forward((a + given).view())
    }
}

/// Normalises the last dimension.
pub(super) fn normalized(norm: &RmsNorm, x: ArrayD<f32>) -> Result<ArrayD<f32>> {
    check_positions(x.shape(), norm.positions())?;
    shaped(norm.forward(rows(x.view())?.view())?, x.shape())
}
