//! Turns modules into layers by name.
//!
//! A module is a layer of its own name, which keeps its kind, settings and small tensors; what it is made of are layers
//! behind that name: `block.ffn.down_dense` is part of `block.ffn`, which is part of `block`.

use std::collections::BTreeMap;

use ndarray::ArrayD;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::block::TransformerBlock;
use super::embedding::EmbeddingTable;
use super::glu::Glu;
use super::gru::Gru;
use super::lru::{Lru, LruLayers, LruSpectrum};
use super::module::Module;
use super::recurrence::RnnCell;
use crate::layer::{Layer, ModuleLayer, RmsNorm, SharedLayer};

type Tensors = BTreeMap<String, ArrayD<f32>>;

impl Module {
    /// Returns the layers that the module is stored as, by name, its own first where it has one.
    pub fn to_layers(&self, name: &str) -> Vec<(String, SharedLayer)> {
        let mut layers = vec![];
        Writer { name, layers: &mut layers }.module(self);
        layers
    }
}

/// Appends the layers of the module `name`.
struct Writer<'a> {
    name: &'a str,
    layers: &'a mut Vec<(String, SharedLayer)>,
}

impl Writer<'_> {
    fn module(&mut self, module: &Module) {
        let kind = module.kind();
        match module {
            Module::Linear(layer) => self.layers.push((self.name.to_owned(), layer.clone())),
            Module::Activation(activation) => self.own(&kind, fields(&json!({ "activation": activation }))),
            Module::RmsNorm(norm) => self.rms_norm(&kind, norm),
            Module::Glu(glu) => self.glu(&kind, glu),
            Module::Gru(gru) => self.gru(&kind, gru),
            Module::Lru(lru) => self.lru(&kind, lru),
            Module::GruTokenMixer(mixer) => self.gru(&kind, mixer.gru()),
            Module::TransformerBlock(block) => self.transformer_block(&kind, block),
            Module::TokenEmbedding(embedding) => {
                let tokens = embedding.tokens();
                let positions = embedding.positions();
                let settings = json!({ "positions": positions.is_some() });
                self.own(&kind, sized(&settings, 1, tokens.embedding_dim()));
                self.part("token_embedding", tokens.layer());
                self.positions(positions);
            }
            Module::Patches(patches) => self.own(&kind, fields(&json!({ "patch_size": patches.patch_size() }))),
            Module::PatchEmbedding(embedding) => {
                let (layer, positions) = (embedding.projection(), embedding.positions());
                let settings = json!({ "positions": positions.is_some() });
                self.own(&kind, sized(&settings, layer.in_features(), layer.out_features()));
                self.part("projection", layer);
                self.positions(positions);
            }
            Module::Flatten | Module::Mean => self.own(&kind, Map::new()),
            Module::Sequential(modules) => {
                let names: Vec<&String> = modules.iter().map(|(name, _)| name).collect();
                self.own(&kind, fields(&json!({ "layers": names })));
                for (part, module) in modules {
                    self.submodule(part, module);
                }
            }
        }
    }

    /// Appends the module's own layer, without tensors.
    fn own(&mut self, kind: &str, settings: Map<String, Value>) {
        self.own_with(kind, settings, Tensors::new());
    }

    fn own_with(&mut self, kind: &str, settings: Map<String, Value>, tensors: Tensors) {
        self.layers.push((self.name.to_owned(), ModuleLayer::new(kind, settings, tensors).shared()));
    }

    /// Appends a linear layer of the module.
    fn part(&mut self, part: &str, layer: &SharedLayer) {
        self.layers.push((format!("{}.{part}", self.name), layer.clone()));
    }

    /// Appends the layers of a module that this one is made of.
    fn submodule(&mut self, part: &str, module: &Module) {
        let name = format!("{}.{part}", self.name);
        Writer { name: &name, layers: self.layers }.module(module);
    }

    fn positions(&mut self, positions: Option<&EmbeddingTable>) {
        if let Some(positions) = positions {
            self.part("position_embedding", positions.layer());
        }
    }

    fn rms_norm(&mut self, kind: &str, norm: &RmsNorm) {
        let arrays = [("gain", norm.gain()), ("bias", norm.bias())];
        let arrays = arrays.into_iter().filter_map(|(name, array)| Some((name.to_owned(), array?.clone().into_dyn())));
        let width = norm.features().unwrap_or(0);
        self.own_with(kind, sized(&json!({}), width, width), arrays.collect());
    }

    fn glu(&mut self, kind: &str, glu: &Glu) {
        self.own(kind, sized(glu.config(), glu.gate().in_features(), glu.config().units));
        self.part("gate_dense", glu.gate());
        self.part("down_dense", glu.down());
    }

    fn gru(&mut self, kind: &str, gru: &Gru) {
        self.own(kind, sized(gru.config(), gru.in_features(), gru.out_features()));
        self.part("kernel", gru.kernel());
        if let Some(gate) = gru.data_gate() {
            self.part("data_gate", gate);
        }
        self.part("output_gate", gru.output_gate());
    }

    fn lru(&mut self, kind: &str, lru: &Lru) {
        let LruSpectrum { nu_log, theta_log, gamma_log } = lru.spectrum().clone();
        let tensors = [("nu_log", nu_log), ("theta_log", theta_log), ("gamma_log", gamma_log)];
        let tensors = tensors.into_iter().map(|(name, array)| (name.to_owned(), array.into_dyn())).collect();
        self.own_with(kind, sized(lru.config(), lru.in_features(), lru.out_features()), tensors);
        let LruLayers { b_re, b_im, c_re, c_im, d } = lru.layers();
        for (part, layer) in [("b_re", b_re), ("b_im", b_im), ("c_re", c_re), ("c_im", c_im), ("d", d)] {
            self.part(part, layer);
        }
    }

    fn transformer_block(&mut self, kind: &str, block: &TransformerBlock) {
        let width = block.token_mixer().gru().out_features();
        self.own(kind, sized(&block.config(), width, width));
        self.submodule("attention", &Module::GruTokenMixer(block.token_mixer().clone()));
        self.submodule("attention_norm", &Module::RmsNorm(block.token_mixer_norm().clone()));
        self.submodule("ffn", &Module::Glu(block.ffn().clone()));
        self.submodule("ffn_norm", &Module::RmsNorm(block.ffn_norm().clone()));
    }
}

fn fields(settings: &impl Serialize) -> Map<String, Value> {
    match json!(settings) {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// Returns settings with the widths that the catalogue shows.
fn sized(settings: &impl Serialize, in_features: usize, out_features: usize) -> Map<String, Value> {
    let mut all = fields(settings);
    all.insert("in_features".into(), in_features.into());
    all.insert("out_features".into(), out_features.into());
    all
}
