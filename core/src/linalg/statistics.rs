//! Moments of a layer's inputs.

use ndarray::{Array2, ArrayView2, Axis};
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

/// Runs `factor` on a second moment to which what settings say has been added, and where that is singular, with one of these shares of
/// its diagonal's mean added as well, the first that will do; also returns that share.
///
/// # Errors
/// As `factor`; the last error where it is singular with each of them.
pub(crate) fn with_floor<T>(
    second: ArrayView2<f64>,
    floors: &[f64],
    factor: impl Fn(ArrayView2<f64>) -> Result<T>,
) -> Result<(T, Option<f64>)> {
    let mut failed = match factor(second) {
        Err(e @ Error::Numeric(_)) => e,
        done => return Ok((done?, None)),
    };
    for &floor in floors {
        let raised = Ridge { absolute: 0.0, relative: floor }.added_to(second.to_owned());
        match factor(raised.view()) {
            Err(e @ Error::Numeric(_)) => failed = e,
            done => return Ok((done?, Some(floor))),
        }
    }
    Err(failed)
}

/// E\[x xᵀ\] of inputs `[tokens, features]`, not centred, in f64: `[features, features]`. There is at least one token.
pub fn second_moment_of(inputs: ArrayView2<f32>) -> Array2<f64> {
    let wide = inputs.mapv(f64::from);
    gram(wide.view()) / inputs.nrows() as f64
}

/// Returns the covariance of inputs `[tokens, features]`, centred and divided by `tokens − 1`, in f64:
/// `[features, features]`, zeros for one token. There is at least one.
pub fn covariance_of(inputs: ArrayView2<f32>) -> Array2<f64> {
    let wide = inputs.mapv(f64::from);
    let mean = wide.mean_axis(Axis(0)).expect("at least one token");
    let centred = wide - &mean;
    gram(centred.view()) / (inputs.nrows().max(2) - 1) as f64
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
        Some(inputs) if inputs.nrows() == 0 => {
            return Err(Error::expected("calibration inputs", "0 tokens", "at least one"));
        }
        Some(inputs) => {
            require_finite("the calibration inputs", inputs.iter())?;
            covariance_of(inputs)
        }
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
        let inputs = array![[1.0, 2.0], [3.0, 6.0]];
        assert_eq!(covariance_of(inputs.view()), array![[2.0, 4.0], [4.0, 8.0]]);
        assert_eq!(second_moment_of(inputs.view()), array![[5.0, 10.0], [10.0, 20.0]]);
        assert_eq!(covariance_of(array![[1.0, 2.0]].view()), Array2::<f64>::zeros((2, 2)));
    }

    #[test]
    fn bad_samples_are_refused() {
        assert!(covariance(Some(Array2::zeros((0, 2)).view()), 2, 0.0).is_err());
        assert!(covariance(Some(array![[1.0, f32::NAN]].view()), 2, 0.0).is_err());
    }

    #[test]
    fn ridge_follows_the_diagonal() {
        let ridge = Ridge { absolute: 0.5, relative: 0.1 };
        assert_eq!(ridge.added_to(array![[10.0, 1.0], [1.0, 30.0]]), array![[12.5, 1.0], [1.0, 32.5]]);
    }
}
