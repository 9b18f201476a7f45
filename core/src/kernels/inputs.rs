//! Inputs laid out as the kernels meet a row's codes.

use bytemuck::{Pod, Zeroable};
use ndarray::ArrayView2;

use super::activations::{ActivationFormat, round};
use super::layout::Layout;
use crate::linalg::share;

/// What the inputs of a product are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Floats.
    Floats,
    /// Whole numbers of 8 bits.
    Bytes,
}

/// A cache line, so that a register's loads never cross one.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A matrix of inputs, each row in the order of the kernels and filled up with zeros. Its memory serves one matrix after another.
#[derive(Debug, Default)]
pub struct Inputs {
    lines: Vec<Line>,
    /// Lines of a row.
    stride: usize,
    /// The sum of each group's inputs, in `sum_stride` floats a row.
    sums: Vec<f32>,
    sum_stride: usize,
    /// The number that a row's are multiplied with.
    scales: Vec<f32>,
    /// The sum of all of a row's whole numbers; 0 for floats.
    totals: Vec<i64>,
    /// The whole numbers, before they are laid out.
    whole: Vec<i8>,
}

/// Numbers from which on rows are laid out by several threads.
const PARALLEL_FROM: usize = 1 << 16;

impl Inputs {
    /// Lays rows `[rows, columns]` out as the numbers that the format makes of them.
    ///
    /// # Panics
    /// When there are not whole rows.
    pub fn lay(&mut self, x: &[f32], layout: &Layout, format: ActivationFormat) {
        match format {
            ActivationFormat::F32 => self.lay_out(x, layout, 0, |row, _, target, sums| {
                #[cfg(target_arch = "x86_64")]
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the feature is there.
                    return unsafe { lay_floats_avx2(layout, row, target, sums) };
                }
                lay_floats(layout, row, target, sums)
            }),
            rounding => self.lay_out(x, layout, layout.columns, |row, whole, target, sums| {
                #[cfg(target_arch = "x86_64")]
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the feature is there.
                    return unsafe { lay_bytes_avx2(layout, row, rounding, whole, target, sums) };
                }
                lay_bytes(layout, row, rounding, whole, target, sums)
            }),
        }
    }

    /// `fill` lays one row out, sums up its groups, and gives its scale and the sum of its whole numbers. Floats: within a block, the
    /// codes `step` of all lanes lie side by side. Bytes: within a block a register for each of a lane's halves, whose bytes are in
    /// the order of the codes.
    fn lay_out<T: Pod + Send + Sync>(
        &mut self,
        x: &[f32],
        layout: &Layout,
        whole: usize,
        fill: impl Fn(&[f32], &mut [i8], &mut [T], &mut [f32]) -> (f32, i64) + Sync,
    ) {
        let batch = x.len() / layout.columns.max(1);
        assert_eq!(x.len(), batch * layout.columns, "whole rows of inputs");
        self.stride = (layout.block_count() * layout.block_codes() * size_of::<T>()).div_ceil(64);
        self.sum_stride = layout.groups().next_multiple_of(16);
        self.lines.resize(batch * self.stride, Line([0; 64]));
        self.sums.resize(batch * self.sum_stride, 0.0);
        self.scales.resize(batch, 0.0);
        self.totals.resize(batch, 0);
        self.whole.resize(batch * whole, 0);
        let (row, line, sum_stride) = (layout.columns, self.stride, self.sum_stride);
        let place = Places {
            lines: self.lines.as_mut_ptr(),
            sums: self.sums.as_mut_ptr(),
            scales: self.scales.as_mut_ptr(),
            totals: self.totals.as_mut_ptr(),
            whole: self.whole.as_mut_ptr(),
        };
        let one = |i: usize| {
            let place = &place;
            // SAFETY: each row has its own part of everything, within what was made room for; each is laid out once.
            unsafe {
                let target = std::slice::from_raw_parts_mut(place.lines.add(i * line), line);
                let sums = std::slice::from_raw_parts_mut(place.sums.add(i * sum_stride), sum_stride);
                // What rows are filled up with has to be 0, and the rest is written.
                target.fill(Line([0; 64]));
                sums.fill(0.0);
                let bytes = std::slice::from_raw_parts_mut(place.whole.add(i * whole), whole);
                let (scale, total) = fill(&x[i * row..(i + 1) * row], bytes, bytemuck::cast_slice_mut(target), sums);
                *place.scales.add(i) = scale;
                *place.totals.add(i) = total;
            }
        };
        match x.len() >= PARALLEL_FROM && batch > 1 {
            true => share(batch, one),
            false => (0..batch).for_each(one),
        }
    }

    /// Returns how many inputs there are.
    #[inline(always)]
    pub fn rows(&self) -> usize {
        self.scales.len()
    }

    /// Returns where a row's first number is, `T` being what it was laid out as.
    #[inline(always)]
    pub fn first<T: Pod>(&self, row: usize) -> *const T {
        self.lines.as_ptr().wrapping_add(row * self.stride).cast()
    }

    /// Returns how many numbers lie from one row's first to the next row's.
    #[inline(always)]
    pub fn stride<T: Pod>(&self) -> usize {
        self.stride * size_of::<Line>() / size_of::<T>()
    }

    /// Returns where the sum of a row's first group is.
    #[inline(always)]
    pub fn first_sum(&self, row: usize) -> *const f32 {
        self.sums.as_ptr().wrapping_add(row * self.sum_stride)
    }

    /// Returns how many sums lie from one row's first to the next row's: whole registers of them.
    #[inline(always)]
    pub fn sum_stride(&self) -> usize {
        self.sum_stride
    }

    /// Returns the number that each row's are multiplied with.
    #[inline(always)]
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// Returns the sum of each row's whole numbers.
    #[inline(always)]
    pub fn totals(&self) -> &[i64] {
        &self.totals
    }

    /// Returns all rows, laid out as floats; what a row is filled up with is 0.
    pub fn all(&self) -> ArrayView2<'_, f32> {
        let floats = bytemuck::cast_slice(&self.lines);
        ArrayView2::from_shape((self.rows(), 16 * self.stride), floats).expect("a stride of lines for each row")
    }
}

