//! The low-rank part: what is best for an error, under the inputs that a scaling assumes.
//!
//! E = W − Ŵ. With TᵀT = R, SVD(E Tᵀ) = U S Vᵀ, A = U_k S_k and B = V_kᵀ T⁻ᵀ minimise the output error for inputs whose
//! second moment is R (QERA, theorem 1; LQER for T = I).

use ndarray::{Array1, Array2, ArrayView2, Axis};

use super::config::{LowRankConfig, MaxError, Rank, SvdMethod};
use crate::error::Result;
use crate::linalg::{
    LinearOperator, SketchOptions, Svd, cholesky, leading_svd, matmul_f64, randomized_svd, solve_lower_transposed,
};

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
    /// Returns the correction for an error `[out, in]` of this weight.
    ///
    /// # Errors
    /// When a factorisation fails.
    pub fn of(
        error: ArrayView2<f32>,
        weight: ArrayView2<f32>,
        config: &LowRankConfig,
        transform: &Transform,
    ) -> Result<Self> {
        let (out, inputs) = error.dim();
        let rank = config.largest_rank(out, inputs)?;
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
        let a = (&u * &s.view().insert_axis(Axis(0))).reversed_axes();
        let narrow = |m: Array2<f64>| m.mapv(|v| v as f32).as_standard_layout().to_owned();
        Ok(Correction {
            a: narrow(a),
            b: narrow(transform.undone(&vt)),
            singular_values: s.iter().map(|&v| v as f32).collect(),
        })
    }
}
