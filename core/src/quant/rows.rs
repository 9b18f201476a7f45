//! A matrix whose rows are used one by one: keys and values in f32, f16, int8 with a scale per row, or product codes.

use half::f16;
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::product::ProductQuantizer;
use super::row_format::{RowFormat, RowType};
use super::row_sums::{by_columns, in_columns};
use crate::error::{Error, Result};
use crate::kernels::{SparseRow, accumulate, dots, widen};
use crate::linalg::{matmul, matmul_nt};

/// Queries below this many go row by row; from it on a block of rows is widened once for all of them.
const PRODUCT_FROM: usize = 4;

/// Rows widened at a time, by each thread: a few hundred KiB of most layers.
const BLOCK_ROWS: usize = 64;

/// From this batch on, threads share one product better than they do blocks of rows.
const WHOLE_FROM: usize = 256;

/// A matrix `[rows, columns]` in one of the [`RowFormat`]s.
#[derive(Debug, Clone, PartialEq)]
pub struct RowMatrix {
    columns: usize,
    data: Data,
}

#[derive(Debug, Clone, PartialEq)]
enum Data {
    F32(Array2<f32>),
    F16(Vec<f16>),
    /// Numbers, and the scale of each row.
    Int8(Vec<i8>, Vec<f32>),
    /// Codes `[rows, subvectors]`, all of which have a codeword.
    Product(ProductQuantizer, Array2<u8>),
}

impl RowMatrix {
    /// Keeps `matrix` in this format; `weights` `[rows]` say how much each row's error counts where codewords are learned.
    ///
    /// # Errors
    /// As [`RowMatrix::new`] and [`ProductQuantizer::train`].
    pub fn in_format(matrix: Array2<f32>, format: RowFormat, weights: &[f32]) -> Result<Self> {
        match format {
            RowFormat::Plain(kind) => Self::new(matrix, kind),
            RowFormat::Product(format) => {
                let quantizer = ProductQuantizer::train(matrix.view(), weights, format)?;
                let codes = quantizer.encode(matrix.view());
                Ok(RowMatrix { columns: matrix.ncols(), data: Data::Product(quantizer, codes) })
            }
        }
    }

    /// Builds a matrix from what [`RowMatrix::quantizer`] and [`RowMatrix::bytes`] gave.
    ///
    /// # Errors
    /// When the codes are not the quantiser's.
    pub fn from_codes(quantizer: ProductQuantizer, codes: Array2<u8>) -> Result<Self> {
        quantizer.check(codes.view())?;
        Ok(RowMatrix { columns: quantizer.width(), data: Data::Product(quantizer, codes) })
    }

    /// Keeps `matrix` as it is, or rounded to the nearest.
    ///
    /// # Errors
    /// When a number is beyond what f16 can hold.
    pub fn new(matrix: Array2<f32>, kind: RowType) -> Result<Self> {
        let matrix = if matrix.is_standard_layout() { matrix } else { matrix.as_standard_layout().to_owned() };
        let columns = matrix.ncols();
        let data = match kind {
            RowType::F32 => Data::F32(matrix),
            RowType::F16 => {
                if let Some((index, value)) = matrix.iter().enumerate().find(|(_, v)| v.abs() > f16::MAX.to_f32()) {
                    return Err(Error::expected(
                        format!("number {index} of a matrix to keep as f16"),
                        value,
                        format!("at most {} in size: use int8 or f32", f16::MAX),
                    ));
                }
                Data::F16(matrix.iter().map(|&v| f16::from_f32(v)).collect())
            }
            RowType::Int8 => {
                let mut numbers = Vec::with_capacity(matrix.len());
                let mut scales = Vec::with_capacity(matrix.nrows());
                for row in matrix.rows() {
                    let largest = row.iter().fold(0f32, |m, v| m.max(v.abs()));
                    // Numbers near the lower end of f32 are nothing: the reciprocal of their scale is beyond the upper one.
                    let scale = if largest < 127.0 * f32::MIN_POSITIVE { 0.0 } else { largest / 127.0 };
                    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                    numbers.extend(row.iter().map(|v| (v * inverse).round().clamp(-127.0, 127.0) as i8));
                    scales.push(scale);
                }
                Data::Int8(numbers, scales)
            }
        };
        Ok(RowMatrix { columns, data })
    }

