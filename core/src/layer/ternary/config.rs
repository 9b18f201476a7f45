//! Settings of a ternary layer: those of a low-rank layer whose weights are ternary, and what surrounds the product.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::layer::activation::Activation;
use crate::layer::low_rank::{LowRankConfig, Rank};
use crate::quant::{ActivationFormat, Clipping, Group, ScaleType, WeightFormat, WeightType};

/// Settings of a ternary layer.
///
/// In a rule: `group` (`"tensor"`, `"channel"` or a number), `scales` and every setting of `low_rank` but `weight`, with
/// other defaults (one scale for the tensor, by its mean size; no correction; inputs rounded as BitNet b1.58 rounds them),
/// and `norm` and `activation`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Map<String, Value>", into = "Map<String, Value>")]
pub struct TernaryConfig {
    /// Whether inputs are normalised first: each row by the root of its mean square, without a gain.
    pub norm: bool,
    /// The activation that outputs pass through.
    pub activation: Activation,
    /// Weights, correction, and the rounding of inputs.
    pub weights: LowRankConfig,
}

impl Default for TernaryConfig {
    fn default() -> Self {
        TernaryConfig {
            norm: false,
            activation: Activation::Linear,
            weights: LowRankConfig {
                weight: WeightFormat {
                    weight_type: WeightType::Ternary,
                    group: Group::Tensor,
                    symmetric: true,
                    minimum: false,
                    scales: ScaleType::F32,
                },
                clipping: Clipping::Absmean,
                rank: Rank::Components(0),
                activations: ActivationFormat::Int8Absmax,
                ..LowRankConfig::default()
            },
        }
    }
}

impl TryFrom<Map<String, Value>> for TernaryConfig {
    type Error = String;

    fn try_from(mut given: Map<String, Value>) -> Result<Self, String> {
        fn read<T: serde::de::DeserializeOwned>(
            given: &mut Map<String, Value>,
            name: &str,
            default: T,
        ) -> Result<T, String> {
            match given.remove(name) {
                Some(value) => serde_json::from_value(value).map_err(|e| format!("{name}: {e}")),
                None => Ok(default),
            }
        }
        if given.contains_key("weight") {
            return Err(
                "found a setting `weight`, expected none: weights are ternary; give `group` and `scales`".into()
            );
        }
        let plain = TernaryConfig::default();
        let norm = read(&mut given, "norm", plain.norm)?;
        let activation = read(&mut given, "activation", plain.activation)?;
        let weight = WeightFormat {
            group: read(&mut given, "group", plain.weights.weight.group)?,
            scales: read(&mut given, "scales", plain.weights.weight.scales)?,
            ..plain.weights.weight
        };
        for (name, value) in [
            ("clipping", json!(plain.weights.clipping)),
            ("rank", json!(plain.weights.rank)),
            ("activations", json!(plain.weights.activations)),
            ("weight", json!(weight)),
        ] {
            given.entry(name).or_insert(value);
        }
        let weights: LowRankConfig = serde_json::from_value(Value::Object(given)).map_err(|e| e.to_string())?;
        Ok(TernaryConfig { norm, activation, weights })
    }
}

impl From<TernaryConfig> for Map<String, Value> {
    fn from(config: TernaryConfig) -> Self {
        let mut all = match json!(config.weights) {
            Value::Object(map) => map,
            _ => Map::new(),
        };
        all.remove("weight");
        all.insert("activations".into(), json!(config.weights.activations));
        all.insert("group".into(), json!(config.weights.weight.group));
        all.insert("scales".into(), json!(config.weights.weight.scales));
        all.insert("norm".into(), json!(config.norm));
        all.insert("activation".into(), json!(config.activation));
        all
    }
}

impl TernaryConfig {
    /// Checks the settings by themselves.
    ///
    /// # Errors
    /// As [`LowRankConfig::validate`], and when the weights are not ternary.
    pub fn validate(&self) -> Result<()> {
        if self.weights.weight.weight_type != WeightType::Ternary {
            return Err(Error::expected("weights of a ternary layer", self.weights.weight.weight_type, "ternary ones"));
        }
        self.weights.validate()
    }
}
