//! Runs recurrent cells over sequences: the projections of inputs and outputs are computed for many steps at once, the state
//! step by step.

use ndarray::{Array2, Array3, ArrayView1, ArrayView2, ArrayView3, Axis, s};
use serde::{Deserialize, Serialize};

use super::shape::shape_error;
use crate::error::{Error, Result};
use crate::layer::Accuracy;
use crate::linalg::{large_zeros, require_finite};

/// Rows that go through a cell's layers at once: it bounds the memory that a long sequence takes besides its inputs and
/// outputs.
const ROWS: usize = 512;

/// How a sequence is run, with Keras's names and defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SequenceConfig {
    /// Whether each step's output is given, or the last one's alone.
    pub return_sequences: bool,
    /// Keras's setting, kept for an export; [`run_sequence`] always returns the state.
    pub return_state: bool,
    /// Whether steps are taken from the last to the first; outputs are in the order in which steps are taken.
    pub go_backwards: bool,
    /// Keras's setting, kept for an export; [`run_sequence`] starts from the state that it is given.
    pub stateful: bool,
    /// Whether the output of a masked step is zero, or that of the step before.
    pub zero_output_for_mask: bool,
}

/// A recurrent cell: it updates a state by an input, and gives an output.
///
/// A step is cut in three, since only the second part depends on the step before: the input projection, the update of the
/// state, and the output projection of the hidden vector that the update leaves.
pub trait RnnCell {
    /// Returns the width of the inputs.
    fn in_features(&self) -> usize;

    /// Returns the width of the outputs.
    fn out_features(&self) -> usize;

    /// Returns the shape of the state of one sequence.
    fn state_shape(&self) -> (usize, usize);

    /// Returns the length of the hidden vector that a step leaves for the output projection.
    fn hidden_len(&self) -> usize;

    /// Returns all that updates need of inputs `[rows, in_features]`, gates included: `[rows, …]`.
    ///
    /// # Errors
    /// As [`Layer::forward`](crate::layer::Layer::forward).
    fn input_projection(&self, x: ArrayView2<f32>, accuracy: Accuracy) -> Result<Array2<f32>>;

    /// Replaces the state of one sequence by the next one, and writes the whole hidden vector of the step. `projected` is a
    /// row of [`RnnCell::input_projection`].
    fn update(&self, projected: ArrayView1<f32>, state: &mut [f32], hidden: &mut [f32]);

    /// Returns the outputs `[rows, out_features]` of hidden vectors `[rows, hidden_len]` and inputs `[rows, in_features]`.
    ///
    /// # Errors
    /// As [`Layer::forward`](crate::layer::Layer::forward).
    fn output_projection(&self, hidden: ArrayView2<f32>, x: ArrayView2<f32>, accuracy: Accuracy)
    -> Result<Array2<f32>>;
}

/// The result of running a recurrent cell over sequences.
#[derive(Debug, Clone, PartialEq)]
pub struct RnnOutput {
    /// `[batch, steps, out_features]`; one step where the settings ask for the last output alone.
    pub outputs: Array3<f32>,
    /// The state after the last step, `[batch, …, …]`.
    pub state: Array3<f32>,
}

/// Returns the state before the first step of `batch` sequences: zeros `[batch, …, …]`.
pub fn initial_state(cell: &impl RnnCell, batch: usize) -> Array3<f32> {
    let (a, b) = cell.state_shape();
    Array3::zeros((batch, a, b))
}

/// Runs a cell over `x` `[batch, steps, in_features]`, from `state`, or from zeros. A step whose `mask` `[batch, steps]` is
/// false leaves the state as it is.
///
/// # Errors
/// When a shape does not fit, there is no step, or a number is not finite.
pub fn run_sequence(
    cell: &impl RnnCell,
    config: SequenceConfig,
    x: ArrayView3<f32>,
    state: Option<ArrayView3<f32>>,
    mask: Option<ArrayView2<bool>>,
    accuracy: Accuracy,
) -> Result<RnnOutput> {
    let (batch, steps, features) = x.dim();
    if features != cell.in_features() || steps == 0 {
        let (found, expected) = (format!("{:?}", x.dim()), format!("[batch, at least 1, {}]", cell.in_features()));
        return Err(Error::expected("shape of sequences, [batch, steps, features]", found, expected));
    }
    if let Some(found) = mask.filter(|mask| mask.dim() != (batch, steps)) {
        let (found, expected) = (format!("{:?}", found.dim()), format!("({batch}, {steps})"));
        return Err(Error::expected("shape of a mask, [batch, steps]", found, expected));
    }
    let state = match state {
        Some(state) => checked_state(cell, batch, state)?,
        None => initial_state(cell, batch),
    };
    let sequences = Sequences { cell, config, x, mask, accuracy };
    if config.return_sequences { sequences.every_output(state) } else { sequences.last_output(state) }
}

/// Runs one step for inputs `[batch, in_features]`: returns outputs `[batch, out_features]`, and replaces the state by the next
/// one.
///
/// # Errors
/// As [`run_sequence`]; the state is as it was then.
pub fn run_step(
    cell: &impl RnnCell,
    x: ArrayView2<f32>,
    state: &mut Array3<f32>,
    accuracy: Accuracy,
) -> Result<Array2<f32>> {
    let x = x.insert_axis(Axis(1));
    let output = run_sequence(cell, SequenceConfig::default(), x, Some(state.view()), None, accuracy)?;
    *state = output.state;
    Ok(output.outputs.index_axis_move(Axis(1), 0))
}

