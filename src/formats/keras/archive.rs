//! The parts of a `.keras` file: a ZIP archive of a JSON config and an HDF5 file of weights.

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;

use flate2::bufread::DeflateDecoder;
use hdf5_reader::Hdf5File;
use hdf5_reader::group::Group;
use ndarray::{Array1, Array2, ArrayD};
use rawzip::{CompressionMethod, ZipArchive};
use serde_json::Value;

use super::super::regular;
use crate::error::{Error, Result};

/// How many bytes deflate can make of one, at most.
const MOST_INFLATED: u64 = 1032;

/// A `.keras` file.
pub struct Archive {
    pub config: Value,
    /// Groups of layers, by the layers' names.
    layers: HashMap<String, Group>,
}

impl Archive {
    /// # Errors
    /// When the file cannot be read, or is no `.keras` file.
    pub fn open(path: &Path) -> Result<Self> {
        let wrong = |reason: String| Error::file(path, format!("not a .keras file that can be read: {reason}"));
        let mut bytes = Vec::new();
        regular::open(path)?.read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
        if let Some(found) = regular::kind_of_content(&bytes).filter(|_| !bytes.starts_with(regular::ZIP)) {
            return Err(Error::file(
                path,
                format!("the file is {found}; expected a ZIP archive, as Keras saves models"),
            ));
        }
        let (mut config, mut weights) = (None, None);
        let archive = ZipArchive::from_slice(&bytes[..]).map_err(|e| wrong(e.to_string()))?;
        let mut entries = archive.entries();
        while let Some(entry) = entries.next_entry().map_err(|e| wrong(e.to_string()))? {
            let name = entry.file_path();
            let target = match name.as_ref() {
                b"config.json" => &mut config,
                b"model.weights.h5" => &mut weights,
                _ => continue,
            };
            let name = String::from_utf8_lossy(name.as_ref()).into_owned();
            let (method, claimed) = (entry.compression_method(), entry.uncompressed_size_hint());
            let part = archive.get_entry(entry.wayfinder()).map_err(|e| wrong(format!("{name}: {e}")))?;
            let mut read = Vec::with_capacity(part.data().len());
            let done = match method {
                CompressionMethod::STORE => part.verifying_reader(part.data()).read_to_end(&mut read),
                // Nothing is believed that the bytes cannot become.
                CompressionMethod::DEFLATE if claimed / MOST_INFLATED <= part.data().len() as u64 => {
                    let inflated = DeflateDecoder::new(part.data()).take(claimed.saturating_add(1));
                    part.verifying_reader(inflated).read_to_end(&mut read)
                }
                CompressionMethod::DEFLATE => {
                    let found = format!("{claimed} bytes that were {}", part.data().len());
                    return Err(wrong(format!("{name}: found {found}, expected what deflate can make of them")));
                }
                other => return Err(wrong(format!("{name} is compressed by {other:?}; expected stored, or deflate"))),
            };
            done.map_err(|e| wrong(format!("{name}: {e}")))?;
            *target = Some(read);
        }
        let missing = |name: &str| wrong(format!("there is no {name} in it"));
        let config = config.ok_or_else(|| missing("config.json"))?;
        let weights = weights.ok_or_else(|| missing("model.weights.h5"))?;
        Self::of(&config, weights).map_err(|e| wrong(e.to_string()))
    }

    /// From the two parts that are used.
    pub(super) fn of(config: &[u8], weights: Vec<u8>) -> Result<Self> {
        let config = serde_json::from_slice(config);
        let config = config.map_err(|e| Error::expected("config.json", e, "JSON"))?;
        let layers =
            layers_of(weights).map_err(|e| Error::expected("model.weights.h5", e, "HDF5 of layers' weights"))?;
        Ok(Archive { config, layers })
    }

