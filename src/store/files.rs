//! Files that belong to a model beside its layers: its configuration, its tokenizer. Each is a row of the catalogue whose artifact
//! is the content, so that versions, copies and gc treat them as they treat layers, and models that have the same file share it.

use bytes::Bytes;
use serde::Serialize;

use super::record::LayerRecord;
use super::snapshot::Snapshot;
use crate::error::{Error, Result};
use crate::layer::FileLayer;

/// A file that belongs to a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ModelFile {
    /// Its name, with the folders between it and the model's own.
    pub name: String,
    /// The length of its content.
    pub bytes: u64,
    /// The artifact that holds it, in hex.
    pub artifact: String,
}

impl From<&LayerRecord> for ModelFile {
    fn from(record: &LayerRecord) -> Self {
        let (name, artifact) = (record.layer.clone(), record.artifact.to_string());
        ModelFile { name, bytes: record.stored_bytes, artifact }
    }
}

impl LayerRecord {
    /// Returns whether the row is that of a file that belongs to the model, and not of a layer.
    pub fn is_file(&self) -> bool {
        self.method == FileLayer::METHOD
    }
}

impl Snapshot {
    /// Returns the files that belong to a model beside its layers, by name.
    ///
    /// # Errors
    /// When there is no such model.
    pub async fn files(&self, model: &str) -> Result<Vec<ModelFile>> {
        Ok(self.rows(model).await?.iter().filter(|record| record.is_file()).map(ModelFile::from).collect())
    }

    /// Reads a file that belongs to a model.
    ///
    /// # Errors
    /// When there is no such model or file, or the content cannot be read.
    pub async fn file(&self, model: &str, name: &str) -> Result<Bytes> {
        let layer = self.layer(model, name).await?.load().await?;
        match layer.downcast_ref::<FileLayer>() {
            Some(file) => Ok(file.content().clone()),
            None => Err(Error::expected(
                format!("file '{name}' of model '{model}'"),
                format!("a {} layer", layer.method()),
                "a file",
            )),
        }
    }
}
