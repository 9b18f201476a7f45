//! Makes modules of the layers that [`Module::to_layers`] turned them into.

use std::collections::BTreeMap;

use ndarray::{Array1, Array2};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::block::TransformerBlock;
use super::embedding::{EmbeddingTable, PatchEmbedding, Patches, TokenEmbedding};
use super::glu::Glu;
use super::gru::Gru;
use super::lru::{Lru, LruLayers, LruSpectrum};
use super::module::Module;
use super::token_mixer::GruTokenMixer;
use crate::error::{Error, Result};
use crate::layer::{ModuleLayer, RmsNorm, SharedLayer};

/// Kinds of stored modules.
const KINDS: &str = "activation, rms_norm, glu, gru, lru, attention, transformer_block, token_embedding, patches, \
                     patch_embedding, flatten, mean or sequential";

impl Module {
    /// Makes the module `name` of layers by name; layers of other modules may be among them.
    ///
    /// # Errors
    /// When a layer is missing, of an unknown kind, or does not fit the others.
    pub fn from_layers(name: &str, layers: &BTreeMap<String, SharedLayer>) -> Result<Module> {
        let layer = required(name, layers)?;
        let Some(own) = layer.downcast_ref::<ModuleLayer>() else { return Ok(Module::Linear(layer.clone())) };
        Reader { name, own, layers }.module().map_err(|e| match e {
            Error::Layer { .. } => e,
            e => e.in_layer(name),
        })
    }
}

fn required<'a>(name: &str, layers: &'a BTreeMap<String, SharedLayer>) -> Result<&'a SharedLayer> {
    layers.get(name).ok_or_else(|| Error::expected(format!("layer '{name}'"), "none", "what a module is made of"))
}

/// Reads one module: its own layer, and those behind its name.
struct Reader<'a> {
    name: &'a str,
    own: &'a ModuleLayer,
    layers: &'a BTreeMap<String, SharedLayer>,
}

impl Reader<'_> {
    fn module(&self) -> Result<Module> {
        Ok(match self.own.kind() {
            "activation" => Module::Activation(self.setting("activation")?),
            "rms_norm" => Module::RmsNorm(RmsNorm::new(self.matrix("gain")?, self.matrix("bias")?)?),
            "glu" => Module::Glu(Glu::new(self.settings()?, self.part("gate_dense")?, self.part("down_dense")?)?),
            "gru" => Module::Gru(self.gru()?),
            "attention" => Module::GruTokenMixer(GruTokenMixer::new(self.gru()?)?),
            "lru" => Module::Lru(Box::new(self.lru()?)),
            "transformer_block" => Module::TransformerBlock(Box::new(self.transformer_block()?)),
            "token_embedding" => {
                Module::TokenEmbedding(TokenEmbedding::new(self.table("token_embedding")?, self.positions()?)?)
            }
            "patches" => Module::Patches(Patches::new(self.setting("patch_size")?)?),
            "patch_embedding" => {
                Module::PatchEmbedding(PatchEmbedding::new(self.part("projection")?, self.positions()?)?)
            }
            "flatten" => Module::Flatten,
            "mean" => Module::Mean,
            "sequential" => {
                let names: Vec<String> = self.setting("layers")?;
                let one = |part: String| Ok((part.clone(), self.submodule(&part)?));
                Module::Sequential(names.into_iter().map(one).collect::<Result<_>>()?)
            }
            kind => return Err(Error::expected("kind of a module", kind, KINDS)),
        })
    }

    fn gru(&self) -> Result<Gru> {
        let has_gate = self.layers.contains_key(&self.child("data_gate"));
        let gate = has_gate.then(|| self.part("data_gate")).transpose()?;
        Gru::new(self.settings()?, self.part("kernel")?, gate, self.part("output_gate")?)
    }

    fn lru(&self) -> Result<Lru> {
        let spectrum = LruSpectrum {
            nu_log: self.vector("nu_log")?,
            theta_log: self.vector("theta_log")?,
            gamma_log: self.vector("gamma_log")?,
        };
        let layers = LruLayers {
            b_re: self.part("b_re")?,
            b_im: self.part("b_im")?,
            c_re: self.part("c_re")?,
            c_im: self.part("c_im")?,
            d: self.part("d")?,
        };
        Lru::new(self.settings()?, spectrum, layers)
    }

    fn transformer_block(&self) -> Result<TransformerBlock> {
        let parts = ["attention", "attention_norm", "ffn", "ffn_norm"].map(|part| self.submodule(part));
        match parts {
            [
                Ok(Module::GruTokenMixer(mixer)),
                Ok(Module::RmsNorm(mixer_norm)),
                Ok(Module::Glu(ffn)),
                Ok(Module::RmsNorm(ffn_norm)),
            ] => TransformerBlock::new(self.settings()?, mixer, mixer_norm, ffn, ffn_norm),
            parts => {
                let mut kinds = vec![];
                for part in parts {
                    kinds.push(part?.kind());
                }
                Err(Error::expected("parts of a block", kinds.join(", "), "attention, rms_norm, glu, rms_norm"))
            }
        }
    }

    fn positions(&self) -> Result<Option<EmbeddingTable>> {
        match self.own.settings().get("positions") {
            Some(Value::Bool(true)) => self.table("position_embedding").map(Some),
            _ => Ok(None),
        }
    }

    fn table(&self, part: &str) -> Result<EmbeddingTable> {
        EmbeddingTable::new(self.part(part)?)
    }

    fn child(&self, part: &str) -> String {
        format!("{}.{part}", self.name)
    }

    /// Returns a linear layer of the module.
    fn part(&self, part: &str) -> Result<SharedLayer> {
        required(&self.child(part), self.layers).cloned()
    }

    /// Makes a module that this one is made of.
    fn submodule(&self, part: &str) -> Result<Module> {
        Module::from_layers(&self.child(part), self.layers)
    }

    /// Reads all settings.
    fn settings<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_value(Value::Object(self.own.settings().clone())).map_err(|e| {
            Error::expected(format!("settings of a {}", self.own.kind()), e, "those that this version writes")
        })
    }

    /// Reads one setting.
    fn setting<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let value = self.own.settings().get(name).cloned().unwrap_or(Value::Null);
        serde_json::from_value(value)
            .map_err(|e| Error::expected(format!("{name} of a {}", self.own.kind()), e, "what this version writes"))
    }

    fn matrix(&self, name: &str) -> Result<Option<Array2<f32>>> {
        let array = self.own.tensor(name).map(|array| array.clone().into_dimensionality());
        array.transpose().map_err(|e| Error::expected(format!("shape of {name}"), e, "[positions, features]"))
    }

    fn vector(&self, name: &str) -> Result<Array1<f32>> {
        let array = self.own.tensor(name).ok_or_else(|| Error::expected(format!("tensor '{name}'"), "none", "one"))?;
        array.clone().into_dimensionality().map_err(|e| Error::expected(format!("shape of {name}"), e, "a vector"))
    }
}