fn checked_state(cell: &impl RnnCell, batch: usize, state: ArrayView3<f32>) -> Result<Array3<f32>> {
    let (a, b) = cell.state_shape();
    if state.dim() != (batch, a, b) {
        let (found, expected) = (format!("{:?}", state.dim()), format!("{:?}", (batch, a, b)));
        return Err(Error::expected("shape of a state", found, expected));
    }
    require_finite("the state", state.iter())?;
    Ok(state.as_standard_layout().into_owned())
}

/// Checked sequences and the cell that runs over them. Steps are counted in the order in which they are taken.
struct Sequences<'a, C> {
    cell: &'a C,
    config: SequenceConfig,
    x: ArrayView3<'a, f32>,
    mask: Option<ArrayView2<'a, bool>>,
    accuracy: Accuracy,
}

/// Steps that go through a cell's layers at once.
struct Chunk {
    steps: usize,
    /// `[batch · steps, in_features]`, the steps of a sequence one after another.
    inputs: Array2<f32>,
    /// [`RnnCell::input_projection`] of the inputs.
    projected: Array2<f32>,
}

impl<C: RnnCell> Sequences<'_, C> {
    /// Runs all steps and returns the output of each.
    fn every_output(&self, mut state: Array3<f32>) -> Result<RnnOutput> {
        let (batch, steps, _) = self.x.dim();
        let mut outputs = large_zeros((batch, steps, self.cell.out_features()));
        for first in self.chunk_starts() {
            let chunk = self.chunk(first)?;
            let mut hidden = Array2::<f32>::zeros((chunk.inputs.nrows(), self.cell.hidden_len()));
            for b in 0..batch {
                let state = state_of(&mut state, b);
                for step in (0..chunk.steps).filter(|&step| self.is_unmasked(b, first + step)) {
                    let row = b * chunk.steps + step;
                    self.cell.update(chunk.projected.row(row), state, row_of(&mut hidden, row));
                }
            }
            let y = self.cell.output_projection(hidden.view(), chunk.inputs.view(), self.accuracy)?;
            for b in 0..batch {
                for step in 0..chunk.steps {
                    let target = first + step;
                    if self.is_unmasked(b, target) {
                        outputs.slice_mut(s![b, target, ..]).assign(&y.row(b * chunk.steps + step));
                    } else if !self.config.zero_output_for_mask && target > 0 {
                        let before = outputs.slice(s![b, target - 1, ..]).to_owned();
                        outputs.slice_mut(s![b, target, ..]).assign(&before);
                    }
                }
            }
        }
        Ok(RnnOutput { outputs, state })
    }

    /// Runs all steps and returns the output of the last one: only its hidden vector goes through the output projection.
    fn last_output(&self, mut state: Array3<f32>) -> Result<RnnOutput> {
        let (batch, steps, features) = self.x.dim();
        // Hidden vector and input of each sequence's last step that is not masked, and whether there is one.
        let mut hidden = Array2::<f32>::zeros((batch, self.cell.hidden_len()));
        let mut inputs = Array2::<f32>::zeros((batch, features));
        let mut any = vec![false; batch];
        for first in self.chunk_starts() {
            let chunk = self.chunk(first)?;
            for (b, any) in any.iter_mut().enumerate() {
                let state = state_of(&mut state, b);
                for step in (0..chunk.steps).filter(|&step| self.is_unmasked(b, first + step)) {
                    let row = b * chunk.steps + step;
                    self.cell.update(chunk.projected.row(row), state, row_of(&mut hidden, b));
                    inputs.row_mut(b).assign(&chunk.inputs.row(row));
                    *any = true;
                }
            }
        }
        let y = self.cell.output_projection(hidden.view(), inputs.view(), self.accuracy)?;
        let mut outputs = Array3::zeros((batch, 1, self.cell.out_features()));
        for (b, any) in any.into_iter().enumerate() {
            if any && (self.is_unmasked(b, steps - 1) || !self.config.zero_output_for_mask) {
                outputs.slice_mut(s![b, 0, ..]).assign(&y.row(b));
            }
        }
        Ok(RnnOutput { outputs, state })
    }

    fn chunk_len(&self) -> usize {
        let (batch, steps, _) = self.x.dim();
        (ROWS / batch.max(1)).clamp(1, steps)
    }

    fn chunk_starts(&self) -> impl Iterator<Item = usize> {
        (0..self.x.dim().1).step_by(self.chunk_len())
    }

    fn chunk(&self, first: usize) -> Result<Chunk> {
        let (batch, all, features) = self.x.dim();
        let steps = self.chunk_len().min(all - first);
        let part = match self.config.go_backwards {
            false => self.x.slice(s![.., first..first + steps, ..]),
            true => self.x.slice(s![.., all - first - steps..all - first;-1, ..]),
        };
        let inputs = part.as_standard_layout().into_owned().into_shape_with_order((batch * steps, features));
        let inputs = inputs.map_err(shape_error)?;
        let projected = self.cell.input_projection(inputs.view(), self.accuracy)?;
        Ok(Chunk { steps, inputs, projected })
    }

    fn is_unmasked(&self, b: usize, step: usize) -> bool {
        let position = if self.config.go_backwards { self.x.dim().1 - 1 - step } else { step };
        self.mask.is_none_or(|mask| mask[[b, position]])
    }
}

fn state_of(state: &mut Array3<f32>, b: usize) -> &mut [f32] {
    state.index_axis_mut(Axis(0), b).into_slice().expect("sequences of an owned array in standard layout")
}

fn row_of(rows: &mut Array2<f32>, row: usize) -> &mut [f32] {
    rows.row_mut(row).into_slice().expect("rows of an owned array in standard layout")
}
