//! A model's `config.json`: what kind of decoder its layers make up.

use layerstore_core::transformer::{DecoderConfig, Rotary, RotaryScaling};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::layer::Activation;

/// Families of Llama's kind, as `model_type` has them.
const FAMILIES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// A decoder, as its configuration describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// How its blocks attend.
    pub decoder: DecoderConfig,
    /// Blocks.
    pub blocks: usize,
    /// Added to the mean square of a norm.
    pub epsilon: f32,
    /// Whether the head is the embedding.
    pub is_tied: bool,
    /// Whether heads of queries and keys are normed.
    pub has_head_norms: bool,
    /// The longest text that it was made for.
    pub context: Option<usize>,
}

/// Reads the configuration of a decoder.
///
/// # Errors
/// When the family is not known, or a setting is missing or not what is run here: the message names it.
pub fn llama(config: &Value) -> Result<LlamaConfig> {
    let family = config["model_type"].as_str().unwrap_or_default();
    if !FAMILIES.contains(&family) {
        let found = format!("'{family}'");
        return Err(Error::expected("model_type of config.json", found, "llama, mistral, qwen2 or qwen3"));
    }
    let number = |key: &str| number(config, key);
    let required = |key: &str| required(config, key);
    let heads = required("num_attention_heads")?;
    let features = required("hidden_size")?;
    let head_dim = match number("head_dim")? {
        Some(head_dim) => head_dim,
        None if features.is_multiple_of(heads) => features / heads,
        None => {
            return Err(Error::expected(
                "hidden_size of config.json",
                features,
                format!("a multiple of {heads} heads"),
            ));
        }
    };
    let activation = match &config["hidden_act"] {
        Value::Null => Activation::Silu,
        other => match other.as_str() {
            Some("silu" | "swish") => Activation::Silu,
            Some("gelu") => Activation::Gelu,
            Some("relu") => Activation::Relu,
            _ => return Err(Error::expected("hidden_act of config.json", other, "silu, gelu or relu")),
        },
    };
    let context = number("max_position_embeddings")?;
    let is_windowed = flag(config, "use_sliding_window")?.unwrap_or(family == "mistral");
    let window = number("sliding_window")?.filter(|_| is_windowed);
    if window.is_some() && config["max_window_layers"] != 0 && !config["max_window_layers"].is_null() {
        let found = "windows in some of the blocks";
        return Err(Error::expected("max_window_layers of config.json", found, "0, or no window"));
    }
    let epsilon = float(config, "rms_norm_eps")?.unwrap_or(1e-6);
    Ok(LlamaConfig {
        decoder: DecoderConfig {
            heads,
            kv_heads: number("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            rotary: rotary(config, head_dim, context)?,
            window,
            activation,
        },
        blocks: required("num_hidden_layers")?,
        epsilon: epsilon as f32,
        is_tied: flag(config, "tie_word_embeddings")?.unwrap_or(false),
        has_head_norms: family == "qwen3",
        context,
    })
}

/// Reads the rotary positions, of older configurations and of newer ones, which have all of it in one table.
fn rotary(config: &Value, head_dim: usize, context: Option<usize>) -> Result<Rotary> {
    let table = &config["rope_parameters"];
    let scaling = if config["rope_scaling"].is_object() { &config["rope_scaling"] } else { table };
    let base = float(config, "rope_theta")?.or(float(table, "rope_theta")?).unwrap_or(10_000.0);
    let share = float(config, "partial_rotary_factor")?.or(float(table, "partial_rotary_factor")?).unwrap_or(1.0);
    let dimensions = (head_dim as f64 * share) as usize;
    let kind = scaling["rope_type"].as_str().or_else(|| scaling["type"].as_str()).unwrap_or("default");
    let number = |key: &str, default: Option<f64>| {
        let missing = || Error::expected(format!("{key} of the positions in config.json"), "none", "a number");
        float(scaling, key)?.or(default).ok_or_else(missing)
    };
    let original = || number("original_max_position_embeddings", context.map(|n| n as f64)).map(|n| n as usize);
    let scaling = match kind {
        "default" => RotaryScaling::None,
        "linear" => RotaryScaling::Linear { factor: number("factor", None)? },
        "dynamic" => RotaryScaling::Dynamic { factor: number("factor", None)?, original: original()? },
        "yarn" => RotaryScaling::Yarn {
            factor: number("factor", None)?,
            original: original()?,
            beta_fast: number("beta_fast", Some(32.0))?,
            beta_slow: number("beta_slow", Some(1.0))?,
            attention_factor: float(scaling, "attention_factor")?,
        },
        "llama3" => RotaryScaling::Llama3 {
            factor: number("factor", None)?,
            original: original()?,
            low_freq_factor: number("low_freq_factor", None)?,
            high_freq_factor: number("high_freq_factor", None)?,
        },
        other => {
            let expected = "default, linear, dynamic, yarn or llama3";
            return Err(Error::expected("rope_type of config.json", format!("'{other}'"), expected));
        }
    };
    Rotary::new(dimensions, base, scaling)
}

/// Reads a setting that may be left out; what is there has to be of its kind.
///
/// # Errors
/// When it is something else.
pub fn setting<T>(config: &Value, key: &str, kind: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
    match &config[key] {
        Value::Null => Ok(None),
        found => match read(found) {
            Some(value) => Ok(Some(value)),
            None => Err(Error::expected(format!("{key} of config.json"), found, kind)),
        },
    }
}

/// Reads a whole number above 0 that may be left out.
///
/// # Errors
/// When it is something else.
pub fn number(config: &Value, key: &str) -> Result<Option<usize>> {
    let whole = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0);
    setting(config, key, "a whole number above 0", whole)
}

