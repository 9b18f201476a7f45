//! What an import looks at before its first layer: that rules and calibration fit, and that every value can be used. All that
//! does not fit is found at once.

use std::collections::HashSet;
use std::path::Path;

use super::calibration::CalibrationFile;
use super::plan::{Planned, Work, plan};
use super::rules::Rules;
use super::work::Cancel;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::{SourceContent, TensorInfo, TensorSource};

/// Misfits that a message shows; a checkpoint of another model has one for each layer.
const SHOWN: usize = 30;

/// What does not fit, in the order in which it was found.
#[derive(Debug, Default)]
pub(super) struct Misfits(Vec<Error>);

impl Misfits {
    /// Keeps what a layer's check found, and returns what it gave.
    pub fn keep<T>(&mut self, layer: &str, found: Result<T>) -> Option<T> {
        found.map_err(|e| self.0.push(e.in_layer(layer))).ok()
    }

    /// Returns one error of all; one that is no fault of what was given goes first.
    pub fn result(self, source: &Path) -> Result<()> {
        let mut all = self.0;
        if let Some(other) = all.iter().position(|e| e.kind() != ErrorKind::InvalidInput) {
            return Err(all.swap_remove(other));
        }
        if all.len() <= 1 {
            return all.pop().map_or(Ok(()), Err);
        }
        let mut reason = format!("found {} things that do not fit, expected none:", all.len());
        for error in all.iter().take(SHOWN) {
            // A line each, whatever a name holds.
            reason.push_str(&format!("\n  {}", error.to_string().replace('\n', "\\n")));
        }
        if let Some(more) = all.len().checked_sub(SHOWN).filter(|n| *n > 0) {
            reason.push_str(&format!("\n  and {more} more"));
        }
        Err(Error::file(source, reason))
    }
}

/// Plans an import, and reads every value that it will use.
///
/// # Errors
/// When rules, calibration or values do not fit: one error names all that do not. When a file cannot be read, or the work is
/// cancelled.
pub(super) fn checked(
    source: &dyn TensorSource,
    rules: &Rules,
    calibration: Option<&CalibrationFile>,
    cancel: &Cancel,
) -> Result<Work> {
    let mut work = plan(source, rules, calibration);
    let mut misfits = std::mem::take(&mut work.misfits);
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

/// The layers whose calibration will be used, and their widths.
fn inputs_used(work: &Work) -> impl Iterator<Item = (&str, usize)> {
    let layers = work.layers.iter().filter(|l| l.calibrated).map(|l| (l.source.name.as_str(), l.shape().1 as usize));
    let blocks = work.blocks.iter().flat_map(|block| &block.projections);
    layers.chain(blocks.map(|p| (p.layer.as_str(), p.weight.shape.get(1).copied().unwrap_or(0))))
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
            let weight = ready.weight()?;
            match weight.iter().position(|v| !v.is_finite()) {
                Some(index) => {
                    let value = weight.iter().nth(index).copied().unwrap_or(f32::NAN);
                    Err(Error::NotFinite { what: "the weight".into(), value: f64::from(value), index })
                }
                None => Ok(()),
            }
        }
        (SourceContent::Ready { .. }, None) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_misfits_are_one_error() {
        let wrong = |n: usize| Error::expected("width", n, "4");
        let mut misfits = Misfits::default();
        assert_eq!(misfits.keep("a", Ok(3)), Some(3));
        Misfits::default().result(Path::new("m")).unwrap();
        misfits.keep::<()>("a", Err(wrong(1)));
        assert!(matches!(Misfits(vec![wrong(1)]).result(Path::new("m")), Err(Error::Expected { .. })));
        misfits.keep::<()>("b\nerror: c", Err(wrong(2)));
        let error = misfits.result(Path::new("m")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        let message = error.to_string();
        assert!(message.contains("found 2 things"), "{message}");
        assert!(message.lines().nth(2) == Some("  layer 'b\\nerror: c': width: found 2, expected 4"), "{message}");
        let many = Misfits((0..40).map(wrong).collect()).result(Path::new("m")).unwrap_err().to_string();
        assert!(many.ends_with("\n  and 10 more"), "{many}");
        let refused = Misfits(vec![wrong(1), Error::Cancelled]).result(Path::new("m"));
        assert!(matches!(refused, Err(Error::Cancelled)));
    }
}
