//! A transformer block whose tokens are mixed by a GRU.

use ndarray::{Array2, Array3, ArrayD, ArrayView2, ArrayViewD};
use serde::{Deserialize, Serialize};

use super::glu::Glu;
use super::recurrence::RnnCell;
use super::shape::{as_sequences, forward_norm};
use super::token_mixer::GruTokenMixer;
use crate::error::{Error, Result};
use crate::layer::{Accuracy, RmsNorm};

/// Settings of a transformer block that do not follow from its parts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BlockConfig {
    /// Rate of dropout in training, kept for an export; nothing is dropped here.
    pub rate: f64,
}

impl Default for BlockConfig {
    fn default() -> Self {
        BlockConfig { rate: 0.1 }
    }
}

/// A transformer block: `a = norm(x + token_mixer(x))`, `y = norm(a + ffn(a))`.
#[derive(Debug, Clone)]
pub struct TransformerBlock {
    config: BlockConfig,
    token_mixer: GruTokenMixer,
    token_mixer_norm: RmsNorm,
    ffn: Glu,
    ffn_norm: RmsNorm,
}

impl TransformerBlock {
    /// Returns the block of these parts.
    ///
    /// # Errors
    /// When their widths differ.
    pub fn new(
        config: BlockConfig,
        token_mixer: GruTokenMixer,
        token_mixer_norm: RmsNorm,
        ffn: Glu,
        ffn_norm: RmsNorm,
    ) -> Result<Self> {
        let width = token_mixer.gru().out_features();
        let norm = |norm: &RmsNorm| norm.features().unwrap_or(width);
        let found = [
            token_mixer.gru().in_features(),
            ffn.gate().in_features(),
            ffn.config().units,
            norm(&token_mixer_norm),
            norm(&ffn_norm),
        ];
        if found != [width; 5] {
            return Err(Error::expected("widths of a block's parts", format!("{found:?}"), format!("{width}, all")));
        }
        Ok(TransformerBlock { config, token_mixer, token_mixer_norm, ffn, ffn_norm })
    }

    /// Returns the settings.
    pub fn config(&self) -> BlockConfig {
        self.config
    }

    /// Returns the GRU that mixes tokens.
    pub fn token_mixer(&self) -> &GruTokenMixer {
        &self.token_mixer
    }

    /// Returns the norm of the token mixer's outputs and inputs added.
    pub fn token_mixer_norm(&self) -> &RmsNorm {
        &self.token_mixer_norm
    }

    /// Returns the feed-forward network that each token goes through.
    pub fn ffn(&self) -> &Glu {
        &self.ffn
    }

    /// Returns the norm of the feed-forward network's outputs and inputs added.
    pub fn ffn_norm(&self) -> &RmsNorm {
        &self.ffn_norm
    }

    /// Runs sequences `[batch, steps, width]`: outputs of the same shape.
    ///
    /// # Errors
    /// As [`GruTokenMixer::forward`], [`Glu::forward`] and [`RmsNorm::forward`].
    pub fn forward(&self, x: ArrayViewD<f32>, accuracy: Accuracy) -> Result<ArrayD<f32>> {
        let x = as_sequences(x)?;
        let mixed = self.token_mixer.forward(x.view(), None, None, accuracy)?.outputs;
        let a = forward_norm(&self.token_mixer_norm, (x + mixed).into_dyn())?;
        let fed_forward = self.ffn.forward(a.view(), accuracy)?;
        forward_norm(&self.ffn_norm, a + fed_forward)
    }

    /// Runs one step for inputs `[batch, width]` at one position of a sequence, and replaces the token mixer's state.
    pub(super) fn step(
        &self,
        x: ArrayView2<f32>,
        state: &mut Array3<f32>,
        position: usize,
        accuracy: Accuracy,
    ) -> Result<Array2<f32>> {
        let mixed = self.token_mixer.step(x, state, accuracy)?;
        let a = self.token_mixer_norm.at_position(position)?.forward((&x + &mixed).view())?;
        let fed_forward = self.ffn.step(a.view(), position, accuracy)?;
        self.ffn_norm.at_position(position)?.forward((a + fed_forward).view())
    }
}
