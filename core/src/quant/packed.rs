//! A weight matrix as packed codes with their scales.

use std::borrow::Cow;

use bytes::Bytes;
use ndarray::Array2;

use super::format::{WeightFormat, WeightType};
use super::packing::{pack, unpack};
use super::quantizer::{F8_E4M3, F8_E5M2, QuantParams, Quantizer};
use super::scales::GroupValues;
use super::trits::{from_trits, to_trits};
use crate::error::{Error, Result};
use crate::kernels::{GroupNumbers, widen_bytes};
use crate::linalg::require_finite;
use half::{bf16, f16};

/// A weight matrix `[rows, columns]` as packed codes. Its fields have the lengths that follow from its shape and format, which
/// kernels rely on.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedMatrix {
    format: WeightFormat,
    rows: usize,
    columns: usize,
    packed: Bytes,
    scales: GroupValues,
    zeros: Vec<u8>,
    minimums: GroupValues,
    column_scales: Vec<f32>,
    /// Scales of scales as they are stored; else none.
    nested_scales: Bytes,
    /// The column of the weight that each stored column is; none where they are in order.
    order: Vec<u32>,
}

impl PackedMatrix {
    /// Returns the format of the codes.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// Returns the number of rows: the outputs of a layer.
    pub fn nrows(&self) -> usize {
        self.rows
    }

    /// Returns the number of columns: the inputs of a layer.
    pub fn ncols(&self) -> usize {
        self.columns
    }

    /// Returns the codes, row after row, each padded to whole bytes; the earlier code in the lower bits.
    pub fn packed(&self) -> &Bytes {
        &self.packed
    }

