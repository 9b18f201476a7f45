//! Attention whose keys are codewords, and its queries, too, if wanted: time and memory that grow with the tokens and not
//! with their square (VQ attention; Transformer-VQ).
//!
//! Scores depend on a key's code alone, so all keys of a code are one: their number n and the mean of their values, whose
//! weight is exp(score + ln n). What comes out is exact attention over the quantised keys, up to rounding.

use ndarray::{Array2, Array3, Array4, ArrayView1, ArrayView2, ArrayView4, ArrayViewMut1, ArrayViewMut2, Axis, s};

use super::codebook::Codebook;
use super::softmax::{Running, take};
use super::{Attended, Visible, check};
use crate::error::{Error, Result};
use crate::linalg::{in_pool, on_all_threads, product_into};

/// What is left of keys and values that were seen: for each code their number and the mean of the values.
#[derive(Debug, Clone, PartialEq)]
pub struct Past {
    /// `[batch, heads, codes]`
    pub counts: Array3<f32>,
    /// `[batch, heads, codes, value dim]`; zeros where the count is 0.
    pub means: Array4<f32>,
}

impl Past {
    /// Of nothing.
    pub fn new(batch: usize, heads: usize, codes: usize, value_dim: usize) -> Self {
        Past { counts: Array3::zeros((batch, heads, codes)), means: Array4::zeros((batch, heads, codes, value_dim)) }
    }
}

/// How queries meet codewords.
#[derive(Debug, Clone, Copy)]
pub struct Quantized<'a> {
    /// Codewords of keys, of as many heads as the keys have.
    pub keys: &'a Codebook,
    /// Codewords of queries, of as many heads as the queries have; without, queries are taken as they are.
    pub queries: Option<&'a Codebook>,
    /// What products are multiplied with.
    pub scale: f32,
    /// Tokens that a causal attention takes at a time: within them keys are met one by one, behind them by their codes.
    pub block_len: usize,
}

