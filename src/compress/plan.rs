//! Which rule takes which layer of a source, found and checked before any layer is worked on.

use layerstore_core::layer::registry;
use serde::Serialize;

use super::attention::{PlannedBlock, blocks};
use super::calibration::CalibrationFile;
use super::preflight::{Misfits, checked};
use super::rules::Rules;
use super::unapplied::unapplied;
use super::work::Cancel;
use crate::error::Result;
use crate::formats::{SourceContent, SourceLayer, TensorInfo, TensorSource};
use crate::layer::{MethodConfig, MethodName};

/// A layer, and what is to become of it.
#[derive(Debug, Clone)]
pub(super) struct Planned {
    pub source: SourceLayer,
    /// `None` where the layer is stored as it is.
    pub method: Option<MethodConfig>,
    /// Whether there are calibration statistics for it.
    pub calibrated: bool,
    /// The rule that takes it.
    pub rule: Option<String>,
}

impl Planned {
    /// Rows and columns: a vector is one column, more dimensions fold into the columns.
    pub fn shape(&self) -> (u64, u64) {
        shape_of(&self.source.content)
    }

    /// Bytes in the source, the bias counted; of a layer that comes ready, those of its numbers as f32.
    pub fn dense_bytes(&self) -> Result<u64> {
        match &self.source.content {
            SourceContent::Tensors { weight, bias } => {
                Ok(weight.byte_len() + bias.as_ref().map_or(0, TensorInfo::byte_len))
            }
            SourceContent::Ready { layer, .. } => {
                let tensors = crate::store::source_tensors(&self.source.name, &**layer, layer.to_parts().id())?;
                Ok(tensors.iter().map(|t| 4 * t.shape.iter().product::<usize>() as u64).sum())
            }
        }
    }
}

fn shape_of(content: &SourceContent) -> (u64, u64) {
    match content {
        SourceContent::Tensors { weight, .. } => {
            let rows = weight.shape.first().copied().unwrap_or(1);
            (rows as u64, weight.shape.iter().skip(1).product::<usize>() as u64)
        }
        SourceContent::Ready { layer, .. } => (layer.out_features() as u64, layer.in_features() as u64),
    }
}

/// What would become of a layer.
#[derive(Debug, Clone, Serialize)]
pub struct PlannedLayer {
    /// The layer's name.
    pub layer: String,
    /// The line and pattern of the rule that takes it; `null` where none does, and it stays as it is.
    pub rule: Option<String>,
    /// The method that it will be stored by.
    pub method: MethodName,
    /// Length of an input.
    pub in_features: u64,
    /// Length of an output.
    pub out_features: u64,
    /// Whether it has calibration statistics.
    pub calibrated: bool,
    /// Bytes in the source.
    pub dense_bytes: u64,
    /// Bytes to be stored; `null` where they follow from the numbers: keys that fall below a cut, a rank by error.
    pub expected_bytes: Option<u64>,
    /// Stored bits for each weight.
    pub bits_per_weight: Option<f64>,
}

/// What would become of a source's layers.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// The layers, in the source's order.
    pub layers: Vec<PlannedLayer>,
    /// Patterns of rules that take no layer, with their lines: likely mistakes.
    pub unused_rules: Vec<String>,
    /// What was left out of the checkpoint, and what it says that an import does not do.
    pub notes: Vec<String>,
}

