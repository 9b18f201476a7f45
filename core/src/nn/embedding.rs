//! Embeddings of tokens and of image patches.

use ndarray::{Array2, Array3, ArrayD, ArrayView4, ArrayViewD, Ix4, IxDyn, s};

use super::shape::{as_sequences, forward_linear, require_shape, shape_error};
use crate::error::{Error, Result};
use crate::layer::{Accuracy, SharedLayer};

/// An embedding table `[num_embeddings, embedding_dim]`: the weight of a layer of any method, which stays in its stored form.
#[derive(Debug, Clone)]
pub struct EmbeddingTable {
    layer: SharedLayer,
}

impl EmbeddingTable {
    /// Returns the table that a layer's weight is.
    ///
    /// # Errors
    /// When the layer stands for no weight matrix.
    pub fn new(layer: SharedLayer) -> Result<Self> {
        layer.require_linear()?;
        Ok(EmbeddingTable { layer })
    }

    /// Returns the layer whose weight the table is.
    pub fn layer(&self) -> &SharedLayer {
        &self.layer
    }

    /// Returns the number of rows.
    pub fn num_embeddings(&self) -> usize {
        self.layer.out_features()
    }

    /// Returns the length of a row.
    pub fn embedding_dim(&self) -> usize {
        self.layer.in_features()
    }

    /// Returns rows `[indices, embedding_dim]`, for indices that are whole numbers below [`EmbeddingTable::num_embeddings`].
    fn look_up(&self, indices: impl Iterator<Item = f64>, what: &str) -> Result<Array2<f32>> {
        let count = self.num_embeddings();
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

/// A token embedding: each token's vector, plus that of its position where there is a table of positions.
#[derive(Debug, Clone)]
pub struct TokenEmbedding {
    tokens: EmbeddingTable,
    positions: Option<EmbeddingTable>,
}

impl TokenEmbedding {
    /// Returns the embedding of tables `[vocab_size, width]` and `[max_len, width]`.
    ///
    /// # Errors
    /// When their widths differ.
    pub fn new(tokens: EmbeddingTable, positions: Option<EmbeddingTable>) -> Result<Self> {
        check_width(positions.as_ref(), tokens.embedding_dim())?;
        Ok(TokenEmbedding { tokens, positions })
    }

    /// Returns the table of tokens.
    pub fn tokens(&self) -> &EmbeddingTable {
        &self.tokens
    }

    /// Returns the table of positions.
    pub fn positions(&self) -> Option<&EmbeddingTable> {
        self.positions.as_ref()
    }

    /// Returns the vectors `[batch, steps, width]` of tokens `[batch, steps]`.
    ///
    /// # Errors
    /// When a number is not a whole one below `vocab_size`, or there are more steps than positions.
    pub fn forward(&self, tokens: ArrayViewD<f32>) -> Result<ArrayD<f32>> {
        self.forward_from(tokens, 0)
    }

    /// Returns the vectors of tokens whose first step is at a position.
    pub(super) fn forward_from(&self, tokens: ArrayViewD<f32>, first: usize) -> Result<ArrayD<f32>> {
        let [batch, steps] = *tokens.shape() else {
            let found = format!("{:?}", tokens.shape());
            return Err(Error::expected("shape of tokens", found, "[batch, steps]"));
        };
        let mut out = self.tokens.look_up(tokens.iter().map(|&token| f64::from(token)), "token")?;
        if let Some(positions) = &self.positions {
            let rows = positions.look_up((0..steps).map(|step| (first + step) as f64), "position")?;
            for (index, mut row) in out.rows_mut().into_iter().enumerate() {
                row += &rows.row(index % steps);
            }
        }
        let shape = [batch, steps, out.ncols()];
        out.into_shape_with_order(IxDyn(&shape)).map_err(shape_error)
    }
}

fn check_width(positions: Option<&EmbeddingTable>, width: usize) -> Result<()> {
    match positions.map(EmbeddingTable::embedding_dim).filter(|&found| found != width) {
        Some(found) => Err(Error::expected("width of a position", found, format!("{width}, what it is added to"))),
        None => Ok(()),
    }
}

/// Cuts images into square patches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patches {
    patch_size: usize,
}

impl Patches {
    /// Returns the layer that cuts patches of `patch_size` pixels a side.
    ///
    /// # Errors
    /// When `patch_size` is 0.
    pub fn new(patch_size: usize) -> Result<Self> {
        match patch_size {
            0 => Err(Error::expected("patch_size", 0, "at least 1")),
            _ => Ok(Patches { patch_size }),
        }
    }