impl Quantized<'_> {
    /// Attention of queries to all visible keys. The outputs of a query code are computed once where queries are quantised.
    ///
    /// # Errors
    /// As [`super::exact`], when codebooks do not fit, and for a causal attention or one over documents, which are
    /// [`Quantized::causal`]'s and nobody's.
    pub fn all(
        &self,
        q: ArrayView4<f32>,
        k: ArrayView4<f32>,
        v: ArrayView4<f32>,
        visible: &Visible,
    ) -> Result<Attended> {
        let sizes = check(q, k, v, visible)?;
        self.check(q, k)?;
        if visible.causal || visible.segments.is_some() {
            let found = if visible.causal { "causal" } else { "segments" };
            return Err(Error::expected(
                "visible keys of an attention by codes",
                found,
                "all keys, or those of a mask",
            ));
        }
        let mut past = Past::new(sizes.batch, k.dim().1, self.keys.codes(), sizes.value_dim);
        let words = self.keys.codewords();
        for b in 0..sizes.batch {
            let codes = self.keys.assign(k.slice(s![b, .., .., ..]))?;
            let there = visible.keys.map(|there| there.index_axis_move(Axis(0), b));
            for h in 0..k.dim().1 {
                let (counts, means) = (past.counts.slice_mut(s![b, h, ..]), past.means.slice_mut(s![b, h, .., ..]));
                add(counts, means, codes.row(h), v.slice(s![b, h, .., ..]), there);
            }
        }
        let asked = self.queries.map(Codebook::codewords);
        self.over_heads(q, sizes.value_dim, |b, h, q, mut output, mut lse| {
            let shared = h / sizes.shared;
            let (counts, means) = (past.counts.slice(s![b, shared, ..]), past.means.slice(s![b, shared, .., ..]));
            let behind = Behind { words: words.slice(s![shared, .., ..]), counts, means, scale: self.scale };
            let (Some(asked), Some(book)) = (&asked, self.queries) else {
                return by_codes(q, &behind, output, lse);
            };
            // One output for each code of queries.
            let asked = asked.slice(s![h, .., ..]);
            let mut table = Array2::zeros((book.codes(), sizes.value_dim));
            let mut sums = ndarray::Array1::zeros(book.codes());
            by_codes(asked, &behind, table.view_mut(), sums.view_mut());
            let codes = book.codes_of(h, q);
            for ((mut output, lse), code) in output.rows_mut().into_iter().zip(&mut lse).zip(codes) {
                output.assign(&table.row(code as usize));
                *lse = sums[code as usize];
            }
        })
    }

    /// Attention of each query to the keys up to its own, and to the past: tokens that came before these, which are added
    /// to it. A long sequence can be given in pieces, or token by token, and comes out the same.
    ///
    /// # Errors
    /// As [`Quantized::all`]; and when queries are not as many as keys, or the past is of other sizes.
    pub fn causal(
        &self,
        q: ArrayView4<f32>,
        k: ArrayView4<f32>,
        v: ArrayView4<f32>,
        past: &mut Past,
    ) -> Result<Attended> {
        let sizes = check(q, k, v, &Visible { causal: true, ..Visible::default() })?;
        self.check(q, k)?;
        if sizes.queries != sizes.keys || self.block_len == 0 {
            let found = format!("{} queries, {} keys, block_len {}", sizes.queries, sizes.keys, self.block_len);
            return Err(Error::expected(
                "tokens of a causal attention",
                found,
                "a key for each query, in blocks of at least 1",
            ));
        }
        let (batch, heads, codes, value_dim) = past.means.dim();
        let expected = (sizes.batch, k.dim().1, self.keys.codes(), sizes.value_dim);
        if (batch, heads, codes, value_dim) != expected || past.counts.dim() != (batch, heads, codes) {
            let found = format!("means {:?}, counts {:?}", past.means.shape(), past.counts.shape());
            return Err(Error::expected(
                "sizes of the past",
                found,
                format!("[batch, heads, codes, value dim] {expected:?}"),
            ));
        }
        let words = self.keys.codewords();
        let mut codes = Array3::zeros((batch, heads, sizes.keys));
        for b in 0..batch {
            codes.slice_mut(s![b, .., ..]).assign(&self.keys.assign(k.slice(s![b, .., .., ..]))?);
        }
        let asked = self.queries.map(Codebook::codewords);
        // What each share of a head's tokens finds behind it: shares are then independent of each other.
        let share = self.share(sizes.keys);
        let shares = sizes.keys.div_ceil(share);
        let mut behind: Vec<Past> = Vec::with_capacity(shares);
        for number in 0..shares {
            behind.push(past.clone());
            let tokens = number * share..sizes.keys.min((number + 1) * share);
            for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
                let (counts, means) = (past.counts.slice_mut(s![b, h, ..]), past.means.slice_mut(s![b, h, .., ..]));
                let codes = codes.slice(s![b, h, tokens.clone()]);
                add(counts, means, codes, v.slice(s![b, h, tokens.clone(), ..]), None);
            }
        }
        self.over_shares(q, sizes.value_dim, share, |b, h, first, q, mut output, mut lse| {
            let shared = h / sizes.shared;
            let behind = &behind[first / share];
            let mut counts = behind.counts.slice(s![b, shared, ..]).to_owned();
            let mut means = behind.means.slice(s![b, shared, .., ..]).to_owned();
            let words = words.slice(s![shared, .., ..]);
            let coded = match (&asked, self.queries) {
                (Some(asked), Some(book)) => Some(gathered(asked.slice(s![h, .., ..]), &book.codes_of(h, q))),
                _ => None,
            };
            let q = coded.as_ref().map_or(q, |coded| coded.view());
            for start in (0..q.nrows()).step_by(self.block_len) {
                let end = q.nrows().min(start + self.block_len);
                let codes = codes.slice(s![b, shared, first + start..first + end]);
                let v = v.slice(s![b, shared, first + start..first + end, ..]);
                let near = gathered(words, &codes.to_vec());
                let (mut output, mut lse) = (output.slice_mut(s![start..end, ..]), lse.slice_mut(s![start..end]));
                let q = q.slice(s![start..end, ..]);
                let mut running = vec![Running::default(); end - start];
                let behind = Behind { words, counts: counts.view(), means: means.view(), scale: self.scale };
                behind_by_codes(q, &behind, output.view_mut(), &mut running);
                within(q, near.view(), v, self.scale, output.view_mut(), &mut running);
                finish(&running, output.view_mut(), lse.view_mut());
                add(counts.view_mut(), means.view_mut(), codes, v, None);
            }
        })
    }

    fn check(&self, q: ArrayView4<f32>, k: ArrayView4<f32>) -> Result<()> {
        let fits = |what: &str, book: &Codebook, of: ArrayView4<f32>| match (book.heads(), book.dim())
            == (of.dim().1, of.dim().3)
        {
            true => Ok(()),
            false => Err(Error::expected(
                format!("codewords of {what}"),
                format!("{} heads of length {}", book.heads(), book.dim()),
                format!("{} heads of length {}", of.dim().1, of.dim().3),
            )),
        };
        fits("keys", self.keys, k)?;
        if !self.scale.is_finite() {
            return Err(Error::expected("scale of the scores", self.scale, "a finite number"));
        }
        self.queries.map_or(Ok(()), |book| fits("queries", book, q))
    }

    /// Tokens that a task has: some blocks, and so many that what they find behind them is worth its memory.
    fn share(&self, tokens: usize) -> usize {
        let shares = 2 * rayon::current_num_threads();
        tokens.div_ceil(shares).max(self.keys.codes()).next_multiple_of(self.block_len).max(1)
    }

    fn over_heads(
        &self,
        q: ArrayView4<f32>,
        value_dim: usize,
        work: impl Fn(usize, usize, ArrayView2<f32>, ArrayViewMut2<f32>, ArrayViewMut1<f32>) + Sync,
    ) -> Result<Attended> {
        let share = q.dim().2.max(1);
        self.over_shares(q, value_dim, share, |b, h, _, q, output, lse| work(b, h, q, output, lse))
    }

    /// `work` for each head's share of queries, given batch, head and first query, on all threads.
    fn over_shares(
        &self,
        q: ArrayView4<f32>,
        value_dim: usize,
        share: usize,
        work: impl Fn(usize, usize, usize, ArrayView2<f32>, ArrayViewMut2<f32>, ArrayViewMut1<f32>) + Sync,
    ) -> Result<Attended> {
        let (batch, heads, queries, _) = q.dim();
        let mut output = Array3::zeros((batch * heads, queries, value_dim));
        let mut log_sum_exp = Array2::from_elem((batch * heads, queries), f32::NEG_INFINITY);
        let tasks = super::tasks(&mut output, &mut log_sum_exp, share);
        in_pool(|| {
            on_all_threads(tasks, |(head, first, output, lse)| {
                let (b, h) = (head / heads, head % heads);
                work(b, h, first, q.slice(s![b, h, first..first + lse.len(), ..]), output, lse);
            });
        });
        super::attended(output, log_sum_exp, (batch, heads))
    }
}

