//! Products with packed weights, straight from their codes: `x · Ŵᵀ`, and Ŵ is never in memory.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut2, Axis, s};

use super::activations::{ActivationFormat, round};
use super::inputs::{Inputs, Kind};
use super::isa::{Isa, best};
use super::packed::{PackedRows, Rows, Weights};
use super::rows::{Element, dots};
use crate::linalg::{on_all_threads, product_into};

/// Multiply-adds below which one thread does everything: the others would not be awake in time.
const PARALLEL_FROM: usize = 1 << 21;

/// Parts of the work for each thread, so that one that is late holds nobody up.
const SHARES: usize = 16;

/// From this many inputs on, rows become floats once for all of them.
const EXPAND_FROM: usize = 12;

/// Rows that are floats at a time: a few hundred KiB of most layers.
const EXPANDED_ROWS: usize = 32;

/// Rows of f16 and bf16 numbers become floats for as many inputs.
const WIDEN_FROM: usize = 4;

/// Writes one row's numbers as floats.
pub type DecodeRow<'a> = dyn Fn(usize, &mut [f32]) + Sync + 'a;

/// A weight matrix `[rows, columns]` to take products with.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    rows: usize,
    columns: usize,
    weights: Weights<'a>,
    /// For rows that kernels do not read: the reference.
    decode: &'a DecodeRow<'a>,
}

/// Adds some rows' products to their columns of the outputs.
type Part<'a> = dyn Fn(Range<usize>, &mut ArrayViewMut2<f32>) + Sync + 'a;

impl<'a> Matrix<'a> {
    /// Describes a matrix; `decode` writes any of its rows as floats.
    ///
    /// # Panics
    /// When the weights are not of this shape.
    pub fn new((rows, columns): (usize, usize), weights: Weights<'a>, decode: &'a DecodeRow<'a>) -> Self {
        assert!(weights.fit(rows, columns), "weights of {rows} × {columns}");
        Matrix { rows, columns, weights, decode }
    }

    /// Returns `x · Ŵᵀ` `[batch, rows]` for `x` `[batch, columns]`, and what one of the threads did beside it.
    ///
    /// # Panics
    /// When the width of `x` is another.
    pub fn products_beside<T: Send>(
        &self,
        x: ArrayView2<f32>,
        activations: ActivationFormat,
        beside: impl FnOnce() -> T + Send,
    ) -> (Array2<f32>, T) {
        let shared = self.rows * self.columns * x.nrows() >= PARALLEL_FROM;
        self.products_on(best(), x, activations, shared, beside)
    }

    /// [`Matrix::products_beside`] with the kernels of one device, on all threads or on this one.
    ///
    /// # Panics
    /// When the width of `x` is another, or the device is not there.
    pub fn products_on<T: Send>(
        &self,
        isa: &dyn Isa,
        x: ArrayView2<f32>,
        activations: ActivationFormat,
        shared: bool,
        beside: impl FnOnce() -> T + Send,
    ) -> (Array2<f32>, T) {
        assert_eq!(x.ncols(), self.columns, "width of the inputs");
        assert!(isa.available(), "{} on this computer", isa.name());
        let mut y = Array2::zeros((x.nrows(), self.rows));
        if y.is_empty() {
            return (y, beside());
        }
        let part = self.part(isa, x, activations);
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

    /// Returns what computes the products with these inputs, for any of the rows.
    fn part<'b>(&'b self, isa: &'b dyn Isa, x: ArrayView2<'b, f32>, activations: ActivationFormat) -> Box<Part<'b>> {
        match self.weights {
            Weights::F16(numbers) => Box::new(move |rows, y| self.halves(numbers, x, rows, y)),
            Weights::Bf16(numbers) => Box::new(move |rows, y| self.halves(numbers, x, rows, y)),
            Weights::Packed(packed) => match packed_part(isa, packed, x, activations) {
                Some(part) => part,
                None => self.decoded_part(x, activations),
            },
            Weights::Other => self.decoded_part(x, activations),
        }
    }

    fn decoded_part<'b>(&'b self, x: ArrayView2<'b, f32>, activations: ActivationFormat) -> Box<Part<'b>> {
        if !activations.rounds() {
            return Box::new(move |rows, y| self.decoded(x, rows, y));
        }
        let x = rounded(x, activations);
        Box::new(move |rows, y| self.decoded(x.view(), rows, y))
    }

    /// By way of the numbers themselves.
    fn decoded(&self, x: ArrayView2<f32>, rows: Range<usize>, y: &mut ArrayViewMut2<f32>) {
        let mut block = Array2::zeros((EXPANDED_ROWS.min(rows.len()), self.columns));
        for start in (0..rows.len()).step_by(EXPANDED_ROWS) {
            let count = EXPANDED_ROWS.min(rows.len() - start);
            for row in 0..count {
                let mut target = block.row_mut(row);
                let target = target.as_slice_mut().expect("rows of an owned array are contiguous");
                (self.decode)(rows.start + start + row, target);
            }
            let y = y.slice_mut(s![.., start..start + count]);
            product_into(y, x, block.slice(s![..count, ..]).reversed_axes(), 1.0, true);
        }
    }

    /// For weights that are f16 or bf16 numbers.
    fn halves<T: Element>(&self, all: &[T], x: ArrayView2<f32>, rows: Range<usize>, y: &mut ArrayViewMut2<f32>) {
        if x.nrows() >= WIDEN_FROM {
            return self.decoded(x, rows, y);
        }
        let numbers = &all[rows.start * self.columns..rows.end * self.columns];
        let mut found = vec![0f32; rows.len()];
        for (x, mut y) in x.axis_iter(Axis(0)).zip(y.rows_mut()) {
            let x = x.as_standard_layout();
            dots(numbers, x.as_slice().expect("standard layout"), &mut found);
            y += &ArrayView1::from(&found);
        }
    }
}

