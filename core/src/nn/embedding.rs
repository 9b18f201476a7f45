//! Tokens and image patches as vectors.

use ndarray::{Array2, ArrayD, ArrayView4, ArrayViewD, Ix4, IxDyn, s};

use super::rows::{linear, sequences};
use crate::error::{Error, Result};
use crate::layer::{Accuracy, SharedLayer};

/// A table `[rows, width]` that rows are looked up in: the weight of a layer of any method, which stays in its stored form.
#[derive(Debug, Clone)]
pub struct Table {
    layer: SharedLayer,
}

impl Table {
    /// Returns the table that a layer's weight is.
    ///
    /// # Errors
    /// When the layer stands for no weight matrix.
    pub fn new(layer: SharedLayer) -> Result<Self> {
        layer.require_linear()?;
        Ok(Table { layer })
    }

    /// The layer.
    pub fn layer(&self) -> &SharedLayer {
        &self.layer
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.layer.out_features()
    }

    /// Length of a row.
    pub fn width(&self) -> usize {
        self.layer.in_features()
    }

    /// Returns rows `[indices, width]`, for indices that are whole numbers below [`Table::rows`].
    fn look_up(&self, indices: impl Iterator<Item = f64>, what: &str) -> Result<Array2<f32>> {
        let count = self.rows();
        let index = |index: f64| {
            // A number that is not finite is in no range.
            if index.fract() == 0.0 && (0.0..count as f64).contains(&index) {
                return Ok(index as u32);
            }
            Err(Error::expected(what, index, format!("a whole number from 0 to {}", count.saturating_sub(1))))
        };
        self.layer.rows(&indices.map(index).collect::<Result<Vec<u32>>>()?)
    }
}

/// A token's vector, and its position's where there is a table of those.
#[derive(Debug, Clone)]
pub struct TokenEmbedding {
    tokens: Table,
    positions: Option<Table>,
}

impl TokenEmbedding {
    /// From tables `[vocab_size, width]` and `[max_len, width]`.
    ///
    /// # Errors
    /// When their widths differ.
    pub fn new(tokens: Table, positions: Option<Table>) -> Result<Self> {
        check_width(positions.as_ref(), tokens.width())?;
        Ok(TokenEmbedding { tokens, positions })
    }

    /// The table of tokens.
    pub fn tokens(&self) -> &Table {
        &self.tokens
    }

    /// The table of positions.
    pub fn positions(&self) -> Option<&Table> {
        self.positions.as_ref()
    }

    /// Tokens `[batch, steps]`, whole numbers from 0 on, as `[batch, steps, width]`.
    ///
    /// # Errors
    /// When a number is no token, or there are more steps than positions.
    pub fn forward(&self, tokens: ArrayViewD<f32>) -> Result<ArrayD<f32>> {
        self.starting_at(tokens, 0)
    }

    pub(super) fn starting_at(&self, tokens: ArrayViewD<f32>, first: usize) -> Result<ArrayD<f32>> {
        let [batch, steps] = *tokens.shape() else {
            let found = format!("{:?}", tokens.shape());
            return Err(Error::expected("shape of tokens", found, "[batch, steps]"));
        };
        let mut out = self.tokens.look_up(tokens.iter().map(|&token| f64::from(token)), "token")?;
        if let Some(positions) = &self.positions {
            let rows = positions.look_up((0..steps).map(|step| (first + step) as f64), "position")?;
            for (place, mut row) in out.rows_mut().into_iter().enumerate() {
                row += &rows.row(place % steps);
            }
        }
        let shape = [batch, steps, out.ncols()];
        out.into_shape_with_order(IxDyn(&shape)).map_err(|e| Error::Numeric(e.to_string()))
    }
}

fn check_width(positions: Option<&Table>, width: usize) -> Result<()> {
    match positions.map(Table::width).filter(|&found| found != width) {
        Some(found) => Err(Error::expected("width of a position", found, format!("{width}, what it is added to"))),
        None => Ok(()),
    }
}

/// Images as their patches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patches {
    patch_size: usize,
}

impl Patches {
    /// Square patches of so many pixels a side.
    ///
    /// # Errors
    /// When there are none.
    pub fn new(patch_size: usize) -> Result<Self> {
        match patch_size {
            0 => Err(Error::expected("patch_size", 0, "at least 1")),
            _ => Ok(Patches { patch_size }),
        }
    }

    /// Pixels a side.
    pub fn patch_size(&self) -> usize {
        self.patch_size
    }

    /// Images `[batch, height, width, channels]` as `[batch, patches, size · size · channels]`: patches row after row, each row
    /// after row. What fills no whole patch is left out.
    ///
    /// # Errors
    /// When the shape is another.
    pub fn forward(&self, images: ArrayViewD<f32>) -> Result<ArrayD<f32>> {
        let found = format!("{:?}", images.shape());
        let images: ArrayView4<f32> = images
            .into_dimensionality::<Ix4>()
            .map_err(|_| Error::expected("shape of images", found, "[batch, height, width, channels]"))?;
        let (batch, height, width, channels) = images.dim();
        let size = self.patch_size;
        let (down, across) = (height / size, width / size);
        let mut out = ndarray::Array3::zeros((batch, down * across, size * size * channels));
        for (b, i, j) in (0..batch).flat_map(|b| (0..down).flat_map(move |i| (0..across).map(move |j| (b, i, j)))) {
            let patch = images.slice(s![b, i * size..(i + 1) * size, j * size..(j + 1) * size, ..]);
            let mut target = out.slice_mut(s![b, i * across + j, ..]);
            target.iter_mut().zip(patch.iter()).for_each(|(to, from)| *to = *from);
        }
        Ok(out.into_dyn())
    }
}

/// Patches through a linear layer, with their positions' vectors where there is a table of those.
#[derive(Debug, Clone)]
pub struct PatchEmbedding {
    projection: SharedLayer,
    positions: Option<Table>,
}

impl PatchEmbedding {
    /// From a layer of any method and a table `[patches, width]`.
    ///
    /// # Errors
    /// When widths differ, or the layer is not linear.
    pub fn new(projection: SharedLayer, positions: Option<Table>) -> Result<Self> {
        super::rows::require_shape(
            "a patch embedding's projection",
            &projection,
            projection.out_features(),
            projection.in_features(),
        )?;
        check_width(positions.as_ref(), projection.out_features())?;
        Ok(PatchEmbedding { projection, positions })
    }

    /// The layer.
    pub fn projection(&self) -> &SharedLayer {
        &self.projection
    }

    /// The table of positions.
    pub fn positions(&self) -> Option<&Table> {
        self.positions.as_ref()
    }

    /// Patches `[batch, patches, length]` as `[batch, patches, width]`.
    ///
    /// # Errors
    /// As [`Layer::forward`], and when there are not as many patches as positions.
    pub fn forward(&self, x: ArrayViewD<f32>, accuracy: Accuracy) -> Result<ArrayD<f32>> {
        let x = sequences(x)?.into_dyn();
        let mut y = linear(&self.projection, x.view(), accuracy)?;
        if let Some(positions) = &self.positions {
            let (found, expected) = (y.shape()[1], positions.rows());
            if found != expected {
                return Err(Error::expected("patches", found, format!("{expected}, one a position")));
            }
            y += &positions.layer.weight()?;
        }
        Ok(y)
    }
}
