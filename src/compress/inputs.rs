//! What layers and attention blocks are made from.

use std::sync::Arc;

use layerstore_core::calibration::SAMPLE_ROWS;
use layerstore_core::transformer::BlockInput;
use ndarray::{Array2, ArrayView2};

use super::calibration::CalibrationFile;
use super::hashed::HashedSource;
use crate::formats::TensorSource;

/// What layers are made from.
pub(super) struct Inputs {
    source: Arc<HashedSource>,
    pub calibration: Option<Arc<CalibrationFile>>,
    /// What the attention of the model's block has for inputs, where the model has read a text.
    pub heads: Option<Arc<AttentionInputs>>,
}

impl Inputs {
    pub fn new(source: Arc<dyn TensorSource>, calibration: Option<Arc<CalibrationFile>>) -> Self {
        Inputs { source: Arc::new(HashedSource::new(source)), calibration, heads: None }
    }

    /// Returns inputs of the same source with other statistics.
    pub fn with(&self, calibration: Option<Arc<CalibrationFile>>, heads: Option<Arc<AttentionInputs>>) -> Self {
        Inputs { source: self.source.clone(), calibration, heads }
    }

    /// Returns the source of tensors.
    pub fn source(&self) -> &dyn TensorSource {
        &*self.source
    }

    /// Returns the source, to be shared.
    pub fn shared_source(&self) -> Arc<dyn TensorSource> {
        self.source.clone()
    }

    /// Returns the source as what reads ahead.
    pub fn ahead(&self) -> &Arc<HashedSource> {
        &self.source
    }
}

/// Queries, keys and values as a model's attention has them, the first of a text's.
#[derive(Debug, Default)]
pub(super) struct AttentionInputs {
    /// `[tokens, heads · head_dim]` each.
    all: [Vec<f32>; 3],
    widths: [usize; 3],
    /// Whether queries and keys are rotated.
    pub is_rotary: bool,
}

impl AttentionInputs {
    pub fn new(is_rotary: bool) -> Self {
        AttentionInputs { is_rotary, ..AttentionInputs::default() }
    }

    /// Adds what it is about; `false` where that is something else.
    pub fn add(&mut self, input: BlockInput, x: ArrayView2<f32>) -> bool {
        let place = match input {
            BlockInput::Queries => 0,
            BlockInput::Keys => 1,
            BlockInput::Values => 2,
            _ => return false,
        };
        self.widths[place] = x.ncols();
        let room = SAMPLE_ROWS.saturating_sub(self.all[place].len() / x.ncols().max(1));
        self.all[place].extend(x.rows().into_iter().take(room).flatten());
        true
    }

    /// Returns the numbers of queries, keys and values.
    pub fn all(&self) -> impl Iterator<Item = &[f32]> {
        self.all.iter().map(Vec::as_slice)
    }

    /// Returns queries, keys or values, by their place in this order; `None` where there are none.
    pub fn get(&self, place: usize) -> Option<Array2<f32>> {
        let rows = self.all[place].len().checked_div(self.widths[place])?;
        Array2::from_shape_vec((rows, self.widths[place]), self.all[place].clone()).ok()
    }
}
