//! Calibrated rounding: each column's error is made up for by the columns that come after it (GPTQ), and then codes and
//! scales are looked at again in turn, each with all others as they are (coordinate descent, as in QuantEase).
//!
//! For inputs of second moment H = E\[x xᵀ\] and H⁻¹ = UᵀU with U upper triangular: column j of every row is rounded, and
//! its error, divided by U_jj, is taken from the later columns k with weight U_jk. Rows do not touch each other.

use ndarray::{Array2, ArrayView1, ArrayView2, Axis, s};
use rayon::prelude::*;

use super::dual::column_scales;
use super::format::{Group, WeightFormat};
use super::packed::PackedMatrix;
use super::quantizer::{Clipping, QuantParams, Quantizer};
use super::round::{check, check_half_scales, in_units};
use crate::error::{Error, Result};
use crate::linalg::{cholesky, inverse_lower, matmul, unit_of};

/// Columns whose errors are handed on to all later ones at once.
const BLOCK: usize = 128;

/// Rows that a task has.
const ROWS: usize = 64;

/// How codes are found for calibrated inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Calibrated {
    /// Round the columns with the largest inputs first. Scales are then found before anything is rounded.
    pub activation_order: bool,
    /// Times that every scale and every code is looked at again.
    pub sweeps: usize,
    /// Round the quotients by [`column_scales`], which are kept beside (SINQ).
    pub dual_scaling: bool,
}

impl PackedMatrix {
    /// Rounds `weight` `[rows, columns]` for inputs of second moment `second` `[columns, columns]`, which has to be
    /// positive definite.
    ///
    /// # Errors
    /// As [`PackedMatrix::quantize`], and when the second moment has another shape or is not positive definite.
    pub(crate) fn quantize_calibrated(
        weight: ArrayView2<f32>,
        format: WeightFormat,
        clipping: Clipping,
        second: ArrayView2<f64>,
        how: Calibrated,
    ) -> Result<Self> {
        check(weight, format, clipping)?;
        let columns = weight.ncols();
        if second.dim() != (columns, columns) {
            let found = format!("{} × {}", second.nrows(), second.ncols());
            return Err(Error::expected("shape of the second moment", found, format!("{columns} × {columns}")));
        }
        // Inputs and weights in units in which f32 holds their squares.
        if let Some(unit) = unit_of(second.diag().fold(0f64, |most, v| most.max(v.abs())).sqrt()) {
            let second = second.mapv(|v| v / unit / unit);
            return Self::quantize_calibrated(weight, format, clipping, second.view(), how);
        }
        in_units(weight, format, |weight| {
            let packed = Self::calibrated_in_units(weight, format, clipping, second, how)?;
            if !how.dual_scaling {
                check_half_scales(weight, &packed, clipping)?;
            }
            Ok(packed)
        })
    }

