//! A GRU that mixes the tokens of a sequence, where a transformer has attention.

use ndarray::{Array2, Array3, ArrayView2, ArrayView3};

use super::gru::Gru;
use super::recurrence::RnnOutput;
use crate::error::{Error, Result};
use crate::layer::Accuracy;

/// A GRU that gives each step's output, first step first: Keras-MatMulLess's `AttentionMML`.
#[derive(Debug, Clone)]
pub struct GruTokenMixer {
    gru: Gru,
}

impl GruTokenMixer {
    /// Returns the token mixer that a GRU is.
    ///
    /// # Errors
    /// When the GRU's settings ask for the last step's output alone, or for steps from the last to the first.
    pub fn new(gru: Gru) -> Result<Self> {
        let sequence = gru.config().sequence;
        if !sequence.return_sequences || sequence.go_backwards {
            return Err(Error::expected("GRU of a token mixer", "one that gives other steps", "each step's output"));
        }
        Ok(GruTokenMixer { gru })
    }

    /// Returns the GRU.
    pub fn gru(&self) -> &Gru {
        &self.gru
    }

    /// Runs sequences `[batch, steps, in_features]`, as [`Gru::forward`] does.
    ///
    /// # Errors
    /// As [`Gru::forward`].
    pub fn forward(
        &self,
        x: ArrayView3<f32>,
        state: Option<ArrayView3<f32>>,
        mask: Option<ArrayView2<bool>>,
        accuracy: Accuracy,
    ) -> Result<RnnOutput> {
        self.gru.forward(x, state, mask, accuracy)
    }

    /// Runs one step, as [`Gru::step`] does.
    ///
    /// # Errors
    /// As [`Gru::step`].
    pub fn step(&self, x: ArrayView2<f32>, state: &mut Array3<f32>, accuracy: Accuracy) -> Result<Array2<f32>> {
        self.gru.step(x, state, accuracy)
    }
}
