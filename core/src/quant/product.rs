//! Product quantisation: a vector is cut into equal pieces, and each piece is the nearest of a few codewords.
//!
//! After Jégou, Douze and Schmid, as in NanoPQ and FAISS. Codewords are learned by k-means, started by k-means++ from a
//! seed, so the same rows give the same codes.

use ndarray::{Array2, ArrayView1, ArrayView2, s};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::kmeans::{kmeans, nearest};
use crate::error::{Error, Result};
use crate::linalg::require_finite;

/// Codewords that one byte can tell apart.
pub const MAX_CODEWORDS: usize = 256;

/// How rows are product-quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProductFormat {
    /// Pieces that a row is cut into; each is one byte.
    #[serde(default = "default_subvectors")]
    pub subvectors: usize,
    /// Codewords a piece chooses from, at most 256.
    #[serde(default = "default_codewords")]
    pub codewords: usize,
    /// Where k-means starts.
    #[serde(default)]
    pub seed: u64,
}

fn default_subvectors() -> usize {
    8
}

fn default_codewords() -> usize {
    MAX_CODEWORDS
}

impl Default for ProductFormat {
    fn default() -> Self {
        ProductFormat { subvectors: default_subvectors(), codewords: default_codewords(), seed: 0 }
    }
}

impl ProductFormat {
    /// Checks the numbers by themselves.
    ///
    /// # Errors
    /// When one is 0, or there are more codewords than a byte can tell apart.
    pub fn validate(&self) -> Result<()> {
        if self.subvectors == 0 {
            return Err(Error::expected("subvectors", 0, "at least 1"));
        }
        if self.codewords == 0 || self.codewords > MAX_CODEWORDS {
            return Err(Error::expected("codewords", self.codewords, format!("1 to {MAX_CODEWORDS}")));
        }
        Ok(())
    }

    /// Returns the nearest format that fits `rows` rows of `width` numbers: the divisor of the width that is nearest to
    /// `subvectors`, the larger of two; and no more codewords than rows.
    pub fn fitted(&self, rows: usize, width: usize) -> ProductFormat {
        let nearest = divisors(width).min_by_key(|d| (d.abs_diff(self.subvectors), usize::MAX - d));
        ProductFormat { subvectors: nearest.unwrap_or(1), codewords: self.codewords.min(rows.max(1)), seed: self.seed }
    }

    /// Checks that the format fits as it is.
    ///
    /// # Errors
    /// When the width is no multiple of `subvectors`, or there are fewer rows than codewords: with what would fit.
    pub fn check(&self, rows: usize, width: usize) -> Result<()> {
        if !width.is_multiple_of(self.subvectors) {
            let choices: Vec<String> = divisors(width).map(|d| d.to_string()).collect();
            return Err(Error::expected(
                "subvectors",
                self.subvectors,
                format!("a divisor of the width {width}: {}", choices.join(", ")),
            ));
        }
        if self.codewords > rows {
            return Err(Error::expected("codewords", self.codewords, format!("at most {rows}, the rows there are")));
        }
        Ok(())
    }
}

fn divisors(n: usize) -> impl Iterator<Item = usize> {
    (1..=n).filter(move |d| n.is_multiple_of(*d))
}

/// The codewords of each piece.
#[derive(Debug, Clone, PartialEq)]
pub struct ProductQuantizer {
    /// Returns the codewords by piece, `[codewords, width of a piece]`.
    codebooks: Vec<Array2<f32>>,
}

