//! A model of the store as a safetensors checkpoint again.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use layerstore_core::layer::from_f32;
use safetensors::View;
use serde::Serialize;

use super::outline::{Content, Outline, OutlinedTensor, outline};
use super::work::{Cancel, Progress, Silent};
use crate::error::{Error, Result};
use crate::layer::{DType, SharedLayer};
use crate::staged;
use crate::store::{LayerHandle, Snapshot};
use crate::tasks::unwrap_join;

/// How a model is exported.
pub struct ExportOptions {
    /// Whether layers are written that compute more than a weight and a bias say, such as a norm before the product or an activation
    /// after it: without that, and with a note. If not, they are an error.
    pub allow_approximate: bool,
    /// What is told how far the export is.
    pub progress: Arc<dyn Progress>,
    /// Stops the export when the caller asks: nothing is written then.
    pub cancel: Cancel,
}

impl Default for ExportOptions {
    fn default() -> Self {
        ExportOptions { allow_approximate: false, progress: Arc::new(Silent), cancel: Cancel::new() }
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExportReport {
    /// The number of layers of the model.
    pub layers: usize,
    /// Size of the file, in bytes.
    pub bytes: u64,
    /// Names of the biases that the checkpoint did not have, and the layers' outputs need. What lies beside a checkpoint and says
    /// which layers have a bias (`attention_bias` in a `config.json`) does not know of them.
    pub added_biases: Vec<String>,
    /// What a person should know of layers, by name: what was left out or added, and how their own runs differ from the file.
    pub notes: BTreeMap<String, Vec<String>>,
}

/// Writes every tensor of `model` under its name and dtype in the checkpoint it came from: dense ones bit for bit, the others
/// decompressed. One layer at a time is in memory; the file appears whole or not at all, in place of one that is there:
/// where that is a symbolic link, of the file that it leads to, whose mode stays.
///
/// A layer's weight and bias in the file give the outputs of [`Layer::forward`](crate::layer::Layer::forward) with
/// [`Accuracy::Full`](crate::layer::Accuracy::Full), but for the rounding of their dtypes: with every key, and inputs as they are.
/// A constant that the layer adds to its outputs is part of the bias, which is added where the checkpoint had none. See
/// [`ExportOptions::allow_approximate`] for layers that compute something else.
///
/// # Errors
/// When there is no such model, a layer cannot be read, or computes more than a weight and a bias say, the file cannot be written,
/// or the work is cancelled.
pub async fn export(snapshot: &Snapshot, model: &str, output: &Path, options: ExportOptions) -> Result<ExportReport> {
    if output.extension().is_none_or(|e| e != "safetensors") {
        return Err(Error::expected(
            "output of an export",
            format!("'{}'", output.display()),
            "a name ending in .safetensors",
        ));
    }
    staged::probe(output)?;
    let records = snapshot.layers(model).await?;
    let layers = records.len();
    let metadata: HashMap<String, String> = records.iter().flat_map(|r| r.source.metadata.clone()).collect();
    let handles = records.into_iter().map(|record| snapshot.handle(record)).collect();
    let ExportOptions { allow_approximate, progress, cancel } = options;
    let work = Arc::new(Work {
        runtime: tokio::runtime::Handle::current(),
        failure: Mutex::default(),
        left: Mutex::default(),
        progress,
        cancel,
    });
    let output = output.to_owned();
    let done = tokio::task::spawn_blocking(move || {
        let Outline { tensors, added_biases, notes } =
            outline(handles, |handle| work.load(handle), allow_approximate, &output)?;
        let tensors: Vec<(String, LazyTensor)> = tensors.into_iter().map(|tensor| work.tensor(tensor)).collect();
        work.start(&tensors);
        let written = write(&output, tensors, metadata, &work.failure);
        work.progress.finished();
        Ok(ExportReport { layers, bytes: written?, added_biases, notes })
    });
    unwrap_join(done.await)?
}

/// What the tensors of an export share.
struct Work {
    runtime: tokio::runtime::Handle,
    failure: Mutex<Option<Error>>,
    /// For each layer, how many of its tensors are not written yet, and the bytes of those that are.
    left: Mutex<HashMap<String, (usize, u64)>>,
    progress: Arc<dyn Progress>,
    cancel: Cancel,
}

impl Work {
    /// Loads a layer, unless somebody has asked to stop.
    fn load(&self, handle: &LayerHandle) -> Result<SharedLayer> {
        self.runtime.block_on(self.cancel.unless(handle.load()))
    }

    /// Tells how many layers and bytes there are to write.
    fn start(&self, tensors: &[(String, LazyTensor)]) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, tensor) in tensors {
            left.entry(tensor.handle.record().layer.clone()).or_default().0 += 1;
        }
        self.progress.started(left.len(), tensors.iter().map(|(_, tensor)| tensor.length as u64).sum());
    }

