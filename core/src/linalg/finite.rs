//! The check that numbers can be computed with.

use crate::error::{Error, Result};

/// A number type that [`require_finite`] checks.
pub trait Float: Copy + Into<f64> {
    /// The type's bits, less the sign: they are ordered as the magnitudes are.
    type Magnitude: Ord + Copy + Default;

    /// The magnitude of the infinities. NaNs have larger ones.
    const INFINITE: Self::Magnitude;

    /// Returns the bits without the sign.
    fn magnitude(self) -> Self::Magnitude;
}

impl Float for f32 {
    type Magnitude = u32;

    const INFINITE: u32 = f32::INFINITY.to_bits();

    #[inline(always)]
    fn magnitude(self) -> u32 {
        self.to_bits() & (u32::MAX >> 1)
    }
}

impl Float for f64 {
    type Magnitude = u64;

    const INFINITE: u64 = f64::INFINITY.to_bits();

    #[inline(always)]
    fn magnitude(self) -> u64 {
        self.to_bits() & (u64::MAX >> 1)
    }
}

/// Refuses infinities and NaN, and says where the first one is.
///
/// # Errors
/// When a value is not finite.
pub fn require_finite<'a, T: Float + 'a>(what: &str, values: impl Iterator<Item = &'a T> + Clone) -> Result<()> {
    // A maximum needs no branch for each value.
    let largest = values.clone().fold(T::Magnitude::default(), |most, value| value.magnitude().max(most));
    if largest < T::INFINITE {
        return Ok(());
    }
    match values.enumerate().find(|(_, value)| value.magnitude() >= T::INFINITE) {
        Some((index, value)) => Err(Error::NotFinite { what: what.to_owned(), value: (*value).into(), index }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_is_not_finite_is_named() {
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let values = [0.0, -f32::MAX, f32::MAX, bad, f32::NAN];
            let wide = values.map(f64::from);
            assert!(require_finite("x", values[..3].iter()).is_ok() && require_finite("x", wide[..3].iter()).is_ok());
            for found in [require_finite("x", values.iter()), require_finite("x", wide.iter())] {
                assert!(matches!(found, Err(Error::NotFinite { index: 3, .. })), "{found:?}");
            }
        }
        assert!(require_finite("nothing", std::iter::empty::<&f32>()).is_ok());
    }
}
