//! Layers of weights that a file has packed already.

use layerstore_core::quant::{PackedMatrix, WeightFormat};
use ndarray::Array1;

use super::source::{ReadyLayer, SourceContent};
use crate::error::Result;
use crate::layer::{Layer, LayerShape, LowRankConfig, LowRankLayer, Method, MethodName};

/// Describes a layer of packed weights in this format, which `load` reads with its bias. With `ordered`, its columns are stored in
/// another order. Rules may compress it again.
pub fn packed(
    shape: LayerShape,
    format: WeightFormat,
    ordered: bool,
    load: impl Fn() -> Result<(PackedMatrix, Option<Array1<f32>>)> + Send + Sync + 'static,
) -> SourceContent {
    let LayerShape { out_features, in_features, has_bias } = shape;
    let weight = format.stored_bytes(out_features, in_features).unwrap_or_default();
    let beside = 4 * (usize::from(has_bias) * out_features + usize::from(ordered) * in_features);
    let load = move || {
        let (weight, bias) = load()?;
        Ok(LowRankLayer::of_weight(weight, bias)?.shared())
    };
    let method = MethodName::new(LowRankConfig::NAME);
    let layer = ReadyLayer::lazy(shape, method, (weight + beside) as u64, load);
    SourceContent::Ready { layer, takes_rules: true }
}
