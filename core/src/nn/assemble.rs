//! Modules as layers by name, and back.
//!
//! A module is a layer of its own name, which keeps its kind, settings and small tensors; what it is made of are layers
//! behind that name: `block.ffn.down_dense` is part of `block.ffn`, which is part of `block`.

use std::collections::BTreeMap;

use ndarray::{Array1, Array2, ArrayD};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::block::TransformerBlock;
use super::embedding::{PatchEmbedding, Patches, Table, TokenEmbedding};
use super::glu::Glu;
use super::gru::Gru;
use super::lru::{Lru, LruLayers, LruSpectrum};
use super::module::Module;
use super::recurrence::Cell;
use crate::error::{Error, Result};
use crate::layer::{Activation, Layer, ModuleLayer, SharedLayer, RmsNorm};

/// Kinds of stored modules.
const KINDS: &str = "activation, rms_norm, glu, gru, lru, attention, transformer_block, token_embedding, patches, \
                     patch_embedding, flatten, mean or sequential";

type Tensors = BTreeMap<String, ArrayD<f32>>;

impl Module {
    /// The layers that it is stored as, its own first where it has one.
    pub fn to_layers(&self, name: &str) -> Vec<(String, SharedLayer)> {
        let mut layers = vec![];
        self.write(name, &mut layers);
        layers
    }

    fn write(&self, name: &str, to: &mut Vec<(String, SharedLayer)>) {
        let mut own = |settings: Map<String, Value>, tensors: Tensors| {
            to.push((name.to_owned(), ModuleLayer::new(&self.kind(), settings, tensors).shared()));
        };
        let child = |part: &str| format!("{name}.{part}");
        match self {
            Module::Linear(layer) => to.push((name.to_owned(), layer.clone())),
            Module::Activation(activation) => own(fields(&json!({ "activation": activation })), Tensors::new()),
            Module::RmsNorm(norm) => {
                let arrays = [("gain", norm.gain()), ("bias", norm.bias())];
                let arrays = arrays.into_iter().filter_map(|(name, array)| Some((name.to_owned(), array?)));
                let width = norm.features().unwrap_or(0);
                own(sized(&json!({}), width, width), arrays.map(|(n, a)| (n, a.clone().into_dyn())).collect());
            }
            Module::Glu(glu) => {
                own(sized(glu.config(), glu.gate().in_features(), glu.config().units), Tensors::new());
                to.push((child("gate_dense"), glu.gate().clone()));
                to.push((child("down_dense"), glu.down().clone()));
            }
            Module::Gru(gru) | Module::Attention(gru) => {
                own(sized(gru.config(), gru.in_features(), gru.out_features()), Tensors::new());
                to.push((child("kernel"), gru.kernel().clone()));
                to.extend(gru.data_gate().map(|gate| (child("data_gate"), gate.clone())));
                to.push((child("output_gate"), gru.output_gate().clone()));
            }
            Module::Lru(lru) => {
                let LruSpectrum { nu_log, theta_log, gamma_log } = lru.spectrum().clone();
                let tensors = [("nu_log", nu_log), ("theta_log", theta_log), ("gamma_log", gamma_log)];
                let tensors = tensors.into_iter().map(|(name, array)| (name.to_owned(), array.into_dyn())).collect();
                own(sized(lru.config(), lru.in_features(), lru.out_features()), tensors);
                let LruLayers { b_re, b_im, c_re, c_im, d } = lru.layers();
                for (part, layer) in [("b_re", b_re), ("b_im", b_im), ("c_re", c_re), ("c_im", c_im), ("d", d)] {
                    to.push((child(part), layer.clone()));
                }
            }
            Module::TransformerBlock(block) => {
                let width = block.attention().out_features();
                own(sized(&block.config(), width, width), Tensors::new());
                Module::Attention(block.attention().clone()).write(&child("attention"), to);
                Module::RmsNorm(block.attention_norm().clone()).write(&child("attention_norm"), to);
                Module::Glu(block.ffn().clone()).write(&child("ffn"), to);
                Module::RmsNorm(block.ffn_norm().clone()).write(&child("ffn_norm"), to);
            }
            Module::TokenEmbedding(embedding) => {
                own(
                    sized(
                        &json!({ "positions": embedding.positions().is_some() }),
                        1,
                        embedding.tokens().width(),
                    ),
                    Tensors::new(),
                );
                to.push((child("token_embedding"), embedding.tokens().layer().clone()));
                to.extend(embedding.positions().map(|p| (child("position_embedding"), p.layer().clone())));
            }
            Module::Patches(patches) => own(fields(&json!({ "patch_size": patches.patch_size() })), Tensors::new()),
            Module::PatchEmbedding(embedding) => {
                let layer = embedding.projection();
                own(
                    sized(
                        &json!({ "positions": embedding.positions().is_some() }),
                        layer.in_features(),
                        layer.out_features(),
                    ),
                    Tensors::new(),
                );
                to.push((child("projection"), layer.clone()));
                to.extend(embedding.positions().map(|p| (child("position_embedding"), p.layer().clone())));
            }
            Module::Flatten | Module::Mean => own(Map::new(), Tensors::new()),
            Module::Sequential(all) => {
                let names: Vec<&String> = all.iter().map(|(name, _)| name).collect();
                own(fields(&json!({ "layers": names })), Tensors::new());
                for (part, module) in all {
                    module.write(&child(part), to);
                }
            }
        }
    }