    /// Returns the weights of a layer.
    ///
    /// # Errors
    /// When there are none of that name.
    pub fn layer(&self, name: &str) -> Result<Part> {
        let group = self.layers.get(name).cloned();
        let group = group.ok_or_else(|| Error::expected("weights of the layer", "none", "a group that names it"))?;
        Ok(Part { group, path: String::new() })
    }
}

fn layers_of(weights: Vec<u8>) -> hdf5_reader::error::Result<HashMap<String, Group>> {
    let mut layers = HashMap::new();
    for group in Hdf5File::from_vec(weights)?.group("layers")?.groups()? {
        let name = group.group("vars")?.attribute("name")?.read_string()?;
        layers.insert(name, group);
    }
    Ok(layers)
}

/// A group of an HDF5 file, and where it is in a layer's.
pub struct Part {
    group: Group,
    path: String,
}

impl Part {
    /// Returns the group of that name in this one.
    ///
    /// # Errors
    /// When there is none.
    pub fn part(&self, name: &str) -> Result<Part> {
        let path = format!("{}{name}/", self.path);
        let group = self.group.group(name).map_err(|e| Error::expected(format!("weights '{path}'"), e, "a group"))?;
        Ok(Part { group, path })
    }

    /// Returns whether there is a group of that name.
    pub fn has(&self, name: &str) -> bool {
        self.group.group(name).is_ok()
    }

    fn read<T: hdf5_reader::H5Type>(&self, name: &str) -> Result<ArrayD<T>> {
        let wrong = |e: hdf5_reader::error::Error| {
            Error::expected(format!("weights '{}vars/{name}'", self.path), e, "an array of numbers")
        };
        self.group.group("vars").and_then(|vars| vars.dataset(name)?.read_array()).map_err(wrong)
    }

    /// One of the layer's own arrays, where it has it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn optional(&self, name: &str) -> Result<Option<ArrayD<f32>>> {
        let names = self.group.group("vars").and_then(|vars| vars.member_names());
        let (_, names) = names.map_err(|e| Error::expected(format!("weights '{}'", self.path), e, "a group"))?;
        if names.iter().any(|found| found == name) { self.read(name).map(Some) } else { Ok(None) }
    }

    /// One of the layer's own arrays.
    ///
    /// # Errors
    /// When there is none, or it cannot be read.
    pub fn array(&self, name: &str) -> Result<ArrayD<f32>> {
        self.read(name)
    }

    /// Returns the same, a matrix.
    ///
    /// # Errors
    /// As [`Part::array`], and when it is none.
    pub fn matrix(&self, name: &str) -> Result<Array2<f32>> {
        let array = self.array(name)?;
        let found = format!("{:?}", array.shape());
        array.into_dimensionality().map_err(|_| self.shape(name, found, "a matrix"))
    }

    /// Returns the same, a vector, where there is one.
    ///
    /// # Errors
    /// As [`Part::optional`], and when it is none.
    pub fn optional_vector(&self, name: &str) -> Result<Option<Array1<f32>>> {
        let Some(array) = self.optional(name)? else { return Ok(None) };
        let found = format!("{:?}", array.shape());
        array.into_dimensionality().map(Some).map_err(|_| self.shape(name, found, "a vector"))
    }

    /// Returns the same, bytes.
    ///
    /// # Errors
    /// As [`Part::array`].
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        Ok(self.read::<u8>(name)?.into_iter().collect())
    }

    /// Returns the same, lengths.
    ///
    /// # Errors
    /// As [`Part::array`], and when one is negative.
    pub fn lengths(&self, name: &str) -> Result<Vec<usize>> {
        let lengths = self.read::<i64>(name)?.into_iter().map(usize::try_from).collect::<Result<_, _>>();
        lengths.map_err(|e| Error::expected(format!("weights '{}vars/{name}'", self.path), e, "lengths"))
    }

    fn shape(&self, name: &str, found: String, expected: &str) -> Error {
        Error::expected(format!("shape of weights '{}vars/{name}'", self.path), found, expected)
    }
}
