//! Statistics of layers' inputs that are in no file: those that a text gave, and those that it will give.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::Calibration;
use crate::error::{Error, Result};

/// What will be known of layers once the model has read a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Promise {
    pub layers: BTreeSet<String>,
    pub tokens: usize,
}

/// What is known of layers.
#[derive(Debug, Default)]
pub(super) struct InMemory {
    layers: BTreeMap<String, (Arc<Calibration>, [u8; 32])>,
}

impl InMemory {
    /// Keeps statistics for the layers that share them.
    ///
    /// # Errors
    /// When there are none of them.
    pub fn new(found: Vec<(Vec<String>, Calibration)>) -> Result<Self> {
        let mut layers = BTreeMap::new();
        for (names, calibration) in found {
            let (hash, calibration) = (hash_of(&calibration)?, Arc::new(calibration));
            layers.extend(names.into_iter().map(|name| (name, (calibration.clone(), hash))));
        }
        Ok(InMemory { layers })
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.layers.keys().map(String::as_str)
    }

    pub fn get(&self, layer: &str) -> Option<&Calibration> {
        self.layers.get(layer).map(|(calibration, _)| &**calibration)
    }

    /// Returns what names the statistics of a layer.
    pub fn hash(&self, layer: &str) -> Option<&[u8; 32]> {
        self.layers.get(layer).map(|(_, hash)| hash)
    }

    /// Refuses statistics of inputs of another width. `false` where there are none.
    ///
    /// # Errors
    /// When the width is another.
    pub fn check(&self, layer: &str, in_features: usize) -> Result<bool> {
        match self.get(layer).map(Calibration::features) {
            None => Ok(false),
            Some(found) if found == in_features => Ok(true),
            Some(found) => Err(Error::expected(format!("width of the inputs of '{layer}'"), found, in_features)),
        }
    }
}

fn hash_of(calibration: &Calibration) -> Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    let mut numbers = |values: &mut dyn Iterator<Item = f64>| {
        let bytes: Vec<u8> = values.flat_map(f64::to_le_bytes).collect();
        hasher.update_rayon(&bytes);
    };
    numbers(&mut std::iter::once(calibration.tokens() as f64));
    numbers(&mut calibration.mean().iter().copied());
    numbers(&mut calibration.mean_abs().iter().copied());
    match calibration.has_full_moment() {
        true => numbers(&mut calibration.second_moment()?.iter().copied()),
        false => numbers(&mut calibration.second_diagonal().into_iter()),
    }
    let sample = calibration.sample();
    let sample = sample.as_standard_layout();
    hasher.update_rayon(bytemuck::cast_slice(sample.as_slice().unwrap_or_default()));
    Ok(*hasher.finalize().as_bytes())
}