/// Reads a whole number above 0 that has to be there.
///
/// # Errors
/// When it is not, or is something else.
pub fn required(config: &Value, key: &str) -> Result<usize> {
    let missing = || Error::expected(format!("{key} of config.json"), "none", "a whole number above 0");
    number(config, key)?.ok_or_else(missing)
}

/// Reads a number that may be left out.
///
/// # Errors
/// When it is something else.
pub fn float(config: &Value, key: &str) -> Result<Option<f64>> {
    setting(config, key, "a number", Value::as_f64)
}

fn flag(config: &Value, key: &str) -> Result<Option<bool>> {
    setting(config, key, "true or false", Value::as_bool)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn configurations_of_both_forms_are_read() {
        let old = json!({
            "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
            "num_hidden_layers": 3, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": true,
            "max_position_embeddings": 128,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64},
        });
        let found = llama(&old).unwrap();
        assert_eq!((found.decoder.head_dim, found.decoder.kv_heads, found.blocks, found.is_tied), (16, 2, 3, true));
        let mut new = old.clone();
        let mut table = old["rope_scaling"].clone();
        table["rope_theta"] = json!(500000.0);
        new["rope_parameters"] = table;
        new.as_object_mut().unwrap().retain(|key, _| key != "rope_scaling" && key != "rope_theta");
        assert_eq!(llama(&new).unwrap(), found);
    }

    #[test]
    fn what_is_not_run_is_named() {
        let good = json!({"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1});
        assert_eq!(llama(&good).unwrap().decoder.window, None);
        for (key, value, says) in [
            ("model_type", json!("mamba"), "'mamba'"),
            ("hidden_size", json!(66), "a multiple of 4 heads"),
            ("hidden_size", json!("x"), "hidden_size"),
            ("num_hidden_layers", json!(null), "num_hidden_layers of config.json: found none"),
            ("rms_norm_eps", json!("small"), "rms_norm_eps of config.json: found \"small\""),
            ("head_dim", json!(-2), "head_dim"),
            ("tie_word_embeddings", json!(1), "true or false"),
            ("hidden_act", json!("quick_gelu"), "\"quick_gelu\""),
            ("rope_scaling", json!({"rope_type": "longrope"}), "'longrope'"),
            ("rope_scaling", json!({"rope_type": "linear"}), "factor"),
            ("rope_theta", json!(0.5), "base"),
        ] {
            let mut wrong = good.clone();
            wrong[key] = value;
            let message = llama(&wrong).unwrap_err().to_string();
            assert!(message.contains(says), "{message}");
        }
        let mut windowed = good.clone();
        windowed["use_sliding_window"] = json!(true);
        windowed["sliding_window"] = json!(8);
        assert_eq!(llama(&windowed).unwrap().decoder.window, Some(8));
        windowed["max_window_layers"] = json!(28);
        assert!(llama(&windowed).is_err());
    }
}
