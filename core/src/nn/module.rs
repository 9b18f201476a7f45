//! Any of the layers, and several of them one after another.

use std::borrow::Cow;

use ndarray::{Array2, Array3, ArrayD, ArrayView2, ArrayViewD, Axis, IxDyn};

use super::block::{TransformerBlock, normalized};
use super::embedding::{PatchEmbedding, Patches, TokenEmbedding};
use super::glu::Glu;
use super::gru::Gru;
use super::lru::Lru;
use super::recurrence::{Ran, start};
use super::rows::{at_position, linear, rows, sequences, shaped};
use crate::error::{Error, Result};
use crate::layer::{Accuracy, Activation, SharedLayer, RmsNorm};
use crate::linalg::require_finite;

/// A layer, or layers one after another. Cloning shares the arrays of linear layers.
#[derive(Debug, Clone)]
pub enum Module {
    /// A linear layer of any method, on the last dimension.
    Linear(SharedLayer),
    /// A function of each number.
    Activation(Activation),
    RmsNorm(RmsNorm),
    Glu(Glu),
    Gru(Gru),
    Lru(Box<Lru>),
    /// A GRU in the place of attention: `AttentionMML`.
    Attention(Gru),
    TransformerBlock(Box<TransformerBlock>),
    TokenEmbedding(TokenEmbedding),
    Patches(Patches),
    PatchEmbedding(PatchEmbedding),
    /// `[batch, …]` as `[batch, features]`.
    Flatten,
    /// `[batch, steps, features]` as the steps' mean `[batch, features]`.
    Mean,
    /// One after another, by name.
    Sequential(Vec<(String, Module)>),
}

/// Where a module is in a sequence that it is given step by step.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoding {
    /// The states of its recurrent parts, in their order, `[batch, …, …]` each.
    pub states: Vec<Array3<f32>>,
    /// Steps taken so far.
    pub position: usize,
}

