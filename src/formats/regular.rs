//! Files that are read: regular ones that hold content of the kind that is asked for. What is something else is named.

use std::fs::{File, Metadata};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use crate::error::{Error, Result};

/// What stands in the place of a file that is kept elsewhere: how it begins, and how the file is fetched.
const POINTERS: [(&[u8], &str); 3] = [
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: fetch it with git lfs pull"),
    (b"/annex/objects/", "a git-annex pointer, not the file itself: fetch it with git annex get"),
    (b"# xet version", "a Xet pointer, not the file itself: fetch it with git xet checkout"),
];

/// How an `.npy` file begins.
pub const NPY: &[u8] = b"\x93NUMPY";

/// How a ZIP archive begins.
pub const ZIP: &[u8] = b"PK\x03\x04";

/// Kinds of files that are given in the place of others: how they begin, and what they are.
const KINDS: [(&[u8], &str); 8] = [
    (NPY, "an .npy array"),
    (ZIP, "a ZIP archive, as PyTorch's .bin and .pt, NumPy's .npz and Keras's .keras files are"),
    (b"GGUF", "a GGUF model"),
    (b"\x89HDF", "an HDF5 file"),
    (b"<", "a page of HTML or XML"),
    (b"{", "JSON"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x80\x02\x8a\x0a", "a Python pickle, as older files of PyTorch are"),
];

/// Opens a file to be read.
///
/// # Errors
/// When there is none, it is no regular file (opening a FIFO would wait for a writer), or it only points to the content.
pub fn open(path: &Path) -> Result<File> {
    let kind = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if !kind.is_file() {
        return Err(Error::file(path, format!("it is {}, expected a regular file", kind_of(&kind))));
    }
    let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut start = Vec::new();
    let read = (&mut file).take(64).read_to_end(&mut start).and_then(|_| file.seek(SeekFrom::Start(0)));
    read.map_err(|e| Error::io(path, e))?;
    match POINTERS.iter().find(|(mark, _)| start.starts_with(mark)) {
        Some((_, what)) => Err(Error::file(path, format!("it is {what}"))),
        None => Ok(file),
    }
}

/// Reads a file of text.
///
/// # Errors
/// As [`open`], and when it is not UTF-8.
pub fn read_to_string(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    String::from_utf8(bytes).map_err(|_| Error::file(path, "the file is not UTF-8"))
}

/// Reads a file of settings that a person has written in TOML; `what` says of what, for messages. A pipe is read, too.
///
/// # Errors
/// When it cannot be read, or is of another kind; when it is not UTF-8, with the line.
pub fn read_toml(path: &Path, what: &str) -> Result<String> {
    let kind = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if kind.is_dir() {
        return Err(Error::file(path, format!("it is a directory; expected a file of {what} in TOML")));
    }
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    if let Some(found) = kind_of_content(&bytes).filter(|found| *found != TEXT) {
        return Err(Error::file(path, format!("the file is {found}; expected {what} in TOML")));
    }
    String::from_utf8(bytes).map_err(|e| {
        let valid = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        let line = 1 + valid.iter().filter(|b| **b == b'\n').count();
        Error::Rules { file: path.display().to_string(), line, message: "the file is not UTF-8".into() }
    })
}

const TEXT: &str = "text";

/// Returns what a file holds, with its article, by its first bytes, where that can be told.
pub fn kind_of_content(start: &[u8]) -> Option<&'static str> {
    taken_for_safetensors(start).or_else(|| begins_as_safetensors(start).then_some("a safetensors file"))
}

/// Returns what a file is by its first bytes, if it is of a kind that is taken for safetensors by mistake.
pub fn taken_for_safetensors(start: &[u8]) -> Option<&'static str> {
    let known = KINDS.iter().find(|(mark, _)| start.starts_with(mark)).map(|(_, what)| *what);
    known.or_else(|| is_text(start).then_some(TEXT))
}

/// A length of less than 2^32, and a JSON object.
fn begins_as_safetensors(start: &[u8]) -> bool {
    start.get(4..9) == Some(b"\0\0\0\0{")
}

/// Whether the first bytes are text, of which the last character may be cut off.
fn is_text(start: &[u8]) -> bool {
    let start = &start[..start.len().min(64)];
    let text = match std::str::from_utf8(start) {
        Ok(text) => text,
        Err(e) if e.error_len().is_none() => str::from_utf8(&start[..e.valid_up_to()]).unwrap_or_default(),
        Err(_) => return false,
    };
    !text.is_empty() && text.chars().all(|c| !c.is_control() || matches!(c, '\n' | '\r' | '\t'))
}

/// Returns what lies at a path, with its article.
pub fn kind_of(metadata: &Metadata) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        let kind = metadata.file_type();
        for (is, what) in [
            (kind.is_fifo(), "a FIFO"),
            (kind.is_socket(), "a socket"),
            (kind.is_char_device(), "a character device"),
            (kind.is_block_device(), "a block device"),
        ] {
            if is {
                return what;
            }
        }
    }
    match (metadata.is_dir(), metadata.is_file()) {
        (true, _) => "a directory",
        (_, true) => "a regular file",
        _ => "no regular file",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_content_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let refuse = |path: &Path, expected: &str| {
            let message = open(path).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        };
        refuse(folder.path(), "it is a directory");
        let pointer = folder.path().join("pointer");
        std::fs::write(&pointer, "version https://git-lfs.github.com/spec/v1\noid sha256:00\n").unwrap();
        refuse(&pointer, "Git LFS pointer");
        std::fs::write(&pointer, "/annex/objects/SHA256E-s3--00\n").unwrap();
        refuse(&pointer, "git annex get");
        assert!(open(&folder.path().join("none")).unwrap_err().to_string().contains("none"));
        std::fs::write(&pointer, "text").unwrap();
        let toml = |path: &Path| read_toml(path, "rules").map_err(|e| e.to_string());
        assert_eq!(toml(&pointer).unwrap(), "text");
        assert!(toml(folder.path()).unwrap_err().contains("a directory; expected a file of rules in TOML"));
        for (content, expected) in [
            (&b"\x93NUMPY\x01\x00"[..], "an .npy array; expected rules in TOML"),
            (b"\x10\0\0\0\0\0\0\0{\"a\":1}", "a safetensors file; expected rules"),
            (b"{\"a\": 1}", "is JSON"),
            (b"a = 1\n\xff", "line 2: the file is not UTF-8"),
        ] {
            std::fs::write(&pointer, content).unwrap();
            let message = toml(&pointer).unwrap_err();
            assert!(message.contains(expected), "{message}");
        }
        // A character that the end of the look cuts off.
        assert_eq!(taken_for_safetensors(format!("{}é", "a".repeat(63)).as_bytes()), Some(TEXT));
        assert_eq!(taken_for_safetensors(b"a\0b"), None);
        assert_eq!(taken_for_safetensors(b""), None);
        std::fs::write(&pointer, "text").unwrap();
        assert_eq!(read_to_string(&pointer).unwrap(), "text");
        #[cfg(unix)]
        {
            let fifo = folder.path().join("fifo");
            rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
            refuse(&fifo, "it is a FIFO");
        }
    }
}
