//! Integers with a scale (and a zero point) per group of a weight row, symmetric or asymmetric.

use bytes::Bytes;
use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::packing::{pack_nibbles, unpack_nibbles};
use crate::error::{Error, Result};

/// The integer a weight is stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightType {
    Int4,
    Int8,
}

impl WeightType {
    /// Bits per weight, scales and zero points aside.
    pub fn bits(self) -> u32 {
        match self {
            WeightType::Int4 => 4,
            WeightType::Int8 => 8,
        }
    }

    /// Bytes of one packed row of `columns` weights.
    pub fn row_bytes(self, columns: usize) -> usize {
        (columns * self.bits() as usize).div_ceil(8)
    }
}

/// How many consecutive weights of a row share one scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// The whole row: one scale per output channel. Written `"channel"`.
    Channel,
    /// This many weights, which must divide the row. Written as the number.
    Size(usize),
}

impl Serialize for Group {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Group::Channel => serializer.serialize_str("channel"),
            Group::Size(n) => serializer.serialize_u64(*n as u64),
        }
    }
}

impl<'de> Deserialize<'de> for Group {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Group;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a group size of at least 1, or \"channel\" for one scale per output channel")
            }
            fn visit_u64<E: de::Error>(self, n: u64) -> Result<Group, E> {
                match usize::try_from(n) {
                    Ok(n) if n > 0 => Ok(Group::Size(n)),
                    _ => Err(E::invalid_value(de::Unexpected::Unsigned(n), &self)),
                }
            }
            fn visit_i64<E: de::Error>(self, n: i64) -> Result<Group, E> {
                u64::try_from(n)
                    .map_err(|_| E::invalid_value(de::Unexpected::Signed(n), &self))
                    .and_then(|n| self.visit_u64(n))
            }
            fn visit_str<E: de::Error>(self, s: &str) -> Result<Group, E> {
                if s == "channel" { Ok(Group::Channel) } else { Err(E::invalid_value(de::Unexpected::Str(s), &self)) }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// An integer type, how it is grouped, and whether zero keeps a code of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IntegerFormat {
    #[serde(rename = "type")]
    pub weight_type: WeightType,
    #[serde(default = "IntegerFormat::default_group")]
    pub group: Group,
    /// Symmetric: `w ≈ scale · q`, q signed. Asymmetric: `w ≈ scale · (q − zero)`, q unsigned.
    #[serde(default)]
    pub symmetric: bool,
}

impl Default for IntegerFormat {
    fn default() -> Self {
        IntegerFormat { weight_type: WeightType::Int4, group: Self::default_group(), symmetric: false }
    }
}

impl IntegerFormat {
    fn default_group() -> Group {
        Group::Size(64)
    }

    /// Weights per scale in a row of `columns`.
    ///
    /// # Errors
    /// When the group does not divide the row.
    pub fn group_size(&self, columns: usize) -> Result<usize> {
        match self.group {
            Group::Channel => Ok(columns),
            Group::Size(n) if n > 0 && columns.is_multiple_of(n) => Ok(n),
            Group::Size(n) => {
                let valid: Vec<String> =
                    (2..=columns).filter(|d| columns.is_multiple_of(*d)).take(12).map(|d| d.to_string()).collect();
                Err(Error::expected(
                    "weight group",
                    n,
                    format!("a divisor of the row of {columns} weights ({}) or \"channel\"", valid.join(", ")),
                ))
            }
        }
    }

    fn groups(&self, columns: usize) -> Result<usize> {
        Ok(columns.checked_div(self.group_size(columns)?).unwrap_or(0))
    }

    /// Bytes of a `rows × columns` matrix in this format: codes, scales (f32) and zero points (u8).
    ///
    /// # Errors
    /// When the group does not divide the row.
    pub fn stored_bytes(&self, rows: usize, columns: usize) -> Result<usize> {
        let per_group = if self.symmetric { 4 } else { 5 };
        Ok(rows * (self.weight_type.row_bytes(columns) + self.groups(columns)? * per_group))
    }
}

/// A weight matrix `[rows, columns]` as packed integer codes.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedMatrix {
    pub format: IntegerFormat,
    pub rows: usize,
    pub columns: usize,
    /// Row after row, each padded to whole bytes; int4 has two codes a byte, the earlier one low.
    pub packed: Bytes,
    /// `[rows, groups]`.
    pub scales: Vec<f32>,
    /// `[rows, groups]`, empty when symmetric.
    pub zeros: Vec<u8>,
}

