//! A saved model into the store.

use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;

use super::open_keras;
use crate::error::{Error, Result};
use crate::layer::parts::canonical_json;
use crate::layer::{Layer, MethodConfig};
use crate::model::checkpoint::Activations;
use crate::model::import::{Done, ImportOptions, ImportReport, Landing, RECIPE_VERSION, unless_cancelled};
use crate::model::measure::{CorrectionReport, measure};
use crate::model::plan::{Plan, PlannedLayer, bits_per_weight};
use crate::model::rules::{Rule, Rules};
use crate::nn::Module;
use crate::store::{ErrorBasis, Provenance, Source, Store, check_model_name, source_tensors};

/// The module that a whole model is: its layers are behind this name.
pub const ROOT: &str = "model";

/// A layer of a saved model, and the rule that takes it.
struct Taken {
    name: String,
    layer: Layer,
    rule: Option<usize>,
}

/// The layers, with rules for those that hold floats: ternary weights stay what they are.
fn taken(module: &Module, rules: &Rules) -> Vec<Taken> {
    let layers = module.to_layers(ROOT).into_iter();
    let take = |(name, layer): (String, Layer)| {
        let rule = match &layer {
            Layer::Dense(_) => rules.find(&name).map(|(place, _)| place),
            _ => None,
        };
        Taken { name, layer, rule }
    };
    layers.map(take).collect()
}

fn unused(rules: &Rules, taken: &[Taken]) -> Vec<String> {
    let is_used = |place: usize| taken.iter().any(|t| t.rule == Some(place));
    rules.iter().enumerate().filter(|(place, _)| !is_used(*place)).map(|(_, rule)| described(rule)).collect()
}

fn described(rule: &Rule) -> String {
    format!("line {}: {}", rule.line, rule.layers)
}

/// The rule's method, held against the layer.
fn method<'a>(taken: &Taken, rules: &'a Rules, calibration: Option<&Activations>) -> Result<Option<(&'a Rule, bool)>> {
    let Some(rule) = taken.rule.and_then(|place| rules.iter().nth(place)) else { return Ok(None) };
    if rule.method == MethodConfig::Dense {
        return Ok(None);
    }
    let (out_features, in_features) = (taken.layer.out_features(), taken.layer.in_features());
    let calibrated = calibration.map_or(Ok(false), |c| c.check(&taken.name, in_features))?;
    rule.method.check(out_features, in_features, calibrated).map_err(|e| e.in_layer(&taken.name))?;
    Ok(Some((rule, calibrated)))
}

/// Says what [`import_keras`] would do.
///
/// # Errors
/// As [`open_keras`], and when a rule or calibration does not fit a layer.
pub fn preview_keras(path: &Path, rules: &Rules, calibration: Option<&Activations>) -> Result<Plan> {
    let all = taken(&open_keras(path)?, rules);
    let mut layers = vec![];
    for one in &all {
        let method = method(one, rules, calibration)?;
        let (out_features, in_features) = (one.layer.out_features(), one.layer.in_features());
        let expected_bytes = match method {
            None => Some(one.layer.to_parts().stored_bytes()),
            Some((rule, _)) => rule.method.expected_bytes(out_features, in_features)?.map(|bytes| bytes as u64),
        };
        let (out_features, in_features) = (out_features as u64, in_features as u64);
        let linear = one.layer.method().is_linear();
        layers.push(PlannedLayer {
            layer: one.name.clone(),
            rule: method.map(|(rule, _)| described(rule)),
            method: method.map_or(one.layer.method(), |(rule, _)| rule.method.method()),
            in_features,
            out_features,
            calibrated: method.is_some_and(|(_, calibrated)| calibrated),
            dense_bytes: dense_bytes(&one.name, &one.layer)?,
            expected_bytes,
            bits_per_weight: expected_bytes
                .filter(|_| linear)
                .map(|bytes| bits_per_weight(bytes, out_features, in_features)),
        });
    }
    Ok(Plan { layers, unused_rules: unused(rules, &all) })
}

fn dense_bytes(name: &str, layer: &Layer) -> Result<u64> {
    let tensors = source_tensors(name, layer, layer.to_parts().id())?;
    Ok(tensors.iter().map(|t| 4 * t.shape.iter().product::<usize>() as u64).sum())
}

