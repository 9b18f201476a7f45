//! Arrays of any number of dimensions as rows of their last one and back, and layers that run on the last dimension.

use ndarray::{Array2, Array3, ArrayD, ArrayViewD, Ix3, IxDyn};

use crate::error::{Error, Result};
use crate::layer::{Accuracy, RmsNorm, SharedLayer};

/// Returns the error for an array whose length does not fit a shape.
pub fn shape_error(e: ndarray::ShapeError) -> Error {
    Error::Numeric(e.to_string())
}

/// Returns `x` `[…, features]` as `[rows, features]`.
///
/// # Errors
/// When `x` has no dimension.
pub fn flatten_rows(x: ArrayViewD<f32>) -> Result<Array2<f32>> {
    let Some(&features) = x.shape().last() else {
        return Err(Error::expected("input", "a number by itself", "[…, features]"));
    };
    let count = x.shape()[..x.ndim() - 1].iter().product();
    x.as_standard_layout().into_owned().into_shape_with_order((count, features)).map_err(shape_error)
}

/// Returns rows in the shape `like`, whose last dimension becomes the rows' length.
///
/// # Errors
/// When `like` has another number of rows.
pub fn unflatten_rows(rows: Array2<f32>, like: &[usize]) -> Result<ArrayD<f32>> {
    let mut shape = like.to_vec();
    if let Some(last) = shape.last_mut() {
        *last = rows.ncols();
    }
    rows.as_standard_layout().into_owned().into_shape_with_order(IxDyn(&shape)).map_err(shape_error)
}

/// Returns `x` as sequences `[batch, steps, features]`.
///
/// # Errors
/// When `x` has another number of dimensions.
pub fn as_sequences(x: ArrayViewD<f32>) -> Result<Array3<f32>> {
    let shape = format!("{:?}", x.shape());
    x.into_dimensionality::<Ix3>()
        .map(|x| x.as_standard_layout().into_owned())
        .map_err(|_| Error::expected("shape of the input", shape, "[batch, steps, features]"))
}

/// Checks that an input `[batch, …, features]` has a row for each position that a norm has gains for.
fn check_positions(shape: &[usize], positions: usize) -> Result<()> {
    let found: usize = shape.get(1..shape.len().saturating_sub(1)).unwrap_or_default().iter().product();
    match positions {
        1 => Ok(()),
        _ if found == positions && shape.len() > 2 => Ok(()),
        _ => Err(Error::expected(
            "shape of the input",
            format!("{shape:?}"),
            format!("[batch, …, features] with {positions} positions: the norm has a gain of its own for each"),
        )),
    }
}

/// Runs a linear layer on the last dimension of `x`.
///
/// # Errors
/// As [`Layer::forward`](crate::layer::Layer::forward), and when `x` has not the positions that the layer's norm is for.
pub fn forward_linear(layer: &SharedLayer, x: ArrayViewD<f32>, accuracy: Accuracy) -> Result<ArrayD<f32>> {
    check_positions(x.shape(), layer.positions())?;
    let y = layer.forward(flatten_rows(x.view())?.view(), accuracy)?.y;
    unflatten_rows(y, x.shape())
}

/// Normalises the last dimension of `x`.
///
/// # Errors
/// As [`RmsNorm::forward`], and when `x` has not the positions that the norm is for.
pub fn forward_norm(norm: &RmsNorm, x: ArrayD<f32>) -> Result<ArrayD<f32>> {
    check_positions(x.shape(), norm.positions())?;
    unflatten_rows(norm.forward(flatten_rows(x.view())?.view())?, x.shape())
}

/// Returns the layer as it is at one position of a sequence.
///
/// # Errors
/// As [`Layer::at_position`](crate::layer::Layer::at_position).
pub fn at_position(layer: &SharedLayer, position: usize) -> Result<SharedLayer> {
    Ok(layer.at_position(position)?.unwrap_or_else(|| layer.clone()))
}

/// Checks that a layer stands for a weight `[outputs, inputs]`.
///
/// # Errors
/// When it is no linear layer, or of another shape.
pub fn require_shape(what: &str, layer: &SharedLayer, outputs: usize, inputs: usize) -> Result<()> {
    if layer.require_linear().is_err() {
        return Err(Error::expected(what, format!("a {} layer", layer.method()), "a linear layer"));
    }
    let found = (layer.out_features(), layer.in_features());
    if found != (outputs, inputs) {
        let (found, expected) = (format!("{found:?}"), format!("({outputs}, {inputs})"));
        return Err(Error::expected(format!("shape of {what}, [out, in]"), found, expected));
    }
    Ok(())
}
