//! A model of the store as a safetensors checkpoint again.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use layerstore_core::layer::{dtype_named, from_f32};
use safetensors::View;
use serde::Serialize;

use super::work::{Cancel, Progress};
use crate::error::{Error, Result};
use crate::layer::DType;
use crate::staged;
use crate::store::{LayerHandle, Snapshot};
use crate::tasks::unwrap_join;

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExportReport {
    /// The number of layers written.
    pub layers: usize,
    /// Size of the file, in bytes.
    pub bytes: u64,
}

/// Writes every tensor of `model` under its name and dtype in the checkpoint it came from: dense ones bit for bit, the
/// others decompressed. One layer at a time is in memory; the file appears whole or not at all, in place of one that is there:
/// where that is a symbolic link, of the file that it leads to, whose mode stays.
///
/// # Errors
/// When there is no such model, a layer cannot be read, the file cannot be written, or the work is cancelled.
pub async fn export(
    snapshot: &Snapshot,
    model: &str,
    output: &Path,
    progress: Arc<dyn Progress>,
    cancel: Cancel,
) -> Result<ExportReport> {
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
    let failure = Arc::new(Mutex::new(None));
    let mut tensors: Vec<(String, LazyTensor)> = Vec::new();
    let mut bytes = 0;
    for record in records {
        let handle = snapshot.handle(record);
        for (place, source) in handle.record().source.tensors.iter().enumerate() {
            let dtype = dtype_named(&source.dtype)?;
            let length = source.shape.iter().product::<usize>() * dtype.bitsize() / 8;
            bytes += length as u64;
            // Behind a layer's name: it may be a tensor of the layer's own.
            let part = source.tensor.strip_prefix(&handle.record().layer).and_then(|rest| rest.strip_prefix('.'));
            let tensor = LazyTensor {
                handle: handle.clone(),
                part: part.map(str::to_owned),
                which: if place > 0 { Which::Bias } else { Which::Weight },
                dtype,
                shape: source.shape.clone(),
                length,
                runtime: tokio::runtime::Handle::current(),
                failure: failure.clone(),
                progress: progress.clone(),
                cancel: cancel.clone(),
            };
            tensors.push((source.tensor.clone(), tensor));
        }
    }
    progress.started(tensors.len(), bytes);
    let output = output.to_owned();
    let written = tokio::task::spawn_blocking(move || write(&output, tensors, metadata, &failure)).await;
    progress.finished();
    Ok(ExportReport { layers, bytes: unwrap_join(written)?? })
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
        match failure.lock().unwrap_or_else(|e| e.into_inner()).take() {
            Some(failure) => Err(failure),
            None => written.map_err(|e| Error::file(output, e.to_string())),
        }
    })
}

/// What a tensor is of its layer, where it is none of [`Layer::own_tensors`](crate::layer::Layer::own_tensors).
enum Which {
    Weight,
    Bias,
}

/// A tensor that is read from the store when its turn comes to be written.
struct LazyTensor {
    handle: LayerHandle,
    /// The tensor's name less the layer's.
    part: Option<String>,
    which: Which,
    dtype: DType,
    shape: Vec<usize>,
    length: usize,
    runtime: tokio::runtime::Handle,
    failure: Arc<Mutex<Option<Error>>>,
    progress: Arc<dyn Progress>,
    cancel: Cancel,
}

impl LazyTensor {
    fn read(&self) -> Result<Vec<u8>> {
        if self.cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        self.progress.layer(&self.handle.record().layer);
        let layer = self.runtime.block_on(self.handle.load())?;
        let own = layer.own_tensors().into_iter().find(|(name, _)| Some(name) == self.part.as_ref());
        let raw = match self.which {
            Which::Weight => layer.raw_weight(),
            Which::Bias => layer.raw_bias(),
        };
        let bytes = match (own, raw, &self.which) {
            (Some((_, array)), ..) => from_f32(self.dtype, &array.iter().copied().collect::<Vec<f32>>())?,
            (None, Some(raw), _) => raw,
            (None, None, Which::Weight) => {
                from_f32(self.dtype, layer.weight()?.as_standard_layout().as_slice().unwrap_or_default())?
            }
            (None, None, Which::Bias) => {
                from_f32(self.dtype, &layer.stored_bias()?.map(|b| b.to_vec()).unwrap_or_default())?
            }
        };
        if bytes.len() != self.length {
            return Err(Error::expected("bytes of a stored tensor", bytes.len(), self.length));
        }
        self.progress.layer_done(self.length as u64, false);
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
        let mut failure = self.failure.lock().unwrap_or_else(|e| e.into_inner());
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