    /// Tells of a layer when the last of its tensors is written.
    fn written(&self, tensor: &LazyTensor) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((tensors, bytes)) = left.get_mut(&tensor.handle.record().layer) {
            *tensors -= 1;
            *bytes += tensor.length as u64;
            if *tensors == 0 {
                self.progress.layer_done(*bytes, false);
            }
        }
    }

    fn tensor(self: &Arc<Self>, outlined: OutlinedTensor) -> (String, LazyTensor) {
        let OutlinedTensor { name, dtype, shape, handle, content } = outlined;
        let length = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        (name, LazyTensor { work: self.clone(), handle, content, dtype, shape, length })
    }
}

fn write(
    output: &Path,
    tensors: Vec<(String, LazyTensor)>,
    metadata: HashMap<String, String>,
    failure: &Mutex<Option<Error>>,
) -> Result<u64> {
    let metadata = (!metadata.is_empty()).then_some(metadata);
    staged::write(output, |staged| {
        let written = safetensors::serialize_to_file(tensors, metadata, staged);
        // A layer that could not be read left its reason here and zeros in the file.
        match failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(failure) => Err(failure),
            None => written.map_err(|e| Error::file(output, e.to_string())),
        }
    })
}

/// A tensor that is read from the store when its turn comes to be written.
struct LazyTensor {
    work: Arc<Work>,
    handle: LayerHandle,
    content: Content,
    dtype: DType,
    shape: Vec<usize>,
    length: usize,
}

impl LazyTensor {
    fn read(&self) -> Result<Vec<u8>> {
        if self.work.cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        self.work.progress.layer(&self.handle.record().layer);
        let bytes = match &self.content {
            Content::Made(bytes) => bytes.clone(),
            Content::Weight => {
                let layer = self.work.load(&self.handle)?;
                match layer.raw_weight() {
                    Some(raw) => raw,
                    None => from_f32(self.dtype, layer.weight()?.as_standard_layout().as_slice().unwrap_or_default())?,
                }
            }
            Content::Bias => self.work.load(&self.handle)?.raw_bias().unwrap_or_default(),
            Content::Own(name) => {
                let own = self.work.load(&self.handle)?.own_tensors().into_iter().find(|(own, _)| own == name);
                let numbers: Vec<f32> = own.iter().flat_map(|(_, array)| array.iter()).copied().collect();
                from_f32(self.dtype, &numbers)?
            }
        };
        if bytes.len() != self.length {
            return Err(Error::expected("bytes of a stored tensor", bytes.len(), self.length));
        }
        self.work.written(self);
        Ok(bytes.to_vec())
    }
}

impl View for LazyTensor {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut failure = self.work.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if failure.is_none() {
            match self.read() {
                Ok(bytes) => return bytes.into(),
                Err(e) => *failure = Some(e.in_layer(&self.handle.record().layer)),
            }
        }
        vec![0; self.length].into()
    }

    fn data_len(&self) -> usize {
        self.length
    }
}
