//! Rounding a weight matrix to the nearest codes.

use half::{bf16, f16};
use ndarray::{ArrayView1, ArrayView2};
use rayon::prelude::*;

use super::dual::column_scales;
use super::format::{Group, WeightFormat, WeightType};
use super::packed::PackedMatrix;
use super::quantizer::{Clipping, QuantParams};
use super::scales::ScaleType;
use crate::error::{Error, Result};
use crate::linalg::{HALF_ROUNDING, Loss, require_finite, unit_of_f32};

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
        let columns = weight.ncols();
        if let Some(importance) = importance
            && importance.len() != columns
        {
            return Err(Error::expected("numbers of importance", importance.len(), format!("{columns}, one a column")));
        }
        if format.weight_type.is_float() {
            return Self::floats(weight, format);
        }
        let even = vec![1f32; columns];
        let importance = importance.unwrap_or(&even);
        in_units(weight, format, |weight| {
            let packed = Self::quantize_plain(weight, format, clipping, importance)?;
            check_half_scales(weight, &packed, clipping)?;
            Ok(packed)
        })
    }

    /// Does [`PackedMatrix::quantize`] for a checked weight whose squares f32 holds.
    fn quantize_plain(
        weight: ArrayView2<f32>,
        format: WeightFormat,
        clipping: Clipping,
        importance: &[f32],
    ) -> Result<Self> {
        let (rows, columns) = weight.dim();
        let Some(quantizer) = format.quantizer() else { return Self::floats(weight, format) };
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
        in_units(weight, format, |weight| {
            let scales = column_scales(weight);
            // An error in a quotient is that many times as large in its product.
            let importance: Vec<f32> = match importance {
                Some(importance) => importance.iter().zip(&scales).map(|(i, s)| i * s * s).collect(),
                None => scales.iter().map(|s| s * s).collect(),
            };
            let quotients = &weight / &ArrayView1::from(&scales);
            Self::quantize(quotients.view(), format, clipping, Some(&importance))?.with_column_scales(scales)
        })
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
            minimum: false,
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

    fn floats(weight: ArrayView2<f32>, format: WeightFormat) -> Result<Self> {
        let is_brain = format.weight_type == WeightType::Bf16;
        let mut loss = Loss::default();
        let half = |w: &f32| {
            let (kept, bytes) = match is_brain {
                true => (bf16::from_f32(*w).to_f64(), bf16::from_f32(*w).to_le_bytes()),
                false => (f16::from_f32(*w).to_f64(), f16::from_f32(*w).to_le_bytes()),
            };
            loss.add(f64::from(*w), kept);
            bytes
        };
        let packed: Vec<u8> = weight.iter().flat_map(half).collect();
        if !loss.within(if is_brain { BRAIN_ROUNDING } else { HALF_ROUNDING }) {
            let least = if is_brain { bf16::MIN_POSITIVE.to_f32() } else { f16::MIN_POSITIVE.to_f32() };
            return Err(Error::expected(
                format!("weight to store as {}", format.weight_type),
                format!("numbers of {:e} on average", (loss.whole / weight.len() as f64).sqrt()),
                format!("few below {least:e} in size: use a type with scales"),
            ));
        }
        Ok(Self::from_floats(format, weight.dim(), packed))
    }
}

/// The largest relative error of a number that bf16 holds as a normal one.
const BRAIN_ROUNDING: f64 = 1.0 / 256.0;

/// The share of a weight that narrower scales may lose, and the share of the error that rounding it leaves anyway.
const LOST_BY_SCALES: (f64, f64) = (2.0 * HALF_ROUNDING, 0.2);

/// Runs `quantize` with a weight in units in which f32 holds its squares, and brings the scales back.
///
/// # Errors
/// As `quantize`, and when scales are beyond what f32 holds.
pub(super) fn in_units(
    weight: ArrayView2<f32>,
    format: WeightFormat,
    quantize: impl FnOnce(ArrayView2<f32>) -> Result<PackedMatrix>,
) -> Result<PackedMatrix> {
    // What f16 holds needs no unit, and is rounded as it is.
    let is_half = format.scales == ScaleType::F16 && !matches!(format.weight_type, WeightType::MxInt(_));
    match unit_of_f32(weight.iter()).filter(|_| !is_half) {
        None => quantize(weight),
        Some(unit) => {
            let packed = quantize((&weight * (1.0 / unit)).view())?;
            let there = packed.scaled_by(unit);
            let mut loss = Loss::default();
            let pairs = packed.dequantize().into_iter().zip(there.dequantize());
            pairs.for_each(|(wanted, kept)| loss.add(f64::from(wanted) * f64::from(unit), kept.into()));
            if !loss.within(LOST_BY_SCALES.0) {
                let most = weight.iter().fold(0f32, |most, w| most.max(w.abs()));
                let expected = format!("larger numbers, whose scales are at least {:e}", f32::MIN_POSITIVE);
                return Err(Error::expected("weight to quantise", format!("numbers of at most {most:e}"), expected));
            }
            Ok(there)
        }
    }
}

