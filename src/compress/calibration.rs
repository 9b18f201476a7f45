//! Files that layers are calibrated and measured with: activations, and statistics of activations.
//!
//! An activations file is safetensors with a tensor `[tokens, in_features]` (F32, F16 or BF16) named after each layer. A
//! statistics file has `layerstore:statistics = 1` in its metadata, and for each layer `NAME` the tensors
//!
//! | tensor | shape | dtype |
//! |---|---|---|
//! | `NAME.count` | `[]` or `[1]` | I64 or U64: the tokens that the others are over |
//! | `NAME.mean` | `[in_features]` | F32 or F64 |
//! | `NAME.mean_abs` | `[in_features]` | F32 or F64: E\|x\| |
//! | `NAME.second_moment` | `[in_features, in_features]`, or `[in_features]`, its diagonal | F32 or F64: E\[x xᵀ\] |
//! | `NAME.sample`, if wanted | `[rows, in_features]` | F32, F16 or BF16: some of the inputs |
//!
//! Layers that share their inputs may share statistics: the metadata's `layerstore:shared` is a JSON object from a layer's name
//! to the name whose tensors it uses.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use layerstore_core::layer::to_f32;
use ndarray::{Array1, Array2};

use super::in_memory::{InMemory, Promise};
use crate::error::{Error, Result};
use crate::formats::{SafetensorsSource, TensorInfo, TensorSource};
use crate::layer::DType;
use crate::{Calibration, SecondMoment};

pub(super) const MARK: &str = "layerstore:statistics";
pub(super) const SHARED: &str = "layerstore:shared";
pub(super) const VERSION: &str = "1";
const MEAN: &str = "mean";

/// Inputs of layers, a tensor `[tokens, in_features]` named after each layer.
#[derive(Debug)]
pub struct ActivationsFile {
    file: SafetensorsSource,
}

impl ActivationsFile {
    /// Opens an activations file (safetensors; F32, F16 or BF16).
    ///
    /// # Errors
    /// As [`SafetensorsSource::open`], and when it is a statistics file, which holds no activations to measure with.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let file = SafetensorsSource::open(path).map_err(as_inputs)?;
        if file.metadata().contains_key(MARK) {
            return Err(Error::file(
                file.path(),
                "the file holds statistics of activations; a tensor [tokens, in_features] for each layer is needed",
            ));
        }
        Ok(ActivationsFile { file })
    }

    /// Returns the names of the layers whose inputs it holds.
    pub fn layers(&self) -> impl Iterator<Item = &str> {
        self.file.tensors().keys().map(String::as_str)
    }

    /// Refuses inputs for `layer` that could not be used, without reading them. `false` where there are none.
    ///
    /// # Errors
    /// When they are not `[tokens, in_features]` of a float type, or there are no tokens.
    pub fn check(&self, layer: &str, in_features: usize) -> Result<bool> {
        let Some(tensor) = self.file.tensors().get(layer) else { return Ok(false) };
        let what = || format!("activations of '{layer}' in {}", self.file.path().display());
        if !is_float(tensor.dtype) {
            return Err(Error::expected(what(), format!("{:?}", tensor.dtype), "F32, F16 or BF16"));
        }
        match tensor.shape[..] {
            [tokens, features] if tokens > 0 && features == in_features => Ok(true),
            _ => Err(Error::expected(
                what(),
                format!("shape {:?}", tensor.shape),
                format!("[tokens, {in_features}] with at least one token"),
            )),
        }
    }

    /// Returns the path that it was opened by.
    pub(super) fn path(&self) -> &Path {
        self.file.path()
    }

    /// Returns how many inputs `layer` has; `None` where it has no tensor.
    pub(super) fn tokens(&self, layer: &str) -> Option<usize> {
        self.file.tensors().get(layer).map(|tensor| tensor.shape.first().copied().unwrap_or(0))
    }

    /// Refuses inputs for `layer` that could not be used, as [`ActivationsFile::get`] does, and keeps nothing of them.
    ///
    /// # Errors
    /// As [`ActivationsFile::get`].
    pub(super) fn check_values(&self, layer: &str, in_features: usize) -> Result<()> {
        match self.file.tensors().get(layer) {
            Some(tensor) if self.check(layer, in_features)? => {
                let source: &dyn TensorSource = &self.file;
                source.refuse_not_finite(tensor)
            }
            _ => Ok(()),
        }
    }

    /// Reads the inputs of a layer that has some.
    ///
    /// # Errors
    /// As [`ActivationsFile::get`], and when there are none.
    pub(super) fn required(&self, layer: &str, in_features: usize) -> Result<Array2<f32>> {
        self.get(layer, in_features)?
            .ok_or_else(|| Error::expected(format!("activations of '{layer}'"), "none", "a tensor of that name"))
    }

    /// Reads the inputs of `layer`, `[tokens, in_features]`; `None` where there are none.
    ///
    /// # Errors
    /// As [`ActivationsFile::check`], and when a value is not finite.
    pub fn get(&self, layer: &str, in_features: usize) -> Result<Option<Array2<f32>>> {
        if !self.check(layer, in_features)? {
            return Ok(None);
        }
        let file: &dyn TensorSource = &self.file;
        file.tensor(layer).map(|tensor| file.matrix(tensor)).transpose()
    }
}

