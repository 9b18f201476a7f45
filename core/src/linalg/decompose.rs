//! Factorisations in f64: thin SVD, the leading part of one, Cholesky, and triangular solves.

use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::{MatMut, Side};
use ndarray::{Array1, Array2, ArrayView2, Axis, s};

use super::finite::require_finite;
use super::parts::{eigenvectors, orthonormal_basis, thin_svd};
use super::product::{gram, matmul_f64, parallelism, view};
use crate::error::{Error, Result};

/// A singular value decomposition `matrix = u · diag(s) · vt`, singular values descending.
#[derive(Debug, Clone)]
pub struct Svd {
    /// Left singular vectors, one a column: `[rows, k]`.
    pub u: Array2<f64>,
    /// Singular values, descending: `[k]`.
    pub s: Array1<f64>,
    /// Right singular vectors, one a row: `[k, columns]`.
    pub vt: Array2<f64>,
}

/// Computes the thin SVD, `k = min(rows, columns)`.
///
/// # Errors
/// When the matrix holds a value that is not finite, or the iteration does not converge.
pub fn svd(matrix: ArrayView2<f64>) -> Result<Svd> {
    require_finite("the matrix to decompose", matrix.iter())?;
    if matrix.is_empty() {
        let (rows, columns) = matrix.dim();
        return Ok(Svd { u: Array2::zeros((rows, 0)), s: Array1::zeros(0), vt: Array2::zeros((0, columns)) });
    }
    let parts = thin_svd(view(&matrix))
        .map_err(|e| Error::Numeric(format!("the SVD of a {:?} matrix did not converge: {e:?}", matrix.dim())))?;
    let (u, s, v) = parts;
    let k = u.ncols();
    Ok(Svd {
        u: Array2::from_shape_fn((u.nrows(), k), |(i, j)| u[(i, j)]),
        s: Array1::from(s),
        vt: Array2::from_shape_fn((k, v.nrows()), |(i, j)| v[(j, i)]),
    })
}

/// Computes the `k` leading singular triplets from the eigenvectors of the smaller Gram matrix.
///
/// Much cheaper than a whole SVD for a rectangular matrix. Squaring costs half the digits: singular values below about
/// 1e-8 of the largest are noise, which is far below what a leading component is used for.
///
/// # Errors
/// When `k` exceeds the smaller side, a value is not finite, or the iteration does not converge.
pub fn leading_svd(matrix: ArrayView2<f64>, k: usize) -> Result<Svd> {
    let (rows, columns) = matrix.dim();
    if k > rows.min(columns) {
        return Err(Error::expected(
            "rank",
            k,
            format!("at most {} for a {rows} × {columns} matrix", rows.min(columns)),
        ));
    }
    require_finite("the matrix to decompose", matrix.iter())?;
    if k == 0 {
        return Ok(Svd { u: Array2::zeros((rows, 0)), s: Array1::zeros(0), vt: Array2::zeros((0, columns)) });
    }
    if rows > columns {
        let t = leading_svd(matrix.reversed_axes(), k)?;
        return Ok(Svd {
            u: t.vt.reversed_axes().as_standard_layout().to_owned(),
            s: t.s,
            vt: t.u.reversed_axes().as_standard_layout().to_owned(),
        });
    }
    let gram = gram(matrix.reversed_axes());
    let gram_view = gram.view();
    let vectors = eigenvectors(view(&gram_view)).map_err(|e| {
        Error::Numeric(format!("the eigenvalues of a {rows} × {rows} Gram matrix did not converge: {e:?}"))
    })?;
    // faer sorts ascending; the leading ones are the last.
    let u = Array2::from_shape_fn((rows, k), |(i, j)| vectors[(i, rows - 1 - j)]);
    let mut vt = matmul_f64(u.t(), matrix);
    let mut s = Array1::zeros(k);
    for (mut row, value) in vt.rows_mut().into_iter().zip(s.iter_mut()) {
        let norm = row.dot(&row).sqrt();
        *value = norm;
        if norm > 0.0 {
            row /= norm;
        }
    }
    Ok(Svd { u, s, vt })
}