/// Where all rows' parts are, for threads that lay out some of them each.
struct Places {
    lines: *mut Line,
    sums: *mut f32,
    scales: *mut f32,
    totals: *mut i64,
    whole: *mut i8,
}

// SAFETY: each row's parts are used by one thread.
unsafe impl Sync for Places {}

/// The same, compiled for wider registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn lay_floats_avx2(layout: &Layout, row: &[f32], target: &mut [f32], sums: &mut [f32]) -> (f32, i64) {
    lay_floats(layout, row, target, sums)
}

#[inline(always)]
fn lay_floats(layout: &Layout, row: &[f32], target: &mut [f32], sums: &mut [f32]) -> (f32, i64) {
    match layout.halves {
        1 => transposed::<4>(layout.lanes, row, target),
        2 => transposed::<8>(layout.lanes, row, target),
        _ => transposed::<16>(layout.lanes, row, target),
    }
    let (mut group, mut start) = (0, 0);
    while start < row.len() {
        let end = if row.len() - start < layout.group { row.len() } else { start + layout.group };
        sums[group] = sum(&row[start..end]);
        group += 1;
        start = end;
    }
    (1.0, 0)
}

/// Lane after lane of `CODES` numbers, a block at a time, so that those of the same place lie side by side.
#[inline(always)]
fn transposed<const CODES: usize>(lanes: usize, row: &[f32], target: &mut [f32]) {
    let (mut lane, mut start) = (0, 0);
    for some in row.as_chunks::<CODES>().0 {
        let target = &mut target[start + lane..start + lane + lanes * (CODES - 1) + 1];
        let mut step = 0;
        while step < CODES {
            target[step * lanes] = some[step];
            step += 1;
        }
        lane += 1;
        if lane == lanes {
            lane = 0;
            start += lanes * CODES;
        }
    }
    let rest = row.as_chunks::<CODES>().1;
    let mut step = 0;
    while step < rest.len() {
        target[start + lane + step * lanes] = rest[step];
        step += 1;
    }
}

/// The same, compiled for wider registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn lay_bytes_avx2(
    layout: &Layout,
    row: &[f32],
    format: ActivationFormat,
    whole: &mut [i8],
    target: &mut [i8],
    sums: &mut [f32],
) -> (f32, i64) {
    lay_bytes(layout, row, format, whole, target, sums)
}

#[inline(always)]
fn lay_bytes(
    layout: &Layout,
    row: &[f32],
    format: ActivationFormat,
    whole: &mut [i8],
    target: &mut [i8],
    sums: &mut [f32],
) -> (f32, i64) {
    let scale = round(row, format, whole);
    match layout.halves {
        1 => target[..whole.len()].copy_from_slice(whole),
        2 => parted::<2>(layout.block_codes(), whole, target),
        _ => parted::<4>(layout.block_codes(), whole, target),
    }
    let (mut group, mut start, mut all) = (0, 0, 0);
    while start < row.len() {
        let end = if row.len() - start < layout.group { row.len() } else { start + layout.group };
        let total = whole_sum(&whole[start..end]);
        sums[group] = total as f32;
        all += total;
        group += 1;
        start = end;
    }
    (scale, all)
}

/// Each `H`th byte of a block together.
#[inline(always)]
fn parted<const H: usize>(block: usize, from: &[i8], target: &mut [i8]) {
    let (part, mut start) = (block / H, 0);
    while start < from.len() {
        let end = if from.len() - start < block { from.len() } else { start + block };
        let (some, rest) = from[start..end].as_chunks::<H>();
        let target = &mut target[start..start + block];
        let mut half = 0;
        while half < H {
            let target = &mut target[half * part..(half + 1) * part];
            let mut i = 0;
            while i < some.len() && i < target.len() {
                target[i] = some[i][half];
                i += 1;
            }
            if half < rest.len() {
                target[some.len()] = rest[half];
            }
            half += 1;
        }
        start = end;
    }
}

/// Numbers whose sum of whole numbers of 8 bits fits 32 bits.
const WHOLE_SUM: usize = 1 << 20;

#[inline(always)]
fn whole_sum(numbers: &[i8]) -> i64 {
    let (mut all, mut i) = (0, 0);
    while i < numbers.len() {
        let end = if numbers.len() - i < WHOLE_SUM { numbers.len() } else { i + WHOLE_SUM };
        let mut some = 0i32;
        while i < end {
            some += i32::from(numbers[i]);
            i += 1;
        }
        all += i64::from(some);
    }
    all
}

/// In sixteen running sums: one would wait for itself.
#[inline(always)]
fn sum(values: &[f32]) -> f32 {
    let (whole, rest) = values.as_chunks::<16>();
    let (mut sums, mut number) = ([0f32; 16], 0);
    while number < whole.len() {
        let mut i = 0;
        while i < 16 {
            sums[i] += whole[number][i];
            i += 1;
        }
        number += 1;
    }
    // One by one, as the standard library's sums are.
    let (mut all, mut i) = (-0f32, 0);
    while i < 16 {
        all += sums[i];
        i += 1;
    }
    let mut last = -0f32;
    i = 0;
    while i < rest.len() {
        last += rest[i];
        i += 1;
    }
    all + last
}
