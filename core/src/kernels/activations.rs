//! Inputs rounded to whole numbers of 8 bits.

use serde::{Deserialize, Serialize};

/// What inputs are rounded to before they meet the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActivationFormat {
    /// Nothing.
    #[default]
    F32,
    /// Whole numbers −128 … 127, each input row with a scale of its own, `max|x| / 127.5` (LQER-Qwix): no number is off
    /// by more than 1/255 of the row's largest. NF4's levels become 127ths of the scale with it, off by at most 1/254
    /// of it.
    Int8,
    /// Whole numbers −127 … 127, each input row with a scale of its own, `max|x| / 127`, of sizes from 1e-5 to 1e9
    /// (BitNet b1.58, Keras-MML): no number is off by more than 1/254 of the row's largest.
    #[serde(rename = "int8_absmax")]
    Int8Absmax,
}

impl ActivationFormat {
    /// Returns whether inputs become whole numbers.
    pub fn rounds(self) -> bool {
        self != ActivationFormat::F32
    }

    /// Returns the whole numbers that a row becomes, and the scale that they are multiplied with; `None` for floats.
    pub fn whole(self, row: &[f32]) -> Option<(f32, Vec<i8>)> {
        self.rounds().then(|| {
            let mut whole = vec![0; row.len()];
            (round(row, self, &mut whole), whole)
        })
    }
}

/// Adding it rounds to the nearest whole number, ties to even.
const TO_WHOLE: f32 = 12_582_912.0;

/// Writes a row as whole numbers −128 … 127, and returns the scale that they are multiplied with.
///
/// # Panics
/// When the lengths differ.
#[inline(always)]
pub fn round(row: &[f32], format: ActivationFormat, out: &mut [i8]) -> f32 {
    assert_eq!(row.len(), out.len(), "whole numbers of a row");
    // Finite numbers are in the order of their bits, signs aside; and a maximum of integers needs no order of its own.
    let (mut most, mut i) = (0, 0);
    while i < row.len() {
        let bits = row[i].to_bits() & (u32::MAX >> 1);
        most = if bits > most { bits } else { most };
        i += 1;
    }
    let most = f32::from_bits(most);
    let (scale, reciprocal) = match format {
        ActivationFormat::Int8Absmax => {
            let steps = 127.0 / most.clamp(1e-5, 1e9);
            (1.0 / steps, steps)
        }
        ActivationFormat::Int8 | ActivationFormat::F32 => {
            let scale = most * (1.0 / 127.5);
            let scale = if scale < f32::MIN_POSITIVE.sqrt() { 1.0 } else { scale };
            (scale, 1.0 / scale)
        }
    };
    i = 0;
    while i < row.len() {
        let value = row[i] * reciprocal;
        let value = if value < -128.0 { -128.0 } else { value };
        let value = if value > 127.0 { 127.0 } else { value };
        // The sum's lowest bits are the number's.
        out[i] = (value + TO_WHOLE).to_bits() as i8;
        i += 1;
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// No input is further off than half a step.
        #[test]
        fn no_further_off_than_half_a_step(values in proptest::collection::vec(-9f32..9.0, 1..40)) {
            let most = values.iter().fold(0f32, |m, v| m.max(v.abs()));
            for (format, steps) in [(ActivationFormat::Int8, 255.0), (ActivationFormat::Int8Absmax, 254.0)] {
                let (scale, whole) = format.whole(&values).unwrap();
                for (v, w) in values.iter().zip(&whole) {
                    prop_assert!((v - f32::from(*w) * scale).abs() <= most.max(1e-5) / steps * 1.0001);
                }
            }
        }
    }
}