impl ProductQuantizer {
    /// Learns codewords for `rows` `[rows, width]`; `weights` `[rows]` say how much each row's error counts.
    ///
    /// # Errors
    /// When the format does not fit, or a number is not finite.
    pub fn train(rows: ArrayView2<f32>, weights: &[f32], format: ProductFormat) -> Result<Self> {
        format.validate()?;
        format.check(rows.nrows(), rows.ncols())?;
        if weights.len() != rows.nrows() {
            return Err(Error::expected("weights of the rows to quantise", weights.len(), rows.nrows()));
        }
        require_finite("the rows to quantise", rows.iter())?;
        let width = rows.ncols() / format.subvectors;
        let codebooks = (0..format.subvectors)
            .into_par_iter()
            .map(|piece| {
                let part = rows.slice(s![.., piece * width..(piece + 1) * width]);
                let seed = format.seed ^ (piece as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                kmeans(part.as_standard_layout().view(), weights, format.codewords, seed)
            })
            .collect();
        Ok(ProductQuantizer { codebooks })
    }

    /// Wraps codebooks `[codewords, width]`, one a piece.
    ///
    /// # Errors
    /// When there are none, they are of different shapes, or of more codewords than a byte can tell apart.
    pub fn from_codebooks(codebooks: Vec<Array2<f32>>) -> Result<Self> {
        let shape = codebooks.first().map_or((0, 0), Array2::dim);
        if shape.0 == 0 || shape.0 > MAX_CODEWORDS || codebooks.iter().any(|c| c.dim() != shape) {
            let found: Vec<_> = codebooks.iter().map(Array2::dim).collect();
            return Err(Error::expected(
                "codebooks",
                format!("shapes {found:?}"),
                format!("at least one, all of one shape, of 1 to {MAX_CODEWORDS} codewords"),
            ));
        }
        let codebooks = codebooks.into_iter().map(|c| c.as_standard_layout().to_owned()).collect();
        Ok(ProductQuantizer { codebooks })
    }

    /// Returns the codewords by piece, `[codewords, width of a piece]`.
    pub fn codebooks(&self) -> &[Array2<f32>] {
        &self.codebooks
    }

    /// Returns the number of codewords of each piece.
    pub fn codewords(&self) -> usize {
        self.codebooks[0].nrows()
    }

    /// Returns the length of a piece.
    pub fn piece(&self) -> usize {
        self.codebooks[0].ncols()
    }

    /// Returns the length of a whole row.
    pub fn width(&self) -> usize {
        self.codebooks.len() * self.codebooks[0].ncols()
    }

    /// Returns the nearest codewords of rows `[rows, width]`: `[rows, subvectors]`.
    ///
    /// # Panics
    /// When the width is another.
    pub fn encode(&self, rows: ArrayView2<f32>) -> Array2<u8> {
        assert_eq!(rows.ncols(), self.width(), "width of the rows to encode");
        let width = self.codebooks[0].ncols();
        Array2::from_shape_fn((rows.nrows(), self.codebooks.len()), |(row, piece)| {
            let part = rows.slice(s![row, piece * width..(piece + 1) * width]);
            let part = part.as_standard_layout();
            nearest(&self.codebooks[piece], part.as_slice().expect("standard layout")).0 as u8
        })
    }

    /// Returns the rows that codes `[rows, subvectors]` stand for.
    ///
    /// # Panics
    /// When a code has no codeword: [`ProductQuantizer::check`] refuses those.
    pub fn decode(&self, codes: ArrayView2<u8>) -> Array2<f32> {
        let width = self.codebooks[0].ncols();
        Array2::from_shape_fn((codes.nrows(), self.width()), |(row, j)| {
            self.codebooks[j / width][[usize::from(codes[[row, j / width]]), j % width]]
        })
    }

    /// Checks that codes `[rows, subvectors]` are of this quantiser.
    ///
    /// # Errors
    /// When there is another number of pieces, or a code has no codeword.
    pub fn check(&self, codes: ArrayView2<u8>) -> Result<()> {
        if codes.ncols() != self.codebooks.len() {
            return Err(Error::expected("codes of a row", codes.ncols(), self.codebooks.len()));
        }
        match codes.iter().find(|&&code| usize::from(code) >= self.codewords()) {
            Some(code) => {
                Err(Error::expected("a code", code, format!("less than {}, the codewords", self.codewords())))
            }
            None => Ok(()),
        }
    }

    /// Returns ⟨codeword, piece of the query⟩ for every codeword: `[subvectors · codewords]`. A row's inner product with the
    /// query is the sum over its codes.
    pub fn table(&self, query: &[f32]) -> Vec<f32> {
        let width = self.codebooks[0].ncols();
        let mut table = vec![0f32; self.codebooks.len() * self.codewords()];
        for ((book, part), out) in
            self.codebooks.iter().zip(query.chunks(width.max(1))).zip(table.chunks_mut(self.codewords()))
        {
            crate::kernels::dots(book.as_slice().expect("standard layout"), part, out);
        }
        table
    }

    /// Returns a row's inner product with the query of a [table](ProductQuantizer::table).
    pub fn score(&self, table: &[f32], codes: ArrayView1<u8>) -> f32 {
        let words = self.codewords();
        codes.iter().enumerate().map(|(piece, &code)| table[piece * words + usize::from(code)]).sum()
    }

    /// Adds the row that codes stand for to `y`, times a weight.
    pub fn add_row(&self, codes: ArrayView1<u8>, weight: f32, y: &mut [f32]) {
        for ((book, &code), y) in self.codebooks.iter().zip(codes).zip(y.chunks_mut(self.piece().max(1))) {
            y.iter_mut().zip(book.row(usize::from(code))).for_each(|(y, v)| *y += weight * v);
        }
    }

    /// Returns the memory that the codewords take.
    pub fn memory_bytes(&self) -> usize {
        4 * self.codebooks.iter().map(Array2::len).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample(rows: usize, columns: usize, seed: usize) -> Array2<f32> {
        let cell = |i: usize, j: usize| ((i * 7919 + j * 104_729 + seed * 31) % 1009) as f32 / 500.0 - 1.0;
        Array2::from_shape_fn((rows, columns), |(i, j)| cell(i, j))
    }

    proptest! {
        #[test]
        fn each_piece_is_its_nearest_codeword(rows in 1usize..40, pieces in 1usize..5, width in 1usize..5, k in 1usize..20, seed in 0usize..99) {
            let data = sample(rows, pieces * width, seed);
            let format = ProductFormat { subvectors: pieces, codewords: k.min(rows), seed: seed as u64 };
            let quantizer = ProductQuantizer::train(data.view(), &vec![1.0; rows], format).unwrap();
            let codes = quantizer.encode(data.view());
            quantizer.check(codes.view()).unwrap();
            let decoded = quantizer.decode(codes.view());
            for (i, row) in data.rows().into_iter().enumerate() {
                for piece in 0..pieces {
                    let part = s![piece * width..(piece + 1) * width];
                    let distance = |word: ndarray::ArrayView1<f32>| (&row.slice(part) - &word).mapv(|v| v * v).sum();
                    let found = distance(decoded.row(i).slice(part));
                    let best = quantizer.codebooks()[piece].rows().into_iter().map(distance).fold(f32::INFINITY, f32::min);
                    prop_assert!(found <= best + 1e-6);
                }
            }
            // As many codewords as rows: nothing is lost.
            let all = ProductFormat { codewords: rows, ..format };
            let lossless = ProductQuantizer::train(data.view(), &vec![1.0; rows], all).unwrap();
            let back = lossless.decode(lossless.encode(data.view()).view());
            prop_assert!((back - &data).iter().all(|d| d.abs() < 1e-6));
            // Scores from the table are those of the decoded rows.
            let query = sample(1, pieces * width, seed + 1);
            let table = quantizer.table(query.as_slice().unwrap());
            for (codes, decoded) in codes.rows().into_iter().zip(decoded.rows()) {
                let score = quantizer.score(&table, codes);
                prop_assert!((score - decoded.dot(&query.row(0))).abs() < 1e-4);
            }
        }

        #[test]
        fn fitted_formats_fit(rows in 1usize..400, width in 1usize..2000, subvectors in 1usize..64, codewords in 1usize..=256) {
            let asked = ProductFormat { subvectors, codewords, seed: 0 };
            let fitted = asked.fitted(rows, width);
            fitted.check(rows, width).unwrap();
            if asked.check(rows, width).is_ok() {
                prop_assert_eq!(fitted, asked);
            }
        }
    }

    #[test]
    fn more_codewords_are_nearer_and_the_same_seed_gives_the_same() {
        let data = sample(200, 12, 3);
        let error = |codewords: usize, seed: u64| {
            let format = ProductFormat { subvectors: 3, codewords, seed };
            let quantizer = ProductQuantizer::train(data.view(), &[1.0; 200], format).unwrap();
            (quantizer.decode(quantizer.encode(data.view()).view()) - &data).mapv(|v| v * v).sum()
        };
        assert!(error(64, 0) < 0.6 * error(8, 0));
        assert_eq!(error(16, 5), error(16, 5));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let format = ProductFormat { subvectors: 8, codewords: 256, seed: 0 };
        let message = format.check(1000, 1023).unwrap_err().to_string();
        assert!(message.contains("1, 3, 11, 31, 33, 93, 341, 1023"), "{message}");
        assert!(format.check(100, 64).unwrap_err().to_string().contains("at most 100"));
        assert_eq!(format.fitted(100, 1023), ProductFormat { subvectors: 11, codewords: 100, seed: 0 });
        assert!(ProductFormat { codewords: 257, ..format }.validate().is_err());
        assert!(ProductFormat { subvectors: 0, ..format }.validate().is_err());
        assert!(ProductQuantizer::from_codebooks(vec![]).is_err());
        assert!(ProductQuantizer::from_codebooks(vec![Array2::zeros((2, 3)), Array2::zeros((2, 4))]).is_err());
        let quantizer = ProductQuantizer::from_codebooks(vec![Array2::zeros((2, 3))]).unwrap();
        assert!(quantizer.check(ndarray::array![[0u8, 1]].view()).is_err());
        assert!(quantizer.check(ndarray::array![[2u8]].view()).is_err());
    }
}