    /// The module of that name from layers by name; others may be among them.
    ///
    /// # Errors
    /// When a layer is missing, of an unknown kind, or does not fit the others.
    pub fn from_layers(name: &str, layers: &BTreeMap<String, SharedLayer>) -> Result<Module> {
        let layer = at(name, layers)?;
        let Some(own) = layer.downcast_ref::<ModuleLayer>() else { return Ok(Module::Linear(layer.clone())) };
        read(name, own, layers).map_err(|e| match e {
            Error::Layer { .. } => e,
            e => e.in_layer(name),
        })
    }
}

fn read(name: &str, own: &ModuleLayer, layers: &BTreeMap<String, SharedLayer>) -> Result<Module> {
    let child = |part: &str| format!("{name}.{part}");
    let linear = |part: &str| at(&child(part), layers).cloned();
    let table = |part: &str| Table::new(linear(part)?);
    let positions = || match own.settings().get("positions") {
        Some(Value::Bool(true)) => table("position_embedding").map(Some),
        _ => Ok(None),
    };
    Ok(match own.kind() {
        "activation" => {
            let activation: Activation = setting(own, "activation")?;
            Module::Activation(activation)
        }
        "rms_norm" => Module::RmsNorm(RmsNorm::new(matrix(own, "gain")?, matrix(own, "bias")?)?),
        "glu" => Module::Glu(Glu::new(settings(own)?, linear("gate_dense")?, linear("down_dense")?)?),
        kind @ ("gru" | "attention") => {
            let gate = child("data_gate");
            let gate = layers.contains_key(&gate).then(|| at(&gate, layers).cloned()).transpose()?;
            let gru = Gru::new(settings(own)?, linear("kernel")?, gate, linear("output_gate")?)?;
            if kind == "gru" { Module::Gru(gru) } else { Module::Attention(gru) }
        }
        "lru" => {
            let spectrum = LruSpectrum {
                nu_log: vector(own, "nu_log")?,
                theta_log: vector(own, "theta_log")?,
                gamma_log: vector(own, "gamma_log")?,
            };
            let all = LruLayers {
                b_re: linear("b_re")?,
                b_im: linear("b_im")?,
                c_re: linear("c_re")?,
                c_im: linear("c_im")?,
                d: linear("d")?,
            };
            Module::Lru(Box::new(Lru::new(settings(own)?, spectrum, all)?))
        }
        "transformer_block" => {
            let parts = ["attention", "attention_norm", "ffn", "ffn_norm"];
            let parts = parts.map(|part| Module::from_layers(&child(part), layers));
            match parts {
                [
                    Ok(Module::Attention(gru)),
                    Ok(Module::RmsNorm(first)),
                    Ok(Module::Glu(ffn)),
                    Ok(Module::RmsNorm(second)),
                ] => {
                    Module::TransformerBlock(Box::new(TransformerBlock::new(settings(own)?, gru, first, ffn, second)?))
                }
                parts => {
                    let mut kinds = vec![];
                    for part in parts {
                        kinds.push(part?.kind());
                    }
                    return Err(Error::expected(
                        "parts of a block",
                        kinds.join(", "),
                        "attention, rms_norm, glu, rms_norm",
                    ));
                }
            }
        }
        "token_embedding" => Module::TokenEmbedding(TokenEmbedding::new(table("token_embedding")?, positions()?)?),
        "patches" => Module::Patches(Patches::new(setting(own, "patch_size")?)?),
        "patch_embedding" => Module::PatchEmbedding(PatchEmbedding::new(linear("projection")?, positions()?)?),
        "flatten" => Module::Flatten,
        "mean" => Module::Mean,
        "sequential" => {
            let names: Vec<String> = setting(own, "layers")?;
            let one = |part: String| Ok((part.clone(), Module::from_layers(&child(&part), layers)?));
            Module::Sequential(names.into_iter().map(one).collect::<Result<_>>()?)
        }
        kind => return Err(Error::expected("kind of a module", kind, KINDS)),
    })
}

fn at<'a>(name: &str, layers: &'a BTreeMap<String, SharedLayer>) -> Result<&'a SharedLayer> {
    layers.get(name).ok_or_else(|| Error::expected(format!("layer '{name}'"), "none", "what a module is made of"))
}

fn settings<T: DeserializeOwned>(own: &ModuleLayer) -> Result<T> {
    serde_json::from_value(Value::Object(own.settings().clone()))
        .map_err(|e| Error::expected(format!("settings of a {}", own.kind()), e, "those that this version writes"))
}

fn setting<T: DeserializeOwned>(own: &ModuleLayer, name: &str) -> Result<T> {
    let value = own.settings().get(name).cloned().unwrap_or(Value::Null);
    serde_json::from_value(value)
        .map_err(|e| Error::expected(format!("{name} of a {}", own.kind()), e, "what this version writes"))
}

fn matrix(own: &ModuleLayer, name: &str) -> Result<Option<Array2<f32>>> {
    let array = own.tensor(name).map(|array| array.clone().into_dimensionality());
    array.transpose().map_err(|e| Error::expected(format!("shape of {name}"), e, "[positions, features]"))
}

fn vector(own: &ModuleLayer, name: &str) -> Result<Array1<f32>> {
    let array = own.tensor(name).ok_or_else(|| Error::expected(format!("tensor '{name}'"), "none", "one"))?;
    array.clone().into_dimensionality().map_err(|e| Error::expected(format!("shape of {name}"), e, "a vector"))
}

fn fields(settings: &impl Serialize) -> Map<String, Value> {
    match json!(settings) {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// Settings with the widths that the catalogue shows.
fn sized(settings: &impl Serialize, in_features: usize, out_features: usize) -> Map<String, Value> {
    let mut all = fields(settings);
    all.insert("in_features".into(), in_features.into());
    all.insert("out_features".into(), out_features.into());
    all
}
