//! Two models, or one model at two versions, layer by layer.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use serde::Serialize;

use super::record::LayerRecord;
use super::settings::{SettingChange, changed_settings};
use super::snapshot::{LayerState, Snapshot, State};
use crate::error::Result;

/// How two models differ.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// The first model as a whole.
    pub first: ComparedModel,
    /// The second.
    pub second: ComparedModel,
    /// Layers that both have and that are not the same. Those whose errors differ most come first; behind them those whose errors
    /// cannot be compared, because one has none or they were measured over different things, by the difference of their bytes.
    pub layers: Vec<ComparedLayer>,
    /// How many layers of both are the same: the artifact, its settings and its error.
    pub same: u64,
    /// Layers of the first model alone, by name.
    pub only_first: Vec<LayerState>,
    /// Layers of the second model alone.
    pub only_second: Vec<LayerState>,
}

/// One of two models that are compared.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ComparedModel {
    /// Its name.
    pub model: String,
    /// The version that it was read at.
    pub version: u64,
    /// How many layers it has.
    pub layers: u64,
    /// Bytes of its layers in their checkpoint.
    pub dense_bytes: u64,
    /// Bytes of its layers' artifacts.
    pub stored_bytes: u64,
}

/// A layer that two models have, differently.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ComparedLayer {
    /// The layer's name.
    pub layer: String,
    /// What the first model says of it.
    pub first: State,
    /// What the second model says of it.
    pub second: State,
    /// The settings that differ.
    pub settings: Vec<SettingChange>,
}

impl ComparedLayer {
    /// Returns |second − first| of the relative errors; `None` where one has no error, or they were measured over different things.
    pub fn error_difference(&self) -> Option<f64> {
        let same_basis = self.first.error_basis == self.second.error_basis;
        let errors = self.first.relative_error.zip(self.second.relative_error).filter(|_| same_basis);
        errors.map(|(first, second)| (second - first).abs())
    }

    /// Orders the larger difference first.
    fn order(&self, other: &Self) -> Ordering {
        let bytes = |layer: &Self| layer.first.stored_bytes.abs_diff(layer.second.stored_bytes);
        let errors = match (self.error_difference(), other.error_difference()) {
            (Some(own), Some(others)) => others.total_cmp(&own),
            (own, others) => others.is_some().cmp(&own.is_some()),
        };
        errors.then_with(|| bytes(other).cmp(&bytes(self))).then_with(|| self.layer.cmp(&other.layer))
    }
}

impl ComparedModel {
    fn new(model: &str, version: u64, records: &BTreeMap<String, LayerRecord>) -> Self {
        ComparedModel {
            model: model.to_owned(),
            version,
            layers: records.len() as u64,
            dense_bytes: records.values().map(|r| r.dense_bytes).sum(),
            stored_bytes: records.values().map(|r| r.stored_bytes).sum(),
        }
    }
}

impl Snapshot {
    /// Compares a model of this snapshot with a model of this or another one, which may be that of the same name, layer by layer.
    ///
    /// # Errors
    /// When one of the snapshots does not have its model.
    pub async fn compare(&self, model: &str, other: &Snapshot, other_model: &str) -> Result<Comparison> {
        let named = |rows: Vec<LayerRecord>| rows.into_iter().map(|r| (r.layer.clone(), r)).collect::<BTreeMap<_, _>>();
        let first = named(self.layers(model).await?);
        let second = named(other.layers(other_model).await?);
        let (mut layers, mut same) = (vec![], 0);
        for (layer, first) in &first {
            let Some(second) = second.get(layer) else { continue };
            let state = |r: &LayerRecord| (r.artifact, r.config.clone(), r.relative_error, r.error_basis);
            if state(first) == state(second) {
                same += 1;
                continue;
            }
            let (layer, settings) = (layer.clone(), changed_settings(first, second));
            layers.push(ComparedLayer { layer, first: first.into(), second: second.into(), settings });
        }
        layers.sort_by(ComparedLayer::order);
        let only = |own: &BTreeMap<String, LayerRecord>, other: &BTreeMap<String, LayerRecord>| {
            own.iter().filter(|(layer, _)| !other.contains_key(*layer)).map(|(_, r)| r.into()).collect()
        };
        Ok(Comparison {
            layers,
            same,
            only_first: only(&first, &second),
            only_second: only(&second, &first),
            first: ComparedModel::new(model, self.version(), &first),
            second: ComparedModel::new(other_model, other.version(), &second),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::layer::MethodName;
    use crate::store::ErrorBasis;

    fn state(relative_error: Option<f64>, error_basis: ErrorBasis, stored_bytes: u64) -> State {
        let (method, config) = (MethodName::new("low_rank"), Value::Null);
        State { method, artifact: String::new(), relative_error, error_basis, stored_bytes, config }
    }

    /// Errors over different things are not held against each other.
    #[test]
    fn the_largest_difference_comes_first() {
        use ErrorBasis::{Activations, Weights};
        let layer = |name: &str, first, second| ComparedLayer { layer: name.into(), first, second, settings: vec![] };
        let of = |error: f64, bytes| state(Some(error), Activations, bytes);
        let mut layers = [
            layer("other basis", state(Some(0.1), Weights, 10), of(0.9, 20)),
            layer("better by 0.2", of(0.25, 10), of(0.05, 10)),
            layer("no error", of(0.1, 10), state(None, Activations, 60)),
            layer("worse by 0.1, few bytes", of(0.125, 10), of(0.25, 11)),
            layer("worse by 0.1, many bytes", of(0.125, 10), of(0.25, 12)),
            layer("z as good", of(0.1, 10), of(0.1, 10)),
            layer("as good", of(0.1, 10), of(0.1, 10)),
        ];
        layers.sort_by(ComparedLayer::order);
        let names: Vec<&str> = layers.iter().map(|layer| layer.layer.as_str()).collect();
        assert_eq!(
            names,
            [
                "better by 0.2",
                "worse by 0.1, many bytes",
                "worse by 0.1, few bytes",
                "as good",
                "z as good",
                "no error",
                "other basis",
            ]
        );
        assert_eq!(layers[6].error_difference(), None);
        assert_eq!(layers[1].error_difference(), Some(0.125));
    }
}
