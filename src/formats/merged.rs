//! Tensors put into a safetensors file, whose other tensors stay.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::TensorView;

use super::safetensors::SafetensorsSource;
use super::source::TensorSource;
use crate::error::{Error, Result};
use crate::layer::DType;
use crate::staged;

/// A tensor to be put into a file.
pub struct NewTensor<'a> {
    pub name: &'a str,
    pub dtype: DType,
    pub shape: &'a [usize],
    pub bytes: &'a [u8],
}

/// Writes tensors and metadata into a file, in place of what has the same names; the others of a file that is there stay. The file appears whole or not at all.
///
/// # Errors
/// When what is there is no safetensors file, or the file cannot be written.
pub fn put(path: &Path, tensors: &[NewTensor], metadata: &[(&str, &str)]) -> Result<()> {
    let there = existing(path)?;
    let wrong = |e: safetensors::SafeTensorError| Error::file(path, e.to_string());
    let mut views: BTreeMap<&str, TensorView> = BTreeMap::new();
    let mut kept = vec![];
    for info in there.iter().flat_map(|file| file.tensors().values().map(move |info| (file, info))) {
        kept.push((info.1, info.0.bytes(info.1)?));
    }
    for (info, bytes) in &kept {
        views.insert(&info.name, TensorView::new(info.dtype, info.shape.clone(), bytes).map_err(wrong)?);
    }
    for new in tensors {
        views.insert(new.name, TensorView::new(new.dtype, new.shape.to_vec(), new.bytes).map_err(wrong)?);
    }
    let new = metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    let metadata: HashMap<String, String> = there.iter().flat_map(TensorSource::metadata).chain(new).collect();
    let metadata = (!metadata.is_empty()).then_some(metadata);
    staged::write(path, |staged| safetensors::serialize_to_file(views, metadata, staged).map_err(wrong))?;
    Ok(())
}

/// Tries whether [`put`] could write to a place.
///
/// # Errors
/// As [`put`].
pub fn probe(path: &Path) -> Result<()> {
    staged::probe(path)?;
    existing(path).map(drop)
}

/// Opens the file that is there; `None` where there is none, or an empty one.
fn existing(path: &Path) -> Result<Option<SafetensorsSource>> {
    match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path, e)),
        Ok(there) if there.is_file() && there.len() == 0 => Ok(None),
        Ok(_) => SafetensorsSource::open_file(path).map(Some).map_err(|e| match e {
            Error::File { path, reason } => {
                Error::File { path, reason: format!("a tensor cannot be put into the file that is there: {reason}") }
            }
            other => other,
        }),
    }
}
