//! The random part of HyperAttention: directions of the hash, and sampled keys.

use ndarray::{Array2, Array3, ArrayView4, s};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::config::HyperAttention;
use super::levels::{Level, levels};
use crate::attention::shape::AttentionShape;
use crate::error::{Error, Result};
use crate::linalg::{normal_matrix, on_all_threads, product_into};

/// Tokens that a thread hashes at a time.
const ROWS: usize = 1024;

/// Everything that is drawn at random for one attention.
#[derive(Debug, Clone)]
pub struct HyperAttentionSample {
    /// Random directions of the hash `[dim, projections]`: the sign of the product with a column is a bit, the first column's the
    /// lowest.
    pub directions: Array2<f32>,
    /// Sampled keys for each level of a causal attention, the whole sequence first, `[batch, heads · 2^level, sample_size]`: places of
    /// keys in the order of their hashes, for the part s of head h at `h · 2^level + s`. One level where it is not causal.
    pub keys: Vec<Array3<u32>>,
}

impl HyperAttentionSample {
    /// Returns the hashes that tokens `[batch, heads, tokens, dim]` are sorted by, `[batch, heads, tokens]`: the Gray code of the
    /// signs of their products with the directions.
    ///
    /// # Panics
    /// When `dim` is not that of the directions.
    pub fn hashes(&self, x: ArrayView4<f32>) -> Array3<u32> {
        let directions = self.directions.view();
        let (batch, heads, tokens, _) = x.dim();
        let mut hashes = Array3::zeros((batch, heads, tokens));
        let all = hashes.as_slice_mut().expect("owned").chunks_mut(tokens.max(1)).enumerate();
        let shares =
            all.flat_map(|(head, all)| all.chunks_mut(ROWS).enumerate().map(move |(n, some)| (head, n * ROWS, some)));
        on_all_threads(shares.collect(), |(head, first, hashes): (usize, usize, &mut [u32])| {
            let x = x.slice(s![head / heads, head % heads, first..first + hashes.len(), ..]);
            let mut products = Array2::zeros((x.nrows(), directions.ncols()));
            product_into(products.view_mut(), x, directions, 1.0, false);
            for (hash, products) in hashes.iter_mut().zip(products.rows()) {
                let bits = products.iter().rev().fold(0u32, |bits, product| bits << 1 | u32::from(*product > 0.0));
                *hash = bits ^ (bits >> 1);
            }
        });
        hashes
    }

    /// Checks the shapes, and that every sampled key is there.
    pub(super) fn check(
        &self,
        config: &HyperAttention,
        parts: &[Level],
        shape: &AttentionShape,
        dim: usize,
    ) -> Result<()> {
        let shapes = |count: usize| [shape.batch, shape.heads * count, config.sample_size];
        let fits = self.directions.dim() == (dim, config.projections)
            && self.keys.len() == parts.len()
            && parts.iter().zip(&self.keys).all(|(parts, found)| found.shape() == shapes(parts.len()));
        if !fits {
            let found: Vec<_> = self.keys.iter().map(|s| s.shape()).collect();
            let expected: Vec<_> = parts.iter().map(|parts| shapes(parts.len())).collect();
            return Err(Error::expected(
                "shapes of the random sample",
                format!("directions {:?}, keys {found:?}", self.directions.shape()),
                format!("directions [{dim}, {}], keys {expected:?}", config.projections),
            ));
        }
        for (parts, sampled) in parts.iter().zip(&self.keys) {
            for ((_, place, _), &drawn) in sampled.indexed_iter() {
                let keys = parts[place % parts.len()].1.len();
                if drawn as usize >= keys.max(1) {
                    return Err(Error::expected("place of a sampled key", drawn, format!("below {keys}")));
                }
            }
        }
        Ok(())
    }
}

impl HyperAttention {
    /// Draws directions and keys for these queries and keys; the same seed gives the same ones.
    ///
    /// # Errors
    /// As [`HyperAttention::attend`].
    pub fn sample(&self, q: ArrayView4<f32>, k: ArrayView4<f32>, causal: bool) -> Result<HyperAttentionSample> {
        self.check(q, k, causal)?;
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        // Another stream than the directions'.
        random.set_stream(1);
        let (batch, heads, queries, dim) = q.dim();
        let directions = normal_matrix(dim, self.projections, self.seed).mapv(|v| v as f32);
        let parts = levels(queries, k.dim().2, causal, self.min_seq_len).0;
        let keys = parts.iter().map(|parts| {
            let mut sampled = Array3::zeros((batch, heads * parts.len(), self.sample_size));
            for ((_, place, _), sampled) in sampled.indexed_iter_mut() {
                let keys = parts[place % parts.len()].1.len() as u64;
                // The high half of a product: even for any number of keys.
                *sampled = ((u64::from(random.next_u32()) * keys) >> 32) as u32;
            }
            sampled
        });
        let keys = keys.collect();
        Ok(HyperAttentionSample { directions, keys })
    }

    /// Checks the settings against queries and keys.
    pub(super) fn check(&self, q: ArrayView4<f32>, k: ArrayView4<f32>, causal: bool) -> Result<()> {
        self.validate()?;
        match causal && q.dim().2 != k.dim().2 {
            true => Err(Error::expected(
                "tokens of a causal attention",
                format!("{} queries, {} keys", q.dim().2, k.dim().2),
                "a key for each query",
            )),
            false => Ok(()),
        }
    }
}
