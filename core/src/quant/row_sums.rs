//! Weighted sums of rows for a batch: what the rows share comes from a near cache.

use ndarray::{ArrayView1, ArrayViewMut2, Axis};
use rayon::prelude::*;

use crate::kernels::{Element, Line, accumulate, lines_of, sum_lines};

/// Bytes of rows that a batch's sums go over at a time: less than a core's second cache.
const NEAR_BYTES: usize = 512 << 10;

/// Floats of a cache line.
const LINE: usize = 16;

/// Lines that stay in the nearest cache while sums are taken of them.
const NEAREST_BYTES: usize = 40 << 10;

/// Adds `Σ weight · row` to each row of `y`, some columns of all of them at a time, on all threads.
pub fn by_columns<T: Element>(rows: &[T], sparse: &[Vec<(u32, f32)>], mut y: ArrayViewMut2<f32>) {
    let width = y.ncols();
    let blocks = std::mem::size_of_val(rows).div_ceil(NEAR_BYTES).max(1);
    let blocks = blocks.next_multiple_of(rayon::current_num_threads());
    let columns = width.div_ceil(blocks).next_multiple_of(LINE).max(4 * LINE);
    let blocks: Vec<_> = y.axis_chunks_iter_mut(Axis(1), columns).enumerate().collect();
    blocks.into_par_iter().for_each(|(block, mut y)| in_columns(rows, width, block * columns, sparse, &mut y));
}

/// Adds `Σ weight · row` to each row of `y`: the columns of `rows` of `width` from `start` on, as many as `y` has.
pub fn in_columns<T: Element>(
    rows: &[T],
    width: usize,
    start: usize,
    sparse: &[Vec<(u32, f32)>],
    y: &mut ArrayViewMut2<f32>,
) {
    let count = rows.len().checked_div(width).unwrap_or(0);
    let used: usize = sparse.iter().map(Vec::len).sum();
    // Where rows are used again and again, their lines are laid side by side in the nearest cache.
    if used >= 2 * count && count * size_of::<Line>() <= NEAREST_BYTES {
        return by_lines(rows, width, start, sparse, y);
    }
    let mut sum = vec![0f32; y.ncols()];
    for (mut y, sparse) in y.rows_mut().into_iter().zip(sparse) {
        sum.fill(0.0);
        accumulate(rows, width, start, sparse, &mut sum);
        y += &ArrayView1::from(&sum);
    }
}

/// The columns of `rows` from `start` on, as many as `y` has, sixteen at a time.
fn by_lines<T: Element>(
    rows: &[T],
    width: usize,
    start: usize,
    sparse: &[Vec<(u32, f32)>],
    y: &mut ArrayViewMut2<f32>,
) {
    let mut lines = vec![Line([0.0; LINE]); rows.len() / width];
    assert!(sparse.iter().flatten().all(|&(row, _)| (row as usize) < lines.len()), "a row that is not there");
    let mut sums = vec![Line([0.0; LINE]); sparse.len()];
    for (number, mut y) in y.axis_chunks_iter_mut(Axis(1), LINE).enumerate() {
        lines_of(rows, width, start + number * LINE, &mut lines);
        // SAFETY: there are as many lines as rows, and a sum for each list of sparse.
        unsafe { sum_lines(&lines, sparse, &mut sums) };
        for (mut y, sum) in y.rows_mut().into_iter().zip(&sums) {
            let y = y.as_slice_mut().expect("rows of a standard layout");
            y.iter_mut().zip(&sum.0).for_each(|(y, sum)| *y += sum);
        }
    }
}
