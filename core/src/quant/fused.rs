//! Forward passes of several packed matrices with the same inputs.

use std::sync::{Mutex, PoisonError};

use ndarray::{Array1, Array2, ArrayView2};

use super::packed::PackedMatrix;
use crate::kernels::{ActivationFormat, FusedProduct, MOST_FUSED, Plan, SharedInputs, fused_products, plan};

/// What is added to the product of a packed weight.
pub trait Correction: Sync {
    /// Returns it for `x` `[batch, columns]`: `[batch, rows]`.
    fn of(&self, x: ArrayView2<f32>) -> Array2<f32>;
}

/// A forward pass that is a product with a packed weight and what is added to it, and nothing else.
pub struct PackedForward<'a> {
    /// The weight.
    pub weight: &'a PackedMatrix,
    /// What inputs are rounded to.
    pub activations: ActivationFormat,
    /// What is added beside the bias.
    pub correction: Option<&'a dyn Correction>,
    /// `[rows]`.
    pub bias: Option<&'a Array1<f32>>,
}

impl PackedForward<'_> {
    /// Returns how the weight's rows lie in registers; `None` where kernels do not read them as they are.
    pub fn plan(&self) -> Option<Plan> {
        plan(&self.weight.packed_rows()?)
    }
}

/// Writes the outputs `[batch, rows]` of each pass for `x` `[batch, columns]`, of [`MOST_FUSED`] passes at most.
///
/// # Panics
/// When there are more, a plan is not the weight's, or weights are not equally wide.
pub fn forward_packed(
    x: &[f32],
    passes: &[Option<(PackedForward, &Plan)>; MOST_FUSED],
    outputs: &mut [&mut Vec<f32>],
    inputs: &mut SharedInputs,
) {
    let mut products = [const { None }; MOST_FUSED];
    let columns = passes.iter().flatten().map(|(pass, _)| pass.weight.ncols()).next().unwrap_or(0);
    let batch = x.len().checked_div(columns).unwrap_or(0);
    for ((pass, y), product) in passes.iter().zip(outputs.iter_mut()).zip(&mut products) {
        let Some((pass, plan)) = pass else { continue };
        let packed = pass.weight.packed_rows().expect("a matrix that has a plan");
        y.resize(batch * packed.rows(), 0.0);
        *product = Some(FusedProduct { packed, plan, activations: pass.activations, y });
    }
    let found = [const { Mutex::new(None) }; MOST_FUSED];
    let beside = |place: usize| {
        if let Some(correction) = passes[place].as_ref().and_then(|(pass, _)| pass.correction) {
            let x = ArrayView2::from_shape((batch, columns), x).expect("whole rows");
            *found[place].lock().unwrap_or_else(PoisonError::into_inner) = Some(correction.of(x));
        }
    };
    let is_corrected = |pass: &Option<(PackedForward, &Plan)>| pass.as_ref().is_some_and(|p| p.0.correction.is_some());
    let corrected = passes.iter().rposition(is_corrected).map_or(0, |last| last + 1);
    fused_products(x, &mut products, inputs, (corrected, &beside));
    for ((pass, y), found) in passes.iter().zip(outputs).zip(found) {
        if let Some(found) = found.into_inner().unwrap_or_else(PoisonError::into_inner) {
            y.iter_mut().zip(&found).for_each(|(y, more): (_, &f32)| *y += more);
        }
        if let Some(bias) = pass.as_ref().and_then(|(pass, _)| pass.bias) {
            for row in y.chunks_exact_mut(bias.len().max(1)) {
                row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
            }
        }
    }
}
