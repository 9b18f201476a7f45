//! Rounding a weight matrix to the nearest codes.

use half::{bf16, f16};
use ndarray::{ArrayView1, ArrayView2};
use rayon::prelude::*;

use super::dual::column_scales;
use super::format::{Group, ScaleType, WeightFormat, WeightType};
use super::packed::PackedMatrix;
use super::quantizer::{Clipping, QuantParams};
use crate::error::{Error, Result};
use crate::linalg::require_finite;

/// No weight may be larger: sums of levels times scales stay finite.
pub const LARGEST: f32 = f32::MAX / 16.0;

impl PackedMatrix {
    /// Rounds each weight to the nearest code. The error in column j counts `importance[j]` times (E\[x_j²\] of the
    /// inputs) where [`Clipping::Mse`] looks for a group's scale.
    ///
    /// # Errors
    /// When the group does not divide the row, a weight is not finite or too large for the format, or `importance` has
    /// not one number a column.
    pub fn quantize(
        weight: ArrayView2<f32>,
        format: WeightFormat,
        clipping: Clipping,
        importance: Option<&[f32]>,
    ) -> Result<Self> {
        check(weight, format, clipping)?;
        let (rows, columns) = weight.dim();
        if let Some(importance) = importance
            && importance.len() != columns
        {
            return Err(Error::expected("numbers of importance", importance.len(), format!("{columns}, one a column")));
        }
        let Some(quantizer) = format.quantizer() else { return Ok(Self::floats(weight, format)) };
        let even = vec![1f32; columns];
        let importance = importance.unwrap_or(&even);
        let weight = weight.as_standard_layout();
        let all = weight.as_slice().expect("standard layout");
        let group = format.group_size(columns)?.max(1);
        let shared = (format.group == Group::Tensor).then(|| {
            let importance: Vec<f32> = std::iter::repeat_n(importance, rows).flatten().copied().collect();
            format.fit(&*quantizer, all, &importance, clipping)
        });
        let mut codes = vec![0u8; rows * columns];
        let rows_of = all.par_chunks(columns.max(1)).zip(codes.par_chunks_mut(columns.max(1)));
        let group_params: Vec<Vec<QuantParams>> = rows_of
            .map(|(row, codes)| {
                let groups = row.chunks(group).zip(importance.chunks(group)).zip(codes.chunks_mut(group));
                let params = |((weights, importance), codes): ((&[f32], &[f32]), &mut [u8])| {
                    let params = shared.unwrap_or_else(|| format.fit(&*quantizer, weights, importance, clipping));
                    quantizer.encode(params, weights, codes);
                    params
                };
                groups.map(params).collect()
            })
            .collect();
        Ok(Self::from_codes(format, (rows, columns), &codes, group_params.into_iter().flatten()))
    }

    /// Does [`PackedMatrix::quantize`] with the quotients by [`column_scales`], which are kept beside (SINQ).
    ///
    /// # Errors
    /// As [`PackedMatrix::quantize`].
    pub fn quantize_dual(
        weight: ArrayView2<f32>,
        format: WeightFormat,
        clipping: Clipping,
        importance: Option<&[f32]>,
    ) -> Result<Self> {
        check(weight, format, clipping)?;
        let scales = column_scales(weight);
        // An error in a quotient is that many times as large in its product.
        let importance: Vec<f32> = match importance {
            Some(importance) => importance.iter().zip(&scales).map(|(i, s)| i * s * s).collect(),
            None => scales.iter().map(|s| s * s).collect(),
        };
        let quotients = &weight / &ArrayView1::from(&scales);
        Self::quantize(quotients.view(), format, clipping, Some(&importance))?.with_column_scales(scales)
    }

    /// Packs weights `[rows, columns]` that are ternary already, all with one scale.
    ///
    /// # Errors
    /// When one is none of −1, 0 and 1, or the scale is not finite.
    pub fn from_ternary(weights: ArrayView2<i8>, scale: f32) -> Result<Self> {
        let format = WeightFormat {
            weight_type: WeightType::Ternary,
            group: Group::Tensor,
            symmetric: true,
            scales: ScaleType::F32,
        };
        if let Some(found) = weights.iter().find(|w| !(-1..=1).contains(*w)) {
            return Err(Error::expected("ternary weight", found, "-1, 0 or 1"));
        }
        require_finite("the scale", [scale].iter())?;
        let codes: Vec<u8> = weights.iter().map(|w| (w + 1) as u8).collect();
        let group_params =
            std::iter::repeat_n(QuantParams { scale, zero: 0 }, if weights.ncols() > 0 { weights.nrows() } else { 0 });
        Ok(Self::from_codes(format, weights.dim(), &codes, group_params))
    }