impl Module {
    /// What it is called in a store; a linear layer goes by its method there.
    pub fn kind(&self) -> Cow<'static, str> {
        let kind = match self {
            Module::Linear(layer) => return layer.method().into(),
            Module::Activation(_) => "activation",
            Module::RmsNorm(_) => "rms_norm",
            Module::Glu(_) => "glu",
            Module::Gru(_) => "gru",
            Module::Lru(_) => "lru",
            Module::Attention(_) => "attention",
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

    /// Runs it.
    ///
    /// # Errors
    /// When the input's shape does not fit, or a number is not finite.
    pub fn forward(&self, x: ArrayViewD<f32>, accuracy: Accuracy) -> Result<ArrayD<f32>> {
        require_finite("the input", x.iter())?;
        self.run(x, accuracy)
    }

    fn run(&self, x: ArrayViewD<f32>, accuracy: Accuracy) -> Result<ArrayD<f32>> {
        match self {
            Module::Linear(layer) => linear(layer, x, accuracy),
            Module::Activation(activation) => {
                let mut y = rows(x.view())?;
                activation.apply(y.view_mut());
                shaped(y, x.shape())
            }
            Module::RmsNorm(norm) => normalized(norm, x.to_owned()),
            Module::Glu(glu) => glu.forward(x, accuracy),
            Module::Gru(gru) | Module::Attention(gru) => {
                let ran = gru.run(sequences(x)?.view(), None, None, accuracy)?;
                Ok(as_asked(ran, gru.config().sequence.return_sequences))
            }
            Module::Lru(lru) => {
                let ran = lru.run(sequences(x)?.view(), None, None, accuracy)?;
                Ok(as_asked(ran, lru.config().sequence.return_sequences))
            }
            Module::TransformerBlock(block) => block.forward(x, accuracy),
            Module::TokenEmbedding(embedding) => embedding.forward(x),
            Module::Patches(patches) => patches.forward(x),
            Module::PatchEmbedding(embedding) => embedding.forward(x, accuracy),
            Module::Flatten => {
                let Some(&batch) = x.shape().first() else {
                    return Err(Error::expected("input to flatten", "a number by itself", "[batch, …]"));
                };
                let shape = [batch, x.shape()[1..].iter().product()];
                let x = x.as_standard_layout().into_owned().into_shape_with_order(IxDyn(&shape));
                x.map_err(|e| Error::Numeric(e.to_string()))
            }
            Module::Mean => {
                let x = sequences(x)?;
                let found = format!("{:?}", x.dim());
                let mean = x.mean_axis(Axis(1));
                mean.map(|m| m.into_dyn()).ok_or_else(|| Error::expected("steps of a mean", found, "at least one"))
            }
            Module::Sequential(all) => {
                let mut y = x.to_owned();
                for (name, module) in all {
                    y = module.run(y.view(), accuracy).map_err(|e| e.in_layer(name))?;
                }
                Ok(y)
            }
        }
    }

    /// Before the first step of so many sequences.
    pub fn decoding(&self, batch: usize) -> Decoding {
        let mut states = vec![];
        self.collect_states(batch, &mut states);
        Decoding { states, position: 0 }
    }

    fn collect_states(&self, batch: usize, states: &mut Vec<Array3<f32>>) {
        match self {
            Module::Gru(gru) | Module::Attention(gru) => states.push(start(gru, batch)),
            Module::Lru(lru) => states.push(start(&**lru, batch)),
            Module::TransformerBlock(block) => states.push(start(block.attention(), batch)),
            Module::Sequential(all) => all.iter().for_each(|(_, module)| module.collect_states(batch, states)),
            _ => {}
        }
    }

    /// Takes a step: inputs `[batch, features]` (tokens `[batch, 1]`) at the next position give what a run over the whole
    /// sequence gives there. Where it fails, `decoding` is as it was.
    ///
    /// # Errors
    /// As [`Module::forward`], when the states are another module's, and when a part needs the whole sequence at once.
    pub fn step(&self, x: ArrayView2<f32>, decoding: &mut Decoding, accuracy: Accuracy) -> Result<Array2<f32>> {
        require_finite("the input", x.iter())?;
        let mut next = decoding.clone();
        let mut states = next.states.iter_mut();
        let y = self.advance(x, &mut states, next.position, accuracy)?;
        if states.next().is_some() {
            return Err(Error::expected("states of a decoding", decoding.states.len(), "those of this module"));
        }
        next.position += 1;
        *decoding = next;
        Ok(y)
    }

    fn advance(
        &self,
        x: ArrayView2<f32>,
        states: &mut std::slice::IterMut<Array3<f32>>,
        position: usize,
        accuracy: Accuracy,
    ) -> Result<Array2<f32>> {
        let mut state =
            || states.next().ok_or_else(|| Error::expected("states of a decoding", "too few", "those of this module"));
        let whole = |what: &str| Err(Error::expected("module to take steps with", what, "one that goes step by step"));
        match self {
            Module::Linear(layer) => Ok(at_position(layer, position)?.forward(x, accuracy)?.y),
            Module::RmsNorm(norm) => norm.at(position)?.forward(x),
            Module::Glu(glu) => glu.step(x, position, accuracy),
            Module::Gru(gru) | Module::Attention(gru) => match gru.config().sequence.go_backwards {
                true => whole("a gru that goes backwards"),
                false => gru.step(x, state()?, accuracy),
            },
            Module::Lru(lru) => match lru.config().sequence.go_backwards {
                true => whole("an lru that goes backwards"),
                false => lru.step(x, state()?, accuracy),
            },
            Module::TransformerBlock(block) => block.step(x, state()?, position, accuracy),
            Module::TokenEmbedding(embedding) => Ok(embedding
                .starting_at(x.into_dyn(), position)?
                .index_axis_move(Axis(1), 0)
                .into_dimensionality()
                .map_err(|e| Error::Numeric(e.to_string()))?),
            Module::Activation(activation) => {
                let mut y = x.to_owned();
                activation.apply(y.view_mut());
                Ok(y)
            }
            Module::Patches(_) | Module::PatchEmbedding(_) | Module::Flatten | Module::Mean => whole(&self.kind()),
            Module::Sequential(all) => {
                let mut y = x.to_owned();
                for (name, module) in all {
                    y = module.advance(y.view(), states, position, accuracy).map_err(|e| e.in_layer(name))?;
                }
                Ok(y)
            }
        }
    }
}

fn as_asked(ran: Ran, all: bool) -> ArrayD<f32> {
    match all {
        true => ran.outputs.into_dyn(),
        false => ran.outputs.index_axis_move(Axis(1), 0).into_dyn(),
    }
}
