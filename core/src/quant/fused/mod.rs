//! Products with packed weights, straight from their codes: `x · Ŵᵀ`, and Ŵ is never in memory.
//!
//! The stored rows are what the kernels read: it is the inputs that are brought into the order in which a register's lanes
//! meet the codes. One algorithm (`tile`) is compiled for each instruction set (`lanes`, `avx2`, `avx512`); the
//! reference is [`PackedMatrix::dequantize`] and a plain product.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod inputs;
mod lanes;
mod tile;

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use half::{bf16, f16};
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut2, Axis, s};
use serde::{Deserialize, Serialize};

use self::inputs::{Inputs, Layout, rounded};
use self::lanes::{Coding, Lanes, Portable};
use self::tile::{Kind, Rows};
use super::format::WeightType;
use super::kernels::{Element, dots};
use super::packed::PackedMatrix;
use super::quantizer::NORMAL_FLOAT;
use crate::linalg::{in_pool, on_all_threads, product_into};

/// What inputs are rounded to before they meet the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activations {
    /// Nothing.
    #[default]
    F32,
    /// Whole numbers −128 … 127, each input row with a scale of its own, `max|x| / 127.5` (LQER-Qwix): no number is off
    /// by more than 1/255 of the row's largest. NF4's levels become 127ths of the scale with it, off by at most 1/254
    /// of it.
    Int8,
    /// Whole numbers −127 … 127, each input row with a scale of its own, `max|x| / 127`, of sizes from 1e-5 to 1e9
    /// (BitNet b1.58, Keras-MML): no number is off by more than 1/254 of the row's largest.
    #[serde(rename = "int8_absmax")]
    Int8Absmax,
}

impl Activations {
    /// Whether inputs become whole numbers.
    pub fn rounds(self) -> bool {
        self != Activations::F32
    }

    /// The whole numbers that a row becomes, and the scale that they are multiplied with.
    pub fn whole(self, row: &[f32]) -> Option<(f32, Vec<i8>)> {
        self.rounds().then(|| rounded(row, self))
    }
}

/// An instruction set that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

/// Multiply-adds below which one thread does everything: the others would not be awake in time.
const PARALLEL_FROM: usize = 1 << 21;

/// Inputs from which on all of the work is done in the pool.
const IN_POOL_FROM: usize = 4;

/// Parts of the work for each thread, so that one that is late holds nobody up.
const SHARES: usize = 16;

/// From this many inputs on, rows become floats once for all of them.
const EXPAND_FROM: usize = 12;

/// Rows that are floats at a time: a few hundred KiB of most layers.
const EXPANDED_ROWS: usize = 32;

/// Rows of f16 and bf16 numbers become floats for as many inputs.
const WIDEN_FROM: usize = 4;

/// Adds some rows' products to their columns of the outputs.
type Part<'a> = dyn Fn(Range<usize>, &mut ArrayViewMut2<f32>) + Sync + 'a;

impl Machine {
    /// The fastest that this machine has.
    fn best() -> Machine {
        #[cfg(target_arch = "x86_64")]
        {
            if avx512::available() {
                return Machine::Avx512;
            }
            if avx2::available() {
                return Machine::Avx2;
            }
        }
        Machine::Portable
    }

