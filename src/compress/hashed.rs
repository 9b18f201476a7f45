//! A source whose tensors are hashed as they are read, and read once ahead of their use.
//!
//! An import reads a tensor twice: when it looks through all values, and when it makes the layer. The hash of the first reading names the
//! layer; what the second reads has to be the same.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::formats::{SideFile, SourceLayer, TensorInfo, TensorSource, content_hash};
use crate::layer::StoredAs;

/// A source, with the hashes of what was read of it.
#[derive(Debug)]
pub(super) struct HashedSource {
    source: Arc<dyn TensorSource>,
    hashes: Mutex<HashMap<String, [u8; 32]>>,
    /// A tensor that was read before anybody asked for it.
    ahead: Mutex<Option<(String, Vec<u8>)>>,
}

impl HashedSource {
    pub fn new(source: Arc<dyn TensorSource>) -> Self {
        HashedSource { source, hashes: Mutex::default(), ahead: Mutex::default() }
    }

    /// Reads a tensor that will be asked for next. What goes wrong is told then.
    pub fn read_ahead(&self, tensor: &TensorInfo) {
        if let Ok(bytes) = self.read(tensor) {
            let bytes = bytes.into_owned();
            *self.ahead.lock().unwrap_or_else(PoisonError::into_inner) = Some((tensor.name.clone(), bytes));
        }
    }

    /// Gives up what was read ahead.
    pub fn forget_ahead(&self) {
        *self.ahead.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Reads a tensor, and holds it against what was read of it before.
    fn read(&self, tensor: &TensorInfo) -> Result<Cow<'_, [u8]>> {
        let bytes = self.source.bytes(tensor)?;
        let hash = content_hash(tensor, &bytes);
        let mut hashes = self.hashes.lock().unwrap_or_else(PoisonError::into_inner);
        match hashes.get(&tensor.name) {
            Some(before) if *before != hash => {
                let file = self.source.file_name(&tensor.name);
                Err(Error::file(
                    self.source.path(),
                    format!("tensor '{}' of {file} has changed while it was read", tensor.name),
                ))
            }
            Some(_) => Ok(bytes),
            None => {
                hashes.insert(tensor.name.clone(), hash);
                Ok(bytes)
            }
        }
    }
}

impl TensorSource for HashedSource {
    fn path(&self) -> &Path {
        self.source.path()
    }

    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        self.source.tensors()
    }

    fn bytes(&self, tensor: &TensorInfo) -> Result<Cow<'_, [u8]>> {
        let ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner).take_if(|(name, _)| *name == tensor.name);
        match ahead {
            Some((_, bytes)) => Ok(Cow::Owned(bytes)),
            None => self.read(tensor),
        }
    }

    fn part(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<Vec<u8>> {
        self.source.part(tensor, range)
    }

    fn content_hash(&self, tensor: &TensorInfo) -> Result<[u8; 32]> {
        let known = self.hashes.lock().unwrap_or_else(PoisonError::into_inner).get(&tensor.name).copied();
        match known {
            Some(hash) => Ok(hash),
            None => self.bytes(tensor).map(|bytes| content_hash(tensor, &bytes)),
        }
    }

    fn stored_as(&self, tensor: &str) -> Option<StoredAs> {
        self.source.stored_as(tensor)
    }

    fn side_files(&self) -> Vec<SideFile> {
        self.source.side_files()
    }

    fn file_name(&self, tensor: &str) -> String {
        self.source.file_name(tensor)
    }

    fn metadata(&self) -> BTreeMap<String, String> {
        self.source.metadata()
    }

    fn notes(&self) -> Vec<String> {
        self.source.notes()
    }

    fn layers(&self) -> Vec<SourceLayer> {
        self.source.layers()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats;

    #[test]
    fn what_is_read_again_is_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("two.safetensors");
        let write = |second: f32| {
            let values: Vec<u8> = [1.0, second].iter().flat_map(|v: &f32| v.to_le_bytes()).collect();
            let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2], &values).unwrap();
            // In its place, as programs do that change a file while it is open.
            let bytes = safetensors::serialize([("w", view)], None).unwrap();
            let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(&path).unwrap();
            std::io::Write::write_all(&mut file, &bytes).unwrap();
        };
        write(2.0);
        let source = HashedSource::new(formats::open(&path).unwrap());
        let tensor = source.tensors()["w"].clone();
        let plain = formats::open(&path).unwrap();
        assert_eq!(source.content_hash(&tensor).unwrap(), plain.content_hash(&tensor).unwrap());
        let first = source.bytes(&tensor).unwrap().into_owned();
        assert_eq!(first, *plain.bytes(&tensor).unwrap());
        source.read_ahead(&tensor);
        write(3.0);
        assert_eq!(source.bytes(&tensor).unwrap(), first, "it was read ahead");
        let error = source.bytes(&tensor).unwrap_err();
        assert!(error.to_string().contains("tensor 'w' of two.safetensors has changed"), "{error}");
        source.read_ahead(&tensor);
        assert!(source.bytes(&tensor).is_err());
        assert_eq!(source.content_hash(&tensor).unwrap(), content_hash(&tensor, &first));
    }
}