/// Says of a file that cannot be read what a file of inputs is.
fn as_inputs(error: Error) -> Error {
    match error {
        Error::File { path, reason } => {
            let inputs = "inputs are safetensors, with a tensor [tokens, in_features] named after each layer";
            Error::File { path, reason: format!("{reason} ({inputs})") }
        }
        other => other,
    }
}

fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// What layers are calibrated with: the statistics of an activations file's inputs, or those of a statistics file.
#[derive(Debug)]
pub struct CalibrationFile {
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Activations(ActivationsFile),
    Statistics(StatisticsFile),
    Promised(Promise),
    InMemory(InMemory),
}

impl CalibrationFile {
    /// Opens a file of either kind.
    ///
    /// # Errors
    /// As [`SafetensorsSource::open`], and when a statistics file is of an unknown version, or lacks a tensor.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let file = SafetensorsSource::open(path).map_err(as_inputs)?;
        let kind = match file.metadata().get(MARK) {
            None => Kind::Activations(ActivationsFile { file }),
            Some(version) => Kind::Statistics(StatisticsFile::of(file, &version.clone())?),
        };
        Ok(CalibrationFile { kind })
    }

    /// Returns what stands for statistics that there will be.
    pub(super) fn promised(promise: Promise) -> Self {
        CalibrationFile { kind: Kind::Promised(promise) }
    }

    /// Returns statistics that are in no file.
    ///
    /// # Errors
    /// When there are none of some layers.
    pub(super) fn in_memory(found: Vec<(Vec<String>, Calibration)>) -> Result<Self> {
        Ok(CalibrationFile { kind: Kind::InMemory(InMemory::new(found)?) })
    }

    /// Returns the names of the layers that it has statistics for.
    pub fn layers(&self) -> Vec<&str> {
        match &self.kind {
            Kind::Activations(file) => file.layers().collect(),
            Kind::Statistics(file) => file.layers.keys().map(String::as_str).collect(),
            Kind::Promised(promise) => promise.layers.iter().map(String::as_str).collect(),
            Kind::InMemory(statistics) => statistics.names().collect(),
        }
    }

    /// Refuses statistics for `layer` that could not be used, without reading them whole. `false` where there are none.
    ///
    /// # Errors
    /// When a tensor is of another shape or dtype.
    pub fn check(&self, layer: &str, in_features: usize) -> Result<bool> {
        match &self.kind {
            Kind::Activations(file) => file.check(layer, in_features),
            Kind::Statistics(file) => file.check(layer, in_features),
            Kind::Promised(promise) => Ok(promise.layers.contains(layer)),
            Kind::InMemory(statistics) => statistics.check(layer, in_features),
        }
    }

    /// Rows that [`Calibration::sample`] will have for `layer`.
    pub fn sample_rows(&self, layer: &str) -> usize {
        let rows = match &self.kind {
            Kind::Activations(file) => file.tokens(layer).unwrap_or(0),
            Kind::Statistics(file) => {
                file.tensor(layer, "sample").and_then(|sample| sample.shape.first().copied()).unwrap_or(0)
            }
            Kind::Promised(promise) if promise.layers.contains(layer) => promise.tokens,
            Kind::Promised(_) => 0,
            Kind::InMemory(statistics) => statistics.get(layer).map_or(0, |found| found.sample().nrows()),
        };
        rows.min(layerstore_core::calibration::SAMPLE_ROWS)
    }

    /// Reads the statistics of the inputs of `layer`; `None` where there are none.
    ///
    /// # Errors
    /// As [`CalibrationFile::check`], and when a value is not finite or no statistic.
    pub fn get(&self, layer: &str, in_features: usize) -> Result<Option<Calibration>> {
        match &self.kind {
            Kind::Activations(file) => file.get(layer, in_features)?.map(Calibration::of).transpose(),
            Kind::Statistics(file) => file.get(layer, in_features),
            Kind::Promised(_) => Ok(None),
            Kind::InMemory(statistics) => {
                statistics.check(layer, in_features)?;
                Ok(statistics.get(layer).cloned())
            }
        }
    }

    /// Returns the name of the layer whose statistics `layer` uses: its own, unless it shares another's.
    pub(super) fn owner<'a>(&'a self, layer: &'a str) -> &'a str {
        match &self.kind {
            Kind::Activations(_) | Kind::Promised(_) | Kind::InMemory(_) => layer,
            Kind::Statistics(file) => file.layers.get(layer).map_or(layer, String::as_str),
        }
    }

    /// Refuses statistics for `layer` that could not be used, as [`CalibrationFile::get`] does, and keeps nothing of them.
    ///
    /// # Errors
    /// As [`CalibrationFile::get`].
    pub(super) fn check_values(&self, layer: &str, in_features: usize) -> Result<()> {
        match &self.kind {
            Kind::Activations(file) => file.check_values(layer, in_features),
            Kind::Statistics(file) => file.get(layer, in_features).map(drop),
            Kind::Promised(_) | Kind::InMemory(_) => Ok(()),
        }
    }

    /// Adds dtype, shape and bytes of all that [`CalibrationFile::get`] reads to a hash that names what a layer was made of.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub(super) fn hash(&self, layer: &str, hasher: &mut blake3::Hasher) -> Result<()> {
        let (file, tensors): (_, Vec<&TensorInfo>) = match &self.kind {
            Kind::Activations(file) => (&file.file, file.file.tensors().get(layer).into_iter().collect()),
            Kind::Promised(_) => return Ok(()),
            Kind::InMemory(statistics) => {
                if let Some(hash) = statistics.hash(layer) {
                    hasher.update(hash);
                }
                return Ok(());
            }
            Kind::Statistics(file) => (&file.file, PARTS.iter().filter_map(|part| file.tensor(layer, part)).collect()),
        };
        for tensor in tensors {
            let bytes = file.bytes(tensor)?;
            for piece in [format!("{:?} {:?}", tensor.dtype, tensor.shape).as_bytes(), &bytes] {
                hasher.update(&(piece.len() as u64).to_le_bytes());
                hasher.update_rayon(piece);
            }
        }
        Ok(())
    }
}

