//! Files that belong to a model beside its tensors: its configuration, its tokenizer, its chat template.

use std::io::Read;
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;

use super::regular;
use crate::error::{Error, Result};

/// The most bytes that a file beside a model may have.
pub const MOST_BYTES: u64 = 64 << 20;

/// Files that belong to a model wherever they lie beside it.
const USUAL: [&str; 22] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    // Of sentence-transformers.
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "2_Normalize/config.json",
];

/// A file that belongs to a model, read when it is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SideFile {
    /// Its name, with `/` between the folders that are between it and the model's own.
    pub name: String,
    content: Content,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    At(PathBuf),
    Made(Bytes),
}

impl SideFile {
    /// Returns a file of this content.
    pub fn new(name: &str, content: impl Into<Bytes>) -> Self {
        SideFile { name: name.to_owned(), content: Content::Made(content.into()) }
    }

    /// Returns whether the name can be written beside a model again: with `/` between folders, and none that leads out of the model's.
    pub(crate) fn has_portable_name(&self) -> bool {
        portable(Path::new(&self.name)).as_deref() == Some(&*self.name)
    }

    /// Reads it.
    ///
    /// # Errors
    /// When it cannot be read, only points to its content, or has more than 64 MiB.
    pub fn read(&self) -> Result<Bytes> {
        let path = match &self.content {
            Content::Made(bytes) => return Ok(bytes.clone()),
            Content::At(path) => path,
        };
        let mut bytes = vec![];
        regular::open(path)?.take(MOST_BYTES + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
        match bytes.len() as u64 > MOST_BYTES {
            true => Err(too_large(path)),
            false => Ok(bytes.into()),
        }
    }
}

fn too_large(path: &Path) -> Error {
    Error::file(
        path,
        format!("a file to keep with the model, of more than {} MiB: expected at most that", MOST_BYTES >> 20),
    )
}

/// Finds the usual files beside the model at a path, and those that are named: relative to the model's folder, or absolute. Returns them
/// by name, and notes of what was left out.
///
/// # Errors
/// When a named file is not there, is too large, or has no name that could be written beside a model again.
pub fn beside(path: &Path, keep: &[PathBuf]) -> Result<(Vec<SideFile>, Vec<String>)> {
    let folder = match path.is_dir() {
        true => path,
        false => path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")),
    };
    let (mut files, mut notes): (Vec<SideFile>, _) = (vec![], vec![]);
    for name in USUAL.iter().filter(|_| owns_its_folder(path)) {
        let path = folder.join(name);
        let Ok(found) = std::fs::metadata(&path) else { continue };
        match found.len() {
            _ if !found.is_file() => {}
            bytes if bytes > MOST_BYTES => {
                notes.push(format!("'{name}' is left out: {bytes} bytes, where at most {MOST_BYTES} are kept"));
            }
            _ => files.push(SideFile { name: (*name).to_owned(), content: Content::At(path) }),
        }
    }
    for named in keep {
        let name = match named.is_absolute() {
            true => named.file_name().map(|name| name.to_string_lossy().into_owned()),
            false => portable(named),
        };
        let at = folder.join(named);
        let name = name.ok_or_else(|| {
            Error::file(named, "a file to keep has to be named relative to the model's folder, or by an absolute path")
        })?;
        let file = regular::open(&at)?;
        if file.metadata().map_err(|e| Error::io(&at, e))?.len() > MOST_BYTES {
            return Err(too_large(&at));
        }
        let path_of = |file: &SideFile| match &file.content {
            Content::At(path) => path.canonicalize().ok(),
            Content::Made(_) => None,
        };
        match files.iter().find(|file| file.name == name) {
            None => files.push(SideFile { name, content: Content::At(at) }),
            Some(same) if path_of(same).is_some_and(|path| at.canonicalize().is_ok_and(|at| at == path)) => {}
            Some(_) => return Err(Error::file(&at, format!("another file is kept as '{name}' already, expected one"))),
        }
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok((files, notes))
}

/// Whether what lies in a model's folder is the model's: it is given as a folder or an index, or by one of the names that a model has in
/// a folder of its own.
fn owns_its_folder(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    let stem = name.split('.').next().unwrap_or_default();
    let model =
        ["model", "pytorch_model"].iter().any(|usual| stem == *usual || stem.starts_with(&format!("{usual}-0")));
    path.is_dir() || name.ends_with(".json") || model && !name.ends_with(".gguf")
}

/// Returns a relative path with `/` between its names, if it stays in the folder that it starts from.
fn portable(path: &Path) -> Option<String> {
    let names = path.components().filter(|part| *part != Component::CurDir).map(|part| match part {
        Component::Normal(name) => name.to_str(),
        _ => None,
    });
    let names: Option<Vec<&str>> = names.collect();
    names.filter(|names| !names.is_empty()).map(|names| names.join("/"))
}

/// Returns where a file of this name belongs in a folder, if it is a name that stays in it.
pub fn place(folder: &Path, name: &str) -> Option<PathBuf> {
    let path = Path::new(name);
    (portable(path).as_deref() == Some(name)).then(|| folder.join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usual_and_named_files_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, name).unwrap();
        };
        ["config.json", "1_Pooling/config.json", "vocab.txt", "README.md", "onnx/a.json", "m.gguf"]
            .iter()
            .for_each(|name| write(name));
        let names = |path: &Path, keep: &[&str]| -> Result<Vec<String>> {
            let keep: Vec<PathBuf> = keep.iter().map(PathBuf::from).collect();
            Ok(beside(path, &keep)?.0.into_iter().map(|file| file.name).collect())
        };
        let usual = ["1_Pooling/config.json", "config.json", "vocab.txt"];
        let at = |name: &str| folder.path().join(name);
        for path in [folder.path().to_owned(), at("model.safetensors"), at("x.safetensors.index.json")] {
            assert_eq!(names(&path, &[]).unwrap(), usual, "{path:?}");
        }
        assert_eq!(
            names(&at("other.safetensors"), &["./README.md", "onnx/a.json"]).unwrap(),
            ["README.md", "onnx/a.json"]
        );
        assert_eq!(names(&at("m.gguf"), &[]).unwrap(), [""; 0]);
        let absolute = at("onnx/a.json");
        assert_eq!(names(&at("m.gguf"), &[absolute.to_str().unwrap()]).unwrap(), ["a.json"]);
        for wrong in ["none", "../config.json", "onnx", "."] {
            assert!(names(folder.path(), &[wrong]).is_err(), "{wrong}");
        }
        let file = &beside(folder.path(), &[]).unwrap().0[2];
        assert_eq!(file.read().unwrap(), "vocab.txt");
        std::fs::File::create(at("vocab.txt")).unwrap().set_len(MOST_BYTES + 1).unwrap();
        assert!(file.read().unwrap_err().to_string().contains("64 MiB"));
        let (files, notes) = beside(folder.path(), &[]).unwrap();
        assert_eq!((files.len(), notes.len()), (2, 1));
    }

    #[test]
    fn names_stay_in_their_folder() {
        let folder = Path::new("/x");
        assert_eq!(place(folder, "a/b.json"), Some(PathBuf::from("/x/a/b.json")));
        for wrong in ["", ".", "..", "../a", "/a", "a/../b", "./a", "a//b", "a/"] {
            assert_eq!(place(folder, wrong), None, "{wrong}");
        }
    }
}