/// Returns what computes products with packed codes; `None` for groups that no layout fits.
fn packed_part<'a>(
    isa: &'a dyn Isa,
    packed: PackedRows<'a>,
    x: ArrayView2<f32>,
    activations: ActivationFormat,
) -> Option<Box<Part<'a>>> {
    let plan = packed.plan(isa.lanes())?;
    let mut inputs = Inputs::default();
    inputs.lay(x.as_standard_layout().as_slice().expect("standard layout"), &plan.layout, activations);
    Some(Box::new(move |rows, y| {
        let m = packed.for_kind(&plan, kind(activations));
        packed_products(isa, &m, &inputs, kind(activations), rows, y);
    }))
}

/// Returns what inputs become.
pub(super) fn kind(activations: ActivationFormat) -> Kind {
    if activations.rounds() { Kind::Bytes } else { Kind::Floats }
}

/// Writes some rows' products with all inputs, of this kind, to their columns of the outputs `[inputs, rows]`.
pub(super) fn packed_products(
    isa: &dyn Isa,
    m: &Rows,
    inputs: &Inputs,
    kind: Kind,
    rows: Range<usize>,
    y: &mut ArrayViewMut2<f32>,
) {
    assert!(isa.available(), "{} on this computer", isa.name());
    assert!(y.dim() == (inputs.rows(), rows.len()) && y.strides()[1] == 1, "room for the products");
    if kind == Kind::Floats && inputs.rows() >= EXPAND_FROM {
        return expanded(isa, m, inputs, rows, y);
    }
    let stride = y.strides()[0] as usize;
    // SAFETY: the device is there; lengths were checked when the rows were described, and the outputs' above.
    unsafe { isa.products(m, inputs, kind, rows, y.as_mut_ptr(), stride) };
}

/// Some rows at a time become floats, in the order of the inputs, and are multiplied as such.
fn expanded(isa: &dyn Isa, m: &Rows, inputs: &Inputs, rows: Range<usize>, y: &mut ArrayViewMut2<f32>) {
    let x = inputs.all();
    let stride = x.ncols();
    let mut block = Array2::zeros((EXPANDED_ROWS.min(rows.len()), stride));
    for start in (0..rows.len()).step_by(EXPANDED_ROWS) {
        let count = EXPANDED_ROWS.min(rows.len() - start);
        let some = rows.start + start..rows.start + start + count;
        // SAFETY: as for products.
        unsafe { isa.expand(m, some, stride, block.as_slice_mut().expect("owned")) };
        let y = y.slice_mut(s![.., start..start + count]);
        product_into(y, x, block.slice(s![..count, ..]).reversed_axes(), 1.0, false);
    }
}

/// Returns inputs as they are after rounding.
pub fn rounded(x: ArrayView2<f32>, activations: ActivationFormat) -> Array2<f32> {
    let mut all = Array2::zeros(x.dim());
    let mut whole = vec![0; x.ncols()];
    for (from, mut to) in x.rows().into_iter().zip(all.rows_mut()) {
        let scale = round(&from.to_vec(), activations, &mut whole);
        to.iter_mut().zip(&whole).for_each(|(to, &whole)| *to = f32::from(whole) * scale);
    }
    all
}