/// The tensors of a layer in a statistics file.
pub(super) const PARTS: [&str; 5] = ["count", MEAN, "mean_abs", "second_moment", "sample"];

#[derive(Debug)]
struct StatisticsFile {
    file: SafetensorsSource,
    /// From a layer to the name that its tensors begin with.
    layers: BTreeMap<String, String>,
}

impl StatisticsFile {
    fn of(file: SafetensorsSource, version: &str) -> Result<Self> {
        if version != VERSION {
            let found = format!("version {version} of a statistics file");
            return Err(Error::file(file.path(), format!("found {found}, expected version {VERSION}")));
        }
        let mut layers = BTreeMap::new();
        for tensor in file.tensors().keys() {
            let Some((name, part)) = tensor.rsplit_once('.') else {
                return Err(Error::file(
                    file.path(),
                    format!("tensor '{tensor}' is none of LAYER.{}", PARTS.join(", LAYER.")),
                ));
            };
            if !PARTS.contains(&part) {
                return Err(Error::file(
                    file.path(),
                    format!("tensor '{tensor}' is none of LAYER.{}", PARTS.join(", LAYER.")),
                ));
            }
            layers.insert(name.to_owned(), name.to_owned());
        }
        if let Some(shared) = file.metadata().get(SHARED) {
            let shared: HashMap<String, String> = serde_json::from_str(shared)
                .map_err(|e| Error::file(file.path(), format!("{SHARED} is no JSON object of names: {e}")))?;
            for (layer, of) in shared {
                if !layers.contains_key(&of) {
                    let reason =
                        format!("{SHARED} says that '{layer}' shares the statistics of '{of}', which has none");
                    return Err(Error::file(file.path(), reason));
                }
                layers.insert(layer, of);
            }
        }
        let statistics = StatisticsFile { file, layers };
        let owners: BTreeSet<&String> = statistics.layers.values().collect();
        for owner in owners {
            for part in &PARTS[..4] {
                statistics.required(owner, part)?;
            }
        }
        Ok(statistics)
    }

    fn tensor(&self, layer: &str, part: &str) -> Option<&TensorInfo> {
        let owner = self.layers.get(layer)?;
        self.file.tensors().get(&format!("{owner}.{part}"))
    }

