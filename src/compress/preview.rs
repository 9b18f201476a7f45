//! What an import would do, said before it does it: the dry run.

use std::sync::Arc;

use serde::Serialize;

use super::arranged::arranged;
use super::attention::PlannedBlock;
use super::calibration::CalibrationFile;
use super::plan::{Planned, Work, plan};
use super::preflight::checked;
use super::rules::Rules;
use crate::error::Result;
use crate::formats::{SourceContent, TensorSource};
use crate::layer::MethodName;
use crate::store::weight_bits;
use crate::work::Cancel;

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
    /// Bits to be stored for each weight, all of these bytes counted; `null` where they are not known, or there are no weights.
    pub bits_per_weight: Option<f64>,
}

/// What would become of a source's layers.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// The layers, in the source's order.
    pub layers: Vec<PlannedLayer>,
    /// Names of the files that will be kept with the model.
    pub files: Vec<String>,
    /// Patterns of rules that take no layer, with their lines: likely mistakes.
    pub unused_rules: Vec<String>,
    /// What was left out of the checkpoint, and what it says that an import does not do.
    pub notes: Vec<String>,
}

/// Holds rules and calibration against a source, reads all values where it is to `check_values`, as [`import`](super::import()) does
/// before it begins, and says what it would do.
///
/// # Errors
/// When a rule or calibration does not fit a layer, or a value cannot be used: the error names all that do not fit.
pub fn preview(
    source: Arc<dyn TensorSource>,
    rules: &Rules,
    calibration: Option<&CalibrationFile>,
    check_values: bool,
) -> Result<Plan> {
    let source = arranged(source, rules)?;
    let work = match check_values {
        true => checked(&*source, rules, calibration, None, &Cancel::new())?,
        false => {
            let mut work = plan(&*source, rules, calibration);
            std::mem::take(&mut work.misfits).result(source.path())?;
            work
        }
    };
    let Work { layers: planned, blocks, files, unused_rules, notes, misfits: _ } = work;
    let layer = |planned: Planned| -> Result<PlannedLayer> {
        let (out_features, in_features) = planned.shape();
        let dense_bytes = planned.dense_bytes()?;
        let expected_bytes = match (&planned.method, &planned.source.content) {
            (None, SourceContent::Tensors { .. }) => Some(dense_bytes),
            (None, SourceContent::Ready { layer, .. }) => Some(layer.stored_bytes()),
            (Some(method), _) => method.expected_bytes(planned.lengths()?)?.map(|bytes| bytes as u64),
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
            bits_per_weight: expected_bytes.and_then(|bytes| weight_bits(&method, bytes, (out_features, in_features))),
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
    let files = files.into_iter().map(|file| file.name).collect();
    Ok(Plan { layers, files, unused_rules, notes })
}
