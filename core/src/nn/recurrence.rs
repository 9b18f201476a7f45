//! Sequences through a cell: what does not depend on the state is done for many steps at once, the state step by step.

use ndarray::{Array2, Array3, ArrayView1, ArrayView2, ArrayView3, Axis, s};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::layer::{Accuracy};
use crate::linalg::require_finite;
use crate::linalg::large_zeros;

/// Rows that go through a cell's layers at once: what a long sequence takes in memory besides its inputs and outputs.
const ROWS: usize = 512;

/// How a sequence is run, with Keras's names and defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SequenceConfig {
    /// Whether each step's output is given, or the last one's alone.
    pub return_sequences: bool,
    /// Whether the state is given beside. The methods here always give it: it is for who asks a stored module.
    pub return_state: bool,
    /// Whether steps are taken from the last to the first; outputs are in the order of the steps.
    pub go_backwards: bool,
    /// Whether the next batch begins where this one ended. Here a state is given to each run: it is for who asks.
    pub stateful: bool,
    /// Whether steps that a mask leaves out give zeros, or what the step before gave.
    pub zero_output_for_mask: bool,
}

/// A recurrent cell.
pub trait Cell {
    /// Width of the inputs.
    fn in_features(&self) -> usize;
    /// Width of the outputs.
    fn out_features(&self) -> usize;
    /// Shape of the state of one sequence.
    fn state_shape(&self) -> (usize, usize);
    /// What a step needs of its input, for inputs `[rows, in_features]`: `[rows, …]`.
    ///
    /// # Errors
    /// As [`Layer::forward`](crate::layer::Layer::forward).
    fn drive(&self, x: ArrayView2<f32>, accuracy: Accuracy) -> Result<Array2<f32>>;
    /// Numbers that a step leaves for its output.
    fn left_len(&self) -> usize;
    /// Takes a step: the state becomes the next one, and `left` what its output is made of.
    fn advance(&self, drive: ArrayView1<f32>, state: &mut [f32], left: &mut [f32]);
    /// The outputs of steps, from what they left `[rows, …]` and their inputs `[rows, in_features]`.
    ///
    /// # Errors
    /// As [`Layer::forward`](crate::layer::Layer::forward).
    fn output(&self, left: ArrayView2<f32>, x: ArrayView2<f32>, accuracy: Accuracy) -> Result<Array2<f32>>;
}

/// What a run gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Ran {
    /// `[batch, steps, out_features]`, of one step where only the last one's was asked for.
    pub outputs: Array3<f32>,
    /// The state after the last step, `[batch, …, …]`.
    pub state: Array3<f32>,
}

/// The state before the first step where none is given: zeros.
pub fn start(cell: &impl Cell, batch: usize) -> Array3<f32> {
    let (a, b) = cell.state_shape();
    Array3::zeros((batch, a, b))
}

