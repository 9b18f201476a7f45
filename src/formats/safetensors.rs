//! Safetensors checkpoints: one file, a sharded index, or a folder; tensors are read when they are asked for.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::SafeTensors;
use serde::Deserialize;

use super::source::{TensorInfo, TensorSource};
use crate::error::{Error, Result};
use crate::layer::DType;

const INDEX: &str = "model.safetensors.index.json";

/// An open safetensors checkpoint. Dropping it closes its files.
#[derive(Debug)]
pub struct SafetensorsSource {
    path: PathBuf,
    files: Vec<OpenFile>,
    tensors: BTreeMap<String, TensorInfo>,
    /// Where each tensor lies.
    places: HashMap<String, Place>,
    metadata: BTreeMap<String, String>,
}

#[derive(Debug)]
struct OpenFile {
    name: String,
    path: PathBuf,
    file: File,
}

impl OpenFile {
    /// Reads bytes of the file, and finds out where it has become shorter: a mapping would end the process there.
    fn read(&self, bytes: &Range<usize>) -> Result<Vec<u8>> {
        let mut read = vec![0; bytes.len()];
        read_at(&self.file, &mut read, bytes.start as u64).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                let now = self.file.metadata().map_or(0, |m| m.len());
                let reason = format!(
                    "bytes {} to {} are not there any more: the file has been cut to {now} bytes since it was opened",
                    bytes.start, bytes.end
                );
                Error::file(&self.path, reason)
            }
            _ => Error::io(&self.path, e),
        })?;
        Ok(read)
    }
}

#[cfg(unix)]
fn read_at(file: &File, into: &mut [u8], at: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, into, at)
}

#[cfg(windows)]
fn read_at(file: &File, mut into: &mut [u8], mut at: u64) -> std::io::Result<()> {
    while !into.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, into, at)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            read => (into, at) = (&mut into[read..], at + read as u64),
        }
    }
    Ok(())
}

#[derive(Debug, Clone)]
struct Place {
    file: usize,
    bytes: Range<usize>,
}

impl SafetensorsSource {
    /// Opens a `.safetensors` file, a `.index.json` of shards, or a folder that holds either.
    ///
    /// The files should not be changed while the checkpoint is open. A tensor that a file no longer holds whole is an error.
    ///
    /// # Errors
    /// When a file is missing, truncated, or not what safetensors allows: the message names the file and what was
    /// found. Nothing beyond the headers is read.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let kind = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
        let files = if kind.is_dir() {
            let index = path.join(INDEX);
            if index.is_file() { shards(&index)? } else { files_in(path)? }
        } else if path.extension().is_some_and(|e| e == "json") {
            shards(path)?
        } else {
            vec![path.to_owned()]
        };
        let mut checkpoint = SafetensorsSource::empty(path);
        for file in files {
            checkpoint.add_file(&file)?;
        }
        if checkpoint.tensors.is_empty() {
            return Err(Error::file(path, "the checkpoint holds no tensor"));
        }
        Ok(checkpoint)
    }

    fn empty(path: &Path) -> Self {
        SafetensorsSource {
            path: path.to_owned(),
            files: vec![],
            tensors: BTreeMap::new(),
            places: HashMap::new(),
            metadata: BTreeMap::new(),
        }
    }

    fn add_file(&mut self, path: &Path) -> Result<()> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        // SAFETY: only the header is read from it, now.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        let (tensors, metadata) = read_header(&map).map_err(|reason| Error::file(path, reason))?;
        let index = self.files.len();
        for (name, dtype, shape, start, end) in tensors {
            self.tensors.insert(name.clone(), TensorInfo { name: name.clone(), dtype, shape });
            if let Some(other) = self.places.insert(name.clone(), Place { file: index, bytes: start..end }) {
                let other = &self.files[other.file].name;
                return Err(Error::file(path, format!("tensor '{name}' is in this file and in {other}")));
            }
        }
        self.metadata.extend(metadata);
        let name = path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
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

    fn file_name(&self, tensor: &str) -> String {
        self.places.get(tensor).map(|place| self.files[place.file].name.clone()).unwrap_or_default()
    }

    /// The `__metadata__` of the files' headers.
    fn metadata(&self) -> BTreeMap<String, String> {
        self.metadata.clone()
    }
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: HashMap<String, String>,
}

