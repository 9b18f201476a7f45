//! Products of several packed matrices with the same inputs, which are laid out and rounded once.

use std::ptr::null_mut;

use ndarray::{ArrayViewMut2, ShapeBuilder};

use super::activations::ActivationFormat;
use super::inputs::Inputs;
use super::isa::best;
use super::layout::Plan;
use super::packed::PackedRows;
use super::products::{kind, packed_products};
use crate::linalg::share;

/// Multiply-adds below which one thread does everything.
const PARALLEL_FROM: usize = 1 << 17;

/// Parts of the work for each thread, so that one that is late holds nobody up.
const SHARES: usize = 4;

/// Rows of a part are a multiple of this: tiles have four.
const STEP: usize = 16;

/// Returns how the rows of a matrix lie in the registers of this computer's best device; `None` where no layout fits its groups.
pub fn plan(packed: &PackedRows) -> Option<Plan> {
    packed.plan(best().lanes())
}

/// Inputs in the orders that matrices call for, each order made once. Its memory serves one product after another.
#[derive(Debug, Default)]
pub struct SharedInputs {
    laid: Vec<(Order, Inputs)>,
    /// How many of these are of the current inputs.
    current: usize,
}

/// What inputs are laid out for.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Order {
    group: usize,
    halves: usize,
    activations: ActivationFormat,
}

/// One matrix and its part of the outputs.
pub struct FusedProduct<'a> {
    /// The weights.
    pub packed: PackedRows<'a>,
    /// Their plan, for the [best](super::best) device.
    pub plan: &'a Plan,
    /// What inputs are rounded to.
    pub activations: ActivationFormat,
    /// `[inputs, rows]`.
    pub y: &'a mut [f32],
}

/// What is done beside products, in so many parts.
pub type Beside<'a> = (usize, &'a (dyn Fn(usize) + Sync));

impl SharedInputs {
    /// Returns the place of the inputs in an order, where they are put if they are not there.
    fn place(&mut self, x: &[f32], plan: &Plan, activations: ActivationFormat) -> usize {
        let order = Order { group: plan.layout.group, halves: plan.layout.halves, activations };
        if let Some(place) = self.laid[..self.current].iter().position(|(found, _)| *found == order) {
            return place;
        }
        let place = self.current;
        if place == self.laid.len() {
            self.laid.push((order, Inputs::default()));
        }
        self.laid[place].0 = order;
        self.laid[place].1.lay(x, &plan.layout, activations);
        self.current += 1;
        place
    }
}

/// Matrices that are multiplied at once.
pub const MOST_FUSED: usize = 4;

/// Writes `x · Ŵᵀ` of each matrix for `x` `[inputs, columns]`, on all threads, and has parts of other work done beside.
///
/// # Panics
/// When the matrices are not equally wide, or an output has another length.
pub fn fused_products(
    x: &[f32],
    products: &mut [Option<FusedProduct>; MOST_FUSED],
    inputs: &mut SharedInputs,
    beside: Beside,
) {
    inputs.current = 0;
    let columns = products.iter().flatten().map(|product| product.packed.columns()).next().unwrap_or(0);
    let batch = x.len().checked_div(columns).unwrap_or(0);
    let (mut places, mut targets, mut all_rows) = ([0; MOST_FUSED], [Target(null_mut()); MOST_FUSED], 0);
    for (number, product) in products.iter_mut().enumerate() {
        let Some(product) = product else { continue };
        let rows = product.packed.rows();
        assert!(product.packed.columns() == columns && product.y.len() == batch * rows, "shapes of fused products");
        places[number] = inputs.place(x, product.plan, product.activations);
        targets[number] = Target(product.y.as_mut_ptr());
        all_rows += rows;
    }
    let threads = if all_rows * columns * batch < PARALLEL_FROM { 1 } else { rayon::current_num_threads() };
    let step = match threads {
        1 => all_rows.max(1),
        _ => all_rows.div_ceil(SHARES * threads).next_multiple_of(STEP),
    };
    let (isa, inputs, products) = (best(), &*inputs, &*products);
    let parts_of = |product: &FusedProduct| if batch == 0 { 0 } else { product.packed.rows().div_ceil(step) };
    let run = |part: usize| {
        // What lies beside comes first: small parts make a better end.
        let Some(mut part) = part.checked_sub(beside.0) else { return beside.1(part) };
        for ((product, target), &place) in products.iter().zip(&targets).zip(&places) {
            let Some(product) = product else { continue };
            let parts = parts_of(product);
            if part >= parts {
                part -= parts;
                continue;
            }
            let all = product.packed.rows();
            let rows = part * step..all.min((part + 1) * step);
            let (order, inputs) = &inputs.laid[place];
            let kind = kind(order.activations);
            let m = product.packed.for_kind(product.plan, kind);
            let shape = (batch, rows.len()).strides((all, 1));
            // SAFETY: columns of an output that no other part writes, of numbers that have been borrowed as a whole.
            let mut y = unsafe { ArrayViewMut2::from_shape_ptr(shape, target.0.add(rows.start)) };
            return packed_products(isa, &m, inputs, kind, rows, &mut y);
        }
    };
    let parts = beside.0 + products.iter().flatten().map(parts_of).sum::<usize>();
    match threads {
        1 => (0..parts).for_each(run),
        _ => share(parts, run),
    }
}

/// Where a matrix's outputs begin.
#[derive(Clone, Copy)]
struct Target(*mut f32);

// SAFETY: threads write to parts of their own.
unsafe impl Sync for Target {}
