//! Attention whose keys are codewords, and its queries, too, if wanted: time and memory that grow with the tokens and not
//! with their square (VQ attention; Transformer-VQ).
//!
//! Scores depend on a key's code alone, so all keys of a code are one: their number n and the mean of their values, whose
//! weight is exp(score + ln n). What comes out is exact attention over the quantised keys, up to rounding.

use ndarray::{
    Array2, Array3, ArrayView1, ArrayView2, ArrayView3, ArrayView4, ArrayViewMut1, ArrayViewMut2, Axis, Zip,
    concatenate, s,
};

use super::codebook::Codebook;
use super::past::{Past, add};
use super::softmax::{Running, add_keys, add_scored, finish, tile};
use super::{Attended, Visible, check};
use crate::error::{Error, Result};
use crate::linalg::require_finite;
use crate::linalg::{in_pool, large_zeros, matmul, on_all_threads, product_into};

/// Scores of positions, added to those of contents (Transformer-XL; Transformer-VQ): query i and key j have
/// scale · (⟨qᵢ + u, kⱼ⟩ + ⟨qᵢ + w, r₍ᵢ₋ⱼ₎⟩), without the last product where i − j is more than `mem_len`.
#[derive(Debug, Clone, Copy)]
pub struct RelativeBias<'a> {
    /// `[heads, dim]`
    pub u: ArrayView2<'a, f32>,
    /// `[heads, dim]`
    pub w: ArrayView2<'a, f32>,
    /// `[heads, mem_len + 1, dim]`, by the distance.
    pub r: ArrayView3<'a, f32>,
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
    /// Tokens that a causal attention takes at a time: within them, and for `mem_len` tokens before them, keys are met one by
    /// one, behind that by their codes.
    pub block_len: usize,
    pub mem_len: usize,
    /// Whether a causal attention meets keys behind that window at all.
    pub agg_cache: bool,
    /// Scores of positions, of a causal attention.
    pub bias: Option<RelativeBias<'a>>,
}

impl<'a> Quantized<'a> {
    /// Without scores of positions, and with nothing left out.
    pub fn new(keys: &'a Codebook, queries: Option<&'a Codebook>, scale: f32, block_len: usize) -> Self {
        Quantized { keys, queries, scale, block_len, mem_len: 0, agg_cache: true, bias: None }
    }
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
        if visible.causal || visible.segments.is_some() || self.bias.is_some() {
            let found = match (visible.causal, self.bias) {
                (true, _) => "causal",
                (_, Some(_)) => "scores of positions",
                _ => "segments",
            };
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
        let (batch, heads) = (sizes.batch, k.dim().1);
        past.check((batch, heads, self.keys.codes(), sizes.value_dim))?;
        let words = self.keys.codewords();
        let before = past.recent_codes.dim().2;
        // Tokens are counted from the first that the past still has by itself.
        let mut codes = Array3::zeros((batch, heads, before + sizes.keys));
        codes.slice_mut(s![.., .., ..before]).assign(&past.recent_codes);
        for b in 0..batch {
            let found = self.keys.assign(k.slice(s![b, .., .., ..]))?;
            codes.slice_mut(s![b, .., before..]).assign(&found);
        }
        let joined = (before > 0).then(|| concatenate![Axis(2), past.recent_values, v]);
        let v = joined.as_ref().map_or(v, |joined| joined.view());
        let asked = self.queries.map(Codebook::codewords);
        // What each share of a head's tokens finds behind it: shares are then independent of each other.
        let share = self.share(sizes.keys);
        let mut behind: Vec<Past> = Vec::with_capacity(sizes.keys.div_ceil(share));
        let mut added = 0;
        for first in (0..sizes.keys).step_by(share) {
            let near = (before + first).saturating_sub(self.mem_len).max(added);
            past.add(codes.view(), v, added..near);
            added = near;
            behind.push(past.clone());
        }
        let found = self.over_shares(q, sizes.value_dim, share, |b, h, first, q, mut output, mut lse| {
            let shared = h / sizes.shared;
            let behind = &behind[first / share];
            let mut counts = behind.counts.slice(s![b, shared, ..]).to_owned();
            let mut means = behind.means.slice(s![b, shared, .., ..]).to_owned();
            let words = words.slice(s![shared, .., ..]);
            let of_queries = self.queries.map(|book| book.codes_of(h, q));
            let coded = match (&asked, &of_queries) {
                (Some(asked), Some(of_queries)) => Some(gathered(asked.slice(s![h, .., ..]), of_queries)),
                _ => None,
            };
            let q = coded.as_ref().map_or(q, |coded| coded.view());
            // Of all pairs of codewords, where that is less than of all queries.
            let table = asked.as_ref().filter(|asked| self.bias.is_none() && asked.dim().1 <= q.nrows()).map(|asked| {
                let mut table = Array2::zeros((asked.dim().1, words.nrows()));
                let asked = asked.slice(s![h, .., ..]);
                product_into(table.view_mut(), asked, words.reversed_axes(), self.scale, false);
                table
            });
            let mut room = vec![];
            let mut added = (before + first).saturating_sub(self.mem_len);
            for start in (0..q.nrows()).step_by(self.block_len) {
                let end = q.nrows().min(start + self.block_len);
                let query = before + first + start;
                let tokens = query.saturating_sub(self.mem_len)..before + first + end;
                let (of, values) = (codes.slice(s![b, shared, ..]), v.slice(s![b, shared, .., ..]));
                let gone = added..tokens.start;
                let (of_gone, values_gone) = (of.slice(s![gone.clone()]), values.slice(s![gone, ..]));
                add(counts.view_mut(), means.view_mut(), of_gone, values_gone, None);
                added = tokens.start;
                let q = q.slice(s![start..end, ..]);
                let with_u = self.bias.map(|bias| &q + &bias.u.row(h));
                let content = with_u.as_ref().map_or(q, |q| q.view());
                let (mut output, lse) = (output.slice_mut(s![start..end, ..]), lse.slice_mut(s![start..end]));
                let mut running = vec![Running::default(); end - start];
                if self.agg_cache {
                    let behind = Behind { words, counts: counts.view(), means: means.view(), scale: self.scale };
                    let known = table.as_ref().zip(of_queries.as_ref().map(|codes| &codes[start..end]));
                    behind_by_codes(content, known, &behind, &mut room, output.view_mut(), &mut running);
                }
                let near = gathered(words, &of.slice(s![tokens.clone()]).to_vec());
                let positions = self.bias.map(|bias| {
                    let with_w = &q + &bias.w.row(h);
                    matmul(with_w.view(), bias.r.slice(s![h, .., ..]).reversed_axes()) * self.scale
                });
                let near = Near {
                    keys: near.view(),
                    values: values.slice(s![tokens.clone(), ..]),
                    before: query - tokens.start,
                    positions,
                };
                near.within(content, self.scale, &mut room, output.view_mut(), &mut running);
                finish(&running, output, lse);
            }
        });
        let all = before + sizes.keys;
        let near = all.saturating_sub(self.mem_len).max(added);
        past.add(codes.view(), v, added..near);
        past.keep(codes.view(), v, near..all);
        found
    }