/// Checks that f16 holds the scales of a weight's groups, where they are f16: what they lose is little beside what rounding the
/// weight loses.
///
/// # Errors
/// When that is not so.
pub(super) fn check_half_scales(weight: ArrayView2<f32>, packed: &PackedMatrix, clipping: Clipping) -> Result<()> {
    let format = packed.format();
    let Some(quantizer) = format.quantizer().filter(|_| format.scale_bytes() == 2) else { return Ok(()) };
    let group = match format.group {
        Group::Tensor => weight.len(),
        _ => format.group_size(weight.ncols())?,
    };
    let unit = unit_of_f32(weight.iter()).unwrap_or(1.0);
    let weights = &weight.as_standard_layout() * (1.0 / unit);
    let weights = weights.as_slice().expect("standard layout");
    let clipping = if clipping == Clipping::Absmean { clipping } else { Clipping::Absmax };
    let (mut loss, mut worst, mut worst_lost) = (Loss::default(), 0f64, 0f64);
    for weights in weights.chunks(group.max(1)) {
        let whole: f64 = weights.iter().map(|w| f64::from(*w).powi(2)).sum();
        if whole == 0.0 {
            continue;
        }
        let wanted = f64::from(quantizer.candidates(weights, clipping)[0].scale) * f64::from(unit);
        let lost = (f64::from(format.stored_scale(wanted as f32)) / wanted - 1.0).powi(2) * whole;
        if lost > worst_lost {
            (worst, worst_lost) = (wanted, lost);
        }
        loss = Loss { lost: loss.lost + lost, whole: loss.whole + whole };
    }
    if loss.within(LOST_BY_SCALES.0) {
        return Ok(());
    }
    let mut rounding = Loss::default();
    let pairs = packed.dequantize().into_iter().zip(weights);
    pairs.for_each(|(kept, &w)| rounding.add(w.into(), f64::from(kept) / f64::from(unit)));
    if loss.lost <= LOST_BY_SCALES.1.powi(2) * rounding.lost {
        return Ok(());
    }
    Err(Error::expected(
        "scale of a group of weights to store as f16",
        format!("{worst:e}"),
        format!("{:e} to {}: use scales = \"f32\"", f16::MIN_POSITIVE.to_f32(), f16::MAX),
    ))
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
            minimum: false,
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

    fn normal(rows: usize, columns: usize) -> Array2<f32> {
        crate::linalg::normal_matrix(rows, columns, 3).mapv(|v| v as f32)
    }

    /// Whatever the size of the weights, the same codes; scales that f16 cannot hold are refused.
    #[test]
    fn sizes_do_not_matter() {
        use crate::linalg::relative_error;
        for weight_type in
            [WeightType::Int(4), WeightType::Int(8), WeightType::Nf4, WeightType::MxInt(4), WeightType::Ternary]
        {
            for clipping in [Clipping::Mse, Clipping::Absmax, Clipping::Hqq, Clipping::Percentile(99.0)] {
                for dual in [false, true] {
                    let quantize = |scale: f32, scales: ScaleType| {
                        let format = WeightFormat { weight_type, scales, ..WeightFormat::default() };
                        let w = normal(8, 64) * scale;
                        let of = if dual { PackedMatrix::quantize_dual } else { PackedMatrix::quantize };
                        let packed = of(w.view(), format, clipping, None)?;
                        Ok::<_, Error>(relative_error(packed.dequantize().view(), w.view()))
                    };
                    let plain = quantize(1.0, ScaleType::F32).unwrap();
                    // Scales that are powers of two follow weights that are multiplied with one.
                    let is_power = matches!(weight_type, WeightType::MxInt(_));
                    for scale in [1e-33f32, 1e-30, 1e-20, 1e-9, 1e-6, 1e7, 1e20, 1e36] {
                        let scale = if is_power { scale.log2().round().exp2() } else { scale };
                        let found = quantize(scale, ScaleType::F32).unwrap();
                        assert!(
                            (found / plain - 1.0).abs() < 0.02,
                            "{weight_type} {clipping:?} × {scale}: {found} {plain}"
                        );
                    }
                    if is_power {
                        continue;
                    }
                    let half = quantize(1.0, ScaleType::F16).unwrap();
                    for scale in [1e-30, 1e-9, 1e-7, 1e-5, 1e-4, 1e-2, 1e3, 1e7, 1e20] {
                        match quantize(scale, ScaleType::F16) {
                            Ok(found) => {
                                assert!((found / half - 1.0).abs() < 0.05, "{weight_type} × {scale}: {found} {half}")
                            }
                            Err(e) => {
                                assert!(!(1e-2..1e4).contains(&scale), "{weight_type} × {scale}: {e}");
                                assert!(e.to_string().contains("f16"), "{e}");
                            }
                        }
                    }
                    for scale in [1e-9, 1e7] {
                        assert!(quantize(scale, ScaleType::F16).is_err(), "{weight_type} × {scale}");
                    }
                }
            }
        }
        // A group of hardly anything beside others is no reason.
        let mut w = normal(8, 64);
        w.row_mut(3).mapv_inplace(|v| v * 1e-12);
        let format = WeightFormat { scales: ScaleType::F16, ..WeightFormat::default() };
        assert!(PackedMatrix::quantize(w.view(), format, Clipping::Mse, None).is_ok());
        for (weight_type, scale, good) in [
            (WeightType::F16, 1e-2, true),
            (WeightType::F16, 1e-7, false),
            (WeightType::F16, 1e6, false),
            (WeightType::Bf16, 1e-30, true),
            (WeightType::Bf16, 1e30, true),
        ] {
            let format = WeightFormat { weight_type, ..WeightFormat::default() };
            let done = PackedMatrix::quantize((normal(8, 64) * scale).view(), format, Clipping::Mse, None);
            assert_eq!(done.is_ok(), good, "{weight_type} × {scale}");
        }
        // Ternary weights by their mean, however small or large.
        let format = WeightFormat { weight_type: WeightType::Ternary, group: Group::Tensor, ..WeightFormat::default() };
        let codes = |scale: f32| {
            PackedMatrix::quantize((normal(8, 64) * scale).view(), format, Clipping::Absmean, None)
                .unwrap()
                .packed()
                .clone()
        };
        for scale in [2f32.powi(-60), 2f32.powi(-20), 2f32.powi(34), 2f32.powi(100)] {
            assert_eq!(codes(scale), codes(1.0), "{scale}");
        }
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