    fn required(&self, layer: &str, part: &str) -> Result<&TensorInfo> {
        self.tensor(layer, part)
            .ok_or_else(|| Error::file(self.file.path(), format!("statistics of '{layer}' without '{layer}.{part}'")))
    }

    fn check(&self, layer: &str, in_features: usize) -> Result<bool> {
        if !self.layers.contains_key(layer) {
            return Ok(false);
        }
        let n = in_features;
        let fits = |part: &str, shapes: &[&[usize]], dtypes: &[DType]| {
            let tensor = self.required(layer, part)?;
            if shapes.contains(&&tensor.shape[..]) && dtypes.contains(&tensor.dtype) {
                return Ok(());
            }
            Err(Error::expected(
                format!("tensor '{}' of {}", tensor.name, self.file.path().display()),
                format!("{:?} {:?}", tensor.dtype, tensor.shape),
                format!("one of {dtypes:?} of a shape among {shapes:?}"),
            ))
        };
        let floats = [DType::F32, DType::F64];
        fits("count", &[&[], &[1]], &[DType::I64, DType::U64])?;
        fits(MEAN, &[&[n]], &floats)?;
        fits("mean_abs", &[&[n]], &floats)?;
        fits("second_moment", &[&[n, n], &[n]], &floats)?;
        if let Some(sample) = self.tensor(layer, "sample") {
            let rows = sample.shape.first().copied().unwrap_or(0);
            fits("sample", &[&[rows, n]], &[DType::F32, DType::F16, DType::BF16])?;
        }
        Ok(true)
    }

    fn get(&self, layer: &str, in_features: usize) -> Result<Option<Calibration>> {
        if !self.check(layer, in_features)? {
            return Ok(None);
        }
        let wide = |part: &str| -> Result<Vec<f64>> {
            let tensor = self.required(layer, part)?;
            let bytes = self.file.bytes(tensor)?;
            Ok(match tensor.dtype {
                DType::F64 => bytes.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
                dtype => to_f32(dtype, &bytes)?.into_iter().map(f64::from).collect(),
            })
        };
        let count = self.file.bytes(self.required(layer, "count")?)?;
        let count = count.first_chunk::<8>().map(|b| i64::from_le_bytes(*b)).unwrap_or_default();
        let count =
            u64::try_from(count).map_err(|_| Error::expected(format!("'{layer}.count'"), count, "at least 1"))?;
        let n = in_features;
        let shaped = |e: ndarray::ShapeError| Error::Numeric(e.to_string());
        let second = wide("second_moment")?;
        let second = match self.required(layer, "second_moment")?.shape.len() == 1 {
            true => SecondMoment::Diagonal(Array1::from(second)),
            false => SecondMoment::Full(Array2::from_shape_vec((n, n), second).map_err(shaped)?),
        };
        let file: &dyn TensorSource = &self.file;
        let sample = match self.tensor(layer, "sample") {
            Some(sample) if sample.shape[0] > 0 => file.matrix(sample)?,
            _ => Array2::zeros((0, n)),
        };
        let calibration = Calibration::from_moments(
            count,
            Array1::from(wide(MEAN)?),
            Array1::from(wide("mean_abs")?),
            second,
            sample,
        );
        calibration.map(Some).map_err(|e| e.in_layer(layer))
    }
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::super::statistics_file::write_statistics;
    use super::*;

