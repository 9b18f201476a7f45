//! Files that are read: regular ones that hold content. What is something else is named.

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

/// Files that are taken for safetensors by mistake: how they begin, and what they are.
const OTHERS: [(&[u8], &str); 7] = [
    (b"\x93NUMPY", "an .npy array"),
    (b"PK\x03\x04", "a ZIP archive, as PyTorch's .bin and .pt, NumPy's .npz and Keras's .keras files are"),
    (b"GGUF", "a GGUF model"),
    (b"\x89HDF", "an HDF5 file"),
    (b"<", "a page of HTML or XML"),
    (b"{", "JSON"),
    (b"\x1f\x8b", "a gzip archive"),
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

/// Returns what a file is by its first bytes, if it is of a kind that is taken for safetensors by mistake.
pub fn taken_for_safetensors(start: &[u8]) -> Option<&'static str> {
    OTHERS.iter().find(|(mark, _)| start.starts_with(mark)).map(|(_, what)| *what)
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
        assert_eq!(read_to_string(&pointer).unwrap(), "text");
        #[cfg(unix)]
        {
            let fifo = folder.path().join("fifo");
            rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
            refuse(&fifo, "it is a FIFO");
        }
    }
}
