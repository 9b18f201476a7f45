//! Rotary positions (Su et al., 2021), and how models stretch them over longer texts than they were trained on.

use std::f64::consts::PI;

use crate::error::{Error, Result};

/// How frequencies are changed for texts longer than those of the training, as transformers' configurations name it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum RotaryScaling {
    /// They are not (`default`).
    #[default]
    None,
    /// All are divided by a factor (`linear`).
    Linear {
        /// The factor.
        factor: f64,
    },
    /// The base grows with a text that is longer than `original` (`dynamic`, NTK-aware).
    Dynamic {
        /// How fast it grows.
        factor: f64,
        /// The length of the training's texts.
        original: usize,
    },
    /// Low frequencies are divided by a factor, high ones stay (`yarn`, Peng et al., 2023).
    Yarn {
        /// The factor.
        factor: f64,
        /// The length of the training's texts.
        original: usize,
        /// Turns over that length above which a frequency stays as it is.
        beta_fast: f64,
        /// Turns below which it is divided.
        beta_slow: f64,
        /// What queries and keys are multiplied with; `None` for 0.1 · ln(factor) + 1.
        attention_factor: Option<f64>,
    },
    /// Low frequencies are divided by a factor, with a smooth passage to high ones (`llama3`).
    Llama3 {
        /// The factor.
        factor: f64,
        /// The length of the training's texts.
        original: usize,
        /// Wavelengths above `original` divided by this are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original` divided by this stay.
        high_freq_factor: f64,
    },
}

/// The rotary positions of a model: pairs of a head's numbers, of which the first is in its first half and the second in its second,
/// are turned by angles that grow with the position.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotary {
    dimensions: usize,
    base: f64,
    scaling: RotaryScaling,
    /// Of texts that are as long as those of the training at most.
    frequencies: Vec<f32>,
    /// What cosines and sines are multiplied with.
    factor: f32,
}

impl Rotary {
    /// Returns the positions of heads of which the first `dimensions` numbers are turned.
    ///
    /// # Errors
    /// When the number is odd or 0, or a setting is out of its range.
    pub fn new(dimensions: usize, base: f64, scaling: RotaryScaling) -> Result<Self> {
        if dimensions == 0 || !dimensions.is_multiple_of(2) {
            return Err(Error::expected("numbers of a head that rotary positions turn", dimensions, "an even number"));
        }
        let (factor, original) = match scaling {
            RotaryScaling::None => (1.0, 1),
            RotaryScaling::Linear { factor } => (factor, 1),
            RotaryScaling::Dynamic { factor, original }
            | RotaryScaling::Yarn { factor, original, .. }
            | RotaryScaling::Llama3 { factor, original, .. } => (factor, original),
        };
        if !(base.is_finite() && base > 1.0 && factor.is_finite() && factor > 0.0 && original > 0) {
            let found = format!("base {base}, {scaling:?}");
            return Err(Error::expected("rotary positions", found, "a base above 1, and positive factors and lengths"));
        }
        let frequencies = frequencies(dimensions, base, scaling);
        let attention = match scaling {
            RotaryScaling::Yarn { factor, attention_factor, .. } => {
                attention_factor.unwrap_or(if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 })
            }
            _ => 1.0,
        };
        if frequencies.iter().any(|f| !f.is_finite()) {
            return Err(Error::expected("rotary positions", format!("{scaling:?}"), "finite frequencies"));
        }
        Ok(Rotary { dimensions, base, scaling, frequencies, factor: attention as f32 })
    }

    /// Returns how many numbers of a head are turned.
    pub fn dimensions(&self) -> usize {
        self.dimensions
    }

    /// Returns the angle of each pair at position 1, for texts as long as those of the training.
    pub fn frequencies(&self) -> &[f32] {
        &self.frequencies
    }

    /// Returns the cosines and sines of the angles at a position of a text of this length.
    pub fn at(&self, position: usize, length: usize) -> Angles {
        let mut angles = Angles::default();
        self.write(position, length, &mut angles);
        angles
    }

    /// Does what [`Rotary::at`] does, in memory that is there.
    pub(super) fn write(&self, position: usize, length: usize, angles: &mut Angles) {
        let longer = match self.scaling {
            RotaryScaling::Dynamic { factor, original } if length > original => {
                let (d, ratio) = (self.dimensions as f64, length as f64 / original as f64);
                let base = self.base * (factor * ratio - (factor - 1.0)).powf(d / (d - 2.0));
                Some(frequencies(self.dimensions, base, RotaryScaling::None))
            }
            _ => None,
        };
        angles.cosines.clear();
        angles.sines.clear();
        for frequency in longer.as_ref().unwrap_or(&self.frequencies) {
            let angle = position as f32 * frequency;
            angles.cosines.push(angle.cos() * self.factor);
            angles.sines.push(angle.sin() * self.factor);
        }
    }
}