    pub(super) fn check(&self, q: ArrayView4<f32>, k: ArrayView4<f32>) -> Result<()> {
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
        if let Some(bias) = self.bias {
            let (_, heads, _, dim) = q.dim();
            let found = (bias.u.dim(), bias.w.dim(), bias.r.dim());
            let expected = ((heads, dim), (heads, dim), (heads, self.mem_len.saturating_add(1), dim));
            if found != expected {
                return Err(Error::expected("shapes of u, w and r", format!("{found:?}"), format!("{expected:?}")));
            }
            for (what, numbers) in [("u", bias.u.iter()), ("w", bias.w.iter())] {
                require_finite(what, numbers)?;
            }
            require_finite("r", bias.r.iter())?;
        }
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
        let mut output = large_zeros((batch * heads, queries, value_dim));
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

/// These rows.
pub(super) fn gathered(words: ArrayView2<f32>, codes: &[u32]) -> Array2<f32> {
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
    let mut room = vec![];
    for start in (0..q.nrows()).step_by(ROWS) {
        let end = q.nrows().min(start + ROWS);
        let mut running = vec![Running::default(); end - start];
        let mut output = output.slice_mut(s![start..end, ..]);
        behind_by_codes(q.slice(s![start..end, ..]), None, behind, &mut room, output.view_mut(), &mut running);
        finish(&running, output.view_mut(), lse.slice_mut(s![start..end]));
    }
}

/// The part of what is behind, by its codes; those that no key has are left out, however large their scores are.
///
/// With the scores of all pairs of codewords and the queries' codes, scores are looked up.
fn behind_by_codes(
    q: ArrayView2<f32>,
    known: Option<(&Array2<f32>, &[u32])>,
    behind: &Behind,
    room: &mut Vec<f32>,
    output: ArrayViewMut2<f32>,
    running: &mut [Running],
) {
    let Behind { words, counts, means, scale } = behind;
    if counts.iter().all(|count| *count == 0.0) {
        return;
    }
    let logs = counts.mapv(f32::ln);
    let mut scores = tile(room, q.nrows(), words.nrows());
    match known {
        Some((table, codes)) => {
            for (mut row, &code) in scores.rows_mut().into_iter().zip(codes) {
                Zip::from(&mut row)
                    .and(table.row(code as usize))
                    .and(&logs)
                    .for_each(|row, score, log| *row = score + log);
            }
            add_scored(scores, *means, output, running);
        }
        None => add_keys((q, *words, *means), *scale, scores, |scores| *scores += &logs, output, running),
    }
}

/// Keys that are met one by one.
struct Near<'a> {
    keys: ArrayView2<'a, f32>,
    values: ArrayView2<'a, f32>,
    /// How many of them come before the first query.
    before: usize,
    /// Scores of each query's distances.
    positions: Option<Array2<f32>>,
}

impl Near<'_> {
    /// Their part, up to each query's own.
    fn within(
        &self,
        q: ArrayView2<f32>,
        scale: f32,
        room: &mut Vec<f32>,
        output: ArrayViewMut2<f32>,
        running: &mut [Running],
    ) {
        let scores = tile(room, q.nrows(), self.keys.nrows());
        let change = |scores: &mut ArrayViewMut2<f32>| {
            for (i, mut row) in scores.rows_mut().into_iter().enumerate() {
                let own = self.before + i;
                row.slice_mut(s![own + 1..]).fill(f32::NEG_INFINITY);
                if let Some(positions) = &self.positions {
                    let positions = positions.row(i);
                    let nearest = row.slice_mut(s![(own + 1).saturating_sub(positions.len())..=own; -1]);
                    nearest.into_iter().zip(positions).for_each(|(score, position)| *score += position);
                }
            }
        };
        add_keys((q, self.keys, self.values), scale, scores, change, output, running);
    }
}
