//! The tensors of an export: what each is made of.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use layerstore_core::quant::{PackedMatrix, WeightFormat};

use crate::error::Result;
use crate::layer::parts::Side;
use crate::layer::{DType, Layer, LowRankLayer, StoredAs, TernaryLayer};
use crate::store::LayerHandle;

/// Where the bytes of a tensor come from.
#[derive(Clone)]
pub(super) enum Content {
    /// The layer's weight.
    Weight,
    /// The packed weight, without its correction.
    Quantized,
    /// The bias of a dense layer, as it is stored.
    Bias,
    /// The tensor of that name among [`Layer::own_tensors`].
    Own(String),
    /// They are these.
    Made(Bytes),
    /// What is made of the layer's codes and scales.
    Packed(Arc<Pack>),
    /// A factor of the correction, a component a row; `transposed`, a component a column.
    Factor { side: Side, transposed: bool },
}

/// Makes the bytes of a tensor of packed weights.
pub(super) type Pack = dyn Fn(&PackedMatrix) -> Result<Vec<u8>> + Send + Sync;

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Content::Weight => "weight",
            Content::Quantized => "quantised weight",
            Content::Bias => "bias",
            Content::Own(_) => "tensor of the layer's own",
            Content::Made(_) => "made",
            Content::Packed(_) => "codes",
            Content::Factor { .. } => "factor",
        })
    }
}

/// What a layer gives to a tensor.
#[derive(Debug, Clone)]
pub(super) struct Piece {
    pub handle: LayerHandle,
    pub content: Content,
    /// The dtype that the layer's own bytes have.
    pub dtype: DType,
    /// The part of the tensor that it is, where it is not the whole.
    pub stored_as: Option<StoredAs>,
}

/// A tensor of the file.
#[derive(Debug, Clone)]
pub(super) struct OutlinedTensor {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<usize>,
    /// One, unless several layers make it up.
    pub pieces: Vec<Piece>,
    /// What its weights are stored as.
    pub kept: Kept,
}

/// What the weights of a tensor are stored as.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Kept {
    /// Numbers one by one.
    Numbers,
    /// Codes in a format that another program may have, too.
    Codes(WeightFormat),
    /// Something that no other program has: what it is.
    Otherwise(String),
}

/// Returns the packed weights and the correction of a layer that has them.
pub(super) fn packed_of(layer: &dyn Layer) -> Option<&LowRankLayer> {
    let low_rank = layer.downcast_ref::<LowRankLayer>();
    low_rank.or_else(|| layer.downcast_ref::<TernaryLayer>().map(TernaryLayer::low_rank))
}