    /// Returns the groups' scales `[rows, groups]`, empty for floats.
    pub fn scales(&self) -> Cow<'_, [f32]> {
        self.scales.floats()
    }

    /// Returns the groups' zero points `[rows, groups]`, empty but for asymmetric integers.
    pub fn zeros(&self) -> &[u8] {
        &self.zeros
    }

    /// Returns the groups' minimums `[rows, groups]`, empty where the format has none.
    pub fn minimums(&self) -> Cow<'_, [f32]> {
        self.minimums.floats()
    }

    /// Returns scales and minimums as kernels take them.
    pub(super) fn group_numbers(&self) -> [GroupNumbers<'_>; 2] {
        [self.scales.view(), self.minimums.view()]
    }

    /// Returns which column of the weight each stored column is `[columns]`; none where they are in order.
    pub fn order(&self) -> &[u32] {
        &self.order
    }

    /// Returns the same matrix with its columns in other places: stored column `j` becomes column `order[j]`.
    ///
    /// # Errors
    /// When `order` does not name every column once, or columns have scales of their own.
    pub fn with_order(self, order: Vec<u32>) -> Result<Self> {
        let mut named = vec![false; self.columns];
        order.iter().for_each(|&column| named.get_mut(column as usize).into_iter().for_each(|named| *named = true));
        if order.len() != self.columns || !named.iter().all(|named| *named) {
            let expected = format!("each of {} columns once", self.columns);
            return Err(Error::expected("order of columns", format!("{} places", order.len()), expected));
        }
        if !self.column_scales.is_empty() {
            return Err(Error::expected("order of columns", "scales of columns beside it", "one of the two"));
        }
        let is_order = order.iter().enumerate().all(|(place, &column)| place == column as usize);
        Ok(PackedMatrix { order: if is_order { vec![] } else { order }, ..self })
    }

    /// Returns the scales that columns are multiplied with beside, `[columns]`; none where there are none.
    pub fn column_scales(&self) -> &[f32] {
        &self.column_scales
    }

    /// Returns the same matrix, its columns multiplied with `scales` `[columns]`.
    ///
    /// # Errors
    /// When there are not as many scales as columns, or one is not finite.
    pub fn with_column_scales(self, scales: Vec<f32>) -> Result<Self> {
        if scales.len() != self.columns {
            return Err(Error::expected("scales of columns", scales.len(), format!("{}, one a column", self.columns)));
        }
        require_finite("the columns' scales", scales.iter())?;
        if !self.order.is_empty() {
            return Err(Error::expected("scales of columns", "an order of columns beside them", "one of the two"));
        }
        Ok(PackedMatrix { column_scales: scales, ..self })
    }

    /// Returns the same codes with scales that are multiplied with a power of two.
    pub(super) fn scaled_by(&self, unit: f32) -> Self {
        let scales = self.scales().iter().map(|scale| self.format.stored_scale(scale * unit)).collect();
        PackedMatrix { scales: GroupValues::new(scales, self.format.has_half_scales()), ..self.clone() }
    }

    /// Packs codes, a byte each, with the parameters of each row's groups.
    ///
    /// # Panics
    /// When there are not as many as the shape and the format say.
    pub(super) fn from_codes(
        format: WeightFormat,
        (rows, columns): (usize, usize),
        codes: &[u8],
        group_params: impl Iterator<Item = QuantParams>,
    ) -> Self {
        // From a cache line on: kernels read whole ones.
        let bytes = rows * format.weight_type.row_bytes(columns);
        let mut packed: Vec<u8> = Vec::with_capacity(bytes + 64);
        let start = packed.as_ptr().align_offset(64).min(64);
        packed.resize(start, 0);
        for row in codes.chunks(columns.max(1)) {
            pack(row, format.weight_type.bits(), &mut packed);
        }
        let (scales, mut zeros): (Vec<f32>, Vec<u8>) = group_params.map(|params| (params.scale, params.zero)).unzip();
        if !format.has_zeros() {
            zeros.clear();
        }
        assert_eq!(packed.len() - start, bytes, "codes of {rows} × {columns}");
        assert_eq!(format.groups(columns).map(|groups| rows * groups).ok(), Some(scales.len()), "parameters of groups");
        PackedMatrix {
            format,
            rows,
            columns,
            packed: Bytes::from(packed).slice(start..),
            scales: GroupValues::new(scales, format.has_half_scales()),
            zeros,
            minimums: GroupValues::none(),
            column_scales: vec![],
            nested_scales: Bytes::new(),
            order: vec![],
        }
    }

    /// Wraps numbers that are floats by themselves, little-endian.
    ///
    /// # Panics
    /// When there are not as many as the shape and the format say.
    pub(super) fn from_floats(format: WeightFormat, (rows, columns): (usize, usize), packed: Vec<u8>) -> Self {
        assert!(format.weight_type.is_float(), "{} for floats", format.weight_type);
        assert_eq!(packed.len(), rows * format.weight_type.row_bytes(columns), "numbers of {rows} × {columns}");
        PackedMatrix {
            format,
            rows,
            columns,
            packed: packed.into(),
            scales: GroupValues::none(),
            zeros: vec![],
            minimums: GroupValues::none(),
            column_scales: vec![],
            nested_scales: Bytes::new(),
            order: vec![],
        }
    }

    /// Builds a matrix from its stored fields.
    ///
    /// # Errors
    /// When a length does not follow from the shape and the format, or a scale or minimum is not finite.
    pub fn from_fields(
        format: WeightFormat,
        (rows, columns): (usize, usize),
        packed: Bytes,
        scales: &[u8],
        zeros: Vec<u8>,
    ) -> Result<Self> {
        format.check_fields(columns)?;
        let (row_scales, row_zeros) = format.row_scale_bytes(columns)?;
        let found = (packed.len(), scales.len(), zeros.len());
        let expected = (
            rows.saturating_mul(format.weight_type.stored_row_bytes(columns)),
            rows.saturating_mul(row_scales),
            rows.saturating_mul(row_zeros),
        );
        if found != expected {
            return Err(Error::expected(
                format!("bytes of packed weights, scales and zero points of a {rows} × {columns} weight"),
                format!("{found:?}"),
                format!("{expected:?}"),
            ));
        }
        let packed = match format.weight_type {
            WeightType::Ternary => from_trits(&packed, rows, columns)?,
            _ => packed,
        };
        let mut matrix = PackedMatrix {
            format,
            rows,
            columns,
            packed,
            scales: GroupValues::none(),
            zeros: vec![],
            minimums: GroupValues::none(),
            column_scales: vec![],
            nested_scales: Bytes::new(),
            order: vec![],
        };
        let (mut all_scales, mut minimums) = (vec![], vec![]);
        match format.scales.nested() {
            Some(nested) => {
                let blocks = scales.chunks_exact(nested.bytes);
                blocks.for_each(|block| format.scales.unnest(block, &mut all_scales, &mut minimums));
                matrix.nested_scales = Bytes::copy_from_slice(scales);
            }
            None => {
                all_scales = format.scales_from_bytes(scales);
                match format.minimum {
                    true => minimums = format.scales_from_bytes(&zeros),
                    false => matrix.zeros = zeros,
                }
            }
        }
        require_finite("the scales", all_scales.iter())?;
        require_finite("the minimums", minimums.iter())?;
        matrix.scales = GroupValues::new(all_scales, format.has_half_scales());
        matrix.minimums = GroupValues::new(minimums, format.has_half_scales());
        let table = match format.weight_type {
            WeightType::F8E4M3 => Some(&F8_E4M3),
            WeightType::F8E5M2 => Some(&F8_E5M2),
            _ => None,
        };
        if let Some(table) = table {
            require_finite("the weights", matrix.packed.iter().map(|&code| &table[usize::from(code)]))?;
        }
        Ok(matrix)
    }

    /// Builds a matrix from codes `[rows, columns]`, a byte each, and its other stored fields. For a file of another program, whose
    /// codes lie in another way.
    ///
    /// # Errors
    /// As [`PackedMatrix::from_fields`].
    ///
    /// # Panics
    /// When there are not as many codes as the shape says.
    pub fn from_unpacked(
        format: WeightFormat,
        (rows, columns): (usize, usize),
        codes: &[u8],
        scales: &[u8],
        zeros: Vec<u8>,
    ) -> Result<Self> {
        assert_eq!(codes.len(), rows * columns, "codes of {rows} × {columns}");
        let mut packed: Vec<u8> = Vec::with_capacity(rows * format.weight_type.row_bytes(columns));
        codes.chunks(columns.max(1)).for_each(|row| pack(row, format.weight_type.bits(), &mut packed));
        let packed = match format.weight_type {
            WeightType::Ternary => to_trits(&packed, columns),
            _ => packed,
        };
        Self::from_fields(format, (rows, columns), packed.into(), scales, zeros)
    }

    /// Returns the codes as they are stored: as they are in memory, but five ternary ones to a byte.
    pub fn stored_codes(&self) -> Bytes {
        match self.format.weight_type {
            WeightType::Ternary => to_trits(&self.packed, self.columns).into(),
            _ => self.packed.clone(),
        }
    }

    /// Returns the scales as they are stored.
    pub fn scale_bytes(&self) -> Bytes {
        match self.format.scales.nested() {
            Some(_) => self.nested_scales.clone(),
            None => self.format.scales_to_bytes(&self.scales()).into(),
        }
    }

    /// Returns the zero points, or minimums, as they are stored; none where those are stored with the scales.
    pub fn zero_bytes(&self) -> Bytes {
        match self.format.scales.nested() {
            Some(_) => Bytes::new(),
            None if self.format.minimum => self.format.scales_to_bytes(&self.minimums()).into(),
            None => Bytes::copy_from_slice(&self.zeros),
        }
    }

    /// Returns the packed bytes of one row's codes.
    ///
    /// # Panics
    /// When the row is not there.
    pub fn row_codes(&self, row: usize) -> &[u8] {
        let bytes = self.format.weight_type.row_bytes(self.columns);
        &self.packed[row * bytes..(row + 1) * bytes]
    }

    /// Writes the codes of one row into `out` `[columns]`, a byte each, as they are stored: those of symmetric integers in two's
    /// complement.
    ///
    /// # Panics
    /// When the row is not there, `out` is not as long as a row, or the weights are floats by themselves.
    pub fn codes(&self, row: usize, out: &mut [u8]) {
        assert_eq!(out.len(), self.columns, "codes of a row");
        assert!(!self.format.weight_type.is_float(), "{} has no codes", self.format.weight_type);
        unpack(self.row_codes(row), self.format.weight_type.bits(), out);
    }

    /// Dequantises one row: the embedding of token `index`, where the matrix is a table of them.
    ///
    /// # Errors
    /// When the row is not there, or `out` is not as long as a row.
    pub fn row(&self, index: usize, out: &mut [f32]) -> Result<()> {
        if index >= self.rows {
            return Err(Error::expected("row of a packed matrix", index, format!("less than {}, its rows", self.rows)));
        }
        if out.len() != self.columns {
            return Err(Error::expected("length of a packed matrix's row", out.len(), self.columns));
        }
        self.dequantize_row(index, out);
        Ok(())
    }

    /// Dequantises some rows `[indices.len(), columns]`, one after the other, any of them as often as it is named.
    ///
    /// # Errors
    /// When a row is not there.
    pub fn rows(&self, indices: &[u32]) -> Result<Array2<f32>> {
        let mut out = Array2::zeros((indices.len(), self.columns));
        for (&index, mut row) in indices.iter().zip(out.rows_mut()) {
            self.row(index as usize, row.as_slice_mut().expect("rows of a fresh array are contiguous"))?;
        }
        Ok(out)
    }

    /// Writes the weights of one row, as f32, into `out` `[columns]`.
    ///
    /// # Panics
    /// When the row is not there.
    pub(crate) fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        if !self.order.is_empty() {
            let mut stored = vec![0f32; self.columns];
            self.decode(row, &mut stored);
            self.order.iter().zip(stored).for_each(|(&column, weight)| out[column as usize] = weight);
            return;
        }
        self.decode(row, out);
        out.iter_mut().zip(&self.column_scales).for_each(|(weight, scale)| *weight *= scale);
    }

    /// Writes the weights of one row as its columns are stored, before they are multiplied.
    pub(super) fn decode(&self, row: usize, out: &mut [f32]) {
        match (self.format.quantizer(), self.format.weight_type) {
            (Some(quantizer), _) => self.decode_groups(&*quantizer, row, out),
            (None, WeightType::Bf16) => widen_bytes::<bf16>(self.row_codes(row), out),
            (None, _) => widen_bytes::<f16>(self.row_codes(row), out),
        }
    }

    fn decode_groups(&self, quantizer: &dyn Quantizer, row: usize, out: &mut [f32]) {
        let mut codes = vec![0; self.columns];
        unpack(self.row_codes(row), self.format.weight_type.bits(), &mut codes);
        let groups = self.scales.len() / self.rows.max(1);
        let group = self.columns.checked_div(groups).unwrap_or(1).max(1);
        for (g, (codes, out)) in codes.chunks(group).zip(out.chunks_mut(group)).enumerate() {
            let place = row * groups + g;
            let zero = self.zeros.get(place).copied().unwrap_or(0);
            let scale = self.scales.get(place).unwrap_or_default();
            quantizer.decode(QuantParams { scale, zero }, codes, out);
            if let Some(minimum) = self.minimums.get(place) {
                out.iter_mut().for_each(|weight| *weight += minimum);
            }
        }
    }

    /// Dequantises the whole matrix: the reference that every kernel is held to.
    pub fn dequantize(&self) -> Array2<f32> {
        let mut out = Array2::zeros((self.rows, self.columns));
        for (i, mut row) in out.rows_mut().into_iter().enumerate() {
            self.dequantize_row(i, row.as_slice_mut().expect("rows of a fresh array are contiguous"));
        }
        out
    }

    /// Returns the bytes of codes, scales and zero points, as stored; two for a column's scale.
    pub fn stored_bytes(&self) -> usize {
        let columns = 2 * self.column_scales.len() + 4 * self.order.len();
        let codes = self.rows * self.format.weight_type.stored_row_bytes(self.columns);
        codes + self.scale_bytes().len() + self.zero_bytes().len() + columns
    }

    /// Returns the bytes that it takes in memory.
    pub fn memory_bytes(&self) -> usize {
        let scales = self.scales.bytes() + self.minimums.bytes();
        let columns = 4 * (self.column_scales.len() + self.order.len());
        self.packed.len() + scales + columns + self.zeros.len() + self.nested_scales.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{Clipping, Group, ScaleType};

    /// Rows one by one are those of the whole, to the bit, in every format, with and without scales of columns.
    #[test]
    fn rows_are_those_of_the_whole() {
        let weight = Array2::from_shape_fn((7, 36), |(i, j)| ((i * 37 + j * 11) % 29) as f32 / 7.0 - 2.0);
        let ints = (2..=8).flat_map(|bits| [WeightType::Int(bits), WeightType::MxInt(bits)]);
        let types = ints.chain([WeightType::Nf4, WeightType::Ternary, WeightType::F16, WeightType::Bf16]);
        for (number, weight_type) in types.enumerate() {
            for group in [Group::Size(12), Group::Channel, Group::Tensor] {
                let format = WeightFormat {
                    weight_type,
                    group,
                    symmetric: number % 3 == 0,
                    minimum: false,
                    scales: ScaleType::F32,
                };
                let plain = PackedMatrix::quantize(weight.view(), format, Clipping::Absmax, None).unwrap();
                let scales = (0..36).map(|j| 1.0 + j as f32 / 8.0).collect();
                for matrix in [plain.clone(), plain.with_column_scales(scales).unwrap()] {
                    let all = matrix.dequantize();
                    let some = matrix.rows(&[6, 0, 3, 3]).unwrap();
                    for (row, index) in some.rows().into_iter().zip([6, 0, 3, 3]) {
                        assert_eq!(row, all.row(index), "{weight_type} {group:?}");
                    }
                    let mut row = vec![f32::NAN; 36];
                    matrix.row(5, &mut row).unwrap();
                    assert_eq!(row, all.row(5).to_vec());
                    assert!(matrix.row(7, &mut row).unwrap_err().to_string().contains("found 7"));
                    assert!(matrix.row(0, &mut row[1..]).unwrap_err().to_string().contains("found 35"));
                    assert!(matrix.rows(&[0, 7]).is_err());
                    assert_eq!(matrix.rows(&[]).unwrap().dim(), (0, 36));
                }
            }
        }
    }
}
