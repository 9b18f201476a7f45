//! Layers of a saved model, class by class.

use ndarray::{Array1, Array2};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::archive::{Archive, Part};
use crate::error::{Error, Result};
use crate::layer::{Activation, DenseLayer, Layer, RmsNorm, SharedLayer, TernaryLayer};
use crate::nn::{
    BlockConfig, EmbeddingTable, Glu, GluConfig, Gru, GruConfig, GruTokenMixer, Lru, LruConfig, LruLayers, LruSpectrum,
    Module, PatchEmbedding, Patches, SequenceConfig, TokenEmbedding, TransformerBlock, decode_ternary,
};

/// Returns what a layer becomes: nothing for what only trains, two modules for a dense layer with an activation.
pub fn read(layer: &Value, name: &str, archive: &Archive) -> Result<Vec<(String, Module)>> {
    let config = &layer["config"];
    let weights = || archive.layer(name);
    // Names are parts of a layer's path.
    let name = name.replace('/', ".");
    let class = layer["class_name"].as_str().unwrap_or_default();
    let module = match class {
        "InputLayer" | "Dropout" | "SpatialDropout1D" | "GaussianDropout" | "GaussianNoise" => return Ok(vec![]),
        "DenseMML" => Module::Linear(ternary(&weights()?)?.with_activation(activation(config)?).shared()),
        "RMSNorm" => {
            let weights = weights()?;
            let (gain, bias) = match config["has_learnable_weights"].as_bool() {
                Some(false) => (None, None),
                _ => (Some(by_position(weights.array("0")?)?), weights.optional("1")?.map(by_position).transpose()?),
            };
            Module::RmsNorm(RmsNorm::new(gain, bias)?)
        }
        "GLUMML" | "BilinearMML" | "GeGLUMML" | "ReGLUMML" | "SeGLUMML" | "SwiGLUMML" => {
            Module::Glu(glu(&weights()?, settings(config)?)?)
        }
        "GRUMML" => Module::Gru(gru(&weights()?.part("cell")?, settings(config)?)?),
        "LRUMML" => Module::Lru(Box::new(lru(&weights()?.part("cell")?, settings(config)?)?)),
        "AttentionMML" => Module::GruTokenMixer(token_mixer(&weights()?, config, "out_dim")?),
        "TransformerBlockMML" => {
            let weights = weights()?;
            let norm = |part: &str| -> Result<RmsNorm> {
                RmsNorm::new(Some(by_position(weights.part(part)?.array("0")?)?), None)
            };
            let ffn = GluConfig {
                units: length(config, "embedding_dim")?,
                intermediate_size: Some(length(config, "ffn_dim")?),
                activation: Activation::Silu,
                ..GluConfig::default()
            };
            let block = TransformerBlock::new(
                settings::<BlockConfig>(config)?,
                token_mixer(&weights.part("_attention_layer")?, config, "embedding_dim")?,
                norm("_attention_norm")?,
                glu(&weights.part("_ffn_layer")?, ffn)?,
                norm("_ffn_norm")?,
            )?;
            Module::TransformerBlock(Box::new(block))
        }
        "TokenEmbedding" => {
            let weights = weights()?;
            let tokens = table(&weights.part("_token_embedding")?)?;
            Module::TokenEmbedding(TokenEmbedding::new(tokens, positions(&weights)?)?)
        }
        "Embedding" => Module::TokenEmbedding(TokenEmbedding::new(table(&weights()?)?, None)?),
        "Patches" => Module::Patches(Patches::new(length(config, "patch_size")?)?),
        "PatchEmbedding" => {
            let weights = weights()?;
            Module::PatchEmbedding(PatchEmbedding::new(linear(&weights.part("_projection")?)?, positions(&weights)?)?)
        }
        "Dense" => {
            let dense = Module::Linear(dense(&weights()?)?);
            return Ok(match activation(config)? {
                Activation::Linear => vec![(name, dense)],
                function => vec![(name.clone(), dense), (format!("{name}.activation"), Module::Activation(function))],
            });
        }
        "Activation" => Module::Activation(activation(config)?),
        "ReLU" => Module::Activation(Activation::Relu),
        "Softmax" => Module::Activation(Activation::Softmax),
        "Flatten" => Module::Flatten,
        "GlobalAveragePooling1D" => Module::Mean,
        other => {
            let known = "one of Keras-MML's layers, InputLayer, Dense, Embedding, Activation, ReLU, Softmax, Flatten, \
                         GlobalAveragePooling1D or a kind of dropout";
            return Err(Error::expected("class of the layer", format!("'{other}'"), known));
        }
    };
    Ok(vec![(name, module)])
}

fn settings<T: DeserializeOwned>(config: &Value) -> Result<T> {
    T::deserialize(config).map_err(|e| Error::expected("settings of the layer", e, "those that Keras-MML has"))
}

fn length(config: &Value, name: &str) -> Result<usize> {
    let found = config[name].as_u64().and_then(|n| usize::try_from(n).ok());
    found.ok_or_else(|| Error::expected(name, &config[name], "a whole number"))
}

