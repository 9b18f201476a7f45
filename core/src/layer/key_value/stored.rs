//! A search of keys that stay in the store: all that it needs but the keys.

use ndarray::{Array1, Array2, ArrayView2};
use serde_json::Value;

use super::config::{KeyValueConfig, SearchSettings};
use super::limit::{Limit, Ranking, Sides};
use super::parts::curves;
use super::search::{Hit, QueryHits, rank_hits, rank_value};
use super::threshold::{Curves, expecting};
use crate::error::{Error, Result};
use crate::layer::method::{Method, read_config};
use crate::layer::parts::Tensor;
use crate::linalg::require_finite;

/// A key–value layer less its keys and values, for searches that read keys and their scores from the store.
#[derive(Debug)]
pub struct StoredSearch {
    settings: SearchSettings,
    scales: Vec<f32>,
    mean: Array1<f32>,
    threshold: f32,
}

/// The range of scores that a search has to find.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoreRange {
    /// The least score, of the query or of its negative.
    pub least: f32,
    /// Whether scores of the query's negative count, too.
    pub two_sided: bool,
}

impl StoredSearch {
    /// Returns the search of a layer with the catalogue's config, the scales of all keys, and the tensors `mean` and, where the
    /// layer was calibrated, `calibration_thresholds`.
    ///
    /// # Errors
    /// When the config cannot be read, a tensor is missing or of another shape, or the limit is out of its range or one of
    /// errors.
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
                    "a number of keys or a threshold: what was left out is not known",
                ));
            }
        };
        Ok(StoredSearch { settings, scales, mean: mean.to_vector()?, threshold })
    }

    /// Returns `x − μ` for `x` `[batch, in_features]`.
    ///
    /// # Errors
    /// When the width of `x` is another, or a value is not finite.
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

    /// Returns the range that the score of every hit is in; `None` where any key may be a hit.
    pub fn range(&self) -> Option<ScoreRange> {
        let largest = self.scales.iter().fold(0f32, |most, &scale| most.max(scale));
        let least = match self.settings.ranking {
            Ranking::Score => self.threshold,
            Ranking::Contribution => self.threshold / largest,
        };
        let two_sided = self.settings.sides == Sides::Both;
        (self.threshold > 0.0 && least.is_finite()).then_some(ScoreRange { least, two_sided })
    }

    /// Returns the hits among keys with their scores.
    ///
    /// # Errors
    /// When the layer has no such key.
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
