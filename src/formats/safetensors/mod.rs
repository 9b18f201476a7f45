//! Safetensors checkpoints: one file, a sharded index, or a folder; tensors are read when they are asked for.

mod files;
mod header;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use self::files::Chosen;
use super::opened::OpenFile;
use super::regular;
use super::source::{TensorInfo, TensorSource};
use crate::error::{Error, Result};

/// An open safetensors checkpoint. Dropping it closes its files.
#[derive(Debug)]
pub struct SafetensorsSource {
    path: PathBuf,
    files: Vec<OpenFile>,
    tensors: BTreeMap<String, TensorInfo>,
    /// Where each tensor lies.
    places: HashMap<String, Place>,
    metadata: BTreeMap<String, String>,
    notes: Vec<String>,
}

#[derive(Debug, Clone)]
struct Place {
    file: usize,
    bytes: Range<usize>,
}

impl SafetensorsSource {
    /// Opens a `.safetensors` file, an index of shards (`.json`), or a folder.
    ///
    /// In a folder an index, `X.safetensors.index.json`, says which files and tensors belong to the checkpoint; without one,
    /// names with `-00001-of-0000N` do, all of which have to be there; without such names it is one file. What else lies
    /// there is left out, and [`TensorSource::notes`] names it.
    ///
    /// The files should not be changed while the checkpoint is open. A tensor that a file no longer holds whole is an error.
    ///
    /// # Errors
    /// When a file is missing, truncated, or not what safetensors allows, or nothing says which of several files are meant:
    /// the message names the file and what was found. Nothing beyond the headers is read.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let Chosen { files, listed, notes } = files::chosen(path)?;
        let mut checkpoint = SafetensorsSource { notes, ..SafetensorsSource::empty(path) };
        let mut unlisted = BTreeMap::new();
        for file in files {
            checkpoint.add_file(&file, listed.as_ref(), &mut unlisted)?;
        }
        if let Some(listed) = listed {
            for (tensor, shard) in &listed {
                if checkpoint.tensors.contains_key(tensor) {
                    continue;
                }
                let found = unlisted.get(tensor).map_or("in no shard".to_owned(), |file| format!("in {file}"));
                return Err(Error::file(
                    path,
                    format!("the index says that tensor '{tensor}' is in {shard}; it is {found}"),
                ));
            }
            // Those that are taken from another shard are no loss.
            unlisted.retain(|tensor, _| !listed.contains_key(tensor));
            if let Some((tensor, file)) = unlisted.first_key_value() {
                checkpoint.notes.push(match unlisted.len() {
                    1 => format!("tensor '{tensor}' of {file} is left out of the checkpoint: the index does not list it"),
                    n => format!(
                        "{n} tensors are left out of the checkpoint, such as '{tensor}' of {file}: the index does not list \
                         them"
                    ),
                });
            }
        }
        if checkpoint.tensors.is_empty() {
            return Err(Error::file(path, "the checkpoint holds no tensor"));
        }
        Ok(checkpoint)
    }

    /// Opens a file of tensors, which may hold none.
    ///
    /// # Errors
    /// As [`SafetensorsSource::open`].
    pub(crate) fn open_file(path: &Path) -> Result<Self> {
        let mut file = SafetensorsSource::empty(path);
        file.add_file(path, None, &mut BTreeMap::new())?;
        Ok(file)
    }

    fn empty(path: &Path) -> Self {
        SafetensorsSource {
            path: path.to_owned(),
            files: vec![],
            tensors: BTreeMap::new(),
            places: HashMap::new(),
            metadata: BTreeMap::new(),
            notes: vec![],
        }
    }

    /// Adds the tensors of a file; with `listed`, only those that it says are there, and the others to `unlisted`.
    fn add_file(
        &mut self,
        path: &Path,
        listed: Option<&HashMap<String, String>>,
        unlisted: &mut BTreeMap<String, String>,
    ) -> Result<()> {
        let file = regular::open(path)?;
        // SAFETY: only the header is read from it, now.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        let header = header::read(&map).map_err(|reason| Error::file(path, reason))?;
        let name = path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
        let index = self.files.len();
        for tensor in header.tensors {
            let tensor_name = tensor.name;
            if listed.is_some_and(|listed| listed.get(&tensor_name) != Some(&name)) {
                unlisted.insert(tensor_name, name.clone());
                continue;
            }
            let info = TensorInfo { name: tensor_name.clone(), dtype: tensor.dtype, shape: tensor.shape };
            self.tensors.insert(tensor_name.clone(), info);
            let place = Place { file: index, bytes: tensor.start..tensor.end };
            if let Some(other) = self.places.insert(tensor_name.clone(), place) {
                let other = &self.files[other.file].name;
                return Err(Error::file(path, format!("tensor '{tensor_name}' is in this file and in {other}")));
            }
        }
        for (key, value) in header.metadata {
            if self.metadata.get(&key).is_some_and(|other| *other != value) {
                self.notes.push(format!("metadata '{key}' differs between the shards: that of {name} is taken"));
            }
            self.metadata.insert(key, value);
        }
        self.files.push(OpenFile { name, path: path.to_owned(), file });
        Ok(())
    }
}