    /// Builds a matrix from what [`RowMatrix::bytes`] and [`RowMatrix::scales`] gave.
    ///
    /// # Errors
    /// When the lengths do not fit.
    pub fn from_bytes(kind: RowType, (rows, columns): (usize, usize), bytes: &[u8], scales: &[f32]) -> Result<Self> {
        let expected = rows.checked_mul(columns).and_then(|n| n.checked_mul(kind.bytes()));
        let scaled = if kind == RowType::Int8 { rows } else { 0 };
        if expected != Some(bytes.len()) || scales.len() != scaled {
            return Err(Error::expected(
                format!("stored rows of {rows} × {columns}"),
                format!("{} bytes and {} scales", bytes.len(), scales.len()),
                format!("{} bytes and {scaled} scales", expected.unwrap_or(usize::MAX)),
            ));
        }
        let data = match kind {
            RowType::F32 => {
                let values = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                Data::F32(Array2::from_shape_vec((rows, columns), values).map_err(|e| Error::Numeric(e.to_string()))?)
            }
            RowType::F16 => Data::F16(bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b)).collect()),
            RowType::Int8 => Data::Int8(bytes.iter().map(|&b| b as i8).collect(), scales.to_vec()),
        };
        Ok(RowMatrix { columns, data })
    }

    /// Returns the quantiser of product codes.
    pub fn quantizer(&self) -> Option<&ProductQuantizer> {
        match &self.data {
            Data::Product(quantizer, _) => Some(quantizer),
            _ => None,
        }
    }

    /// Returns the number of rows.
    pub fn rows(&self) -> usize {
        match &self.data {
            Data::F32(m) => m.nrows(),
            Data::F16(v) => v.len().checked_div(self.columns).unwrap_or(0),
            Data::Int8(_, scales) => scales.len(),
            Data::Product(_, codes) => codes.nrows(),
        }
    }

    /// Returns the number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Returns the floats themselves, where they are kept as such.
    pub fn floats(&self) -> Option<ArrayView2<'_, f32>> {
        match &self.data {
            Data::F32(m) => Some(m.view()),
            _ => None,
        }
    }

    /// Returns each row's scale; none unless int8.
    pub fn scales(&self) -> &[f32] {
        match &self.data {
            Data::Int8(_, scales) => scales,
            _ => &[],
        }
    }

    /// Returns the rows' numbers, little-endian, `[rows, columns · bytes of a number]`; or their codes, `[rows, subvectors]`.
    pub fn bytes(&self) -> Array2<u8> {
        let (all, kind): (Vec<u8>, RowType) = match &self.data {
            Data::F32(m) => (m.iter().flat_map(|v| v.to_le_bytes()).collect(), RowType::F32),
            Data::F16(v) => (v.iter().flat_map(|v| v.to_le_bytes()).collect(), RowType::F16),
            Data::Int8(v, _) => (v.iter().map(|&v| v as u8).collect(), RowType::Int8),
            Data::Product(_, codes) => return codes.clone(),
        };
        Array2::from_shape_vec((self.rows(), self.columns * kind.bytes()), all).expect("one row after another")
    }

    /// Returns all rows as floats.
    pub fn to_f32(&self) -> Array2<f32> {
        self.block(0, self.rows())
    }

    fn block(&self, start: usize, end: usize) -> Array2<f32> {
        let range = start * self.columns..end * self.columns;
        let shape = (end - start, self.columns);
        match &self.data {
            Data::F32(m) => m.slice(s![start..end, ..]).to_owned(),
            Data::F16(v) => {
                let mut block = Array2::zeros(shape);
                widen(&v[range], block.as_slice_mut().expect("fresh"));
                block
            }
            Data::Int8(v, scales) => {
                let mut block = Array2::zeros(shape);
                widen(&v[range], block.as_slice_mut().expect("fresh"));
                block.rows_mut().into_iter().zip(&scales[start..end]).for_each(|(mut row, &scale)| row *= scale);
                block
            }
            Data::Product(quantizer, codes) => quantizer.decode(codes.slice(s![start..end, ..])),
        }
    }

    /// Returns `queries · Mᵀ` `[batch, rows]` for queries `[batch, columns]`.
    ///
    /// # Panics
    /// When the queries' width is another.
    pub fn products(&self, queries: ArrayView2<f32>) -> Array2<f32> {
        assert_eq!(queries.ncols(), self.columns, "width of the queries");
        let rows = self.rows();
        if queries.nrows() >= PRODUCT_FROM {
            if let Data::F32(m) = &self.data
                && queries.nrows() >= WHOLE_FROM
            {
                return matmul_nt(queries, m.view());
            }
            let starts: Vec<usize> = (0..rows).step_by(BLOCK_ROWS).collect();
            let widened = |&start: &usize| {
                let end = (start + BLOCK_ROWS).min(rows);
                match &self.data {
                    Data::F32(m) => matmul_nt(queries, m.slice(s![start..end, ..])),
                    _ => matmul_nt(queries, self.block(start, end).view()),
                }
            };
            let parts: Vec<Array2<f32>> = starts.par_iter().map(widened).collect();
            let mut out = Array2::zeros((queries.nrows(), rows));
            for (start, part) in starts.into_iter().zip(parts) {
                out.slice_mut(s![.., start..start + part.ncols()]).assign(&part);
            }
            return out;
        }
        let mut out = Array2::zeros((queries.nrows(), rows));
        for (query, mut out) in queries.axis_iter(Axis(0)).zip(out.rows_mut()) {
            let query = query.as_standard_layout();
            let (query, out) = (query.as_slice().expect("contiguous"), out.as_slice_mut().expect("contiguous"));
            match &self.data {
                Data::F32(m) => dots(m.as_slice().expect("standard layout"), query, out),
                Data::F16(v) => dots(v, query, out),
                Data::Int8(v, scales) => {
                    dots(v, query, out);
                    out.iter_mut().zip(scales).for_each(|(o, scale)| *o *= scale);
                }
                Data::Product(quantizer, codes) => {
                    let table = quantizer.table(query);
                    codes.rows().into_iter().zip(out).for_each(|(codes, out)| *out = quantizer.score(&table, codes));
                }
            }
        }
        out
    }

    /// Returns inner products of some rows with a query `[columns]`.
    ///
    /// # Panics
    /// When a row is not there, or the query's length is another.
    pub fn products_of(&self, query: ArrayView1<f32>, rows: &[u32]) -> Vec<f32> {
        assert_eq!(query.len(), self.columns, "length of the query");
        let query = query.as_standard_layout();
        let query = query.as_slice().expect("contiguous");
        let mut out = vec![0f32; rows.len()];
        let range = |row: u32| row as usize * self.columns..(row as usize + 1) * self.columns;
        match &self.data {
            Data::F32(m) => {
                let all = m.as_slice().expect("standard layout");
                rows.iter().zip(out.chunks_mut(1)).for_each(|(&row, out)| dots(&all[range(row)], query, out));
            }
            Data::F16(v) => rows.iter().zip(out.chunks_mut(1)).for_each(|(&row, out)| dots(&v[range(row)], query, out)),
            Data::Int8(v, scales) => {
                for (&row, out) in rows.iter().zip(out.chunks_mut(1)) {
                    dots(&v[range(row)], query, out);
                    out[0] *= scales[row as usize];
                }
            }
            Data::Product(quantizer, codes) => {
                let table = quantizer.table(query);
                rows.iter()
                    .zip(&mut out)
                    .for_each(|(&row, out)| *out = quantizer.score(&table, codes.row(row as usize)));
            }
        }
        out
    }

    /// Returns `weights · M` `[batch, columns]` for weights `[batch, rows]`.
    ///
    /// # Panics
    /// When there are not as many weights as rows.
    pub fn weighted(&self, weights: ArrayView2<f32>) -> Array2<f32> {
        if let Data::F32(m) = &self.data {
            return matmul(weights, m.view());
        }
        let rows = self.rows();
        assert_eq!(weights.ncols(), rows, "number of weights");
        let mut out = Array2::zeros((weights.nrows(), self.columns));
        for start in (0..rows).step_by(BLOCK_ROWS) {
            let end = (start + BLOCK_ROWS).min(rows);
            out += &matmul(weights.slice(s![.., start..end]), self.block(start, end).view());
        }
        out
    }

    /// Computes `y += Σ weight · row`, over pairs of a row's number and its weight.
    ///
    /// # Panics
    /// When a row is not there, or `y` has another length.
    pub fn accumulate(&self, sparse: &SparseRow, y: &mut [f32]) {
        assert_eq!(y.len(), self.columns, "length of a sum of rows");
        let (width, start) = (self.columns, 0);
        match &self.data {
            Data::F32(m) => accumulate(m.as_slice().expect("standard layout"), width, start, sparse, y),
            Data::F16(v) => accumulate(v, width, start, sparse, y),
            Data::Int8(v, _) => accumulate(v, width, start, &self.scaled(sparse), y),
            Data::Product(quantizer, codes) => {
                sparse.iter().for_each(|&(row, weight)| quantizer.add_row(codes.row(row as usize), weight, y));
            }
        }
    }

    /// Does [`RowMatrix::accumulate`] for each row of `y` `[sparse.len(), columns]`, on all threads: some columns of all rows at a
    /// time, so that what the rows share comes from a near cache.
    ///
    /// # Panics
    /// When a row is not there, or `y` has another shape.
    pub fn accumulate_batch(&self, sparse: &[Vec<(u32, f32)>], mut y: ArrayViewMut2<f32>) {
        assert_eq!(y.dim(), (sparse.len(), self.columns), "shape of sums of rows");
        match &self.data {
            Data::F32(m) => by_columns(m.as_slice().expect("standard layout"), sparse, y),
            Data::F16(v) => by_columns(v, sparse, y),
            Data::Int8(v, _) => {
                let scaled: Vec<Vec<(u32, f32)>> = sparse.iter().map(|sparse| self.scaled(sparse)).collect();
                by_columns(v, &scaled, y);
            }
            Data::Product(..) => {
                let rows: Vec<_> = y.rows_mut().into_iter().zip(sparse).collect();
                rows.into_par_iter().for_each(|(mut y, sparse)| {
                    let mut sum = y.to_vec();
                    self.accumulate(sparse, &mut sum);
                    y.assign(&ArrayView1::from(&sum));
                });
            }
        }
    }

    /// Does [`RowMatrix::accumulate_batch`] on this thread.
    ///
    /// # Panics
    /// As it, and when rows are product codes.
    pub fn accumulate_on_this_thread(&self, sparse: &[Vec<(u32, f32)>], mut y: ArrayViewMut2<f32>) {
        assert_eq!(y.dim(), (sparse.len(), self.columns), "shape of sums of rows");
        let width = self.columns;
        match &self.data {
            Data::F32(m) => in_columns(m.as_slice().expect("standard layout"), width, 0, sparse, &mut y),
            Data::F16(v) => in_columns(v, width, 0, sparse, &mut y),
            Data::Int8(v, _) => {
                let scaled: Vec<Vec<(u32, f32)>> = sparse.iter().map(|sparse| self.scaled(sparse)).collect();
                in_columns(v, width, 0, &scaled, &mut y);
            }
            Data::Product(..) => panic!("product codes are not summed on one thread"),
        }
    }

    /// Weights times the scales of their rows, for int8.
    fn scaled(&self, sparse: &SparseRow) -> Vec<(u32, f32)> {
        match &self.data {
            Data::Int8(_, scales) => sparse.iter().map(|&(row, w)| (row, w * scales[row as usize])).collect(),
            _ => sparse.to_vec(),
        }
    }

    /// Returns the memory that numbers, scales, codes and codewords take.
    pub fn memory_bytes(&self) -> usize {
        match &self.data {
            Data::F32(m) => 4 * m.len(),
            Data::F16(v) => 2 * v.len(),
            Data::Int8(v, scales) => v.len() + 4 * scales.len(),
            Data::Product(quantizer, codes) => codes.len() + quantizer.memory_bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::ProductFormat;
    use proptest::prelude::*;

    const KINDS: [RowType; 3] = [RowType::F32, RowType::F16, RowType::Int8];

    fn sample(rows: usize, columns: usize, seed: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, columns), |(i, j)| ((i * 7919 + j * 104_729 + seed) % 1009) as f32 / 250.0 - 2.0)
    }

    proptest! {
        #[test]
        fn near_what_was_given(rows in 0usize..9, columns in 1usize..40, seed in 0usize..999) {
            let matrix = sample(rows, columns, seed);
            for (kind, step) in KINDS.into_iter().zip([0.0, 2.0 / 1024.0, 2.04 / 127.0 / 2.0]) {
                let kept = RowMatrix::new(matrix.clone(), kind).unwrap();
                prop_assert_eq!((kept.rows(), kept.columns()), (rows, columns));
                prop_assert!((&kept.to_f32() - &matrix).iter().all(|d| d.abs() <= step));
                let back = RowMatrix::from_bytes(kind, (rows, columns), kept.bytes().as_slice().unwrap(), kept.scales());
                prop_assert_eq!(back.unwrap(), kept);
            }
        }

        /// One by one, in blocks, and by the definition.
        #[test]
        fn products_and_sums_are_those_of_the_floats(rows in 1usize..150, columns in 1usize..40, seed in 0usize..999) {
            let product = ProductFormat { subvectors: 3, codewords: 16, seed: 1 }.fitted(rows, columns);
            let formats = KINDS.into_iter().map(RowFormat::Plain).chain([RowFormat::Product(product)]);
            for format in formats {
                let kept = RowMatrix::in_format(sample(rows, columns, seed), format, &vec![1.0; rows]).unwrap();
                let floats = kept.to_f32();
                for batch in [1, 3, 6] {
                    let queries = sample(batch, columns, seed + 1);
                    let difference = kept.products(queries.view()) - queries.dot(&floats.t());
                    prop_assert!(difference.iter().all(|d| d.abs() < 1e-3));
                }
                let sparse: Vec<(u32, f32)> = (0..rows as u32).step_by(3).map(|i| (i, i as f32 / 50.0 - 1.0)).collect();
                let mut y = vec![0.5; columns];
                kept.accumulate(&sparse, &mut y);
                for (j, y) in y.iter().enumerate() {
                    let expected: f32 = 0.5 + sparse.iter().map(|&(i, w)| w * floats[[i as usize, j]]).sum::<f32>();
                    prop_assert!((y - expected).abs() < 1e-3);
                }
                let weights = sample(3, rows, seed + 2);
                let difference = kept.weighted(weights.view()) - weights.dot(&floats);
                prop_assert!(difference.iter().all(|d| d.abs() < 2e-3));
            }
        }
    }

    /// Several blocks of columns, the last of them narrow.
    #[test]
    fn a_batch_sums_as_its_rows_do() {
        let matrix = sample(3000, 203, 1);
        let product = RowFormat::Product(ProductFormat { subvectors: 7, codewords: 5, seed: 0 });
        let plain = [RowType::F32, RowType::F16, RowType::Int8].map(RowFormat::Plain);
        for format in plain.into_iter().chain([product]) {
            let kept = RowMatrix::in_format(matrix.clone(), format, &[1.0; 3000]).unwrap();
            let sparse: Vec<Vec<(u32, f32)>> = (0..9)
                .map(|q| (0..q * 5).map(|i| ((i * 397 + q) as u32 % 3000, i as f32 * 0.1 - 1.0)).collect())
                .collect();
            let mut together = sample(9, 203, 2);
            let mut alone = together.clone();
            kept.accumulate_batch(&sparse, together.view_mut());
            for (mut y, sparse) in alone.rows_mut().into_iter().zip(&sparse) {
                kept.accumulate(sparse, y.as_slice_mut().unwrap());
            }
            assert!((&together - &alone).iter().all(|d| d.abs() < 1e-4), "{format:?}");
            if !matches!(format, RowFormat::Product(_)) {
                let mut here = sample(9, 203, 2);
                kept.accumulate_on_this_thread(&sparse, here.view_mut());
                assert!((here - &alone).iter().all(|d| d.abs() < 1e-4), "{format:?}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let large = Array2::from_elem((1, 2), 1e6);
        assert!(RowMatrix::new(large.clone(), RowType::F16).unwrap_err().to_string().contains("65504"));
        assert!(RowMatrix::new(large, RowType::Int8).is_ok());
        assert!(RowMatrix::from_bytes(RowType::Int8, (2, 3), &[0; 6], &[1.0]).is_err());
        assert!(RowMatrix::from_bytes(RowType::F16, (2, 3), &[0; 6], &[]).is_err());
        assert!(RowMatrix::from_bytes(RowType::F32, (usize::MAX, 3), &[0; 6], &[]).is_err());
    }
}
