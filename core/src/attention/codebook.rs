//! Codewords for queries and keys, a set for each head, learned from the vectors that they stand for.

use ndarray::{Array2, Array3, ArrayView1, ArrayView2, ArrayView3, Axis, Zip, s};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::linalg::require_finite;
use crate::quant::{kmeans, nearest_rows};

/// A sum is divided by its count, and by no less than this.
const LEAST_COUNT: f32 = 0.01;

/// Vectors that a thread takes.
const SHARE: usize = 4096;

/// Codewords of each head, as running means of the vectors assigned to them: `sum / max(count, 0.01)`.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionCodebook {
    /// `[heads, codes, dim]`
    codewords: Array3<f32>,
    /// `[heads, codes]`
    counts: Array2<f32>,
}

/// Statistics of one update of a codebook.
#[derive(Debug, Clone)]
pub struct CodebookUpdate {
    /// Codes of the vectors `[heads, n]`, by the codewords before the update.
    pub codes: Array2<u32>,
    /// Squared distances to those codewords `[heads, n]`, of masked vectors, too.
    pub squared_errors: Array2<f32>,
    /// The commitment loss: the mean over all vectors of their squared distances, summed over heads; a masked vector counts as 0.
    pub commitment: f32,
}

impl AttentionCodebook {
    /// Makes a codebook of codewords `[heads, codes, dim]` and the number of vectors, in the running mean, that each of them stands
    /// for, `[heads, codes]`.
    ///
    /// # Errors
    /// When shapes do not fit, there is no code, or a number is not finite or a count negative.
    pub fn new(codewords: Array3<f32>, counts: Array2<f32>) -> Result<Self> {
        let (heads, codes, _) = codewords.dim();
        if counts.dim() != (heads, codes) || codes == 0 {
            let found = format!("{:?} for codewords {:?}", counts.shape(), codewords.shape());
            return Err(Error::expected("counts of codewords", found, "[heads, codes], at least one code"));
        }
        require_finite("the codewords", codewords.iter())?;
        require_finite("the codewords' counts", counts.iter())?;
        match counts.iter().find(|count| **count < 0.0) {
            Some(count) => Err(Error::expected("a codeword's count", count, "at least 0")),
            None => Ok(AttentionCodebook { codewords, counts }),
        }
    }

    /// Makes a codebook of running sums `[heads, codes, dim]` and counts `[heads, codes]`.
    ///
    /// # Errors
    /// As [`AttentionCodebook::new`].
    pub fn of_sums(mut sums: Array3<f32>, counts: Array2<f32>) -> Result<Self> {
        if counts.dim() == (sums.dim().0, sums.dim().1) {
            Zip::from(sums.lanes_mut(Axis(2))).and(&counts).for_each(|mut sum, count| sum /= count.max(LEAST_COUNT));
        }
        Self::new(sums, counts)
    }

    /// Makes a codebook of codewords `[heads, codes, dim]` as they are, each with a count of 1.
    ///
    /// # Errors
    /// As [`AttentionCodebook::new`].
    pub fn of_codewords(codewords: Array3<f32>) -> Result<Self> {
        let counts = Array2::ones((codewords.dim().0, codewords.dim().1));
        Self::new(codewords, counts)
    }

    /// Finds codewords by k-means of the vectors `[heads, n, dim]`; the same seed gives the same codewords.
    ///
    /// # Errors
    /// When there are fewer vectors than codes, no codes are asked for, or a number is not finite.
    pub fn by_kmeans(x: ArrayView3<f32>, codes: usize, seed: u64) -> Result<Self> {
        require_finite("the vectors", x.iter())?;
        if codes == 0 || x.dim().1 < codes {
            let found = format!("{codes} for {} vectors", x.dim().1);
            return Err(Error::expected("number of codes", found, "at least 1, and no more than vectors"));
        }
        let heads: Vec<ArrayView2<f32>> = x.outer_iter().collect();
        let weights = vec![1f32; x.dim().1];
        let of_head = |head: &ArrayView2<f32>| kmeans(head.as_standard_layout().view(), &weights, codes, seed);
        let found: Vec<Array2<f32>> = heads.par_iter().map(of_head).collect();
        let mut codewords = Array3::zeros((x.dim().0, codes, x.dim().2));
        codewords.outer_iter_mut().zip(&found).for_each(|(mut to, from)| to.assign(from));
        Self::of_codewords(codewords)
    }

