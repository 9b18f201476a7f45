//! Moments of a layer's inputs.

use ndarray::{Array1, Array2, ArrayView2, Axis};
use serde::{Deserialize, Serialize};

use super::finite::require_finite;
use super::product::gram;
use crate::error::{Error, Result};

/// The ridge added to the diagonal of a covariance before it is factored: `absolute + relative · mean(diagonal)`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Ridge {
    /// Added as it is (AXL's `ridge_regularization`).
    pub absolute: f64,
    /// Times the mean of the diagonal, so that it follows the inputs' scale.
    pub relative: f64,
}

impl Ridge {
    /// Returns `matrix + ridge · I`.
    pub fn added_to(&self, mut matrix: Array2<f64>) -> Array2<f64> {
        let n = matrix.nrows();
        if n > 0 {
            let mean = matrix.diag().sum() / n as f64;
            let amount = self.absolute + self.relative * mean;
            matrix.diag_mut().mapv_inplace(|v| v + amount);
        }
        matrix
    }
}

/// Mean, covariance and second moment of inputs `[tokens, features]`, in f64.
#[derive(Debug, Clone)]
pub struct Moments {
    /// E\[x\]: `[features]`.
    pub mean: Array1<f64>,
    /// Centred and divided by `tokens − 1` (zeros for one token): `[features, features]`.
    pub covariance: Array2<f64>,
    /// E\[x xᵀ\], not centred: `[features, features]`.
    pub second: Array2<f64>,
}

impl Moments {
    /// Computes the moments of `inputs` `[tokens, features]`.
    ///
    /// # Errors
    /// When there are no tokens, or a value is not finite.
    pub fn of(inputs: ArrayView2<f32>) -> Result<Self> {
        let tokens = inputs.nrows();
        if tokens == 0 {
            return Err(Error::expected("calibration inputs", "0 tokens", "at least one"));
        }
        require_finite("the calibration inputs", inputs.iter())?;
        let wide = inputs.mapv(f64::from);
        let mean = wide.mean_axis(Axis(0)).expect("at least one token");
        let second = gram(wide.view()) / tokens as f64;
        let centred = wide - &mean;
        let covariance = gram(centred.view()) / (tokens.max(2) - 1) as f64;
        Ok(Moments { mean, covariance, second })
    }

    /// Returns the moments that are assumed of inputs that were never seen: mean 0, covariance I.
    pub fn standard(features: usize) -> Self {
        Moments { mean: Array1::zeros(features), covariance: Array2::eye(features), second: Array2::eye(features) }
    }
}

/// Computes the covariance `[features, features]` of `inputs` `[samples, features]`, centred and divided by samples − 1, plus
/// `ridge · I`. One sample has none, so the ridge alone; without inputs it is taken to be I.
///
/// # Errors
/// When there are inputs but no samples, their width is another, a value is not finite, or the ridge is not a finite
/// number of at least 0.
pub fn covariance(inputs: Option<ArrayView2<f32>>, features: usize, ridge: f64) -> Result<Array2<f64>> {
    if !(ridge >= 0.0 && ridge.is_finite()) {
        return Err(Error::expected("ridge", ridge, "a number of at least 0"));
    }
    let covariance = match inputs {
        Some(inputs) if inputs.ncols() != features => {
            return Err(Error::expected("width of the calibration inputs", inputs.ncols(), features));
        }
        Some(inputs) => Moments::of(inputs)?.covariance,
        None => Array2::eye(features),
    };
    Ok(Ridge { absolute: ridge, relative: 0.0 }.added_to(covariance))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn moments_of_a_small_sample() {
        let m = Moments::of(array![[1.0, 2.0], [3.0, 6.0]].view()).unwrap();
        assert_eq!(m.mean, array![2.0, 4.0]);
        assert_eq!(m.covariance, array![[2.0, 4.0], [4.0, 8.0]]);
        assert_eq!(m.second, array![[5.0, 10.0], [10.0, 20.0]]);
        let one = Moments::of(array![[1.0, 2.0]].view()).unwrap();
        assert_eq!(one.covariance, Array2::<f64>::zeros((2, 2)));
    }

    #[test]
    fn bad_samples_are_refused() {
        assert!(Moments::of(Array2::zeros((0, 2)).view()).is_err());
        assert!(Moments::of(array![[1.0, f32::NAN]].view()).is_err());
    }

    #[test]
    fn ridge_follows_the_diagonal() {
        let ridge = Ridge { absolute: 0.5, relative: 0.1 };
        assert_eq!(ridge.added_to(array![[10.0, 1.0], [1.0, 30.0]]), array![[12.5, 1.0], [1.0, 32.5]]);
    }
}
