//! HyperAttention (Han, Jayaram, Karbasi, Mirrokni, Woodruff, Zandieh, 2023): each query meets the keys of its own bucket
//! one by one, and a sample of all keys that stands for the others.
//!
//! Buckets are runs of the tokens in the order of an angular hash, so that near ones come together. A causal attention is
//! two causal ones of the halves, and one of the second half's queries to all keys of the first, which is not causal.

use std::ops::Range;

use ndarray::{Array1, Array2, Array3, ArrayView1, ArrayView2, ArrayView4, ArrayViewMut1, ArrayViewMut2, Axis, s};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::exact::{self, Hidden};
use super::softmax::{Running, add_keys, finish, tile};
use super::vector_quantized::gathered;
use super::{Attended, Sizes, Visible, attended, check};
use crate::error::{Error, Result};
use crate::linalg::{in_pool, large_zeros, normal_matrix, on_all_threads, product_into};

/// Bits of a hash, at most.
const MOST_PROJECTIONS: usize = 24;

/// Keys that are sampled, at most.
const MOST_SAMPLES: usize = 1 << 16;

/// Queries that a task has, if they are of several blocks.
const SHARE: usize = 256;

/// How much is computed exactly, and of how large a sample the rest is estimated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Hyper {
    /// Keys of a bucket, at most.
    pub block_size: usize,
    /// Keys that are drawn, with replacement, for those of the other buckets, at most 65,536; 0 leaves them out.
    pub sample_size: usize,
    /// Directions whose signs are the hash, at most 24.
    #[serde(rename = "lsh_num_projs")]
    pub projections: usize,
    /// Fewer queries than these attend exactly; so do causal runs whose second half is shorter.
    pub min_seq_len: usize,
    /// What is drawn is always the same for a seed.
    pub seed: u64,
}

impl Default for Hyper {
    /// As the paper's code has it.
    fn default() -> Self {
        Hyper { block_size: 256, sample_size: 256, projections: 7, min_seq_len: 4096, seed: 0 }
    }
}

/// All that is drawn for one attention.
#[derive(Debug, Clone)]
pub struct Draws {
    /// `[dim, projections]`: a column's sign is a bit, the first one's the lowest.
    pub directions: Array2<f32>,
    /// For each level of a causal attention, the whole sequence first, `[batch, heads · 2^level, sample_size]`: places of keys
    /// in the order of their hashes, for the part s of head h at `h · 2^level + s`. One level where it is not causal.
    pub samples: Vec<Array3<u32>>,
}

/// Queries, and the keys that all of them see, for each part of a level.
type Level = Vec<(Range<usize>, Range<usize>)>;

impl Draws {
    /// What tokens `[batch, heads, tokens, dim]` are ordered by, `[batch, heads, tokens]`: the Gray code of the signs of their
    /// products with the directions.
    ///
    /// # Panics
    /// When `dim` is not that of the directions.
    pub fn hashes(&self, x: ArrayView4<f32>) -> Array3<u32> {
        let directions = self.directions.view();
        const ROWS: usize = 1024;
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
}

/// Some queries of a head, and some keys, all of which they see.
struct Part<'a> {
    /// Head and sequence of the batch in one number.
    head: usize,
    queries: Range<usize>,
    keys: Range<usize>,
    /// Places among the keys, which stand for those of other blocks.
    samples: ArrayView1<'a, u32>,
}

/// A part's tokens in the order of their hashes.
struct Sorted {
    queries: Vec<u32>,
    keys: Vec<u32>,
    sampled_keys: Array2<f32>,
    sampled_values: Array2<f32>,
}

impl Hyper {
    /// Estimates [`exact::exact`] over all keys, or those up to each query's own.
    ///
    /// # Errors
    /// As [`exact::exact`]; when a block is of no keys, there are more projections than 24, or a causal attention has not a
    /// key for each query.
    pub fn attend(
        &self,
        q: ArrayView4<f32>,
        k: ArrayView4<f32>,
        v: ArrayView4<f32>,
        scale: f32,
        causal: bool,
    ) -> Result<Attended> {
        check(q, k, v, &Visible::default())?;
        self.attend_with(q, k, v, scale, causal, &self.draws(q, k, causal)?)
    }

