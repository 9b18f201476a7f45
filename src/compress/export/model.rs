//! What every format writes from.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

use super::options::ExportDtype;
use super::outline::Outline;
use super::tensor::Work;
use crate::error::Result;
use crate::staged;

/// What every format writes from.
pub(super) struct Model {
    pub name: String,
    pub outline: Outline,
    pub files: BTreeMap<String, Bytes>,
    pub metadata: HashMap<String, String>,
    pub dtype: Option<ExportDtype>,
    pub allow_dequantize: bool,
    /// Whether scales may be rounded to what a format has.
    pub rounds_scales: bool,
    pub output: PathBuf,
    pub work: Arc<Work>,
}

impl Model {
    /// Writes one file of all tensors.
    pub fn safetensors(&mut self) -> Result<u64> {
        let tensors = std::mem::take(&mut self.outline.tensors);
        let tensors: Vec<_> = tensors.into_iter().map(|tensor| self.work.tensor(tensor)).collect();
        self.work.start(&tensors);
        let metadata = std::mem::take(&mut self.metadata);
        let work = self.work.clone();
        staged::write(&self.output, |staged| work.write_safetensors(tensors, metadata, staged, &self.output))
    }
}