    /// Does [`PackedMatrix::quantize_calibrated`] for a checked weight and inputs whose squares f32 holds.
    fn calibrated_in_units(
        weight: ArrayView2<f32>,
        format: WeightFormat,
        clipping: Clipping,
        second: ArrayView2<f64>,
        how: Calibrated,
    ) -> Result<Self> {
        let (rows, columns) = weight.dim();
        if how.dual_scaling {
            let scales = column_scales(weight);
            let quotients = &weight / &ArrayView1::from(&scales);
            // Of inputs that are multiplied with the scales.
            let second = Array2::from_shape_fn(second.dim(), |(i, j)| {
                second[[i, j]] * f64::from(scales[i]) * f64::from(scales[j])
            });
            let how = Calibrated { dual_scaling: false, ..how };
            let packed = Self::quantize_calibrated(quotients.view(), format, clipping, second.view(), how)?;
            return packed.with_column_scales(scales);
        }
        let Some(quantizer) = format.quantizer() else { return Self::quantize(weight, format, clipping, None) };
        let diagonal = second.diag();
        let mut places: Vec<usize> = (0..columns).collect();
        if how.activation_order {
            places.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]));
        }
        let importance: Vec<f32> = diagonal.iter().map(|&d| d as f32).collect();
        let upper = inverse_factor(second, &places)?;
        let group = format.group_size(columns)?.max(1);
        let fixed = match (how.activation_order, format.group) {
            (false, Group::Size(_) | Group::Channel) => None,
            _ => Some(Self::quantize(weight, format, clipping, Some(&importance))?),
        };
        let second = second.mapv(|v| v as f32);
        let task = Task { quantizer: &*quantizer, format, clipping, upper, places, importance, group, fixed };
        let mut codes = vec![0u8; rows * columns];
        let shares: Vec<_> = weight.axis_chunks_iter(Axis(0), ROWS).collect();
        let group_params: Vec<Vec<QuantParams>> = shares
            .into_par_iter()
            .zip(codes.par_chunks_mut((ROWS * columns).max(1)))
            .enumerate()
            .map(|(share, (weight, codes))| {
                let mut group_params = task.round(share * ROWS, weight, codes);
                if how.sweeps > 0 {
                    task.refine(weight, second.view(), how.sweeps, codes, &mut group_params);
                }
                group_params
            })
            .collect();
        Ok(Self::from_codes(format, (rows, columns), &codes, group_params.into_iter().flatten()))
    }
}

/// U, with rows and columns in the order of `places`.
fn inverse_factor(second: ArrayView2<f64>, places: &[usize]) -> Result<Array2<f32>> {
    let n = places.len();
    // With the order turned round, H = L Lᵀ turns into H = V Vᵀ with V upper triangular, and U = V⁻¹.
    let turned = Array2::from_shape_fn((n, n), |(i, j)| second[[places[n - 1 - i], places[n - 1 - j]]]);
    let inverse = inverse_lower(cholesky(turned.view())?.view());
    Ok(Array2::from_shape_fn((n, n), |(i, j)| inverse[[n - 1 - i, n - 1 - j]] as f32))
}

struct Task<'a> {
    quantizer: &'a dyn Quantizer,
    format: WeightFormat,
    clipping: Clipping,
    /// `[columns, columns]`, in the order of `places`.
    upper: Array2<f32>,
    places: Vec<usize>,
    importance: Vec<f32>,
    group: usize,
    /// Where parameters do not follow from the columns as they are when their turn comes.
    fixed: Option<PackedMatrix>,
}

