//! How a search ranks keys, and which of them it returns.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The value that keys are ranked by, and that a hit has to reach a threshold with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ranking {
    /// s · score: how far the key moves the output.
    #[default]
    Contribution,
    /// How well the key matches the whitened query, however far it moves the output (AXL's ranking).
    Score,
}

/// Whether a key with a negative value can be a hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sides {
    /// It can: |value| ≥ threshold.
    #[default]
    Both,
    /// It cannot: value ≥ threshold (AXL's search).
    Positive,
}

/// The limit of a search: which keys a query uses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limit {
    /// The highest ranked ones, this many on average over the inputs.
    Keys(f64),
    /// Those whose ranking value is at least this.
    Threshold(f32),
    /// As few as certify ‖ŷ − y‖ / ‖y‖ up to this, for each query by itself.
    MaxError(f64),
}

impl Limit {
    /// Checks the limit by itself and against the sides that are searched.
    ///
    /// # Errors
    /// When its number is out of range, or an error is to be certified by a one-sided search.
    pub(super) fn validate(&self, sides: Sides) -> Result<()> {
        match *self {
            Limit::Keys(k) if !(k > 0.0 && k.is_finite()) => {
                Err(Error::expected("expected_keys_per_query", k, "a positive number"))
            }
            Limit::Threshold(t) if !t.is_finite() || (t < 0.0 && sides == Sides::Both) => {
                Err(Error::expected("threshold", t, "a finite number, not negative unless sides = \"positive\""))
            }
            Limit::MaxError(e) if !(e > 0.0 && e.is_finite()) => {
                Err(Error::expected("max_relative_error", e, "a positive number"))
            }
            Limit::MaxError(_) if sides == Sides::Positive => Err(Error::expected(
                "sides",
                "\"positive\"",
                "\"both\" with max_relative_error: a one-sided search cannot promise an error",
            )),
            _ => Ok(()),
        }
    }
}

/// Checks the number of expected keys against a layer's number of keys.
///
/// # Errors
/// When more are expected than there are.
pub(super) fn check_keys(expected: Option<f64>, keys: usize) -> Result<()> {
    match expected {
        Some(k) if k > keys as f64 => {
            Err(Error::expected("expected_keys_per_query", k, format!("at most {keys}, the layer's keys")))
        }
        _ => Ok(()),
    }
}