/// Imports a model that Keras has saved as `model`, in place of what the store held under that name, as one new version. The
/// whole is the module [`ROOT`]; rules are for its layers of floats.
///
/// # Errors
/// As [`open_keras`] and [`import`](crate::model::import()).
pub async fn import_keras(store: &Store, path: &Path, model: &str, options: ImportOptions) -> Result<ImportReport> {
    check_model_name(model)?;
    let ImportOptions { rules, calibration, message, progress, cancel } = options;
    let from = path.to_owned();
    let module = unless_cancelled(&cancel, move || open_keras(&from)).await?;
    let all = taken(&module, &rules);
    for one in &all {
        method(one, &rules, calibration.as_ref())?;
    }
    let unused_rules = unused(&rules, &all);
    let given = calibration.iter().flat_map(Activations::layers);
    let unmatched_calibration = given.filter(|name| !all.iter().any(|t| t.name == *name)).map(str::to_owned).collect();
    let mut bytes = HashMap::new();
    for one in &all {
        bytes.insert(one.name.clone(), dense_bytes(&one.name, &one.layer)?);
    }
    progress.started(all.len(), bytes.values().sum());
    let mut landing = Landing::new(model, &progress);
    let mut writer = store.writer().await?;
    let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    for one in all {
        let started = Instant::now();
        progress.layer(&one.name);
        let own = one.layer.to_parts().id();
        let tensors = source_tensors(&one.name, &one.layer, own)?;
        let source = Source { file: file.clone(), tensors, ..Source::default() };
        let method = method(&one, &rules, calibration.as_ref())?.map(|(rule, _)| rule.method.clone());
        let inputs = match &method {
            Some(_) => calibration.as_ref().map(|c| c.get(&one.name, one.layer.in_features())).transpose()?.flatten(),
            None => None,
        };
        let recipe = match &method {
            None => own.0,
            Some(method) => {
                let settings = serde_json::to_value(method).unwrap_or_default();
                let mut hasher = blake3::Hasher::new();
                hasher
                    .update(&own.0)
                    .update(canonical_json(&settings).as_bytes())
                    .update(&RECIPE_VERSION.to_le_bytes());
                if let Some((dtype, shape, bytes)) = calibration.as_ref().and_then(|c| c.raw(&one.name)) {
                    hasher.update(format!("{dtype:?} {shape:?}").as_bytes()).update_rayon(bytes);
                }
                hasher.finalize().into()
            }
        };
        let (in_features, out_features) = (one.layer.in_features() as u64, one.layer.out_features() as u64);
        let name = one.name.clone();
        let config = |stored: &serde_json::Value, layer: &Layer| match &method {
            Some(method) => method.with_stored(stored),
            None => layer.config(),
        };
        let (stored, config, correction, reused) = match writer.made_by(&recipe).cloned() {
            Some(stored) => {
                let config = config(&stored.config, &one.layer);
                (stored, config, CorrectionReport::default(), true)
            }
            None => {
                let (layer, wanted) = (one.layer.clone(), method.clone());
                let made = unless_cancelled(&cancel, move || compressed(layer, wanted, inputs)).await;
                let (layer, correction, error, error_basis) = made.map_err(|e| e.in_layer(&name))?;
                let made = Provenance { recipe, relative_error: error, error_basis };
                let (_, new) = writer.add(&layer.to_parts(), made).await?;
                let stored = writer.made_by(&recipe).cloned().ok_or(Error::Cancelled)?;
                let config = config(&stored.config, &layer);
                (stored, config, correction, !new)
            }
        };
        let dense_bytes = bytes.get(&name).copied().unwrap_or(0);
        let done = Done { name, in_features, out_features, dense_bytes, stored, config, correction, reused, source };
        landing.done(done, started);
    }
    landing.commit(writer, message.as_deref(), &cancel, unused_rules, unmatched_calibration).await
}

/// The layer that is stored, and its error where it is another than the one that was read.
fn compressed(
    layer: Layer,
    method: Option<MethodConfig>,
    inputs: Option<ndarray::Array2<f32>>,
) -> Result<(Layer, CorrectionReport, Option<f64>, ErrorBasis)> {
    let Some(method) = method else { return Ok((layer, CorrectionReport::default(), None, ErrorBasis::Weights)) };
    let (weight, bias) = (layer.weight()?, layer.bias()?);
    let inputs_view = inputs.as_ref().map(|inputs| inputs.view());
    let made = method.compress(weight.view(), bias.as_ref().map(|b| b.view()), inputs_view)?;
    let (error, basis) = measure(&made, &weight, inputs.as_ref())?;
    let correction = CorrectionReport::of(&made, &weight, inputs.as_ref());
    Ok((made, correction, Some(error).filter(|e| e.is_finite()), basis))
}
