//! The method as the registry knows it.

use ndarray::{ArrayView1, ArrayView2};
use serde_json::{Map, Value};

use super::build::build;
use super::config::{LowRankConfig, Rank, with_activations};
use super::layer::LowRankLayer;
use super::parts::from_parts;
use super::stored::{Running, StoredConfig};
use crate::calibration::Calibration;
use crate::error::Result;
use crate::layer::method::{Method, read_config, settings_in};
use crate::layer::parts::Parts;
use crate::layer::shape::LayerShape;

impl Method for LowRankConfig {
    const NAME: &'static str = "low_rank";
    type Layer = LowRankLayer;

    fn validate(&self) -> Result<()> {
        self.validate()
    }

    fn check(&self, shape: LayerShape, calibrated: bool) -> Result<()> {
        self.check(shape, calibrated)
    }

    fn expected_bytes(&self, shape: LayerShape) -> Result<Option<usize>> {
        self.expected_bytes(shape)
    }

    fn unusable(&self, calibration: &Calibration) -> Option<&'static str> {
        calibration.vanishes(self.bias_correction)
    }

    fn compress(
        &self,
        weight: ArrayView2<f32>,
        bias: Option<ArrayView1<f32>>,
        calibration: Option<&Calibration>,
    ) -> Result<LowRankLayer> {
        build(self, weight, bias, calibration)
    }

    fn from_parts(parts: Parts) -> Result<LowRankLayer> {
        LowRankLayer::new(from_parts(parts)?)
    }

    fn with_stored(&self, stored: &Value) -> Value {
        with_activations(stored.clone(), self.activations)
    }

    fn from_config(config: &Map<String, Value>) -> Result<Self> {
        let stored: StoredConfig = read_config(LowRankConfig::NAME, &Value::Object(config.clone()))?;
        let Running { activations } = read_config(LowRankConfig::NAME, &Value::Object(config.clone()))?;
        let made: LowRankConfig = settings_in(&stored.made)?;
        let StoredConfig { weight, rank, factors, .. } = stored;
        let settings = LowRankConfig { weight, rank: Rank::Components(rank), factors, activations, ..made };
        settings.validate()?;
        Ok(settings)
    }
}
