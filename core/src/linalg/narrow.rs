//! Numbers in units of the data, and what is lost where they are kept in fewer bits.

use std::ops::RangeInclusive;

use half::f16;

/// Sizes that need no unit: squares of such numbers, and sums of them, are normal numbers of f32.
const PLAIN: RangeInclusive<f64> = 1.0 / (1u64 << 30) as f64..=(1u64 << 30) as f64;

/// The largest exponent of a unit: its reciprocal is a normal number, too.
const MOST_EXPONENT: f64 = 1000.0;

/// Returns the power of two to count numbers in whose largest size is `most`, so that it is near 1; `None` where they need no
/// unit, or there is none for them.
///
/// Multiplying and dividing by it rounds nothing. What is computed of numbers in units is what would be computed of the numbers
/// themselves, if f32 had no ends.
pub(crate) fn unit_of(most: f64) -> Option<f64> {
    if PLAIN.contains(&most) || !(most > 0.0 && most.is_finite()) {
        return None;
    }
    Some(most.log2().floor().clamp(-MOST_EXPONENT, MOST_EXPONENT).exp2())
}

/// Does [`unit_of`] for numbers that are counted as f32.
pub(crate) fn unit_of_f32<'a>(numbers: impl Iterator<Item = &'a f32>) -> Option<f32> {
    let most = numbers.fold(0f32, |most, v| most.max(v.abs()));
    unit_of(most.into()).map(|unit| unit.clamp(126f64.exp2().recip(), 126f64.exp2()) as f32)
}

/// A sum of squares that is lost by keeping numbers in fewer bits, and the sum of squares of the numbers themselves.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Loss {
    /// Σ (kept − v)²; infinite where a number is beyond what can be kept.
    pub lost: f64,
    /// Σ v².
    pub whole: f64,
}

impl Loss {
    /// Counts the loss of numbers that become f16.
    pub fn of_halves(numbers: impl Iterator<Item = f64>) -> Self {
        let mut loss = Loss::default();
        numbers.for_each(|v| loss.add(v, f16::from_f64(v).to_f64()));
        loss
    }

    /// Counts a number that is kept as another.
    pub fn add(&mut self, wanted: f64, kept: f64) {
        self.lost += (kept - wanted).powi(2);
        self.whole += wanted * wanted;
    }

    /// Returns whether the root of what is lost is at most this share of the whole's.
    pub fn within(&self, share: f64) -> bool {
        self.lost <= share * share * self.whole
    }
}

/// The largest relative error of a number that f16 holds as a normal one.
pub(crate) const HALF_ROUNDING: f64 = 1.0 / 2048.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_powers_of_two_near_the_largest() {
        for plain in [0.0, 1.0, 1e-9, 1e9, f64::NAN, f64::INFINITY] {
            assert_eq!(unit_of(plain), None, "{plain}");
        }
        for most in [1e-300, 3e-20, 1e-12, 1e12, 7e38, 1e300] {
            let unit = unit_of(most).unwrap();
            assert!(most / unit >= 1.0 && most / unit < 2.0 && unit.log2().fract() == 0.0, "{most}: {unit}");
        }
        assert_eq!(unit_of_f32([1e-40f32, -3e-42].iter()), Some(126f32.exp2().recip()));
        assert_eq!(unit_of_f32([1e-3f32, -3e4].iter()), None);
    }

    #[test]
    fn losses_are_of_both_ends() {
        let of = |v: f64| Loss::of_halves([v, -v / 3.0].into_iter());
        assert!(of(1.0).within(HALF_ROUNDING) && of(60_000.0).within(HALF_ROUNDING));
        assert!(!of(1e-9).within(0.5) && !of(1e5).within(1e9));
        assert!(of(0.0).within(0.0));
    }
}