impl Task<'_> {
    /// Rounds some rows from the `first` one on: their codes, `[rows, columns]`, and their parameters.
    fn round(&self, first: usize, weight: ArrayView2<f32>, codes: &mut [u8]) -> Vec<QuantParams> {
        let (rows, columns) = weight.dim();
        let groups = columns.checked_div(self.group).unwrap_or(0);
        // Columns as rows: what is done at a time lies side by side.
        let mut w = Array2::from_shape_fn((columns, rows), |(j, r)| weight[[r, self.places[j]]]);
        let mut group_params = vec![QuantParams { scale: 1.0, zero: 0 }; rows * groups];
        if let Some(fixed) = &self.fixed {
            let scales = fixed.scales();
            for (place, params) in group_params.iter_mut().enumerate() {
                let at = first * groups + place;
                *params = QuantParams { scale: scales[at], zero: fixed.zeros().get(at).copied().unwrap_or(0) };
            }
        }
        // Whole groups, so that parameters are fitted to columns that every error before them has been propagated to.
        let block = if self.group <= BLOCK { self.group * (BLOCK / self.group) } else { BLOCK };
        let mut errors = Array2::<f32>::zeros((block, rows));
        for start in (0..columns).step_by(block) {
            let end = (start + block).min(columns);
            for j in start..end {
                let place = self.places[j];
                if self.fixed.is_none() && j.is_multiple_of(self.group) {
                    self.fit(&w, j, groups, &mut group_params);
                }
                let divisor = self.upper[[j, j]];
                for r in 0..rows {
                    let (from, mut level) = ([w[[j, r]]], [0f32]);
                    let code = &mut codes[r * columns + place..][..1];
                    let params = group_params[r * groups + place / self.group];
                    self.quantizer.encode(params, &from, code);
                    self.quantizer.decode(params, code, &mut level);
                    errors[[j - start, r]] = (from[0] - level[0]) / divisor;
                }
                let error = errors.row(j - start);
                for k in j + 1..end {
                    w.row_mut(k).scaled_add(-self.upper[[j, k]], &error);
                }
            }
            if end < columns {
                let share = self.upper.slice(s![start..end, end..]);
                let propagated = matmul(share.t(), errors.slice(s![..end - start, ..]));
                w.slice_mut(s![end.., ..]).scaled_add(-1.0, &propagated);
            }
        }
        group_params
    }

    /// Looks again at the scales, then at the codes, of some rows: each becomes the best for the others as they are.
    fn refine(
        &self,
        weight: ArrayView2<f32>,
        second: ArrayView2<f32>,
        sweeps: usize,
        codes: &mut [u8],
        group_params: &mut [QuantParams],
    ) {
        let (rows, columns) = weight.dim();
        let groups = columns.checked_div(self.group).unwrap_or(0);
        // Columns as rows, as above: the levels now, and R (w − levels), the slope of the error.
        let mut levels = Array2::<f32>::zeros((columns, rows));
        for ((j, r), level) in levels.indexed_iter_mut() {
            self.quantizer.decode(
                group_params[r * groups + j / self.group],
                &[codes[r * columns + j]],
                std::slice::from_mut(level),
            );
        }
        let mut slope = matmul(second, (&weight.t() - &levels).view());
        for _ in 0..sweeps {
            if matches!(self.format.group, Group::Size(_) | Group::Channel) {
                for group in 0..groups {
                    let at = group * self.group..(group + 1) * self.group;
                    // The levels for a scale of 1.
                    let mut unit = Array2::<f32>::zeros((self.group, rows));
                    for ((j, r), unit) in unit.indexed_iter_mut() {
                        let params = QuantParams { scale: 1.0, ..group_params[r * groups + group] };
                        self.quantizer.decode(params, &[codes[r * columns + at.start + j]], std::slice::from_mut(unit));
                    }
                    let curved = matmul(second.slice(s![at.clone(), at.clone()]), unit.view());
                    let gain = (&unit * &slope.slice(s![at.clone(), ..])).sum_axis(Axis(0));
                    let curvature = (&unit * &curved).sum_axis(Axis(0));
                    for (r, mut unit) in unit.columns_mut().into_iter().enumerate() {
                        let params = &mut group_params[r * groups + group];
                        let better = self.format.stored_scale(params.scale + gain[r] / curvature[r]);
                        let change = better - params.scale;
                        // What is stored is rounded, a power of two for some: only where it gains.
                        let gains = change * (change * curvature[r] - 2.0 * gain[r]) < 0.0;
                        let change = if gains { change } else { 0.0 };
                        params.scale += change;
                        unit *= change;
                    }
                    let mut part = levels.slice_mut(s![at.clone(), ..]);
                    part += &unit;
                    slope -= &matmul(second.slice(s![.., at]), unit.view());
                }
            }
            for start in (0..columns).step_by(BLOCK) {
                let end = (start + BLOCK).min(columns);
                let mut changes = Array2::<f32>::zeros((end - start, rows));
                for j in start..end {
                    let curvature = second[[j, j]];
                    for r in 0..rows {
                        let params = group_params[r * groups + j / self.group];
                        let wanted = [levels[[j, r]] + slope[[j, r]] / curvature];
                        let (mut best, mut level) = ([0u8], [0f32]);
                        self.quantizer.encode(params, &wanted, &mut best);
                        self.quantizer.decode(params, &best, &mut level);
                        codes[r * columns + j] = best[0];
                        changes[[j - start, r]] = level[0] - levels[[j, r]];
                        levels[[j, r]] = level[0];
                    }
                    let change = changes.row(j - start);
                    for k in start..end {
                        slope.row_mut(k).scaled_add(-second[[k, j]], &change);
                    }
                }
                for others in [0..start, end..columns] {
                    if !others.is_empty() {
                        let propagated = matmul(second.slice(s![others.clone(), start..end]), changes.view());
                        slope.slice_mut(s![others, ..]).scaled_add(-1.0, &propagated);
                    }
                }
            }
        }
    }

    /// The parameters of the group that begins at column `j`, from the columns as they are now.
    fn fit(&self, w: &Array2<f32>, j: usize, groups: usize, group_params: &mut [QuantParams]) {
        let part = w.slice(s![j..j + self.group, ..]);
        let importance = &self.importance[j..j + self.group];
        for (r, column) in part.columns().into_iter().enumerate() {
            let weights = column.to_vec();
            group_params[r * groups + j / self.group] =
                self.format.fit(self.quantizer, &weights, importance, self.clipping);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{ScaleType, WeightType};
    use proptest::prelude::*;

    fn sample(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
        let mut state = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        Array2::from_shape_fn((rows, columns), |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f32 / (1u32 << 31) as f32 * 2.0 - 1.0
        })
    }

    /// Inputs whose columns follow from a few others.
    fn second(columns: usize, seed: u64) -> Array2<f64> {
        let x = sample(3 * columns, 3, seed).dot(&sample(3, columns, seed + 1))
            + sample(3 * columns, columns, seed + 2) * 0.2;
        let x = x.mapv(f64::from);
        x.t().dot(&x) / x.nrows() as f64
    }

    /// Weights and inputs of any size get the same codes.
    #[test]
    fn sizes_do_not_matter() {
        let (w, h) = (sample(8, 32, 1), second(32, 2));
        for how in [
            Calibrated { sweeps: 2, ..Calibrated::default() },
            Calibrated { dual_scaling: true, ..Calibrated::default() },
        ] {
            let codes = |weights: f32, inputs: f64| {
                let format = WeightFormat { group: Group::Size(16), ..WeightFormat::default() };
                let (w, h) = (&w * weights, &h * (inputs * inputs));
                PackedMatrix::quantize_calibrated(w.view(), format, Clipping::Mse, h.view(), how)
                    .unwrap()
                    .packed()
                    .clone()
            };
            let plain = codes(1.0, 1.0);
            for (weights, inputs) in [(-100, 0), (90, 0), (0, -200), (0, 60), (-60, 70)] {
                assert_eq!(codes(2f32.powi(weights), 2f64.powi(inputs)), plain, "2^{weights}, 2^{inputs}");
            }
        }
    }

    fn error(w: &Array2<f32>, q: &PackedMatrix, second: &Array2<f64>) -> f64 {
        let e = (w - &q.dequantize()).mapv(f64::from);
        (e.dot(second) * e).sum()
    }

    /// As the paper has it: one column after the other, with the inverse of what is left.
    fn slow(w: &Array2<f32>, group_params: &PackedMatrix, second: &Array2<f64>, group: usize) -> Array2<f32> {
        let (rows, n) = w.dim();
        let quantizer = group_params.format().quantizer().unwrap();
        let mut w = w.mapv(f64::from);
        for j in 0..n {
            let rest = second.slice(s![j.., j..]);
            let inverse = crate::linalg::regularized_inverse(rest, 0.0).unwrap();
            for r in 0..rows {
                let at = r * (n / group) + j / group;
                let params = QuantParams { scale: group_params.scales()[at], zero: group_params.zeros()[at] };
                let mut level = [0f32];
                quantizer.round(params, &[w[[r, j]] as f32], &mut level);
                let share = (w[[r, j]] - f64::from(level[0])) / inverse[[0, 0]];
                for k in j + 1..n {
                    w[[r, k]] -= share * inverse[[0, k - j]];
                }
                w[[r, j]] = f64::from(level[0]);
            }
        }
        w.mapv(|v| v as f32)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// What the paper's own formula gives, on the parameters that were found, and no worse than the nearest codes.
        #[test]
        fn rounds_as_the_paper_says(rows in 1usize..80, bits in 2u8..6, seed in 0u64..999, order in any::<bool>()) {
            let (w, second) = (sample(rows, 24, seed), second(24, seed));
            let format = WeightFormat { weight_type: WeightType::Int(bits), group: Group::Size(8), symmetric: false, minimum: false, scales: ScaleType::F32 };
            let how = Calibrated { activation_order: order, ..Calibrated::default() };
            let round = |how| PackedMatrix::quantize_calibrated(w.view(), format, Clipping::Mse, second.view(), how).unwrap();
            let q = round(how);
            // Looking again never makes it worse, but for the rounding of what is compared.
            let mut last = error(&w, &q, &second);
            for sweeps in 1..4 {
                let now = error(&w, &round(Calibrated { sweeps, ..how }), &second);
                prop_assert!(now <= last * 1.0001 + 1e-7, "{} {} {}", sweeps, now, last);
                last = now;
            }
            let importance: Vec<f32> = second.diag().iter().map(|&v| v as f32).collect();
            let nearest = PackedMatrix::quantize(w.view(), format, Clipping::Mse, Some(&importance)).unwrap();
            // Of few rows one may be unlucky.
            if rows >= 8 {
                prop_assert!(error(&w, &q, &second) < error(&w, &nearest, &second), "{} {}", error(&w, &q, &second), error(&w, &nearest, &second));
            }
            if !order {
                let expected = slow(&w, &q, &second, 8);
                let found = q.dequantize();
                // A weight halfway between two levels may go either way, and takes its row with it.
                let same = found.rows().into_iter().zip(expected.rows()).filter(|(a, b)| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4)).count();
                prop_assert!(same * 20 >= rows * 19 || same + 1 >= rows, "{} of {} rows", same, rows);
            }
        }
    }

    #[test]
    fn groups_across_blocks_and_other_types() {
        let (w, second) = (sample(70, 384, 5), second(384, 6));
        let types = [
            (WeightType::Int(4), true),
            (WeightType::Int(3), false),
            (WeightType::Nf4, true),
            (WeightType::MxInt(4), true),
        ];
        for (weight_type, symmetric) in types {
            for group in [Group::Size(64), Group::Size(192), Group::Size(96), Group::Channel, Group::Tensor] {
                let format = WeightFormat { weight_type, group, symmetric, minimum: false, scales: ScaleType::F16 };
                let nearest = PackedMatrix::quantize(w.view(), format, Clipping::Mse, None).unwrap();
                for (activation_order, sweeps) in [(false, 0), (true, 0), (false, 2), (true, 1)] {
                    let how = Calibrated { activation_order, sweeps, dual_scaling: false };
                    let q =
                        PackedMatrix::quantize_calibrated(w.view(), format, Clipping::Mse, second.view(), how).unwrap();
                    assert_eq!(q.stored_bytes(), format.stored_bytes(70, 384).unwrap());
                    let (calibrated, nearest) = (error(&w, &q, &second), error(&w, &nearest, &second));
                    assert!(calibrated < 0.8 * nearest, "{format:?} {how:?}: {calibrated} {nearest}");
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let w = sample(2, 8, 1);
        let format = WeightFormat { group: Group::Channel, ..WeightFormat::default() };
        let round = |second: Array2<f64>| {
            PackedMatrix::quantize_calibrated(
                w.view(),
                format,
                Clipping::Mse,
                second.view(),
                Calibrated { sweeps: 1, ..Calibrated::default() },
            )
        };
        assert!(round(Array2::eye(7)).unwrap_err().to_string().contains("8 × 8"));
        assert!(round(Array2::zeros((8, 8))).unwrap_err().to_string().contains("positive definite"));
        // Inputs that know nothing of each other: the nearest codes.
        let nearest = PackedMatrix::quantize(w.view(), format, Clipping::Mse, None).unwrap();
        assert_eq!(round(Array2::eye(8)).unwrap().packed(), nearest.packed());
    }
}