/// Returns an orthonormal basis of the columns of `matrix` `[rows, k]`, k at most the rows, by Householder reflections.
///
/// # Errors
/// When a value is not finite.
pub(super) fn orthonormal(matrix: ArrayView2<f64>) -> Result<Array2<f64>> {
    require_finite("the matrix to decompose", matrix.iter())?;
    let basis = orthonormal_basis(view(&matrix));
    Ok(Array2::from_shape_fn(matrix.dim(), |(i, j)| basis[(i, j)]))
}

/// Returns how many components to keep: enough for the share `energy_keep` of Σs², and none below `min_singular_value`
/// (AXL's rule: the first component that passes the share is kept too).
pub fn kept_rank(singular_values: &[f64], energy_keep: f64, min_singular_value: f64) -> usize {
    let total: f64 = singular_values.iter().map(|s| s * s).sum();
    let above = singular_values.iter().filter(|&&s| s >= min_singular_value).count();
    let mut cumulative = 0.0;
    let within = singular_values
        .iter()
        .take_while(|&&s| {
            cumulative += s * s;
            total > 0.0 && cumulative / total <= energy_keep
        })
        .count();
    (within + 1).min(singular_values.len()).min(above)
}

/// A weight as keys and values: `weight ≈ values · keys`.
#[derive(Debug, Clone)]
pub struct KeysValues {
    /// S_i v_i, one a row: `[rank, in_features]`.
    pub keys: Array2<f64>,
    /// u_i, one a column: `[out_features, rank]`.
    pub values: Array2<f64>,
    /// S `[rank]`, descending.
    pub singular_values: Array1<f64>,
}

/// Computes the SVD of `weight` `[out_features, in_features]` as keys and values. Components are kept while their share of Σs² is
/// within `energy_keep`, and the one that passes it; none below `min_singular_value` (AXL's rule).
///
/// # Errors
/// When a value is not finite, `energy_keep` is not in (0, 1] or `min_singular_value` is negative.
pub fn svd_keys_values(weight: ArrayView2<f64>, energy_keep: f64, min_singular_value: f64) -> Result<KeysValues> {
    if !(energy_keep > 0.0 && energy_keep <= 1.0) {
        return Err(Error::expected("energy_keep", energy_keep, "a share above 0 and at most 1"));
    }
    if min_singular_value.is_nan() || min_singular_value < 0.0 {
        return Err(Error::expected("min_singular_value", min_singular_value, "a number of at least 0"));
    }
    let whole = svd(weight)?;
    let rank = kept_rank(whole.s.as_slice().expect("owned"), energy_keep, min_singular_value);
    let kept = whole.truncated(rank);
    Ok(KeysValues { keys: &kept.vt * &kept.s.view().insert_axis(Axis(1)), values: kept.u, singular_values: kept.s })
}

/// Returns a number at least as large as the spectral norm of `matrix`, and at most k^(1/32) times as large for a smaller side
/// of k: 1.2 for 384.
///
/// The 32nd root of tr((E Eᵀ)¹⁶): of the sum of all singular values to the 32nd power, which the largest dominates.
pub fn spectral_norm_bound(matrix: ArrayView2<f64>) -> f64 {
    let frobenius = matrix.iter().map(|v| v * v).sum::<f64>().sqrt();
    if frobenius == 0.0 || !frobenius.is_finite() {
        return frobenius;
    }
    let unit = &matrix / frobenius;
    let wide = unit.nrows() <= unit.ncols();
    let mut power = gram(if wide { unit.t() } else { unit.view() });
    // Each product squares: (E Eᵀ)⁸, whose own squared Frobenius norm is the trace.
    for _ in 0..3 {
        power = matmul_f64(power.view(), power.view());
    }
    let trace = power.iter().map(|v| v * v).sum::<f64>();
    // Where the trace underflows, the Frobenius norm is a bound as well.
    if trace.is_normal() { frobenius * trace.powf(1.0 / 32.0) * (1.0 + 1e-9) } else { frobenius }
}

