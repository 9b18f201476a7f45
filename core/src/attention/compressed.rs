//! Attention to keys by their codes: all keys of a code count as one.

use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, s};

use super::softmax::{OnlineSoftmax, accumulate, accumulate_scores, finish, scratch_tile};

/// Queries of a tile.
const TILE_QUERIES: usize = 128;

/// Keys of one head by their codes. A code of n keys weighs exp(score + ln n).
#[derive(Clone, Copy)]
pub(super) struct CompressedKeys<'a> {
    /// `[codes, dim]`
    pub codewords: ArrayView2<'a, f32>,
    /// Number of keys of each code `[codes]`.
    pub counts: ArrayView1<'a, f32>,
    /// Mean value of each code's keys `[codes, value dim]`.
    pub means: ArrayView2<'a, f32>,
    /// Factor of the products.
    pub scale: f32,
}

/// Scores of queries by their own codes.
#[derive(Clone, Copy)]
pub(super) struct ScoreTable<'a> {
    /// Scores of every query codeword with every key codeword `[query codes, key codes]`.
    pub scores: &'a Array2<f32>,
    /// Codes of the queries.
    pub codes: &'a [u32],
}

impl CompressedKeys<'_> {
    /// Computes the whole attention of queries `[queries, dim]` that see nothing but these keys.
    pub fn attend(&self, q: ArrayView2<f32>, mut output: ArrayViewMut2<f32>, mut log_sum_exp: ArrayViewMut1<f32>) {
        let mut scratch = vec![];
        for start in (0..q.nrows()).step_by(TILE_QUERIES) {
            let end = q.nrows().min(start + TILE_QUERIES);
            let mut softmax = vec![OnlineSoftmax::default(); end - start];
            let mut output = output.slice_mut(s![start..end, ..]);
            self.accumulate(q.slice(s![start..end, ..]), None, &mut scratch, output.view_mut(), &mut softmax);
            finish(&softmax, output.view_mut(), log_sum_exp.slice_mut(s![start..end]));
        }
    }

    /// Adds the keys to the softmaxes of a tile of queries. Codes that no key has are left out, however large their scores are.
    ///
    /// With `table` scores are looked up instead of computed.
    pub fn accumulate(
        &self,
        q: ArrayView2<f32>,
        table: Option<ScoreTable>,
        scratch: &mut Vec<f32>,
        output: ArrayViewMut2<f32>,
        softmax: &mut [OnlineSoftmax],
    ) {
        if self.counts.iter().all(|count| *count == 0.0) {
            return;
        }
        let log_counts = self.counts.mapv(f32::ln);
        let mut scores = scratch_tile(scratch, q.nrows(), self.codewords.nrows());
        match table {
            Some(table) => {
                let log_counts = log_counts.as_slice().expect("fresh arrays are contiguous");
                for (mut row, &code) in scores.rows_mut().into_iter().zip(table.codes) {
                    let row = row.as_slice_mut().expect("rows of a tile are contiguous");
                    let known = table.scores.row(code as usize);
                    add_into(row, known.to_slice().expect("rows of an owned array are contiguous"), log_counts);
                }
                accumulate_scores(scores, self.means, output, softmax);
            }
            None => {
                let keys = (q, self.codewords, self.means);
                accumulate(keys, self.scale, scores, |scores| *scores += &log_counts, output, softmax);
            }
        }
    }
}

/// Writes a + b.
#[inline(always)]
fn add_into(out: &mut [f32], a: &[f32], b: &[f32]) {
    let (a, b) = (&a[..out.len()], &b[..out.len()]);
    for i in 0..out.len() {
        out[i] = a[i] + b[i];
    }
}
