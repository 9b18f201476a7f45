//! Inputs laid out as the kernels meet a row's codes.

use bytemuck::{Pod, Zeroable};
use ndarray::ArrayView2;
use rayon::prelude::*;

use super::Activations;

/// How a row's codes lie in registers.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    pub columns: usize,
    /// Columns that share a scale.
    pub group: usize,
    /// Lanes of a register.
    pub lanes: usize,
    /// Registers of bytes that a block's codes fill, each byte of a lane in another.
    pub halves: usize,
}

/// Where a block's scales are: lane i's is the `i`th number's in its window.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub struct Places(pub [u32; 16]);

/// Blocks that follow each other and have their scales among the same groups, no more than a register holds.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// The first group.
    pub first: usize,
    /// Groups.
    pub count: usize,
    pub blocks: usize,
    /// Bytes of a row's codes in each block: fewer than a block's in a row's last one, which is then by itself.
    pub bytes: usize,
}

/// All blocks of a row.
#[derive(Debug)]
pub struct Blocks {
    pub places: Vec<Places>,
    pub windows: Vec<Window>,
}

/// A cache line, so that a register's loads never cross one.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A matrix of inputs, each row in the order of the kernels and filled up with zeros.
#[derive(Debug)]
pub struct Inputs {
    lines: Vec<Line>,
    /// Lines of a row.
    stride: usize,
    /// The sum of each group's inputs, in `sum_stride` floats a row.
    sums: Vec<f32>,
    pub sum_stride: usize,
    /// What a row's numbers are multiplied with.
    pub scales: Vec<f32>,
}

/// Rows from which on they are laid out by several threads.
const PARALLEL_FROM: usize = 1 << 16;

/// Adding it rounds to the nearest whole number, ties to even.
const TO_WHOLE: f32 = 12_582_912.0;

impl Layout {
    /// None if the lanes of a register do not each belong to one group.
    pub fn new(columns: usize, group: usize, bits: u32, lanes: usize) -> Option<Self> {
        let preferred = match bits {
            2 => 4,
            4 => 2,
            _ => 1,
        };
        let fits = |halves: usize| group >= columns || group.is_multiple_of(4 * halves);
        let halves = [preferred, 1].into_iter().find(|&halves| fits(halves))?;
        Some(Layout { columns, group: group.max(1), lanes, halves })
    }

    /// Codes of a lane.
    pub fn lane_codes(&self) -> usize {
        4 * self.halves
    }

    /// Codes of a block.
    pub fn block_codes(&self) -> usize {
        self.lanes * self.lane_codes()
    }

    pub fn block_count(&self) -> usize {
        self.columns.div_ceil(self.block_codes())
    }

    pub fn groups(&self) -> usize {
        self.columns.div_ceil(self.group)
    }

    /// The blocks of rows of so many bytes.
    pub fn blocks(&self, row_bytes: usize, block_bytes: usize) -> Blocks {
        let group_of = |code: usize| code.min(self.columns - 1) / self.group;
        let mut all = Blocks { places: vec![], windows: vec![] };
        for number in 0..self.block_count() {
            let lane =
                |lane: usize| group_of(number * self.block_codes() + lane.min(self.lanes - 1) * self.lane_codes());
            let bytes = (row_bytes - number * block_bytes).min(block_bytes);
            let window = match all.windows.last_mut() {
                Some(last) if lane(self.lanes) < last.first + self.lanes && bytes == last.bytes => last,
                _ => {
                    let first = lane(0);
                    let count = (self.groups() - first).min(self.lanes);
                    all.windows.push(Window { first, count, blocks: 0, bytes });
                    all.windows.last_mut().expect("just put there")
                }
            };
            window.blocks += 1;
            let first = window.first;
            all.places.push(Places(std::array::from_fn(|i| (lane(i) - first) as u32)));
        }
        all
    }
}