/// Returns the inverse of a square matrix; where it is singular to working precision, that of `matrix + ridge · I`.
///
/// # Errors
/// When the matrix is not square, a value is not finite, or it is singular with the ridge too.
pub fn regularized_inverse(matrix: ArrayView2<f64>, ridge: f64) -> Result<Array2<f64>> {
    let n = matrix.nrows();
    if n != matrix.ncols() {
        return Err(Error::expected("shape of a matrix to invert", format!("{n} × {}", matrix.ncols()), "a square"));
    }
    let inverse = |matrix: ArrayView2<f64>| -> Result<Option<Array2<f64>>> {
        let Svd { u, s, vt } = svd(matrix)?;
        let least = s.first().map_or(0.0, |largest| largest * n as f64 * f64::EPSILON);
        if s.iter().any(|&s| s <= least) {
            return Ok(None);
        }
        Ok(Some(matmul_f64((vt.t().to_owned() / &s).view(), u.t())))
    };
    if let Some(done) = inverse(matrix)? {
        return Ok(done);
    }
    inverse((matrix.to_owned() + Array2::<f64>::eye(n) * ridge).view())?
        .ok_or_else(|| Error::Numeric(format!("the {n} × {n} matrix is singular, with a ridge of {ridge} too")))
}

/// Returns the lower-triangular L with `matrix = L · Lᵀ`.
///
/// # Errors
/// When the matrix is not symmetric positive definite, to working precision.
pub fn cholesky(matrix: ArrayView2<f64>) -> Result<Array2<f64>> {
    require_finite("the covariance matrix", matrix.iter())?;
    let n = matrix.nrows();
    if n != matrix.ncols() {
        return Err(Error::expected(
            "the shape of a covariance matrix",
            format!("{n} × {}", matrix.ncols()),
            "a square matrix",
        ));
    }
    if n == 0 {
        return Ok(Array2::zeros((0, 0)));
    }
    let singular = || {
        Error::Numeric(format!(
            "the {n} × {n} matrix of second moments is not positive definite: raise damping, ridge_regularization or ridge_relative"
        ))
    };
    let factor = view(&matrix).llt(Side::Lower).map_err(|_| singular())?;
    let l = factor.L();
    // What is left of a row that others make up is noise.
    let least = n as f64 * f64::EPSILON;
    if (0..n).any(|i| l[(i, i)] * l[(i, i)] <= least * matrix[[i, i]]) {
        return Err(singular());
    }
    Ok(Array2::from_shape_fn((n, n), |(i, j)| if j <= i { l[(i, j)] } else { 0.0 }))
}

/// Returns `L⁻¹ · rhs` for a lower-triangular `l` `[n, n]` and `rhs` `[n, m]`.
pub fn solve_lower(l: ArrayView2<f64>, rhs: ArrayView2<f64>) -> Array2<f64> {
    let mut out = rhs.as_standard_layout().to_owned();
    let (n, m) = out.dim();
    let target = MatMut::from_row_major_slice_mut(out.as_slice_mut().expect("standard layout"), n, m);
    solve_lower_triangular_in_place(view(&l), target, parallelism(n * n * m));
    out
}

/// Returns `L⁻ᵀ · rhs` for a lower-triangular `l` `[n, n]` and `rhs` `[n, m]`.
pub fn solve_lower_transposed(l: ArrayView2<f64>, rhs: ArrayView2<f64>) -> Array2<f64> {
    let mut out = rhs.as_standard_layout().to_owned();
    let (n, m) = out.dim();
    let target = MatMut::from_row_major_slice_mut(out.as_slice_mut().expect("standard layout"), n, m);
    let upper = l.reversed_axes();
    solve_upper_triangular_in_place(view(&upper), target, parallelism(n * n * m));
    out
}

/// Returns `L⁻¹` for a lower-triangular `l`.
pub fn inverse_lower(l: ArrayView2<f64>) -> Array2<f64> {
    solve_lower(l, Array2::eye(l.nrows()).view())
}

impl Svd {
    /// Returns the first `k` triplets.
    pub fn truncated(&self, k: usize) -> Svd {
        Svd {
            u: self.u.slice(s![.., ..k]).to_owned(),
            s: self.s.slice(s![..k]).to_owned(),
            vt: self.vt.slice(s![..k, ..]).to_owned(),
        }
    }

    /// Returns `u · diag(s) · vt`.
    pub fn product(&self) -> Array2<f64> {
        let scaled = &self.u * &self.s.view().insert_axis(Axis(0));
        matmul_f64(scaled.view(), self.vt.view())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::{from_dmatrix, to_dmatrix};
    use proptest::prelude::*;

    fn sample(rows: usize, columns: usize, seed: u64) -> Array2<f64> {
        let mut state = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        Array2::from_shape_fn((rows, columns), |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f64 / f64::from(1u32 << 31) * 2.0 - 1.0
        })
    }