/// Runs `x` `[batch, steps, in_features]` from a state on. `mask` `[batch, steps]` says which steps are there: the others leave
/// the state as it is.
///
/// # Errors
/// When a shape does not fit, there is no step, or a number is not finite.
pub fn run(
    cell: &impl Cell,
    config: SequenceConfig,
    x: ArrayView3<f32>,
    state: Option<ArrayView3<f32>>,
    mask: Option<ArrayView2<bool>>,
    accuracy: Accuracy,
) -> Result<Ran> {
    let (batch, steps, features) = x.dim();
    if features != cell.in_features() || steps == 0 {
        let (found, expected) = (format!("{:?}", x.dim()), format!("[batch, at least 1, {}]", cell.in_features()));
        return Err(Error::expected("shape of sequences, [batch, steps, features]", found, expected));
    }
    if let Some(found) = mask.filter(|mask| mask.dim() != (batch, steps)) {
        let (found, expected) = (format!("{:?}", found.dim()), format!("({batch}, {steps})"));
        return Err(Error::expected("shape of a mask, [batch, steps]", found, expected));
    }
    let mut state = match state {
        Some(state) => checked_state(cell, batch, state)?,
        None => start(cell, batch),
    };
    let all = config.return_sequences;
    let (left_len, width) = (cell.left_len(), cell.out_features());
    let mut outputs = large_zeros((batch, if all { steps } else { 1 }, width));
    // What the last step that was there left, its input, and whether there was one.
    let mut last_left = Array2::<f32>::zeros((batch, left_len));
    let mut last_x = Array2::<f32>::zeros((batch, features));
    let mut seen = vec![false; batch];
    let chunk = (ROWS / batch.max(1)).clamp(1, steps);
    for from in (0..steps).step_by(chunk) {
        let taken = chunk.min(steps - from);
        // The steps in the order in which they are taken.
        let part = match config.go_backwards {
            false => x.slice(s![.., from..from + taken, ..]),
            true => x.slice(s![.., steps - from - taken..steps - from;-1, ..]),
        };
        let there = |b: usize, step: usize| {
            let place = if config.go_backwards { steps - 1 - from - step } else { from + step };
            mask.is_none_or(|mask| mask[[b, place]])
        };
        let rows = part.as_standard_layout().into_owned().into_shape_with_order((batch * taken, features));
        let rows = rows.map_err(|e| Error::Numeric(e.to_string()))?;
        let drive = cell.drive(rows.view(), accuracy)?;
        let mut left = Array2::<f32>::zeros((if all { batch * taken } else { 1 }, left_len));
        for (b, seen) in seen.iter_mut().enumerate() {
            let mut one = state.index_axis_mut(Axis(0), b);
            let one = one.as_slice_mut().expect("a state's own array");
            for step in (0..taken).filter(|&step| there(b, step)) {
                let row = b * taken + step;
                let mut target = left.row_mut(if all { row } else { 0 });
                cell.advance(drive.row(row), one, target.as_slice_mut().expect("rows of an owned array"));
                *seen = true;
                if !all {
                    last_left.row_mut(b).assign(&target);
                    last_x.row_mut(b).assign(&rows.row(row));
                }
            }
        }
        if all {
            let y = cell.output(left.view(), rows.view(), accuracy)?;
            for b in 0..batch {
                for step in 0..taken {
                    let target = from + step;
                    if there(b, step) {
                        outputs.slice_mut(s![b, target, ..]).assign(&y.row(b * taken + step));
                    } else if !config.zero_output_for_mask && target > 0 {
                        let before = outputs.slice(s![b, target - 1, ..]).to_owned();
                        outputs.slice_mut(s![b, target, ..]).assign(&before);
                    }
                }
            }
        }
    }
    if !all {
        let y = cell.output(last_left.view(), last_x.view(), accuracy)?;
        let last = if config.go_backwards { 0 } else { steps - 1 };
        for b in 0..batch {
            let zero = config.zero_output_for_mask && mask.is_some_and(|mask| !mask[[b, last]]);
            if seen[b] && !zero {
                outputs.slice_mut(s![b, 0, ..]).assign(&y.row(b));
            }
        }
    }
    Ok(Ran { outputs, state })
}

/// One step for inputs `[batch, in_features]`: outputs `[batch, out_features]`, and the state becomes the next one.
///
/// # Errors
/// As [`run`].
pub fn step(cell: &impl Cell, x: ArrayView2<f32>, state: &mut Array3<f32>, accuracy: Accuracy) -> Result<Array2<f32>> {
    let x = x.insert_axis(Axis(1));
    let Ran { outputs, state: next } = run(cell, SequenceConfig::default(), x, Some(state.view()), None, accuracy)?;
    *state = next;
    Ok(outputs.index_axis_move(Axis(1), 0))
}

fn checked_state(cell: &impl Cell, batch: usize, state: ArrayView3<f32>) -> Result<Array3<f32>> {
    let (a, b) = cell.state_shape();
    if state.dim() != (batch, a, b) {
        let (found, expected) = (format!("{:?}", state.dim()), format!("{:?}", (batch, a, b)));
        return Err(Error::expected("shape of a state", found, expected));
    }
    require_finite("the state", state.iter())?;
    Ok(state.as_standard_layout().into_owned())
}
