//! Inputs laid out as the kernels meet a row's codes.

use bytemuck::{Pod, Zeroable};
use ndarray::ArrayView2;
use rayon::prelude::*;

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

/// The scales of a block: `count` groups from `first` on; lane i's is the `places[i]`th of them.
#[derive(Debug, Clone, Copy)]
pub struct Block {
    pub first: usize,
    pub count: usize,
    pub places: [u32; 16],
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

/// Adding and subtracting it rounds to the nearest whole number, ties to even.
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

    pub fn blocks(&self) -> Vec<Block> {
        let block = |start: usize| {
            let group_of = |lane: usize| (start + lane * self.lane_codes()).min(self.columns - 1) / self.group;
            let first = group_of(0);
            let places = std::array::from_fn(|lane| (group_of(lane.min(self.lanes - 1)) - first) as u32);
            Block { first, count: group_of(self.lanes - 1) - first + 1, places }
        };
        (0..self.block_count()).map(|i| block(i * self.block_codes())).collect()
    }
}

impl Inputs {
    /// As floats: within a block, the codes `step` of all lanes lie side by side.
    pub fn floats(x: ArrayView2<f32>, layout: &Layout) -> Self {
        Self::laid_out(x, layout, |row, target: &mut [f32]| {
            let (codes, lanes) = (layout.lane_codes(), layout.lanes);
            for (from, to) in row.chunks(layout.block_codes()).zip(target.chunks_mut(layout.block_codes())) {
                for (lane, from) in from.chunks(codes).enumerate() {
                    from.iter().enumerate().for_each(|(step, &value)| to[step * lanes + lane] = value);
                }
            }
            (1.0, group_sums(row, layout))
        })
    }

    /// As signed bytes, times a scale of the row's own: within a block a register for each of a lane's halves, whose
    /// bytes are in the order of the codes.
    pub fn bytes(x: ArrayView2<f32>, layout: &Layout) -> Self {
        Self::laid_out(x, layout, |row, target: &mut [i8]| {
            let (codes, lanes, halves) = (layout.lane_codes(), layout.lanes, layout.halves);
            let (scale, rounded) = rounded(row);
            for (from, to) in rounded.chunks(layout.block_codes()).zip(target.chunks_mut(layout.block_codes())) {
                for (lane, from) in from.chunks(codes).enumerate() {
                    for (code, &value) in from.iter().enumerate() {
                        to[(code % halves) * 4 * lanes + 4 * lane + code / halves] = value as i8;
                    }
                }
            }
            (scale, group_sums(&rounded, layout))
        })
    }

    /// `fill` lays one row out and gives its scale and the sums of its groups.
    fn laid_out<T: Pod + Send + Sync>(
        x: ArrayView2<f32>,
        layout: &Layout,
        fill: impl Fn(&[f32], &mut [T]) -> (f32, Vec<f32>) + Sync,
    ) -> Self {
        let batch = x.nrows();
        let x = x.as_standard_layout();
        let x = x.as_slice().expect("standard layout");
        let stride = (layout.block_count() * layout.block_codes() * size_of::<T>()).div_ceil(64);
        let sum_stride = layout.groups().next_multiple_of(16);
        let mut lines = vec![Line([0; 64]); batch * stride];
        let row = |(row, target): (&[f32], &mut [Line])| fill(row, bytemuck::cast_slice_mut(target));
        let rows = (layout.columns.max(1), stride.max(1));
        let filled: Vec<(f32, Vec<f32>)> = if x.len() >= PARALLEL_FROM && batch > 1 {
            x.par_chunks(rows.0).zip(lines.par_chunks_mut(rows.1)).map(row).collect()
        } else {
            x.chunks(rows.0).zip(lines.chunks_mut(rows.1)).map(row).collect()
        };
        let mut sums = vec![0f32; batch * sum_stride];
        for (target, (_, row)) in sums.chunks_mut(sum_stride.max(1)).zip(&filled) {
            target[..row.len()].copy_from_slice(row);
        }
        let scales = filled.into_iter().map(|(scale, _)| scale).collect();
        Inputs { lines, stride, sums, sum_stride, scales }
    }

    pub fn rows(&self) -> usize {
        self.scales.len()
    }

    /// A row's numbers, `T` being what it was laid out as.
    pub fn row<T: Pod>(&self, row: usize) -> &[T] {
        bytemuck::cast_slice(&self.lines[row * self.stride..(row + 1) * self.stride])
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

fn group_sums(row: &[f32], layout: &Layout) -> Vec<f32> {
    row.chunks(layout.group).map(|group| group.iter().sum()).collect()
}

/// Whole numbers −128 … 127 and the scale that they are multiplied with: LQER-Qwix's, `max|x| / 127.5`, so that no
/// number is further off than half a step.
pub fn rounded(row: &[f32]) -> (f32, Vec<f32>) {
    let most = row.iter().fold(0f32, |most, v| most.max(v.abs()));
    let scale = most * (1.0 / 127.5);
    let scale = if scale < f32::MIN_POSITIVE.sqrt() { 1.0 } else { scale };
    let reciprocal = 1.0 / scale;
    let round = |v: &f32| ((v * reciprocal).clamp(-128.0, 127.0) + TO_WHOLE) - TO_WHOLE;
    (scale, row.iter().map(round).collect())
}