    /// What the seed draws for these queries and keys.
    ///
    /// # Errors
    /// As [`Hyper::attend`].
    pub fn draws(&self, q: ArrayView4<f32>, k: ArrayView4<f32>, causal: bool) -> Result<Draws> {
        self.check(q, k, causal)?;
        let mut chance = ChaCha8Rng::seed_from_u64(self.seed);
        // Another stream than the directions'.
        chance.set_stream(1);
        let (batch, heads, queries, dim) = q.dim();
        let directions = normal_matrix(dim, self.projections, self.seed).mapv(|v| v as f32);
        let parts = self.levels(queries, k.dim().2, causal).0;
        let samples = parts.iter().map(|parts| {
            let mut drawn = Array3::zeros((batch, heads * parts.len(), self.sample_size));
            for ((_, place, _), drawn) in drawn.indexed_iter_mut() {
                let keys = parts[place % parts.len()].1.len() as u64;
                // The high half of a product: even for any number of keys.
                *drawn = ((u64::from(chance.next_u32()) * keys) >> 32) as u32;
            }
            drawn
        });
        let samples = samples.collect();
        Ok(Draws { directions, samples })
    }

    /// [`Hyper::attend`] with what was drawn.
    ///
    /// # Errors
    /// As there; and when the draws are of another shape, or behind the keys.
    pub fn attend_with(
        &self,
        q: ArrayView4<f32>,
        k: ArrayView4<f32>,
        v: ArrayView4<f32>,
        scale: f32,
        causal: bool,
        draws: &Draws,
    ) -> Result<Attended> {
        let sizes = check(q, k, v, &Visible::default())?;
        self.check(q, k, causal)?;
        if !causal && sizes.queries < self.min_seq_len {
            return exact::exact(q, k, v, scale, &Visible::default());
        }
        if !scale.is_finite() {
            return Err(Error::expected("scale of the scores", scale, "a finite number"));
        }
        let (parts, runs) = self.levels(sizes.queries, sizes.keys, causal);
        self.check_draws(&parts, draws, &sizes, q.dim().3)?;
        let all = All { q, k, v, scale, sizes };
        let mut output = large_zeros((sizes.batch * sizes.heads, sizes.queries, sizes.value_dim));
        let mut log_sum_exp = Array2::from_elem((sizes.batch * sizes.heads, sizes.queries), f32::NEG_INFINITY);
        in_pool(|| {
            all.diagonal(&runs, &mut output, &mut log_sum_exp);
            let hashes = (draws.hashes(q), draws.hashes(k));
            // What is left of each part before the next level's are in memory.
            for (parts, samples) in parts.iter().zip(&draws.samples).rev() {
                let of_head = |head: usize| {
                    parts.iter().enumerate().map(move |(place, (queries, keys))| Part {
                        head,
                        queries: queries.clone(),
                        keys: keys.clone(),
                        samples: samples.slice(s![head / sizes.heads, head % sizes.heads * parts.len() + place, ..]),
                    })
                };
                let parts = (0..sizes.batch * sizes.heads).flat_map(of_head);
                let parts: Vec<Part> = parts.filter(|part| !part.queries.is_empty()).collect();
                self.off_diagonal(&all, &parts, &hashes, &mut output, &mut log_sum_exp);
            }
        });
        attended(output, log_sum_exp, (sizes.batch, sizes.heads))
    }

    /// The parts of each level, and the runs of a causal attention that are left, which attend to themselves.
    fn levels(&self, queries: usize, keys: usize, causal: bool) -> (Vec<Level>, Vec<Range<usize>>) {
        if !causal {
            return (vec![vec![(0..queries, 0..keys)]], vec![]);
        }
        let (mut levels, mut runs) = (vec![], std::iter::once(0..queries).collect::<Vec<_>>());
        // Where its second half would attend exactly, so does the whole run.
        let split = |run: &Range<usize>| run.len() > 1 && run.len().div_ceil(2) >= self.min_seq_len;
        while runs.iter().any(split) {
            let (mut level, mut halves) = (vec![], vec![]);
            for run in runs {
                // A run of one token fewer than its neighbour may be short enough: its second half is empty.
                let middle = if split(&run) { run.start + run.len() / 2 } else { run.end };
                level.push((middle..run.end, if middle < run.end { run.start..middle } else { 0..0 }));
                halves.extend([run.start..middle, middle..run.end]);
            }
            levels.push(level);
            runs = halves;
        }
        (levels, runs)
    }

    /// # Errors
    /// When a block is of no keys, there are more projections or samples than allowed, or `min_seq_len` is 0.
    pub fn validate(&self) -> Result<()> {
        let fits = self.block_size > 0
            && self.sample_size <= MOST_SAMPLES
            && self.projections <= MOST_PROJECTIONS
            && self.min_seq_len > 0;
        match fits {
            true => Ok(()),
            false => Err(Error::expected(
                "settings of HyperAttention",
                format!("{self:?}"),
                format!(
                    "block_size and min_seq_len of at least 1, at most {MOST_SAMPLES} samples and {MOST_PROJECTIONS} projections"
                ),
            )),
        }
    }

