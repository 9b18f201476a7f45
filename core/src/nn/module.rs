//! A module of any kind: how it runs over whole inputs, and step by step.

use std::borrow::Cow;
use std::slice::IterMut;

use ndarray::{Array2, Array3, ArrayD, ArrayView2, ArrayViewD, Axis, IxDyn};

use super::block::TransformerBlock;
use super::embedding::{PatchEmbedding, Patches, TokenEmbedding};
use super::glu::Glu;
use super::gru::Gru;
use super::lru::Lru;
use super::recurrence::{RnnOutput, initial_state};
use super::shape::{
    as_sequences, at_position, flatten_rows, forward_linear, forward_norm, shape_error, unflatten_rows,
};
use super::token_mixer::GruTokenMixer;
use crate::error::{Error, Result};
use crate::layer::{Accuracy, Activation, RmsNorm, SharedLayer};
use crate::linalg::require_finite;

/// A module of any kind, or several one after another. Cloning shares the arrays of linear layers.
#[derive(Debug, Clone)]
pub enum Module {
    /// A linear layer of any method, on the last dimension.
    Linear(SharedLayer),
    /// An activation function.
    Activation(Activation),
    /// A root mean square norm, on the last dimension.
    RmsNorm(RmsNorm),
    /// A gated linear unit, on the last dimension.
    Glu(Glu),
    /// A gated recurrent unit over sequences.
    Gru(Gru),
    /// A linear recurrent unit over sequences.
    Lru(Box<Lru>),
    /// A GRU that mixes tokens, where a transformer has attention.
    GruTokenMixer(GruTokenMixer),
    /// A transformer block whose tokens are mixed by a GRU.
    TransformerBlock(Box<TransformerBlock>),
    /// An embedding of tokens.
    TokenEmbedding(TokenEmbedding),
    /// Images cut into patches.
    Patches(Patches),
    /// An embedding of patches.
    PatchEmbedding(PatchEmbedding),
    /// Reshapes `[batch, …]` to `[batch, features]`.
    Flatten,
    /// Averages `[batch, steps, features]` over the steps: `[batch, features]`.
    Mean,
    /// Modules one after another, by name.
    Sequential(Vec<(String, Module)>),
}

/// What a module carries from one step of a sequence to the next.
#[derive(Debug, Clone, PartialEq)]
pub struct DecodingState {
    /// The states of the module's recurrent parts, in their order, `[batch, …, …]` each.
    pub states: Vec<Array3<f32>>,
    /// The position of the next step: the number of steps taken.
    pub position: usize,
}