impl TensorSource for SafetensorsSource {
    fn path(&self) -> &Path {
        &self.path
    }

    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    fn bytes(&self, tensor: &TensorInfo) -> Result<Cow<'_, [u8]>> {
        let Some(Place { file, bytes }) = self.places.get(&tensor.name) else {
            return Err(Error::expected(
                "tensor",
                format!("'{}'", tensor.name),
                format!("one of {}", self.path.display()),
            ));
        };
        Ok(self.files[*file].read(bytes)?.into())
    }

    fn part(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<Vec<u8>> {
        let place = self.places.get(&tensor.name);
        let found = place.and_then(|Place { file, bytes }| {
            let (first, end) = (bytes.start.checked_add(range.start)?, bytes.start.checked_add(range.end)?);
            (first <= end && end <= bytes.end).then_some((*file, first..end))
        });
        let Some((file, bytes)) = found else {
            let expected = format!("a part of one of {}", self.path.display());
            return Err(Error::expected(format!("bytes of tensor '{}'", tensor.name), format!("{range:?}"), expected));
        };
        self.files[file].read(&bytes)
    }

    fn file_name(&self, tensor: &str) -> String {
        self.places.get(tensor).map(|place| self.files[place.file].name.clone()).unwrap_or_default()
    }

    /// The `__metadata__` of the files' headers.
    fn metadata(&self) -> BTreeMap<String, String> {
        self.metadata.clone()
    }

    fn notes(&self) -> Vec<String> {
        self.notes.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::super::source::{SourceContent, SourceLayer};
    use super::*;
    use crate::layer::DType;
    use proptest::prelude::*;
    use safetensors::tensor::TensorView;

    fn write(folder: &Path, name: &str, tensors: &[(&str, Vec<usize>, Vec<f32>)]) -> PathBuf {
        let raw: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
            .iter()
            .map(|(n, s, v)| ((*n).to_owned(), s.clone(), v.iter().flat_map(|f| f.to_le_bytes()).collect()))
            .collect();
        let views = raw.iter().map(|(n, s, b)| (n.as_str(), TensorView::new(DType::F32, s.clone(), b).unwrap()));
        let path = folder.join(name);
        safetensors::serialize_to_file(views, None, &path).unwrap();
        path
    }

    #[test]
    fn layers_hold_every_tensor_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = write(
            folder.path(),
            "m.safetensors",
            &[
                ("a.weight", vec![2, 3], vec![0.0; 6]),
                ("a.bias", vec![2], vec![0.0; 2]),
                ("b.weight", vec![2, 3], vec![0.0; 6]),
                ("b.bias", vec![3], vec![0.0; 3]), // Not as long as the rows: a tensor of its own.
                ("c", vec![1], vec![0.0]),
                ("c.weight", vec![1], vec![0.0]),
                ("d.bias", vec![1], vec![0.0]),
                ("norm.weight", vec![4], vec![0.0; 4]),
                ("norm.bias", vec![4], vec![0.0; 4]),
                ("c.weight.weight", vec![1], vec![0.0]),
            ],
        );
        let checkpoint = SafetensorsSource::open(&path).unwrap();
        let layers = checkpoint.layers();
        let names: Vec<&str> = layers.iter().map(|l| l.name.as_str()).collect();
        assert_eq!(names, ["a", "b.bias", "b", "c", "c.weight", "c.weight.weight", "d.bias", "norm"]);
        let held = |l: &SourceLayer| match &l.content {
            SourceContent::Tensors { bias, .. } => 1 + usize::from(bias.is_some()),
            SourceContent::Ready { .. } => 0,
        };
        assert_eq!(layers.iter().map(held).sum::<usize>(), checkpoint.tensors().len());
    }

    #[test]
    fn shards_and_folders() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "s1.safetensors", &[("a.weight", vec![1, 1], vec![1.0])]);
        write(folder.path(), "s2.safetensors", &[("b.weight", vec![1, 1], vec![2.0])]);
        assert!(SafetensorsSource::open(folder.path()).unwrap_err().to_string().contains("nothing says which"));
        let index = folder.path().join("model.safetensors.index.json");
        let say = |map: &str| {
            std::fs::write(&index, format!(r#"{{"weight_map":{{{map}}}}}"#)).unwrap();
            SafetensorsSource::open(folder.path()).map(|c| c.tensors().len()).map_err(|e| e.to_string())
        };
        assert_eq!(say(r#""a.weight":"s1.safetensors","b.weight":"s2.safetensors""#), Ok(2));
        assert_eq!(say(r#""a.weight":"s1.safetensors""#), Ok(1));
        for (map, expected) in [
            (r#""a.weight":"s2.safetensors""#, "in no shard"),
            (r#""a.weight":"s3.safetensors""#, "is missing"),
            (r#""a.weight":"../s1.safetensors""#, "plain file name"),
            ("", "no shard"),
            (r#""a.weight":"s2.safetensors","b.weight":"s1.safetensors""#, "it is in s"),
        ] {
            assert!(say(map).unwrap_err().contains(expected), "{map}");
        }
        // A tensor that lies in two shards is taken from the one that the index names; what it does not list is left out.
        let more =
            [("a.weight", vec![1, 1], vec![3.0]), ("b.weight", vec![1, 1], vec![2.0]), ("c", vec![1], vec![0.0])];
        write(folder.path(), "s2.safetensors", &more);
        assert_eq!(say(r#""a.weight":"s1.safetensors","b.weight":"s2.safetensors""#), Ok(2));
        let open = SafetensorsSource::open(folder.path()).unwrap();
        let source: &dyn TensorSource = &open;
        assert_eq!(source.matrix(source.tensor("a.weight").unwrap()).unwrap()[(0, 0)], 1.0);
        assert_eq!(
            open.notes(),
            ["tensor 'c' of s2.safetensors is left out of the checkpoint: the index does not list it"]
        );
        std::fs::remove_file(&index).unwrap();
        for n in [1, 2] {
            let [old, new] = [format!("s{n}.safetensors"), format!("m-0000{n}-of-00002.safetensors")];
            std::fs::rename(folder.path().join(old), folder.path().join(new)).unwrap();
        }
        let twice = SafetensorsSource::open(folder.path()).unwrap_err().to_string();
        assert!(twice.contains("in this file and in m-00001"), "{twice}");
    }

    fn open_bytes(bytes: &[u8]) -> Result<SafetensorsSource> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        SafetensorsSource::open(file.path())
    }

    fn with_header(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    #[test]
    fn hostile_headers_are_refused() {
        let entry = |shape: &str, offsets: &str| {
            format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        let two = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#;
        let one = r#""a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}"#;
        for (bytes, expected) in [
            (vec![], "0 bytes"),
            (vec![1, 2, 3], "3 bytes"),
            (u64::MAX.to_le_bytes().to_vec(), "claims"),
            (with_header("nonsense", 0), "not JSON"),
            (with_header(&entry("[2]", "[0,8]"), 4), "4 bytes of data"),
            (with_header(&entry("[2]", "[0,8]"), 12), "not a valid"),
            (with_header(&entry("[4294967296,4294967296,4]", "[0,8]"), 8), "not a valid"),
            (with_header(&entry("[2]", "[0,18446744073709551615]"), 8), "18446744073709551615"),
            (with_header(&entry("[2]", "[8,0]"), 8), "8 to 0"),
            (with_header(two, 6), "not a valid"),
            (with_header(r#"{"a":1}"#, 0), "malformed"),
            (with_header("{}", 0), "no tensor"),
            (with_header(&format!("{{{one},{one}}}"), 4), "'a' is given twice"),
            (with_header(&format!(r#"{{{one},"__metadata__":{{"k":"1","k":"2"}}}}"#), 4), "'k' is given twice"),
            (
                with_header(&format!(r#"{{"__metadata__":{{}},{one},"__metadata__":{{}}}}"#), 4),
                "'__metadata__' is given twice",
            ),
            (
                with_header(r#"{"a":{"dtype":"U8","shape":[4],"shape":[2,2],"data_offsets":[0,4]}}"#, 4),
                "duplicate field",
            ),
            (with_header(&format!(r#"{{{one},"__metadata__":{{"k":1}}}}"#), 4), "malformed"),
            (b"\x93NUMPY\x01\x00v\x00".to_vec(), "an .npy array"),
            (b"PK\x03\x04\x14\x00\x00\x00".to_vec(), "a ZIP archive"),
            (b"version https://git-lfs.github.com/spec/v1".to_vec(), "LFS"),
        ] {
            let message = open_bytes(&bytes).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn values_that_are_not_finite_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = write(folder.path(), "m.safetensors", &[("a.weight", vec![1, 3], vec![0.0, f32::NAN, 0.0])]);
        let checkpoint = SafetensorsSource::open(&path).unwrap();
        let checkpoint: &dyn TensorSource = &checkpoint;
        let entry = checkpoint.tensor("a.weight").unwrap();
        for message in
            [checkpoint.matrix(entry).unwrap_err().to_string(), checkpoint.refuse_nan(entry).unwrap_err().to_string()]
        {
            assert!(
                message.contains("a.weight") && message.contains("NaN") && message.contains("index 1"),
                "{message}"
            );
        }
    }

    proptest! {
        /// Whatever the bytes, an answer and no panic.
        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = open_bytes(&bytes);
        }

        /// A valid file with a few bytes changed or cut off.
        #[test]
        fn damaged_files(cut in 0usize..200, at in 0usize..200, byte in any::<u8>()) {
            let header = r#"{"a.weight":{"dtype":"F16","shape":[3,2],"data_offsets":[0,12]},"b":{"dtype":"I8","shape":[],"data_offsets":[12,13]}}"#;
            let mut bytes = with_header(header, 13);
            let length = bytes.len();
            bytes[at % length] = byte;
            bytes.truncate(length - cut.min(length) * usize::from(cut < 20));
            if let Ok(checkpoint) = open_bytes(&bytes) {
                let checkpoint: &dyn TensorSource = &checkpoint;
                for tensor in checkpoint.tensors().values() {
                    let _ = checkpoint.matrix(tensor);
                    prop_assert_eq!(checkpoint.bytes(tensor).unwrap().len() as u64, tensor.byte_len());
                }
            }
        }
    }
}
