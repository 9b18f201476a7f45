//! Root mean square normalisation (Zhang and Sennrich, 2019), as Keras-MatMulLess defines it.

use ndarray::{Array2, ArrayView2, Axis};

use crate::error::{Error, Result};
use crate::linalg::require_finite;

/// The least ‖x‖ that a row is divided by.
const LEAST_NORM: f64 = 1e-7;

/// A root mean square norm: `y = √d · x / max(‖x‖, 1e-7) · gain + bias` for rows x of d features.
///
/// Gain and bias are of a position in a sequence as well as of a feature: row i of an input is at position `i mod positions`.
/// A norm that treats all positions alike has one.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RmsNorm {
    /// `[positions, features]`.
    gain: Option<Array2<f32>>,
    /// `[positions, features]`.
    bias: Option<Array2<f32>>,
}

impl RmsNorm {
    /// Returns the norm with this gain and bias, `[positions, features]` each; without, they are 1 and 0.
    ///
    /// # Errors
    /// When their shapes differ, one is empty, or a number is not finite.
    pub fn new(gain: Option<Array2<f32>>, bias: Option<Array2<f32>>) -> Result<Self> {
        let whole = |array: Array2<f32>| array.as_standard_layout().into_owned();
        let (gain, bias) = (gain.map(whole), bias.map(whole));
        if let (Some(gain), Some(bias)) = (&gain, &bias)
            && gain.dim() != bias.dim()
        {
            let (found, expected) = (format!("{:?}", bias.dim()), format!("{:?}, the gain's", gain.dim()));
            return Err(Error::expected("shape of a norm's bias", found, expected));
        }
        for (what, array) in [("a norm's gain", &gain), ("a norm's bias", &bias)] {
            let Some(array) = array else { continue };
            if array.is_empty() {
                return Err(Error::expected(
                    what,
                    format!("{:?}", array.dim()),
                    "[positions, features], none of them 0",
                ));
            }
            require_finite(what, array.iter())?;
        }
        Ok(RmsNorm { gain, bias })
    }

    /// Returns the gain, `[positions, features]`.
    pub fn gain(&self) -> Option<&Array2<f32>> {
        self.gain.as_ref()
    }

    /// Returns the bias, `[positions, features]`.
    pub fn bias(&self) -> Option<&Array2<f32>> {
        self.bias.as_ref()
    }

    /// Returns the number of features, where there is a gain or a bias; without, rows may have any.
    pub fn features(&self) -> Option<usize> {
        self.gain.as_ref().or(self.bias.as_ref()).map(Array2::ncols)
    }

    /// Returns the number of positions that have a gain and a bias of their own; 1 where all are alike.
    pub fn positions(&self) -> usize {
        self.gain.as_ref().or(self.bias.as_ref()).map_or(1, Array2::nrows)
    }

    /// Returns the norm of one position.
    ///
    /// # Errors
    /// When `position` is not below the number of positions.
    pub fn at_position(&self, position: usize) -> Result<RmsNorm> {
        let positions = self.positions();
        if positions == 1 {
            return Ok(self.clone());
        }
        if position >= positions {
            return Err(Error::expected("position", position, format!("less than {positions}, a norm's positions")));
        }
        let one = |array: &Array2<f32>| array.slice(ndarray::s![position..position + 1, ..]).to_owned();
        Ok(RmsNorm { gain: self.gain.as_ref().map(one), bias: self.bias.as_ref().map(one) })
    }

    /// Normalises rows `[rows, features]`.
    ///
    /// # Errors
    /// When rows have another width, or their number is no multiple of the number of positions.
    pub fn forward(&self, x: ArrayView2<f32>) -> Result<Array2<f32>> {
        self.check(x.dim())?;
        let scale = (x.ncols() as f64).sqrt();
        let mut y = x.to_owned();
        for (mut row, x) in y.rows_mut().into_iter().zip(x.rows()) {
            let factor = (scale * inverse_norm(x.iter())) as f32;
            row.mapv_inplace(|v| v * factor);
        }
        let positions = self.positions();
        for (index, mut row) in y.rows_mut().into_iter().enumerate() {
            if let Some(gain) = &self.gain {
                row *= &gain.row(index % positions);
            }
            if let Some(bias) = &self.bias {
                row += &bias.row(index % positions);
            }
        }
        Ok(y)
    }

    /// Returns the gradients of a loss with respect to inputs, gain and bias, from the one with respect to the outputs.
    ///
    /// # Errors
    /// As [`RmsNorm::forward`], and when the two shapes differ.
    pub fn backward(&self, x: ArrayView2<f32>, grad_output: ArrayView2<f32>) -> Result<NormGradients> {
        self.check(x.dim())?;
        if x.dim() != grad_output.dim() {
            let (found, expected) = (format!("{:?}", grad_output.dim()), format!("{:?}, the inputs'", x.dim()));
            return Err(Error::expected("shape of a norm's output gradient", found, expected));
        }
        let (positions, features) = (self.positions(), x.ncols());
        let scale = (features as f64).sqrt();
        let mut input = Array2::zeros(x.dim());
        let mut gain = Array2::zeros((positions, features));
        let mut bias = Array2::zeros((positions, features));
        for (index, ((x, g), mut input)) in
            x.rows().into_iter().zip(grad_output.rows()).zip(input.rows_mut()).enumerate()
        {
            let inverse = inverse_norm(x.iter());
            let factor = (scale * inverse) as f32;
            // The Jacobian of √d x / ‖x‖ is √d / ‖x‖ (I − x xᵀ / ‖x‖²), and √d / 1e-7 I where ‖x‖ is below 1e-7.
            let g = match &self.gain {
                Some(own) => {
                    let mut target = gain.row_mut(index % positions);
                    target += &(&g * &x * factor);
                    &g * &own.row(index % positions)
                }
                None => g.to_owned(),
            };
            bias.row_mut(index % positions).scaled_add(1.0, &grad_output.index_axis(Axis(0), index));
            let along: f64 = x.iter().zip(&g).map(|(x, g)| f64::from(*x) * f64::from(*g)).sum();
            let along = if inverse < 1.0 / LEAST_NORM { (along * inverse * inverse) as f32 } else { 0.0 };
            ndarray::Zip::from(&mut input).and(&g).and(&x).for_each(|to, g, x| *to = factor * (g - along * x));
        }
        Ok(NormGradients {
            input,
            gain: self.gain.is_some().then_some(gain),
            bias: self.bias.is_some().then_some(bias),
        })
    }