impl Module {
    /// Returns the name of the module's kind in a store; a linear layer goes by its method there.
    pub fn kind(&self) -> Cow<'static, str> {
        let kind = match self {
            Module::Linear(layer) => return layer.method().into(),
            Module::Activation(_) => "activation",
            Module::RmsNorm(_) => "rms_norm",
            Module::Glu(_) => "glu",
            Module::Gru(_) => "gru",
            Module::Lru(_) => "lru",
            // Stored under Keras-MatMulLess's word.
            Module::GruTokenMixer(_) => "attention",
            Module::TransformerBlock(_) => "transformer_block",
            Module::TokenEmbedding(_) => "token_embedding",
            Module::Patches(_) => "patches",
            Module::PatchEmbedding(_) => "patch_embedding",
            Module::Flatten => "flatten",
            Module::Mean => "mean",
            Module::Sequential(_) => "sequential",
        };
        kind.into()
    }

    /// Runs the module on an input of the shape that its kind takes.
    ///
    /// # Errors
    /// When the input's shape does not fit, or a number is not finite.
    pub fn forward(&self, x: ArrayViewD<f32>, accuracy: Accuracy) -> Result<ArrayD<f32>> {
        require_finite("the input", x.iter())?;
        self.forward_finite(x, accuracy)
    }

    fn forward_finite(&self, x: ArrayViewD<f32>, accuracy: Accuracy) -> Result<ArrayD<f32>> {
        match self {
            Module::Linear(layer) => forward_linear(layer, x, accuracy),
            Module::Activation(activation) => {
                let mut y = flatten_rows(x.view())?;
                activation.apply(y.view_mut());
                unflatten_rows(y, x.shape())
            }
            Module::RmsNorm(norm) => forward_norm(norm, x.to_owned()),
            Module::Glu(glu) => glu.forward(x, accuracy),
            Module::Gru(gru) => {
                let output = gru.forward(as_sequences(x)?.view(), None, None, accuracy)?;
                Ok(sequence_or_last(output, gru.config().sequence.return_sequences))
            }
            Module::Lru(lru) => {
                let output = lru.forward(as_sequences(x)?.view(), None, None, accuracy)?;
                Ok(sequence_or_last(output, lru.config().sequence.return_sequences))
            }
            Module::GruTokenMixer(mixer) => {
                Ok(mixer.forward(as_sequences(x)?.view(), None, None, accuracy)?.outputs.into_dyn())
            }
            Module::TransformerBlock(block) => block.forward(x, accuracy),
            Module::TokenEmbedding(embedding) => embedding.forward(x),
            Module::Patches(patches) => patches.forward(x),
            Module::PatchEmbedding(embedding) => embedding.forward(x, accuracy),
            Module::Flatten => flatten(x),
            Module::Mean => mean(x),
            Module::Sequential(modules) => {
                let mut y = x.to_owned();
                for (name, module) in modules {
                    y = module.forward_finite(y.view(), accuracy).map_err(|e| e.in_layer(name))?;
                }
                Ok(y)
            }
        }
    }

    /// Returns the state before the first step of `batch` sequences.
    pub fn initial_state(&self, batch: usize) -> DecodingState {
        let mut states = vec![];
        self.collect_states(batch, &mut states);
        DecodingState { states, position: 0 }
    }

    fn collect_states(&self, batch: usize, states: &mut Vec<Array3<f32>>) {
        match self {
            Module::Gru(gru) => states.push(initial_state(gru, batch)),
            Module::Lru(lru) => states.push(initial_state(&**lru, batch)),
            Module::GruTokenMixer(mixer) => states.push(initial_state(mixer.gru(), batch)),
            Module::TransformerBlock(block) => states.push(initial_state(block.token_mixer().gru(), batch)),
            Module::Sequential(modules) => {
                modules.iter().for_each(|(_, module)| module.collect_states(batch, states));
            }
            _ => {}
        }
    }

    /// Runs one step: inputs `[batch, features]` (tokens `[batch, 1]`) at the next position give what [`Module::forward`] over
    /// the whole sequence gives there. `state` becomes that of the next step.
    ///
    /// # Errors
    /// As [`Module::forward`], when the states are another module's, and when a part needs the whole sequence at once; `state`
    /// is as it was then.
    pub fn step(&self, x: ArrayView2<f32>, state: &mut DecodingState, accuracy: Accuracy) -> Result<Array2<f32>> {
        require_finite("the input", x.iter())?;
        let mut next = state.clone();
        let mut states = next.states.iter_mut();
        let y = self.step_finite(x, &mut states, next.position, accuracy)?;
        if states.next().is_some() {
            return Err(Error::expected("states of a module", state.states.len(), "those of this module"));
        }
        next.position += 1;
        *state = next;
        Ok(y)
    }

    fn step_finite(
        &self,
        x: ArrayView2<f32>,
        states: &mut IterMut<Array3<f32>>,
        position: usize,
        accuracy: Accuracy,
    ) -> Result<Array2<f32>> {
        let mut state =
            || states.next().ok_or_else(|| Error::expected("states of a module", "too few", "those of this module"));
        let refused =
            |what: &str| Err(Error::expected("module to run step by step", what, "one that needs no later step"));
        match self {
            Module::Linear(layer) => Ok(at_position(layer, position)?.forward(x, accuracy)?.y),
            Module::RmsNorm(norm) => norm.at_position(position)?.forward(x),
            Module::Glu(glu) => glu.step(x, position, accuracy),
            Module::Gru(gru) => match gru.config().sequence.go_backwards {
                true => refused("a gru that goes backwards"),
                false => gru.step(x, state()?, accuracy),
            },
            Module::Lru(lru) => match lru.config().sequence.go_backwards {
                true => refused("an lru that goes backwards"),
                false => lru.step(x, state()?, accuracy),
            },
            Module::GruTokenMixer(mixer) => mixer.step(x, state()?, accuracy),
            Module::TransformerBlock(block) => block.step(x, state()?, position, accuracy),
            Module::TokenEmbedding(embedding) => {
                let y = embedding.forward_from(x.into_dyn(), position)?.index_axis_move(Axis(1), 0);
                y.into_dimensionality().map_err(shape_error)
            }
            Module::Activation(activation) => {
                let mut y = x.to_owned();
                activation.apply(y.view_mut());
                Ok(y)
            }
            Module::Patches(_) | Module::PatchEmbedding(_) | Module::Flatten | Module::Mean => refused(&self.kind()),
            Module::Sequential(modules) => {
                let mut y = x.to_owned();
                for (name, module) in modules {
                    y = module.step_finite(y.view(), states, position, accuracy).map_err(|e| e.in_layer(name))?;
                }
                Ok(y)
            }
        }
    }
}

fn flatten(x: ArrayViewD<f32>) -> Result<ArrayD<f32>> {
    let Some(&batch) = x.shape().first() else {
        return Err(Error::expected("input to flatten", "a number by itself", "[batch, …]"));
    };
    let shape = [batch, x.shape()[1..].iter().product()];
    x.as_standard_layout().into_owned().into_shape_with_order(IxDyn(&shape)).map_err(shape_error)
}

fn mean(x: ArrayViewD<f32>) -> Result<ArrayD<f32>> {
    let x = as_sequences(x)?;
    let found = format!("{:?}", x.dim());
    let mean = x.mean_axis(Axis(1));
    mean.map(|m| m.into_dyn()).ok_or_else(|| Error::expected("steps of a mean", found, "at least one"))
}

/// Returns `[batch, steps, features]`, or the single step `[batch, features]` that a recurrent module was asked for.
fn sequence_or_last(output: RnnOutput, sequence: bool) -> ArrayD<f32> {
    match sequence {
        true => output.outputs.into_dyn(),
        false => output.outputs.index_axis_move(Axis(1), 0).into_dyn(),
    }
}
