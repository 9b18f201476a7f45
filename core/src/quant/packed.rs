//! A weight matrix as packed codes with their scales.

use bytes::Bytes;
use half::{bf16, f16};
use ndarray::{Array2, ArrayView1, ArrayView2};
use rayon::prelude::*;

use super::dual::column_scales;
use super::format::{Group, ScaleType, WeightFormat, WeightType};
use super::packing::{pack, unpack};
use super::quantizer::{Clipping, Grid, Quantizer};
use super::trits::{from_trits, to_trits};
use crate::error::{Error, Result};

/// No weight may be larger: sums of levels times scales stay finite.
pub const LARGEST: f32 = f32::MAX / 16.0;

/// A weight matrix `[rows, columns]` as packed codes.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedMatrix {
    pub format: WeightFormat,
    pub rows: usize,
    pub columns: usize,
    /// Row after row, each padded to whole bytes; the earlier code in the lower bits.
    pub packed: Bytes,
    /// `[rows, groups]`, empty for floats.
    pub scales: Vec<f32>,
    /// `[rows, groups]`, empty but for asymmetric integers.
    pub zeros: Vec<u8>,
    /// What columns are multiplied with beside, `[columns]`; none where there is nothing to multiply with.
    pub column_scales: Vec<f32>,
}

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
        let grids: Vec<Vec<Grid>> = rows_of
            .map(|(row, codes)| {
                let groups = row.chunks(group).zip(importance.chunks(group)).zip(codes.chunks_mut(group));
                let grid = |((weights, importance), codes): ((&[f32], &[f32]), &mut [u8])| {
                    let grid = shared.unwrap_or_else(|| format.fit(&*quantizer, weights, importance, clipping));
                    quantizer.encode(grid, weights, codes);
                    grid
                };
                groups.map(grid).collect()
            })
            .collect();
        Ok(Self::from_codes(format, (rows, columns), &codes, grids.into_iter().flatten()))
    }

    /// [`PackedMatrix::quantize`] of the quotients by [`column_scales`], which are kept beside (SINQ).
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

    /// The same matrix, its columns multiplied with `scales` `[columns]`.
    ///
    /// # Errors
    /// When there are not as many scales as columns, or one is not finite.
    pub fn with_column_scales(self, scales: Vec<f32>) -> Result<Self> {
        if scales.len() != self.columns {
            return Err(Error::expected("scales of columns", scales.len(), format!("{}, one a column", self.columns)));
        }
        match scales.iter().enumerate().find(|(_, scale)| !scale.is_finite()) {
            Some((index, &value)) => {
                Err(Error::NotFinite { what: "the columns' scales".into(), value: value.into(), index })
            }
            None => Ok(PackedMatrix { column_scales: scales, ..self }),
        }
    }

    /// Codes, a byte each, and the grid of each row's groups.
    pub(super) fn from_codes(
        format: WeightFormat,
        (rows, columns): (usize, usize),
        codes: &[u8],
        grids: impl Iterator<Item = Grid>,
    ) -> Self {
        // From a cache line on: kernels read whole ones.
        let bytes = rows * format.weight_type.row_bytes(columns);
        let mut packed: Vec<u8> = Vec::with_capacity(bytes + 64);
        let start = packed.as_ptr().align_offset(64).min(64);
        packed.resize(start, 0);
        for row in codes.chunks(columns.max(1)) {
            pack(row, format.weight_type.bits(), &mut packed);
        }
        let (scales, mut zeros): (Vec<f32>, Vec<u8>) = grids.map(|grid| (grid.scale, grid.zero)).unzip();
        if !format.has_zeros() {
            zeros.clear();
        }
        PackedMatrix {
            format,
            rows,
            columns,
            packed: Bytes::from(packed).slice(start..),
            scales,
            zeros,
            column_scales: vec![],
        }
    }

    fn floats(weight: ArrayView2<f32>, format: WeightFormat) -> Self {
        let (rows, columns) = weight.dim();
        let half = |w: &f32| match format.weight_type {
            WeightType::Bf16 => bf16::from_f32(*w).to_le_bytes(),
            _ => f16::from_f32(*w).to_le_bytes(),
        };
        let packed: Vec<u8> = weight.iter().flat_map(half).collect();
        PackedMatrix {
            format,
            rows,
            columns,
            packed: packed.into(),
            scales: vec![],
            zeros: vec![],
            column_scales: vec![],
        }
    }

    /// A matrix from its stored fields.
    ///
    /// # Errors
    /// When a length does not follow from the shape and the format, or a scale is not finite.
    pub fn from_fields(
        format: WeightFormat,
        (rows, columns): (usize, usize),
        packed: Bytes,
        scales: &[u8],
        zeros: Vec<u8>,
    ) -> Result<Self> {
        let groups = format.groups(columns)?;
        let zero_points = if format.has_zeros() { rows.saturating_mul(groups) } else { 0 };
        let found = (packed.len(), scales.len(), zeros.len());
        let expected = (
            rows.saturating_mul(format.weight_type.stored_row_bytes(columns)),
            rows.saturating_mul(groups).saturating_mul(format.scale_bytes()),
            zero_points,
        );
        if found != expected {
            return Err(Error::expected(
                format!("bytes of packed weights, scales and zero points of a {rows} × {columns} weight"),
                format!("{found:?}"),
                format!("{expected:?}"),
            ));
        }
        let scales = format.scales_from_bytes(scales);
        if let Some((index, value)) = scales.iter().enumerate().find(|(_, scale)| !scale.is_finite()) {
            return Err(Error::NotFinite { what: "the scales".into(), value: f64::from(*value), index });
        }
        let packed = match format.weight_type {
            WeightType::Ternary => from_trits(&packed, rows, columns)?,
            _ => packed,
        };
        Ok(PackedMatrix { format, rows, columns, packed, scales, zeros, column_scales: vec![] })
    }

    /// Ternary weights `[rows, columns]` that are so already, all with one scale.
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
        if !scale.is_finite() {
            return Err(Error::NotFinite { what: "the scale".into(), value: scale.into(), index: 0 });
        }
        let codes: Vec<u8> = weights.iter().map(|w| (w + 1) as u8).collect();
        let grids = std::iter::repeat_n(Grid { scale, zero: 0 }, if weights.ncols() > 0 { weights.nrows() } else { 0 });
        Ok(Self::from_codes(format, weights.dim(), &codes, grids))
    }

    /// The codes as they are stored: as they are in memory, but five ternary ones to a byte.
    pub fn stored_codes(&self) -> Bytes {
        match self.format.weight_type {
            WeightType::Ternary => to_trits(&self.packed, self.columns).into(),
            _ => self.packed.clone(),
        }
    }

    /// The scales as they are stored.
    pub fn scale_bytes(&self) -> Vec<u8> {
        self.format.scales_to_bytes(&self.scales)
    }

    /// The bytes of one row's codes.
    pub fn row(&self, row: usize) -> &[u8] {
        let bytes = self.format.weight_type.row_bytes(self.columns);
        &self.packed[row * bytes..(row + 1) * bytes]
    }

    /// Writes the weights of one row, as f32, into `out` `[columns]`.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        self.decode(row, out);
        out.iter_mut().zip(&self.column_scales).for_each(|(weight, scale)| *weight *= scale);
    }

    /// [`PackedMatrix::dequantize_row`] before columns are multiplied.
    pub(super) fn decode(&self, row: usize, out: &mut [f32]) {
        let Some(quantizer) = self.format.quantizer() else {
            let numbers = self.row(row).as_chunks::<2>().0.iter();
            return match self.format.weight_type {
                WeightType::Bf16 => {
                    out.iter_mut().zip(numbers).for_each(|(o, b)| *o = bf16::from_le_bytes(*b).to_f32())
                }
                _ => out.iter_mut().zip(numbers).for_each(|(o, b)| *o = f16::from_le_bytes(*b).to_f32()),
            };
        };
        self.decode_row(&*quantizer, row, &mut vec![0; self.columns], out);
    }

    fn decode_row(&self, quantizer: &dyn Quantizer, row: usize, codes: &mut [u8], out: &mut [f32]) {
        unpack(self.row(row), self.format.weight_type.bits(), codes);
        let groups = self.scales.len() / self.rows.max(1);
        let group = self.columns.checked_div(groups).unwrap_or(1).max(1);
        for (g, (codes, out)) in codes.chunks(group).zip(out.chunks_mut(group)).enumerate() {
            let place = row * groups + g;
            let zero = self.zeros.get(place).copied().unwrap_or(0);
            quantizer.decode(Grid { scale: self.scales[place], zero }, codes, out);
        }
    }

    /// The whole matrix as f32: the reference that every kernel is held to.
    pub fn dequantize(&self) -> Array2<f32> {
        let mut out = Array2::zeros((self.rows, self.columns));
        for (i, mut row) in out.rows_mut().into_iter().enumerate() {
            self.dequantize_row(i, row.as_slice_mut().expect("rows of a fresh array are contiguous"));
        }
        out
    }

    /// Bytes of codes, scales and zero points, as stored; two for a column's scale.
    pub fn stored_bytes(&self) -> usize {
        let columns = 2 * self.column_scales.len();
        let codes = self.rows * self.format.weight_type.stored_row_bytes(self.columns);
        codes + self.format.scale_bytes() * self.scales.len() + self.zeros.len() + columns
    }

    /// Bytes that it takes in memory.
    pub fn memory_bytes(&self) -> usize {
        self.packed.len() + 4 * (self.scales.len() + self.column_scales.len()) + self.zeros.len()
    }
}