impl PackedMatrix {
    /// Quantises to the nearest code.
    ///
    /// Symmetric follows LQER-Qwix: `scale = max|w| / (2^(b−1) − ½)`, ties to even, in its float32 operation order.
    /// Asymmetric spans the group and zero, `scale = (hi − lo) / (2^b − 1)` and `zero = round(−lo / scale)`, then looks
    /// for less squared error: in narrower spans, in the whole zero points beside, and in the best scale for the codes.
    ///
    /// # Errors
    /// When the group does not divide the row, or a weight is not finite.
    pub fn quantize(weight: ArrayView2<f32>, format: IntegerFormat) -> Result<Self> {
        Self::quantize_for(weight, format, None)
    }

    /// [`PackedMatrix::quantize`], where the error in column j counts `importance[j]` times (E\[x_j²\] of the inputs): an
    /// asymmetric group looks for its least weighted error. Symmetric quantisation stays as it is.
    ///
    /// # Errors
    /// As [`PackedMatrix::quantize`], and when `importance` has not one number a column.
    pub fn quantize_for(weight: ArrayView2<f32>, format: IntegerFormat, importance: Option<&[f64]>) -> Result<Self> {
        let (rows, columns) = weight.dim();
        let group = format.group_size(columns)?;
        if let Some((index, value)) = weight.iter().enumerate().find(|(_, v)| !v.is_finite()) {
            return Err(Error::NotFinite { what: "the weight".into(), value: f64::from(*value), index });
        }
        if let Some(importance) = importance
            && importance.len() != columns
        {
            return Err(Error::expected("numbers of importance", importance.len(), format!("{columns}, one a column")));
        }
        let even = vec![1f64; columns];
        let importance = importance.unwrap_or(&even);
        let groups = format.groups(columns)?;
        let mut packed = Vec::with_capacity(rows * format.weight_type.row_bytes(columns));
        let mut scales = Vec::with_capacity(rows * groups);
        let mut zeros = Vec::with_capacity(if format.symmetric { 0 } else { rows * groups });
        let mut codes = vec![0u8; columns];
        for row in weight.rows() {
            let row = row.to_vec();
            let parts = row.chunks(group.max(1)).zip(importance.chunks(group.max(1)));
            for ((weights, importance), codes) in parts.zip(codes.chunks_mut(group.max(1))) {
                if format.symmetric {
                    scales.push(quantize_symmetric(weights, format.weight_type.bits(), codes));
                } else {
                    let (scale, zero) = quantize_asymmetric(weights, importance, format.weight_type.bits(), codes);
                    scales.push(scale);
                    zeros.push(zero);
                }
            }
            match format.weight_type {
                WeightType::Int4 => pack_nibbles(&codes, &mut packed),
                WeightType::Int8 => packed.extend_from_slice(&codes),
            }
        }
        Ok(PackedMatrix { format, rows, columns, packed: packed.into(), scales, zeros })
    }

    /// A matrix from its stored fields.
    ///
    /// # Errors
    /// When a length does not follow from the shape and the format.
    pub fn from_fields(
        format: IntegerFormat,
        (rows, columns): (usize, usize),
        packed: Bytes,
        scales: Vec<f32>,
        zeros: Vec<u8>,
    ) -> Result<Self> {
        let groups = format.groups(columns)?;
        let zero_points = if format.symmetric { 0 } else { rows * groups };
        let found = (packed.len(), scales.len(), zeros.len());
        let expected = (rows * format.weight_type.row_bytes(columns), rows * groups, zero_points);
        if found != expected {
            return Err(Error::expected(
                format!("packed bytes, scales and zero points of a {rows} × {columns} weight"),
                format!("{found:?}"),
                format!("{expected:?}"),
            ));
        }
        Ok(PackedMatrix { format, rows, columns, packed, scales, zeros })
    }