    fn check(&self, (rows, features): (usize, usize)) -> Result<()> {
        if let Some(expected) = self.features().filter(|&expected| expected != features) {
            return Err(Error::expected("width of the rows to normalise", features, format!("{expected}, the gain's")));
        }
        let positions = self.positions();
        if !rows.is_multiple_of(positions) {
            let expected = format!("a multiple of {positions}: the norm has a gain of its own for each position");
            return Err(Error::expected("rows to normalise", rows, expected));
        }
        Ok(())
    }
}

/// The gradients that [`RmsNorm::backward`] returns.
#[derive(Debug, Clone, PartialEq)]
pub struct NormGradients {
    /// `[rows, features]`.
    pub input: Array2<f32>,
    /// `[positions, features]`.
    pub gain: Option<Array2<f32>>,
    /// `[positions, features]`.
    pub bias: Option<Array2<f32>>,
}

/// Returns 1 / max(‖row‖, `LEAST_NORM`).
fn inverse_norm<'a>(row: impl Iterator<Item = &'a f32>) -> f64 {
    let square: f64 = row.map(|&v| f64::from(v) * f64::from(v)).sum();
    1.0 / square.sqrt().max(LEAST_NORM)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;
    use proptest::prelude::*;

    #[test]
    fn what_does_not_fit_is_refused() {
        let norm = RmsNorm::new(Some(Array2::ones((2, 3))), None).unwrap();
        assert!(norm.forward(Array2::ones((4, 2)).view()).unwrap_err().to_string().contains("gain's"));
        assert!(norm.forward(Array2::ones((3, 3)).view()).unwrap_err().to_string().contains("multiple of 2"));
        assert!(RmsNorm::new(Some(Array2::ones((2, 3))), Some(Array2::ones((1, 3)))).is_err());
        assert!(RmsNorm::new(Some(array![[f32::NAN]]), None).is_err());
        assert!(RmsNorm::new(Some(Array2::ones((0, 3))), None).is_err());
    }

    #[test]
    fn rows_of_nothing() {
        let norm = RmsNorm::default();
        let y = norm.forward(array![[0.0f32, 0.0], [3e-9, -4e-9], [3e30, 4e30]].view()).unwrap();
        assert_eq!(y.row(0), array![0.0, 0.0]);
        assert!((y[[1, 0]] - 3e-2 * 2f32.sqrt()).abs() < 1e-6);
        assert!((y[[2, 1]] - 0.8 * 2f32.sqrt()).abs() < 1e-6);
    }

    proptest! {
        /// Gradients are what differences of the loss say.
        #[test]
        fn gradients(values in proptest::collection::vec(-2f32..2.0, 12), gains in proptest::collection::vec(0.5f32..2.0, 6)) {
            let x = Array2::from_shape_vec((4, 3), values).unwrap();
            prop_assume!(x.rows().into_iter().all(|r| r.dot(&r) > 0.1));
            let gain = Array2::from_shape_vec((2, 3), gains).unwrap();
            let grad = Array2::from_shape_fn((4, 3), |(i, j)| [0.3f32, -1.0, 0.7, 0.2][(i + 2 * j) % 4]);
            let loss = |x: &Array2<f32>, gain: &Array2<f32>, bias: &Array2<f32>| {
                let y = RmsNorm::new(Some(gain.clone()), Some(bias.clone())).unwrap().forward(x.view()).unwrap();
                y.iter().zip(&grad).map(|(y, g)| f64::from(*y) * f64::from(*g)).sum::<f64>()
            };
            let bias = Array2::from_elem((2, 3), 0.1);
            let found = RmsNorm::new(Some(gain.clone()), Some(bias.clone())).unwrap().backward(x.view(), grad.view()).unwrap();
            let step = 1e-2f32;
            let slope = |up: f64, down: f64| ((up - down) / (2.0 * f64::from(step))) as f32;
            for place in [(0, 0), (1, 2), (3, 1)] {
                let (mut up, mut down) = (x.clone(), x.clone());
                up[place] += step;
                down[place] -= step;
                let expected = slope(loss(&up, &gain, &bias), loss(&down, &gain, &bias));
                prop_assert!((found.input[place] - expected).abs() < 0.02 * (1.0 + expected.abs()), "{} for {}", found.input[place], expected);
            }
            let place = (1, 2);
            let (mut up, mut down) = (gain.clone(), gain.clone());
            up[place] += step;
            down[place] -= step;
            let expected = slope(loss(&x, &up, &bias), loss(&x, &down, &bias));
            prop_assert!((found.gain.unwrap()[place] - expected).abs() < 1e-3);
            let expected = grad[[1, 2]] + grad[[3, 2]];
            prop_assert!((found.bias.unwrap()[place] - expected).abs() < 1e-5);
        }
    }
}
