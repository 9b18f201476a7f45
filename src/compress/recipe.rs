//! What an artifact is made from, as one hash: an import whose recipe the store knows is no work.

use layerstore_core::layer::dtype_name;
use layerstore_core::layer::parts::canonical_json;
use serde_json::Value;

use super::calibration::CalibrationFile;
use crate::error::Result;
use crate::formats::{TensorInfo, TensorSource};
use crate::layer::ArtifactId;
use crate::store::SourceTensor;

/// Raise it when a method comes to make other parts from the same settings: what the old code made is not reused then.
const RECIPE_VERSION: u32 = 4;

/// The pieces of a recipe on their way into a hash, each preceded by its length.
pub(super) struct Recipe(blake3::Hasher);

impl Recipe {
    pub fn new() -> Self {
        let mut recipe = Recipe(blake3::Hasher::new());
        recipe.add(&RECIPE_VERSION.to_le_bytes());
        recipe
    }

    fn add(&mut self, bytes: &[u8]) {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update_rayon(bytes);
    }

    /// Adds a tensor of the source by its hash, and returns how the catalogue refers to it.
    pub fn tensor(&mut self, source: &dyn TensorSource, tensor: &TensorInfo) -> Result<SourceTensor> {
        let dtype = dtype_name(tensor.dtype);
        let hash = blake3::Hash::from_bytes(source.content_hash(tensor)?).to_hex().to_string();
        self.add(hash.as_bytes());
        let stored_as = source.stored_as(&tensor.name);
        Ok(SourceTensor { tensor: tensor.name.clone(), dtype, shape: tensor.shape.clone(), hash, stored_as })
    }

    /// Adds a layer that comes ready.
    pub fn artifact(&mut self, id: ArtifactId) {
        self.add(&id.0);
    }

    /// Adds numbers.
    pub fn numbers(&mut self, numbers: &[f32]) {
        self.add(bytemuck::cast_slice(numbers));
    }

    /// A method's settings, and its name.
    pub fn settings(&mut self, settings: &impl serde::Serialize) {
        self.add(canonical_json(&serde_json::to_value(settings).unwrap_or(Value::Null)).as_bytes());
    }

    /// The statistics of a layer's inputs, if there are any.
    pub fn calibration(&mut self, calibration: Option<&CalibrationFile>, layer: &str) -> Result<()> {
        match calibration {
            Some(calibration) => calibration.hash(layer, &mut self.0),
            None => Ok(()),
        }
    }

    pub fn finish(self) -> [u8; 32] {
        self.0.finalize().into()
    }
}
