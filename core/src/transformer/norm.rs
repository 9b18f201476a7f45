//! Norms of rows: by the root of the mean square, and by mean and variance.

use ndarray::{Array1, Array2, ArrayView2};

use crate::error::{Error, Result};
use crate::linalg::share_rows;

/// A norm of rows of so many features as it has gains.
#[derive(Debug, Clone, PartialEq)]
pub struct Norm {
    gain: Array1<f32>,
    /// With it, the mean is taken away first: a layer norm.
    bias: Option<Array1<f32>>,
    epsilon: f32,
}

impl Norm {
    /// Returns the norm `x / √(mean x² + ε) · gain`.
    pub fn rms(gain: Array1<f32>, epsilon: f32) -> Self {
        Norm { gain, bias: None, epsilon }
    }

    /// Returns the norm `(x − mean x) / √(var x + ε) · gain + bias`.
    ///
    /// # Errors
    /// When gain and bias are not of one length.
    pub fn layer(gain: Array1<f32>, bias: Array1<f32>, epsilon: f32) -> Result<Self> {
        match gain.len() == bias.len() {
            true => Ok(Norm { gain, bias: Some(bias), epsilon }),
            false => Err(Error::expected("length of a norm's bias", bias.len(), format!("{}, the gain's", gain.len()))),
        }
    }

    /// Returns the number of features.
    pub fn features(&self) -> usize {
        self.gain.len()
    }

    /// Normalises one row, in place.
    ///
    /// # Panics
    /// When it has another length.
    pub fn apply(&self, row: &mut [f32]) {
        assert_eq!(row.len(), self.gain.len(), "features of a norm");
        let count = row.len() as f32;
        if self.bias.is_some() {
            let mean = row.iter().sum::<f32>() / count;
            row.iter_mut().for_each(|v| *v -= mean);
        }
        let scale = 1.0 / (sum_of_squares(row) / count + self.epsilon).sqrt();
        row.iter_mut().zip(&self.gain).for_each(|(v, gain)| *v = *v * scale * gain);
        if let Some(bias) = &self.bias {
            row.iter_mut().zip(bias).for_each(|(v, bias)| *v += bias);
        }
    }

    /// Writes rows `[rows, features]`, one after another, normalised.
    pub(super) fn write(&self, x: &[f32], y: &mut Vec<f32>) {
        let features = self.features().max(1);
        y.resize(x.len(), 0.0);
        share_rows(y, features, |first, rows| {
            rows.copy_from_slice(&x[first * features..first * features + rows.len()]);
            rows.chunks_exact_mut(features).for_each(|row| self.apply(row));
        });
    }

    /// Returns rows `[rows, features]`, normalised.
    ///
    /// # Panics
    /// As [`Norm::apply`].
    pub fn of(&self, x: ArrayView2<f32>) -> Array2<f32> {
        let mut y = x.as_standard_layout().into_owned();
        y.rows_mut().into_iter().for_each(|mut row| self.apply(row.as_slice_mut().expect("rows of an owned array")));
        y
    }
}

/// In eight sums side by side.
fn sum_of_squares(row: &[f32]) -> f32 {
    let (chunks, rest) = row.as_chunks::<8>();
    let mut sums = [0f32; 8];
    chunks.iter().for_each(|chunk| sums.iter_mut().zip(chunk).for_each(|(sum, v)| *sum += v * v));
    sums.iter().sum::<f32>() + rest.iter().map(|v| v * v).sum::<f32>()
}

#[cfg(test)]
mod tests {
    use ndarray::{arr1, arr2};

    use super::*;

    #[test]
    fn norms_are_what_they_are_called() {
        let x = arr2(&[[3.0, -4.0, 0.0, 5.0]]);
        let gain = arr1(&[1.0, 2.0, 1.0, 0.5]);
        let y = Norm::rms(gain.clone(), 0.0).of(x.view());
        let root = (50f32 / 4.0).sqrt();
        let expected = arr2(&[[3.0 / root, -8.0 / root, 0.0, 2.5 / root]]);
        assert!((&y - &expected).iter().all(|d| d.abs() < 1e-6), "{y}");
        let y = Norm::layer(gain, arr1(&[0.0, 0.0, 1.0, 0.0]), 1e-12).unwrap().of(x.view());
        // Mean 1, variance 11.5.
        let root = 11.5f32.sqrt();
        let expected = arr2(&[[2.0 / root, -10.0 / root, 1.0 - 1.0 / root, 2.0 / root]]);
        assert!((&y - &expected).iter().all(|d| d.abs() < 1e-6), "{y}");
        assert!(Norm::layer(arr1(&[1.0]), arr1(&[1.0, 2.0]), 0.0).is_err());
    }
}