    fn check(&self, q: ArrayView4<f32>, k: ArrayView4<f32>, causal: bool) -> Result<()> {
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

    fn check_draws(&self, parts: &[Level], draws: &Draws, sizes: &Sizes, dim: usize) -> Result<()> {
        let shapes = |count: usize| [sizes.batch, sizes.heads * count, self.sample_size];
        let fits = draws.directions.dim() == (dim, self.projections)
            && draws.samples.len() == parts.len()
            && parts.iter().zip(&draws.samples).all(|(parts, found)| found.shape() == shapes(parts.len()));
        if !fits {
            let found: Vec<_> = draws.samples.iter().map(|s| s.shape()).collect();
            let expected: Vec<_> = parts.iter().map(|parts| shapes(parts.len())).collect();
            return Err(Error::expected(
                "shapes of what was drawn",
                format!("directions {:?}, samples {found:?}", draws.directions.shape()),
                format!("directions [{dim}, {}], samples {expected:?}", self.projections),
            ));
        }
        for (parts, samples) in parts.iter().zip(&draws.samples) {
            for ((_, place, _), &drawn) in samples.indexed_iter() {
                let keys = parts[place % parts.len()].1.len();
                if drawn as usize >= keys.max(1) {
                    return Err(Error::expected("place of a sampled key", drawn, format!("below {keys}")));
                }
            }
        }
        Ok(())
    }

    /// Adds these parts' keys to what their queries have seen.
    fn off_diagonal(
        &self,
        all: &All,
        parts: &[Part],
        hashes: &(Array3<u32>, Array3<u32>),
        output: &mut Array3<f32>,
        log_sum_exp: &mut Array2<f32>,
    ) {
        let sorted: Vec<Sorted> = parts.par_iter().map(|part| self.sort(all, part, hashes)).collect();
        let rows = |part: &Part| (Array2::zeros((part.queries.len(), all.sizes.value_dim)), part.queries.len());
        let mut found: Vec<(Array2<f32>, Array1<f32>)> =
            parts.iter().map(rows).map(|(o, n)| (o, Array1::from_elem(n, f32::NEG_INFINITY))).collect();
        let mut shares = vec![];
        for ((part, sorted), (output, lse)) in parts.iter().zip(&sorted).zip(&mut found) {
            let (mut output, mut lse) = (output.view_mut(), lse.view_mut());
            let (blocks, queries) = (self.blocks(part.keys.len()), part.queries.len());
            let step = (SHARE * blocks / queries.max(1)).max(1);
            for first in (0..blocks).step_by(step) {
                let end = blocks.min(first + step);
                let rows = (end * queries / blocks) - first * queries / blocks;
                let (some, some_lse);
                (some, output) = output.split_at(Axis(0), rows);
                (some_lse, lse) = lse.split_at(Axis(0), rows);
                shares.push((part, sorted, first..end, some, some_lse));
            }
        }
        on_all_threads(shares, |(part, sorted, blocks, output, lse)| {
            self.some_blocks(all, part, sorted, blocks, output, lse);
        });
        let heads: Vec<_> = output.outer_iter_mut().zip(log_sum_exp.outer_iter_mut()).enumerate().collect();
        on_all_threads(heads, |(head, (mut output, mut lse))| {
            let own = parts.iter().zip(&sorted).zip(&found).filter(|((part, _), _)| part.head == head);
            for ((part, sorted), (more, more_lse)) in own {
                for (place, &query) in sorted.queries.iter().enumerate() {
                    let query = part.queries.start + query as usize;
                    merge(output.row_mut(query), &mut lse[query], more.row(place), more_lse[place]);
                }
            }
        });
    }

    /// Blocks of so many keys, which are as even as can be.
    fn blocks(&self, keys: usize) -> usize {
        keys.div_ceil(self.block_size).max(1)
    }

    fn sort(&self, all: &All, part: &Part, hashes: &(Array3<u32>, Array3<u32>)) -> Sorted {
        let (b, h) = (part.head / all.sizes.heads, part.head % all.sizes.heads);
        let order = |hashes: &Array3<u32>, head: usize, tokens: &Range<usize>| {
            let hashes = hashes.slice(s![b, head, tokens.clone()]);
            let mut order: Vec<u32> = (0..tokens.len() as u32).collect();
            order.sort_by_key(|&token| hashes[token as usize]);
            order
        };
        let (queries, keys) = (order(&hashes.0, h, &part.queries), order(&hashes.1, h / all.sizes.shared, &part.keys));
        let sampled: Vec<u32> = match self.blocks(part.keys.len()) {
            1 => vec![],
            _ => part.samples.iter().map(|&place| keys[place as usize]).collect(),
        };
        let (k, v) = all.keys(part);
        let (sampled_keys, sampled_values) = (gathered(k, &sampled), gathered(v, &sampled));
        Sorted { queries, keys, sampled_keys, sampled_values }
    }

    /// Blocks of queries, in the order of their hashes, to their blocks of keys and to the samples.
    fn some_blocks(
        &self,
        all: &All,
        part: &Part,
        sorted: &Sorted,
        blocks: Range<usize>,
        mut output: ArrayViewMut2<f32>,
        mut lse: ArrayViewMut1<f32>,
    ) {
        let (count, queries, keys) = (self.blocks(part.keys.len()), part.queries.len(), part.keys.len());
        let (q, (k, v)) = (all.queries(part), all.keys(part));
        let (start, samples) = (blocks.start * queries / count, sorted.sampled_keys.nrows());
        let mut room = vec![];
        for block in blocks {
            let rows = block * queries / count..(block + 1) * queries / count;
            let own = block * keys / count..(block + 1) * keys / count;
            let into = s![rows.start - start..rows.end - start, ..];
            let (mut output, lse) = (output.slice_mut(into), lse.slice_mut(s![rows.start - start..rows.end - start]));
            let (near, values) = (gathered(k, &sorted.keys[own.clone()]), gathered(v, &sorted.keys[own.clone()]));
            let q = gathered(q, &sorted.queries[rows]);
            let mut running = vec![Running::default(); q.nrows()];
            let scores = tile(&mut room, q.nrows(), near.nrows());
            let keys_of = (q.view(), near.view(), values.view());
            add_keys(keys_of, all.scale, scores, |_| {}, output.view_mut(), &mut running);
            if samples > 0 {
                // Each sample stands for so many keys; those of the block have been met.
                let weight = (keys as f32 / samples as f32).ln();
                let scores = tile(&mut room, q.nrows(), samples);
                let sampled = (q.view(), sorted.sampled_keys.view(), sorted.sampled_values.view());
                let weigh = |scores: &mut ArrayViewMut2<f32>| {
                    *scores += weight;
                    for (mut column, &place) in scores.columns_mut().into_iter().zip(part.samples) {
                        if own.contains(&(place as usize)) {
                            column.fill(f32::NEG_INFINITY);
                        }
                    }
                };
                add_keys(sampled, all.scale, scores, weigh, output.view_mut(), &mut running);
            }
            finish(&running, output, lse);
        }
    }
}

/// What is attended to what.
struct All<'a> {
    q: ArrayView4<'a, f32>,
    k: ArrayView4<'a, f32>,
    v: ArrayView4<'a, f32>,
    scale: f32,
    sizes: Sizes,
}