    /// Writes the weights of one row, as f32, into `out` `[columns]`.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        let row_bytes = self.format.weight_type.row_bytes(self.columns);
        let packed = &self.packed[row * row_bytes..(row + 1) * row_bytes];
        let mut codes = vec![0u8; self.columns];
        match self.format.weight_type {
            WeightType::Int4 => unpack_nibbles(packed, &mut codes),
            WeightType::Int8 => codes.copy_from_slice(packed),
        }
        let groups = self.scales.len() / self.rows.max(1);
        let group = self.columns.checked_div(groups).unwrap_or(1).max(1);
        for (g, (codes, out)) in codes.chunks(group).zip(out.chunks_mut(group)).enumerate() {
            let scale = self.scales[row * groups + g];
            if self.format.symmetric {
                let unused = 8 - self.format.weight_type.bits();
                for (o, &c) in out.iter_mut().zip(codes) {
                    *o = f32::from((c << unused) as i8 >> unused) * scale;
                }
            } else {
                let zero = i16::from(self.zeros[row * groups + g]);
                for (o, &c) in out.iter_mut().zip(codes) {
                    *o = f32::from(i16::from(c) - zero) * scale;
                }
            }
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

    /// Bytes of codes, scales and zero points.
    pub fn stored_bytes(&self) -> usize {
        self.packed.len() + 4 * self.scales.len() + self.zeros.len()
    }
}

fn quantize_symmetric(weights: &[f32], bits: u32, codes: &mut [u8]) -> f32 {
    let half = (1i32 << (bits - 1)) as f32;
    let largest = weights.iter().fold(0f32, |m, w| m.max(w.abs()));
    let mut scale = largest * (1.0 / (half - 0.5));
    if scale < f32::MIN_POSITIVE.sqrt() {
        scale = 1.0;
    }
    let reciprocal = 1.0 / scale;
    for (code, w) in codes.iter_mut().zip(weights) {
        *code = (w * reciprocal).round_ties_even().clamp(-half, half - 1.0) as i8 as u8;
    }
    scale
}

fn quantize_asymmetric(weights: &[f32], importance: &[f64], bits: u32, codes: &mut [u8]) -> (f32, u8) {
    let top = f64::from((1u32 << bits) - 1);
    let (lo, hi) = weights.iter().fold((0f64, 0f64), |(lo, hi), &w| (lo.min(w.into()), hi.max(w.into())));
    let plain = (hi - lo) / top;
    if (plain as f32) < f32::MIN_POSITIVE {
        codes.fill(0);
        return (1.0, 0);
    }
    let mut best = Grid { error: f64::INFINITY, scale: plain as f32, zero: 0.0 };
    let mut consider = |scale: f64, zero: f64| {
        let candidate = Grid::fitted(weights, importance, scale as f32, zero.clamp(0.0, top), top);
        if candidate.error < best.error {
            best = candidate;
        }
    };
    // Clipping the ends a little buys finer steps for the rest.
    let ideal = -lo / plain;
    for share in SHARES {
        consider(plain * share, ideal.round_ties_even());
    }
    // A rounded zero point pushes one end off the grid: let the step grow to reach both.
    for zero in [ideal.floor(), ideal.ceil()] {
        if (lo == 0.0 || zero > 0.0) && (hi == 0.0 || zero < top) {
            let below = if zero > 0.0 { -lo / zero } else { 0.0 };
            let above = if zero < top { hi / (top - zero) } else { 0.0 };
            consider(below.max(above), zero);
        }
    }
    // The scale that fits these codes best, then the codes that fit that scale.
    let (mut across, mut square) = (0f64, 0f64);
    for (&w, i) in weights.iter().zip(importance) {
        let level = code_of(w, best.scale, best.zero, top) - best.zero;
        across += i * level * f64::from(w);
        square += i * level * level;
    }
    let fitted = Grid::fitted(weights, importance, (across / square) as f32, best.zero, top);
    // Also false for a NaN, where every code is the zero point.
    if fitted.error < best.error {
        best = fitted;
    }
    for (code, &w) in codes.iter_mut().zip(weights) {
        *code = code_of(w, best.scale, best.zero, top) as u8;
    }
    (best.scale, best.zero as u8)
}

/// Shares of a group's range that its codes may span.
const SHARES: [f64; 6] = [1.0, 0.96, 0.92, 0.88, 0.84, 0.8];

/// A scale and a zero point, and the weighted squared error of rounding to them.
struct Grid {
    error: f64,
    scale: f32,
    zero: f64,
}

impl Grid {
    fn fitted(weights: &[f32], importance: &[f64], scale: f32, zero: f64, top: f64) -> Self {
        let wide = f64::from(scale);
        let error = |(&w, i): (&f32, &f64)| i * ((code_of(w, scale, zero, top) - zero) * wide - f64::from(w)).powi(2);
        Grid { error: weights.iter().zip(importance).map(error).sum(), scale, zero }
    }
}

fn code_of(weight: f32, scale: f32, zero: f64, top: f64) -> f64 {
    ((f64::from(weight) / f64::from(scale)).round_ties_even() + zero).clamp(0.0, top)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn formats() -> impl Strategy<Value = IntegerFormat> {
        (any::<bool>(), any::<bool>(), prop_oneof![Just(Group::Channel), Just(Group::Size(4)), Just(Group::Size(6))])
            .prop_map(|(int4, symmetric, group)| IntegerFormat {
                weight_type: if int4 { WeightType::Int4 } else { WeightType::Int8 },
                group,
                symmetric,
            })
    }

    proptest! {
        /// No weight is further off than its format's steps allow.
        #[test]
        fn within_its_steps(format in formats(), rows in 1usize..4, values in proptest::collection::vec(-3f32..3f32, 36)) {
            let w = Array2::from_shape_fn((rows, 12), |(i, j)| values[(i * 12 + j) % values.len()]);
            let q = PackedMatrix::quantize(w.view(), format).unwrap();
            prop_assert_eq!(q.stored_bytes(), format.stored_bytes(rows, 12).unwrap());
            let back = q.dequantize();
            let group = format.group_size(12).unwrap();
            for ((i, j), &v) in w.indexed_iter() {
                let step = q.scales[i * (12 / group) + j / group];
                // Symmetric codes saturate half a step short of the largest weight; asymmetric ones may clip for less
                // error in all, but never as much as rounding the whole group to the plain grid could cost.
                if format.symmetric {
                    prop_assert!((back[[i, j]] - v).abs() <= step * 1.001, "{} -> {} step {}", v, back[[i, j]], step);
                }
            }
            if !format.symmetric {
                let top = f32::from(u8::MAX >> (8 - format.weight_type.bits()));
                for (i, row) in w.rows().into_iter().enumerate() {
                    for (g, part) in row.to_vec().chunks(group).enumerate() {
                        let (lo, hi) = part.iter().fold((0f32, 0f32), |(lo, hi), v| (lo.min(*v), hi.max(*v)));
                        let plain = (hi - lo) / top;
                        let error: f32 = part.iter().enumerate().map(|(j, v)| (back[[i, g * group + j]] - v).powi(2)).sum();
                        prop_assert!(error <= part.len() as f32 * plain * plain * 1.001, "{} over {:?}", error, part);
                    }
                }
            }
            let again = PackedMatrix::from_fields(q.format, (rows, 12), q.packed.clone(), q.scales.clone(), q.zeros.clone()).unwrap();
            prop_assert_eq!(again, q);
        }
    }

    #[test]
    fn zeros_and_extremes() {
        for symmetric in [true, false] {
            let format = IntegerFormat { symmetric, group: Group::Channel, ..IntegerFormat::default() };
            let zero = PackedMatrix::quantize(Array2::zeros((2, 5)).view(), format).unwrap();
            assert_eq!(zero.dequantize(), Array2::<f32>::zeros((2, 5)));
            let huge = PackedMatrix::quantize(Array2::from_elem((1, 3), f32::MAX).view(), format).unwrap();
            assert!(huge.dequantize().iter().all(|v| v.is_finite()));
            let nan = Array2::from_elem((1, 3), f32::NAN);
            assert!(PackedMatrix::quantize(nan.view(), format).is_err());
        }
    }

    #[test]
    fn a_group_that_does_not_divide_is_refused_with_those_that_do() {
        let format = IntegerFormat { group: Group::Size(64), ..IntegerFormat::default() };
        let message = format.group_size(96).unwrap_err().to_string();
        assert!(message.contains("found 64") && message.contains("48") && message.contains("channel"), "{message}");
    }

    #[test]
    fn group_reads_both_forms() {
        let f: IntegerFormat = serde_json::from_str(r#"{"type":"int4","group":"channel"}"#).unwrap();
        assert_eq!(f.group, Group::Channel);
        for bad in ["0", "-3", "\"row\"", "1.5"] {
            assert!(serde_json::from_str::<IntegerFormat>(&format!(r#"{{"type":"int4","group":{bad}}}"#)).is_err());
        }
    }
}