    /// Pixels a side of a patch.
    pub fn patch_size(&self) -> usize {
        self.patch_size
    }

    /// Returns the patches `[batch, patches, size · size · channels]` of images `[batch, height, width, channels]`. Patches,
    /// and pixels in a patch, are in row-major order; pixels that fill no whole patch are left out.
    ///
    /// # Errors
    /// When `images` has another number of dimensions, or a patch has more numbers than can be counted.
    pub fn forward(&self, images: ArrayViewD<f32>) -> Result<ArrayD<f32>> {
        let found = format!("{:?}", images.shape());
        let images: ArrayView4<f32> = images
            .into_dimensionality::<Ix4>()
            .map_err(|_| Error::expected("shape of images", found, "[batch, height, width, channels]"))?;
        let (batch, height, width, channels) = images.dim();
        let size = self.patch_size;
        let (down, across) = (height / size, width / size);
        // A patch that is larger than any image has a length that cannot be counted.
        let length = size.checked_mul(size).and_then(|pixels| pixels.checked_mul(channels));
        let counted = |length: &usize| length.checked_mul(batch.max(1)).is_some_and(|all| isize::try_from(all).is_ok());
        let length = length.filter(counted).ok_or_else(|| {
            Error::expected("patch_size", size, format!("one for images of {height} × {width} × {channels}"))
        })?;
        let mut out = Array3::zeros((batch, down * across, length));
        for (b, i, j) in (0..batch).flat_map(|b| (0..down).flat_map(move |i| (0..across).map(move |j| (b, i, j)))) {
            let patch = images.slice(s![b, i * size..(i + 1) * size, j * size..(j + 1) * size, ..]);
            let mut target = out.slice_mut(s![b, i * across + j, ..]);
            target.iter_mut().zip(patch.iter()).for_each(|(to, from)| *to = *from);
        }
        Ok(out.into_dyn())
    }
}

/// A patch embedding: patches through a linear layer, plus the vectors of their positions where there is a table of those.
#[derive(Debug, Clone)]
pub struct PatchEmbedding {
    projection: SharedLayer,
    positions: Option<EmbeddingTable>,
}

impl PatchEmbedding {
    /// Returns the embedding of a linear layer `[width, length]` and a table `[patches, width]`.
    ///
    /// # Errors
    /// When widths differ, or the layer is not linear.
    pub fn new(projection: SharedLayer, positions: Option<EmbeddingTable>) -> Result<Self> {
        require_shape(
            "a patch embedding's projection",
            &projection,
            projection.out_features(),
            projection.in_features(),
        )?;
        check_width(positions.as_ref(), projection.out_features())?;
        Ok(PatchEmbedding { projection, positions })
    }

    /// Returns the linear layer that patches go through.
    pub fn projection(&self) -> &SharedLayer {
        &self.projection
    }

    /// Returns the table of positions.
    pub fn positions(&self) -> Option<&EmbeddingTable> {
        self.positions.as_ref()
    }

    /// Returns the vectors `[batch, patches, width]` of patches `[batch, patches, length]`.
    ///
    /// # Errors
    /// As [`Layer::forward`](crate::layer::Layer::forward), and when there are not as many patches as positions.
    pub fn forward(&self, x: ArrayViewD<f32>, accuracy: Accuracy) -> Result<ArrayD<f32>> {
        let x = as_sequences(x)?.into_dyn();
        let mut y = forward_linear(&self.projection, x.view(), accuracy)?;
        if let Some(positions) = &self.positions {
            let (found, expected) = (y.shape()[1], positions.num_embeddings());
            if found != expected {
                return Err(Error::expected("patches", found, format!("{expected}, one a position")));
            }
            y += &positions.layer.weight()?;
        }
        Ok(y)
    }
}
