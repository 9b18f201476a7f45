//! Checkpoints that PyTorch has saved (`.bin`, `.pt`, `.pth`): archives, and files of before version 1.6. Nothing of them is run.

mod pickle;

#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use memmap2::Mmap;
use rawzip::{CompressionMethod, ZipArchive};

use self::pickle::{Pickle, Value, Values};
use super::opened::OpenFile;
use super::regular;
use super::source::{TensorInfo, TensorSource};
use crate::error::{Error, Result};

/// The number that files of before version 1.6 begin with.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];

/// Keys under which a training checkpoint holds the model.
const STATES: [&str; 4] = ["state_dict", "model_state_dict", "model", "module"];

/// Dictionaries in dictionaries, at most.
const MOST_DEPTH: usize = 16;

/// The index of shards in a folder, and the file that a folder's checkpoint is in without one.
const INDEX: &str = "pytorch_model.bin.index.json";
const MODEL: &str = "pytorch_model.bin";

/// An open checkpoint of PyTorch's: one file, or the shards that an index lists. Dropping it closes them.
#[derive(Debug)]
pub struct PytorchSource {
    path: PathBuf,
    files: Vec<OpenFile>,
    tensors: BTreeMap<String, TensorInfo>,
    views: HashMap<String, View>,
    notes: Vec<String>,
}

/// Where the elements of a tensor are.
#[derive(Debug)]
struct View {
    file: usize,
    /// The bytes of the file from the first element to the last.
    bytes: std::ops::Range<usize>,
    /// In elements; none where they lie side by side.
    strides: Option<Vec<usize>>,
}

impl PytorchSource {
    /// Returns whether a path is such a checkpoint: a file by its ending, an index of such files, or a folder that has one of the usual
    /// names and no safetensors.
    pub fn is(path: &Path) -> bool {
        let ends = |endings: &[&str]| {
            let name = path.file_name().map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
            endings.iter().any(|ending| name.ends_with(ending))
        };
        if path.is_dir() {
            let has_safetensors =
                std::fs::read_dir(path).into_iter().flatten().filter_map(|entry| entry.ok()).any(|entry| {
                    let name = entry.file_name().to_string_lossy().to_lowercase();
                    !name.starts_with('.')
                        && (name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json"))
                });
            return !has_safetensors && (path.join(INDEX).is_file() || path.join(MODEL).is_file());
        }
        ends(&[".bin", ".pt", ".pth", ".bin.index.json", ".pt.index.json"])
    }

    /// Opens a file, an index of shards, or a folder.
    ///
    /// A tensor's name is that of its key; of dictionaries in dictionaries, the keys with points between them. Where the file holds the
    /// state of a training, the model is taken from `state_dict`, `model_state_dict`, `model` or `module`.
    ///
    /// # Errors
    /// When a file is missing, cut short, or holds something else than tensors and collections of them: a class that is not known is
    /// named, and not run. Of the tensors themselves nothing is read.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut source = PytorchSource {
            path: path.to_owned(),
            files: vec![],
            tensors: BTreeMap::new(),
            views: HashMap::new(),
            notes: vec![],
        };
        for (file, listed) in files(path)? {
            source.add(&file, listed.as_deref())?;
        }
        if source.tensors.is_empty() {
            return Err(Error::file(path, "the checkpoint holds no tensor"));
        }
        Ok(source)
    }

    /// Adds the tensors of a file, with `listed` only those.
    fn add(&mut self, path: &Path, listed: Option<&[String]>) -> Result<()> {
        let wrong =
            |reason: String| Error::file(path, format!("not a checkpoint of PyTorch's that can be read: {reason}"));
        let file = regular::open(path)?;
        // SAFETY: only the pickle and the directory are read from it, now.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        let Contents { tensors, left_out } = contents(&map).map_err(wrong)?;
        let number = self.files.len();
        let mut found = 0;
        for (name, tensor, view) in tensors {
            if listed.is_some_and(|listed| !listed.contains(&name)) {
                continue;
            }
            found += 1;
            self.views.insert(name.clone(), View { file: number, ..view });
            let info = TensorInfo { name: name.clone(), dtype: tensor.dtype, shape: tensor.shape.clone() };
            if self.tensors.insert(name.clone(), info).is_some() {
                return Err(Error::file(path, format!("tensor '{name}' is there twice")));
            }
        }
        if let Some(listed) = listed.filter(|listed| listed.len() != found) {
            let missing = listed.iter().find(|name| !self.tensors.contains_key(*name));
            let missing = missing.map_or_else(|| "none".into(), |name| format!("'{name}'"));
            return Err(Error::file(path, format!("the index says that {missing} is in it, and it is not")));
        }
        if let Some(first) = left_out.first() {
            let more = left_out.len() - 1;
            let others = if more > 0 { format!(" and {more} more") } else { String::new() };
            self.notes.push(format!("'{first}'{others} of the checkpoint is no tensor of the model, and left out"));
        }
        let name = path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
        self.files.push(OpenFile { name, path: path.to_owned(), file });
        Ok(())
    }
}

