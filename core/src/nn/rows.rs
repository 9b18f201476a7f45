//! Arrays of any number of dimensions as rows of their last one, and back.

use ndarray::{Array2, Array3, ArrayD, ArrayViewD, Ix3, IxDyn};

use crate::error::{Error, Result};
use crate::layer::{Accuracy, SharedLayer};

fn shape_error(e: ndarray::ShapeError) -> Error {
    Error::Numeric(e.to_string())
}

/// `x` `[…, features]` as `[rows, features]`.
pub fn rows(x: ArrayViewD<f32>) -> Result<Array2<f32>> {
    let Some(&features) = x.shape().last() else {
        return Err(Error::expected("input", "a number by itself", "[…, features]"));
    };
    let count = x.shape()[..x.ndim() - 1].iter().product();
    x.as_standard_layout().into_owned().into_shape_with_order((count, features)).map_err(shape_error)
}

/// Rows in the shape that `like` has, but for its last dimension.
pub fn shaped(rows: Array2<f32>, like: &[usize]) -> Result<ArrayD<f32>> {
    let mut shape = like.to_vec();
    if let Some(last) = shape.last_mut() {
        *last = rows.ncols();
    }
    rows.as_standard_layout().into_owned().into_shape_with_order(IxDyn(&shape)).map_err(shape_error)
}

/// `x` as sequences `[batch, steps, features]`.
pub fn sequences(x: ArrayViewD<f32>) -> Result<Array3<f32>> {
    let shape = format!("{:?}", x.shape());
    x.into_dimensionality::<Ix3>()
        .map(|x| x.as_standard_layout().into_owned())
        .map_err(|_| Error::expected("shape of the input", shape, "[batch, steps, features]"))
}

/// That an input has a row for each of the positions that a gain is for, in each of the batch.
pub fn check_positions(shape: &[usize], positions: usize) -> Result<()> {
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

/// Runs a linear layer on the last dimension.
pub fn linear(layer: &SharedLayer, x: ArrayViewD<f32>, accuracy: Accuracy) -> Result<ArrayD<f32>> {
    check_positions(x.shape(), layer.positions())?;
    let y = layer.forward(rows(x.view())?.view(), accuracy)?.y;
    shaped(y, x.shape())
}

/// The layer as it is at one position of a sequence.
pub fn at_position(layer: &SharedLayer, position: usize) -> Result<SharedLayer> {
    Ok(layer.at_position(position)?.unwrap_or_else(|| layer.clone()))
}

/// Checks a layer's shape.
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