/// The shard files that an index names, in order.
fn shards(index: &Path) -> Result<Vec<PathBuf>> {
    let text = std::fs::read_to_string(index).map_err(|e| Error::io(index, e))?;
    let parsed: ShardIndex = serde_json::from_str(&text)
        .map_err(|e| Error::file(index, format!("not an index of safetensors shards: {e}")))?;
    let mut names: Vec<&String> = parsed.weight_map.values().collect();
    names.sort();
    names.dedup();
    if names.is_empty() {
        return Err(Error::file(index, "the index's weight_map names no shard"));
    }
    let folder = index.parent().unwrap_or(Path::new("."));
    let mut files = Vec::with_capacity(names.len());
    for name in names {
        // A shard lies beside its index: anything else is a mistake or an attempt to read other files.
        if Path::new(name).file_name().is_none_or(|n| n != name.as_str()) {
            return Err(Error::file(index, format!("shard '{name}' is not a plain file name")));
        }
        let file = folder.join(name);
        if !file.is_file() {
            return Err(Error::file(index, format!("shard '{name}' is missing from {}", folder.display())));
        }
        files.push(file);
    }
    let mut open = SafetensorsSource::empty(index);
    for file in &files {
        open.add_file(file)?;
    }
    for (tensor, shard) in &parsed.weight_map {
        let found = open.tensors.get(tensor).map(|t| open.file_name(&t.name));
        if found.as_deref() != Some(shard.as_str()) {
            let found = found.map_or("in no shard".to_owned(), |f| format!("in {f}"));
            return Err(Error::file(
                index,
                format!("the index says that tensor '{tensor}' is in {shard}; it is {found}"),
            ));
        }
    }
    Ok(files)
}

/// All safetensors files of a folder, in order.
fn files_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let path = entry.map_err(|e| Error::io(folder, e))?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(Error::file(folder, format!("the folder holds neither {INDEX} nor a .safetensors file")));
    }
    Ok(files)
}

type Header = (Vec<(String, DType, Vec<usize>, usize, usize)>, HashMap<String, String>);

/// Reads and checks a header; the reason why not, if it cannot be used.
fn read_header(bytes: &[u8]) -> std::result::Result<Header, String> {
    let size = bytes.len();
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(format!("the file has {size} bytes; a safetensors file has at least 8"));
    };
    if bytes.starts_with(b"version https://git-lfs") {
        return Err("the file is a Git LFS pointer, not the checkpoint: fetch it with git lfs pull".into());
    }
    let length = u64::from_le_bytes(*length);
    let header = match usize::try_from(length).ok().and_then(|n| rest.get(..n)) {
        Some(header) => header,
        None => {
            return Err(format!(
                "the header claims {length} bytes in a file of {size}: the file is truncated, or not safetensors"
            ));
        }
    };
    // The library adds offsets without a check for overflow, so hold them to the file first.
    let data = (rest.len() - header.len()) as u64;
    #[derive(Deserialize)]
    struct Offsets {
        data_offsets: (u64, u64),
    }
    let claims: HashMap<String, serde_json::Value> =
        serde_json::from_slice(header).map_err(|e| format!("the header is not JSON: {e}"))?;
    for (name, claim) in &claims {
        if name == "__metadata__" {
            continue;
        }
        let Offsets { data_offsets: (start, end) } =
            Offsets::deserialize(claim).map_err(|e| format!("the header's entry '{name}' is malformed: {e}"))?;
        if start > end || end > data {
            return Err(format!(
                "tensor '{name}' lies at bytes {start} to {end}, but the file holds {data} bytes of data"
            ));
        }
    }
    let parsed = SafeTensors::deserialize(bytes).map_err(|e| format!("not a valid safetensors file: {e}"))?;
    let start_of_data = 8 + header.len();
    let mut tensors = Vec::with_capacity(parsed.len());
    for (name, view) in parsed.iter() {
        // A zero in a shape hides what the other numbers come to.
        let size = view.shape().iter().filter(|n| **n > 0).try_fold(8usize, |n, &d| n.checked_mul(d));
        if size.is_none() {
            return Err(format!("tensor '{name}' has shape {:?}, which overflows", view.shape()));
        }
        let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        debug_assert!(start >= start_of_data || view.data().is_empty());
        tensors.push((name.to_owned(), view.dtype(), view.shape().to_vec(), start, start + view.data().len()));
    }
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
    Ok((tensors, metadata.metadata().clone().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::super::source::{SourceContent, SourceLayer};
    use super::*;
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
        assert_eq!(SafetensorsSource::open(folder.path()).unwrap().tensors().len(), 2);
        let index = folder.path().join(INDEX);
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
        ] {
            assert!(say(map).unwrap_err().contains(expected), "{map}");
        }
        write(folder.path(), "s2.safetensors", &[("a.weight", vec![1, 1], vec![2.0])]);
        std::fs::remove_file(&index).unwrap();
        assert!(SafetensorsSource::open(folder.path()).unwrap_err().to_string().contains("in this file and in s1"));
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