/// Returns the files of a checkpoint, and the tensors that an index lists for each.
fn files(path: &Path) -> Result<Vec<(PathBuf, Option<Vec<String>>)>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index = match path {
        folder if folder.is_dir() && folder.join(INDEX).is_file() => folder.join(INDEX),
        folder if folder.is_dir() => return Ok(vec![(folder.join(MODEL), None)]),
        file if file.extension().is_some_and(|extension| extension == "json") => file.to_owned(),
        file => return Ok(vec![(file.to_owned(), None)]),
    };
    let listed: Index = serde_json::from_str(&regular::read_to_string(&index)?)
        .map_err(|e| Error::file(&index, format!("not an index of shards: {e}")))?;
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    listed.weight_map.into_iter().for_each(|(tensor, shard)| shards.entry(shard).or_default().push(tensor));
    let plain = |shard: &String| Path::new(shard).file_name().is_some_and(|name| name.to_string_lossy() == **shard);
    if let Some(other) = shards.keys().find(|shard| !plain(shard)) {
        return Err(Error::file(&index, format!("shard '{other}', expected the name of a file beside the index")));
    }
    Ok(shards.into_iter().map(|(shard, tensors)| (index.with_file_name(shard), Some(tensors))).collect())
}

/// What a file holds.
struct Contents {
    tensors: Vec<(String, Rc<pickle::Tensor>, View)>,
    /// Keys of what is no tensor.
    left_out: Vec<String>,
}

fn contents(file: &[u8]) -> pickle::Result<Contents> {
    if file.starts_with(regular::ZIP) {
        return in_archive(file);
    }
    let mut pickle = Pickle::at(file, 0);
    match pickle.read().map_err(|e| format!("neither an archive nor a pickle: {e}"))? {
        Value::Bytes(magic) if *magic == MAGIC => {}
        _ => return Err("it does not begin with the number that PyTorch's files begin with".into()),
    }
    // The protocol, and the sizes of C's types.
    for _ in 0..2 {
        pickle = Pickle::at(file, pickle.place());
        pickle.read()?;
    }
    let mut of_tensors = Pickle::at(file, pickle.place());
    let root = of_tensors.read()?;
    let (found, left_out) = named(&root, of_tensors.values());
    let mut of_keys = Pickle::at(file, of_tensors.place());
    let keys = of_keys.read()?;
    let types: HashMap<&str, usize> =
        found.iter().map(|(_, t)| (t.storage.key.as_str(), t.dtype.bitsize() / 8)).collect();
    let (mut at, mut places) = (of_keys.place(), HashMap::new());
    for key in of_keys.values().of(&keys) {
        let Value::Text(key) = key else { return Err("a storage's key that is no text".into()) };
        let count = file.get(at..).and_then(|rest| rest.first_chunk()).map(|count| u64::from_le_bytes(*count));
        let count = count.ok_or("the file ends before its storages")?;
        // One that no tensor is a view of has no size that is known, and ends the list.
        let Some(size) = types.get(&**key) else { return Err(format!("storage {key}, which no tensor is a view of")) };
        let end = usize::try_from(count).ok().and_then(|count| count.checked_mul(*size)?.checked_add(at + 8));
        let end = end
            .filter(|end| *end <= file.len())
            .ok_or_else(|| format!("storage {key} of {count} elements goes beyond the file"))?;
        places.insert(key.to_string(), at + 8..end);
        at = end;
    }
    Ok(Contents { tensors: placed(found, &places)?, left_out })
}

