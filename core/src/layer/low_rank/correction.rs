//! The low-rank part: what is best for an error, under the inputs that a scaling assumes.
//!
//! E = W − Ŵ. With TᵀT = R, SVD(E Tᵀ) = U S Vᵀ, A = U_k S_k and B = V_kᵀ T⁻ᵀ minimise the output error for inputs whose
//! second moment is R (QERA, theorem 1; LQER for T = I).

use ndarray::{Array1, Array2, ArrayView2, Axis};

use super::config::{LowRankConfig, MaxError, Rank, SvdMethod};
use crate::error::{Error, Result};
use crate::linalg::{
    LinearOperator, Loss, SketchOptions, Svd, cholesky, leading_svd, matmul_f64, randomized_svd, require_finite,
    solve_lower_transposed, unit_of, unit_of_f32,
};
use crate::quant::RowType;

/// A sketch takes a share of the work of a full decomposition where the rank is below this share of the smaller side.
const SKETCHED_BELOW: f64 = 0.25;

/// The least that an input counts in [`Scaling::MeanAbs`], after L²QER.
const LEAST_MEAN: f64 = 1e-4;

/// T, or what takes its place in products.
pub enum Transform {
    /// T = I: all inputs count alike.
    Identity,
    /// T = diag(d).
    Diagonal(Array1<f64>),
    /// R = L Lᵀ, T = Lᵀ.
    Cholesky(Array2<f64>),
}

impl Transform {
    /// L²QER's, from E|x_i|.
    pub fn mean_abs(sizes: Array1<f64>) -> Self {
        let most = sizes.iter().fold(0f64, |m, &v| m.max(v));
        let least = sizes.iter().fold(most, |m, &v| m.min(v));
        // Inputs that are never there would make all others infinitely large.
        let unit = (least.max(LEAST_MEAN * LEAST_MEAN * most) * most).sqrt();
        Transform::Diagonal(if unit > 0.0 {
            sizes.mapv(|v| (v / unit).max(LEAST_MEAN))
        } else {
            Array1::ones(sizes.len())
        })
    }

    /// QERA-approx's, from the mean of x_i².
    pub fn rms(squares: Array1<f64>) -> Self {
        let most = squares.iter().fold(0f64, |m, &v| m.max(v)).sqrt();
        Transform::Diagonal(if most > 0.0 {
            squares.mapv(|v| v.sqrt().max(1e-6 * most))
        } else {
            Array1::ones(squares.len())
        })
    }

    /// QERA-exact's, from E[x xᵀ].
    ///
    /// # Errors
    /// When the matrix is not positive definite.
    pub fn exact(second: ArrayView2<f64>) -> Result<Self> {
        Ok(Transform::Cholesky(cholesky(second)?))
    }

    /// Returns the power of two that the largest number of T is counted in, where T needs one.
    fn unit(&self) -> Option<f64> {
        let most = |numbers: &mut dyn Iterator<Item = &f64>| numbers.fold(0f64, |most, v| most.max(v.abs()));
        match self {
            Transform::Identity => None,
            Transform::Diagonal(d) => unit_of(most(&mut d.iter())),
            Transform::Cholesky(l) => unit_of(most(&mut l.iter())),
        }
    }

    /// Returns T / unit.
    fn divided(&self, unit: f64) -> Self {
        match self {
            Transform::Identity => Transform::Identity,
            Transform::Diagonal(d) => Transform::Diagonal(d / unit),
            Transform::Cholesky(l) => Transform::Cholesky(l / unit),
        }
    }

    /// `M Tᵀ`.
    fn applied(&self, matrix: ArrayView2<f32>) -> Array2<f64> {
        let wide = matrix.mapv(f64::from);
        match self {
            Transform::Identity => wide,
            Transform::Diagonal(d) => wide * d,
            Transform::Cholesky(l) => matmul_f64(wide.view(), l.view()),
        }
    }

    /// `Vᵀ T⁻ᵀ`.
    fn undone(&self, vt: &Array2<f64>) -> Array2<f64> {
        match self {
            Transform::Identity => vt.clone(),
            Transform::Diagonal(d) => vt / d,
            // Vᵀ L⁻¹ = (L⁻ᵀ V)ᵀ.
            Transform::Cholesky(l) => solve_lower_transposed(l.view(), vt.t()).reversed_axes(),
        }
    }
}

/// `E Tᵀ`, never formed.
struct Scaled<'a> {
    error: ArrayView2<'a, f32>,
    transform: &'a Transform,
}

impl LinearOperator for Scaled<'_> {
    fn shape(&self) -> (usize, usize) {
        self.error.dim()
    }

    fn apply(&self, x: ArrayView2<f64>) -> Array2<f64> {
        match self.transform {
            Transform::Identity => self.error.apply(x),
            Transform::Diagonal(d) => self.error.apply((&x * &d.view().insert_axis(Axis(1))).view()),
            Transform::Cholesky(l) => self.error.apply(matmul_f64(l.view(), x).view()),
        }
    }

    fn apply_transposed(&self, x: ArrayView2<f64>) -> Array2<f64> {
        let y = self.error.apply_transposed(x);
        match self.transform {
            Transform::Identity => y,
            Transform::Diagonal(d) => y * d.view().insert_axis(Axis(1)),
            Transform::Cholesky(l) => matmul_f64(l.t(), y.view()),
        }
    }
}

