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
    /// Whole numbers −127 … 127, each input row with a scale of its own, `max|x| / 127` (BitNet b1.58, Keras-MML): no number is
    /// off by more than 1/254 of the row's largest.
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

/// Rows of smaller numbers are rounded as if their largest were this: f32 holds no finer steps.
const LEAST_SIZE: f32 = 127.0 * f32::MIN_POSITIVE;

/// Returns the steps of a unit for a row whose largest size is `most`; a row of nothing has those of Keras-MML's least size, 1e-5.
#[inline(always)]
pub fn absmax_steps(most: f32) -> f32 {
    let size = if most < LEAST_SIZE { LEAST_SIZE } else { most };
    127.0 / if most == 0.0 { 1e-5 } else { size }
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
            let steps = absmax_steps(most);
            (1.0 / steps, steps)
        }
        ActivationFormat::Int8 | ActivationFormat::F32 => {
            let scale = most * (1.0 / 127.5);
            let scale = if scale < f32::MIN_POSITIVE { 1.0 } else { scale };
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
                    prop_assert!((v - f32::from(*w) * scale).abs() <= most / steps * 1.0001);
                }
            }
        }

        /// Inputs of any size become the same whole numbers.
        #[test]
        fn sizes_do_not_matter(values in proptest::collection::vec(-9f32..9.0, 1..40), power in -100i32..120) {
            for format in [ActivationFormat::Int8, ActivationFormat::Int8Absmax] {
                let scaled: Vec<f32> = values.iter().map(|v| (v + 0.01) * 2f32.powi(power)).collect();
                let plain: Vec<f32> = values.iter().map(|v| v + 0.01).collect();
                let ((scale, whole), (plain_scale, plain)) = (format.whole(&scaled).unwrap(), format.whole(&plain).unwrap());
                let off = whole.iter().zip(&plain).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
                prop_assert!(off <= 1, "{:?} {:?}", whole, plain);
                let ratio = f64::from(scale) / f64::from(plain_scale) / f64::from(power).exp2();
                prop_assert!((ratio - 1.0).abs() < 1e-5, "{}", ratio);
            }
        }
    }
}