/// The tensors of an archive: `NAME/data.pkl`, and a file `NAME/data/KEY` for each storage.
fn in_archive(file: &[u8]) -> pickle::Result<Contents> {
    let archive = ZipArchive::from_slice(file).map_err(|e| e.to_string())?;
    let (mut pickled, mut places) = (None, HashMap::new());
    let mut entries = archive.entries();
    while let Some(entry) = entries.next_entry().map_err(|e| e.to_string())? {
        let name = String::from_utf8_lossy(entry.file_path().as_ref()).into_owned();
        let is_pickle = name == "data.pkl" || name.ends_with("/data.pkl");
        let key = name.rsplit_once("data/").filter(|(before, _)| before.is_empty() || before.ends_with('/'));
        if name.ends_with("/byteorder") || name == "byteorder" {
            let part = archive.get_entry(entry.wayfinder()).map_err(|e| format!("{name}: {e}"))?;
            if part.data() != b"little" {
                return Err("numbers are not little-endian".into());
            }
        }
        if !is_pickle && key.is_none() {
            continue;
        }
        if entry.compression_method() != CompressionMethod::STORE {
            return Err(format!("{name} is compressed; PyTorch stores it as it is"));
        }
        let part = archive.get_entry(entry.wayfinder()).map_err(|e| format!("{name}: {e}"))?;
        let (start, end) = part.compressed_data_range();
        let range = start as usize..end as usize;
        match key {
            Some((_, key)) if !is_pickle => _ = places.insert(key.to_owned(), range),
            _ => pickled = Some(range),
        }
    }
    let pickled =
        pickled.ok_or("there is no data.pkl in it: no archive of tensors (TorchScript's have code beside)")?;
    let bytes = file.get(pickled).ok_or("data.pkl goes beyond the file")?;
    let mut pickle = Pickle::at(bytes, 0);
    let root = pickle.read()?;
    let (found, left_out) = named(&root, pickle.values());
    Ok(Contents { tensors: placed(found, &places)?, left_out })
}

type Named = (Vec<(String, Rc<pickle::Tensor>)>, Vec<String>);

/// Finds the tensors of a state by name, and the keys of what is none.
fn named(root: &Value, values: &Values) -> Named {
    let (mut tensors, mut left_out) = (vec![], vec![]);
    let entry = |wanted: &str| {
        let items = values.of(root).as_chunks::<2>().0.iter();
        let mut found = items.filter(|[key, _]| matches!(key, Value::Text(key) if **key == *wanted));
        found.next_back().filter(|_| matches!(root, Value::Dict(_))).map(|[_, value]| value)
    };
    let state = STATES.iter().find_map(|key| entry(key).filter(|value| matches!(value, Value::Dict(_))));
    if state.is_some() {
        let keys = values.of(root).as_chunks::<2>().0.iter().filter_map(|[key, _]| match key {
            Value::Text(key) => Some(key.to_string()),
            _ => None,
        });
        left_out.extend(keys.filter(|key| !STATES.contains(&key.as_str())));
    }
    collect(state.unwrap_or(root), values, "", 0, &mut (&mut tensors, &mut left_out));
    (tensors, left_out)
}

fn collect(
    value: &Value,
    values: &Values,
    prefix: &str,
    depth: usize,
    into: &mut (&mut Vec<(String, Rc<pickle::Tensor>)>, &mut Vec<String>),
) {
    for [key, value] in values.of(value).as_chunks::<2>().0 {
        let key = match key {
            Value::Text(key) => key.to_string(),
            Value::Int(key) => key.to_string(),
            _ => continue,
        };
        let name = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
        match value {
            Value::Tensor(tensor) => into.0.push((name, tensor.clone())),
            Value::Dict(_) if depth < MOST_DEPTH => collect(value, values, &name, depth + 1, into),
            _ => into.1.push(name),
        }
    }
}