    /// Returns the number of heads.
    pub fn heads(&self) -> usize {
        self.codewords.dim().0
    }

    /// Returns the number of codewords of each head.
    pub fn codes(&self) -> usize {
        self.codewords.dim().1
    }

    /// Returns the length of a codeword.
    pub fn dim(&self) -> usize {
        self.codewords.dim().2
    }

    /// Returns the running sums `[heads, codes, dim]`.
    pub fn sums(&self) -> Array3<f32> {
        let mut sums = self.codewords.clone();
        Zip::from(sums.lanes_mut(Axis(2))).and(&self.counts).for_each(|mut sum, count| sum *= count.max(LEAST_COUNT));
        sums
    }

    /// Returns the running counts `[heads, codes]`.
    pub fn counts(&self) -> ArrayView2<'_, f32> {
        self.counts.view()
    }

    /// Returns the codewords `[heads, codes, dim]`.
    pub fn codewords(&self) -> ArrayView3<'_, f32> {
        self.codewords.view()
    }

    /// Returns the code of the nearest codeword of each vector `[heads, n, dim]`, the lowest of equally near ones: `[heads, n]`.
    ///
    /// # Errors
    /// When the number of heads or the length differs, or a number is not finite.
    pub fn assign(&self, x: ArrayView3<f32>) -> Result<Array2<u32>> {
        self.check(x)?;
        let mut codes = Array2::zeros((x.dim().0, x.dim().1));
        let mut shares = vec![];
        for ((codes, codewords), x) in codes.outer_iter_mut().zip(self.codewords.outer_iter()).zip(x.outer_iter()) {
            let codes = codes.into_slice().expect("rows of an owned array are contiguous");
            for (share, codes) in codes.chunks_mut(SHARE).enumerate() {
                let first = share * SHARE;
                shares.push((codewords, x.slice_move(s![first..first + codes.len(), ..]), codes));
            }
        }
        shares.into_par_iter().for_each(|(codewords, x, codes)| nearest_rows(codewords, x, codes));
        Ok(codes)
    }

    /// Does what [`AttentionCodebook::assign`] does for vectors `[n, dim]` of one head that have been checked.
    pub(super) fn codes_of(&self, head: usize, x: ArrayView2<f32>) -> Vec<u32> {
        let mut codes = vec![0; x.nrows()];
        nearest_rows(self.codewords.slice(s![head, .., ..]), x, &mut codes);
        codes
    }

    fn check(&self, x: ArrayView3<f32>) -> Result<()> {
        if (x.dim().0, x.dim().2) != (self.heads(), self.dim()) {
            return Err(Error::expected(
                "shape of vectors to code, [heads, n, dim]",
                format!("{:?}", x.shape()),
                format!("[{}, any, {}]", self.heads(), self.dim()),
            ));
        }
        require_finite("the vectors", x.iter())
    }

    /// Updates the codewords from vectors `[heads, n, dim]` by exponential moving averages (as VQ-VAE and Transformer-VQ do): running
    /// sums and counts become `gamma` of what they were and `1 − gamma` of these vectors'. Vectors where `mask` `[n]` is false are
    /// left out. As there, a codeword whose count is below 0.01 shrinks; [`AttentionCodebook::learn`] lets it be.
    ///
    /// # Errors
    /// As [`AttentionCodebook::assign`], when `gamma` is not within 0 … 1, or the mask has another length.
    pub fn update(&mut self, x: ArrayView3<f32>, mask: Option<ArrayView1<bool>>, gamma: f32) -> Result<CodebookUpdate> {
        if !(0.0..=1.0).contains(&gamma) {
            return Err(Error::expected("gamma", gamma, "within 0 and 1"));
        }
        let n = x.dim().1;
        if let Some(mask) = mask
            && mask.len() != n
        {
            return Err(Error::expected("mask of the vectors", mask.len(), n));
        }
        let codes = self.assign(x)?;
        let squared_errors = self.squared_errors(x, &codes);
        let counted = |i: usize| mask.is_none_or(|mask| mask[i]);
        let (mut sums, mut counts) = (self.sums() * gamma, &self.counts * gamma);
        let mut commitment = 0f64;
        for ((h, i), &code) in codes.indexed_iter().filter(|((_, i), _)| counted(*i)) {
            commitment += f64::from(squared_errors[[h, i]]);
            counts[[h, code as usize]] += 1.0 - gamma;
            sums.slice_mut(s![h, code as usize, ..]).scaled_add(1.0 - gamma, &x.slice(s![h, i, ..]));
        }
        *self = Self::of_sums(sums, counts)?;
        Ok(CodebookUpdate { codes, squared_errors, commitment: (commitment / n.max(1) as f64) as f32 })
    }

    /// Does [`AttentionCodebook::update`] with all vectors, for training of any length: a codeword that no vector is nearest to
    /// stays as it is, whatever its count has fallen to, until it is [revived](AttentionCodebook::revive), and one whose count is
    /// small becomes the mean of what it stood for and its vectors.
    ///
    /// # Errors
    /// As [`AttentionCodebook::update`].
    pub fn learn(&mut self, x: ArrayView3<f32>, gamma: f32) -> Result<CodebookUpdate> {
        let before = self.clone();
        let update = self.update(x, None, gamma)?;
        let mut vectors = vec![vec![]; self.heads() * self.codes()];
        for ((h, i), &code) in update.codes.indexed_iter() {
            vectors[h * self.codes() + code as usize].push(i);
        }
        for (place, vectors) in vectors.iter().enumerate() {
            let (h, code) = (place / self.codes(), place % self.codes());
            let (was, now) = (before.counts[[h, code]], self.counts[[h, code]]);
            let old = before.codewords.slice(s![h, code, ..]);
            let mut codeword = self.codewords.slice_mut(s![h, code, ..]);
            if vectors.is_empty() || now == 0.0 {
                codeword.assign(&old);
            } else if was < LEAST_COUNT || now < LEAST_COUNT {
                codeword.assign(&(&old * (gamma * was / now)));
                for &i in vectors {
                    codeword.scaled_add((1.0 - gamma) / now, &x.slice(s![h, i, ..]));
                }
            }
        }
        Ok(update)
    }

    /// Returns the squared distances `[heads, n]` of vectors `[heads, n, dim]` to the codewords of their codes.
    fn squared_errors(&self, x: ArrayView3<f32>, codes: &Array2<u32>) -> Array2<f32> {
        Array2::from_shape_fn(codes.dim(), |(h, i)| {
            let (x, codeword) = (x.slice(s![h, i, ..]), self.codewords.slice(s![h, codes[[h, i]] as usize, ..]));
            x.iter().zip(codeword).map(|(a, b)| (a - b) * (a - b)).sum::<f32>()
        })
    }

    /// Replaces dead codewords, those with a count below `least`, by vectors of `x` `[heads, n, dim]` drawn by the seed, with a count
    /// of 1, and returns how many they were.
    ///
    /// # Errors
    /// As [`AttentionCodebook::assign`].
    pub fn revive(&mut self, x: ArrayView3<f32>, least: f32, seed: u64) -> Result<usize> {
        self.check(x)?;
        let n = x.dim().1 as u64;
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let dead: Vec<(usize, usize)> =
            self.counts.indexed_iter().filter(|(_, count)| **count < least).map(|(place, _)| place).collect();
        if n == 0 {
            return Ok(0);
        }
        for &(h, code) in &dead {
            let drawn = (random.next_u64() % n) as usize;
            self.codewords.slice_mut(s![h, code, ..]).assign(&x.slice(s![h, drawn, ..]));
            self.counts[[h, code]] = 1.0;
        }
        Ok(dead.len())
    }
}