    fn lanes(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Machine::Avx512 => avx512::Avx512::LANES,
            #[cfg(target_arch = "x86_64")]
            Machine::Avx2 => avx2::Avx2::LANES,
            Machine::Portable => Portable::LANES,
        }
    }

    /// # Safety
    /// As [`tile::products`].
    unsafe fn products(self, m: &Rows, x: &Inputs, kind: Kind, rows: Range<usize>, out: &mut [f32]) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Machine::Avx512 => products_avx512(m, x, kind, rows, out),
                #[cfg(target_arch = "x86_64")]
                Machine::Avx2 => products_avx2(m, x, kind, rows, out),
                Machine::Portable => tile::products::<Portable>(m, x, kind, rows, out),
            }
        }
    }

    /// # Safety
    /// As [`tile::expand`].
    unsafe fn expand(self, m: &Rows, rows: Range<usize>, stride: usize, out: &mut [f32]) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Machine::Avx512 => expand_avx512(m, rows, stride, out),
                #[cfg(target_arch = "x86_64")]
                Machine::Avx2 => expand_avx2(m, rows, stride, out),
                Machine::Portable => tile::expand::<Portable>(m, rows, stride, out),
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi,gfni")]
unsafe fn products_avx512(m: &Rows, x: &Inputs, kind: Kind, rows: Range<usize>, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe { tile::products::<avx512::Avx512>(m, x, kind, rows, out) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi2")]
unsafe fn products_avx2(m: &Rows, x: &Inputs, kind: Kind, rows: Range<usize>, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe { tile::products::<avx2::Avx2>(m, x, kind, rows, out) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi,gfni")]
unsafe fn expand_avx512(m: &Rows, rows: Range<usize>, stride: usize, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe { tile::expand::<avx512::Avx512>(m, rows, stride, out) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi2")]
unsafe fn expand_avx2(m: &Rows, rows: Range<usize>, stride: usize, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe { tile::expand::<avx2::Avx2>(m, rows, stride, out) }
}

impl PackedMatrix {
    /// `x · Ŵᵀ` for `x` `[batch, columns]`: `[batch, rows]`.
    ///
    /// # Panics
    /// When the width of `x` is another.
    pub fn products(&self, x: ArrayView2<f32>, activations: Activations) -> Array2<f32> {
        self.products_beside(x, activations, || ()).0
    }

    /// [`PackedMatrix::products`], and what one of the threads can do beside them.
    pub fn products_beside<T: Send>(
        &self,
        x: ArrayView2<f32>,
        activations: Activations,
        beside: impl FnOnce() -> T + Send,
    ) -> (Array2<f32>, T) {
        let shared = self.rows * self.columns * x.nrows() >= PARALLEL_FROM;
        let run = || self.products_on(Machine::best(), x, activations, shared, beside);
        // For a few inputs, waking a thread to do this one's part takes longer than it saves.
        if shared && x.nrows() >= IN_POOL_FROM { in_pool(run) } else { run() }
    }

    /// Threads share the rows, and what is to be done beside.
    fn products_on<T: Send>(
        &self,
        machine: Machine,
        x: ArrayView2<f32>,
        activations: Activations,
        shared: bool,
        beside: impl FnOnce() -> T + Send,
    ) -> (Array2<f32>, T) {
        assert_eq!(x.ncols(), self.columns, "width of the inputs");
        let mut y = Array2::zeros((x.nrows(), self.rows));
        if y.is_empty() {
            return (y, beside());
        }
        let scaled = (!self.column_scales.is_empty()).then(|| &x * &ArrayView1::from(&self.column_scales));
        let part = self.part(machine, scaled.as_ref().map_or(x, |x| x.view()), activations);
        if !shared {
            part(0..self.rows, &mut y.view_mut());
            return (y, beside());
        }
        let share = self.rows.div_ceil(SHARES * rayon::current_num_threads()).next_multiple_of(EXPANDED_ROWS);
        let rows = y.axis_chunks_iter_mut(Axis(1), share).enumerate();
        let (beside, found) = (Mutex::new(Some(beside)), Mutex::new(None));
        // What lies beside comes first: small parts make a better end.
        let parts = std::iter::once(None).chain(rows.map(Some)).collect();
        on_all_threads(parts, |rows: Option<(usize, ArrayViewMut2<f32>)>| match rows {
            Some((number, mut y)) => part(number * share..number * share + y.ncols(), &mut y),
            None => {
                let beside = beside.lock().unwrap_or_else(PoisonError::into_inner).take();
                let done = beside.map(|beside| beside());
                *found.lock().unwrap_or_else(PoisonError::into_inner) = done;
            }
        });
        let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        (y, found.expect("one of the threads has done its part"))
    }

    /// The products with these inputs, for any of the rows.
    fn part<'a>(&'a self, machine: Machine, x: ArrayView2<'a, f32>, activations: Activations) -> Box<Part<'a>> {
        match self.format.weight_type {
            WeightType::F16 => return Box::new(move |rows, y| self.halves::<f16>(x, rows, y)),
            WeightType::Bf16 => return Box::new(move |rows, y| self.halves::<bf16>(x, rows, y)),
            _ => {}
        }
        let groups = self.scales.len().checked_div(self.rows).unwrap_or(0).max(1);
        let bits = self.format.weight_type.bits();
        let layout = Layout::new(self.columns, self.columns.div_ceil(groups), bits, machine.lanes());
        let Some(layout) = layout.filter(|_| self.columns > 0) else {
            let x = match activations {
                Activations::F32 => x.to_owned(),
                rounding => as_rounded(x, rounding),
            };
            return Box::new(move |rows, y| self.decoded(x.view(), rows, y));
        };
        let (kind, inputs) = match activations {
            Activations::F32 => (Kind::Floats, Inputs::floats(x, &layout)),
            rounding => (Kind::Bytes, Inputs::bytes(x, &layout, rounding)),
        };
        let row_bytes = self.format.weight_type.row_bytes(self.columns);
        let blocks = layout.blocks(row_bytes, layout.block_codes() * bits as usize / 8);
        Box::new(move |rows, y| {
            let m = self.as_rows(&layout, &blocks, kind);
            if kind == Kind::Floats && inputs.rows() >= EXPAND_FROM {
                expanded(machine, &m, &inputs, rows, y);
                return;
            }
            let mut found = vec![0f32; rows.len() * inputs.rows()];
            // SAFETY: the machine has its instructions; the fields' lengths were checked when the matrix was made.
            unsafe { machine.products(&m, &inputs, kind, rows.clone(), &mut found) };
            for (mut y, found) in y.rows_mut().into_iter().zip(found.chunks(rows.len())) {
                y += &ArrayView1::from(found);
            }
        })
    }

    fn as_rows<'a>(&'a self, layout: &Layout, blocks: &'a inputs::Blocks, kind: Kind) -> Rows<'a> {
        let bits = self.format.weight_type.bits();
        let half = 1u8 << (bits - 1);
        let (levels, flip, zero, factor) = match (self.format.weight_type, kind) {
            (WeightType::Nf4, Kind::Floats) => (Some(&NORMAL_FLOAT), 0, 0.0, 1.0),
            (WeightType::Nf4, Kind::Bytes) => (Some(&NORMAL_FLOAT), 0, 128.0, 1.0 / 127.0),
            (WeightType::Ternary, _) => (None, 0, 1.0, 1.0),
            _ if self.format.has_zeros() => (None, 0, 0.0, 1.0),
            _ => (None, half, f32::from(half), 1.0),
        };
        Rows {
            packed: &self.packed,
            row_bytes: self.format.weight_type.row_bytes(self.columns),
            block_bytes: layout.block_codes() * bits as usize / 8,
            halves: layout.halves,
            coding: Coding { bits, flip, levels },
            scales: &self.scales,
            factor,
            zeros: &self.zeros,
            zero,
            groups: layout.groups(),
            blocks,
        }
    }

    /// By way of the numbers themselves, for groups that the kernels do not know.
    fn decoded(&self, x: ArrayView2<f32>, rows: Range<usize>, y: &mut ArrayViewMut2<f32>) {
        let mut block = Array2::zeros((EXPANDED_ROWS.min(rows.len()), self.columns));
        for start in (0..rows.len()).step_by(EXPANDED_ROWS) {
            let count = EXPANDED_ROWS.min(rows.len() - start);
            for row in 0..count {
                let mut target = block.row_mut(row);
                let target = target.as_slice_mut().expect("rows of an owned array are contiguous");
                self.decode(rows.start + start + row, target);
            }
            let y = y.slice_mut(s![.., start..start + count]);
            product_into(y, x, block.slice(s![..count, ..]).reversed_axes(), 1.0, true);
        }
    }

    /// For weights that are f16 or bf16 numbers.
    fn halves<T: Element + bytemuck::Pod>(&self, x: ArrayView2<f32>, rows: Range<usize>, y: &mut ArrayViewMut2<f32>) {
        let all = bytemuck::try_cast_slice::<u8, T>(&self.packed);
        let (Ok(all), true) = (all, x.nrows() < WIDEN_FROM) else { return self.decoded(x, rows, y) };
        let numbers = &all[rows.start * self.columns..rows.end * self.columns];
        let mut found = vec![0f32; rows.len()];
        for (x, mut y) in x.axis_iter(Axis(0)).zip(y.rows_mut()) {
            let x = x.as_standard_layout();
            dots(numbers, x.as_slice().expect("standard layout"), &mut found);
            y += &ArrayView1::from(&found);
        }
    }
}

/// Inputs as they are after rounding.
fn as_rounded(x: ArrayView2<f32>, activations: Activations) -> Array2<f32> {
    let mut all = Array2::zeros(x.dim());
    for (from, mut to) in x.rows().into_iter().zip(all.rows_mut()) {
        let (scale, whole) = rounded(&from.to_vec(), activations);
        to.iter_mut().zip(&whole).for_each(|(to, &whole)| *to = f32::from(whole) * scale);
    }
    all
}

/// Some rows at a time become floats, in the order of the inputs, and are multiplied as such.
fn expanded(machine: Machine, m: &Rows, inputs: &Inputs, rows: Range<usize>, y: &mut ArrayViewMut2<f32>) {
    let x = inputs.all();
    let stride = x.ncols();
    let mut block = Array2::zeros((EXPANDED_ROWS.min(rows.len()), stride));
    for start in (0..rows.len()).step_by(EXPANDED_ROWS) {
        let count = EXPANDED_ROWS.min(rows.len() - start);
        let some = rows.start + start..rows.start + start + count;
        // SAFETY: the machine has its instructions; the fields' lengths were checked when the matrix was made.
        unsafe { machine.expand(m, some, stride, block.as_slice_mut().expect("owned")) };
        let y = y.slice_mut(s![.., start..start + count]);
        product_into(y, x, block.slice(s![..count, ..]).reversed_axes(), 1.0, true);
    }
}

#[cfg(test)]
mod tests;
