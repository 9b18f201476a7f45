//! Model files of other programs that these did not write: GGUF, PyTorch's, and quantised folders, with some of their bytes changed.

use std::path::{Path, PathBuf};

use layerstore::formats::{OpenOptions, SourceContent, open_with};

use super::choices::Choices;

/// A model: a file, or the files of a folder, and which of them are changed.
pub struct Model {
    name: String,
    files: Vec<(String, Vec<u8>)>,
}

impl Model {
    /// Reads a file or a folder.
    ///
    /// # Panics
    /// When it cannot be read.
    pub fn read(path: &Path) -> Self {
        let bytes = |path: &Path| std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let files = match path.is_dir() {
            false => vec![(name(path), bytes(path))],
            true => {
                let entries = std::fs::read_dir(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
                paths.sort();
                paths.iter().map(|path| (name(path), bytes(path))).collect()
            }
        };
        Model { name: name(path), files }
    }

    /// Writes the model into a folder, with some of its bytes changed where `choices` are given, and returns its path.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn write(&self, folder: &Path, choices: Option<&mut Choices>) -> PathBuf {
        let mut files = self.files.clone();
        if let Some(choices) = choices {
            let at = choices.below(files.len());
            let bytes = &mut files[at].1;
            // What says how the rest is to be read is at the beginning, or at the end of an archive.
            let length = bytes.len();
            match choices.below(4) {
                0 => choices.mutate(bytes),
                1 => {
                    let mut end = bytes.split_off(length - length.min(600));
                    choices.mutate(&mut end);
                    bytes.append(&mut end);
                }
                _ => {
                    let rest = bytes.split_off(length.min(1500));
                    choices.mutate(bytes);
                    bytes.extend(rest);
                }
            }
        }
        let single = self.files.len() == 1 && self.files[0].0 == self.name;
        let path = folder.join(&self.name);
        let inside = if single { folder.to_owned() } else { path.clone() };
        std::fs::create_dir_all(&inside).unwrap_or_else(|e| panic!("{}: {e}", inside.display()));
        for (name, bytes) in files {
            let file = inside.join(name);
            std::fs::write(&file, bytes).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        }
        path
    }
}

/// Opens a model, and reads all of its layers and files where it is one; returns whether it is.
///
/// # Panics
/// When opening or reading panics, or an error says nothing.
pub fn run(path: &Path) -> bool {
    let mut opened = false;
    for keep_names in [false, true] {
        let source = match open_with(path, OpenOptions { keep_names, ..OpenOptions::default() }) {
            Ok(source) => source,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                continue;
            }
        };
        opened = true;
        for layer in source.layers() {
            match layer.content {
                SourceContent::Tensors { weight, bias } => {
                    for tensor in std::iter::once(weight).chain(bias) {
                        let _bytes = source.bytes(&tensor).map_err(|e| e.to_string());
                        let _finite = source.refuse_nan(&tensor).map_err(|e| e.to_string());
                    }
                }
                SourceContent::Ready { layer, .. } => {
                    let _weight = layer.load().and_then(|layer| layer.weight()).map_err(|e| e.to_string());
                }
            }
        }
        for file in source.side_files() {
            let _content = file.read().map_err(|e| e.to_string());
        }
        let (_metadata, _notes) = (source.metadata(), source.notes());
    }
    opened
}