    fn write(path: &Path, tensors: &[(&str, DType, Vec<usize>, Vec<u8>)], metadata: &[(&str, &str)]) {
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
        let metadata = metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        safetensors::serialize_to_file(views, Some(metadata), path).unwrap();
    }

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn activations_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        std::fs::write(&path, b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}").unwrap();
        let opened = [ActivationsFile::open(&path).map(drop), CalibrationFile::open(&path).map(drop)];
        for message in opened.map(|opened| opened.unwrap_err().to_string()) {
            assert!(message.contains("an .npy array; expected safetensors"), "{message}");
            assert!(message.contains("[tokens, in_features] named after each layer"), "{message}");
        }
        let tensors = [("a", DType::F32, vec![2, 3], f32s(&[0.0; 6])), ("b", DType::F32, vec![3], f32s(&[0.0; 3]))];
        write(&path, &tensors, &[]);
        let activations = ActivationsFile::open(&path).unwrap();
        assert_eq!(activations.get("a", 3).unwrap().unwrap().dim(), (2, 3));
        assert!(activations.get("c", 3).unwrap().is_none());
        assert!(activations.get("a", 4).unwrap_err().to_string().contains("[2, 3]"));
        assert!(activations.check("b", 3).is_err());
        let calibration = CalibrationFile::open(&path).unwrap();
        assert_eq!(calibration.get("a", 3).unwrap().unwrap().tokens(), 2);
        assert_eq!(calibration.sample_rows("a"), 2);
    }

    #[test]
    fn statistics_come_back_and_are_shared() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s.safetensors");
        let inputs = Array2::from_shape_fn((9, 3), |(i, j)| ((i * 7 + j * 5) % 11) as f32 - 4.0);
        let calibration = Calibration::of(inputs.clone()).unwrap();
        write_statistics(&path, &[("a.q".to_owned(), calibration.clone())]).unwrap();
        let read = CalibrationFile::open(&path).unwrap();
        assert_eq!(read.layers(), ["a.q"]);
        let back = read.get("a.q", 3).unwrap().unwrap();
        assert_eq!((back.tokens(), back.sample()), (9, inputs.view()));
        let apart = &back.second_moment().unwrap().to_owned() - &calibration.second_moment().unwrap();
        assert!(apart.iter().all(|d: &f64| d.abs() < 1e-12));
        assert!(read.get("a.q", 4).unwrap_err().to_string().contains("[3]"));
        assert!(read.get("b", 3).unwrap().is_none());
        assert!(ActivationsFile::open(&path).unwrap_err().to_string().contains("statistics"));
        let twice = [("a".to_owned(), calibration.clone()), ("a".to_owned(), calibration)];
        assert!(write_statistics(&path, &twice).unwrap_err().to_string().contains("two named"));

        let parts = |second: (Vec<usize>, Vec<f32>)| {
            vec![
                ("q.count", DType::I64, vec![1], 4i64.to_le_bytes().to_vec()),
                ("q.mean", DType::F32, vec![2], f32s(&[0.0, 1.0])),
                ("q.mean_abs", DType::F32, vec![2], f32s(&[0.5, 1.0])),
                ("q.second_moment", DType::F32, second.0, f32s(&second.1)),
            ]
        };
        let full = || parts((vec![2, 2], vec![1.0, 0.0, 0.0, 2.0]));
        let mark = (MARK, VERSION);
        write(&path, &full(), &[mark, (SHARED, r#"{"k": "q"}"#)]);
        let read = CalibrationFile::open(&path).unwrap();
        assert_eq!(read.layers(), ["k", "q"]);
        assert_eq!(read.get("k", 2).unwrap().unwrap().tokens(), 4);
        assert_eq!(read.sample_rows("k"), 0);
        let hash = |layer: &str| {
            let mut hasher = blake3::Hasher::new();
            read.hash(layer, &mut hasher).unwrap();
            hasher.finalize()
        };
        assert_eq!(hash("k"), hash("q"));
        assert_ne!(hash("k"), hash("another"));

        write(&path, &parts((vec![2], vec![1.0, 2.0])), &[mark]);
        let diagonal = CalibrationFile::open(&path).unwrap().get("q", 2).unwrap().unwrap();
        assert!(!diagonal.has_full_moment());

        for (tensors, metadata, expected) in [
            (full(), vec![(MARK, "2")], "version 2"),
            (full()[..3].to_vec(), vec![mark], "without 'q.second_moment'"),
            (full(), vec![mark, (SHARED, r#"{"k": "v"}"#)], "'v', which has none"),
            (full(), vec![mark, (SHARED, "[]")], "no JSON object"),
            (vec![("q.men", DType::F32, vec![1], f32s(&[1.0]))], vec![mark], "q.men"),
        ] {
            write(&path, &tensors, &metadata);
            let message = CalibrationFile::open(&path).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        let mut negative = full();
        negative[0].3 = (-4i64).to_le_bytes().to_vec();
        let mut no_size = full();
        no_size[2].3 = f32s(&[0.5, -1.0]);
        let mut sampled = full();
        sampled.push(("q.sample", DType::F32, vec![5, 2], f32s(&[0.5; 10])));
        for (tensors, found) in [
            (negative, "'q.count': found -4"),
            (no_size, "layer 'q': mean |x| of input 1: found -1, expected at least 1"),
            (sampled, "layer 'q': sample of the inputs: found 5 rows of 4 inputs, expected 4 rows at most"),
        ] {
            write(&path, &tensors, &[mark]);
            let file = CalibrationFile::open(&path).unwrap();
            for error in [file.get("q", 2).unwrap_err(), file.check_values("q", 2).unwrap_err()] {
                assert_eq!(error.kind(), crate::error::ErrorKind::InvalidInput);
                assert!(error.to_string().contains(found), "{error}");
            }
        }
    }
}