    fn floats(weight: ArrayView2<f32>, format: WeightFormat) -> Self {
        let half = |w: &f32| match format.weight_type {
            WeightType::Bf16 => bf16::from_f32(*w).to_le_bytes(),
            _ => f16::from_f32(*w).to_le_bytes(),
        };
        let packed: Vec<u8> = weight.iter().flat_map(half).collect();
        Self::from_floats(format, weight.dim(), packed)
    }
}

/// Checks that a weight can be quantised like this.
pub(super) fn check(weight: ArrayView2<f32>, format: WeightFormat, clipping: Clipping) -> Result<()> {
    format.group_size(weight.ncols())?;
    clipping.check(format.weight_type)?;
    let most = if format.weight_type == WeightType::F16 { f16::MAX.to_f32() } else { LARGEST };
    require_finite("the weight", weight.iter())?;
    match weight.iter().find(|v| v.abs() > most) {
        Some(value) => Err(Error::expected(
            format!("weight to store as {}", format.weight_type),
            value,
            format!("at most {most:e} in size"),
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::Array2;
    use proptest::prelude::*;

    fn formats() -> impl Strategy<Value = WeightFormat> {
        let kinds = (2u8..9).prop_flat_map(|bits| {
            prop_oneof![
                Just(WeightType::Int(bits)),
                Just(WeightType::Int(bits)),
                Just(WeightType::MxInt(bits)),
                Just(WeightType::Nf4),
                Just(WeightType::Ternary)
            ]
        });
        let groups = prop_oneof![Just(Group::Channel), Just(Group::Tensor), Just(Group::Size(4)), Just(Group::Size(6))];
        (kinds, groups, any::<bool>(), any::<bool>()).prop_map(|(weight_type, group, symmetric, half)| WeightFormat {
            weight_type,
            group,
            symmetric,
            scales: if half { ScaleType::F16 } else { ScaleType::F32 },
        })
    }

    fn squared(a: &Array2<f32>, b: &Array2<f32>) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    proptest! {
        /// With a clipping that is spanned, no weight is further off than half of what lies between two levels (a whole step
        /// at a symmetric end, which saturates); looking for less squared error finds no more; stored fields bring it back.
        #[test]
        fn within_its_steps(format in formats(), rows in 1usize..4, values in proptest::collection::vec(-3f32..3f32, 36)) {
            let w = Array2::from_shape_fn((rows, 12), |(i, j)| values[(i * 12 + j) % values.len()]);
            let plain = PackedMatrix::quantize(w.view(), format, Clipping::Absmax, None).unwrap();
            let groups = format.groups(12).unwrap();
            let back = plain.dequantize();
            for ((i, j), &v) in w.indexed_iter() {
                let scale = plain.scales()[i * groups + j * groups / 12];
                let steps = match format.weight_type {
                    WeightType::Nf4 => 0.5 * (1.0 - 0.69),
                    WeightType::MxInt(_) => 1.0,
                    WeightType::Ternary => 0.5,
                    _ if format.symmetric => 0.5,
                    // The zero point is rounded, too.
                    _ => 1.0,
                };
                let slack = 1.0 + if format.scales == ScaleType::F16 { 0.002 * f32::from(2u16.pow(format.weight_type.bits())) } else { 1e-5 };
                prop_assert!((back[[i, j]] - v).abs() <= steps * scale * slack + 1e-6, "{} -> {} scale {}", v, back[[i, j]], scale);
            }
            let best = PackedMatrix::quantize(w.view(), format, Clipping::Mse, None).unwrap();
            prop_assert!(squared(&best.dequantize(), &w) <= squared(&back, &w) * 1.0001 + 1e-9);
            for q in [plain, best] {
                prop_assert_eq!(q.stored_bytes(), format.stored_bytes(rows, 12).unwrap());
                let again = PackedMatrix::from_fields(q.format(), (rows, 12), q.stored_codes(), &q.scale_bytes(), q.zeros().to_vec());
                prop_assert_eq!(again.unwrap(), q);
            }
        }

        /// What comes back from its codes is rounded to itself.
        #[test]
        fn levels_stay(format in formats(), values in proptest::collection::vec(-3f32..3f32, 24)) {
            let quantizer = format.quantizer().unwrap();
            let params = format.fit(&*quantizer, &values, &[1.0; 24], Clipping::Mse);
            let (mut codes, mut levels, mut rounded) = (vec![0; 24], vec![0.0; 24], vec![0.0; 24]);
            quantizer.encode(params, &values, &mut codes);
            quantizer.decode(params, &codes, &mut levels);
            quantizer.round(params, &values, &mut rounded);
            prop_assert_eq!(&levels, &rounded);
            quantizer.round(params, &levels, &mut rounded);
            prop_assert!(levels.iter().zip(&rounded).all(|(a, b)| (a - b).abs() <= 1e-6 * a.abs()), "{:?} {:?}", levels, rounded);
        }
    }

    #[test]
    fn zeros_and_extremes() {
        for weight_type in [
            WeightType::Int(2),
            WeightType::Int(4),
            WeightType::Nf4,
            WeightType::MxInt(4),
            WeightType::Ternary,
            WeightType::Bf16,
        ] {
            for (symmetric, clipping) in
                [(true, Clipping::Absmax), (false, Clipping::Mse), (false, Clipping::Percentile(90.0))]
            {
                let format = WeightFormat { weight_type, symmetric, group: Group::Channel, ..WeightFormat::default() };
                let quantize = |w: Array2<f32>| PackedMatrix::quantize(w.view(), format, clipping, None);
                assert_eq!(quantize(Array2::zeros((2, 5))).unwrap().dequantize(), Array2::<f32>::zeros((2, 5)));
                for huge in [LARGEST, -LARGEST] {
                    assert!(
                        quantize(Array2::from_elem((1, 3), huge)).unwrap().dequantize().iter().all(|v| v.is_finite())
                    );
                }
                assert!(quantize(Array2::from_elem((1, 3), f32::MAX)).is_err());
                assert!(quantize(Array2::from_elem((1, 3), f32::NAN)).is_err());
                assert!(quantize(Array2::zeros((0, 4))).unwrap().packed().is_empty());
            }
        }
        let f16 = WeightFormat { weight_type: WeightType::F16, ..WeightFormat::default() };
        let large = Array2::from_elem((1, 2), 1e5);
        assert!(PackedMatrix::quantize(large.view(), f16, Clipping::Absmax, None).is_err());
        let format = WeightFormat { group: Group::Channel, ..WeightFormat::default() };
        for percent in [0.0, 101.0, f64::NAN] {
            assert!(PackedMatrix::quantize(large.view(), format, Clipping::Percentile(percent), None).is_err());
        }
    }

    /// Keras-MML's numbers: the mean of all sizes, and the nearest of three levels for it.
    #[test]
    fn ternary_by_the_mean() {
        let w = Array2::from_shape_fn((2, 6), |(i, j)| [0.0, 0.4, -0.6, 2.0, -0.9, 0.3][j] * (i as f32 + 1.0));
        let format = WeightFormat { weight_type: WeightType::Ternary, group: Group::Tensor, ..WeightFormat::default() };
        let q = PackedMatrix::quantize(w.view(), format, Clipping::Absmean, None).unwrap();
        let mean = w.mapv(f32::abs).mean().unwrap();
        assert!(q.scales().iter().all(|s| (s - mean).abs() < 1e-6));
        let ternary = w.mapv(|w| (w / mean).round_ties_even().clamp(-1.0, 1.0));
        assert!((q.dequantize() - &ternary * mean).iter().all(|d| d.abs() < 1e-6));
        let again = PackedMatrix::from_ternary(ternary.mapv(|t| t as i8).view(), q.scales()[0]).unwrap();
        assert_eq!((&again.packed(), &again.scales()), (&q.packed(), &q.scales()));
        assert_eq!(q.stored_codes().len(), 4);
        assert!(PackedMatrix::from_ternary(Array2::from_elem((1, 2), 2).view(), 1.0).is_err());
        let zero = PackedMatrix::quantize(Array2::zeros((2, 5)).view(), format, Clipping::Absmean, None).unwrap();
        assert_eq!((zero.scales()[0], zero.dequantize().sum()), (1e-5, 0.0));
        assert!(PackedMatrix::quantize(w.view(), WeightFormat::default(), Clipping::Absmean, None).is_err());
    }

    #[test]
    fn half_floats_are_the_nearest() {
        let w = Array2::from_shape_fn((2, 3), |(i, j)| 0.1 + (i * 3 + j) as f32 * 1.7);
        for (weight_type, step) in [(WeightType::F16, 1.0 / 2048.0), (WeightType::Bf16, 1.0 / 256.0)] {
            let format = WeightFormat { weight_type, ..WeightFormat::default() };
            let q = PackedMatrix::quantize(w.view(), format, Clipping::Mse, None).unwrap();
            assert!(q.dequantize().iter().zip(&w).all(|(a, b)| (a - b).abs() <= step * b.abs()));
            assert_eq!(q.stored_bytes(), 12);
        }
    }
}