fn activation(config: &Value) -> Result<Activation> {
    match &config["activation"] {
        Value::Null => Ok(Activation::Linear),
        value => {
            let known = Activation::ALL.map(|a| serde_json::json!(a).as_str().unwrap_or_default().to_owned());
            Activation::deserialize(value).map_err(|_| Error::expected("activation", value, known.join(", ")))
        }
    }
}

/// `[…, features]` as `[positions, features]`.
fn by_position(array: ndarray::ArrayD<f32>) -> Result<Array2<f32>> {
    let features = array.shape().last().copied().unwrap_or(0);
    let (shape, rows) = (format!("{:?}", array.shape()), array.len().checked_div(features).unwrap_or(0));
    array
        .into_shape_with_order((rows, features))
        .map_err(|_| Error::expected("shape of a gain", shape, "[…, features]"))
}

/// `DenseMML`: ternary weights as they were saved.
fn ternary(weights: &Part) -> Result<TernaryLayer> {
    let shape = weights.lengths("kernel_shape")?;
    let [inputs, outputs] = shape[..] else {
        return Err(Error::expected("shape of a kernel", format!("{shape:?}"), "[in, out]"));
    };
    let count = inputs.checked_mul(outputs).ok_or_else(|| {
        Error::expected("shape of a kernel", format!("{shape:?}"), "one whose weights can be counted")
    })?;
    let kernel = decode_ternary(&weights.bytes("kernel_encoded")?, count)?;
    let kernel = Array2::from_shape_vec((inputs, outputs), kernel).map_err(|e| Error::Numeric(e.to_string()))?;
    let steps = weights.array("kernel_scale")?;
    let steps = match steps.iter().next() {
        Some(&steps) if steps > 0.0 && steps.is_finite() => steps,
        found => return Err(Error::expected("kernel_scale", format!("{found:?}"), "a number above 0")),
    };
    let layer = TernaryLayer::from_ternary(kernel.t(), 1.0 / steps, weights.optional_vector("bias")?)?;
    let gain = by_position(weights.part("_activation_norm")?.array("0")?)?;
    layer.with_norm(Some(RmsNorm::new(Some(gain), None)?))
}

fn dense(weights: &Part) -> Result<SharedLayer> {
    let kernel = weights.matrix("0")?;
    let bias: Option<Array1<f32>> = weights.optional_vector("1")?;
    if let Some(found) = bias.as_ref().map(Array1::len).filter(|&found| found != kernel.ncols()) {
        return Err(Error::expected("length of a bias", found, format!("{}, the kernel's outputs", kernel.ncols())));
    }
    let kernel = kernel.reversed_axes().as_standard_layout().into_owned();
    Ok(DenseLayer::from_f32(kernel.view(), bias.as_ref().map(|b| b.view())).shared())
}

/// `DenseMML` or `Dense`.
fn linear(weights: &Part) -> Result<SharedLayer> {
    if weights.has("_activation_norm") { Ok(ternary(weights)?.shared()) } else { dense(weights) }
}

fn glu(weights: &Part, config: GluConfig) -> Result<Glu> {
    Glu::new(config, linear(&weights.part("_gate_dense")?)?, linear(&weights.part("_down_dense")?)?)
}

fn gru(cell: &Part, config: GruConfig) -> Result<Gru> {
    let gate = match config.fully_mml {
        true => None,
        false => Some(linear(&cell.part("_g_gate")?)?),
    };
    Gru::new(config, linear(&cell.part("_kernel")?)?, gate, linear(&cell.part("_o_gate")?)?)
}

fn lru(cell: &Part, config: LruConfig) -> Result<Lru> {
    let of = |name: &str| -> Result<Array1<f32>> {
        let found = cell.optional_vector(name)?;
        found.ok_or_else(|| Error::expected("eigenvalues of an LRU", "none", "three vectors of logarithms"))
    };
    let spectrum = LruSpectrum { nu_log: of("0")?, theta_log: of("1")?, gamma_log: of("2")? };
    let layer = |name: &str| linear(&cell.part(name)?);
    let layers = LruLayers {
        b_re: layer("_b_gate_re")?,
        b_im: layer("_b_gate_im")?,
        c_re: layer("_c_gate_re")?,
        c_im: layer("_c_gate_im")?,
        d: layer("_d_gate")?,
    };
    Lru::new(config, spectrum, layers)
}

/// `AttentionMML`, which is a GRU.
fn token_mixer(weights: &Part, config: &Value, units: &str) -> Result<GruTokenMixer> {
    let config = GruConfig {
        units: length(config, units)?,
        num_heads: length(config, "num_heads")?,
        fully_mml: config["fully_mml"].as_bool().unwrap_or(true),
        sequence: SequenceConfig { return_sequences: true, ..SequenceConfig::default() },
        ..GruConfig::default()
    };
    GruTokenMixer::new(gru(&weights.part("_internal_layer")?.part("cell")?, config)?)
}

fn table(weights: &Part) -> Result<EmbeddingTable> {
    EmbeddingTable::new(DenseLayer::from_f32(weights.matrix("0")?.view(), None).shared())
}

fn positions(weights: &Part) -> Result<Option<EmbeddingTable>> {
    match weights.has("_pos_embedding") {
        true => Ok(Some(table(&weights.part("_pos_embedding")?)?)),
        false => Ok(None),
    }
}
