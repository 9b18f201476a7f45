//! Codewords for queries and keys, a set for each head, learned from the vectors that they stand for.

use ndarray::{Array2, Array3, ArrayView1, ArrayView2, ArrayView3, Axis, Zip, s};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::linalg::require_finite;
use crate::quant::{kmeans, nearest_rows};

/// No count is taken to be less where a sum is divided by it.
const LEAST_COUNT: f32 = 0.01;

/// Vectors that a thread takes.
const SHARE: usize = 4096;

/// Codewords of each head, as running means of the vectors that had them: `sum / max(count, 0.01)`.
#[derive(Debug, Clone, PartialEq)]
pub struct Codebook {
    /// `[heads, codes, dim]`
    words: Array3<f32>,
    /// `[heads, codes]`
    counts: Array2<f32>,
}

/// What a step of learning saw.
#[derive(Debug, Clone)]
pub struct Learned {
    /// Codes of the vectors `[heads, n]`, by the codewords before the step.
    pub codes: Array2<u32>,
    /// Squared distances to those codewords `[heads, n]`, of vectors that were left out, too.
    pub squared_errors: Array2<f32>,
    /// The commitment loss: the mean over all vectors of their squared distances, summed over heads; 0 for a vector that
    /// was left out.
    pub commitment: f32,
}

impl Codebook {
    /// From codewords `[heads, codes, dim]` and how many vectors, in the running mean, have them, `[heads, codes]`.
    ///
    /// # Errors
    /// When shapes do not fit, there is no code, or a number is not finite or a count negative.
    pub fn new(words: Array3<f32>, counts: Array2<f32>) -> Result<Self> {
        let (heads, codes, _) = words.dim();
        if counts.dim() != (heads, codes) || codes == 0 {
            let found = format!("{:?} for codewords {:?}", counts.shape(), words.shape());
            return Err(Error::expected("counts of codewords", found, "[heads, codes], at least one code"));
        }
        require_finite("the codewords", words.iter())?;
        require_finite("the codewords' counts", counts.iter())?;
        match counts.iter().find(|count| **count < 0.0) {
            Some(count) => Err(Error::expected("a codeword's count", count, "at least 0")),
            None => Ok(Codebook { words, counts }),
        }
    }

    /// From running sums `[heads, codes, dim]` and counts `[heads, codes]`.
    ///
    /// # Errors
    /// As [`Codebook::new`].
    pub fn of_sums(mut sums: Array3<f32>, counts: Array2<f32>) -> Result<Self> {
        if counts.dim() == (sums.dim().0, sums.dim().1) {
            Zip::from(sums.lanes_mut(Axis(2))).and(&counts).for_each(|mut sum, count| sum /= count.max(LEAST_COUNT));
        }
        Self::new(sums, counts)
    }

    /// Codewords `[heads, codes, dim]` as they are, each as if one vector had had it.
    ///
    /// # Errors
    /// As [`Codebook::new`].
    pub fn of_codewords(words: Array3<f32>) -> Result<Self> {
        let counts = Array2::ones((words.dim().0, words.dim().1));
        Self::new(words, counts)
    }

