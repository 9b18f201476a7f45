//! Models that Keras has saved (`.keras`), of Keras-MML's layers and some of Keras's own: their ternary kernels as they are,
//! without a latent weight.

mod archive;
mod layers;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use self::archive::Archive;
use super::source::{ReadyLayer, SourceContent, SourceLayer, TensorInfo, TensorSource};
use crate::error::{Error, Result};
use crate::layer::DenseLayer;
use crate::nn::Module;

/// The module that a whole model is: its layers are behind this name.
pub const KERAS_ROOT: &str = "model";

/// A `.keras` file, read as one module: its layers one after another, by their names.
#[derive(Debug)]
pub struct KerasSource {
    path: PathBuf,
    module: Module,
    tensors: BTreeMap<String, TensorInfo>,
}

impl KerasSource {
    /// Reads a `.keras` file.
    ///
    /// # Errors
    /// When the file cannot be read, is no `.keras` file, its layers are no chain, or one is of a class that is not known here:
    /// nothing is left out.
    pub fn open(path: &Path) -> Result<Self> {
        let module = read(&Archive::open(path)?).map_err(|e| Error::file(path, e.to_string()))?;
        Ok(KerasSource { path: path.to_owned(), module, tensors: BTreeMap::new() })
    }

    /// Returns the model.
    pub fn module(&self) -> &Module {
        &self.module
    }
}

impl TensorSource for KerasSource {
    fn path(&self) -> &Path {
        &self.path
    }

    /// None: Keras's arrays are laid out and named otherwise, so that they come as [`SourceContent::Ready`] layers.
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    fn bytes(&self, tensor: &TensorInfo) -> Result<Cow<'_, [u8]>> {
        let found = format!("'{}'", tensor.name);
        Err(Error::expected("tensor of a .keras file", found, "none: its layers are read whole"))
    }

    /// The model's layers; rules may take those of floats, ternary weights stay what they are.
    fn layers(&self) -> Vec<SourceLayer> {
        let all = self.module.to_layers(KERAS_ROOT).into_iter();
        let ready = |(name, layer): (String, crate::layer::SharedLayer)| {
            let takes_rules = layer.downcast_ref::<DenseLayer>().is_some();
            SourceLayer { name, content: SourceContent::Ready { layer: ReadyLayer::new(layer), takes_rules } }
        };
        all.map(ready).collect()
    }
}

fn read(archive: &Archive) -> Result<Module> {
    let model = &archive.config;
    let class = model["class_name"].as_str().unwrap_or_default();
    if !["Sequential", "Functional"].contains(&class) {
        return Err(Error::expected("class of the model", format!("'{class}'"), "Sequential or Functional"));
    }
    let all = model["config"]["layers"].as_array();
    let all = all.ok_or_else(|| Error::expected("layers of the model", "none", "a list"))?;
    if class == "Functional" {
        check_chain(all)?;
    }
    let mut modules = vec![];
    for layer in all {
        let name = name_of(layer)?;
        modules.extend(layers::read(layer, name, archive).map_err(|e| e.in_layer(name))?);
    }
    Ok(Module::Sequential(modules))
}

fn name_of(layer: &Value) -> Result<&str> {
    let name = layer["config"]["name"].as_str().filter(|name| !name.is_empty());
    name.ok_or_else(|| Error::expected("name of a layer", &layer["config"]["name"], "a text"))
}

/// That each layer takes the one before it, and that alone.
fn check_chain(layers: &[Value]) -> Result<()> {
    let mut before: Option<&str> = None;
    for layer in layers {
        let name = name_of(layer)?;
        let mut taken = vec![];
        histories(&layer["inbound_nodes"], &mut taken);
        let expected: Vec<&str> = before.into_iter().collect();
        if taken != expected {
            let found = if taken.is_empty() { "none".to_owned() } else { taken.join(", ") };
            return Err(Error::expected(
                format!("inputs of layer '{name}'"),
                found,
                before.map_or("none, for it is the first".to_owned(), |b| format!("'{b}', the layer before it")),
            ));
        }
        before = Some(name);
    }
    Ok(())
}