impl Inputs {
    /// As floats: within a block, the codes `step` of all lanes lie side by side.
    pub fn floats(x: ArrayView2<f32>, layout: &Layout) -> Self {
        Self::laid_out(x, layout, |row, target, sums| {
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") {
                // SAFETY: the feature is there.
                return unsafe { lay_floats_avx2(layout, row, target, sums) };
            }
            lay_floats(layout, row, target, sums)
        })
    }

    /// As signed bytes, times a scale of the row's own: within a block a register for each of a lane's halves, whose
    /// bytes are in the order of the codes.
    pub fn bytes(x: ArrayView2<f32>, layout: &Layout, activations: Activations) -> Self {
        Self::laid_out(x, layout, |row, target, sums| {
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") {
                // SAFETY: the feature is there.
                return unsafe { lay_bytes_avx2(layout, row, activations, target, sums) };
            }
            lay_bytes(layout, row, activations, target, sums)
        })
    }

    /// `fill` lays one row out, sums up its groups, and gives its scale.
    fn laid_out<T: Pod + Send + Sync>(
        x: ArrayView2<f32>,
        layout: &Layout,
        fill: impl Fn(&[f32], &mut [T], &mut [f32]) -> f32 + Sync,
    ) -> Self {
        let batch = x.nrows();
        let x = x.as_standard_layout();
        let x = x.as_slice().expect("standard layout");
        let stride = (layout.block_count() * layout.block_codes() * size_of::<T>()).div_ceil(64);
        let sum_stride = layout.groups().next_multiple_of(16);
        let (mut lines, mut sums) = (vec![Line([0; 64]); batch * stride], vec![0f32; batch * sum_stride]);
        let (row, line) = (layout.columns.max(1), stride.max(1));
        let one = |((row, target), sums): ((&[f32], &mut [Line]), &mut [f32])| {
            fill(row, bytemuck::cast_slice_mut(target), sums)
        };
        let scales = if x.len() >= PARALLEL_FROM && batch > 1 {
            let rows = x.par_chunks(row).zip(lines.par_chunks_mut(line));
            rows.zip(sums.par_chunks_mut(sum_stride.max(1))).map(one).collect()
        } else {
            x.chunks(row).zip(lines.chunks_mut(line)).zip(sums.chunks_mut(sum_stride.max(1))).map(one).collect()
        };
        Inputs { lines, stride, sums, sum_stride, scales }
    }

    pub fn rows(&self) -> usize {
        self.scales.len()
    }

    /// A row's first number, `T` being what it was laid out as.
    pub fn first<T: Pod>(&self, row: usize) -> *const T {
        self.lines[row * self.stride..].as_ptr().cast()
    }

    /// Numbers from one row's first to the next row's.
    pub fn stride<T: Pod>(&self) -> usize {
        self.stride * size_of::<Line>() / size_of::<T>()
    }

    /// All rows, laid out as floats; what a row is filled up with is 0.
    pub fn all(&self) -> ArrayView2<'_, f32> {
        let floats = bytemuck::cast_slice(&self.lines);
        ArrayView2::from_shape((self.rows(), 16 * self.stride), floats).expect("a stride of lines for each row")
    }

    /// The sums of a row's groups.
    pub fn sums(&self, row: usize) -> &[f32] {
        &self.sums[row * self.sum_stride..(row + 1) * self.sum_stride]
    }
}

/// The same, compiled for wider registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn lay_floats_avx2(layout: &Layout, row: &[f32], target: &mut [f32], sums: &mut [f32]) -> f32 {
    lay_floats(layout, row, target, sums)
}

#[inline(always)]
fn lay_floats(layout: &Layout, row: &[f32], target: &mut [f32], sums: &mut [f32]) -> f32 {
    let (codes, lanes) = (layout.lane_codes(), layout.lanes);
    for (from, to) in row.chunks(layout.block_codes()).zip(target.chunks_mut(layout.block_codes())) {
        for (lane, from) in from.chunks(codes).enumerate() {
            from.iter().enumerate().for_each(|(step, &value)| to[step * lanes + lane] = value);
        }
    }
    row.chunks(layout.group).zip(sums).for_each(|(group, to)| *to = sum(group));
    1.0
}

/// The same, compiled for wider registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn lay_bytes_avx2(layout: &Layout, row: &[f32], activations: Activations, target: &mut [i8], sums: &mut [f32]) -> f32 {
    lay_bytes(layout, row, activations, target, sums)
}

#[inline(always)]
fn lay_bytes(layout: &Layout, row: &[f32], activations: Activations, target: &mut [i8], sums: &mut [f32]) -> f32 {
    let (scale, rounded) = rounded(row, activations);
    let blocks = rounded.chunks(layout.block_codes()).zip(target.chunks_mut(layout.block_codes()));
    match layout.halves {
        1 => target[..rounded.len()].copy_from_slice(&rounded),
        2 => blocks.for_each(|(from, to)| parted::<2>(from, to)),
        _ => blocks.for_each(|(from, to)| parted::<4>(from, to)),
    }
    for (group, to) in rounded.chunks(layout.group).zip(sums) {
        *to = group.iter().map(|&v| i32::from(v)).sum::<i32>() as f32;
    }
    scale
}

/// Each `H`th byte together.
#[inline(always)]
fn parted<const H: usize>(from: &[i8], to: &mut [i8]) {
    let part = to.len() / H;
    for (half, to) in to.chunks_mut(part).enumerate() {
        to.iter_mut().zip(from.iter().skip(half).step_by(H)).for_each(|(to, from)| *to = *from);
    }
}

/// In sixteen running sums: one would wait for itself.
#[inline(always)]
fn sum(values: &[f32]) -> f32 {
    let (whole, rest) = values.as_chunks::<16>();
    let mut sums = [0f32; 16];
    for values in whole {
        sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    }
    sums.iter().sum::<f32>() + rest.iter().sum::<f32>()
}

/// Whole numbers −128 … 127 and the scale that they are multiplied with, as [`Activations`] says.
#[inline(always)]
pub fn rounded(row: &[f32], activations: Activations) -> (f32, Vec<i8>) {
    // Finite numbers are in the order of their bits, signs aside; and a maximum of integers needs no order of its own.
    let most = f32::from_bits(row.iter().fold(0, |most, v| (v.to_bits() & (u32::MAX >> 1)).max(most)));
    let (scale, reciprocal) = match activations {
        Activations::Int8Absmax => {
            let steps = 127.0 / most.clamp(1e-5, 1e9);
            (1.0 / steps, steps)
        }
        Activations::Int8 | Activations::F32 => {
            let scale = most * (1.0 / 127.5);
            let scale = if scale < f32::MIN_POSITIVE.sqrt() { 1.0 } else { scale };
            (scale, 1.0 / scale)
        }
    };
    // The sum's lowest bits are the number's.
    let round = |v: &f32| ((v * reciprocal).clamp(-128.0, 127.0) + TO_WHOLE).to_bits() as i8;
    (scale, row.iter().map(round).collect())
}