/// Holds rules and calibration against a source, reads all values, as [`import`](super::import()) does before it begins, and
/// says what it would do.
///
/// # Errors
/// When a rule or calibration does not fit a layer, or a value cannot be used: the error names all that do not fit.
pub fn preview(source: &dyn TensorSource, rules: &Rules, calibration: Option<&CalibrationFile>) -> Result<Plan> {
    let work = checked(source, rules, calibration, &Cancel::new())?;
    let Work { layers: planned, blocks, unused_rules, notes, misfits: _ } = work;
    let layer = |planned: Planned| -> Result<PlannedLayer> {
        let (out_features, in_features) = planned.shape();
        let dense_bytes = planned.dense_bytes()?;
        let expected_bytes = match (&planned.method, &planned.source.content) {
            (None, SourceContent::Tensors { .. }) => Some(dense_bytes),
            (None, SourceContent::Ready { layer, .. }) => Some(layer.to_parts().stored_bytes()),
            (Some(method), content) => {
                let has_bias = match content {
                    SourceContent::Tensors { bias, .. } => bias.is_some(),
                    SourceContent::Ready { layer, .. } => layer.stored_bias()?.is_some(),
                };
                let weight = method.expected_bytes(out_features as usize, in_features as usize)?;
                weight.map(|bytes| bytes as u64 + if has_bias { 4 * out_features } else { 0 })
            }
        };
        let method = match (&planned.method, &planned.source.content) {
            (Some(method), _) => method.name(),
            (None, SourceContent::Ready { layer, .. }) => layer.method(),
            (None, SourceContent::Tensors { .. }) => MethodName::new("dense"),
        };
        Ok(PlannedLayer {
            rule: planned.rule,
            in_features,
            out_features,
            calibrated: planned.calibrated,
            dense_bytes,
            expected_bytes,
            bits_per_weight: expected_bytes
                .filter(|_| registry::is_linear(&method))
                .map(|bytes| bits_per_weight(bytes, out_features, in_features)),
            method,
            layer: planned.source.name,
        })
    };
    let block = |block: &PlannedBlock| {
        let width = block.config.d_model.unwrap_or_default() as u64;
        Ok(PlannedLayer {
            layer: block.name.clone(),
            rule: Some(block.rule.clone()),
            method: block.method(),
            in_features: width,
            out_features: width,
            calibrated: block.calibrates(),
            dense_bytes: 0,
            expected_bytes: Some(block.expected_bytes()),
            bits_per_weight: None,
        })
    };
    let layers = planned.into_iter().map(layer).chain(blocks.iter().map(block)).collect::<Result<_>>()?;
    Ok(Plan { layers, unused_rules, notes })
}

/// All that an import does.
pub(super) struct Work {
    pub layers: Vec<Planned>,
    pub blocks: Vec<PlannedBlock>,
    /// Patterns of rules that take nothing.
    pub unused_rules: Vec<String>,
    /// What a user should know of the checkpoint.
    pub notes: Vec<String>,
    /// Rules and calibration that do not fit.
    pub misfits: Misfits,
}

/// Finds each layer's rule and holds it against the layer, the blocks of attention, and the rules that took nothing.
pub(super) fn plan(source: &dyn TensorSource, rules: &Rules, calibration: Option<&CalibrationFile>) -> Work {
    let all = source.layers();
    let mut misfits = Misfits::default();
    let (blocks, mut used) = blocks(&all, rules, calibration, &mut misfits);
    let notes = unapplied(source, &all, &blocks, rules);
    let mut planned = Vec::with_capacity(all.len());
    for source in all {
        let takes_rules = match &source.content {
            // Vectors, and tensors of other types, have no rows to compress: rules are for matrices.
            SourceContent::Tensors { weight, .. } => weight.is_float_matrix(),
            SourceContent::Ready { takes_rules, .. } => *takes_rules,
        };
        let rule = rules.find(&source.name).filter(|_| takes_rules);
        let (mut method, rule) = match rule {
            Some((place, rule)) => {
                used[place] = true;
                (Some(rule.method.clone()), Some(rule.described()))
            }
            None => (None, None),
        };
        // The method that compresses nothing is to leave everything as it is, bit for bit.
        method = method.filter(|method| method.name() != "dense");
        let (out_features, in_features) = shape_of(&source.content);
        let calibrated = match (&method, calibration) {
            (Some(_), Some(calibration)) => {
                misfits.keep(&source.name, calibration.check(&source.name, in_features as usize))
            }
            _ => Some(false),
        };
        // With inputs that do not fit, nothing more can be said of the method.
        if let (Some(method), Some(calibrated)) = (&method, calibrated) {
            misfits.keep(&source.name, method.check(out_features as usize, in_features as usize, calibrated));
        }
        planned.push(Planned { source, method, calibrated: calibrated.unwrap_or(false), rule });
    }
    let unused = rules.iter().zip(used).filter(|(_, used)| !used).map(|(rule, _)| rule.described());
    Work { layers: planned, blocks, unused_rules: unused.collect(), notes, misfits }
}

/// Stored bits for each of `out_features × in_features` weights; 0 where there are none.
pub(super) fn bits_per_weight(stored_bytes: u64, out_features: u64, in_features: u64) -> f64 {
    let weights = out_features.saturating_mul(in_features);
    if weights == 0 { 0.0 } else { 8.0 * stored_bytes as f64 / weights as f64 }
}
