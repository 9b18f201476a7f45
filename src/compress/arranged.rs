//! Tensors of a source as rules have them: transposed, or divided into several layers.

use std::sync::Arc;

use super::misfits::Misfits;
use super::rules::Rules;
use crate::error::Result;
use crate::formats::{ArrangedSource, Arrangement, TensorSource};
use crate::store::LayerRecord;

/// Returns a source as rules see it: each layer as the first rule that takes it says.
///
/// # Errors
/// When a weight cannot be seen so: one error names all of them.
pub(super) fn arranged(source: Arc<dyn TensorSource>, rules: &Rules) -> Result<Arc<dyn TensorSource>> {
    if rules.iter().all(|rule| rule.arrangement == Arrangement::default()) {
        return Ok(source);
    }
    let mut seen = ArrangedSource::new(source.clone());
    let mut misfits = Misfits::default();
    for layer in source.layers() {
        if let Some((_, rule)) = rules.find(&layer.name)
            && rule.arrangement != Arrangement::default()
        {
            misfits.keep(&layer.name, seen.arrange(&layer, &rule.arrangement));
        }
    }
    misfits.result(source.path())?;
    Ok(Arc::new(seen))
}

/// Returns a source as it was seen when layers were made of it.
pub(super) fn seen_again<'a>(
    source: Arc<dyn TensorSource>,
    records: impl Iterator<Item = &'a LayerRecord>,
) -> Arc<dyn TensorSource> {
    let mut seen = ArrangedSource::new(source.clone());
    for tensor in records.flat_map(|record| &record.source.tensors) {
        let there = source.tensor(&tensor.tensor).is_some_and(|found| found.shape == tensor.shape);
        if let Some(stored_as) = tensor.stored_as.as_ref().filter(|_| !there) {
            // What cannot be seen so is missed where it is needed, by its name.
            let _ = seen.see_again(&tensor.tensor, stored_as);
        }
    }
    Arc::new(seen)
}
