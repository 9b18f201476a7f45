//! How a decoder attends.

use super::rotary::Rotary;
use crate::error::{Error, Result};
use crate::layer::Activation;

/// How the blocks of a decoder attend.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values, of which each serves as many heads of queries.
    pub kv_heads: usize,
    /// Numbers of a head.
    pub head_dim: usize,
    /// Positions.
    pub rotary: Rotary,
    /// How many tokens a token sees, itself counted; `None` for all before it.
    pub window: Option<usize>,
    /// What gates go through.
    pub activation: Activation,
}

impl DecoderConfig {
    /// Checks the numbers by themselves.
    ///
    /// # Errors
    /// When heads of queries are no multiple of those of keys, a head's turned numbers are more than it has, a window is empty, or the
    /// activation is none of one number.
    pub fn check(&self) -> Result<()> {
        let DecoderConfig { heads, kv_heads, head_dim, ref rotary, window, activation } = *self;
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) || window == Some(0) {
            let found = format!("{heads} heads of queries, {kv_heads} of keys, window {window:?}");
            return Err(Error::expected(
                "heads of a decoder",
                found,
                "a multiple of those of keys, and a window above 0",
            ));
        }
        if rotary.dimensions() > head_dim {
            let found = format!("{} of {head_dim}", rotary.dimensions());
            return Err(Error::expected("numbers of a head that are turned", found, "no more than it has"));
        }
        if activation == Activation::Softmax {
            return Err(Error::expected("activation of a gate", "softmax", "a function of one number"));
        }
        Ok(())
    }
}
