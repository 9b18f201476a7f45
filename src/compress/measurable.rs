//! Which layers of a model can be measured with the inputs at hand. All that they are measured with is looked through first.

use std::collections::HashMap;

use layerstore_core::layer::registry;
use serde::Serialize;

use super::calibration::ActivationsFile;
use super::misfits::Misfits;
use super::reference::Reference;
use crate::error::Result;
use crate::layer::{MethodKind, MethodName, VqAttentionConfig, read_config};
use crate::store::LayerRecord;

/// A layer that an evaluation did not measure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UnmeasuredLayer {
    /// The layer's name.
    pub layer: String,
    /// The method that it is compressed by.
    pub method: MethodName,
    /// Why it was not measured.
    pub reason: String,
}

/// A layer to measure.
#[derive(Debug)]
pub(super) enum Measurable {
    /// A product with a matrix.
    Linear(LayerRecord),
    /// An attention block, and its projections of queries, keys and values.
    Block(LayerRecord, Box<[LayerRecord; 3]>),
}

/// Divides a model's layers into those that can be measured and those that cannot, in their order, and reads every value that the
/// work will use.
///
/// # Errors
/// When inputs or weights to compare with do not fit: one error names all that do not. When a file cannot be read.
pub(super) fn measurable(
    records: &[LayerRecord],
    activations: &ActivationsFile,
    reference: &Reference,
) -> Result<(Vec<Measurable>, Vec<UnmeasuredLayer>)> {
    let mut misfits = Misfits::default();
    let by_name: HashMap<&str, &LayerRecord> = records.iter().map(|r| (r.layer.as_str(), r)).collect();
    let mut reasons: HashMap<&str, Option<String>> = HashMap::new();
    for record in records.iter().filter(|r| kind(r) == MethodKind::Linear) {
        let reason = unmeasured_linear(record, activations);
        if reason.is_none() {
            let width = record.in_features as usize;
            // With a method that is not known nothing can be run.
            misfits.keep(&record.layer, registry::method(record.method.as_str()));
            misfits.keep(&record.layer, activations.check_values(&record.layer, width));
            misfits.keep(&record.layer, reference.check(record));
        }
        reasons.insert(&record.layer, reason);
    }
    let (mut measured, mut unmeasured) = (vec![], vec![]);
    for record in records {
        let found = match kind(record) {
            MethodKind::Linear => match reasons.get(record.layer.as_str()).cloned().flatten() {
                None => Ok(Measurable::Linear(record.clone())),
                Some(reason) => Err(reason),
            },
            MethodKind::Attention => {
                let Some(config) = misfits.keep(&record.layer, read_config(record.method.as_str(), &record.config))
                else {
                    continue;
                };
                projections(record, &config, &by_name, &reasons, activations)
                    .map(|projections| Measurable::Block(record.clone(), Box::new(projections)))
            }
            MethodKind::Module => Err("it is made of layers that stand for themselves".to_owned()),
            MethodKind::File => continue,
        };
        match found {
            Ok(measurable) => {
                if let Measurable::Block(block, projections) = &measurable {
                    for projection in projections.iter() {
                        misfits.keep(&block.layer, reference.check_bias(projection));
                    }
                }
                measured.push(measurable);
            }
            Err(reason) => {
                let (layer, method) = (record.layer.clone(), record.method.clone());
                unmeasured.push(UnmeasuredLayer { layer, method, reason });
            }
        }
    }
    misfits.result(activations.path())?;
    Ok((measured, unmeasured))
}

/// What a layer stands for; those of a method that is not known are taken for linear ones.
fn kind(record: &LayerRecord) -> MethodKind {
    registry::method(record.method.as_str()).map_or(MethodKind::Linear, |method| method.kind)
}

/// Why a linear layer cannot be measured; `None` where it can.
fn unmeasured_linear(record: &LayerRecord, activations: &ActivationsFile) -> Option<String> {
    // Inputs named after a norm or an embedding's table are for no product with a matrix.
    match record.source.tensors.first() {
        None => Some("it came from no tensor to compare with".to_owned()),
        Some(tensor) if tensor.shape.len() != 2 => Some(format!("a tensor of shape {:?} is no matrix", tensor.shape)),
        Some(_) => activations.tokens(&record.layer).is_none().then(|| "no activations have its name".to_owned()),
    }
}

/// A block's projections of queries, keys and values; or why it cannot be measured with them.
fn projections(
    block: &LayerRecord,
    config: &VqAttentionConfig,
    by_name: &HashMap<&str, &LayerRecord>,
    reasons: &HashMap<&str, Option<String>>,
    activations: &ActivationsFile,
) -> Result<[LayerRecord; 3], String> {
    if config.rotary {
        return Err(
            "its queries and keys are rotated by their positions, which activations files do not hold".to_owned()
        );
    }
    let (Some(query), Some(key), Some(value)) = (&config.query, &config.key, &config.value) else {
        return Err("its inputs are queries and keys themselves, of which activations files hold none".to_owned());
    };
    let named = |name: &String| {
        let behind = format!("{}.{name}", block.layer);
        let found = by_name.get(behind.as_str()).or_else(|| by_name.get(name.as_str()));
        let record = *found.ok_or_else(|| format!("the model has no layer '{behind}', a projection of it"))?;
        match reasons.get(record.layer.as_str()) {
            Some(None) => Ok(record),
            Some(Some(reason)) => Err(format!("its projection '{}' is not measured: {reason}", record.layer)),
            None => Err(format!("its projection '{}' is a {} layer", record.layer, record.method)),
        }
    };
    let found = [named(query)?, named(key)?, named(value)?];
    let tokens = found.map(|record| activations.tokens(&record.layer).unwrap_or_default());
    match tokens.iter().all(|n| *n == tokens[0]) {
        true => Ok(found.map(LayerRecord::clone)),
        false => Err(format!("its projections have {tokens:?} activations, not as many each")),
    }
}
