//! Checks of what every method is given.

use ndarray::{ArrayView1, ArrayView2};

use crate::calibration::Calibration;
use crate::error::{Error, Result};
use crate::linalg::require_finite;

/// Checks the lengths that a stored config says of a weight `[out_features, in_features]`: none is 0, and no arithmetic with
/// them can overflow.
///
/// # Errors
/// When that is not so.
pub fn check_lengths(out_features: usize, in_features: usize) -> Result<()> {
    // A number takes 16 bytes at most on the way.
    let most = isize::MAX as usize / 16;
    match out_features.checked_mul(in_features) {
        Some(count) if count > 0 && count <= most => Ok(()),
        _ => Err(Error::expected(
            "lengths of a stored weight",
            format!("{out_features} × {in_features}"),
            format!("1 to {most} numbers"),
        )),
    }
}

/// Checks a weight `[out_features, in_features]`, its bias and its inputs' statistics against each other.
///
/// # Errors
/// When a length does not fit, or a number is not finite.
pub fn check_inputs(
    weight: ArrayView2<f32>,
    bias: Option<ArrayView1<f32>>,
    calibration: Option<&Calibration>,
) -> Result<()> {
    let (out_features, in_features) = weight.dim();
    if let Some(bias) = bias {
        if bias.len() != out_features {
            return Err(Error::expected(
                "length of the bias",
                bias.len(),
                format!("{out_features}, the weight's rows"),
            ));
        }
        require_finite("the bias", bias.iter())?;
    }
    if let Some(calibration) = calibration
        && calibration.features() != in_features
    {
        return Err(Error::expected(
            "width of the calibration inputs",
            calibration.features(),
            format!("{in_features}, the layer's in_features"),
        ));
    }
    require_finite("the weight", weight.iter())
}
