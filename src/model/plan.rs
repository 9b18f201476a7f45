//! Which rule takes which layer of a checkpoint, found and checked before any layer is worked on.

use serde::Serialize;

use super::attention::{PlannedBlock, blocks};
use super::checkpoint::{Activations, Checkpoint, LayerSource, TensorEntry};
use super::rules::{Rule, Rules};
use crate::error::Result;
use crate::layer::{Method, MethodConfig};

/// A layer and what is to become of it.
pub(super) struct Planned {
    pub source: LayerSource,
    pub method: MethodConfig,
    pub calibrated: bool,
    /// The rule that takes it.
    pub rule: Option<String>,
}

/// What would become of a layer.
#[derive(Debug, Clone, Serialize)]
pub struct PlannedLayer {
    pub layer: String,
    /// The line and pattern of the rule that takes it; `null` where none does, and it stays dense.
    pub rule: Option<String>,
    pub method: Method,
    pub in_features: u64,
    pub out_features: u64,
    /// Whether it has calibration inputs.
    pub calibrated: bool,
    pub dense_bytes: u64,
    /// Bytes to be stored; `null` where they follow from the numbers: keys that fall below a cut, a rank by error.
    pub expected_bytes: Option<u64>,
    pub bits_per_weight: Option<f64>,
}

/// What would become of a checkpoint.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    pub layers: Vec<PlannedLayer>,
    /// Patterns of rules that take no layer, with their lines: likely mistakes.
    pub unused_rules: Vec<String>,
}

/// Holds rules and calibration against a checkpoint, as [`import`](super::import()) does before it begins, and says what
/// it would do.
///
/// # Errors
/// When a rule or calibration does not fit a layer.
pub fn preview(checkpoint: &Checkpoint, rules: &Rules, calibration: Option<&Activations>) -> Result<Plan> {
    let All { layers: planned, blocks, unused_rules } = plan(checkpoint, rules, calibration)?;
    let layer = |planned: Planned| -> Result<PlannedLayer> {
        let (out_features, in_features) = flattened(&planned.source.weight);
        let bias = planned.source.bias.as_ref();
        let expected_bytes = match &planned.method {
            MethodConfig::Dense => Some(planned.source.byte_len() as u64),
            method => {
                let weight = method.expected_bytes(out_features as usize, in_features as usize)?;
                weight.map(|bytes| bytes as u64 + if bias.is_some() { 4 * out_features } else { 0 })
            }
        };
        Ok(PlannedLayer {
            method: planned.method.method(),
            rule: planned.rule,
            in_features,
            out_features,
            calibrated: planned.calibrated,
            dense_bytes: planned.source.byte_len() as u64,
            expected_bytes,
            bits_per_weight: expected_bytes.map(|bytes| bits_per_weight(bytes, out_features, in_features)),
            layer: planned.source.layer,
        })
    };
    let block = |block: &PlannedBlock| {
        let width = block.config.d_model.unwrap_or_default() as u64;
        Ok(PlannedLayer {
            layer: block.name.clone(),
            rule: Some(block.rule.clone()),
            method: Method::VqAttention,
            in_features: width,
            out_features: width,
            calibrated: block.calibrates(),
            dense_bytes: 0,
            expected_bytes: Some(block.expected_bytes()),
            bits_per_weight: None,
        })
    };
    let layers = planned.into_iter().map(layer).chain(blocks.iter().map(block)).collect::<Result<_>>()?;
    Ok(Plan { layers, unused_rules })
}

/// All that an import does.
pub(super) struct All {
    pub layers: Vec<Planned>,
    pub blocks: Vec<PlannedBlock>,
    /// Patterns of rules that take nothing.
    pub unused_rules: Vec<String>,
}

/// Finds each layer's rule and holds it against the layer, the blocks of attention, and the rules that took nothing.
pub(super) fn plan(checkpoint: &Checkpoint, rules: &Rules, calibration: Option<&Activations>) -> Result<All> {
    let (blocks, mut used) = blocks(checkpoint, rules, calibration)?;
    let mut planned = Vec::new();
    for source in checkpoint.layers() {
        // Vectors, and tensors of other types, have no rows to compress: rules are for matrices.
        let rule = rules.find(&source.layer).filter(|_| source.weight.is_float_matrix());
        let (method, rule) = match rule {
            Some((place, rule)) => {
                used[place] = true;
                (rule.method.clone(), Some(described(rule)))
            }
            None => (MethodConfig::Dense, None),
        };
        let (out_features, in_features) = flattened(&source.weight);
        let calibrated = method != MethodConfig::Dense
            && match calibration {
                Some(activations) => activations.check(&source.layer, in_features as usize)?,
                None => false,
            };
        method.check(out_features as usize, in_features as usize, calibrated).map_err(|e| e.in_layer(&source.layer))?;
        planned.push(Planned { source, method, calibrated, rule });
    }
    let unused = rules.iter().zip(used).filter(|(_, used)| !used).map(|(rule, _)| described(rule));
    Ok(All { layers: planned, blocks, unused_rules: unused.collect() })
}

/// A tensor's shape as rows and columns: a vector is one column, more dimensions fold into the columns.
pub(super) fn flattened(weight: &TensorEntry) -> (u64, u64) {
    let rows = weight.shape.first().copied().unwrap_or(1);
    (rows as u64, weight.shape.iter().skip(1).product::<usize>() as u64)
}

fn described(rule: &Rule) -> String {
    format!("line {}: {}", rule.line, rule.layers)
}

/// Stored bits for each of `out_features × in_features` weights; 0 where there are none.
pub(super) fn bits_per_weight(stored_bytes: u64, out_features: u64, in_features: u64) -> f64 {
    let weights = out_features.saturating_mul(in_features);
    if weights == 0 { 0.0 } else { 8.0 * stored_bytes as f64 / weights as f64 }
}