/// Adds values of some codes to their means.
fn add(
    mut counts: ArrayViewMut1<f32>,
    mut means: ArrayViewMut2<f32>,
    codes: ArrayView1<u32>,
    values: ArrayView2<f32>,
    there: Option<ArrayView1<bool>>,
) {
    for (i, (&code, value)) in codes.iter().zip(values.rows()).enumerate() {
        if there.is_some_and(|there| !there[i]) {
            continue;
        }
        let count = &mut counts[code as usize];
        *count += 1.0;
        let share = 1.0 / *count;
        means.row_mut(code as usize).zip_mut_with(&value, |mean, value| *mean += (value - *mean) * share);
    }
}

fn gathered(words: ArrayView2<f32>, codes: &[u32]) -> Array2<f32> {
    let mut rows = Array2::zeros((codes.len(), words.ncols()));
    rows.rows_mut().into_iter().zip(codes).for_each(|(mut row, &code)| row.assign(&words.row(code as usize)));
    rows
}

/// Keys by their codes: codewords, and the number of keys and the mean of the values of each.
struct Behind<'a> {
    words: ArrayView2<'a, f32>,
    counts: ArrayView1<'a, f32>,
    means: ArrayView2<'a, f32>,
    scale: f32,
}

/// All of a query's attention, where codes are all there is.
fn by_codes(q: ArrayView2<f32>, behind: &Behind, mut output: ArrayViewMut2<f32>, mut lse: ArrayViewMut1<f32>) {
    const ROWS: usize = 128;
    for start in (0..q.nrows()).step_by(ROWS) {
        let end = q.nrows().min(start + ROWS);
        let mut running = vec![Running::default(); end - start];
        let mut output = output.slice_mut(s![start..end, ..]);
        behind_by_codes(q.slice(s![start..end, ..]), behind, output.view_mut(), &mut running);
        finish(&running, output.view_mut(), lse.slice_mut(s![start..end]));
    }
}

/// The part of what is behind, by its codes; those that no key has are left out, however large their scores are.
fn behind_by_codes(q: ArrayView2<f32>, behind: &Behind, mut output: ArrayViewMut2<f32>, running: &mut [Running]) {
    let Behind { words, counts, means, scale } = behind;
    if counts.iter().all(|count| *count == 0.0) {
        return;
    }
    let logs = counts.mapv(f32::ln);
    let mut scores = Array2::zeros((q.nrows(), words.nrows()));
    product_into(scores.view_mut(), q, words.reversed_axes(), *scale, false);
    for ((mut row, running), mut output) in scores.rows_mut().into_iter().zip(running).zip(output.rows_mut()) {
        row += &logs;
        let before = take(running, row.as_slice_mut().expect("rows of an owned array are contiguous"));
        output *= before;
    }
    product_into(output.view_mut(), scores.view(), *means, 1.0, true);
}

/// The part of a block's own keys, one by one, up to each query's.
fn within(
    q: ArrayView2<f32>,
    k: ArrayView2<f32>,
    v: ArrayView2<f32>,
    scale: f32,
    mut output: ArrayViewMut2<f32>,
    running: &mut [Running],
) {
    let mut scores = Array2::zeros((q.nrows(), k.nrows()));
    product_into(scores.view_mut(), q, k.reversed_axes(), scale, false);
    for (i, ((mut row, running), mut output)) in
        scores.rows_mut().into_iter().zip(running).zip(output.rows_mut()).enumerate()
    {
        row.slice_mut(s![i + 1..]).fill(f32::NEG_INFINITY);
        let before = take(running, row.as_slice_mut().expect("rows of an owned array are contiguous"));
        output *= before;
    }
    product_into(output.view_mut(), scores.view(), v, 1.0, true);
}

fn finish(running: &[Running], mut output: ArrayViewMut2<f32>, mut lse: ArrayViewMut1<f32>) {
    for ((running, mut output), lse) in running.iter().zip(output.rows_mut()).zip(&mut lse) {
        if running.sum > 0.0 {
            output /= running.sum;
        }
        *lse = running.log_sum_exp();
    }
}
