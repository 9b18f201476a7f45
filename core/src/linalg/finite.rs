//! Numbers that can be computed with.

use crate::error::{Error, Result};

/// Refuses infinities and NaN, and says where the first one is.
pub fn require_finite<'a>(what: &str, values: impl Iterator<Item = &'a f32> + Clone) -> Result<()> {
    // Less their signs, infinities and NaN are the largest bit patterns; a maximum needs no branch for each value.
    let largest = values.clone().fold(0, |most, value| (value.to_bits() & (u32::MAX >> 1)).max(most));
    if largest < f32::INFINITY.to_bits() {
        return Ok(());
    }
    match values.enumerate().find(|(_, value)| !value.is_finite()) {
        Some((index, value)) => Err(Error::NotFinite { what: what.to_owned(), value: f64::from(*value), index }),
        None => Ok(()),
    }
}
