//! A file that stays open while parts of it are read.

use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;

use crate::error::{Error, Result};

/// A file whose bytes are read when they are asked for.
#[derive(Debug)]
pub struct OpenFile {
    /// Its name, without its folder.
    pub name: String,
    /// Its path.
    pub path: PathBuf,
    /// The file, open for reading.
    pub file: File,
}

impl OpenFile {
    /// Reads bytes of the file, and finds out where it has become shorter: a mapping would end the process there.
    ///
    /// # Errors
    /// When the bytes are not there any more, or cannot be read.
    pub fn read(&self, bytes: &Range<usize>) -> Result<Vec<u8>> {
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