    fn largest(a: &Array2<f64>) -> f64 {
        a.iter().fold(0.0, |m, v| m.max(v.abs()))
    }

    /// The same numbers by one thread and by many, also where the matrix is large enough for them.
    #[test]
    fn threads_change_nothing() {
        let a = sample(260, 330, 7);
        let spd = matmul_f64(a.view(), a.t()) + Array2::<f64>::eye(260);
        let all = || {
            let whole = svd(a.view()).unwrap();
            let leading = leading_svd(a.view(), 20).unwrap();
            (
                whole.u,
                whole.s,
                whole.vt,
                leading.u,
                leading.vt,
                orthonormal(a.t()).unwrap(),
                cholesky(spd.view()).unwrap(),
            )
        };
        let here = all();
        let identity = matmul_f64(here.5.t(), here.5.view());
        assert!(largest(&(identity - Array2::<f64>::eye(260))) < 1e-12);
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let there = pool.install(all);
            assert!(there.0 == here.0 && there.1 == here.1 && there.2 == here.2, "svd by {threads} threads");
            assert!(there.3 == here.3 && there.4 == here.4, "leading_svd by {threads} threads");
            assert!(there.5 == here.5, "orthonormal by {threads} threads");
            assert!(there.6 == here.6, "cholesky by {threads} threads");
        }
    }

    proptest! {
        #[test]
        fn svd_rebuilds_its_matrix(rows in 1usize..24, columns in 1usize..24, seed in 0u64..500) {
            let a = sample(rows, columns, seed);
            let full = svd(a.view()).unwrap();
            prop_assert!(largest(&(full.product() - &a)) < 1e-12);
            let k = rows.min(columns);
            let gram = matmul_f64(full.u.t(), full.u.view());
            prop_assert!(largest(&(gram - Array2::<f64>::eye(k))) < 1e-12);
            let bound = spectral_norm_bound(a.view());
            prop_assert!(bound >= full.s[0] && bound <= full.s[0] * (k as f64).powf(1.0 / 32.0) * 1.001);
            let leading = leading_svd(a.view(), k.div_ceil(2)).unwrap();
            for (a, b) in leading.s.iter().zip(&full.s) {
                prop_assert!((a - b).abs() < 1e-7);
            }
            prop_assert!(largest(&(leading.product() - full.truncated(k.div_ceil(2)).product())) < 1e-5);
        }

        #[test]
        fn cholesky_and_its_solves(n in 1usize..20, seed in 0u64..500) {
            let a = sample(n, n + 3, seed);
            let spd = gram(a.t()) + Array2::<f64>::eye(n) * 0.1;
            let l = cholesky(spd.view()).unwrap();
            prop_assert!(largest(&(gram(l.t()) - &spd)) < 1e-12);
            let b = sample(n, 4, seed + 1);
            prop_assert!(largest(&(matmul_f64(l.view(), solve_lower(l.view(), b.view()).view()) - &b)) < 1e-10);
            prop_assert!(largest(&(matmul_f64(l.t(), solve_lower_transposed(l.view(), b.view()).view()) - &b)) < 1e-10);
            prop_assert!(largest(&(matmul_f64(l.view(), inverse_lower(l.view()).view()) - Array2::<f64>::eye(n))) < 1e-10);
        }
    }

    proptest! {
        /// nalgebra's decompositions, which share no code with faer's, give the same.
        #[test]
        fn decompositions_are_those_of_nalgebra(rows in 1usize..20, columns in 1usize..20, seed in 0u64..500) {
            let a = sample(rows, columns, seed);
            let reference = to_dmatrix(a.view()).svd(true, true);
            let found = svd(a.view()).unwrap();
            prop_assert!(found.s.iter().zip(&reference.singular_values).all(|(a, b)| (a - b).abs() < 1e-12));
            let rebuilt = from_dmatrix(&reference.clone().recompose().unwrap());
            // nalgebra's own is some 1e-12 from what it takes apart, and seldom a thousand times as far.
            prop_assert!(largest(&(found.product() - &a)) < 1e-13);
            prop_assert!(largest(&(rebuilt - &a)) < 1e-7);
            let k = rows.min(columns);
            let leading = leading_svd(a.view(), k).unwrap();
            prop_assert!(leading.s.iter().zip(&reference.singular_values).all(|(a, b)| (a - b).abs() < 1e-7));
            prop_assert!(spectral_norm_bound(a.view()) >= reference.singular_values[0]);
            let spd = gram(a.t()) + Array2::<f64>::eye(rows) * 0.1;
            let l = to_dmatrix(spd.view()).cholesky().unwrap().l();
            prop_assert!(largest(&(cholesky(spd.view()).unwrap() - from_dmatrix(&l))) < 1e-12);
            let inverse = from_dmatrix(&to_dmatrix(spd.view()).try_inverse().unwrap());
            let found = regularized_inverse(spd.view(), 0.0).unwrap();
            prop_assert!(largest(&(&found - &inverse)) < 1e-9 * (1.0 + largest(&inverse)));
            let b = sample(rows, 3, seed + 1);
            let solved = l.solve_lower_triangular(&to_dmatrix(b.view())).unwrap();
            prop_assert!(largest(&(solve_lower(from_dmatrix(&l).view(), b.view()) - from_dmatrix(&solved))) < 1e-9);
            let solved = l.tr_solve_lower_triangular(&to_dmatrix(b.view())).unwrap();
            let found = solve_lower_transposed(from_dmatrix(&l).view(), b.view());
            prop_assert!(largest(&(found - from_dmatrix(&solved))) < 1e-9);
        }
    }

    #[test]
    fn keys_and_values_rebuild_what_was_kept() {
        let a = sample(7, 5, 3);
        let all = svd_keys_values(a.view(), 1.0, 0.0).unwrap();
        assert!(largest(&(matmul_f64(all.values.view(), all.keys.view()) - &a)) < 1e-12);
        let two = svd_keys_values(a.view(), 1.0, all.singular_values[1]).unwrap();
        assert_eq!((two.keys.dim(), two.values.dim()), ((2, 5), (7, 2)));
        assert_eq!(svd_keys_values(a.view(), 0.5, 1e9).unwrap().keys.dim(), (0, 5));
        for (energy, least) in [(0.0, 0.0), (1.5, 0.0), (f64::NAN, 0.0), (1.0, -1.0), (1.0, f64::NAN)] {
            assert!(svd_keys_values(a.view(), energy, least).is_err());
        }
    }

    #[test]
    fn singular_matrices_are_inverted_with_a_ridge() {
        let a = sample(6, 6, 9) + Array2::<f64>::eye(6);
        let inverse = regularized_inverse(a.view(), 1.0).unwrap();
        assert!(largest(&(matmul_f64(a.view(), inverse.view()) - Array2::<f64>::eye(6))) < 1e-10);
        let singular = Array2::<f64>::ones((3, 3));
        let inverse = regularized_inverse(singular.view(), 0.5).unwrap();
        let with_ridge = &singular + &(Array2::<f64>::eye(3) * 0.5);
        assert!(largest(&(matmul_f64(with_ridge.view(), inverse.view()) - Array2::<f64>::eye(3))) < 1e-12);
        assert!(regularized_inverse(singular.view(), 0.0).unwrap_err().to_string().contains("singular"));
        assert!(regularized_inverse(Array2::zeros((2, 3)).view(), 0.1).is_err());
        assert_eq!(regularized_inverse(Array2::zeros((0, 0)).view(), 0.1).unwrap().dim(), (0, 0));
    }

    #[test]
    fn bad_matrices_are_refused() {
        let mut a = Array2::<f64>::eye(3);
        a[[1, 1]] = -1.0;
        assert!(cholesky(a.view()).unwrap_err().to_string().contains("ridge"));
        a[[1, 1]] = f64::NAN;
        assert!(svd(a.view()).is_err());
        assert!(leading_svd(Array2::<f64>::eye(2).view(), 3).is_err());
    }

    #[test]
    fn empty_and_zero_matrices() {
        assert_eq!(svd(Array2::zeros((3, 0)).view()).unwrap().s.len(), 0);
        let zero = leading_svd(Array2::zeros((3, 2)).view(), 1).unwrap();
        assert_eq!(zero.s[0], 0.0);
    }
}