/// The layers whose outputs are named in what a layer is called with.
fn histories<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| histories(item, found)),
        Value::Object(fields) => match fields.get("keras_history").and_then(|h| h[0].as_str()) {
            Some(name) => found.push(name),
            None => fields.values().for_each(|field| histories(field, found)),
        },
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn layer(name: &str, inputs: &[&str]) -> Value {
        let args: Vec<Value> = inputs
            .iter()
            .map(|input| json!({"class_name": "__keras_tensor__", "config": {"keras_history": [input, 0, 0]}}))
            .collect();
        let nodes = if args.is_empty() { json!([]) } else { json!([{"args": args, "kwargs": {"mask": null}}]) };
        json!({"class_name": "Dense", "config": {"name": name}, "inbound_nodes": nodes})
    }

    /// `compressed.keras` is `tokens.keras` with its parts deflated.
    #[test]
    fn compressed_archives_hold_the_same() {
        let open = |name: &str| KerasSource::open(Path::new(&format!("tests/fixtures/keras/{name}.keras"))).unwrap();
        let ids = |source: &KerasSource| -> Vec<_> {
            source.module().to_layers(KERAS_ROOT).into_iter().map(|(name, l)| (name, l.to_parts().id())).collect()
        };
        assert_eq!(ids(&open("compressed")), ids(&open("tokens")));
        // A length that nothing could have been deflated from, in the directory.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.keras");
        let mut bytes = std::fs::read("tests/fixtures/keras/compressed.keras").unwrap();
        let mut at = 0;
        while let Some(entry) = bytes[at..].windows(4).position(|w| w == b"PK\x01\x02") {
            at += entry + 4;
            bytes[at + 20..at + 24].copy_from_slice(&0xf000_0000u32.to_le_bytes());
        }
        std::fs::write(&path, bytes).unwrap();
        let message = KerasSource::open(&path).unwrap_err().to_string();
        assert!(message.contains("expected what deflate can make of them"), "{message}");
    }

    /// Weights that were changed or cut off, past the archive's own sums: a module or an error, and no panic.
    #[test]
    fn weights_that_are_not_what_they_were() {
        let bytes = std::fs::read("tests/fixtures/keras/tokens.keras").unwrap();
        let archive = rawzip::ZipArchive::from_slice(&bytes[..]).unwrap();
        let (mut entries, mut parts) = (archive.entries(), std::collections::BTreeMap::new());
        while let Some(entry) = entries.next_entry().unwrap() {
            let name = String::from_utf8_lossy(entry.file_path().as_ref()).into_owned();
            parts.insert(name, archive.get_entry(entry.wayfinder()).unwrap().data().to_vec());
        }
        let (config, weights) = (&parts["config.json"], &parts["model.weights.h5"]);
        let opened = |weights: Vec<u8>| Archive::of(config, weights).and_then(|archive| read(&archive));
        assert!(opened(weights.clone()).is_ok());
        let mut refused = 0;
        for round in 0..700usize {
            let mut changed = weights.clone();
            let at = round.wrapping_mul(7919 * 31) % changed.len();
            match round % 3 {
                0 => changed[at] ^= 1 << (round % 8),
                1 => changed[at] = 0xff,
                _ => changed.truncate(at),
            }
            refused += usize::from(opened(changed).is_err());
        }
        assert!(refused > 100, "{refused}");
        assert!(Archive::of(b"{", weights.clone()).is_err());
    }

    #[test]
    fn only_chains_are_read() {
        assert!(check_chain(&[layer("a", &[]), layer("b", &["a"]), layer("c", &["b"])]).is_ok());
        for (layers, expected) in [
            (vec![layer("a", &[]), layer("b", &["a"]), layer("c", &["a"])], "'b', the layer before it"),
            (vec![layer("a", &[]), layer("b", &["a"]), layer("c", &["a", "b"])], "found a, b"),
            (vec![layer("a", &[]), layer("b", &[])], "found none"),
            (vec![layer("a", &["z"])], "it is the first"),
        ] {
            let message = check_chain(&layers).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        assert!(name_of(&json!({"config": {}})).is_err());
    }

    #[test]
    fn classes_that_are_not_known_are_named() {
        let path = Path::new("tests/fixtures/keras/tokens.keras");
        let archive = Archive::open(path).unwrap();
        let read = |class: &str, config: Value| {
            layers::read(&json!({"class_name": class, "config": config}), "lru", &archive).unwrap_err().to_string()
        };
        assert!(read("Conv2D", json!({})).contains("'Conv2D'"));
        assert!(read("LRUMML", json!({"units": "many"})).contains("settings"));
        assert!(read("LRUMML", json!({"units": 9, "state_dim": 4})).contains("(9, 4)"));
        assert!(read("GRUMML", json!({"units": 8, "fully_mml": true})).contains("_kernel"));
        assert!(read("Activation", json!({"activation": "mish"})).contains("gelu"));
        assert!(read("Patches", json!({})).contains("patch_size"));
    }
}