/// The cosines and sines of one position.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Angles {
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

impl Angles {
    /// Turns a head's numbers, in place.
    pub fn turn(&self, head: &mut [f32]) {
        let half = self.cosines.len();
        let (first, second) = head[..2 * half].split_at_mut(half);
        for (((a, b), cosine), sine) in first.iter_mut().zip(second).zip(&self.cosines).zip(&self.sines) {
            (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
        }
    }
}

fn frequencies(dimensions: usize, base: f64, scaling: RotaryScaling) -> Vec<f32> {
    let d = dimensions as f64;
    let plain = (0..dimensions / 2).map(|i| 1.0 / base.powf(2.0 * i as f64 / d));
    // The place of the frequency that turns so often over a length.
    let place = |turns: f64, length: usize| d * (length as f64 / (turns * 2.0 * PI)).ln() / (2.0 * base.ln());
    match scaling {
        RotaryScaling::None | RotaryScaling::Dynamic { .. } => plain.map(|f| f as f32).collect(),
        RotaryScaling::Linear { factor } => plain.map(|f| (f / factor) as f32).collect(),
        RotaryScaling::Yarn { factor, original, beta_fast, beta_slow, .. } => {
            let low = place(beta_fast, original).floor().max(0.0);
            let high = place(beta_slow, original).ceil().min(d - 1.0);
            let high = if low == high { high + 0.001 } else { high };
            let divided = |i: usize| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            plain.enumerate().map(|(i, f)| (f / factor * divided(i) + f * (1.0 - divided(i))) as f32).collect()
        }
        RotaryScaling::Llama3 { factor, original, low_freq_factor, high_freq_factor } => {
            let changed = |f: f64| {
                let turns = original as f64 * f / (2.0 * PI);
                match turns {
                    _ if turns > high_freq_factor => f,
                    _ if turns < low_freq_factor => f / factor,
                    _ => {
                        let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                }
            };
            plain.map(|f| changed(f) as f32).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_are_those_of_transformers() {
        // Of transformers' ROPE_INIT_FUNCTIONS, 8 dimensions, base 10000, 64 positions of the training.
        let of = |scaling| Rotary::new(8, 10_000.0, scaling).unwrap().frequencies;
        assert_eq!(of(RotaryScaling::None), [1.0, 0.1, 0.01, 0.001]);
        assert_eq!(of(RotaryScaling::Linear { factor: 4.0 }), [0.25, 0.025, 0.0025, 0.00025]);
        let llama3 = RotaryScaling::Llama3 { factor: 8.0, original: 64, low_freq_factor: 1.0, high_freq_factor: 4.0 };
        // Turns of 64 positions: 10.2, 1.02, 0.1, 0.01.
        let found = of(llama3);
        let smooth = (64.0 * 0.1 / (2.0 * PI) - 1.0) / 3.0;
        let expected = [1.0, (1.0 - smooth) * 0.1 / 8.0 + smooth * 0.1, 0.01 / 8.0, 0.001 / 8.0];
        assert!(found.iter().zip(expected).all(|(f, e)| (f64::from(*f) - e).abs() < 1e-8), "{found:?} {expected:?}");
    }

    #[test]
    fn turns_add_up() {
        let rotary = Rotary::new(4, 100.0, RotaryScaling::None).unwrap();
        let mut head = [1.0, 0.5, -0.25, 2.0, 7.0];
        rotary.at(3, 8).turn(&mut head);
        rotary.at(4, 8).turn(&mut head);
        let mut once = [1.0, 0.5, -0.25, 2.0, 7.0];
        rotary.at(7, 8).turn(&mut once);
        assert!(head.iter().zip(once).all(|(a, b)| (a - b).abs() < 1e-5), "{head:?} {once:?}");
        assert_eq!(head[4], 7.0);
        // A longer text turns slower, at each of its positions.
        let dynamic = Rotary::new(4, 100.0, RotaryScaling::Dynamic { factor: 2.0, original: 8 }).unwrap();
        assert_eq!(dynamic.at(7, 8), rotary.at(7, 8));
        assert_ne!(dynamic.at(7, 9), rotary.at(7, 9));
        for (dimensions, base) in [(3, 100.0), (0, 100.0), (4, 0.0), (4, f64::NAN)] {
            assert!(Rotary::new(dimensions, base, RotaryScaling::None).is_err());
        }
    }
}
