//! What a search of keys that were not loaded needs beside them.

use ndarray::{Array1, Array2, ArrayView2};
use serde_json::Value;

use super::config::{KeyValueConfig, Limit, Ranking, SearchSettings, Sides};
use super::parts::curves;
use super::search::{Hit, QueryHits, rank_hits, rank_value};
use super::threshold::{Curves, expecting};
use crate::error::{Error, Result};
use crate::layer::parts::Tensor;
use crate::layer::method::{Method, read_config};
use crate::linalg::require_finite;

/// A layer less its keys and values.
#[derive(Debug)]
pub struct StoredSearch {
    settings: SearchSettings,
    scales: Vec<f32>,
    mean: Array1<f32>,
    threshold: f32,
}

/// The scores that one pass over the keys is to find.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoreRange {
    /// The least score, of the query or of its negative.
    pub least: f32,
    pub two_sided: bool,
}

impl StoredSearch {
    /// From the catalogue's config, the scales of all keys, and the tensors `mean` and, where the layer was calibrated,
    /// `calibration_thresholds`.
    pub fn new(config: &Value, scales: Vec<f32>, tensors: &[Tensor], limit: Option<Limit>) -> Result<Self> {
        let settings: SearchSettings = read_config(KeyValueConfig::NAME, config)?;
        let tensor = |name: &str| tensors.iter().find(|t| t.name == name);
        let mean = tensor("mean").ok_or_else(|| Error::expected("parts of a key–value layer", "no mean", "mean"))?;
        let measured: Option<Curves> = tensor("calibration_thresholds").map(|t| curves(t, scales.len())).transpose()?;
        let limit = limit.unwrap_or_else(|| settings.limit(scales.len()));
        limit.validate(settings.sides)?;
        let threshold = match limit {
            Limit::Threshold(threshold) => threshold,
            Limit::Keys(k) => expecting(k, &scales, measured.as_ref(), settings.ranking, settings.sides),
            Limit::MaxError(_) => {
                return Err(Error::expected(
                    "limit of a search on disk",
                    "max_relative_error",
                    "expected keys or a threshold: what was left out is not known",
                ));
            }
        };
        Ok(StoredSearch { settings, scales, mean: mean.to_vector()?, threshold })
    }

    /// `x − μ`.
    pub fn centred(&self, x: ArrayView2<f32>) -> Result<Array2<f32>> {
        if x.ncols() != self.mean.len() {
            return Err(Error::expected(
                "width of the query",
                x.ncols(),
                format!("{}, the layer's in_features", self.mean.len()),
            ));
        }
        require_finite("the query", x.iter())?;
        Ok(&x - &self.mean)
    }

    /// Scores that a hit may have: any hit has one of at least `least`. `None` where any key may be a hit.
    pub fn range(&self) -> Option<ScoreRange> {
        let largest = self.scales.iter().fold(0f32, |most, &scale| most.max(scale));
        let least = match self.settings.ranking {
            Ranking::Score => self.threshold,
            Ranking::Contribution => self.threshold / largest,
        };
        let two_sided = self.settings.sides == Sides::Both;
        (self.threshold > 0.0 && least.is_finite()).then_some(ScoreRange { least, two_sided })
    }

    /// The answer to a query, of keys and their scores.
    pub fn answer(&self, scored: impl Iterator<Item = (u32, f32)>) -> Result<QueryHits> {
        let mut hits = vec![];
        for (key, score) in scored {
            let scale = *self.scales.get(key as usize).ok_or_else(|| {
                Error::expected("key of a layer", key, format!("less than {}, its keys", self.scales.len()))
            })?;
            if rank_value(score, scale, self.settings.ranking, self.settings.sides) >= self.threshold {
                hits.push(Hit { key, score, contribution: score * scale });
            }
        }
        rank_hits(&mut hits, &self.settings);
        hits.truncate(self.settings.max_ids_capacity.unwrap_or(usize::MAX));
        Ok(QueryHits { threshold: self.threshold, certified_error: None, hits })
    }
}