    /// Codewords by k-means of the vectors `[heads, n, dim]`, always the same for a seed.
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
        let learn = |head: &ArrayView2<f32>| kmeans(head.as_standard_layout().view(), &weights, codes, seed);
        let learned: Vec<Array2<f32>> = heads.par_iter().map(learn).collect();
        let mut codewords = Array3::zeros((x.dim().0, codes, x.dim().2));
        codewords.outer_iter_mut().zip(&learned).for_each(|(mut to, from)| to.assign(from));
        Self::of_codewords(codewords)
    }

    pub fn heads(&self) -> usize {
        self.words.dim().0
    }

    pub fn codes(&self) -> usize {
        self.words.dim().1
    }

    /// Length of a codeword.
    pub fn dim(&self) -> usize {
        self.words.dim().2
    }

    /// Running sums `[heads, codes, dim]`.
    pub fn sums(&self) -> Array3<f32> {
        let mut sums = self.words.clone();
        Zip::from(sums.lanes_mut(Axis(2))).and(&self.counts).for_each(|mut sum, count| sum *= count.max(LEAST_COUNT));
        sums
    }

    /// Running counts `[heads, codes]`.
    pub fn counts(&self) -> ArrayView2<'_, f32> {
        self.counts.view()
    }

    /// `[heads, codes, dim]`
    pub fn codewords(&self) -> ArrayView3<'_, f32> {
        self.words.view()
    }

    /// The nearest codeword of each vector `[heads, n, dim]`, the lowest of equally near ones: `[heads, n]`.
    ///
    /// # Errors
    /// When heads or lengths are others, or a number is not finite.
    pub fn assign(&self, x: ArrayView3<f32>) -> Result<Array2<u32>> {
        self.check(x)?;
        let mut codes = Array2::zeros((x.dim().0, x.dim().1));
        let mut shares = vec![];
        for ((codes, words), x) in codes.outer_iter_mut().zip(self.words.outer_iter()).zip(x.outer_iter()) {
            let codes = codes.into_slice().expect("rows of an owned array are contiguous");
            for (share, codes) in codes.chunks_mut(SHARE).enumerate() {
                let first = share * SHARE;
                shares.push((words, x.slice_move(s![first..first + codes.len(), ..]), codes));
            }
        }
        shares.into_par_iter().for_each(|(words, x, codes)| nearest_rows(words, x, codes));
        Ok(codes)
    }

    /// [`Codebook::assign`] for vectors `[n, dim]` of one head, which have been checked.
    pub(super) fn codes_of(&self, head: usize, x: ArrayView2<f32>) -> Vec<u32> {
        let mut codes = vec![0; x.nrows()];
        nearest_rows(self.words.slice(s![head, .., ..]), x, &mut codes);
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

    /// One step of learning from vectors `[heads, n, dim]`: running sums and counts become `γ` of what they were and
    /// `1 − γ` of this step's (exponential moving averages, as in VQ-VAE and Transformer-VQ). Vectors where `there` `[n]` is
    /// false are left out.
    ///
    /// # Errors
    /// As [`Codebook::assign`], when `γ` is not within 0 … 1, or `there` has another length.
    pub fn learn(&mut self, x: ArrayView3<f32>, there: Option<ArrayView1<bool>>, gamma: f32) -> Result<Learned> {
        if !(0.0..=1.0).contains(&gamma) {
            return Err(Error::expected("gamma", gamma, "within 0 and 1"));
        }
        let n = x.dim().1;
        if let Some(there) = there
            && there.len() != n
        {
            return Err(Error::expected("mask of the vectors", there.len(), n));
        }
        let codes = self.assign(x)?;
        let counted = |i: usize| there.is_none_or(|there| there[i]);
        let squared_errors = Array2::from_shape_fn(codes.dim(), |(h, i)| {
            let (x, word) = (x.slice(s![h, i, ..]), self.words.slice(s![h, codes[[h, i]] as usize, ..]));
            x.iter().zip(word).map(|(a, b)| (a - b) * (a - b)).sum::<f32>()
        });
        let (mut sums, mut counts) = (self.sums() * gamma, &self.counts * gamma);
        let mut commitment = 0f64;
        for ((h, i), &code) in codes.indexed_iter().filter(|((_, i), _)| counted(*i)) {
            commitment += f64::from(squared_errors[[h, i]]);
            counts[[h, code as usize]] += 1.0 - gamma;
            sums.slice_mut(s![h, code as usize, ..]).scaled_add(1.0 - gamma, &x.slice(s![h, i, ..]));
        }
        *self = Self::of_sums(sums, counts)?;
        Ok(Learned { codes, squared_errors, commitment: (commitment / n.max(1) as f64) as f32 })
    }

    /// Gives codewords that hardly any vector has (a count below `least`) to vectors of `x` `[heads, n, dim]` drawn by the
    /// seed, each as if one vector had had it. How many there were.
    ///
    /// # Errors
    /// As [`Codebook::assign`].
    pub fn revive(&mut self, x: ArrayView3<f32>, least: f32, seed: u64) -> Result<usize> {
        self.check(x)?;
        let n = x.dim().1 as u64;
        let mut chance = ChaCha8Rng::seed_from_u64(seed);
        let dead: Vec<(usize, usize)> =
            self.counts.indexed_iter().filter(|(_, count)| **count < least).map(|(place, _)| place).collect();
        if n == 0 {
            return Ok(0);
        }
        for &(h, code) in &dead {
            let drawn = (chance.next_u64() % n) as usize;
            self.words.slice_mut(s![h, code, ..]).assign(&x.slice(s![h, drawn, ..]));
            self.counts[[h, code]] = 1.0;
        }
        Ok(dead.len())
    }
}
