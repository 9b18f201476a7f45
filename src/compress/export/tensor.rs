//! Tensors of an export, read from the store when their turn comes to be written.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use layerstore_core::layer::{from_f32, to_f32};
use ndarray::Array2;
use safetensors::View;

use super::content::{Content, OutlinedTensor, Piece, packed_of};
use crate::error::{Error, Result};
use crate::layer::parts::Side;
use crate::layer::{DType, Layer, LowRankLayer, SharedLayer};
use crate::store::LayerHandle;
use crate::work::{Cancel, Progress};

/// What the tensors of an export share.
pub(super) struct Work {
    runtime: tokio::runtime::Handle,
    failure: Mutex<Option<Error>>,
    /// For each layer, how many of its tensors are not written yet, and the bytes of those that are.
    left: Mutex<HashMap<String, (usize, u64)>>,
    progress: Arc<dyn Progress>,
    cancel: Cancel,
}

impl Work {
    pub fn new(runtime: tokio::runtime::Handle, progress: Arc<dyn Progress>, cancel: Cancel) -> Self {
        Work { runtime, failure: Mutex::default(), left: Mutex::default(), progress, cancel }
    }

    /// Loads a layer, unless somebody has asked to stop.
    pub fn load(&self, handle: &LayerHandle) -> Result<SharedLayer> {
        self.runtime.block_on(self.cancel.unless(handle.load()))
    }

    /// Tells how many layers and bytes there are to write.
    pub fn start<'a>(&self, tensors: impl IntoIterator<Item = &'a LazyTensor>) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = 0;
        for tensor in tensors {
            bytes += tensor.length as u64;
            for piece in &tensor.of.pieces {
                left.entry(piece.handle.record().layer.clone()).or_default().0 += 1;
            }
        }
        self.progress.started(left.len(), bytes);
    }

    /// Tells that nothing more is written.
    pub fn finished(&self) {
        self.progress.finished();
    }

    /// Tells of a layer when the last of its tensors is written.
    fn written(&self, piece: &Piece, length: usize) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((tensors, bytes)) = left.get_mut(&piece.handle.record().layer) {
            *tensors = tensors.saturating_sub(1);
            *bytes += length as u64;
            if *tensors == 0 {
                self.progress.layer_done(*bytes, false);
            }
        }
    }

    pub fn tensor(self: &Arc<Self>, of: OutlinedTensor) -> LazyTensor {
        let length = of.shape.iter().product::<usize>() * of.dtype.bitsize() / 8;
        LazyTensor { work: self.clone(), of, length }
    }

    /// Writes tensors into a new file.
    ///
    /// # Errors
    /// When one cannot be read, or the file, which is to be at `output`, cannot be written.
    pub fn write_safetensors(
        &self,
        tensors: Vec<LazyTensor>,
        metadata: HashMap<String, String>,
        staged: &Path,
        output: &Path,
    ) -> Result<()> {
        let metadata = (!metadata.is_empty()).then_some(metadata);
        let tensors = tensors.into_iter().map(|tensor| (tensor.of.name.clone(), tensor));
        let written = safetensors::serialize_to_file(tensors, metadata, staged);
        // A layer that could not be read left its reason here and zeros in the file.
        match self.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(failure) => Err(failure),
            None => written.map_err(|e| Error::file(output, e.to_string())),
        }
    }
}

/// A tensor that is read from the store when its turn comes to be written.
pub(super) struct LazyTensor {
    work: Arc<Work>,
    pub of: OutlinedTensor,
    /// In bytes.
    pub length: usize,
}

impl LazyTensor {
    /// Reads the tensor.
    ///
    /// # Errors
    /// When a layer cannot be read, or somebody has asked to stop: with the layer's name.
    pub fn read(&self) -> Result<Vec<u8>> {
        if let [piece @ Piece { stored_as: None, .. }] = &self.of.pieces[..] {
            let bytes = self.piece(piece)?;
            if bytes.len() != self.length {
                let wrong = Error::expected("bytes of a stored tensor", bytes.len(), self.length);
                return Err(wrong.in_layer(&piece.handle.record().layer));
            }
            self.work.written(piece, self.length);
            return Ok(bytes);
        }
        let mut all = vec![0; self.length];
        for piece in &self.of.pieces {
            let bytes = self.piece(piece)?;
            match &piece.stored_as {
                Some(part) => part.put(self.of.dtype.bitsize() / 8, &bytes, &mut all)?,
                None => return Err(Error::expected(format!("tensor '{}'", self.of.name), "whole", "in parts")),
            }
            self.work.written(piece, bytes.len());
        }
        Ok(all)
    }

    fn piece(&self, piece: &Piece) -> Result<Vec<u8>> {
        let layer = &piece.handle.record().layer;
        if self.work.cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        self.work.progress.layer(layer);
        self.content(piece).map_err(|e| e.in_layer(layer))
    }

    fn content(&self, piece: &Piece) -> Result<Vec<u8>> {
        let dtype = self.of.dtype;
        let load = || self.work.load(&piece.handle);
        let numbers = |matrix: Array2<f32>| {
            from_f32(dtype, matrix.as_standard_layout().as_slice().unwrap_or_default()).map(|bytes| bytes.to_vec())
        };
        let raw = |bytes: &[u8]| match piece.dtype == dtype {
            true => Ok(bytes.to_vec()),
            false => from_f32(dtype, &to_f32(piece.dtype, bytes)?).map(|bytes| bytes.to_vec()),
        };
        match &piece.content {
            Content::Made(bytes) => raw(bytes),
            Content::Weight => {
                let layer = load()?;
                match layer.raw_weight() {
                    Some(bytes) => raw(&bytes),
                    None => numbers(layer.weight()?),
                }
            }
            Content::Quantized => numbers(packed(&*load()?)?.quantized().dequantize()),
            Content::Bias => raw(&load()?.raw_bias().unwrap_or_default()),
            Content::Own(name) => {
                let own = load()?.own_tensors().into_iter().find(|(own, _)| own == name);
                let numbers: Vec<f32> = own.iter().flat_map(|(_, array)| array.iter()).copied().collect();
                Ok(from_f32(dtype, &numbers)?.to_vec())
            }
            Content::Packed(pack) => pack(packed(&*load()?)?.quantized()),
            Content::Factor { side, transposed } => {
                let (a, b) = packed(&*load()?)?.factors();
                let factor = if *side == Side::A { a } else { b };
                numbers(if *transposed { factor.reversed_axes() } else { factor })
            }
        }
    }
}

fn packed(layer: &dyn Layer) -> Result<&LowRankLayer> {
    let found = || Error::expected("layer to write the codes of", layer.method(), "one of packed weights");
    packed_of(layer).ok_or_else(found)
}

impl View for LazyTensor {
    fn dtype(&self) -> DType {
        self.of.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.of.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut failure = self.work.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if failure.is_none() {
            match self.read() {
                Ok(bytes) => return bytes.into(),
                Err(e) => *failure = Some(e),
            }
        }
        vec![0; self.length].into()
    }

    fn data_len(&self) -> usize {
        self.length
    }
}