/// That a weight can be quantised like this.
pub(super) fn check(weight: ArrayView2<f32>, format: WeightFormat, clipping: Clipping) -> Result<()> {
    format.group_size(weight.ncols())?;
    if let Clipping::Percentile(percent) = clipping
        && !(percent > 0.0 && percent <= 100.0)
    {
        return Err(Error::expected("percentile of a weight's clipping", percent, "above 0 and at most 100"));
    }
    if clipping == Clipping::Absmean && format.weight_type != WeightType::Ternary {
        return Err(Error::expected("clipping", format!("\"absmean\" for {}", format.weight_type), "ternary weights"));
    }
    let most = if format.weight_type == WeightType::F16 { f16::MAX.to_f32() } else { LARGEST };
    match weight.iter().enumerate().find(|(_, v)| !v.is_finite()) {
        Some((index, value)) => Err(Error::NotFinite { what: "the weight".into(), value: f64::from(*value), index }),
        None => match weight.iter().find(|v| v.abs() > most) {
            Some(value) => Err(Error::expected(
                format!("weight to store as {}", format.weight_type),
                value,
                format!("at most {most:e} in size"),
            )),
            None => Ok(()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
                let scale = plain.scales[i * groups + j * groups / 12];
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
                let again = PackedMatrix::from_fields(q.format, (rows, 12), q.stored_codes(), &q.scale_bytes(), q.zeros.clone());
                prop_assert_eq!(again.unwrap(), q);
            }
        }

        /// What comes back from its codes is rounded to itself.
        #[test]
        fn levels_stay(format in formats(), values in proptest::collection::vec(-3f32..3f32, 24)) {
            let quantizer = format.quantizer().unwrap();
            let grid = format.fit(&*quantizer, &values, &[1.0; 24], Clipping::Mse);
            let (mut codes, mut levels, mut rounded) = (vec![0; 24], vec![0.0; 24], vec![0.0; 24]);
            quantizer.encode(grid, &values, &mut codes);
            quantizer.decode(grid, &codes, &mut levels);
            quantizer.round(grid, &values, &mut rounded);
            prop_assert_eq!(&levels, &rounded);
            quantizer.round(grid, &levels, &mut rounded);
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
                assert!(quantize(Array2::zeros((0, 4))).unwrap().packed.is_empty());
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
        assert!(q.scales.iter().all(|s| (s - mean).abs() < 1e-6));
        let ternary = w.mapv(|w| (w / mean).round_ties_even().clamp(-1.0, 1.0));
        assert!((q.dequantize() - &ternary * mean).iter().all(|d| d.abs() < 1e-6));
        let again = PackedMatrix::from_ternary(ternary.mapv(|t| t as i8).view(), q.scales[0]).unwrap();
        assert_eq!((&again.packed, &again.scales), (&q.packed, &q.scales));
        assert_eq!(q.stored_codes().len(), 4);
        assert!(PackedMatrix::from_ternary(Array2::from_elem((1, 2), 2).view(), 1.0).is_err());
        let zero = PackedMatrix::quantize(Array2::zeros((2, 5)).view(), format, Clipping::Absmean, None).unwrap();
        assert_eq!((zero.scales[0], zero.dequantize().sum()), (1e-5, 0.0));
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