/// Says where each tensor's elements are.
///
/// # Errors
/// When they are not all in its storage.
fn placed(
    tensors: Vec<(String, Rc<pickle::Tensor>)>,
    places: &HashMap<String, std::ops::Range<usize>>,
) -> pickle::Result<Vec<(String, Rc<pickle::Tensor>, View)>> {
    let place = |(name, tensor): (String, Rc<pickle::Tensor>)| {
        let storage = places.get(&tensor.storage.key);
        let storage =
            storage.ok_or_else(|| format!("tensor '{name}': its storage {} is not there", tensor.storage.key))?;
        let size = tensor.dtype.bitsize() / 8;
        let elements = tensor.shape.iter().try_fold(1usize, |all, &n| all.checked_mul(n));
        let last = tensor
            .shape
            .iter()
            .zip(&tensor.strides)
            .try_fold(0usize, |last, (&n, &stride)| last.checked_add(n.saturating_sub(1).checked_mul(stride)?));
        let ends = elements.zip(last).and_then(|(elements, last)| {
            let count = if elements == 0 { 0 } else { last.checked_add(1)? };
            let first = tensor.offset.checked_mul(size)?.checked_add(storage.start)?;
            Some((first, first.checked_add(count.checked_mul(size)?)?, elements))
        });
        let Some((first, end, elements)) = ends.filter(|(_, end, _)| *end <= storage.end) else {
            let found = format!("offset {}, shape {:?} and strides {:?}", tensor.offset, tensor.shape, tensor.strides);
            return Err(format!("tensor '{name}': {found} in a storage of {} bytes", storage.len()));
        };
        let mut expected = 1;
        let side_by_side = tensor.shape.iter().zip(&tensor.strides).rev().all(|(&n, &stride)| {
            let fits = n <= 1 || stride == expected;
            expected *= n.max(1);
            fits
        });
        // Expanded from few elements, it would be more than the file holds.
        if elements > storage.len() / size.max(1) {
            return Err(format!("tensor '{name}' of shape {:?} repeats elements of its storage", tensor.shape));
        }
        let strides = (!side_by_side && elements > 0).then(|| tensor.strides.clone());
        Ok((name, tensor, View { file: 0, bytes: first..end, strides }))
    };
    tensors.into_iter().map(place).collect()
}

/// Elements of a view, in the order of its shape.
fn gathered(bytes: &[u8], size: usize, shape: &[usize], strides: &[usize]) -> Vec<u8> {
    let count: usize = shape.iter().product();
    let mut all = Vec::with_capacity(count * size);
    let mut index = vec![0usize; shape.len()];
    for _ in 0..count {
        let at = index.iter().zip(strides).map(|(i, stride)| i * stride).sum::<usize>() * size;
        all.extend_from_slice(&bytes[at..at + size]);
        for (i, &n) in index.iter_mut().zip(shape).rev() {
            *i += 1;
            if *i < n {
                break;
            }
            *i = 0;
        }
    }
    all
}

impl TensorSource for PytorchSource {
    fn path(&self) -> &Path {
        &self.path
    }

    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    fn bytes(&self, tensor: &TensorInfo) -> Result<Cow<'_, [u8]>> {
        let Some(view) = self.views.get(&tensor.name) else {
            let found = format!("'{}'", tensor.name);
            return Err(Error::expected("tensor", found, format!("one of {}", self.path.display())));
        };
        let bytes = self.files[view.file].read(&view.bytes)?;
        Ok(match &view.strides {
            None => bytes.into(),
            Some(strides) => gathered(&bytes, tensor.dtype.bitsize() / 8, &tensor.shape, strides).into(),
        })
    }

    fn file_name(&self, tensor: &str) -> String {
        self.views.get(tensor).map(|view| self.files[view.file].name.clone()).unwrap_or_default()
    }

    fn notes(&self) -> Vec<String> {
        self.notes.clone()
    }
}