/// A correction in f32.
pub struct Correction {
    /// Columns of A as rows `[rank, out]`.
    pub a: Array2<f32>,
    /// `[rank, in]`.
    pub b: Array2<f32>,
    /// Of `E Tᵀ`, descending: `[rank]`.
    pub singular_values: Vec<f32>,
}

impl Correction {
    /// Returns the correction for an error `[out, in]` of this weight, of `rank` components, or of fewer where an error decides.
    ///
    /// # Errors
    /// When a factorisation fails.
    pub fn of(
        error: ArrayView2<f32>,
        weight: ArrayView2<f32>,
        config: &LowRankConfig,
        rank: usize,
        transform: &Transform,
    ) -> Result<Self> {
        // In units in which f32 holds all products. A · B does not depend on the one of T.
        if let Some(unit) = transform.unit() {
            let found = Self::of(error, weight, config, rank, &transform.divided(unit))?;
            let singular_values: Vec<f32> =
                found.singular_values.iter().map(|&s| (f64::from(s) * unit) as f32).collect();
            require_finite("the correction's singular values", singular_values.iter())?;
            return Ok(Correction { singular_values, ..found });
        }
        let unit = unit_of_f32(error.iter()).unwrap_or(1.0);
        let (in_units, weight_in_units);
        let (error, weight) = match unit == 1.0 {
            true => (error, weight),
            false => {
                (in_units, weight_in_units) = (&error * (1.0 / unit), &weight * (1.0 / unit));
                (in_units.view(), weight_in_units.view())
            }
        };
        let (out, inputs) = error.dim();
        let found = match (config.rank, config.svd) {
            (Rank::MaxError(MaxError { max_error }), _) => {
                let scaled = transform.applied(error);
                let whole: f64 = scaled.iter().map(|v| v * v).sum();
                let all = leading_svd(scaled.view(), rank)?;
                let allowed = max_error.powi(2) * transform.applied(weight).iter().map(|v| v * v).sum::<f64>();
                let mut left = whole;
                let needed = all.s.iter().take_while(|&&s| {
                    let more = left > allowed;
                    left -= s * s;
                    more
                });
                let needed = needed.count();
                all.truncated(needed)
            }
            (_, SvdMethod::Randomized) if (rank as f64) < SKETCHED_BELOW * out.min(inputs) as f64 => {
                randomized_svd(&Scaled { error, transform }, rank, SketchOptions::default())?
            }
            _ => leading_svd(transform.applied(error).view(), rank)?,
        };
        let Svd { u, s, vt } = found;
        let mut a = (&u * &s.view().insert_axis(Axis(0))).reversed_axes() * f64::from(unit);
        let mut b = transform.undone(&vt);
        if config.factors == RowType::F16 {
            let size = weight.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() * f64::from(unit).powi(2);
            balance_for_halves(&mut a, &mut b, size)?;
        }
        let narrow = |m: Array2<f64>| m.mapv(|v| v as f32).as_standard_layout().to_owned();
        let found = Correction {
            a: narrow(a),
            b: narrow(b),
            singular_values: s.iter().map(|&v| (v * f64::from(unit)) as f32).collect(),
        };
        require_finite("the correction's factor A", found.a.iter())?;
        require_finite("the correction's factor B", found.b.iter())?;
        require_finite("the correction's singular values", found.singular_values.iter())?;
        Ok(found)
    }
}

/// The share of the correction, and the share of the weight, that may be lost where factors become f16.
const LOST_BY_HALVES: (f64, f64) = (1.0 / 64.0, 1.0 / 16_384.0);

/// Makes each component's halves `[rank, out]` and `[rank, in]` equally large, by a power of two that one is multiplied with and
/// the other divided by, where f16 would lose some of them as they are; `size` is the weight's ‖W‖².
///
/// # Errors
/// When f16 holds them in no way.
fn balance_for_halves(a: &mut Array2<f64>, b: &mut Array2<f64>, size: f64) -> Result<()> {
    let lost = |a: &Array2<f64>, b: &Array2<f64>| {
        let mut all = Loss::default();
        for (a, b) in a.rows().into_iter().zip(b.rows()) {
            let (a, b) = (Loss::of_halves(a.iter().copied()), Loss::of_halves(b.iter().copied()));
            if a.whole > 0.0 && b.whole > 0.0 {
                all.lost += a.lost * b.whole + a.whole * b.lost;
                all.whole += a.whole * b.whole;
            }
        }
        all
    };
    let held = |loss: Loss| loss.within(LOST_BY_HALVES.0) || loss.lost <= LOST_BY_HALVES.1.powi(2) * size;
    if held(lost(a, b)) {
        return Ok(());
    }
    for (mut a, mut b) in a.rows_mut().into_iter().zip(b.rows_mut()) {
        let most = |row: &ndarray::ArrayViewMut1<f64>| row.iter().fold(0f64, |most, v| most.max(v.abs()));
        let apart = most(&b).log2() - most(&a).log2();
        if apart.is_finite() {
            let factor = (apart / 2.0).round().exp2();
            a *= factor;
            b /= factor;
        }
    }
    let loss = lost(a, b);
    match held(loss) {
        true => Ok(()),
        false => Err(Error::expected(
            "the correction's factors to store as f16",
            format!("components of size {:e} in all", loss.whole.sqrt()),
            "sizes that f16 holds: use factors = \"f32\" or \"int8\"",
        )),
    }
}