impl All<'_> {
    fn queries(&self, part: &Part) -> ArrayView2<'_, f32> {
        let (b, h) = (part.head / self.sizes.heads, part.head % self.sizes.heads);
        self.q.slice(s![b, h, part.queries.clone(), ..])
    }

    fn keys(&self, part: &Part) -> (ArrayView2<'_, f32>, ArrayView2<'_, f32>) {
        let (b, h) = (part.head / self.sizes.heads, part.head % self.sizes.heads / self.sizes.shared);
        (self.k.slice(s![b, h, part.keys.clone(), ..]), self.v.slice(s![b, h, part.keys.clone(), ..]))
    }

    /// Causal attention of some runs of tokens, each to itself.
    fn diagonal(&self, runs: &[Range<usize>], output: &mut Array3<f32>, log_sum_exp: &mut Array2<f32>) {
        let mut shares = vec![];
        for (head, (mut output, mut lse)) in output.outer_iter_mut().zip(log_sum_exp.outer_iter_mut()).enumerate() {
            for run in runs {
                for first in (0..run.len()).step_by(exact::QUERIES) {
                    let count = exact::QUERIES.min(run.len() - first);
                    let (some, some_lse);
                    (some, output) = output.split_at(Axis(0), count);
                    (some_lse, lse) = lse.split_at(Axis(0), count);
                    shares.push((head, run.clone(), first, some, some_lse));
                }
            }
        }
        on_all_threads(shares, |(head, run, first, output, lse)| {
            let run = Part { head, queries: run.clone(), keys: run, samples: ArrayView1::from(&[]) };
            let hidden = Hidden { visible: Visible { causal: true, ..Visible::default() }, batch: 0, first };
            let q = self.queries(&run).slice_move(s![first..first + lse.len(), ..]);
            let (k, v) = self.keys(&run);
            exact::attend(q, k, v, self.scale, &hidden, output, lse);
        });
    }
}

/// Two parts of a softmax, of other keys each, as one.
fn merge(mut output: ArrayViewMut1<f32>, lse: &mut f32, more: ArrayView1<f32>, more_lse: f32) {
    let most = lse.max(more_lse);
    if more_lse == f32::NEG_INFINITY {
        return;
    }
    let (own, other) = ((*lse - most).exp(), (more_lse - most).exp());
    let (sum, own, other) = (own + other, own / (own + other), other / (own + other));
    output.zip_mut_with(&more, |output, more| *output = *output * own + more * other);
    *lse = most + sum.ln();
}
