//! What an import looks at before its first layer: that rules and calibration fit, and that every value can be used.

use std::collections::HashSet;

use super::calibration::CalibrationFile;
use super::plan::{Planned, Work, plan};
use super::rules::Rules;
use crate::error::{Error, Result, closest};
use crate::formats::{SourceContent, TensorInfo, TensorSource};
use crate::work::Cancel;

/// Plans an import, of all layers or of those that are named `only`, and reads every value that it will use. Rules and calibration are
/// held against all layers.
///
/// # Errors
/// When rules, calibration or values do not fit: one error names all that do not. When there is no layer of a name, a file cannot be
/// read, or the work is cancelled.
pub(super) fn checked(
    source: &dyn TensorSource,
    rules: &Rules,
    calibration: Option<&CalibrationFile>,
    only: Option<&HashSet<String>>,
    cancel: &Cancel,
) -> Result<Work> {
    let mut work = plan(source, rules, calibration);
    let mut misfits = std::mem::take(&mut work.misfits);
    if let Some(only) = only {
        retain(&mut work, only)?;
    }
    for layer in &work.layers {
        if cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        misfits.keep(&layer.source.name, values_of(source, layer));
    }
    // Layers may share what they are calibrated with.
    let mut read = HashSet::new();
    for (layer, in_features) in inputs_used(&work) {
        if let Some(calibration) = calibration
            && read.insert(calibration.owner(layer))
        {
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            misfits.keep(layer, calibration.check_values(layer, in_features));
        }
    }
    misfits.result(source.path())?;
    Ok(work)
}

/// Leaves the layers and blocks of these names.
fn retain(work: &mut Work, only: &HashSet<String>) -> Result<()> {
    let names = || {
        let layers = work.layers.iter().map(|layer| layer.source.name.as_str());
        layers.chain(work.blocks.iter().map(|block| block.name.as_str()))
    };
    let all: HashSet<&str> = names().collect();
    if let Some(unknown) = only.iter().filter(|name| !all.contains(name.as_str())).min() {
        let near = closest(unknown, names(), 1).concat();
        return Err(Error::expected(
            "layer to compress",
            format!("'{unknown}'"),
            format!("one of the source's; the closest is '{near}'"),
        ));
    }
    work.layers.retain(|layer| only.contains(&layer.source.name));
    work.blocks.retain(|block| only.contains(&block.name));
    Ok(())
}

/// The layers whose calibration will be used, and their widths.
fn inputs_used(work: &Work) -> impl Iterator<Item = (&str, usize)> {
    let layers = work.layers.iter().filter(|l| l.calibrated).map(|l| (l.source.name.as_str(), l.shape().1 as usize));
    let blocks = work.blocks.iter().flat_map(|block| &block.projections);
    layers.chain(blocks.map(|p| (p.source.name.as_str(), p.shape().1)))
}

/// Refuses NaN, and in what is to be compressed every number that is not finite.
fn values_of(source: &dyn TensorSource, layer: &Planned) -> Result<()> {
    match (&layer.source.content, &layer.method) {
        (SourceContent::Tensors { weight, bias }, method) => {
            let check = |tensor: &TensorInfo| match method {
                Some(_) => source.refuse_not_finite(tensor),
                None => source.refuse_nan(tensor),
            };
            std::iter::once(weight).chain(bias).try_for_each(check)
        }
        (SourceContent::Ready { layer: ready, .. }, Some(_)) => {
            let weight = ready.load()?.weight()?;
            match weight.iter().position(|v| !v.is_finite()) {
                Some(index) => {
                    let value = weight.iter().nth(index).copied().unwrap_or(f32::NAN);
                    Err(Error::NotFinite { what: "the weight".into(), value: f64::from(value), index })
                }
                None => Ok(()),
            }
        }
        (SourceContent::Ready { layer: ready, .. }, None) => ready.load().map(drop),
    }
}
